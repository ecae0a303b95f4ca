//! Bytes out of a blob by way of a buffer, and what happens when they are wrong.

use super::{
    Blob, Claim, Error, QUARANTINE_MAX, ReadError, Store,
    files::{cache_dir, partial_dir},
};
use crate::{
    buf::Buf,
    disk::{DIRECT_ALIGN, Space},
};
use bytes::Bytes;
use std::{io, ops::Range, sync::atomic::Ordering::Relaxed};

impl Store {
    /// Bytes within one piece that is here, for a peer. What an earlier process left is checked first, and every whole piece each time.
    ///
    /// A whole piece that is wanted for the first time is read past the page cache: most are wanted once while a blob is cold,
    /// by the one peer that passes it on, and fresh pages, with the copy out of them, cost more CPU than the read.
    pub fn read(&self, blob: &Blob, range: Range<u64>) -> Result<Bytes, ReadError> {
        self.read_into(blob, range, |len| self.pool.take(len).map(Room::Pooled), Way::PastCacheOnce)
    }

    /// As [`Self::read`], with memory of its own where the pool has little left: for readers, who keep what they get for as long
    /// as they like, while what peers send needs the pool.
    pub fn read_or_allocate(&self, blob: &Blob, range: Range<u64>) -> Result<Bytes, ReadError> {
        self.read_into(
            blob,
            range,
            |len| {
                let pooled = if self.pool.is_scarce() { None } else { self.pool.take(len) };
                Some(pooled.map_or_else(|| Room::Own(vec![0; len]), Room::Pooled))
            },
            Way::Cached,
        )
    }

    fn read_into(
        &self,
        blob: &Blob,
        range: Range<u64>,
        room: impl FnOnce(usize) -> Option<Room>,
        way: Way,
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
        let all = range == whole;
        let check = all || !blob.seen.has(piece);
        let from = if check { whole } else { range.clone() };
        let len = usize::try_from(from.end - from.start).map_err(|_| ReadError::Range)?;
        let mut room = room(len.next_multiple_of(DIRECT_ALIGN)).ok_or(ReadError::Busy)?;
        let direct = all && way == Way::PastCacheOnce && blob.passed.set(piece);
        let read = match direct.then(|| blob.file.read_direct(from.start, room.as_mut())).flatten() {
            Some(Ok(got)) if got < len => Err(io::ErrorKind::UnexpectedEof.into()),
            Some(result) => result.map(drop),
            None => blob.file.read_at(from.start, &mut room.as_mut()[..len]),
        };
        let result = read.map_err(|e| {
            self.counters.disk_errors.add(1);
            e.to_string()
        });
        let result = result.and_then(|()| match check {
            true => blob.layout.check_crc(piece, &room.as_mut()[..len]).map_err(|e| e.to_string()),
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
        // A small part does not keep all that was read to check it.
        if within.len() <= len / 2 { Ok(Bytes::copy_from_slice(&bytes[within])) } else { Ok(bytes.slice(within)) }
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

    /// Moves a blob's files aside for somebody to look at, and forgets the blob.
    pub(super) fn quarantine(&self, claim: &Claim<'_>, dir: &str, reason: &str) -> Result<(), Error> {
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
}

/// How bytes come from the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Through the page cache.
    Cached,
    /// Past it the first time.
    PastCacheOnce,
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
