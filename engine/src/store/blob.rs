//! One blob as its readers see it: shared, read without a lock, good until the last of them lets go of it.

use super::PieceMap;
use crate::disk::{File, Mapping, Stretch};
use bytes::Bytes;
use peer_proto::{Digest, Layout, Namespace, PieceIndex};
use std::{
    fmt, io,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

/// A blob, partial or whole. Deleting it takes its names away and leaves the file to those who still hold this.
pub struct Blob {
    pub(super) layout: Arc<Layout>,
    pub(super) namespace: Option<Namespace>,
    pub(super) file: Arc<dyn File>,
    mapping: Option<Arc<dyn Mapping>>,
    /// Pieces on disk and proven.
    pub(super) pieces: PieceMap,
    /// Pieces that this process wrote or checked since it opened the blob. What comes from an earlier life of the process or
    /// of the machine is checked against its CRC before it is used.
    pub(super) seen: PieceMap,
    /// Pieces written or being written, so that two arrivals of one piece do not both write.
    pub(super) taken: PieceMap,
    /// Pieces that were read past the page cache: for the first peer that wants one. Whatever is wanted again goes through it.
    pub(super) passed: PieceMap,
    /// The piece map's file, while partial.
    pub(super) record: Mutex<Option<Arc<dyn File>>>,
    whole: AtomicBool,
    gone: AtomicBool,
    clock: Arc<AtomicU64>,
    used: AtomicU64,
}

impl Blob {
    pub(super) fn new(
        layout: Arc<Layout>,
        namespace: Option<Namespace>,
        file: Arc<dyn File>,
        clock: Arc<AtomicU64>,
    ) -> io::Result<Self> {
        let geometry = layout.geometry();
        let mapping = file.map(layout.length())?;
        let used = AtomicU64::new(clock.load(Relaxed));
        let [pieces, seen, taken, passed] = [(); 4].map(|()| PieceMap::none(geometry));
        let (whole, gone) = (AtomicBool::new(false), AtomicBool::new(false));
        let record = Mutex::new(None);
        Ok(Self { layout, namespace, file, mapping, pieces, seen, taken, passed, record, whole, gone, clock, used })
    }

    /// Its name.
    pub fn digest(&self) -> &Digest {
        self.layout.digest()
    }

    /// Where its pieces are and what proves them.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// What it was downloaded under; none for uploads.
    pub fn namespace(&self) -> Option<&Namespace> {
        self.namespace.as_ref()
    }

    /// Which pieces may be read and served.
    pub fn pieces(&self) -> &PieceMap {
        &self.pieces
    }

    /// Whether it is durable under its name. All pieces may be here a little earlier.
    pub fn is_whole(&self) -> bool {
        self.whole.load(Acquire)
    }

    /// Whether it was deleted: nothing new may be written to it; what it has can still be read.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Acquire)
    }

    /// The bytes of a range of complete pieces, for the kernel alone to read (see [`Mapping::bytes`]). None where a piece
    /// lacks or was not checked yet, where the disk does not map, or the range is not within the blob; [`super::Store::read`]
    /// gives the same bytes then. May touch the disk when sent: ask [`Self::resident`] first.
    pub fn slice(&self, range: Range<u64>) -> Option<Bytes> {
        if range.start > range.end || range.end > self.layout.length() || !self.seen.covers(range.clone()) {
            return None;
        }
        self.touch();
        match &self.mapping {
            _ if range.is_empty() => Some(Bytes::new()),
            Some(mapping) => Some(Arc::clone(mapping).bytes(range)),
            None => None,
        }
    }

    /// The file behind a range of complete pieces, for the kernel to send from: the bytes of [`Self::slice`] without the copy into the
    /// socket's buffers. None where that has none, or where the disk cannot.
    pub fn stretch(&self, range: Range<u64>) -> Option<Stretch> {
        let mapping = self.mapping.as_ref()?;
        self.file.descriptor()?;
        if range.is_empty() || range.end > self.layout.length() || !self.seen.covers(range.clone()) {
            return None;
        }
        self.touch();
        Some(Stretch { file: Arc::clone(&self.file), mapping: Arc::clone(mapping), range })
    }

    /// Whether [`Self::slice`] of this range has bytes that wait for no disk.
    pub fn resident(&self, range: Range<u64>) -> bool {
        range.start <= range.end
            && range.end <= self.layout.length()
            && self.seen.covers(range.clone())
            && (range.is_empty()
                || self.mapping.as_ref().is_some_and(|mapping| {
                    self.file.resident(range.clone()).unwrap_or_else(|| mapping.resident(range))
                }))
    }

    /// Notes that it is in use, for the order of eviction.
    pub fn touch(&self) {
        self.used.store(self.clock.load(Relaxed), Relaxed);
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    pub(super) fn note_used(&self, used: u64) {
        self.used.store(used, Relaxed);
    }

    /// A piece from an earlier life, as its record has it.
    pub(super) fn recovered(&self, piece: PieceIndex) {
        self.taken.set(piece);
        self.pieces.set(piece);
    }

    /// A piece that this process wrote or read and checked.
    pub(super) fn checked(&self, piece: PieceIndex) {
        self.taken.set(piece);
        self.seen.set(piece);
        self.pieces.set(piece);
    }

    pub(super) fn record(&self) -> Option<Arc<dyn File>> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_record(&self, record: Option<Arc<dyn File>>) {
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
    }

    pub(super) fn set_whole(&self) {
        self.set_record(None);
        self.whole.store(true, Release);
    }

    pub(super) fn set_gone(&self) {
        self.gone.store(true, Release);
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, all) = (self.pieces.count(), self.layout.geometry().pieces());
        write!(f, "Blob({:?}, {count}/{all}{})", self.digest(), if self.is_whole() { ", whole" } else { "" })
    }
}
