//! What the store knows without asking the disk: which blobs are here, who works on them, and how many bytes all of it takes.
//! Changed under one short lock, never while the disk is waited for.

use super::{
    Blob,
    evict::{self, Candidate},
    incoming::Incoming,
    life::{Event, State},
};
use peer_proto::Digest;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};
use uuid::Uuid;

/// Blobs open at once, a descriptor or two each. Idle ones are closed beyond it.
pub(super) const OPEN_MAX: usize = 4096;
/// Uploads under way, written to or not.
pub(super) const UPLOADS_MAX: usize = 4096;

#[derive(Default)]
pub(super) struct Table {
    /// Every blob that is not absent, as far as known: the scan may not have come by yet.
    entries: BTreeMap<Digest, Entry>,
    open: HashMap<Digest, Arc<Blob>>,
    claimed: HashSet<Digest>,
    pub(super) pins: HashSet<Digest>,
    pub(super) uploads: HashMap<Uuid, Seat>,
    /// Bytes of all entries, and what uploads have reserved.
    used: u64,
    quota: Option<u64>,
    /// Changes of `entries` since the last snapshot.
    pub(super) changes: u64,
}

/// All that is kept of a closed blob, beside a tree's slack of at most as much again: agents have hundreds of thousands.
const _: () = assert!(size_of::<(Digest, Entry)>() <= 96);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) state: State,
    pub(super) length: u64,
    /// Seconds since 1970.
    pub(super) used: u64,
}

/// An upload that was begun and not closed.
pub(super) enum Seat {
    /// Somebody writes to it.
    Taken {
        /// It is about to be parked.
        leaving: bool,
    },
    /// Nobody writes to it; all that is needed to go on is in memory.
    Parked {
        incoming: Box<Incoming>,
        /// Seconds since 1970.
        since: u64,
    },
    /// Left by an earlier life of the process, of this many bytes.
    OnDisk { len: u64, since: u64 },
}

impl Table {
    pub(super) fn new(quota: Option<u64>) -> Self {
        Self { quota, ..Self::default() }
    }

    pub(super) fn claim(&mut self, digest: &Digest) -> bool {
        self.claimed.insert(*digest)
    }

    /// Whether nothing of a blob is known and nobody is about to change that.
    pub(super) fn knows_nothing_of(&self, digest: &Digest) -> bool {
        !self.entries.contains_key(digest) && !self.claimed.contains(digest)
    }

    pub(super) fn release(&mut self, digest: &Digest) {
        self.claimed.remove(digest);
    }

    pub(super) fn state(&self, digest: &Digest) -> State {
        self.entries.get(digest).map_or(State::Absent, |entry| entry.state)
    }

    /// Moves a blob on. The caller holds its claim and only does what its state allows.
    pub(super) fn advance(&mut self, digest: &Digest, event: Event) {
        let before = self.state(digest);
        let after = before.after(event);
        assert!(after.is_some(), "{event:?} of a blob that is {before:?}");
        match (self.entries.get_mut(digest), after) {
            (Some(_), Some(State::Absent)) | (_, None) => self.forget(digest),
            (Some(entry), Some(state)) => entry.state = state,
            (None, Some(_)) => unreachable!("a blob enters by `enter`"),
        }
        self.changes += 1;
    }

    /// Takes up a blob that has space set aside for it already, or was found on disk.
    pub(super) fn enter(&mut self, digest: &Digest, entry: Entry) {
        debug_assert_ne!(entry.state, State::Absent);
        if let Some(old) = self.entries.insert(*digest, entry) {
            self.used -= old.length;
        }
        self.used += entry.length;
        self.changes += 1;
    }

    /// Takes up what an earlier process knew, in digest order. Nothing else has been entered yet.
    pub(super) fn enter_all(&mut self, entries: impl Iterator<Item = (Digest, Entry)>) {
        self.entries = entries.collect();
        self.used = self.entries.values().map(|entry| entry.length).sum();
    }

    /// Drops what is known of a blob and gives its bytes back.
    pub(super) fn forget(&mut self, digest: &Digest) {
        if let Some(entry) = self.entries.remove(digest) {
            self.used -= entry.length;
            self.changes += 1;
        }
    }

    pub(super) fn entry(&self, digest: &Digest) -> Option<Entry> {
        self.entries.get(digest).map(|entry| Entry { used: self.used_at(digest, entry), ..*entry })
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&Digest, Entry)> {
        self.entries.iter().map(|(digest, entry)| (digest, Entry { used: self.used_at(digest, entry), ..*entry }))
    }

    pub(super) fn range(&self, range: impl std::ops::RangeBounds<Digest>) -> impl Iterator<Item = (&Digest, Entry)> {
        let entries = self.entries.range(range);
        entries.map(|(digest, entry)| (digest, Entry { used: self.used_at(digest, entry), ..*entry }))
    }

    fn used_at(&self, digest: &Digest, entry: &Entry) -> u64 {
        self.open.get(digest).map_or(entry.used, |blob| blob.used())
    }

    pub(super) fn open(&self, digest: &Digest) -> Option<&Arc<Blob>> {
        self.open.get(digest)
    }

    pub(super) fn open_count(&self) -> usize {
        self.open.len()
    }

    /// Keeps a blob open; closes idle ones where there are too many. False where all are in use. What is closed comes back, to
    /// be dropped outside the lock.
    pub(super) fn set_open(&mut self, blob: &Arc<Blob>) -> (bool, Vec<Arc<Blob>>) {
        let mut closed = Vec::new();
        if self.open.len() >= OPEN_MAX && !self.open.contains_key(blob.digest()) {
            let idle: Vec<Digest> =
                self.open.iter().filter(|(_, blob)| Arc::strong_count(blob) == 1).map(|(digest, _)| *digest).collect();
            closed.extend(idle.iter().filter_map(|digest| self.close(digest)));
            if self.open.len() >= OPEN_MAX {
                return (false, closed);
            }
        }
        closed.extend(self.open.insert(*blob.digest(), Arc::clone(blob)));
        (true, closed)
    }

    pub(super) fn close(&mut self, digest: &Digest) -> Option<Arc<Blob>> {
        let blob = self.open.remove(digest)?;
        if let Some(entry) = self.entries.get_mut(digest) {
            entry.used = blob.used();
        }
        Some(blob)
    }

    pub(super) fn count(&self, state: State) -> usize {
        self.entries.values().filter(|entry| entry.state == state).count()
    }

    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Bytes over the quota.
    pub(super) fn excess(&self) -> u64 {
        self.quota.map_or(0, |quota| self.used.saturating_sub(quota))
    }

    /// Sets `bytes` aside, or says how many are too many.
    pub(super) fn reserve(&mut self, bytes: u64) -> Result<(), u64> {
        let used = self.used.saturating_add(bytes);
        match self.quota {
            Some(quota) if used > quota => Err(used - quota),
            _ => {
                self.used = used;
                Ok(())
            }
        }
    }

    /// Counts bytes that are on disk already, whatever the quota says.
    pub(super) fn admit(&mut self, bytes: u64) {
        self.used += bytes;
    }

    /// Gives back what [`Self::reserve`] or [`Self::admit`] counted.
    pub(super) fn unreserve(&mut self, bytes: u64) {
        self.used -= bytes;
    }

    /// What to evict for `need` bytes; none where that is not to be had.
    pub(super) fn victims(&self, need: u64) -> Option<Vec<Digest>> {
        let candidates = self.entries().map(|(digest, entry)| {
            let downloading = || self.open.get(digest).is_some_and(|blob| Arc::strong_count(blob) > 1);
            let held = match entry.state {
                State::Whole => false,
                State::Partial => downloading(),
                State::Absent | State::Verifying | State::Evicting => true,
            } || self.claimed.contains(digest)
                || self.pins.contains(digest);
            Candidate { digest: *digest, length: entry.length, used: entry.used, held }
        });
        evict::choose(candidates, need)
    }
}
