//! Blobs on disk: their life, the files around them, what survives a crash, how much space they take.
//!
//! ```text
//! sha256/partial/<hex>/{data,layout,pieces}   a download under way; `data` has its full length from the start
//! sha256/cache/ab/cd/<hex>/{data,layout}      a whole blob; the directory is renamed into place, so both files appear at once
//! sha256/pins/<hex>                           the blob may not be evicted
//! sha256/quarantine/<when>-<hex>/             a blob in which a wrong byte was found, with the reason
//! sha512/...                                  the same
//! upload/<uuid>/{data,state}                  an upload under way
//! trash/<n>                                   on its way out
//! index, id, lock                             the inventory, the node's name, the process that has the directory
//! ```
//!
//! **A name under `cache` means proven, durable bytes, whenever the process or the power dies.** To get there: write and
//! prove; fdatasync the data; fsync the sidecar; fsync their directory; rename it; fsync the directories that got a new name.
//! Only then is the blob whole and anything acknowledged. A failed fsync ends the attempt: its pages count as clean afterwards.
//!
//! Calls block and are made on worker threads ([`crate::workers`]), or inline by the simulator. No lock is held while the disk is waited
//! for; what works on one blob's files excludes others by a claim on its digest. A [`Blob`] is read and its pieces are written without
//! any claim.
mod blob;
mod counters;
mod error;
pub mod evict;
mod files;
mod incoming;
mod index;
pub mod life;
mod partial;
mod pieces;
mod read;
mod record;
mod space;
mod table;
#[cfg(test)]
mod tests;
mod whole;

pub use blob::Blob;
pub use error::{Error, PieceError, ReadError};
pub use incoming::Incoming;
pub use pieces::PieceMap;
pub use record::BootId;

use crate::{
    buf::Pool,
    disk::{Disk, Space},
    handle::{Entry, Metric, Proof, Stat},
};
use counters::Counters;
use files::{digest_of, parent, pin_path};
use index::Inventory;
use life::State;
use peer_proto::{Algorithm, Digest};
use std::{
    collections::HashSet,
    fmt, io,
    ops::Bound,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use table::Table;

/// Damaged blobs kept for a look at them; the oldest goes.
pub const QUARANTINE_MAX: usize = 16;

const ALGORITHMS: [Algorithm; 2] = [Algorithm::Sha256, Algorithm::Sha512];

/// What a store is opened with.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Most bytes of blobs, uploads included; none: as the disk allows.
    pub quota: Option<u64>,
    /// How pieces are proven.
    pub proof: Proof,
    /// The kernel's boot id.
    pub boot: BootId,
}

/// Blobs on one disk. See the module's text.
pub struct Store {
    disk: Arc<dyn Disk>,
    options: Options,
    pool: Pool,
    /// Seconds since 1970, as told by [`Self::tick`].
    clock: Arc<AtomicU64>,
    table: Mutex<Table>,
    released: Condvar,
    /// Directories known to have durable names.
    durable: Mutex<HashSet<String>>,
    inventory: Mutex<Inventory>,
    /// Numbers names in `trash` and `quarantine`.
    serial: AtomicU64,
    counters: Counters,
}

/// The right to work on one blob's files. One at a time.
pub(super) struct Claim<'a> {
    store: &'a Store,
    digest: Digest,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.store.table().release(&self.digest);
        self.store.released.notify_all();
    }
}
impl Store {
    /// Opens what is on the disk: makes the directories, empties the trash, takes note of pins, uploads and partial blobs.
    /// Whole blobs are known from the last snapshot and not looked at: [`Self::scan`] compares by and by, and whoever asks for
    /// one finds it at once. `now` is in seconds since 1970.
    pub fn open(disk: Arc<dyn Disk>, options: Options, pool: Pool, now: u64) -> io::Result<Self> {
        let store = Self {
            disk,
            options,
            pool,
            clock: Arc::new(AtomicU64::new(now)),
            table: Mutex::new(Table::new(options.quota)),
            released: Condvar::new(),
            durable: Mutex::default(),
            inventory: Mutex::default(),
            serial: AtomicU64::new(0),
            counters: Counters::default(),
        };
        store.make_dirs()?;
        for listed in store.disk.list("trash")? {
            store.remove_tree(&format!("trash/{}", listed.name))?;
        }
        store.load_index()?;
        for algorithm in ALGORITHMS {
            for listed in store.disk.list(&format!("{}/pins", algorithm.name()))? {
                store.table().pins.extend(digest_of(algorithm, &listed.name));
            }
            store.recover_partials(algorithm)?;
        }
        store.recover_uploads()?;
        Ok(store)
    }

    fn make_dirs(&self) -> io::Result<()> {
        let kinds = ["partial", "cache", "pins", "quarantine"];
        let inner = ALGORITHMS.iter().flat_map(|a| kinds.map(|kind| format!("{}/{kind}", a.name())));
        let outer = ALGORITHMS.iter().map(|a| a.name().to_owned()).chain(["upload".to_owned(), "trash".to_owned()]);
        for path in outer.chain(inner) {
            self.make_durable(&path)?;
        }
        Ok(())
    }

    /// Tells the time, in seconds since 1970.
    pub fn tick(&self, now: u64) {
        self.clock.store(now, Relaxed);
    }

    pub(crate) fn now(&self) -> u64 {
        self.clock.load(Relaxed)
    }

    /// Where piece buffers come from.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Bytes of blobs and uploads, as far as known.
    pub fn used(&self) -> u64 {
        self.table().used()
    }

    /// Its figures.
    pub fn metrics(&self) -> Vec<Metric> {
        let mut metrics = self.counters.metrics();
        metrics.push(Metric::counter("buffers_refused_total", "Times no piece buffer was free.", self.pool.refused()));
        let table = self.table();
        let gauges = [
            ("store_blobs", "Whole blobs.", table.count(State::Whole) as u64),
            ("store_partial_blobs", "Partial blobs.", table.count(State::Partial) as u64),
            ("store_open_blobs", "Open blobs.", table.open_count() as u64),
            ("store_uploads", "Uploads under way.", table.uploads.len() as u64),
            ("store_pins", "Pinned blobs.", table.pins.len() as u64),
            ("store_used_bytes", "Bytes of blobs and uploads.", table.used()),
            ("buffers_lent_bytes", "Bytes of piece buffers in use.", self.pool.lent() as u64),
        ];
        metrics.extend(gauges.map(|(name, help, value)| Metric::gauge(name, help, value)));
        metrics
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claim(&self, digest: &Digest) -> Claim<'_> {
        let mut table = self.table();
        while !table.claim(digest) {
            table = self.released.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
        Claim { store: self, digest: *digest }
    }

    fn try_claim(&self, digest: &Digest) -> Option<Claim<'_>> {
        self.table().claim(digest).then(|| Claim { store: self, digest: *digest })
    }

    /// A blob that is open already: no disk is asked, so any thread may call it.
    pub fn opened(&self, digest: &Digest) -> Option<Arc<Blob>> {
        let blob = self.table().open(digest).cloned()?;
        blob.touch();
        Some(blob)
    }

    /// A blob, whole or partial, opened where it is not yet.
    pub fn blob(&self, digest: &Digest) -> Result<Option<Arc<Blob>>, Error> {
        match self.opened(digest) {
            Some(blob) => Ok(Some(blob)),
            None => self.load(&self.claim(digest)),
        }
    }

    /// What is here of a blob.
    pub fn stat(&self, digest: &Digest) -> Result<Stat, Error> {
        Ok(self.blob(digest)?.map_or(Stat::Absent, |blob| blob.stat()))
    }

    fn close_gone(&self, digest: &Digest) {
        let closed = self.table().close(digest);
        if let Some(blob) = closed {
            blob.set_gone();
        }
    }

    /// Keeps a blob from eviction, whether it is here yet or not, durably.
    pub fn pin(&self, digest: &Digest) -> Result<(), Error> {
        let _claim = self.claim(digest);
        if self.table().pins.contains(digest) {
            return Ok(());
        }
        let pin = pin_path(digest);
        match self.disk.create(&pin, Space::None) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => drop(other?),
        }
        self.disk.sync_dir(parent(&pin))?;
        self.table().pins.insert(*digest);
        Ok(())
    }

    /// Lets a blob be evicted again.
    pub fn unpin(&self, digest: &Digest) -> Result<(), Error> {
        let _claim = self.claim(digest);
        if !self.table().pins.contains(digest) {
            return Ok(());
        }
        self.disk.remove(&pin_path(digest))?;
        self.table().pins.remove(digest);
        Ok(())
    }

    /// Whole blobs after a digest, in digest order. Finishes the scan first where it is all there is to know them by.
    pub fn list(&self, after: Option<&Digest>, limit: usize) -> Result<Vec<Entry>, Error> {
        while !self.is_inventoried() {
            self.scan()?;
        }
        let now = self.now();
        let table = self.table();
        let from = after.map_or(Bound::Unbounded, |digest| Bound::Excluded(*digest));
        let whole = table.range((from, Bound::Unbounded)).filter(|(_, entry)| entry.state == State::Whole);
        let entries = whole.take(limit).map(|(digest, entry)| Entry {
            digest: *digest,
            length: entry.length,
            idle: Duration::from_secs(now.saturating_sub(entry.used)),
            pinned: table.pins.contains(digest),
        });
        Ok(entries.collect())
    }

    /// Opens what is on disk of a blob.
    fn load(&self, claim: &Claim<'_>) -> Result<Option<Arc<Blob>>, Error> {
        if let Some(blob) = self.opened(&claim.digest) {
            return Ok(Some(blob));
        }
        match self.load_whole(claim)? {
            Some(blob) => Ok(Some(blob)),
            None => self.load_partial(claim),
        }
    }

    fn enter_found(&self, blob: &Blob, state: State) {
        let mut table = self.table();
        if let Some(entry) = table.entry(blob.digest()) {
            blob.note_used(entry.used);
        } else {
            table.enter(blob.digest(), table::Entry { state, length: blob.layout.length(), used: self.now() });
        }
    }

    fn keep_open(&self, blob: &Arc<Blob>) -> Result<(), Error> {
        let (kept, closed) = self.table().set_open(blob);
        drop(closed);
        if kept { Ok(()) } else { Err(Error::Busy("table of open blobs")) }
    }
}
impl Blob {
    pub(crate) fn stat(&self) -> Stat {
        let layout = Arc::clone(&self.layout);
        if self.is_whole() { Stat::Whole { layout } } else { Stat::Partial { layout, have: self.pieces.bytes() } }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("disk", &self.disk).field("options", &self.options).finish_non_exhaustive()
    }
}
