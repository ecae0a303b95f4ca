//! An origin's rule for what it sends: each piece once before any twice.

use crate::{
    layout::{Geometry, PieceIndex},
    pieces::PieceSet,
    time::Instant,
    wire::Zone,
};
use alloc::vec::Vec;
use core::time::Duration;

/// How long a piece counts as just sent; up to twice as long.
pub const SENT_HOLD: Duration = Duration::from_secs(1);
/// Most zones that are told apart, for each blob; further ones count as one.
const ZONES_MAX: usize = 16;

/// What an origin has sent of a blob of late, by zone. Asked again for such a piece by another of the zone, it answers
/// [`Reject::Elsewhere`](super::Reject::Elsewhere): the piece is on its way through the zone, and the origin's uplink is better spent on one
/// that nobody has there. So several hosts of a zone can fetch from outside side by side, and a piece still crosses once. Two bit
/// sets a zone, at most 16 KiB each, for blobs that are being served.
#[derive(Clone, Debug)]
pub struct SendOnce {
    geometry: Geometry,
    zones: Vec<Sent>,
}

#[derive(Clone, Debug)]
struct Sent {
    zone: Zone,
    recent: PieceSet,
    before: PieceSet,
    turned: Instant,
}

impl SendOnce {
    /// Nothing was sent.
    pub fn new(geometry: &Geometry) -> Self {
        Self { geometry: *geometry, zones: Vec::new() }
    }

    /// Whether a request from a zone is to be answered with the piece, which then counts as sent there. `leechers` is the number of
    /// channels it could go to: a lone one always gets what it asks for.
    pub fn allows(&mut self, now: Instant, piece: PieceIndex, zone: Zone, leechers: usize) -> bool {
        let sent = self.sent(now, zone);
        let idle = now.since(sent.turned);
        if idle >= SENT_HOLD {
            core::mem::swap(&mut sent.recent, &mut sent.before);
            sent.recent.clear();
            if idle >= 2 * SENT_HOLD {
                sent.before.clear();
            }
            sent.turned = now;
        }
        if leechers > 1 && sent.before.contains(piece) {
            return false;
        }
        sent.recent.insert(piece) || leechers <= 1
    }

    fn sent(&mut self, now: Instant, zone: Zone) -> &mut Sent {
        let known = self.zones.iter().position(|sent| sent.zone == zone);
        // One that has long been silent makes room.
        let stale = |sent: &Sent| now.since(sent.turned) >= 2 * SENT_HOLD;
        let full = self.zones.len() == ZONES_MAX;
        let place = known.or_else(|| self.zones.iter().position(stale)).or_else(|| full.then_some(ZONES_MAX - 1));
        match place {
            Some(at) => {
                let sent = &mut self.zones[at];
                if stale(sent) {
                    sent.zone = zone;
                }
                sent
            }
            None => {
                let none = PieceSet::new(&self.geometry);
                self.zones.push_mut(Sent { zone, recent: none.clone(), before: none, turned: now })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Zone = Zone::NONE;

    fn at(ms: u64) -> Instant {
        Instant::ZERO + Duration::from_millis(ms)
    }

    #[test]
    fn once_for_a_while() {
        let g = Geometry::new(3 << 20, 1 << 20).unwrap();
        let mut once = SendOnce::new(&g);
        let piece = g.piece(1).unwrap();
        assert!(once.allows(at(10_000), piece, HERE, 3));
        assert!(!once.allows(at(10_001), piece, HERE, 3));
        assert!(once.allows(at(10_002), piece, HERE, 1), "a lone leecher is not refused");
        assert!(!once.allows(at(11_001), piece, HERE, 3));
        assert!(once.allows(at(12_002), piece, HERE, 3), "the hold is over");
        assert!(once.allows(at(20_000), piece, HERE, 3));
    }

    #[test]
    fn each_zone_for_itself_and_room_for_a_few() {
        let g = Geometry::new(3 << 20, 1 << 20).unwrap();
        let mut once = SendOnce::new(&g);
        let piece = g.piece(2).unwrap();
        let zones: Vec<Zone> = (0..20).map(|n| Zone::of(&alloc::format!("zone-{n}"))).collect();
        let first = |once: &mut SendOnce, ms| zones.iter().filter(|zone| once.allows(at(ms), piece, **zone, 9)).count();
        assert_eq!(first(&mut once, 10_000), ZONES_MAX, "those beyond the bound count as the last");
        assert_eq!(first(&mut once, 10_500), 0);
        assert_eq!(once.zones.len(), ZONES_MAX);
        assert!(once.allows(at(15_000), piece, zones[19], 9), "who is silent makes room");
    }
}
