//! Which pieces of a blob are here: a bit each, set by whoever wrote the piece, read by everybody.

use peer_proto::{PieceIndex, layout::Geometry};
use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire},
};

/// One bit for each piece of one geometry, and how many are set. A set bit is never seen before the bytes it speaks of.
#[derive(Debug)]
pub struct PieceMap {
    geometry: Geometry,
    words: Box<[AtomicU64]>,
    count: AtomicU32,
}

impl PieceMap {
    /// None of them.
    pub fn none(geometry: Geometry) -> Self {
        let words = (0..geometry.pieces().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { geometry, words, count: AtomicU32::new(0) }
    }

    /// All of them.
    pub fn all(geometry: Geometry) -> Self {
        let map = Self::none(geometry);
        geometry.all().for_each(|piece| {
            map.set(piece);
        });
        map
    }

    /// Whether a piece is here.
    pub fn has(&self, piece: PieceIndex) -> bool {
        let (word, bit) = place(piece);
        self.words[word].load(Acquire) & bit != 0
    }

    /// Notes a piece; false where it was noted before.
    pub fn set(&self, piece: PieceIndex) -> bool {
        let (word, bit) = place(piece);
        let fresh = self.words[word].fetch_or(bit, AcqRel) & bit == 0;
        if fresh {
            self.count.fetch_add(1, AcqRel);
        }
        fresh
    }

    /// Takes a note back.
    pub(crate) fn clear(&self, piece: PieceIndex) {
        let (word, bit) = place(piece);
        if self.words[word].fetch_and(!bit, AcqRel) & bit != 0 {
            self.count.fetch_sub(1, AcqRel);
        }
    }

    /// How many are here.
    pub fn count(&self) -> u32 {
        self.count.load(Acquire)
    }

    /// Whether all are here.
    pub fn is_full(&self) -> bool {
        self.count() == self.geometry.pieces()
    }

    /// Bytes of the pieces that are here.
    pub fn bytes(&self) -> u64 {
        let full = u64::from(self.count()) * u64::from(self.geometry.piece_length());
        match self.geometry.all().next_back() {
            Some(last) if self.has(last) => {
                full - u64::from(self.geometry.piece_length() - self.geometry.piece_len(last))
            }
            _ => full,
        }
    }

    /// Whether all pieces that hold a range are here.
    pub fn covers(&self, range: std::ops::Range<u64>) -> bool {
        self.geometry.covering(range).all(|index| self.geometry.piece(index).is_some_and(|piece| self.has(piece)))
    }

    /// The pieces that are here, in order.
    pub fn iter(&self) -> impl Iterator<Item = PieceIndex> + '_ {
        self.geometry.all().filter(|piece| self.has(*piece))
    }

    /// The bits as they are now, piece *i* in word *i* / 64 at bit *i* % 64.
    pub fn words(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Acquire)).collect()
    }
}

fn place(piece: PieceIndex) -> (usize, u64) {
    (piece.index() / 64, 1 << (piece.get() % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_pieces_and_bytes() {
        let mib = 1 << 20;
        let geometry = Geometry::of(69 * mib + 5).unwrap();
        let map = PieceMap::none(geometry);
        let piece = |i| geometry.piece(i).unwrap();
        assert!(map.set(piece(64)) && !map.set(piece(64)) && map.set(piece(69)));
        assert_eq!((map.count(), map.bytes()), (2, mib + 5));
        assert!(map.covers(64 * mib..65 * mib) && !map.covers(64 * mib..65 * mib + 1));
        assert!(map.covers(0..0));
        map.clear(piece(64));
        assert_eq!(map.iter().map(PieceIndex::get).collect::<Vec<_>>(), [69]);
        assert!(PieceMap::all(geometry).is_full());
        assert!(PieceMap::none(Geometry::of(0).unwrap()).is_full(), "nothing lacks of the empty blob");
    }
}
