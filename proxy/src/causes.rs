//! An error in one line, for logs and for people.
//!
//! Owns how its causes are told. Decides nothing: who branches on an error looks at its variant. The kernel's number serves
//! for advice alone.

use std::error::Error;
use std::io;

use nix::errno::Errno;

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

/// Whether the kernel, or a security module, did not permit something.
pub fn is_not_permitted(error: &(dyn Error + 'static)) -> bool {
    let refused = [Errno::EPERM, Errno::EACCES].map(|errno| errno as i32);
    number(error).is_some_and(|number| refused.contains(&number))
}

/// What the kernel says, as a number.
pub fn number(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut causes = std::iter::successors(Some(error), |error| (*error).source());
    causes.find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error())
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
