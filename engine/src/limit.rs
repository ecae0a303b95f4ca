//! Token buckets for piece traffic: of the process, of one peer, of one class. Control messages never pass through one.
//!
//! A bucket is one number: the moment up to which its rate is spent. Taking moves it on by what the bytes cost; who comes
//! while it lies in the future waits until then. One piece may overdraw it, so that pieces longer than the burst pass, and
//! the long-run rate stays exact. All shards share one bucket of a process; it is touched once per piece, without a lock,
//! and not at all where no limit is set.

use crate::handle::{Class, Limits};
use peer_proto::{Instant, PeerId, swarm};
use std::{
    collections::BTreeMap,
    num::NonZeroU64,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// How much unused time a bucket saves up. Long enough to cover a timer that fires a few milliseconds late.
const BURST: Duration = Duration::from_millis(20);

/// A rate in bytes a second, shared between shards.
#[derive(Debug)]
pub(crate) struct Bucket {
    bytes_per_s: NonZeroU64,
    /// Nanoseconds of the engine's clock up to which the rate is spent.
    spent_until: AtomicU64,
}

impl Bucket {
    pub(crate) fn new(bytes_per_s: NonZeroU64) -> Self {
        Self { bytes_per_s, spent_until: AtomicU64::new(0) }
    }

    /// Nothing, or when to come again.
    fn ready(&self, now: Instant) -> Result<(), Instant> {
        let spent = Instant::from_nanos(self.spent_until.load(Ordering::Relaxed));
        if spent <= now { Ok(()) } else { Err(spent) }
    }

    /// Takes `bytes`, ready or not: who comes next waits for longer.
    fn spend(&self, now: Instant, bytes: u64) {
        let cost = self.cost(bytes);
        let earliest = now.as_nanos().saturating_sub(BURST.as_nanos().try_into().unwrap_or(u64::MAX));
        let spent = |spent: u64| Some(spent.max(earliest).saturating_add(cost));
        // It always finds a value to set.
        let _ = self.spent_until.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spent);
    }

    fn cost(&self, bytes: u64) -> u64 {
        bytes.saturating_mul(1_000_000_000) / self.bytes_per_s
    }
}

/// Takes `bytes` from every bucket there is, or from none: then it says when to come again. Two shards may find a bucket ready at
/// once; the piece too many is paid for by whoever comes next.
pub(crate) fn take<const N: usize>(buckets: [Option<&Bucket>; N], now: Instant, bytes: u64) -> Result<(), Instant> {
    for bucket in buckets.iter().flatten() {
        bucket.ready(now)?;
    }
    buckets.iter().flatten().for_each(|bucket| bucket.spend(now, bytes));
    Ok(())
}

/// What one peer may send to this node and be sent by it, over all connections with it.
#[derive(Debug)]
pub(crate) struct Meter {
    pub(crate) inward: Option<Bucket>,
    pub(crate) outward: Option<Bucket>,
}

/// The limits of a node, shared by its shards.
#[derive(Debug, Default)]
pub(crate) struct Meters {
    limits: Limits,
    pub(crate) inward: Option<Bucket>,
    pub(crate) outward: Option<Bucket>,
    foreground_in: Option<Bucket>,
    background_in: Option<Bucket>,
    foreground_out: Option<Bucket>,
    background_out: Option<Bucket>,
    /// Of peers that are connected. Looked at once per connection.
    peers: Mutex<BTreeMap<PeerId, Weak<Meter>>>,
}

impl Meters {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            inward: limits.bytes_in_per_s.map(Bucket::new),
            outward: limits.bytes_out_per_s.map(Bucket::new),
            foreground_in: limits.foreground_in_per_s.map(Bucket::new),
            background_in: limits.background_in_per_s.map(Bucket::new),
            foreground_out: limits.foreground_out_per_s.map(Bucket::new),
            background_out: limits.background_out_per_s.map(Bucket::new),
            peers: Mutex::default(),
        }
    }

    /// What downloads of a class may receive.
    pub(crate) fn class(&self, class: Class) -> Option<&Bucket> {
        match class {
            Class::Background => self.background_in.as_ref(),
            Class::Foreground => self.foreground_in.as_ref(),
        }
    }

    /// What may be sent for requests that peers say are of a class.
    pub(crate) fn outward_of(&self, class: swarm::Class) -> Option<&Bucket> {
        match class {
            swarm::Class::Background => self.background_out.as_ref(),
            swarm::Class::Foreground => self.foreground_out.as_ref(),
        }
    }

    /// The meter of a peer, where there are limits for each, one for all connections with it. One that went and came back at once
    /// starts anew, which gains it the burst.
    pub(crate) fn of(&self, peer: PeerId) -> Option<Arc<Meter>> {
        let Limits { peer_in_per_s, peer_out_per_s, .. } = self.limits;
        peer_in_per_s.or(peer_out_per_s)?;
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(meter) = peers.get(&peer).and_then(Weak::upgrade) {
            return Some(meter);
        }
        peers.retain(|_, meter| meter.strong_count() > 0);
        let meter =
            Arc::new(Meter { inward: peer_in_per_s.map(Bucket::new), outward: peer_out_per_s.map(Bucket::new) });
        peers.insert(peer, Arc::downgrade(&meter));
        Some(meter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes passed in a second by a taker who comes back when told, but `late`.
    fn passed(gbit_per_s: u64, late: Duration) -> u64 {
        let bucket = Bucket::new(NonZeroU64::new(gbit_per_s * 125_000_000).unwrap());
        let mut now = Instant::from_nanos(5_000_000_000);
        let end = now + Duration::from_secs(1);
        let mut bytes = 0;
        while now < end {
            match take([Some(&bucket)], now, 1 << 20) {
                Ok(()) => bytes += 1 << 20,
                Err(at) => now = at + late,
            }
        }
        bytes
    }

    #[test]
    fn a_peer_has_one_meter_however_often_it_is_connected_and_none_is_kept_for_nobody() {
        let meters = Meters::new(Limits { peer_out_per_s: NonZeroU64::new(1), ..Limits::default() });
        let peer = |n| PeerId::new([n; 20]);
        let (first, second) = (meters.of(peer(1)).unwrap(), meters.of(peer(1)).unwrap());
        assert!(Arc::ptr_eq(&first, &second) && first.inward.is_none() && first.outward.is_some());
        drop((first, second));
        let _other = meters.of(peer(2));
        assert_eq!(meters.peers.lock().unwrap().len(), 1);
        assert!(Meters::default().of(peer(1)).is_none());
    }

    #[test]
    fn what_one_bucket_refuses_none_is_charged_for() {
        let [fast, slow] = [100, 1].map(|rate| Bucket::new(NonZeroU64::new(rate).unwrap()));
        let now = Instant::from_nanos(10_000_000_000);
        take([Some(&slow)], now, 10).unwrap();
        let again = take([Some(&fast), Some(&slow), None], now, 1_000).unwrap_err();
        assert!(again > now + Duration::from_secs(9), "{again:?}");
        take([Some(&fast)], now, 1).unwrap();
    }

    #[test]
    fn the_rate_is_held_within_three_percent_however_late_the_timer() {
        for gbit in [1, 25] {
            for late_ms in [0, 1, 5] {
                let want = (gbit * 125_000_000) as f64;
                let got = passed(gbit, Duration::from_millis(late_ms)) as f64;
                assert!((got / want - 1.0).abs() < 0.03, "{gbit} Gbit/s, {late_ms} ms late: {}", got / want);
            }
        }
    }
}
