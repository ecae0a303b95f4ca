//! Which blobs go when space is needed: a function, so that the policy can be read and tested alone.

use peer_proto::Digest;
use std::collections::BinaryHeap;

/// A blob that might go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Which.
    pub digest: Digest,
    /// Bytes it would free.
    pub length: u64,
    /// When it was last read or written, in seconds.
    pub used: u64,
    /// Kept by order, or being worked on.
    pub held: bool,
}

/// The least recently used of those not held, as few as free `need` bytes; none where they are not enough. Ties go by digest,
/// so that the choice is the same on every run.
pub fn choose(candidates: impl IntoIterator<Item = Candidate>, need: u64) -> Option<Vec<Digest>> {
    // The oldest seen so far that together free enough, the youngest of them on top.
    let mut oldest = BinaryHeap::new();
    let mut freed = 0;
    for c in candidates.into_iter().filter(|c| !c.held && c.length > 0) {
        oldest.push((c.used, c.digest, c.length));
        freed += c.length;
        while let Some(&(.., youngest)) = oldest.peek()
            && freed - youngest >= need
        {
            freed -= youngest;
            oldest.pop();
        }
    }
    (freed >= need).then(|| oldest.into_sorted_vec().into_iter().map(|(_, digest, _)| digest).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(name: u8, length: u64, used: u64) -> Candidate {
        Candidate { digest: Digest::sha256([name; 32]), length, used, held: false }
    }

    fn names(chosen: Option<Vec<Digest>>) -> Option<Vec<u8>> {
        chosen.map(|digests| digests.iter().map(|d| d.as_bytes()[0]).collect())
    }

    #[test]
    fn the_oldest_go_first_and_no_more_than_needed() {
        let blobs = [blob(1, 10, 50), blob(2, 20, 10), blob(3, 30, 40), blob(4, 5, 20), blob(5, 0, 1)];
        assert_eq!(names(choose(blobs, 0)), Some(vec![]));
        assert_eq!(names(choose(blobs, 1)), Some(vec![2]));
        assert_eq!(names(choose(blobs, 21)), Some(vec![2, 4]));
        assert_eq!(names(choose(blobs, 65)), Some(vec![2, 4, 3, 1]));
        assert_eq!(names(choose(blobs, 66)), None);
    }

    #[test]
    fn what_is_held_stays() {
        let held = Candidate { held: true, ..blob(1, 100, 0) };
        assert_eq!(names(choose([held, blob(2, 10, 9)], 5)), Some(vec![2]));
        assert_eq!(names(choose([held, blob(2, 10, 9)], 11)), None);
    }
}
