//! How many connected peers have each piece, and the rarest of those that can be had.
//!
//! The counts are sliced: bit *k* of 64 pieces' counts is one word. One piece more or less is a carry through a few words; a
//! whole peer comes or goes at 64 pieces a step, and so does the search for the rarest. Peers that have everything are not
//! counted: they change nothing in the order.

use crate::{layout::PieceIndex, pieces::PieceSet, rng::Rng};
use alloc::{boxed::Box, vec};
use core::ops::Range;

/// Bits of a count; [`super::PEERS_MAX`] must fit.
const PLANES: usize = 7;
const _: () = assert!(super::PEERS_MAX < 1 << PLANES);

/// Most words in which rarity is compared for one request; beyond them the first piece found is good enough.
const SCAN_WORDS: usize = 64;

/// A choice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pick {
    pub(super) piece: PieceIndex,
    /// Connected peers that have it, those that have everything apart.
    pub(super) count: u32,
}

/// Every `every`-th piece, beginning with number `first`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stripe {
    pub(super) every: u32,
    pub(super) first: u32,
}

impl Stripe {
    /// Every piece.
    pub(super) const ALL: Self = Self { every: 1, first: 0 };

    fn of_word(self, word: usize) -> u64 {
        if self.every <= 1 {
            return u64::MAX;
        }
        let passed = piece_number(word, 0) % self.every;
        let first = (self.first + self.every - passed) % self.every;
        (first..64).step_by(self.every as usize).fold(0, |mask, bit| mask | 1 << bit)
    }
}

/// Counts for the pieces of one blob.
pub(super) struct Availability {
    planes: Box<[[u64; PLANES]]>,
}

impl Availability {
    pub(super) fn new(pieces: u32) -> Self {
        Self { planes: vec![[0; PLANES]; pieces.div_ceil(64) as usize].into() }
    }

    pub(super) fn add(&mut self, piece: PieceIndex) {
        carry(&mut self.planes[piece.index() / 64], 1 << (piece.get() % 64));
    }

    pub(super) fn remove(&mut self, piece: PieceIndex) {
        borrow(&mut self.planes[piece.index() / 64], 1 << (piece.get() % 64));
    }

    pub(super) fn add_all(&mut self, set: &PieceSet) {
        self.planes.iter_mut().zip(set.words()).for_each(|(planes, word)| carry(planes, *word));
    }

    pub(super) fn remove_all(&mut self, set: &PieceSet) {
        self.planes.iter_mut().zip(set.words()).for_each(|(planes, word)| borrow(planes, *word));
    }

    /// The count of one piece.
    #[cfg(test)]
    pub(super) fn count(&self, piece: PieceIndex) -> u32 {
        let planes = &self.planes[piece.index() / 64];
        (0u32..).zip(planes).map(|(k, plane)| ((plane >> (piece.get() % 64) & 1) as u32) << k).sum()
    }

    /// The rarest piece of `wanted` in `range` that a peer has (`has`, or everything), with ties broken at random. Compares up
    /// to [`SCAN_WORDS`] words from a random place on; where those hold nothing, takes the first piece of the rest.
    pub(super) fn rarest(
        &self,
        rng: &mut Rng,
        wanted: &PieceSet,
        has: Option<&PieceSet>,
        range: Range<u32>,
        stripe: Stripe,
    ) -> Option<Pick> {
        let end = range.end.min(wanted.pieces());
        if range.start >= end {
            return None;
        }
        let (first, last) = (range.start as usize / 64, (end as usize - 1) / 64);
        let words = last - first + 1;
        let start = if words > SCAN_WORDS { rng.index(words) } else { 0 };
        let mut best: Option<(u32, u32)> = None; // count, piece
        let mut ties = 0;
        for step in 0..words {
            if step >= SCAN_WORDS && best.is_some() {
                break;
            }
            let at = first + (start + step) % words;
            let mut left = wanted.words()[at];
            if let Some(has) = has {
                left &= has.words()[at];
            }
            if at == first {
                left &= u64::MAX << (range.start % 64);
            }
            if at == last {
                left &= u64::MAX >> (63 - (end - 1) % 64);
            }
            if left != 0 {
                left &= stripe.of_word(at);
            }
            if left == 0 {
                continue;
            }
            let count = least(&self.planes[at], &mut left);
            let here = u64::from(left.count_ones());
            match best {
                Some((least, _)) if count > least => continue,
                Some((least, _)) if count == least => ties += here,
                _ => ties = here,
            }
            // Each of the tied pieces seen so far is equally likely to be the choice.
            let nth = rng.below(ties);
            if nth < here {
                best = Some((count, piece_number(at, nth_bit(left, nth))));
            }
        }
        best.map(|(count, piece)| Pick { piece: PieceIndex(piece), count })
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a word of a piece set, whose pieces are u32")]
fn piece_number(word: usize, bit: u32) -> u32 {
    word as u32 * 64 + bit
}

/// Leaves in `pieces` only those of the smallest count, which is returned.
fn least(planes: &[u64; PLANES], pieces: &mut u64) -> u32 {
    let mut count = 0;
    for (k, plane) in planes.iter().enumerate().rev() {
        match *pieces & !plane {
            0 => count |= 1 << k,
            without => *pieces = without,
        }
    }
    count
}

/// The position of the `n`-th set bit, counted from 0.
fn nth_bit(mut word: u64, n: u64) -> u32 {
    for _ in 0..n {
        word &= word - 1;
    }
    word.trailing_zeros()
}

fn carry(planes: &mut [u64; PLANES], mut more: u64) {
    for plane in planes {
        (*plane, more) = (*plane ^ more, *plane & more);
        if more == 0 {
            return;
        }
    }
}

fn borrow(planes: &mut [u64; PLANES], mut less: u64) {
    for plane in planes {
        (*plane, less) = (*plane ^ less, !*plane & less);
        if less == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Availability, PieceIndex, PieceSet, Rng, Stripe};
    use crate::layout::Geometry;
    use alloc::vec::Vec;
    use proptest::prelude::{Strategy as _, any, prop_assert, prop_assert_eq, proptest};

    proptest! {
        #[test]
        fn counts_and_picks_as_a_plain_table_would(
            pieces in 1u32..400,
            peers in proptest::collection::vec(any::<u64>(), 0..12),
            wanted_seed: u64,
            range in (0u32..400, 0u32..400),
            stripe in (1u32..5, 0u32..5).prop_map(|(every, first)| Stripe { every, first: first % every }),
        ) {
            let g = Geometry::new(u64::from(pieces) << 20, 1 << 20).unwrap();
            let random_set = |seed: u64| {
                let mut rng = Rng::new(seed);
                let mut set = PieceSet::new(&g);
                g.all().filter(|_| rng.below(3) > 0).for_each(|piece| { set.insert(piece); });
                set
            };
            let sets: Vec<PieceSet> = peers.iter().map(|seed| random_set(*seed)).collect();
            let mut availability = Availability::new(pieces);
            for (i, set) in sets.iter().enumerate() {
                if i % 2 == 0 { availability.add_all(set) } else { set.iter().for_each(|p| availability.add(p)) }
            }
            // The last one leaves again.
            let mut sets = sets;
            if let Some(gone) = sets.pop() {
                if peers.len() % 2 == 0 { availability.remove_all(&gone) } else { gone.iter().for_each(|p| availability.remove(p)) }
            }
            let count = |p: PieceIndex| sets.iter().filter(|set| set.contains(p)).count() as u32;
            for p in g.all() {
                prop_assert_eq!(availability.count(p), count(p));
            }
            let wanted = random_set(wanted_seed);
            let has = random_set(wanted_seed ^ 77);
            let can = |p: &PieceIndex| wanted.contains(*p) && has.contains(*p) && (range.0..range.1).contains(&p.get())
                && p.get() % stripe.every == stripe.first;
            let least = g.all().filter(can).map(count).min();
            let mut rng = Rng::new(1);
            for _ in 0..20 {
                let pick = availability.rarest(&mut rng, &wanted, Some(&has), range.0..range.1, stripe);
                prop_assert_eq!(pick.map(|pick| pick.count), least);
                prop_assert!(pick.is_none_or(|pick| can(&pick.piece) && count(pick.piece) == pick.count));
            }
        }
    }

    #[test]
    fn ties_are_drawn_evenly() {
        let g = Geometry::new(200 << 20, 1 << 20).unwrap();
        let availability = Availability::new(200);
        let wanted = PieceSet::full(&g);
        let mut rng = Rng::new(7);
        let mut drawn = [0u32; 200];
        for _ in 0..20_000 {
            drawn[availability.rarest(&mut rng, &wanted, None, 0..200, Stripe::ALL).unwrap().piece.index()] += 1;
        }
        assert!(drawn.iter().all(|n| (50..200).contains(n)), "{drawn:?}");
    }

    #[test]
    fn wide_blobs_find_a_lone_piece() {
        let g = Geometry::new(60_000 << 20, 1 << 20).unwrap();
        let availability = Availability::new(60_000);
        let mut wanted = PieceSet::new(&g);
        wanted.insert(g.piece(59_999).unwrap());
        let mut rng = Rng::new(3);
        for _ in 0..50 {
            let pick = availability.rarest(&mut rng, &wanted, None, 0..60_000, Stripe::ALL);
            assert_eq!(pick.map(|pick| pick.piece), g.piece(59_999));
        }
    }
}
