//! Serving: which piece goes next, from memory or from disk, within the bandwidth there is.

use super::{Core, Pending, READS_MAX, link::Link};
use crate::{
    driver::{Body, SocketId, Token},
    job::Job,
    limit,
    serve::Next,
    store,
};
use bytes::Bytes;
use peer_proto::{
    PieceIndex, conn,
    swarm::{Class, SendOnce},
    wire::{Channel, Rejection},
};

impl Core {
    /// Makes the connection's next piece ready, where there is one and its turn has come. Whether it did.
    pub(super) fn serve(&mut self, link: &mut Link) -> bool {
        if link.serve.is_ready() {
            return false;
        }
        let mut skip = 0;
        while let Some(Next { at, channel, piece, class, fetched }) = link.serve.next(skip) {
            let shared = link.lanes.get(&channel).and_then(|lane| self.blobs.get(&lane.digest));
            let Some(blob) = shared.map(|shared| shared.blob.clone()).filter(|blob| blob.pieces().has(piece)) else {
                self.reject(link, channel, piece, Rejection::Missing);
                continue;
            };
            if let Err(until) = limit::take([self.setup.meters.outward_of(class)], self.now, 0) {
                // Its class's limit holds up no other class.
                link.held = Some(link.held.map_or(until, |held| held.min(until)));
                skip = at + 1;
                continue;
            }
            let range = blob.layout().geometry().range(piece);
            let hot = || {
                let stretch = || blob.stretch(range.clone()).map(Body::File);
                let mapped = || blob.slice(range.clone()).map(Body::Memory);
                if blob.resident(range.clone()) { stretch().or_else(mapped) } else { None }
            };
            let cold = fetched.is_some();
            let Some(body) = fetched.cloned().map(Body::Memory).or_else(hot) else {
                if !link.serve.may_read() {
                    return false;
                }
                if self.reads >= READS_MAX {
                    self.read_queue.insert(link.id);
                    return false;
                }
                let job = Job::Read { blob, range };
                self.reads += 1;
                let token = self.submit(Pending::Read(link.id), job);
                link.serve.reading(at, token);
                skip = at;
                continue;
            };
            if !self.take_bandwidth(link, class, body.len() as u64) {
                return false;
            }
            let stats = &self.setup.stats;
            if cold { &stats.pieces_cold } else { &stats.pieces_hot }.add(1);
            link.serve.ready(at, body);
            link.conn.handle(self.now, conn::Event::Ready { channel, piece });
            return true;
        }
        false
    }

    /// Whether this node is an origin that would rather send another piece than this one again.
    pub(super) fn sent_of_late(&mut self, link: &Link, channel: Channel, piece: PieceIndex) -> bool {
        let shared = link.lanes.get(&channel).and_then(|lane| self.blobs.get_mut(&lane.digest));
        let Some(shared) = shared.filter(|_| self.setup.origin) else { return false };
        let once = shared.once.get_or_insert_with(|| SendOnce::new(&shared.blob.layout().geometry()));
        !once.allows(self.now, piece, link.zone, shared.lanes.len())
    }

    pub(super) fn reject(&mut self, link: &mut Link, channel: Channel, piece: PieceIndex, reason: Rejection) {
        self.setup.stats.rejects.add(1);
        link.serve.remove(channel, piece);
        link.conn.handle(self.now, conn::Event::Reject { channel, piece, reason });
    }

    pub(super) fn fetched(&mut self, token: Token, socket: SocketId, result: Result<Bytes, store::ReadError>) {
        self.reads -= 1;
        self.with_link(socket, |core, link| {
            let failed = result.as_ref().err().map(|error| {
                tracing::warn!(%error, "a piece could not be read to be served");
                if matches!(error, store::ReadError::Busy) { Rejection::Busy } else { Rejection::Failed }
            });
            if let Some((channel, piece)) = link.serve.fetched(token, result.ok()) {
                core.reject(link, channel, piece, failed.unwrap_or(Rejection::Failed));
            }
        });
        self.touch(socket);
        while let Some(next) = self.read_queue.pop_first() {
            self.touch(next);
        }
    }

    /// Bandwidth for one piece, in turn between connections.
    pub(super) fn take_bandwidth(&mut self, link: &mut Link, class: Class, bytes: u64) -> bool {
        let granted = std::mem::take(&mut link.granted);
        let meter = link.meter.clone();
        let own = meter.as_ref().and_then(|meter| meter.outward.as_ref());
        // Its own limit holds up nobody else: it does not stand in the queue meanwhile.
        if let Err(at) = limit::take([own], self.now, 0) {
            link.held = Some(at);
            return false;
        }
        if !granted && !self.out_queue.is_empty() {
            if !link.queued {
                link.queued = true;
                self.out_queue.push_back(link.id);
            }
            return false;
        }
        let meters = self.setup.meters.clone();
        match limit::take([meters.outward.as_ref(), own, meters.outward_of(class)], self.now, bytes) {
            Ok(()) => true,
            Err(at) => {
                link.queued = true;
                self.out_queue.push_front(link.id);
                self.out_alarm = Some(at);
                false
            }
        }
    }

    /// Lets those who wait for bandwidth to send have what there is.
    pub(super) fn grant_out(&mut self) {
        while self.out_alarm.is_none_or(|at| at <= self.now)
            && let Some(id) = self.out_queue.pop_front()
        {
            self.out_alarm = None;
            if let Some(link) = self.links.get_mut(&id) {
                link.queued = false;
                link.granted = true;
                self.touch(id);
                self.settle();
            }
        }
        if self.out_queue.is_empty() {
            self.out_alarm = None;
        }
    }
}
