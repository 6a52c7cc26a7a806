//! What is wrong with an object, in a form that a log line, `render` and `check` can all print.
//!
//! Owns the wording's frame: where, which object, which field, what value, what to do. Never logs.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// One thing that is wrong with one object or file, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Where it stands in a manifest folder; `None` for an object of the API server.
    pub place: Option<Place>,
    /// `Service default/web`; `None` where the text could not be read far enough to tell.
    pub object: Option<String>,
    /// The path of the field, as in `spec.ports[1].protocol`; empty where it is the whole object or file.
    pub field: String,
    /// The field's value, shortened; `None` where there is none.
    pub value: Option<String>,
    /// What is wrong with it and what to do.
    pub remedy: String,
}

/// A position in a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The file.
    pub file: Arc<PathBuf>,
    /// Line, from 1; 0 where it is the file as a whole.
    pub line: u64,
    /// Column in characters, from 1; 0 where it is the line as a whole.
    pub column: u64,
}

impl Problem {
    /// What stays the same as long as it is the same trouble: it may move to another line of its file.
    pub(crate) fn identity(&self) -> impl Ord {
        // What names neither object nor field is told apart by its place alone.
        let is_named = self.object.is_some() || !self.field.is_empty();
        let place = self.place.as_ref().map(
            |Place { file, line, column }| {
                if is_named { (file, 0, 0) } else { (file, *line, *column) }
            },
        );
        (place, &self.object, &self.field, &self.value, &self.remedy)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if self.column > 0 {
            write!(f, ":{}", self.column)?;
        }
        Ok(())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        match (self.field.as_str(), &self.value) {
            ("", _) => {}
            (field, Some(value)) => write!(f, "{field} is {value:?}: ")?,
            (field, None) => write!(f, "{field}: ")?,
        }
        f.write_str(&self.remedy)
    }
}

/// Shortens what came from outside to what a log line can bear.
pub(crate) fn shorten(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], text.len()),
    }
}
