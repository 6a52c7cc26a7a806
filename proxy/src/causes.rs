//! An error in one line, for logs and for people.
//!
//! Owns how its causes are told. Decides nothing: who branches on an error looks at its variant.

use std::error::Error;

/// An error and its causes, those left out that the text before quotes already.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Trouble {
        #[error("no disk")]
        Cause,
        #[error("cannot read: {0}")]
        Quotes(#[source] Box<Trouble>),
        #[error("cannot start")]
        Names(#[source] Box<Trouble>),
    }

    #[test]
    fn each_cause_is_told_once() {
        let error = Trouble::Names(Trouble::Quotes(Trouble::Cause.into()).into());
        assert_eq!(with_causes(&error), "cannot start: cannot read: no disk");
    }
}
