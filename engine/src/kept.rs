//! Pieces that came before a reader got to them, kept in the buffers they were received in: what is in memory is not read back
//! from the file.
//!
//! Bounded: those farthest ahead of the reader go first, for they would be held the longest. The shard puts in, readers take out; the
//! lock is held for a look into a small map, once a piece.

use bytes::Bytes;
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Bytes kept for the readers of one download at most.
const KEPT_MAX: usize = 16 << 20;

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<BTreeMap<u32, Bytes>>);

impl Kept {
    /// Keeps a piece until a reader takes it, if it is among the next ones.
    pub(crate) fn put(&self, piece: u32, bytes: Bytes) {
        let mut kept = self.pieces();
        kept.insert(piece, bytes);
        while kept.values().map(Bytes::len).sum::<usize>() > KEPT_MAX {
            kept.pop_last();
        }
    }

    /// The bytes of a piece, where they are kept. Whoever comes next reads them from the file.
    pub(crate) fn take(&self, piece: u32) -> Option<Bytes> {
        self.pieces().remove(&piece)
    }

    /// Nobody reads any more.
    pub(crate) fn clear(&self) {
        self.pieces().clear();
    }

    fn pieces(&self) -> MutexGuard<'_, BTreeMap<u32, Bytes>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_farthest_go_first_and_each_is_taken_once() {
        let kept = Kept::default();
        let piece = Bytes::from(vec![7; KEPT_MAX / 4]);
        for n in [9, 3, 5, 4, 8, 6] {
            kept.put(n, piece.clone());
        }
        let there: Vec<u32> = (0..10).filter(|n| kept.take(*n).is_some()).collect();
        assert_eq!(there, [3, 4, 5, 6]);
        assert!(kept.take(3).is_none());
        kept.put(1, Bytes::from(vec![0; KEPT_MAX + 1]));
        assert!(kept.take(1).is_none(), "longer than all that is kept");
        kept.put(2, piece);
        kept.clear();
        assert!(kept.take(2).is_none());
    }
}
