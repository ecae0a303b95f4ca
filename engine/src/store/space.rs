//! Room for new blobs: the quota, the disk, and who has to go.

use super::{
    Claim, Error, Store,
    files::{cache_dir, partial_dir},
    life::{Event, State},
};
use crate::disk;
use peer_proto::Digest;
use std::io;

impl Store {
    /// Deletes a blob. Those who read it may go on. False where it was not here.
    pub fn evict(&self, digest: &Digest) -> Result<bool, Error> {
        let claim = self.claim(digest);
        if self.table().pins.contains(digest) {
            return Err(Error::Pinned(*digest));
        }
        // So that one is found that no scan has come by yet.
        self.load(&claim)?;
        self.evict_claimed(&claim)
    }

    pub(super) fn evict_claimed(&self, claim: &Claim<'_>) -> Result<bool, Error> {
        let digest = &claim.digest;
        let Some(entry) = self.table().entry(digest) else { return Ok(false) };
        let dir = match entry.state {
            State::Whole => cache_dir(digest),
            State::Partial => partial_dir(digest),
            State::Absent | State::Verifying | State::Evicting => return Ok(false),
        };
        let discarded = self.discard(&dir);
        if discarded.is_ok() || entry.state == State::Partial {
            self.table().advance(digest, Event::Evict);
            self.close_gone(digest);
            self.table().advance(digest, Event::Removed);
            self.counters.evictions.add(1);
            self.counters.bytes_evicted.add(entry.length);
        }
        discarded?;
        Ok(true)
    }

    /// Evicts what is over the quota: after a start with a smaller one, or when the scan has found more than was known.
    pub fn enforce_quota(&self) {
        let excess = self.table().excess();
        if excess > 0 && !self.evict_for(excess) {
            tracing::warn!(excess, "the quota cannot be kept: what is over it is pinned or in use");
        }
    }

    /// Sets bytes aside in the quota, evicting for them.
    pub(super) fn reserve(&self, bytes: u64) -> Result<(), Error> {
        loop {
            let excess = match self.table().reserve(bytes) {
                Ok(()) => return Ok(()),
                Err(excess) => excess,
            };
            if !self.evict_for(excess) {
                self.counters.no_space.add(1);
                return Err(Error::NoSpace(bytes));
            }
        }
    }

    /// Does something that needs `bytes` of disk, evicting as long as the disk is full and there is something to evict.
    pub(super) fn with_room<T>(&self, bytes: u64, make: impl Fn() -> io::Result<T>) -> Result<T, Error> {
        loop {
            match make() {
                Err(e) if disk::is_full(&e) => {
                    let lacking = bytes.saturating_sub(self.disk.free()?).max(1);
                    if !self.evict_for(lacking) {
                        self.counters.no_space.add(1);
                        return Err(Error::NoSpace(bytes));
                    }
                    self.disk.settle();
                }
                other => return Ok(other?),
            }
        }
    }

    /// Evicts the least recently used for `need` bytes. False where nothing could be.
    pub(super) fn evict_for(&self, need: u64) -> bool {
        let victims = self.table().victims(need).unwrap_or_default();
        let mut any = false;
        for digest in victims {
            let Some(claim) = self.try_claim(&digest) else { continue };
            if self.table().pins.contains(&digest) {
                continue;
            }
            match self.evict_claimed(&claim) {
                Ok(evicted) => any |= evicted,
                Err(error) => tracing::warn!(%error, %digest, "blob could not be evicted"),
            }
        }
        any
    }
}
