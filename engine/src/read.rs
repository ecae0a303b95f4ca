//! Reading a whole blob in order: pieces from the disk through pooled buffers, the next one on its way while one is used.
//!
//! Not from the mapping where the bytes go to code that looks at them: a load from a mapping whose disk fails ends the process. A
//! reader who passes them to a socket says so, and then what is in memory is neither copied nor read again.

use crate::{
    handle::Error,
    store::{Blob, ReadError},
    workers::{Lane, Workers},
};
use bytes::Bytes;
use peer_proto::Digest;
use std::{collections::VecDeque, ops::Range, sync::Arc};
use tokio::sync::oneshot;

/// Reads under way or waiting to be taken, one reader's.
const AHEAD: usize = 2;
/// Bytes read at once while pooled buffers are scarce, and nothing is then read ahead: whoever reads slowly holds what was read
/// for it, and there may be thousands.
const SCARCE_LEN: u64 = 128 << 10;

/// As much of a range as is read at once.
pub(crate) fn step(range: Range<u64>, scarce: bool) -> Range<u64> {
    let len = if scarce { SCARCE_LEN } else { u64::MAX };
    range.start..range.end.min(range.start.saturating_add(len))
}

/// A reader of a range of a whole blob.
pub(crate) struct Whole {
    workers: Arc<Workers>,
    blob: Arc<Blob>,
    /// What no read was started for.
    rest: Range<u64>,
    ahead: VecDeque<oneshot::Receiver<Result<Bytes, ReadError>>>,
    /// Whether nobody but the kernel looks at the bytes.
    unseen: bool,
}

impl Whole {
    /// A reader of `range`, which is within the blob.
    pub(crate) fn new(workers: Arc<Workers>, blob: Arc<Blob>, range: Range<u64>) -> Self {
        Self { workers, blob, rest: range, ahead: VecDeque::new(), unseen: false }
    }

    pub(crate) fn unseen(&mut self) {
        self.unseen = true;
    }

    pub(crate) async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        if self.unseen && self.ahead.is_empty() && !self.rest.is_empty() {
            let range = self.piece();
            if let Some(bytes) = mapped(&self.blob, range.clone()) {
                self.rest.start = range.end;
                return Some(Ok(bytes));
            }
        }
        loop {
            let scarce = self.workers.is_scarce();
            if self.ahead.len() >= if scarce { 1 } else { AHEAD } || self.rest.is_empty() {
                break;
            }
            match self.start(scarce) {
                Ok(read) => self.ahead.push_back(read),
                // What is under way will do for now.
                Err(Error::Busy(_)) if !self.ahead.is_empty() => break,
                Err(e) => return Some(Err(e)),
            }
        }
        let read = self.ahead.front_mut()?.await;
        self.ahead.pop_front();
        let bytes = read.map_err(|_| Error::Closed).and_then(|read| read.map_err(|e| error(*self.blob.digest(), e)));
        if bytes.is_err() {
            self.ahead.clear();
            self.rest = 0..0;
        }
        Some(bytes)
    }

    /// What is left of the next piece.
    fn piece(&self) -> Range<u64> {
        let geometry = self.blob.layout().geometry();
        let piece_end = geometry.piece_at(self.rest.start).map_or(self.rest.end, |piece| geometry.range(piece).end);
        self.rest.start..self.rest.end.min(piece_end)
    }

    fn start(&mut self, scarce: bool) -> Result<oneshot::Receiver<Result<Bytes, ReadError>>, Error> {
        let range = step(self.piece(), scarce);
        let blob = Arc::clone(&self.blob);
        let part = range.clone();
        let read = self.workers.start_call(Lane::Disk, move |store| store.read_or_allocate(&blob, part))?;
        self.rest.start = range.end;
        Ok(read)
    }
}

fn error(digest: Digest, e: ReadError) -> Error {
    match e {
        ReadError::Damaged { reason, .. } => Error::Damaged { digest, reason },
        ReadError::Busy => Error::Busy("buffer pool"),
        ReadError::Range | ReadError::Absent(_) => Error::NotFound(digest),
    }
}

/// A checked range that is in memory, for the kernel alone to look at.
pub(crate) fn mapped(blob: &Blob, range: Range<u64>) -> Option<Bytes> {
    if blob.resident(range.clone()) { blob.slice(range) } else { None }
}

/// Bytes within one piece of a blob that is partly here.
pub(crate) async fn part(workers: &Workers, blob: &Arc<Blob>, range: Range<u64>) -> Result<Bytes, Error> {
    let own = Arc::clone(blob);
    let read = workers.call(move |store| store.read_or_allocate(&own, range)).await?;
    read.map_err(|e| error(*blob.digest(), e))
}
