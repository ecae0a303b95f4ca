//! Token buckets for piece traffic. Control messages never pass through one.
//!
//! A bucket is one number: the moment up to which its rate is spent. Taking moves it on by what the bytes cost; who comes
//! while it lies in the future waits until then. One piece may overdraw it, so that pieces longer than the burst pass, and
//! the long-run rate stays exact. All shards share one bucket of a process; it is touched once per piece, without a lock,
//! and not at all where no limit is set.

use peer_proto::Instant;
use std::{
    num::NonZeroU64,
    sync::atomic::{AtomicU64, Ordering},
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

    /// Takes `bytes`, or says when to come again.
    pub(crate) fn take(&self, now: Instant, bytes: u64) -> Result<(), Instant> {
        let cost = self.cost(bytes);
        let earliest = now.as_nanos().saturating_sub(BURST.as_nanos().try_into().unwrap_or(u64::MAX));
        let taken = self.spent_until.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |spent| {
            let start = spent.max(earliest);
            (start <= now.as_nanos()).then(|| start.saturating_add(cost))
        });
        taken.map(drop).map_err(Instant::from_nanos)
    }

    fn cost(&self, bytes: u64) -> u64 {
        bytes.saturating_mul(1_000_000_000) / self.bytes_per_s
    }
}

/// [`Bucket::take`] where there may be no limit.
pub(crate) fn take(bucket: Option<&Bucket>, now: Instant, bytes: u64) -> Result<(), Instant> {
    bucket.map_or(Ok(()), |bucket| bucket.take(now, bytes))
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
            match bucket.take(now, 1 << 20) {
                Ok(()) => bytes += 1 << 20,
                Err(at) => now = at + late,
            }
        }
        bytes
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
