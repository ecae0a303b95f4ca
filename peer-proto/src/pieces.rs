//! A set of a blob's pieces: one bit each, and their count.
//!
//! On the wire and on disk a set is its bits in bytes, piece 0 in the lowest bit of the first byte, unused bits of the last
//! byte zero.

use crate::layout::{Geometry, PieceIndex};
use alloc::{boxed::Box, vec, vec::Vec};
use core::{fmt, ops::Range};

/// Pieces of one blob. Its size is fixed when it is made, by the blob's geometry; bounded by
/// [`PIECES_MAX`](crate::layout::PIECES_MAX) bits.
#[derive(Clone, PartialEq, Eq)]
pub struct PieceSet {
    words: Box<[u64]>,
    pieces: u32,
    count: u32,
}

impl PieceSet {
    /// No piece of a blob of this geometry.
    pub fn new(geometry: &Geometry) -> Self {
        let pieces = geometry.pieces();
        Self { words: vec![0; pieces.div_ceil(64) as usize].into(), pieces, count: 0 }
    }

    /// Every piece of it.
    pub fn full(geometry: &Geometry) -> Self {
        let mut set = Self::new(geometry);
        set.words.fill(u64::MAX);
        if let Some(last) = set.words.last_mut() {
            *last &= last_mask(set.pieces);
        }
        set.count = set.pieces;
        set
    }

    /// Reads what [`Self::to_bytes`] wrote; nothing where the length is another blob's or a bit stands for no piece.
    pub fn from_bytes(geometry: &Geometry, bytes: &[u8]) -> Option<Self> {
        let mut set = Self::new(geometry);
        if bytes.len() != Self::byte_len(geometry) {
            return None;
        }
        for (word, chunk) in set.words.iter_mut().zip(bytes.chunks(8)) {
            let mut le = [0; 8];
            le[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_le_bytes(le);
        }
        if set.words.last().is_some_and(|last| last & !last_mask(set.pieces) != 0) {
            return None;
        }
        set.count = set.words.iter().map(|word| word.count_ones()).sum();
        Some(set)
    }

    /// Bytes of an encoded set for this geometry, at most 8 KiB.
    pub const fn byte_len(geometry: &Geometry) -> usize {
        geometry.pieces().div_ceil(8) as usize
    }

    /// The bits in bytes, as the module's text has them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(self.pieces.div_ceil(8) as usize);
        bytes
    }

    /// Number of pieces of the blob.
    pub const fn pieces(&self) -> u32 {
        self.pieces
    }

    /// Number of pieces in the set.
    pub const fn count(&self) -> u32 {
        self.count
    }

    /// Whether no piece is in it.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether every piece is in it. True of the empty blob.
    pub const fn is_full(&self) -> bool {
        self.count == self.pieces
    }

    /// Whether the piece is in it.
    pub fn contains(&self, piece: PieceIndex) -> bool {
        self.words.get(piece.index() / 64).is_some_and(|word| word >> (piece.get() % 64) & 1 == 1)
    }

    /// Adds a piece. False where it was there already, or is not one of this blob's.
    pub fn insert(&mut self, piece: PieceIndex) -> bool {
        let fresh = piece.get() < self.pieces && !self.contains(piece);
        if fresh {
            self.words[piece.index() / 64] |= 1 << (piece.get() % 64);
            self.count += 1;
        }
        fresh
    }

    /// Takes a piece out. False where it was not there.
    pub fn remove(&mut self, piece: PieceIndex) -> bool {
        let there = self.contains(piece);
        if there {
            self.words[piece.index() / 64] &= !(1 << (piece.get() % 64));
            self.count -= 1;
        }
        there
    }

    /// Takes every piece out.
    pub fn clear(&mut self) {
        if self.count > 0 {
            self.words.fill(0);
            self.count = 0;
        }
    }

    /// Adds every piece of another set of the same blob.
    pub fn union(&mut self, other: &Self) {
        self.combine(other, |own, other| own | other);
    }

    /// Takes out every piece of another set of the same blob.
    pub fn subtract(&mut self, other: &Self) {
        self.combine(other, |own, other| own & !other);
    }

    fn combine(&mut self, other: &Self, with: impl Fn(u64, u64) -> u64) {
        for (own, other) in self.words.iter_mut().zip(&other.words) {
            *own = with(*own, *other);
        }
        if let Some(last) = self.words.last_mut() {
            *last &= last_mask(self.pieces);
        }
        self.count = self.words.iter().map(|word| word.count_ones()).sum();
    }

    /// Whether any piece is in both.
    pub fn intersects(&self, other: &Self) -> bool {
        self.words.iter().zip(&other.words).any(|(a, b)| a & b != 0)
    }

    /// The pieces, in order.
    pub fn iter(&self) -> impl Iterator<Item = PieceIndex> + '_ {
        self.words.iter().zip((0u32..).step_by(64)).flat_map(|(word, base)| {
            let mut left = *word;
            core::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(PieceIndex(base + bit))
            })
        })
    }

    /// The first piece of the set at or after `from`, below `to`.
    pub fn first_in(&self, range: Range<u32>) -> Option<PieceIndex> {
        let end = range.end.min(self.pieces);
        let mut at = range.start;
        while at < end {
            let left = self.words[at as usize / 64] >> (at % 64);
            if left != 0 {
                let found = at + left.trailing_zeros();
                return (found < end).then_some(PieceIndex(found));
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// The bits, 64 pieces a word, piece 0 in the lowest bit of the first; bits beyond the last piece are zero.
    pub fn words(&self) -> &[u64] {
        &self.words
    }
}

fn last_mask(pieces: u32) -> u64 {
    match pieces % 64 {
        0 => u64::MAX,
        used => (1 << used) - 1,
    }
}

impl fmt::Debug for PieceSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} pieces", self.count, self.pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry(pieces: u32) -> Geometry {
        Geometry::new(u64::from(pieces) << 20, 1 << 20).unwrap()
    }

    proptest! {
        #[test]
        fn behaves_as_a_set_of_numbers(pieces in 0u32..300, picks in proptest::collection::vec((0u32..300, any::<bool>()), 0..200)) {
            let g = geometry(pieces);
            let mut set = PieceSet::new(&g);
            let mut model = alloc::collections::BTreeSet::new();
            for (n, put) in picks {
                let Some(piece) = g.piece(n) else { continue };
                if put {
                    prop_assert_eq!(set.insert(piece), model.insert(n));
                } else {
                    prop_assert_eq!(set.remove(piece), model.remove(&n));
                }
            }
            prop_assert_eq!(set.count() as usize, model.len());
            prop_assert!(set.iter().map(PieceIndex::get).eq(model.iter().copied()));
            for from in 0..pieces {
                let first = set.first_in(from..pieces).map(PieceIndex::get);
                prop_assert_eq!(first, model.range(from..).next().copied());
            }
            prop_assert_eq!(PieceSet::from_bytes(&g, &set.to_bytes()), Some(set.clone()));
            let mut all = PieceSet::full(&g);
            prop_assert!(all.is_full() && all.count() == pieces);
            all.subtract(&set);
            prop_assert!(!all.intersects(&set));
            all.union(&set);
            prop_assert_eq!(all, PieceSet::full(&g));
        }
    }

    #[test]
    fn bits_beyond_the_last_piece_are_refused() {
        let g = geometry(9);
        assert!(PieceSet::from_bytes(&g, &[0xff, 1]).unwrap().is_full());
        assert_eq!(PieceSet::from_bytes(&g, &[0, 2]), None);
        assert_eq!(PieceSet::from_bytes(&g, &[0]), None);
        assert_eq!(PieceSet::from_bytes(&g, &[0, 0, 0]), None);
    }
}
