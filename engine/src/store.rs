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
pub mod evict;
mod incoming;
pub mod life;
mod pieces;
mod record;
mod table;

pub use blob::Blob;
pub use incoming::Incoming;
pub use pieces::PieceMap;
pub use record::BootId;

use crate::{
    buf::{Buf, Pool},
    disk::{self, Disk, File, Space},
    handle::{Entry, Metric, Proof, Stat},
};
use bytes::Bytes;
use life::{Event, State};
use peer_proto::{Algorithm, Digest, Layout, Namespace, PeerId, PieceIndex, ProofError};
use std::{
    collections::HashSet,
    fmt, io,
    ops::{Bound, Range},
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
    /// Numbers names in `trash` and `quarantine`.
    serial: AtomicU64,
    counters: Counters,
}

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No room, on the disk or in the quota, and nothing to evict.
    #[error("no space for {0} bytes")]
    NoSpace(u64),
    /// A table is full.
    #[error("busy: {0} is full")]
    Busy(&'static str),
    /// Pinned, so not evicted.
    #[error("blob {0} is pinned")]
    Pinned(Digest),
    /// A partial blob has another layout and is in use.
    #[error("blob {0} is being downloaded by another layout")]
    LayoutDiffers(Digest),
    /// Not all pieces are here.
    #[error("blob {0} lacks pieces")]
    Incomplete(Digest),
    /// Deleted meanwhile.
    #[error("blob {0} was deleted")]
    Gone(Digest),
    /// A wrong byte was found; the blob is in quarantine.
    #[error("blob {digest} was damaged on disk: {reason}")]
    Damaged {
        /// The blob.
        digest: Digest,
        /// What was found.
        reason: String,
    },
    /// No upload with that id, or it was closed.
    #[error("upload is unknown")]
    UploadUnknown,
    /// Somebody writes to that upload.
    #[error("upload has another writer")]
    UploadInUse,
    /// Its writer is just leaving it: ask again when it has.
    #[error("upload is being left by its writer")]
    UploadLeaving,
    /// Longer than a blob may be.
    #[error("upload is longer than a blob may be")]
    TooLong,
    /// Not the bytes they were said to be.
    #[error("content has digest {actual}, expected {expected}")]
    Mismatch {
        /// What was asked for.
        expected: Digest,
        /// What was written.
        actual: Box<Digest>,
    },
    /// The disk failed.
    #[error("disk: {0}")]
    Disk(io::Error),
}

impl From<io::Error> for Error {
    fn from(e: io::Error) -> Self {
        if disk::is_full(&e) { Self::NoSpace(0) } else { Self::Disk(e) }
    }
}

/// Why a piece was not stored.
#[derive(Debug, thiserror::Error)]
pub enum PieceError {
    /// It is not the piece: whoever sent it, or the layout, is wrong.
    #[error(transparent)]
    Proof(#[from] ProofError),
    /// The blob was deleted, or an upload of the same blob made it whole: open it again to see.
    #[error("blob was deleted")]
    Gone,
    /// The disk failed.
    #[error("disk: {0}")]
    Disk(#[source] io::Error),
}

/// Why bytes were not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The range is not within one piece.
    #[error("range is not within a piece")]
    Range,
    /// The piece is not here yet.
    #[error("piece {0} is not here")]
    Absent(PieceIndex),
    /// No buffer is free.
    #[error("busy: buffer pool is full")]
    Busy,
    /// A wrong or missing byte; the blob is in quarantine.
    #[error("piece {piece} was damaged on disk: {reason}")]
    Damaged {
        /// Where.
        piece: PieceIndex,
        /// What was found.
        reason: String,
    },
}

/// Events since the start, and nothing that can be asked of the disk.
#[derive(Default, Debug)]
pub(crate) struct Counters {
    pub(crate) commits: Counter,
    pub(crate) upload_mismatches: Counter,
    pub(crate) pieces_stored: Counter,
    pub(crate) bytes_stored: Counter,
    pub(crate) pieces_refused: Counter,
    pub(crate) bytes_read: Counter,
    pub(crate) evictions: Counter,
    pub(crate) bytes_evicted: Counter,
    pub(crate) quarantines: Counter,
    pub(crate) no_space: Counter,
    pub(crate) disk_errors: Counter,
}

/// A number that only grows.
#[derive(Default, Debug)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.load(Relaxed)
    }
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
    /// Whole blobs are not looked at: [`Self::scan`] finds them by and by, and whoever asks for one finds it at once. `now`
    /// is in seconds since 1970.
    pub fn open(disk: Arc<dyn Disk>, options: Options, pool: Pool, now: u64) -> io::Result<Self> {
        let store = Self {
            disk,
            options,
            pool,
            clock: Arc::new(AtomicU64::new(now)),
            table: Mutex::new(Table::new(options.quota)),
            released: Condvar::new(),
            durable: Mutex::default(),
            serial: AtomicU64::new(0),
            counters: Counters::default(),
        };
        store.make_dirs()?;
        for listed in store.disk.list("trash")? {
            store.remove_tree(&format!("trash/{}", listed.name))?;
        }
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
        let count = &self.counters;
        let counters = [
            ("store_commits_total", "Blobs made durable under their name.", &count.commits),
            (
                "store_upload_mismatches_total",
                "Uploads that were not the digest they were said to be.",
                &count.upload_mismatches,
            ),
            ("store_pieces_total", "Received pieces proven and written.", &count.pieces_stored),
            ("store_piece_bytes_total", "Bytes of received pieces proven and written.", &count.bytes_stored),
            ("store_pieces_refused_total", "Received pieces that failed their proof.", &count.pieces_refused),
            ("store_read_bytes_total", "Bytes read from disk into buffers.", &count.bytes_read),
            ("store_evictions_total", "Blobs deleted.", &count.evictions),
            ("store_evicted_bytes_total", "Bytes of deleted blobs.", &count.bytes_evicted),
            ("store_quarantines_total", "Blobs in which damage was found.", &count.quarantines),
            ("store_no_space_total", "Requests refused for want of space.", &count.no_space),
            ("store_disk_errors_total", "Reads, writes and syncs that the disk failed.", &count.disk_errors),
        ];
        let counters = counters.map(|(name, help, counter)| Metric::counter(name, help, counter.value()));
        let refused = Metric::counter("buffers_refused_total", "Times no piece buffer was free.", self.pool.refused());
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
        let gauges = gauges.map(|(name, help, value)| Metric::gauge(name, help, value));
        counters.into_iter().chain([refused]).chain(gauges).collect()
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

    /// Takes up a download: sets space aside for it, evicting others for it where need be. Where the blob is here already,
    /// partial or whole, that is what comes back.
    pub fn begin(&self, layout: &Arc<Layout>, namespace: Option<&Namespace>) -> Result<Arc<Blob>, Error> {
        let digest = layout.digest();
        let claim = self.claim(digest);
        if let Some(blob) = self.load(&claim)? {
            if blob.is_whole() || blob.layout() == layout {
                return Ok(blob);
            }
            // Ours, the table's, and nobody else's: another layout may have its place.
            if Arc::strong_count(&blob) > 2 {
                return Err(Error::LayoutDiffers(*digest));
            }
            drop(blob);
            self.remove_partial(&claim);
        }
        self.reserve(layout.length())?;
        match self.make_partial(layout, namespace) {
            Ok(blob) => {
                let mut table = self.table();
                table.unreserve(layout.length());
                table.enter(digest, table::Entry { state: State::Partial, length: layout.length(), used: self.now() });
                drop(table);
                self.keep_open(&blob)?;
                Ok(blob)
            }
            Err(e) => {
                self.table().unreserve(layout.length());
                Err(e)
            }
        }
    }

    fn make_partial(&self, layout: &Arc<Layout>, namespace: Option<&Namespace>) -> Result<Arc<Blob>, Error> {
        let dir = partial_dir(layout.digest());
        let pieces = layout.geometry().pieces();
        // Leftovers that could not be removed when they should have been.
        self.discard(&dir)?;
        self.with_room(layout.length(), || {
            self.disk.create_dir(&dir)?;
            let made = self.disk.create(&format!("{dir}/data"), Space::Length(layout.length())).and_then(|data| {
                let sidecar = self.disk.create(&format!("{dir}/layout"), Space::None)?;
                sidecar.write_at(0, &record::encode_sidecar(layout, namespace))?;
                let record = self.disk.create(&format!("{dir}/pieces"), Space::None)?;
                record.write_at(0, &record::encode_pieces(self.options.boot, pieces, |_| false))?;
                let blob = Blob::new(Arc::clone(layout), namespace.cloned(), data, Arc::clone(&self.clock))?;
                blob.set_record(Some(record));
                Ok(Arc::new(blob))
            });
            if made.is_err() {
                self.remove_tree(&dir)?;
            }
            made
        })
    }

    /// Proves a piece and puts it in its place. False where it was there already.
    pub fn put(&self, blob: &Blob, piece: PieceIndex, bytes: &[u8]) -> Result<bool, PieceError> {
        let proven = match self.options.proof {
            Proof::Full => blob.layout.prove(piece, bytes),
            Proof::Crc => blob.layout.check_crc(piece, bytes),
        };
        if let Err(e) = proven {
            self.counters.pieces_refused.add(1);
            return Err(e.into());
        }
        if blob.is_gone() {
            return Err(PieceError::Gone);
        }
        if !blob.taken.set(piece) {
            return Ok(false);
        }
        let range = blob.layout.geometry().range(piece);
        let written = blob.file.write_at(range.start, bytes).and_then(|()| match blob.record() {
            // After the bytes: a note that outlives a kill speaks of bytes that do too.
            Some(record) => record.write_at(record::piece_offset(piece), &[1]),
            None => Ok(()),
        });
        if let Err(e) = written {
            blob.taken.clear(piece);
            self.counters.disk_errors.add(1);
            return Err(PieceError::Disk(e));
        }
        blob.checked(piece);
        blob.touch();
        self.counters.pieces_stored.add(1);
        self.counters.bytes_stored.add(bytes.len() as u64);
        Ok(true)
    }

    /// Makes a blob of which every piece is here durable under its name. The blob that comes back is the one given, or the
    /// one that an upload has made whole meanwhile.
    pub fn finish(&self, blob: &Arc<Blob>) -> Result<Arc<Blob>, Error> {
        let digest = *blob.digest();
        let claim = self.claim(&digest);
        if blob.is_whole() {
            return Ok(Arc::clone(blob));
        }
        if let Some(other) = self.table().open(&digest)
            && other.is_whole()
        {
            return Ok(Arc::clone(other));
        }
        if blob.is_gone() {
            return Err(Error::Gone(digest));
        }
        if !blob.pieces.is_full() {
            return Err(Error::Incomplete(digest));
        }
        self.table().advance(&digest, Event::Complete);
        match self.check_recovered(blob).and_then(|()| self.name_partial(blob)) {
            Ok(()) => {
                self.table().advance(&digest, Event::Durable);
                blob.set_whole();
                self.counters.commits.add(1);
                Ok(Arc::clone(blob))
            }
            Err(Error::Damaged { reason, .. }) => {
                self.table().advance(&digest, Event::Failed);
                self.quarantine(&claim, &partial_dir(&digest), &reason)?;
                Err(Error::Damaged { digest, reason })
            }
            Err(e) => {
                // What the disk made of it is unknown: it must come again.
                self.table().advance(&digest, Event::Failed);
                self.counters.disk_errors.add(1);
                self.remove_partial(&claim);
                Err(e)
            }
        }
    }

    /// Pieces that an earlier process wrote were proven then; what matters is that the disk still has them.
    fn check_recovered(&self, blob: &Blob) -> Result<(), Error> {
        let mut buf = Vec::new();
        for piece in blob.layout.geometry().all().filter(|piece| !blob.seen.has(*piece)) {
            let range = blob.layout.geometry().range(piece);
            buf.resize(blob.layout.geometry().piece_len(piece) as usize, 0);
            blob.file.read_at(range.start, &mut buf)?;
            blob.layout
                .check_crc(piece, &buf)
                .map_err(|e| Error::Damaged { digest: *blob.digest(), reason: e.to_string() })?;
            blob.checked(piece);
        }
        Ok(())
    }

    fn name_partial(&self, blob: &Blob) -> Result<(), Error> {
        let dir = partial_dir(blob.digest());
        blob.file.sync()?;
        self.disk.open(&format!("{dir}/layout"))?.sync()?;
        self.name(&dir, blob.digest())?;
        let leftover = format!("{}/pieces", cache_dir(blob.digest()));
        if let Err(error) = self.disk.remove(&leftover) {
            // The blob is durable; a few bytes too many go with it one day.
            tracing::debug!(%error, leftover, "piece map of a whole blob stays");
        }
        Ok(())
    }

    /// Gives a directory with durable files its blob's name, durably.
    fn name(&self, dir: &str, digest: &Digest) -> Result<(), Error> {
        self.disk.sync_dir(dir)?;
        let to = cache_dir(digest);
        let parent = parent(&to);
        self.make_durable(parent)?;
        match self.disk.rename(dir, &to) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                // Not loadable, or we would not be here.
                self.discard(&to)?;
                self.disk.rename(dir, &to)?;
            }
            other => other?,
        }
        if let Err(e) = self.disk.sync_dir(parent) {
            // Whether the name lasts is unknown, so nobody may find it and believe it does.
            self.discard(&to)?;
            return Err(e.into());
        }
        Ok(())
    }

    /// Makes sure that the name of a blob that is whole outlives a power cut.
    fn settle(&self, digest: &Digest) -> Result<(), Error> {
        let dir = cache_dir(digest);
        self.make_durable(parent(&dir))?;
        Ok(self.disk.sync_dir(parent(&dir))?)
    }

    /// Makes a directory, and its parents, with names that outlive a power cut.
    fn make_durable(&self, path: &str) -> io::Result<()> {
        let durable = || self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        if path.is_empty() || durable().contains(path) {
            return Ok(());
        }
        self.make_durable(parent(path))?;
        match self.disk.create_dir(path) {
            // Perhaps made by somebody who has not synced its parent yet.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        self.disk.sync_dir(parent(path))?;
        durable().insert(path.to_owned());
        Ok(())
    }

    /// Bytes within one piece that is here. What an earlier process left is checked first, and every whole piece each time.
    pub fn read(&self, blob: &Blob, range: Range<u64>) -> Result<Bytes, ReadError> {
        self.read_into(blob, range, |len| self.pool.take(len).map(Room::Pooled))
    }

    /// As [`Self::read`], with memory of its own where the pool has none: for callers that are bounded in number.
    pub fn read_or_allocate(&self, blob: &Blob, range: Range<u64>) -> Result<Bytes, ReadError> {
        self.read_into(blob, range, |len| {
            Some(self.pool.take(len).map_or_else(|| Room::Own(vec![0; len]), Room::Pooled))
        })
    }

    fn read_into(
        &self,
        blob: &Blob,
        range: Range<u64>,
        room: impl FnOnce(usize) -> Option<Room>,
    ) -> Result<Bytes, ReadError> {
        let geometry = blob.layout.geometry();
        if range.start > range.end || range.end > geometry.length() {
            return Err(ReadError::Range);
        }
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let piece = geometry.piece_at(range.start).ok_or(ReadError::Range)?;
        let whole = geometry.range(piece);
        if range.end > whole.end {
            return Err(ReadError::Range);
        }
        if !blob.pieces.has(piece) {
            return Err(ReadError::Absent(piece));
        }
        let check = range == whole || !blob.seen.has(piece);
        let from = if check { whole } else { range.clone() };
        let mut room = usize::try_from(from.end - from.start).ok().and_then(room).ok_or(ReadError::Busy)?;
        let result = blob.file.read_at(from.start, room.as_mut()).map_err(|e| {
            self.counters.disk_errors.add(1);
            e.to_string()
        });
        let result = result.and_then(|()| match check {
            true => blob.layout.check_crc(piece, room.as_mut()).map_err(|e| e.to_string()),
            false => Ok(()),
        });
        if let Err(reason) = result {
            self.damaged(blob, &reason);
            return Err(ReadError::Damaged { piece, reason });
        }
        if check {
            blob.checked(piece);
        }
        blob.touch();
        self.counters.bytes_read.add(range.end - range.start);
        let bytes = room.freeze();
        // Within the buffer, a usize.
        #[expect(clippy::cast_possible_truncation, reason = "offsets within a piece")]
        let within = (range.start - from.start) as usize..(range.end - from.start) as usize;
        Ok(bytes.slice(within))
    }

    fn damaged(&self, blob: &Blob, reason: &str) {
        let digest = *blob.digest();
        let claim = self.claim(&digest);
        if blob.is_gone() {
            return;
        }
        let dir = if blob.is_whole() { cache_dir(&digest) } else { partial_dir(&digest) };
        if let Err(error) = self.quarantine(&claim, &dir, reason) {
            tracing::error!(%error, %digest, "damaged blob could not be moved to quarantine");
        }
    }

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

    fn evict_claimed(&self, claim: &Claim<'_>) -> Result<bool, Error> {
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

    /// Takes a partial blob away, without a word where the disk refuses: the next start sees to it.
    fn remove_partial(&self, claim: &Claim<'_>) {
        let digest = &claim.digest;
        if let Err(error) = self.discard(&partial_dir(digest)) {
            tracing::warn!(%error, %digest, "partial blob could not be removed");
        }
        self.close_gone(digest);
        self.table().forget(digest);
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

    /// Whole blobs after a digest, in digest order.
    pub fn list(&self, after: Option<&Digest>, limit: usize) -> Vec<Entry> {
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
        entries.collect()
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

    fn load_whole(&self, claim: &Claim<'_>) -> Result<Option<Arc<Blob>>, Error> {
        let digest = &claim.digest;
        let dir = cache_dir(digest);
        let Some(sidecar) = self.read_small(&format!("{dir}/layout"))? else {
            if self.table().state(digest) == State::Whole {
                // Somebody else deleted it.
                self.table().forget(digest);
            }
            return Ok(None);
        };
        let sound = record::decode_sidecar(&sidecar).filter(|(layout, _)| layout.digest() == digest);
        let opened = match sound {
            None => Err("its layout is damaged".to_owned()),
            Some((layout, namespace)) => match self.disk.open(&format!("{dir}/data")) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Err("its data is missing".to_owned()),
                Err(e) => return Err(e.into()),
                Ok(file) => match file.len()? {
                    len if len == layout.length() => Ok((Arc::new(layout), namespace, file)),
                    len => Err(format!("its data has {len} bytes, its layout says {}", layout.length())),
                },
            },
        };
        match opened {
            Ok((layout, namespace, file)) => {
                let blob = Blob::new(layout, namespace, file, Arc::clone(&self.clock))?;
                blob.layout.geometry().all().for_each(|piece| blob.recovered(piece));
                blob.set_whole();
                let blob = Arc::new(blob);
                self.enter_found(&blob, State::Whole);
                self.keep_open(&blob)?;
                blob.touch();
                Ok(Some(blob))
            }
            Err(reason) => {
                self.quarantine(claim, &dir, &reason)?;
                Ok(None)
            }
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

    /// Enters a blob that was just made durable by other means than a download. It is here, whether it can be kept open or
    /// not.
    fn enter_whole(&self, claim: &Claim<'_>, layout: &Arc<Layout>, file: Arc<dyn File>) {
        let entry = table::Entry { state: State::Whole, length: layout.length(), used: self.now() };
        self.table().enter(&claim.digest, entry);
        let opened = Blob::new(Arc::clone(layout), None, file, Arc::clone(&self.clock)).map_err(Error::from);
        let kept = opened.and_then(|blob| {
            layout.geometry().all().for_each(|piece| blob.checked(piece));
            blob.set_whole();
            self.keep_open(&Arc::new(blob))
        });
        if let Err(error) = kept {
            tracing::debug!(%error, digest = %claim.digest, "new blob is not kept open");
        }
    }

    fn keep_open(&self, blob: &Arc<Blob>) -> Result<(), Error> {
        let (kept, closed) = self.table().set_open(blob);
        drop(closed);
        if kept { Ok(()) } else { Err(Error::Busy("table of open blobs")) }
    }

    /// Opens a partial blob with the pieces that its record claims: as they are, where the kernel has run ever since; proven
    /// again one by one where it has not, because a power cut keeps notes and loses bytes as it likes.
    fn load_partial(&self, claim: &Claim<'_>) -> Result<Option<Arc<Blob>>, Error> {
        let digest = &claim.digest;
        if self.table().state(digest) != State::Partial {
            return Ok(None);
        }
        let dir = partial_dir(digest);
        let sidecar = self.read_small(&format!("{dir}/layout"))?;
        let sound =
            sidecar.and_then(|bytes| record::decode_sidecar(&bytes)).filter(|(layout, _)| layout.digest() == digest);
        let Some((layout, namespace)) = sound else {
            self.remove_partial(claim);
            return Ok(None);
        };
        let data = self.disk.open(&format!("{dir}/data")).and_then(|file| Ok((file.len()?, file)));
        let file = match data {
            Ok((len, file)) if len == layout.length() => file,
            Ok(_) => {
                self.remove_partial(claim);
                return Ok(None);
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.remove_partial(claim);
                return Ok(None);
            }
            Err(e) => return Err(e.into()),
        };
        let blob = Blob::new(Arc::new(layout), namespace, file, Arc::clone(&self.clock))?;
        self.load_record(&blob, &dir)?;
        let blob = Arc::new(blob);
        self.enter_found(&blob, State::Partial);
        self.keep_open(&blob)?;
        blob.touch();
        Ok(Some(blob))
    }

    fn load_record(&self, blob: &Blob, dir: &str) -> Result<(), Error> {
        let geometry = blob.layout.geometry();
        let path = format!("{dir}/pieces");
        let bytes = self.read_small(&path)?;
        let claimed = bytes.as_deref().and_then(|bytes| record::decode_pieces(bytes, geometry.pieces()));
        let same_boot = claimed.is_some_and(|(boot, _)| boot == self.options.boot);
        if let Some((_, noted)) = claimed {
            for piece in geometry.all().filter(|piece| noted[piece.index()] == 1) {
                if same_boot {
                    blob.recovered(piece);
                } else if self.prove_again(blob, piece)? {
                    blob.checked(piece);
                }
            }
        }
        let record = match bytes {
            Some(_) => self.disk.open(&path)?,
            None => self.disk.create(&path, Space::None)?,
        };
        if !same_boot {
            let encoded = record::encode_pieces(self.options.boot, geometry.pieces(), |index| {
                geometry.piece(index).is_some_and(|piece| blob.pieces.has(piece))
            });
            // The notes before the boot id that vouches for them.
            let (header, noted) = encoded.split_at(encoded.len() - geometry.pieces() as usize);
            record.write_at(header.len() as u64, noted)?;
            record.write_at(0, header)?;
        }
        blob.set_record(Some(record));
        Ok(())
    }

    fn prove_again(&self, blob: &Blob, piece: PieceIndex) -> io::Result<bool> {
        let range = blob.layout.geometry().range(piece);
        let mut buf = vec![0; blob.layout.geometry().piece_len(piece) as usize];
        blob.file.read_at(range.start, &mut buf)?;
        Ok(match self.options.proof {
            Proof::Full => blob.layout.prove(piece, &buf).is_ok(),
            Proof::Crc => blob.layout.check_crc(piece, &buf).is_ok(),
        })
    }

    /// Takes note of the partial blobs that an earlier process left, without opening them.
    fn recover_partials(&self, algorithm: Algorithm) -> io::Result<()> {
        let root = format!("{}/partial", algorithm.name());
        for listed in self.disk.list(&root)? {
            let path = format!("{root}/{}", listed.name);
            let digest = digest_of(algorithm, &listed.name);
            let data = self.disk.stat(&format!("{path}/data"))?;
            match (digest, data) {
                (Some(digest), Some(meta)) if self.disk.stat(&format!("{}/data", cache_dir(&digest)))?.is_none() => {
                    let entry = table::Entry { state: State::Partial, length: meta.len, used: meta.modified.as_secs() };
                    self.table().enter(&digest, entry);
                }
                _ if listed.dir => self.remove_tree(&path)?,
                _ => self.disk.remove(&path)?,
            }
        }
        Ok(())
    }

    /// Moves a blob's files aside for somebody to look at, and forgets the blob.
    fn quarantine(&self, claim: &Claim<'_>, dir: &str, reason: &str) -> Result<(), Error> {
        let digest = &claim.digest;
        self.close_gone(digest);
        self.table().forget(digest);
        self.counters.quarantines.add(1);
        tracing::warn!(%digest, reason, "damaged blob moved to quarantine");
        let root = format!("{}/quarantine", digest.algorithm().name());
        let name = format!("{:012}-{:06}-{}", self.now(), self.serial.fetch_add(1, Relaxed), digest.hex());
        self.disk.rename(dir, &format!("{root}/{name}"))?;
        self.disk.create(&format!("{root}/{name}/reason"), Space::None)?.write_at(0, reason.as_bytes())?;
        let mut kept = self.disk.list(&root)?;
        kept.sort();
        for oldest in kept.iter().rev().skip(QUARANTINE_MAX) {
            self.discard(&format!("{root}/{}", oldest.name))?;
        }
        Ok(())
    }

    /// Deletes a directory: out of the way at once, then file by file.
    fn discard(&self, dir: &str) -> io::Result<()> {
        let trash = format!("trash/{}", self.serial.fetch_add(1, Relaxed));
        match self.disk.rename(dir, &trash) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
            Ok(()) => self.remove_tree(&trash),
        }
    }

    /// Deletes a directory and what is in it; a no-op where there is none.
    fn remove_tree(&self, path: &str) -> io::Result<()> {
        let listed = match self.disk.list(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for listed in listed {
            let path = format!("{path}/{}", listed.name);
            if listed.dir { self.remove_tree(&path)? } else { self.disk.remove(&path)? }
        }
        self.disk.remove_dir(path)
    }

    /// The node's name: the one kept here, or else `draw`, which is kept from now on.
    pub fn identity(&self, draw: impl FnOnce() -> PeerId) -> io::Result<PeerId> {
        let kept = self.read_small("id")?.and_then(|text| std::str::from_utf8(&text).ok()?.trim().parse().ok());
        if let Some(id) = kept {
            return Ok(id);
        }
        let id = draw();
        match self.disk.remove("id.new") {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        let file = self.disk.create("id.new", Space::None)?;
        file.write_at(0, format!("{id}\n").as_bytes())?;
        file.sync()?;
        self.disk.replace("id.new", "id")?;
        self.disk.sync_dir("")?;
        Ok(id)
    }

    /// A small file's bytes; none where it is missing, or too long to be what it should.
    fn read_small(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match self.disk.open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let len = file.len()?;
        let Some(len) = usize::try_from(len).ok().filter(|_| len <= record::SIDECAR_LEN_MAX) else { return Ok(None) };
        let mut bytes = vec![0; len];
        file.read_at(0, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// Sets bytes aside in the quota, evicting for them.
    fn reserve(&self, bytes: u64) -> Result<(), Error> {
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

    /// Evicts what is over the quota: after a start with a smaller one, or when the scan has found more than was known.
    pub fn enforce_quota(&self) {
        let excess = self.table().excess();
        if excess > 0 && !self.evict_for(excess) {
            tracing::warn!(excess, "the quota cannot be kept: what is over it is pinned or in use");
        }
    }

    /// Does something that needs `bytes` of disk, evicting as long as the disk is full and there is something to evict.
    fn with_room<T>(&self, bytes: u64, make: impl Fn() -> io::Result<T>) -> Result<T, Error> {
        loop {
            match make() {
                Err(e) if disk::is_full(&e) => {
                    let lacking = bytes.saturating_sub(self.disk.free()?).max(1);
                    if !self.evict_for(lacking) {
                        self.counters.no_space.add(1);
                        return Err(Error::NoSpace(bytes));
                    }
                }
                other => return Ok(other?),
            }
        }
    }

    /// Evicts the least recently used for `need` bytes. False where nothing could be.
    fn evict_for(&self, need: u64) -> bool {
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

impl Blob {
    pub(crate) fn stat(&self) -> Stat {
        let layout = Arc::clone(&self.layout);
        if self.is_whole() { Stat::Whole { layout } } else { Stat::Partial { layout, have: self.pieces.bytes() } }
    }
}

/// Memory to read into.
enum Room {
    Pooled(Buf),
    Own(Vec<u8>),
}

impl Room {
    fn as_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Pooled(buf) => buf,
            Self::Own(bytes) => bytes,
        }
    }

    fn freeze(self) -> Bytes {
        match self {
            Self::Pooled(buf) => buf.freeze(),
            Self::Own(bytes) => bytes.into(),
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("disk", &self.disk).field("options", &self.options).finish_non_exhaustive()
    }
}

fn cache_dir(digest: &Digest) -> String {
    let hex = digest.hex();
    format!("{}/cache/{}/{}/{hex}", digest.algorithm().name(), &hex[..2], &hex[2..4])
}

fn partial_dir(digest: &Digest) -> String {
    format!("{}/partial/{}", digest.algorithm().name(), digest.hex())
}

fn pin_path(digest: &Digest) -> String {
    format!("{}/pins/{}", digest.algorithm().name(), digest.hex())
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn digest_of(algorithm: Algorithm, hex: &str) -> Option<Digest> {
    format!("{}:{hex}", algorithm.name()).parse().ok()
}
