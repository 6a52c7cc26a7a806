//! One allocation for each distinct string, and for each distinct list of ports.
//!
//! A cluster repeats few node names, port names and lists of ports hundreds of thousands of times.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

/// Hands out shared strings or lists.
#[derive(Debug)]
pub(crate) struct Interner<T: ?Sized> {
    values: HashSet<Arc<T>>,
    /// The size at which values that nobody else holds are dropped.
    sweep_at: usize,
}

impl<T: ?Sized> Default for Interner<T> {
    fn default() -> Self {
        Self { values: HashSet::new(), sweep_at: 0 }
    }
}

impl<T: Eq + Hash + ?Sized> Interner<T>
where
    for<'a> Arc<T>: From<&'a T>,
{
    /// The shared copy of a value.
    pub(crate) fn intern(&mut self, value: &T) -> Arc<T> {
        if let Some(known) = self.values.get(value) {
            return Arc::clone(known);
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(|known| Arc::strong_count(known) > 1);
            self.sweep_at = (2 * self.values.len()).max(1024);
        }
        let new: Arc<T> = value.into();
        self.values.insert(Arc::clone(&new));
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_strings_share_one_allocation_and_unused_ones_are_dropped() {
        let mut interner = Interner::<str>::default();
        let (one, two) = (interner.intern("node-a"), interner.intern("node-a"));
        assert!(Arc::ptr_eq(&one, &two));
        for n in 0..10_000 {
            interner.intern(&n.to_string());
        }
        assert!(interner.values.len() <= 1024, "{} strings kept", interner.values.len());
        assert!(Arc::ptr_eq(&one, &interner.intern("node-a")));
    }
}
