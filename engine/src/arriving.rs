//! Reading a blob in order while it arrives: a piece that comes just now is handed over in the buffer it was received in, one
//! that is here already is read from disk by a worker.

use crate::{handle::Error, kept::Kept, read, shard::read::Reading, shards::Shards, store::Blob, workers::Workers};
use bytes::Bytes;
use peer_proto::swarm::ReaderId;
use std::{ops::Range, sync::Arc, time::Duration};

/// The longest wait for one piece unless another is set.
const PATIENCE: Duration = Duration::from_secs(300);

/// A reader of a range of a blob that may still be arriving.
pub(crate) struct Arriving {
    shards: Arc<Shards>,
    workers: Arc<Workers>,
    blob: Arc<Blob>,
    id: ReaderId,
    kept: Arc<Kept>,
    /// The shard forgets the reader when this is dropped.
    _alive: Arc<()>,
    rest: Range<u64>,
    /// Whether the whole blob is read, so that its last piece waits for all others.
    whole: bool,
    patience: Duration,
    /// Whether nobody but the kernel looks at the bytes.
    unseen: bool,
}

impl Arriving {
    pub(crate) fn new(
        shards: Arc<Shards>,
        workers: Arc<Workers>,
        reading: Reading,
        alive: Arc<()>,
        range: Range<u64>,
    ) -> Self {
        let Reading { id, blob, kept } = reading;
        let whole = range == (0..blob.layout().length());
        Self { shards, workers, blob, id, kept, _alive: alive, rest: range, whole, patience: PATIENCE, unseen: false }
    }

    pub(crate) fn patience(&mut self, wait: Duration) {
        self.patience = wait;
    }

    pub(crate) fn unseen(&mut self) {
        self.unseen = true;
    }

    pub(crate) async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        if self.rest.is_empty() {
            return None;
        }
        let bytes = self.step().await;
        if bytes.is_err() {
            self.rest = 0..0;
        }
        Some(bytes)
    }

    async fn step(&mut self) -> Result<Bytes, Error> {
        let geometry = self.blob.layout().geometry();
        let piece = geometry.piece_at(self.rest.start).ok_or_else(|| Error::Range(geometry.length()))?;
        let bounds = geometry.range(piece);
        let range = self.rest.start..self.rest.end.min(bounds.end);
        let all = self.whole && bounds.end == geometry.length();
        let pieces = self.blob.pieces();
        let here = if all { pieces.is_full() } else { pieces.has(piece) };
        let fresh = if here { None } else { self.await_piece(piece.get(), all).await? };
        let bytes = match fresh.or_else(|| self.kept.take(piece.get())) {
            Some(bytes) => {
                let within = |offset: u64| usize::try_from(offset - bounds.start).unwrap_or(usize::MAX);
                bytes.slice(within(range.start)..within(range.end))
            }
            None => match self.unseen.then(|| read::mapped(&self.blob, range.clone())).flatten() {
                Some(bytes) => bytes,
                None => {
                    let range = read::step(range, self.workers.is_scarce());
                    read::part(&self.workers, &self.blob, range).await?
                }
            },
        };
        self.rest.start += bytes.len() as u64;
        Ok(bytes)
    }

    async fn await_piece(&mut self, piece: u32, all: bool) -> Result<Option<Bytes>, Error> {
        let digest = *self.blob.digest();
        let result = self.shards.await_piece(digest, self.id, piece, all, self.patience).await;
        if !matches!(result, Err(Error::Stopped(_) | Error::NotFound(_))) {
            return result;
        }
        // The download has ended; perhaps because the blob became whole by another way.
        let blob = self.workers.call(move |store| store.blob(&digest)).await??;
        match blob.filter(|blob| blob.is_whole()) {
            Some(blob) => {
                self.blob = blob;
                Ok(None)
            }
            None => result,
        }
    }
}
