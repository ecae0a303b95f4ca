//! What a node tells its trackers, and when.
//!
//! One request carries every blob whose state the tracker does not know yet or which wants peers; the rest is refreshed by the
//! mere arrival of the request. A download is announced at once when it first wants peers (within [`GATHER`] of the last request, so
//! that the layers of an image go together), its end within [`SOON`], all else at the interval that the tracker tells. A tracker that does not know the node, for it
//! has restarted, answers `resend`, and the next request carries everything: so it is rebuilt by the next announces.
//!
//! Blobs are shared out among trackers by the ring. A tracker that fails is tried again with growing waits, and after two failures
//! in a row its blobs go to the next one on the ring until it answers again.

mod codec;

pub use codec::{BLOBS_MAX, BODY_MAX, DecodeError, PEERS_PER_BLOB_MAX, ZONE_LEN_MAX};

use crate::{
    id::{Digest, PeerId},
    ring::{Health, Ring},
    rng::Rng,
    swarm::Candidate,
    time::Instant,
};
use alloc::{
    boxed::Box,
    collections::{BTreeMap, VecDeque},
    vec::Vec,
};
use core::{net::SocketAddr, time::Duration};

/// Shortest time from a request to one with new downloads: the first goes at once, those that come with it go together.
pub const GATHER: Duration = Duration::from_millis(1);
/// Wait before a finished or dropped download is announced.
pub const SOON: Duration = Duration::from_secs(1);
/// Shortest and longest interval that is taken from a tracker.
pub const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// See [`INTERVAL_MIN`].
pub const INTERVAL_MAX: Duration = Duration::from_secs(60);
/// Wait after a first failure, doubling up to [`RETRY_MAX`].
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Most blobs a node announces; further ones are not.
pub const ACTIVE_MAX: usize = 16 * BLOBS_MAX;

/// The node that announces.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Its name.
    pub id: PeerId,
    /// Where peers reach it.
    pub addr: SocketAddr,
    /// Its zone, at most [`ZONE_LEN_MAX`] bytes; empty where zones do not matter.
    pub zone: Box<str>,
    /// Whether it is an origin.
    pub origin: bool,
}

/// One blob's state at the node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Being downloaded.
    Leeching {
        /// Pieces here.
        have: u32,
        /// Pieces in all.
        pieces: u32,
        /// Peers connected.
        peers: u16,
        /// Further peers that could be used.
        want: u16,
    },
    /// Whole.
    Seeding {
        /// Peers connected that do not have it all.
        peers: u16,
    },
    /// Not here any more, or not to be had.
    Gone,
}

/// A line of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Blob {
    /// Which blob.
    pub digest: Digest,
    /// How it stands.
    pub state: State,
}

impl Blob {
    /// Whether peers are wanted for it.
    fn wants(&self) -> bool {
        matches!(self.state, State::Leeching { want: 1.., .. })
    }
}

/// What a node tells a tracker. Encoded by [`Request::encode`]; see [`codec`] for the bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// Who.
    pub node: Node,
    /// The tracker should forget what it knew of this node: this request and those after it tell everything.
    pub full: bool,
    /// At most [`BLOBS_MAX`].
    pub blobs: Vec<Blob>,
}

/// What a tracker answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Response {
    /// When to announce next.
    pub interval: Duration,
    /// The tracker does not know the node: the next request should be full.
    pub resend: bool,
    /// Peers by blob, for those that wanted some.
    pub blobs: Vec<(Digest, Vec<Candidate>)>,
}

/// A tracker, by its place in [`Announcer::trackers`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct TrackerId(pub u16);

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A blob's state changed.
    Blob(Blob),
    /// A tracker answered.
    Answered {
        /// Which.
        tracker: TrackerId,
        /// What.
        response: &'a Response,
    },
    /// A request failed.
    Failed {
        /// Whose.
        tracker: TrackerId,
    },
    /// The time of [`Announcer::deadline`] came.
    Tick,
}

/// What to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Send a request; then tell [`Event::Answered`] or [`Event::Failed`]. One at a time to each tracker.
    Send {
        /// To whom.
        tracker: TrackerId,
        /// What.
        request: Request,
    },
    /// A download's new candidates.
    Candidates {
        /// The blob.
        digest: Digest,
        /// At most [`PEERS_PER_BLOB_MAX`].
        peers: Vec<Candidate>,
    },
}

/// A node's announce schedule.
pub struct Announcer {
    node: Node,
    ring: Ring,
    rng: Rng,
    trackers: Vec<Tracker>,
    blobs: BTreeMap<Digest, Entry>,
    effects: VecDeque<Effect>,
}

struct Tracker {
    label: Box<str>,
    health: Health,
    /// A request is on its way.
    asked: bool,
    /// The next request is to carry everything.
    full: bool,
    failures: u8,
    /// Blobs that are announced to it.
    blobs: usize,
    next: Instant,
    /// When the last request left.
    sent: Option<Instant>,
    /// News that do not wait for `next`.
    urgent: Option<Instant>,
}

impl Tracker {
    /// When it is to be asked: none while there is nothing to tell. One that is down is asked whether it is back.
    fn due(&self, any_blobs: bool) -> Option<Instant> {
        let work = self.blobs > 0 || (any_blobs && !self.health.is_up());
        let urgent = self.urgent.filter(|_| self.failures == 0);
        (work && !self.asked).then(|| urgent.map_or(self.next, |urgent| urgent.min(self.next)))
    }
}

/// All that is kept of a blob that is announced, beside a tree's slack of at most as much again.
const _: () = assert!(size_of::<(Digest, Entry)>() <= 96);

struct Entry {
    state: State,
    tracker: TrackerId,
    /// The tracker does not know this state.
    news: bool,
    /// It has wanted peers since its download began.
    wanted: bool,
}

impl Announcer {
    /// A schedule with nothing to announce. Trackers are the ring's nodes.
    pub fn new(node: Node, trackers: Ring, seed: u64) -> Self {
        let of = |label: &str| Tracker {
            label: label.into(),
            health: Health::new(2, 1),
            asked: false,
            full: true,
            failures: 0,
            blobs: 0,
            next: Instant::ZERO,
            sent: None,
            urgent: None,
        };
        Self {
            node,
            trackers: trackers.labels().map(of).collect(),
            ring: trackers,
            rng: Rng::new(seed),
            blobs: BTreeMap::new(),
            effects: VecDeque::new(),
        }
    }

    /// Labels of the trackers; a [`TrackerId`] is a place in it.
    pub fn trackers(&self) -> impl ExactSizeIterator<Item = &str> {
        self.trackers.iter().map(|tracker| &*tracker.label)
    }

    /// The tracker's label.
    pub fn label(&self, tracker: TrackerId) -> Option<&str> {
        self.trackers.get(usize::from(tracker.0)).map(|tracker| &*tracker.label)
    }

    /// Blobs announced.
    pub fn active(&self) -> usize {
        self.blobs.len()
    }

    /// The next thing to do, until there is none.
    pub fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Event::Tick`] is due: none while there is nothing to tell.
    pub fn deadline(&self) -> Option<Instant> {
        self.trackers.iter().filter_map(|tracker| tracker.due(!self.blobs.is_empty())).min()
    }

    /// Takes an event in.
    pub fn handle(&mut self, now: Instant, event: Event<'_>) {
        match event {
            Event::Blob(blob) => self.update(now, blob),
            Event::Answered { tracker, response } => self.answered(now, tracker, response),
            Event::Failed { tracker } => self.failed(now, tracker),
            Event::Tick => {}
        }
        self.flush(now);
    }

    fn ids(&self) -> impl Iterator<Item = TrackerId> + use<> {
        (0..u16::try_from(self.trackers.len()).unwrap_or(u16::MAX)).map(TrackerId)
    }

    fn tracker(&mut self, id: TrackerId) -> Option<&mut Tracker> {
        self.trackers.get_mut(usize::from(id.0))
    }

    fn owner(&self, digest: &Digest) -> Option<TrackerId> {
        let owner = *self.ring.owners(digest, 1).first()?;
        self.ids().zip(&self.trackers).find(|(_, tracker)| *tracker.label == *owner).map(|(id, _)| id)
    }

    fn update(&mut self, now: Instant, blob: Blob) {
        let full = self.blobs.len() >= ACTIVE_MAX;
        let wait = match self.blobs.get_mut(&blob.digest) {
            Some(entry) => {
                let wait = match (entry.state, blob.state) {
                    // One of ranges wants nobody before its reader has come.
                    _ if blob.wants() && !entry.wanted => Some(GATHER),
                    (State::Leeching { .. }, State::Leeching { .. })
                    | (State::Seeding { .. }, State::Seeding { .. }) => None,
                    _ => Some(SOON),
                };
                entry.news |= entry.state != blob.state;
                entry.state = blob.state;
                entry.wanted = blob.wants() || (entry.wanted && matches!(blob.state, State::Leeching { .. }));
                wait
            }
            None if blob.state == State::Gone || full => return,
            None => {
                let Some(tracker) = self.owner(&blob.digest) else { return };
                let wanted = blob.wants();
                self.blobs.insert(blob.digest, Entry { state: blob.state, tracker, news: true, wanted });
                let tracker = &mut self.trackers[usize::from(tracker.0)];
                tracker.blobs += 1;
                if tracker.blobs == 1 && tracker.failures == 0 && tracker.health.is_up() {
                    // It had nothing to be told: no interval runs, and the first request waits for company.
                    tracker.next = now + SOON;
                }
                Some(if wanted { GATHER } else { SOON })
            }
        };
        let (Some(wait), Some(entry)) = (wait, self.blobs.get(&blob.digest)) else { return };
        // The end of a download comes to a whole cluster at once; spread it.
        let spread = if wait == SOON { self.rng.below(nanos(SOON) / 2) } else { 0 };
        let (at, id) = (now + (wait - Duration::from_nanos(spread)), entry.tracker);
        if let Some(tracker) = self.tracker(id) {
            let at = if wait == GATHER { tracker.sent.map_or(now, |sent| now.max(sent + GATHER)) } else { at };
            tracker.urgent = Some(tracker.urgent.map_or(at, |other| other.min(at)));
        }
    }

    /// Sends what is due.
    fn flush(&mut self, now: Instant) {
        for id in self.ids() {
            let any = !self.blobs.is_empty();
            let tracker = &mut self.trackers[usize::from(id.0)];
            if tracker.due(any).is_none_or(|due| due > now) {
                continue;
            }
            let full = core::mem::take(&mut tracker.full);
            tracker.asked = true;
            tracker.sent = Some(now);
            tracker.urgent = None;
            let mut blobs = Vec::new();
            for (digest, entry) in self.blobs.iter_mut().filter(|(_, entry)| entry.tracker == id) {
                entry.news |= full;
                let blob = Blob { digest: *digest, state: entry.state };
                if !entry.news && !blob.wants() {
                    continue;
                }
                if blobs.len() == BLOBS_MAX {
                    tracker.urgent = Some(now);
                    break;
                }
                entry.news = false;
                blobs.push(blob);
            }
            let before = self.blobs.len();
            self.blobs.retain(|_, entry| entry.tracker != id || entry.state != State::Gone || entry.news);
            tracker.blobs -= before - self.blobs.len();
            self.effects
                .push_back(Effect::Send { tracker: id, request: Request { node: self.node.clone(), full, blobs } });
        }
    }

    fn answered(&mut self, now: Instant, id: TrackerId, response: &Response) {
        let Some(tracker) = self.tracker(id).filter(|tracker| tracker.asked) else { return };
        tracker.asked = false;
        tracker.failures = 0;
        tracker.full |= response.resend;
        let back = tracker.health.saw(true).is_some();
        let full = tracker.full;
        if back {
            self.share_out(id, true);
        }
        let wait = response.interval.clamp(INTERVAL_MIN, INTERVAL_MAX);
        let early = self.rng.below(nanos(wait) / 8);
        let wait = if full || back { GATHER } else { wait - Duration::from_nanos(early) };
        if let Some(tracker) = self.tracker(id) {
            tracker.next = now + wait;
        }
        for (digest, peers) in &response.blobs {
            let leeching = self.blobs.get(digest).is_some_and(|entry| matches!(entry.state, State::Leeching { .. }));
            if leeching && !peers.is_empty() {
                self.effects.push_back(Effect::Candidates { digest: *digest, peers: peers.clone() });
            }
        }
    }

    fn failed(&mut self, now: Instant, id: TrackerId) {
        let Some(tracker) = self.tracker(id).filter(|tracker| tracker.asked) else { return };
        tracker.asked = false;
        tracker.full = true;
        let wait = (RETRY_FIRST * 2u32.pow(u32::from(tracker.failures.min(8)))).min(RETRY_MAX);
        tracker.failures = tracker.failures.saturating_add(1);
        let down = tracker.health.saw(false).is_some();
        let early = self.rng.below(nanos(wait) / 4);
        if let Some(tracker) = self.tracker(id) {
            tracker.next = now + (wait - Duration::from_nanos(early));
        }
        if down {
            self.share_out(id, false);
            // Whoever took over hears of it at once.
            for tracker in self.trackers.iter_mut().filter(|tracker| tracker.health.is_up()) {
                tracker.next = tracker.next.min(now + GATHER);
            }
        }
    }

    /// A tracker came or went: every blob goes to whom the ring says now.
    fn share_out(&mut self, id: TrackerId, up: bool) {
        let Some(label) = self.label(id).map(Box::<str>::from) else { return };
        self.ring.set_up(&label, up);
        let digests: Vec<Digest> = self.blobs.keys().copied().collect();
        for digest in digests {
            let owner = self.owner(&digest);
            if let (Some(owner), Some(entry)) = (owner, self.blobs.get_mut(&digest))
                && entry.tracker != owner
            {
                self.trackers[usize::from(entry.tracker.0)].blobs -= 1;
                self.trackers[usize::from(owner.0)].blobs += 1;
                entry.tracker = owner;
                entry.news = true;
            }
        }
    }
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
