//! One allocation for each distinct string.
//!
//! A cluster repeats few node names and port names hundreds of thousands of times.

use std::collections::HashSet;
use std::sync::Arc;

/// Hands out shared strings.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    strings: HashSet<Arc<str>>,
    /// The size at which strings that nobody else holds are dropped.
    sweep_at: usize,
}

impl Interner {
    /// The shared copy of a string.
    pub(crate) fn intern(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.strings.get(text) {
            return Arc::clone(known);
        }
        if self.strings.len() >= self.sweep_at {
            self.strings.retain(|known| Arc::strong_count(known) > 1);
            self.sweep_at = (2 * self.strings.len()).max(1024);
        }
        let new: Arc<str> = text.into();
        self.strings.insert(Arc::clone(&new));
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_strings_share_one_allocation_and_unused_ones_are_dropped() {
        let mut interner = Interner::default();
        let (one, two) = (interner.intern("node-a"), interner.intern("node-a"));
        assert!(Arc::ptr_eq(&one, &two));
        for n in 0..10_000 {
            interner.intern(&n.to_string());
        }
        assert!(interner.strings.len() <= 1024, "{} strings kept", interner.strings.len());
        assert!(Arc::ptr_eq(&one, &interner.intern("node-a")));
    }
}
