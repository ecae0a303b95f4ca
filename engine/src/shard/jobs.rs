//! What workers do for a shard, and what becomes of a piece that came.

use super::{Core, Pending, STARVED_RETRY, STORE_FAILURES_MAX, command::Message, link::Link};
use crate::{
    driver::{Effect, Token},
    handle::Error,
    job::{Job, Outcome, Piece, Stored},
    store::{self, Blob, PieceError},
};
use bytes::Bytes;
use peer_proto::{
    Digest, PieceIndex,
    swarm::{self, Slot, Verdict},
    wire::Channel,
};
use std::{io, sync::Arc};

impl Core {
    /// A piece is in its buffer: a worker proves and writes it.
    pub(super) fn arrived(&mut self, link: &mut Link, channel: Channel, piece: PieceIndex) {
        let Some(buf) = link.arrived.take() else { return };
        let Some(lane) = link.lanes.get(&channel) else { return };
        let (slot, digest) = (lane.slot, lane.digest);
        let Some(shared) = self.blobs.get(&digest).filter(|_| self.downloads.contains_key(&digest)) else { return };
        let job = Job::Piece(Piece { blob: shared.blob.clone(), piece, buf });
        self.submit(Pending::Piece { digest, slot, piece }, job);
    }

    pub(super) fn submit(&mut self, pending: Pending, job: Job) -> Token {
        let token = Token(self.next_number());
        self.jobs.insert(token, pending);
        if self.held.is_empty() {
            self.effects.push_back(Effect::Job { token, job });
        } else {
            self.held.push_back((token, job));
        }
        token
    }

    pub(super) fn starve(&mut self) {
        if self.starved_alarm.is_none() {
            self.starved_alarm = Some(self.now + STARVED_RETRY);
        }
    }

    /// Something may have become free: jobs first, then those who wait to receive.
    pub(super) fn retry_starved(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.effects.extend(held.into_iter().map(|(token, job)| Effect::Job { token, job }));
        for id in std::mem::take(&mut self.starved) {
            self.touch(id);
        }
    }

    pub(super) fn done(&mut self, token: Token, outcome: Outcome) {
        let Some(pending) = self.jobs.remove(&token) else { return };
        match (pending, outcome) {
            (Pending::Open(digest), Outcome::Opened(result)) => self.looked_up(digest, result),
            (Pending::Begin(digest), Outcome::Begun(result)) => self.begun(digest, result),
            (Pending::Piece { digest, slot, .. }, Outcome::Piece { piece, result }) => {
                self.judged(digest, slot, piece, result);
            }
            (Pending::Finish(digest), Outcome::Finished(result)) => self.finished(digest, result),
            (Pending::Read(socket), Outcome::Read(result)) => self.fetched(token, socket, result),
            (pending, outcome) => self.panicked(token, pending, &outcome),
        }
        if !self.held.is_empty() || !self.starved.is_empty() {
            self.retry_starved();
        }
    }

    /// A bug in a worker: what asked for the job fails, and nothing else.
    pub(super) fn panicked(&mut self, token: Token, pending: Pending, outcome: &Outcome) {
        tracing::error!(?pending, ?outcome, "a job came to no outcome of its kind");
        let error = || io::Error::other("internal error");
        match pending {
            Pending::Open(digest) => self.looked_up(digest, Err(store::Error::Disk(error()))),
            Pending::Begin(digest) | Pending::Finish(digest) => self.fail(&digest, &Error::Disk(error())),
            Pending::Piece { digest, slot, piece } => self.judged(digest, slot, piece, Err(PieceError::Disk(error()))),
            Pending::Read(socket) => self.fetched(token, socket, Err(store::ReadError::Busy)),
        }
    }

    pub(super) fn looked_up(&mut self, digest: Digest, result: Result<Option<Arc<Blob>>, store::Error>) {
        match result {
            Ok(Some(blob)) => self.share(blob),
            Ok(None) => {}
            Err(error) => tracing::warn!(%digest, %error, "a blob that a peer wants could not be looked up"),
        }
        // A download that has just begun answers when it knows.
        if self.blobs.contains_key(&digest) || !self.downloads.contains_key(&digest) {
            self.answer_offers(&digest);
            self.forget_unused(&digest);
        }
    }

    /// What became of a piece that came.
    pub(super) fn judged(&mut self, digest: Digest, slot: Slot, piece: PieceIndex, result: Result<Stored, PieceError>) {
        let stats = &self.setup.stats;
        let Some(download) = self.downloads.get_mut(&digest) else { return };
        let Some(swarm) = &mut download.swarm else { return };
        let mut fresh = None;
        let event = match result {
            Ok(Stored { bytes, fresh: first }) => {
                stats.pieces_in.add(1);
                let stored = first || self.blobs.get(&digest).is_some_and(|shared| shared.blob.pieces().has(piece));
                if stored {
                    download.failures = 0;
                    fresh = Some(bytes);
                    swarm::Event::Arrived { slot, piece, verdict: Verdict::Good }
                } else {
                    // Its twin is on its way to the disk and settles the matter.
                    swarm::Event::Rejected { slot, piece, reason: swarm::Reject::Busy }
                }
            }
            Err(PieceError::Proof(error)) => {
                stats.pieces_wrong.add(1);
                tracing::warn!(%digest, %error, "a peer sent a wrong piece");
                swarm::Event::Arrived { slot, piece, verdict: Verdict::Wrong }
            }
            // Overtaken by an upload, in which case the store has the whole blob for us; or deleted, and the store says so.
            Err(PieceError::Gone) => {
                if let Some(shared) = self.blobs.get(&digest) {
                    let job = Job::Finish { blob: shared.blob.clone() };
                    self.submit(Pending::Finish(digest), job);
                    return;
                }
                return self.fail(&digest, &Error::Stopped(digest));
            }
            Err(PieceError::Disk(error)) => {
                stats.pieces_unstored.add(1);
                tracing::error!(%digest, %error, "a piece could not be stored");
                download.failures += 1;
                if download.failures >= STORE_FAILURES_MAX {
                    let full = crate::disk::is_full(&error);
                    let error = if full { Error::NoSpace(download.layout.length()) } else { Error::Disk(error) };
                    return self.fail(&digest, &error);
                }
                swarm::Event::Arrived { slot, piece, verdict: Verdict::Storage }
            }
        };
        swarm.handle(self.now, event);
        if let Some(bytes) = fresh {
            self.pass_on(digest, piece, &bytes);
        }
        self.touch_download(digest);
    }

    /// A piece that is here came neither from a peer nor for one of our requests.
    pub(super) fn supplied(&mut self, digest: Digest, piece: PieceIndex, bytes: &Bytes) {
        let event = swarm::Event::Supplied { piece };
        if self.downloads.get(&digest).is_some_and(|download| download.swarm.is_some()) {
            self.tell_swarm(&digest, Some(event));
            self.pass_on(digest, piece, bytes);
        }
    }

    /// Readers get a piece that has just come, and everybody is told of it.
    fn pass_on(&mut self, digest: Digest, piece: PieceIndex, bytes: &Bytes) {
        let Some(download) = self.downloads.get_mut(&digest) else { return };
        // Readers keep buffers for as long as they like: with few left they get the bytes from the file instead.
        let bytes = (!self.setup.pool.is_scarce()).then_some(bytes);
        self.effects.extend(download.feed(bytes.map(|bytes| (piece, bytes))).into_iter().map(Effect::Answer));
        for shard in download.watchers.clone() {
            self.effects.push_back(Effect::Tell { to: shard, message: Message::Progress { digest } });
        }
        self.announce(&digest);
    }
}
