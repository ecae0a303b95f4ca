//! An origin's rule for what it sends: each piece once before any twice.

use crate::{
    layout::{Geometry, PieceIndex},
    pieces::PieceSet,
    time::Instant,
};
use core::time::Duration;

/// How long a piece counts as just sent; up to twice as long.
pub const SENT_HOLD: Duration = Duration::from_secs(1);

/// What an origin has sent of a blob of late. Asked again for such a piece by another, it answers
/// [`Reject::Elsewhere`](super::Reject::Elsewhere): the piece is on its way through the swarm, and the origin's uplink is better spent on one
/// that nobody has. Two bit sets, at most 16 KiB, for blobs that are being served.
#[derive(Clone, Debug)]
pub struct SendOnce {
    recent: PieceSet,
    before: PieceSet,
    turned: Instant,
}

impl SendOnce {
    /// Nothing was sent.
    pub fn new(geometry: &Geometry) -> Self {
        Self { recent: PieceSet::new(geometry), before: PieceSet::new(geometry), turned: Instant::ZERO }
    }

    /// Whether a request is to be answered with the piece, which then counts as sent. `leechers` is the number of channels it could go
    /// to: a lone one always gets what it asks for.
    pub fn allows(&mut self, now: Instant, piece: PieceIndex, leechers: usize) -> bool {
        let idle = now.since(self.turned);
        if idle >= SENT_HOLD {
            core::mem::swap(&mut self.recent, &mut self.before);
            self.recent.clear();
            if idle >= 2 * SENT_HOLD {
                self.before.clear();
            }
            self.turned = now;
        }
        if leechers > 1 && self.before.contains(piece) {
            return false;
        }
        self.recent.insert(piece) || leechers <= 1
    }

    /// The piece did not go out after all: its channel closed, or the request was withdrawn in time.
    pub fn unsent(&mut self, piece: PieceIndex) {
        self.recent.remove(piece);
        self.before.remove(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_for_a_while() {
        let g = Geometry::new(3 << 20, 1 << 20).unwrap();
        let mut once = SendOnce::new(&g);
        let piece = g.piece(1).unwrap();
        let at = |ms| Instant::ZERO + Duration::from_millis(ms);
        assert!(once.allows(at(10_000), piece, 3));
        assert!(!once.allows(at(10_001), piece, 3));
        assert!(once.allows(at(10_002), piece, 1), "a lone leecher is not refused");
        assert!(!once.allows(at(11_001), piece, 3));
        assert!(once.allows(at(12_002), piece, 3), "the hold is over");
        once.unsent(piece);
        assert!(once.allows(at(12_003), piece, 3));
        assert!(once.allows(at(20_000), piece, 3));
    }
}
