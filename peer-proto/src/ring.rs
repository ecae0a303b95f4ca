//! Which nodes own a blob: weighted rendezvous hashing with health.
//!
//! Every node scores every digest by itself: the score is `-log₂(h ÷ 2⁶⁴) ÷ weight`, where *h* is a hash of the node's label
//! and the digest's first 32 bytes, and the lowest scores own. A node's share is proportional to its weight; a node that
//! comes or goes moves only the blobs that it owns. A node that is down keeps its rank and its place is taken by the next
//! in order, so that there are as many owners as asked for while that many nodes are up.
//!
//! Nodes of different versions must agree on this, so *h* and the score are fixed, with vectors in the tests: the label is hashed
//! by FNV-1a (64 bits); then the digest's first four 8-byte little-endian words are taken in, each as `h = mix(h ^ word)`, `mix` being
//! SplitMix64's output function; log₂ has 32 fractional bits.

use crate::{fixed, id::Digest, rng::mix};
use alloc::{boxed::Box, string::String, vec::Vec};

/// Most nodes of a ring.
pub const NODES_MAX: usize = 1024;

/// A set of nodes that share out blobs among them.
#[derive(Clone, Debug, Default)]
pub struct Ring {
    nodes: Vec<Node>,
}

#[derive(Clone, Debug)]
struct Node {
    label: Box<str>,
    hash: u64,
    weight: u32,
    up: bool,
}

/// Nodes that make no ring.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingError {
    /// Two nodes of one label.
    #[error("node {0} is named twice")]
    Twice(String),
    /// A weight of zero.
    #[error("node {0} has weight 0")]
    Weightless(String),
    /// More than [`NODES_MAX`].
    #[error("ring has {0} nodes, at most {NODES_MAX} are supported")]
    TooMany(usize),
}

impl Ring {
    /// A ring of equal nodes, all up.
    pub fn new<L: Into<Box<str>>>(labels: impl IntoIterator<Item = L>) -> Result<Self, RingError> {
        Self::weighted(labels.into_iter().map(|label| (label, 1)))
    }

    /// A ring of nodes with weights, all up.
    pub fn weighted<L: Into<Box<str>>>(nodes: impl IntoIterator<Item = (L, u32)>) -> Result<Self, RingError> {
        let mut ring = Self::default();
        for (label, weight) in nodes {
            let label = label.into();
            if weight == 0 {
                return Err(RingError::Weightless(label.into()));
            }
            if ring.node(&label).is_some() {
                return Err(RingError::Twice(label.into()));
            }
            ring.nodes.push(Node { hash: fnv1a(label.as_bytes()), label, weight, up: true });
        }
        if ring.nodes.len() > NODES_MAX { Err(RingError::TooMany(ring.nodes.len())) } else { Ok(ring) }
    }

    fn node(&self, label: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| *node.label == *label)
    }

    /// Labels of all nodes, in the order given.
    pub fn labels(&self) -> impl ExactSizeIterator<Item = &str> {
        self.nodes.iter().map(|node| &*node.label)
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is no node.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Whether the node is in the ring and up.
    pub fn is_up(&self, label: &str) -> bool {
        self.node(label).is_some_and(|node| node.up)
    }

    /// Marks a node up or down. False where the ring has no such node.
    pub fn set_up(&mut self, label: &str, up: bool) -> bool {
        let node = self.nodes.iter_mut().find(|node| *node.label == *label);
        node.map(|node| node.up = up).is_some()
    }

    /// Takes over the nodes of another list, keeping the health of those that were known.
    pub fn replace(&mut self, mut next: Self) {
        for node in &mut next.nodes {
            node.up = self.node(&node.label).is_none_or(|known| known.up);
        }
        *self = next;
    }

    /// The blob's owners, best first: the first `replicas` nodes that are up. Where none is up, the first `replicas` of all, for
    /// health is an opinion and asking costs little.
    pub fn owners(&self, digest: &Digest, replicas: usize) -> Vec<&str> {
        let ranked = self.ranked(digest);
        let up: Vec<&str> = ranked.iter().filter(|node| node.up).take(replicas).map(|node| &*node.label).collect();
        if up.is_empty() { ranked.iter().take(replicas).map(|node| &*node.label).collect() } else { up }
    }

    /// Every node in the blob's order, up or not.
    pub fn order(&self, digest: &Digest) -> Vec<&str> {
        self.ranked(digest).into_iter().map(|node| &*node.label).collect()
    }

    fn ranked(&self, digest: &Digest) -> Vec<&Node> {
        let scored = self.nodes.iter().map(|node| {
            let h = point(node.hash, digest);
            (cost(h), h, node)
        });
        let mut scored: Vec<(u64, u64, &Node)> = scored.collect();
        scored.sort_by(|(a, a_hash, one), (b, b_hash, other)| {
            // a / wa < b / wb, without a division
            let score = (u128::from(*a) * u128::from(other.weight)).cmp(&(u128::from(*b) * u128::from(one.weight)));
            score.then(b_hash.cmp(a_hash)).then(one.label.cmp(&other.label))
        });
        scored.into_iter().map(|(_, _, node)| node).collect()
    }
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

fn point(node: u64, digest: &Digest) -> u64 {
    let words = digest.as_bytes().as_chunks().0.iter().take(4);
    words.fold(node, |h, word| mix(h ^ u64::from_le_bytes(*word)))
}

/// -log₂ of the hash as a fraction of 2⁶⁴.
fn cost(h: u64) -> u64 {
    const SIXTY_FOUR: u64 = 64 << 32;
    SIXTY_FOUR - fixed::log2(h).min(SIXTY_FOUR)
}

/// An opinion on whether a node is up, formed from probes and requests: some failures in a row and it is down, some successes in
/// a row and it is up again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Health {
    up: bool,
    /// Results in a row that speak against the present opinion.
    against: u8,
    fails: u8,
    passes: u8,
}

impl Default for Health {
    /// Three failures, two passes.
    fn default() -> Self {
        Self::new(3, 2)
    }
}

impl Health {
    /// Up, until `fails` failures in a row; then down until `passes` successes in a row. Each is at least 1.
    pub fn new(fails: u8, passes: u8) -> Self {
        Self { up: true, against: 0, fails: fails.max(1), passes: passes.max(1) }
    }

    /// The present opinion.
    pub const fn is_up(&self) -> bool {
        self.up
    }

    /// Takes in one result; returns the new opinion where it changed.
    pub fn saw(&mut self, success: bool) -> Option<bool> {
        if success == self.up {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let enough = if self.up { self.fails } else { self.passes };
        (self.against >= enough).then(|| {
            self.up = success;
            self.against = 0;
            success
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{collections::BTreeMap, format, vec};
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    fn digest(n: u64) -> Digest {
        let mut bytes = [0; 32];
        bytes.as_chunks_mut().0.iter_mut().zip(1..).for_each(|(word, k)| *word = mix(n ^ mix(k)).to_le_bytes());
        Digest::sha256(bytes)
    }

    fn ring(n: usize) -> Ring {
        Ring::new((0..n).map(|i| format!("origin-{i}:15002"))).unwrap()
    }

    #[test]
    fn golden_vectors() {
        let ring =
            Ring::weighted([("origin-0:15002", 1), ("origin-1:15002", 2), ("10.0.0.7:15002", 1), ("[::1]:1", 3)])
                .unwrap();
        let order = |text: &str| ring.order(&text.parse().unwrap()).join(" ");
        let sha256 = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(order(sha256), "[::1]:1 10.0.0.7:15002 origin-1:15002 origin-0:15002");
        assert_eq!(
            order(&format!("sha256:{}", "00".repeat(32))),
            "[::1]:1 origin-1:15002 origin-0:15002 10.0.0.7:15002"
        );
        assert_eq!(
            order(&format!("sha512:{}", "5a".repeat(64))),
            "origin-1:15002 [::1]:1 10.0.0.7:15002 origin-0:15002"
        );
    }

    #[test]
    fn shares_follow_weights() {
        let ring = Ring::weighted([("a", 1), ("b", 2), ("c", 5)]).unwrap();
        let mut owned = BTreeMap::new();
        for n in 0..8000 {
            *owned.entry(ring.owners(&digest(n), 1)[0]).or_insert(0u32) += 1;
        }
        for (label, expected) in [("a", 1000), ("b", 2000), ("c", 5000)] {
            assert!(owned[label].abs_diff(expected) < 150, "{owned:?}");
        }
    }

    proptest! {
        #[test]
        fn a_node_that_goes_moves_only_its_own(n in 2usize..20, gone in any::<proptest::sample::Index>(), blob: u64) {
            let full = ring(n);
            let gone = gone.index(n);
            let label = format!("origin-{gone}:15002");
            let less = Ring::new((0..n).filter(|i| *i != gone).map(|i| format!("origin-{i}:15002"))).unwrap();
            let d = digest(blob);
            let kept: Vec<&str> = full.order(&d).into_iter().filter(|other| *other != label).collect();
            prop_assert_eq!(less.order(&d), kept.clone());
            // Down is as good as gone, for as many replicas as there are.
            let mut down = full.clone();
            prop_assert!(down.set_up(&label, false));
            prop_assert_eq!(down.owners(&d, 3), kept[..kept.len().min(3)].to_vec());
        }
    }

    #[test]
    fn all_down_is_as_good_as_all_up() {
        let mut ring = ring(3);
        let d = digest(1);
        let before: Vec<String> = ring.owners(&d, 2).into_iter().map(Into::into).collect();
        (0..3).for_each(|i| assert!(ring.set_up(&format!("origin-{i}:15002"), false)));
        assert_eq!(ring.owners(&d, 2), before);
        assert!(!ring.set_up("stranger", true));
        assert!(Ring::default().owners(&d, 2).is_empty());
    }

    #[test]
    fn replacing_the_list_keeps_health() {
        let mut ring = ring(3);
        ring.set_up("origin-1:15002", false);
        ring.replace(Ring::new(["origin-1:15002", "origin-9:15002"]).unwrap());
        assert!(!ring.is_up("origin-1:15002") && ring.is_up("origin-9:15002") && !ring.is_up("origin-0:15002"));
    }

    #[test]
    fn unsound_lists_are_refused() {
        assert_eq!(Ring::new(["a", "a"]).unwrap_err(), RingError::Twice("a".into()));
        assert_eq!(Ring::weighted([("a", 0)]).unwrap_err(), RingError::Weightless("a".into()));
        assert!(matches!(Ring::new((0..1025).map(|n| format!("{n}"))), Err(RingError::TooMany(1025))));
    }

    #[test]
    fn opinions_change_after_some_results_in_a_row() {
        let mut health = Health::default();
        let changes: Vec<Option<bool>> =
            [false, false, true, false, false, false, true, false, true, true].map(|ok| health.saw(ok)).into();
        let (same, down, up) = (None, Some(false), Some(true));
        assert_eq!(changes, vec![same, same, same, same, same, down, same, same, same, up]);
    }
}
