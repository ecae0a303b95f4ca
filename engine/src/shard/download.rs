//! A download as a shard holds it: the swarm's state, who waits for it, who reads it.

use super::command::{Answer, Extent, Reply};
use crate::{
    handle::{Class, Error, Peer},
    kept::Kept,
};
use bytes::Bytes;
use peer_proto::{
    Instant, Layout, Namespace, PieceIndex,
    swarm::{self, ReaderId, Swarm},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Weak},
    time::Duration,
};

/// Callers waiting for one download's end at most.
pub(super) const WAITERS_MAX: usize = 4096;
/// How long a download of ranges goes on when they are here and nobody reads any more: the next range is often soon asked for, and
/// finds its peers connected.
pub(super) const RANGES_LINGER: Duration = Duration::from_secs(30);
/// Readers of one download at most.
pub(super) const READERS_MAX: usize = 1024;

/// One download.
pub(super) struct Download {
    pub(super) namespace: Namespace,
    pub(super) layout: Arc<Layout>,
    pub(super) class: Class,
    /// What the swarm is made for, until there is one.
    pub(super) extent: Extent,
    /// None until space is reserved.
    pub(super) swarm: Option<Swarm>,
    /// Who waits for that.
    pub(super) beginners: Vec<Reply<()>>,
    /// Nodes named before that.
    pub(super) named: Vec<Peer>,
    /// Who waits for the end.
    pub(super) waiters: Vec<Reply<()>>,
    pub(super) readers: BTreeMap<ReaderId, Reader>,
    /// Pieces that came before those readers got to them.
    pub(super) kept: Arc<Kept>,
    /// Shards that serve it too.
    pub(super) watchers: BTreeSet<usize>,
    /// Whether two peers have failed one piece, so that the layout is in doubt.
    pub(super) suspect: bool,
    /// Pieces in a row that could not be stored.
    pub(super) failures: u8,
    /// When something was last to be done for it, where only ranges are wanted.
    pub(super) busy: Instant,
    /// When its progress was last told.
    pub(super) told: Instant,
    pub(super) alarm: Option<Instant>,
    pub(super) dirty: bool,
}

/// One reader, as far as it concerns the shard: what it waits for.
pub(super) struct Reader {
    pub(super) alive: Weak<()>,
    /// The piece it waited for last, or began at.
    pub(super) head: u32,
    pub(super) wait: Option<Wait>,
}

/// A reader waiting for a piece.
pub(super) struct Wait {
    pub(super) piece: u32,
    /// Whether every other piece must be here too.
    pub(super) all: bool,
    pub(super) since: Instant,
    pub(super) patience: Duration,
    pub(super) reply: Reply<Option<Bytes>>,
}

impl Download {
    pub(super) fn new(namespace: Namespace, layout: Arc<Layout>, class: Class, extent: Extent) -> Self {
        Self {
            namespace,
            layout,
            class,
            extent,
            swarm: None,
            beginners: Vec::new(),
            named: Vec::new(),
            waiters: Vec::new(),
            readers: BTreeMap::new(),
            kept: Arc::default(),
            watchers: BTreeSet::new(),
            suspect: false,
            failures: 0,
            busy: Instant::ZERO,
            told: Instant::ZERO,
            alarm: None,
            dirty: false,
        }
    }

    /// Whether a reader may have what it waits for.
    pub(super) fn has(&self, piece: u32, all: bool) -> bool {
        let piece = self.layout.geometry().piece(piece);
        let Some((swarm, piece)) = self.swarm.as_ref().zip(piece) else { return false };
        swarm.have().contains(piece) && (!all || swarm.is_complete())
    }

    /// Answers readers that wait for what has come. `fresh` are the bytes of the piece that came just now.
    pub(super) fn feed(&mut self, fresh: Option<(PieceIndex, &Bytes)>) -> Vec<Answer> {
        let mut ready = Vec::new();
        for (id, reader) in &self.readers {
            if reader.wait.as_ref().is_some_and(|wait| self.has(wait.piece, wait.all)) {
                ready.push(*id);
            }
        }
        if let Some((piece, bytes)) = fresh {
            let waited_for = |reader: &Reader| reader.wait.as_ref().is_some_and(|wait| wait.piece == piece.get());
            let ahead = self.readers.values().any(|reader| reader.head <= piece.get());
            if ahead && !self.readers.values().any(waited_for) {
                self.kept.put(piece.get(), bytes.clone());
            }
        }
        let waits = ready.into_iter().filter_map(|id| self.readers.get_mut(&id)?.wait.take());
        waits
            .map(|wait| {
                let bytes = fresh.filter(|(piece, _)| piece.get() == wait.piece).map(|(_, bytes)| bytes.clone());
                Answer::Bytes(wait.reply, Ok(bytes))
            })
            .collect()
    }

    /// Answers readers whose patience is over, and forgets those that are gone.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Answer> {
        let mut answers = Vec::new();
        let digest = *self.layout.digest();
        for reader in self.readers.values_mut() {
            if let Some(wait) = reader.wait.take_if(|wait| wait.since + wait.patience <= now) {
                answers.push(Answer::Bytes(wait.reply, Err(Error::Stalled { digest, waited: wait.patience })));
            }
        }
        answers
    }

    /// Forgets readers that were dropped.
    pub(super) fn prune(&mut self, now: Instant) {
        let gone: Vec<ReaderId> =
            self.readers.iter().filter(|(_, reader)| reader.alive.strong_count() == 0).map(|(id, _)| *id).collect();
        for id in gone {
            self.readers.remove(&id);
            if self.readers.is_empty() {
                self.kept.clear();
            }
            if let Some(swarm) = &mut self.swarm {
                swarm.handle(now, swarm::Event::ReaderGone { id });
            }
        }
    }

    /// When something is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let waits = self.readers.values().filter_map(|reader| reader.wait.as_ref());
        let patience = waits.map(|wait| wait.since + wait.patience).min();
        let ranges = self.swarm.as_ref().filter(|swarm| !swarm.is_whole());
        let over = ranges.map(|_| self.busy + RANGES_LINGER);
        self.swarm.as_ref().and_then(Swarm::deadline).into_iter().chain(patience).chain(over).min()
    }

    /// Whether there has been nothing to do for it for long enough.
    pub(super) fn is_over(&mut self, now: Instant) -> bool {
        let idle =
            self.readers.is_empty() && self.waiters.is_empty() && self.swarm.as_ref().is_some_and(Swarm::is_idle);
        if !idle {
            self.busy = now;
        }
        idle && now.since(self.busy) >= RANGES_LINGER
    }

    /// Everybody who waits gets this error.
    pub(super) fn give_up(self, error: &Error) -> Vec<Answer> {
        let waiters = self.beginners.into_iter().chain(self.waiters);
        let mut answers: Vec<Answer> = waiters.map(|reply| Answer::Unit(reply, Err(again(error)))).collect();
        let waits = self.readers.into_values().filter_map(|reader| reader.wait);
        answers.extend(waits.map(|wait| Answer::Bytes(wait.reply, Err(again(error)))));
        answers
    }
}

/// The same error for another who waits.
pub(super) fn again(error: &Error) -> Error {
    match error {
        Error::NotFound(digest) => Error::NotFound(*digest),
        Error::NoSpace(bytes) => Error::NoSpace(*bytes),
        Error::Stopped(digest) => Error::Stopped(*digest),
        Error::Suspect(digest) => Error::Suspect(*digest),
        Error::Busy(what) => Error::Busy(what),
        Error::Closed => Error::Closed,
        Error::Disk(e) => Error::Disk(
            e.raw_os_error().map_or_else(|| io::Error::new(e.kind(), e.to_string()), io::Error::from_raw_os_error),
        ),
        other => Error::Disk(io::Error::other(other.to_string())),
    }
}
