//! The inventory of whole blobs across restarts: a snapshot that makes the first second cheap, and the scan that keeps it
//! honest. Neither is the truth: that is the directory tree, and whoever asks for a blob asks the tree, until the scan has seen all
//! of it.
//!
//! The snapshot, file `index`, little endian:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `SIDX` |
//! | 4..8 | version 1, zero, zero, zero |
//! | 8..16 | length of the archive |
//! | 16..20 | CRC-32 of the archive |
//! | 20..24 | CRC-32 of the 20 bytes before |
//! | 24..32 | zero, so that the archive is aligned |
//! | then | an rkyv archive of a vector of [`Record`], in digest order |
//!
//! Written by us, checked before it is looked at, made anew where it does not hold; a change of [`Record`] takes a new version.

use super::{
    ALGORITHMS, Error, Store,
    files::{cache_dir, digest_of},
    life::State,
    record::{seal, unseal},
    table::Entry,
};
use crate::disk::Space;
use peer_proto::{Algorithm, Digest};
use rkyv::{rancor, util::AlignedVec};
use std::{collections::HashSet, io, sync::PoisonError};

/// Directories that the scan goes through one at a time: `00` to `ff` for each algorithm.
const STEPS: usize = 256 * ALGORITHMS.len();
const HEADER: usize = 32;
/// Bytes written at once.
const CHUNK: usize = 1 << 20;

#[derive(rkyv::Archive, rkyv::Serialize)]
struct Record {
    /// 0 sha256, 1 sha512.
    algorithm: u8,
    /// The digest, padded with zeroes.
    value: [u8; 64],
    length: u64,
    /// When it was last used, seconds since 1970.
    used: u64,
}

/// How far the inventory can be trusted.
#[derive(Default)]
pub(super) struct Inventory {
    /// Steps of the scan that are done.
    steps: usize,
    /// A snapshot was there, so that only what changed since it was written may be amiss.
    snapshot: bool,
}

impl Store {
    /// Writes the snapshot. Worth doing now and then and at the end.
    pub fn save_index(&self) -> io::Result<()> {
        let (records, changes) = {
            let table = self.table();
            let whole = table.entries().filter(|(_, entry)| entry.state == State::Whole);
            let records: Vec<Record> = whole.map(|(digest, entry)| Record::new(digest, &entry)).collect();
            (records, table.changes)
        };
        let archive = rkyv::to_bytes::<rancor::Error>(&records).map_err(io::Error::other)?;
        drop(records);
        let mut header = Vec::with_capacity(HEADER);
        header.extend(*b"SIDX\x01\0\0\0");
        header.extend((archive.len() as u64).to_le_bytes());
        header.extend(crc32fast::hash(&archive).to_le_bytes());
        let mut header = seal(header);
        header.resize(HEADER, 0);

        match self.disk.remove("index.new") {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        let file = self.disk.create("index.new", Space::None)?;
        file.write_at(0, &header)?;
        for (i, chunk) in archive.chunks(CHUNK).enumerate() {
            file.write_at((HEADER + i * CHUNK) as u64, chunk)?;
        }
        file.sync()?;
        self.disk.replace("index.new", "index")?;
        let mut table = self.table();
        table.changes = table.changes.saturating_sub(changes);
        Ok(())
    }

    /// Whether blobs came or went since the snapshot was written.
    pub fn index_is_stale(&self) -> bool {
        self.table().changes > 0
    }

    /// Reads the snapshot, where there is one that holds.
    pub(super) fn load_index(&self) -> io::Result<()> {
        let Some(archive) = self.read_archive()? else { return Ok(()) };
        // The checksum held, so these are bytes we wrote; the check that follows is against our own mistakes.
        let Ok(records) = rkyv::access::<rkyv::Archived<Vec<Record>>, rancor::Error>(&archive) else { return Ok(()) };
        self.table().enter_all(records.iter().filter_map(ArchivedRecord::entry));
        self.inventory.lock().unwrap_or_else(PoisonError::into_inner).snapshot = true;
        Ok(())
    }

    fn read_archive(&self) -> io::Result<Option<AlignedVec>> {
        let file = match self.disk.open("index") {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let mut header = [0; HEADER];
        let has = file.len()?;
        if has < HEADER as u64 {
            return Ok(None);
        }
        file.read_at(0, &mut header)?;
        let Some(fields) = unseal(&header[..24]).and_then(|header| header.strip_prefix(b"SIDX\x01\0\0\0")) else {
            return Ok(None);
        };
        let (Some((len, crc)), true) = (fields.split_first_chunk(), fields.len() == 12) else { return Ok(None) };
        let len = u64::from_le_bytes(*len);
        let Some(len_here) = usize::try_from(len).ok().filter(|_| has == HEADER as u64 + len) else { return Ok(None) };
        let mut archive = AlignedVec::with_capacity(len_here);
        archive.resize(len_here, 0);
        file.read_at(HEADER as u64, &mut archive)?;
        Ok((crc32fast::hash(&archive).to_le_bytes() == crc).then_some(archive))
    }

    /// Whether every blob on disk is known, but for what changed after the last snapshot when the process was killed.
    pub fn is_inventoried(&self) -> bool {
        let inventory = self.inventory.lock().unwrap_or_else(PoisonError::into_inner);
        inventory.snapshot || inventory.steps == STEPS
    }

    /// Whether a blob is certainly not here, not even in part: the scan has been through and nobody has brought it since. No disk is
    /// asked, so any thread may call it; false also of what only the disk can tell.
    pub fn knows_absent(&self, digest: &Digest) -> bool {
        // A scan that is under way holds this for long.
        let scanned = self.inventory.try_lock().is_ok_and(|inventory| inventory.steps == STEPS);
        scanned && self.table().knows_nothing_of(digest)
    }

    /// Compares the next of the 512 directories with what is known: names are listed, no blob is opened. False once all are
    /// done.
    pub fn scan(&self) -> Result<bool, Error> {
        let mut inventory = self.inventory.lock().unwrap_or_else(PoisonError::into_inner);
        if inventory.steps == STEPS {
            return Ok(false);
        }
        #[expect(clippy::cast_possible_truncation, reason = "less than 256")]
        let (algorithm, first) = (ALGORITHMS[inventory.steps / 256], (inventory.steps % 256) as u8);
        self.scan_dir(algorithm, first)?;
        inventory.steps += 1;
        Ok(inventory.steps < STEPS)
    }

    fn scan_dir(&self, algorithm: Algorithm, first: u8) -> Result<(), Error> {
        let known: HashSet<Digest> = {
            let [from, to] = [0, 255].map(|fill| {
                let mut value = [fill; 64];
                value[0] = first;
                Digest::from_bytes(algorithm, &value[..algorithm.digest_len()])
            });
            let (Some(from), Some(to)) = (from, to) else { return Ok(()) };
            let table = self.table();
            table.range(from..=to).filter(|(_, e)| e.state == State::Whole).map(|(digest, _)| *digest).collect()
        };
        let mut found = HashSet::new();
        let root = format!("{}/cache/{first:02x}", algorithm.name());
        for inner in self.list_dir(&root)? {
            for blob in self.list_dir(&format!("{root}/{}", inner.name))? {
                found.extend(digest_of(algorithm, &blob.name));
            }
        }
        for digest in found.difference(&known) {
            let _claim = self.claim(digest);
            if self.table().state(digest) == State::Absent
                && let Some(meta) = self.disk.stat(&format!("{}/data", cache_dir(digest)))?
            {
                let entry = Entry { state: State::Whole, length: meta.len, used: meta.modified.as_secs() };
                self.table().enter(digest, entry);
            }
        }
        for digest in known.difference(&found) {
            let _claim = self.claim(digest);
            if self.table().state(digest) == State::Whole
                && self.disk.stat(&format!("{}/data", cache_dir(digest)))?.is_none()
            {
                self.close_gone(digest);
                self.table().forget(digest);
            }
        }
        Ok(())
    }

    fn list_dir(&self, path: &str) -> io::Result<Vec<crate::disk::Listed>> {
        match self.disk.list(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            other => other,
        }
    }
}

impl Record {
    fn new(digest: &Digest, entry: &Entry) -> Self {
        let mut value = [0; 64];
        value[..digest.as_bytes().len()].copy_from_slice(digest.as_bytes());
        let algorithm = u8::from(digest.algorithm() == Algorithm::Sha512);
        Self { algorithm, value, length: entry.length, used: entry.used }
    }
}

impl ArchivedRecord {
    fn entry(&self) -> Option<(Digest, Entry)> {
        let algorithm = *ALGORITHMS.get(usize::from(self.algorithm))?;
        let digest = Digest::from_bytes(algorithm, &self.value[..algorithm.digest_len()])?;
        Some((digest, Entry { state: State::Whole, length: self.length.to_native(), used: self.used.to_native() }))
    }
}
