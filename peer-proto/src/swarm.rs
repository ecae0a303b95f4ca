//! One blob's download: which peers to have, and which piece to ask of whom.
//!
//! - **Choice of piece.** The rarest among the connected peers, ties at random, within a window drawn for each request. Without a
//!   reader the window is the whole blob. With readers it starts at the first missing piece of one of them and its length is
//!   `lo × (pieces ÷ lo)^(u³)`, *u* uniform: mostly short, now and then the whole rest, the more often the less is left, so that
//!   readers are served in order, the swarm keeps its diversity, and the last pieces are well spread when everybody comes to them. A few
//!   requests take that first missing piece itself; half of those to origins do; and the first request after a reader came, so that it need
//!   not wait for what it did not ask for.
//! - **Ranges only.** A download that was begun for readers of ranges asks for nothing else, until more than a
//!   [`WHOLE_SHARE`]th of the blob is here or was asked for, or somebody wants all of it.
//! - **Choice of peer.** The one with the fewest requests outstanding that has something wanted; origins after agents.
//! - **Origins** are asked for what no connected agent has, each for its own stripe of the blob, so that a piece leaves them about once;
//!   for anything at all only while fewer than half of the requests allowed are outstanding. An origin that has just sent a
//!   piece to another says so ([`SendOnce`]), and is not asked for it again for a second.
//! - **Bounds.** Outstanding requests in all are capped at little more than one a peer, since deep queues at uplinks make the
//!   tail of a swarm; a lone source gets them all. Tables are bounded by [`PEERS_MAX`], [`CANDIDATES_MAX`], [`READERS_MAX`].
//! - **Endgame.** Once every missing piece is asked for, slow ones are asked of a second peer too, and the loser is cancelled. A
//!   piece that a reader stands at is treated so at any time. Otherwise no piece is asked of two peers at once.
//! - **Wrong pieces.** The sender rests until another peer's copy is proven (then it is banned) or fails as well (then the layout is
//!   suspect).
//! - **Sources that go** are dialled again after [`RETRY_FIRST`], doubling to [`RETRY_MAX`]; origins and the last source for ever.
//!
//! Work per message does not grow with the number of pieces beyond a pass over the words of a bit set, 64 pieces each.

mod availability;
mod once;

pub use once::{SENT_HOLD, SendOnce};

use crate::{
    fixed,
    id::PeerId,
    layout::{Geometry, PieceIndex},
    pieces::PieceSet,
    rng::Rng,
    time::Instant,
};
use alloc::{collections::VecDeque, vec::Vec};
use availability::{Availability, Pick, Stripe};
use core::{net::SocketAddr, ops::Range, time::Duration};

/// Most peers connected for one blob; further ones are dropped.
pub const PEERS_MAX: usize = 64;
/// Most candidates remembered.
pub const CANDIDATES_MAX: usize = 64;
/// Most readers whose order is heeded; further ones wait for pieces as they come.
pub const READERS_MAX: usize = 64;
/// A download of ranges becomes one of the whole blob once more than one piece in so many is here or was asked for.
pub const WHOLE_SHARE: u32 = 4;
/// Agents, and origins, aimed at for a download of ranges: a few pieces are soon here, and each connection costs both ends.
pub const RANGES_DEGREE: u16 = 4;
/// A blob has one more request outstanding for each so many pieces; see [`Config::in_flight_max`].
pub const IN_FLIGHT_PIECES: u32 = 256;
/// Most outstanding requests at one peer.
pub const WINDOW_MAX: u16 = 16;
/// Wait before a lost source is dialled again, the first time.
pub const RETRY_FIRST: Duration = Duration::from_millis(250);
/// Longest wait between dials of an origin or of one of the last sources.
pub const RETRY_MAX: Duration = Duration::from_secs(5);
/// Failed dials after which an agent is forgotten, where there are other sources.
const FAILS_MAX: u8 = 6;
/// Longest silence of a peer that owes pieces before they are asked elsewhere, and the shortest.
const SILENCE_MAX: Duration = Duration::from_secs(15);
const SILENCE_MIN: Duration = Duration::from_secs(1);
/// Silence allowed before anything is known about the network.
const SILENCE_FIRST: Duration = Duration::from_secs(4);
/// Silences in a row after which a peer is dropped.
const SILENCES_MAX: u8 = 3;
/// Least age of a request before its piece is asked of a second peer.
const HEDGE_MIN: Duration = Duration::from_millis(20);
/// The same before anything is known about the network.
const HEDGE_FIRST: Duration = Duration::from_millis(500);
/// Most peers asked for one piece at a time.
const COPIES_MAX: usize = 2;
/// How long the sender of a wrong piece rests while no other copy settles the matter.
const SUSPENSE: Duration = Duration::from_secs(1);
/// Unsettled wrong pieces after which their sender is banned all the same.
const STRIKES_MAX: u8 = 3;
/// How long an origin stays banned; an agent stays for good.
const ORIGIN_BAN: Duration = Duration::from_secs(30);
/// Rest of a peer that answered that it is busy.
const BUSY_REST: Duration = Duration::from_millis(50);
/// Pause of all requests after the disk failed, the first time and the longest.
const STORAGE_PAUSE: Duration = Duration::from_millis(250);
const STORAGE_PAUSE_MAX: Duration = Duration::from_secs(4);
/// A peer slower than the mean by this factor gets one request at a time.
const SLOW_FACTOR: u64 = 4;

/// How a download behaves. The defaults are what the model says is best.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// This node's name: settles which of two crossing connections stays.
    pub id: PeerId,
    /// For random choices.
    pub seed: u64,
    /// Agents aimed at. Origins come on top, as many: were they counted, those that have one would have fewer links to pass its pieces on.
    pub degree: u16,
    /// Agents connected beyond which those that come by themselves are turned away, at most [`PEERS_MAX`].
    pub accept_max: u16,
    /// Outstanding requests at one peer, where there are enough of them.
    pub per_peer: u16,
    /// Outstanding requests in all, in a short blob. More make queues at uplinks, and all is asked for before a second neighbour can have
    /// it; with fewer the throughput of a whole swarm comes and goes in waves.
    pub in_flight_min: u16,
    /// The same in a long blob, which has enough pieces to keep links busy that many requests share; one more for each
    /// [`IN_FLIGHT_PIECES`] pieces on the way there.
    pub in_flight_max: u16,
    /// The same in bytes; two pieces are always allowed.
    pub in_flight_bytes_max: u64,
    /// Shortest window of a request where there are readers, in pieces.
    pub window_min: u32,
    /// How strongly such windows tend to be short: the exponent of *u*. 0 is always the whole blob.
    pub window_exponent: u8,
    /// The same for requests to origins, which are best used to bring in what nobody has.
    pub origin_exponent: u8,
    /// Percent of the requests that look at a reader's first missing piece before the window: rarest-first would take what everybody
    /// waits for last, since it is what most have.
    pub head_percent: u8,
    /// The same for requests to origins: what readers wait for first leaves them first.
    pub origin_head_percent: u8,
}

impl Config {
    /// The defaults for a node of this name.
    pub const fn new(id: PeerId, seed: u64) -> Self {
        Self {
            id,
            seed,
            degree: 10,
            accept_max: 14,
            per_peer: 2,
            in_flight_min: 12,
            in_flight_max: 16,
            in_flight_bytes_max: 128 << 20,
            window_min: 40,
            window_exponent: 3,
            origin_exponent: 3,
            head_percent: 5,
            origin_head_percent: 50,
        }
    }
}

/// The caller's name for a connected peer's channel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(pub u32);

/// The caller's name for a reader.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ReaderId(pub u64);

/// A node that may have the blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Its name.
    pub id: PeerId,
    /// Where to dial.
    pub addr: SocketAddr,
    /// Whether it is an origin.
    pub origin: bool,
}

/// What a peer has when it connects.
#[derive(Clone, Copy, Debug)]
pub enum Has<'a> {
    /// Every piece.
    All,
    /// No piece.
    None,
    /// These.
    Some(&'a PieceSet),
}

/// What became of a piece's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Proven and stored.
    Good,
    /// Not the piece.
    Wrong,
    /// Could not be stored: no peer's fault.
    Storage,
}

/// Why a peer does not send a piece.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reject {
    /// It does not have it, or not any more.
    Missing,
    /// Its queue is full.
    Busy,
    /// An origin has just sent it to another, from whom it will spread.
    Elsewhere,
}

/// How urgent the download is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Class {
    /// Nobody waits: a quarter of the requests in flight.
    Background,
    /// A client waits.
    Foreground,
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A tracker named these.
    Candidates(&'a [Candidate]),
    /// A dial asked for by [`Effect::Connect`] came to nothing, or the peer refused the blob.
    Failed {
        /// Whom.
        id: PeerId,
    },
    /// A peer's channel for this blob is open.
    Connected {
        /// The caller's name for it.
        slot: Slot,
        /// The peer.
        id: PeerId,
        /// Whether it is an origin.
        origin: bool,
        /// Whether this node opened the channel.
        dialed: bool,
        /// What it has.
        has: Has<'a>,
    },
    /// The peer has one more piece.
    Have {
        /// Who.
        slot: Slot,
        /// Which.
        piece: PieceIndex,
    },
    /// The peer has everything.
    HaveAll {
        /// Who.
        slot: Slot,
    },
    /// The channel or its connection closed.
    Gone {
        /// Whose.
        slot: Slot,
    },
    /// A piece's bytes came and were judged.
    Arrived {
        /// From whom.
        slot: Slot,
        /// Which.
        piece: PieceIndex,
        /// The judgement.
        verdict: Verdict,
    },
    /// The peer will not answer this request.
    Rejected {
        /// Who.
        slot: Slot,
        /// Which.
        piece: PieceIndex,
        /// Why.
        reason: Reject,
    },
    /// A reader came or moved: it wants these pieces, the first one next.
    Reader {
        /// The caller's name for it.
        id: ReaderId,
        /// Rest of its range.
        pieces: Range32,
    },
    /// A reader is done or was dropped.
    ReaderGone {
        /// Whose name is free again.
        id: ReaderId,
    },
    /// All of the blob is wanted, whoever reads.
    Whole,
    /// A piece is here that no peer was asked for, or not for us: proven and stored.
    Supplied {
        /// Which.
        piece: PieceIndex,
    },
    /// The layout was confirmed by another origin: whoever failed under it is to blame.
    LayoutHolds,
    /// The download's urgency changed.
    Class(Class),
    /// The node's share of outstanding requests for this blob changed; see [`share`].
    Budget {
        /// Outstanding requests, at least 1; more than the configured maximum counts as that.
        in_flight: u16,
    },
    /// The time of [`Swarm::deadline`] came.
    Tick,
}

/// A half-open range of piece numbers, `Copy` where [`Range`] is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range32 {
    /// First piece.
    pub start: u32,
    /// One beyond the last.
    pub end: u32,
}

impl From<Range<u32>> for Range32 {
    fn from(range: Range<u32>) -> Self {
        Self { start: range.start, end: range.end }
    }
}

/// Why a peer is banned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BanReason {
    /// It sent wrong bytes for a piece that another peer had right.
    WrongPiece(PieceIndex),
    /// It sent wrong bytes again and again, though no other copy was to be had.
    WrongPieces,
}

/// What to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Open a channel to this node, over the connection there is or a new one; then tell [`Event::Connected`] or
    /// [`Event::Failed`].
    Connect(Candidate),
    /// Ask for a piece.
    Request {
        /// Whom.
        slot: Slot,
        /// Which.
        piece: PieceIndex,
    },
    /// Withdraw a request. Should the piece come all the same, [`Event::Arrived`] is still welcome.
    Cancel {
        /// At whom.
        slot: Slot,
        /// Which.
        piece: PieceIndex,
    },
    /// Close the channel; the peer is forgotten already.
    Drop {
        /// Whose.
        slot: Slot,
    },
    /// Close the connection and refuse the peer; it is forgotten already.
    Ban {
        /// Whose channel it was.
        slot: Slot,
        /// The peer.
        id: PeerId,
        /// What for.
        reason: BanReason,
    },
    /// Two independent peers failed one piece: compare the layout with another origin's, then tell [`Event::LayoutHolds`] or
    /// start again with the right one.
    SuspectLayout {
        /// The piece.
        piece: PieceIndex,
    },
    /// The number of further peers that could be used changed: for the next announce.
    WantPeers(u16),
    /// Every piece is here.
    Complete,
}

/// The outstanding requests that each of a node's `active` downloads may have: the node's downlink should hold little more than one
/// swarm's worth in all.
pub fn share(active: usize) -> u16 {
    const NODE_IN_FLIGHT: usize = 32;
    const LEAST: usize = 4;
    u16::try_from((NODE_IN_FLIGHT / active.max(1)).clamp(LEAST, usize::from(WINDOW_MAX))).unwrap_or(WINDOW_MAX)
}

/// Most channels that a whole blob is served on at an agent.
pub const SEED_CHANNELS_MAX: usize = 14;
/// The same at an origin: with more, each piece leaves it later than it could, and the swarm starts slower.
pub const ORIGIN_CHANNELS_MAX: usize = 16;

/// Whether a node that has the whole blob should take another channel for it, having `channels`.
pub fn admits_leecher(channels: usize, origin: bool) -> bool {
    channels < if origin { ORIGIN_CHANNELS_MAX } else { SEED_CHANNELS_MAX }
}

/// One blob's download.
pub struct Swarm {
    config: Config,
    rng: Rng,
    geometry: Geometry,
    class: Class,
    budget: u16,
    have: PieceSet,
    /// Missing, to be had, and asked of nobody.
    wanted: PieceSet,
    /// What readers have asked for, while nothing else is wanted; none where the whole blob is.
    ranges: Option<PieceSet>,
    availability: Availability,
    peers: Vec<Peer>,
    /// The peers' slots, in their order: what most messages are looked up by, in one cache line.
    slots: Vec<Slot>,
    flights: Vec<Flight>,
    known: Vec<Known>,
    readers: Vec<Reading>,
    /// Pieces whose wrong senders are not settled.
    suspects: Vec<Suspect>,
    latency: Latency,
    paused_until: Instant,
    storage_failures: u8,
    effects: VecDeque<Effect>,
    told_want: u16,
    complete_told: bool,
    deadline: Option<Instant>,
}

struct Peer {
    slot: Slot,
    id: PeerId,
    origin: bool,
    /// None: everything.
    has: Option<PieceSet>,
    in_flight: u16,
    /// Nothing of it is wanted, as of the last search.
    dry: bool,
    /// Not asked before then.
    rests_until: Instant,
    latency: Latency,
    /// The last piece, good or not; else the connection.
    heard: Instant,
    silences: u8,
    strikes: u8,
    /// Pieces not to be asked of it until a time, earliest first; see [`Reject::Elsewhere`].
    hidden: VecDeque<(Instant, PieceIndex)>,
    /// All pieces but those; none hidden where there is none.
    shown: Option<PieceSet>,
}

impl Peer {
    fn offers(&self, piece: PieceIndex) -> bool {
        [&self.has, &self.shown].into_iter().flatten().all(|set| set.contains(piece))
    }
}

struct Flight {
    piece: PieceIndex,
    slot: Slot,
    at: Instant,
}

struct Known {
    candidate: Candidate,
    state: Contact,
    fails: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Contact {
    /// May be dialled from then on.
    Idle(Instant),
    Dialing,
    Connected,
    Banned,
}

struct Reading {
    id: ReaderId,
    /// Starts at a piece that is missing, as far as known.
    left: Range<u32>,
    /// Whether that piece is still to be asked for, since the reader came.
    fresh: bool,
}

struct Suspect {
    piece: PieceIndex,
    id: PeerId,
}

/// A smoothed time from request to piece, in nanoseconds, and its mean deviation, as TCP keeps them.
#[derive(Clone, Copy, Default)]
struct Latency {
    mean: u64,
    deviation: u64,
}

impl Latency {
    fn sample(&mut self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        if self.mean == 0 {
            *self = Self { mean: took, deviation: took / 2 };
        } else {
            self.deviation = self.deviation - self.deviation / 4 + self.mean.abs_diff(took) / 4;
            self.mean = self.mean - self.mean / 8 + took / 8;
        }
    }

    /// Mean and some deviations, or nothing before the first sample.
    fn bound(&self, deviations: u64) -> Option<Duration> {
        (self.mean > 0)
            .then(|| Duration::from_nanos(self.mean.saturating_add(deviations.saturating_mul(self.deviation))))
    }
}

impl Swarm {
    /// A download of the pieces that `have` lacks.
    pub fn new(config: Config, geometry: Geometry, have: PieceSet, class: Class) -> Self {
        let mut wanted = PieceSet::full(&geometry);
        wanted.subtract(&have);
        let mut swarm = Self {
            config,
            rng: Rng::new(config.seed),
            geometry,
            class,
            budget: u16::MAX,
            have,
            wanted,
            ranges: None,
            availability: Availability::new(geometry.pieces()),
            peers: Vec::new(),
            slots: Vec::new(),
            flights: Vec::new(),
            known: Vec::new(),
            readers: Vec::new(),
            suspects: Vec::new(),
            latency: Latency::default(),
            paused_until: Instant::ZERO,
            storage_failures: 0,
            effects: VecDeque::new(),
            told_want: 0,
            complete_told: false,
            deadline: None,
        };
        swarm.restore(Instant::ZERO);
        swarm
    }

    /// A download of no more than what readers ask for, as the module's text has it.
    pub fn of_ranges(config: Config, geometry: Geometry, have: PieceSet, class: Class) -> Self {
        let mut swarm = Self::new(config, geometry, have, class);
        swarm.ranges = Some(PieceSet::new(&geometry));
        swarm.wanted.clear();
        swarm.effects.clear();
        swarm.told_want = 0;
        swarm.complete_told = false;
        swarm.restore(Instant::ZERO);
        swarm
    }

    /// Whether all of the blob is wanted.
    pub fn is_whole(&self) -> bool {
        self.ranges.is_none()
    }

    /// Whether nothing is to be had now: only ranges are wanted, and they are here.
    pub fn is_idle(&self) -> bool {
        self.ranges.is_some() && self.wanted.is_empty() && self.flights.is_empty()
    }

    /// Pieces here.
    pub fn have(&self) -> &PieceSet {
        &self.have
    }

    /// Peers connected for this blob.
    pub fn peers(&self) -> usize {
        self.peers.len()
    }

    /// Requests outstanding.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Further peers that could be used: for an announce.
    pub fn want(&self) -> u16 {
        if self.is_complete() || self.is_idle() { 0 } else { self.room_for(false) }
    }

    /// Agents or origins that may be dialled now.
    fn room_for(&self, origins: bool) -> u16 {
        let dialing = |known: &&Known| known.candidate.origin == origins && known.state == Contact::Dialing;
        let dialing = self.known.iter().filter(dialing).count();
        let busy = self.peers.iter().filter(|peer| peer.origin == origins).count() + dialing;
        let degree = if self.is_whole() { self.config.degree } else { self.config.degree.min(RANGES_DEGREE) };
        degree.saturating_sub(u16::try_from(busy).unwrap_or(u16::MAX))
    }

    /// Agents connected for this blob.
    fn agents(&self) -> usize {
        self.peers.iter().filter(|peer| !peer.origin).count()
    }

    /// Whether a channel opened by this peer should be taken.
    pub fn admits(&self, id: &PeerId) -> bool {
        let banned = self.known.iter().any(|known| known.candidate.id == *id && known.state == Contact::Banned);
        let room = self.agents() < usize::from(self.config.accept_max).min(PEERS_MAX);
        !banned && (room || self.peers.iter().any(|peer| peer.id == *id))
    }

    /// Whether every piece is here.
    pub fn is_complete(&self) -> bool {
        self.have.is_full()
    }

    /// The next thing to do, until there is none. To be drained after each [`Self::handle`].
    pub fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Event::Tick`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Takes an event in.
    pub fn handle(&mut self, now: Instant, event: Event<'_>) {
        match event {
            Event::Candidates(candidates) => candidates.iter().for_each(|c| self.learn(now, *c)),
            Event::Failed { id } => self.failed(now, &id),
            Event::Connected { slot, id, origin, dialed, has } => self.connected(now, slot, id, origin, dialed, has),
            Event::Have { slot, piece } => {
                if !self.peer_has(slot, piece) {
                    return;
                }
            }
            Event::HaveAll { slot } => self.peer_has_all(slot),
            Event::Gone { slot } => {
                if let Some(peer) = self.remove(slot) {
                    self.lost(now, &peer.id);
                }
            }
            Event::Arrived { slot, piece, verdict } => self.arrived(now, slot, piece, verdict),
            Event::Rejected { slot, piece, reason } => self.rejected(now, slot, piece, reason),
            Event::Reader { id, pieces } => self.reader(id, pieces.start..pieces.end),
            Event::ReaderGone { id } => self.reader_gone(id),
            Event::Whole => self.want_whole(),
            Event::Supplied { piece } => self.supplied(piece),
            Event::LayoutHolds => self.layout_holds(now),
            Event::Class(class) => self.class = class,
            Event::Budget { in_flight } => self.budget = in_flight.max(1),
            Event::Tick => self.tick(now),
        }
        self.restore(now);
    }

    /// After every event: dial, ask, tell, and set the alarm.
    fn restore(&mut self, now: Instant) {
        if self.is_complete() {
            if !self.complete_told {
                self.complete_told = true;
                self.effects.push_back(Effect::Complete);
            }
        } else if !self.is_idle() {
            self.dial(now);
            self.fill(now);
        }
        let want = self.want();
        if want != self.told_want {
            self.told_want = want;
            self.effects.push_back(Effect::WantPeers(want));
        }
        self.deadline = self.next_deadline(now);
    }

    // --- whom to know ---

    fn learn(&mut self, now: Instant, candidate: Candidate) {
        if candidate.id == self.config.id {
            return;
        }
        if let Some(known) = self.known.iter_mut().find(|known| known.candidate.id == candidate.id) {
            known.candidate = candidate;
            return;
        }
        if self.known.len() == CANDIDATES_MAX {
            let spare = |known: &Known| matches!(known.state, Contact::Idle(_)) && !known.candidate.origin;
            let worst =
                (0..self.known.len()).filter(|at| spare(&self.known[*at])).max_by_key(|at| self.known[*at].fails);
            let Some(worst) = worst else { return };
            self.known.remove(worst);
        }
        let connected = self.peers.iter().any(|peer| peer.id == candidate.id);
        let state = if connected { Contact::Connected } else { Contact::Idle(now) };
        self.known.push(Known { candidate, state, fails: 0 });
    }

    /// Dials until the degree is reached, those with fewest failures first, in the order they were named.
    fn dial(&mut self, now: Instant) {
        for origins in [true, false] {
            for _ in 0..self.room_for(origins) {
                let ready = |known: &&mut Known| {
                    known.candidate.origin == origins && matches!(known.state, Contact::Idle(from) if from <= now)
                };
                let Some(next) = self.known.iter_mut().filter(ready).min_by_key(|known| known.fails) else { break };
                next.state = Contact::Dialing;
                self.effects.push_back(Effect::Connect(next.candidate));
            }
        }
    }

    fn failed(&mut self, now: Instant, id: &PeerId) {
        if !self.peers.iter().any(|peer| peer.id == *id) {
            self.lost(now, id);
        }
    }

    /// A known source cannot be reached just now.
    fn lost(&mut self, now: Instant, id: &PeerId) {
        let Some(at) = self.known.iter().position(|known| known.candidate.id == *id) else { return };
        if self.known[at].state == Contact::Banned {
            return;
        }
        let known = &mut self.known[at];
        let wait = (RETRY_FIRST * 2u32.pow(u32::from(known.fails.min(8)))).min(RETRY_MAX);
        // Half of the wait is certain, half random, lest a whole swarm dials at once; the first is never longer than promised.
        let half = u64::try_from(wait.as_nanos() / 2).unwrap_or(0);
        known.state = Contact::Idle(now + wait / 2 + Duration::from_nanos(self.rng.below(half)));
        known.fails = known.fails.saturating_add(1);
        let hopeless = known.fails > FAILS_MAX && !known.candidate.origin;
        let others =
            self.known.iter().filter(|known| known.fails <= FAILS_MAX && known.state != Contact::Banned).count();
        if hopeless && others > 0 {
            self.known.swap_remove(at);
        }
    }

    fn connected(&mut self, now: Instant, slot: Slot, id: PeerId, origin: bool, dialed: bool, has: Has<'_>) {
        if let Some(twin) = self.peers.iter().find(|peer| peer.id == id) {
            // Two channels crossed: both ends keep the one that the lower name opened.
            let old = twin.slot;
            if old == slot || dialed != (self.config.id < id) {
                self.effects.extend((old != slot).then_some(Effect::Drop { slot }));
                return;
            }
            self.remove(old);
            self.effects.push_back(Effect::Drop { slot: old });
        }
        let room = self.peers.len() < PEERS_MAX && (dialed || self.admits(&id));
        let complete = self.is_complete();
        let known = self.known.iter_mut().find(|known| known.candidate.id == id);
        let banned = known.as_ref().is_some_and(|known| known.state == Contact::Banned);
        if banned || !room {
            // Once nothing is asked of anybody any more, who comes is served like at any seeder.
            self.effects.extend((banned || !complete).then_some(Effect::Drop { slot }));
            return;
        }
        if let Some(known) = known {
            known.state = Contact::Connected;
        }
        let has = match has {
            Has::All => None,
            Has::None => Some(PieceSet::new(&self.geometry)),
            Has::Some(set) if set.is_full() => None,
            Has::Some(set) => Some(set.clone()),
        };
        has.iter().for_each(|set| self.availability.add_all(set));
        self.slots.push(slot);
        self.peers.push(Peer {
            slot,
            id,
            origin,
            has,
            in_flight: 0,
            dry: false,
            rests_until: now,
            latency: Latency::default(),
            heard: now,
            silences: 0,
            strikes: 0,
            hidden: VecDeque::new(),
            shown: None,
        });
        self.restripe(origin);
    }

    /// Origins share the pieces out among them anew when one comes or goes.
    fn restripe(&mut self, origin: bool) {
        if origin {
            self.peers.iter_mut().filter(|peer| peer.origin).for_each(|peer| peer.dry = false);
        }
    }

    fn remove(&mut self, slot: Slot) -> Option<Peer> {
        let at = self.place(slot)?;
        let peer = self.peers.swap_remove(at);
        self.slots.swap_remove(at);
        peer.has.iter().for_each(|set| self.availability.remove_all(set));
        let (lost, kept) = core::mem::take(&mut self.flights).into_iter().partition(|flight| flight.slot == slot);
        self.flights = kept;
        let lost: Vec<Flight> = lost;
        lost.iter().for_each(|flight| self.release(flight.piece));
        // What this one alone had is an origin's to send again.
        self.restripe(true);
        Some(peer)
    }

    fn ban(&mut self, now: Instant, id: &PeerId, reason: BanReason) {
        let Some(slot) = self.peers.iter().find(|peer| peer.id == *id).map(|peer| peer.slot) else { return };
        let Some(peer) = self.remove(slot) else { return };
        if let Some(known) = self.known.iter_mut().find(|known| known.candidate.id == peer.id) {
            known.state = if peer.origin { Contact::Idle(now + ORIGIN_BAN) } else { Contact::Banned };
        }
        self.effects.push_back(Effect::Ban { slot, id: peer.id, reason });
    }

    // --- what they have ---

    fn place(&self, slot: Slot) -> Option<usize> {
        self.slots.iter().position(|other| *other == slot)
    }

    fn peer(&mut self, slot: Slot) -> Option<&mut Peer> {
        let at = self.place(slot)?;
        Some(&mut self.peers[at])
    }

    /// Whether it changes what can be asked for.
    fn peer_has(&mut self, slot: Slot, piece: PieceIndex) -> bool {
        let wanted = self.wanted.contains(piece) || self.wanted.is_empty();
        let Some(at) = self.place(slot) else { return false };
        let peer = &mut self.peers[at];
        if !peer.has.as_mut().is_some_and(|set| set.insert(piece)) {
            return false;
        }
        self.availability.add(piece);
        let woken = wanted && peer.dry;
        peer.dry &= !wanted;
        if peer.has.as_ref().is_some_and(PieceSet::is_full) {
            self.peer_has_all(slot);
        }
        woken
    }

    fn peer_has_all(&mut self, slot: Slot) {
        if let Some(peer) = self.peer(slot) {
            peer.dry = false;
            if let Some(set) = peer.has.take() {
                self.availability.remove_all(&set);
            }
        }
    }

    fn rejected(&mut self, now: Instant, slot: Slot, piece: PieceIndex, reason: Reject) {
        if let Some(at) = self.flights.iter().position(|flight| flight.slot == slot && flight.piece == piece) {
            self.land(at);
        }
        let Some(at) = self.place(slot) else { return };
        let peer = &mut self.peers[at];
        match reason {
            Reject::Busy => peer.rests_until = peer.rests_until.max(now + BUSY_REST),
            Reject::Elsewhere => {
                let shown = peer.shown.get_or_insert_with(|| PieceSet::full(&self.geometry));
                if shown.remove(piece) {
                    peer.hidden.push_back((now + SENT_HOLD, piece));
                }
            }
            Reject::Missing => {
                // A peer that had everything has a list from now on, and is counted.
                let set = peer.has.get_or_insert_with(|| {
                    let full = PieceSet::full(&self.geometry);
                    self.availability.add_all(&full);
                    full
                });
                if set.remove(piece) {
                    self.availability.remove(piece);
                }
            }
        }
    }

    // --- readers ---

    fn reader(&mut self, id: ReaderId, pieces: Range<u32>) {
        let left = pieces.start..pieces.end.min(self.geometry.pieces());
        if let Some(reading) = self.readers.iter_mut().find(|reading| reading.id == id) {
            (reading.left, reading.fresh) = (left.clone(), true);
        } else if self.readers.len() < READERS_MAX {
            self.readers.push(Reading { id, left: left.clone(), fresh: true });
        } else {
            // Nobody would ask for what this one waits for.
            self.want_whole();
        }
        let Some(ranges) = &mut self.ranges else { return };
        left.filter_map(|n| self.geometry.piece(n)).for_each(|piece| {
            ranges.insert(piece);
        });
        let mut known = ranges.clone();
        known.union(&self.have);
        if u64::from(known.count()) * u64::from(WHOLE_SHARE) > u64::from(self.geometry.pieces()) {
            self.want_whole();
        } else {
            self.rewant();
        }
    }

    fn reader_gone(&mut self, id: ReaderId) {
        self.readers.retain(|reading| reading.id != id);
        if !self.is_whole() {
            self.rewant();
        }
    }

    fn want_whole(&mut self) {
        if self.ranges.take().is_some() {
            self.rewant();
        }
    }

    /// What is wanted, anew: after a change of what is asked for.
    fn rewant(&mut self) {
        let mut wanted = if self.is_whole() {
            PieceSet::full(&self.geometry)
        } else {
            let mut wanted = PieceSet::new(&self.geometry);
            let asked = self.readers.iter().flat_map(|reading| reading.left.clone());
            asked.filter_map(|n| self.geometry.piece(n)).for_each(|piece| {
                wanted.insert(piece);
            });
            wanted
        };
        wanted.subtract(&self.have);
        self.flights.iter().for_each(|flight| {
            wanted.remove(flight.piece);
        });
        self.wanted = wanted;
        self.peers.iter_mut().for_each(|peer| peer.dry = false);
    }

    /// Whether a missing piece is to be had.
    fn is_asked_for(&self, piece: PieceIndex) -> bool {
        self.is_whole() || self.readers.iter().any(|reading| reading.left.contains(&piece.get()))
    }

    fn supplied(&mut self, piece: PieceIndex) {
        self.have.insert(piece);
        self.wanted.remove(piece);
        self.cancel_all(piece);
        self.advance_readers(piece);
    }

    /// Nobody need send a piece that is here.
    fn cancel_all(&mut self, piece: PieceIndex) {
        while let Some(at) = self.flights.iter().position(|flight| flight.piece == piece) {
            let flight = self.land(at);
            self.effects.push_back(Effect::Cancel { slot: flight.slot, piece });
        }
    }

    /// The first missing piece of a reader that came just now.
    fn fresh_head(&mut self) -> Option<PieceIndex> {
        self.readers.iter_mut().filter(|reading| reading.fresh).find_map(|reading| {
            let head = self.wanted.first_in(reading.left.clone());
            reading.fresh = head.is_some_and(|head| head.get() == reading.left.start);
            head.filter(|_| reading.fresh)
        })
    }

    /// Where the next request should look: from the first missing piece of a reader drawn at random.
    fn window(&mut self, origin: bool) -> Range<u32> {
        let pieces = self.geometry.pieces();
        if self.readers.is_empty() {
            return 0..pieces;
        }
        let drawn = self.rng.index(self.readers.len());
        let (before, from) = self.readers.split_at(drawn);
        // A reader whose whole rest is under way has no wish; the next one has its turn.
        let head = from.iter().chain(before).find_map(|reading| self.wanted.first_in(reading.left.clone()));
        let head = head.map_or(0, PieceIndex::get);
        let exponent = if origin { self.config.origin_exponent } else { self.config.window_exponent };
        head..(head + draw_window(&mut self.rng, pieces, self.config.window_min, exponent)).min(pieces)
    }

    // --- requests ---

    fn cap(&self) -> usize {
        let by_bytes = self.config.in_flight_bytes_max / u64::from(self.geometry.piece_length());
        let more = u16::try_from(self.geometry.pieces() / IN_FLIGHT_PIECES).unwrap_or(u16::MAX);
        let by_length = self.config.in_flight_min.saturating_add(more).min(self.config.in_flight_max);
        let cap = u64::from(by_length.min(self.budget)).min(by_bytes.max(2));
        let cap = if self.class == Class::Background { cap.div_ceil(4) } else { cap };
        usize::try_from(cap).unwrap_or(usize::MAX)
    }

    /// Asks as much as the bounds allow.
    fn fill(&mut self, now: Instant) {
        let cap = self.cap();
        if now < self.paused_until {
            return;
        }
        self.unhide(now);
        while self.flights.len() < cap {
            let Some(at) = self.freest(now, cap, |peer| !peer.dry) else { break };
            match self.pick(at, false) {
                Some(piece) => self.request(now, at, piece),
                None => self.peers[at].dry = true,
            }
        }
        // The agents have too little: anything will do.
        let mut spent: Vec<Slot> = Vec::new();
        while self.flights.len() < cap.div_ceil(2) && !self.wanted.is_empty() {
            let Some(at) = self.freest(now, cap, |peer| peer.origin && !spent.contains(&peer.slot)) else { break };
            match self.pick(at, true) {
                Some(piece) => self.request(now, at, piece),
                None => spent.push(self.peers[at].slot),
            }
        }
        self.hedge(now, cap);
    }

    /// The peer to ask next among those with room: least asked, agents before origins, ties at random. Peers that have nothing just
    /// now count for the share of each, lest the first to have something gets everybody's requests in one long queue.
    fn freest(&mut self, now: Instant, cap: usize, fits: impl Fn(&Peer) -> bool) -> Option<usize> {
        let useful = self.peers.iter().filter(|peer| peer.rests_until <= now).count().max(1);
        let fair = u16::try_from(cap.div_ceil(useful)).unwrap_or(WINDOW_MAX);
        let room = fair.clamp(self.config.per_peer, WINDOW_MAX);
        let slow = self.latency.mean.saturating_mul(SLOW_FACTOR);
        let (mut best, mut ties) = (None, 0);
        for (at, peer) in self.peers.iter().enumerate() {
            let room = if slow > 0 && peer.latency.mean > slow && useful > 1 { 1 } else { room };
            if peer.in_flight >= room || peer.rests_until > now || !fits(peer) {
                continue;
            }
            let key = (peer.in_flight, peer.origin);
            match best {
                Some((least, _)) if key > least => continue,
                Some((least, _)) if key == least => ties += 1,
                _ => ties = 1,
            }
            if self.rng.below(ties) == 0 {
                best = Some((key, at));
            }
        }
        best.map(|(_, at)| at)
    }

    /// Shows again what was hidden long enough.
    fn unhide(&mut self, now: Instant) {
        for peer in &mut self.peers {
            while let Some((_, piece)) = peer.hidden.pop_front_if(|(until, _)| *until <= now) {
                peer.shown.iter_mut().for_each(|shown| {
                    shown.insert(piece);
                });
                peer.dry = false;
            }
            if peer.hidden.is_empty() {
                peer.shown = None;
            }
        }
    }

    /// A piece to ask of a peer. Of an origin, one that no agent has and that falls to this origin, or `any`.
    fn pick(&mut self, at: usize, any: bool) -> Option<PieceIndex> {
        if self.wanted.is_empty() {
            return None;
        }
        let fresh = self.fresh_head().map(PieceIndex::get);
        let window = self.window(self.peers[at].origin);
        let percent = if self.peers[at].origin { self.config.origin_head_percent } else { self.config.head_percent };
        let head = !self.readers.is_empty() && self.rng.below(100) < u64::from(percent);
        let peer = &self.peers[at];
        let alone = peer.origin && !any;
        let stripe = if alone { self.stripe(peer) } else { Stripe::ALL };
        let has = peer.has.as_ref();
        // An origin has everything, so what it shows is what it has.
        let has = if peer.shown.is_some() && has.is_none() { peer.shown.as_ref() } else { has };
        let only = |piece: u32| piece..piece + 1;
        let first = if head { only(window.start) } else { 0..0 };
        let ranges = [
            // Whichever origin has the shortest queue is to send that one.
            (fresh.map_or(0..0, only), Stripe::ALL),
            (first, stripe),
            (window.clone(), stripe),
            (window.end..self.geometry.pieces(), stripe),
            (0..window.start, stripe),
        ];
        for (range, stripe) in ranges {
            let pick = self.availability.rarest(&mut self.rng, &self.wanted, has, range, stripe);
            if let Some(Pick { piece, .. }) = pick.filter(|pick| !alone || pick.count == 0) {
                return Some(piece);
            }
        }
        None
    }

    /// The pieces that fall to one of the connected origins.
    fn stripe(&self, peer: &Peer) -> Stripe {
        let origins = || self.peers.iter().filter(|other| other.origin && other.silences == 0);
        let number = |count: usize| u32::try_from(count).unwrap_or(0);
        if origins().all(|other| other.slot != peer.slot) {
            return Stripe::ALL;
        }
        Stripe { every: number(origins().count()), first: number(origins().filter(|other| other.id < peer.id).count()) }
    }

    fn request(&mut self, now: Instant, at: usize, piece: PieceIndex) {
        let peer = &mut self.peers[at];
        if peer.in_flight == 0 {
            peer.heard = now;
        }
        peer.in_flight += 1;
        self.wanted.remove(piece);
        self.flights.push(Flight { piece, slot: peer.slot, at: now });
        self.effects.push_back(Effect::Request { slot: peer.slot, piece });
    }

    /// Whether a second peer may be asked for a piece under way: all the rest is under way too, or a reader stands at it.
    fn urgent(&self, piece: PieceIndex) -> bool {
        let rest = self.wanted.is_empty() && self.is_asked_for(piece);
        rest || self.readers.iter().any(|reading| reading.left.start == piece.get())
    }

    fn hedge_age(&self) -> Duration {
        self.latency.bound(2).map_or(HEDGE_FIRST, |bound| bound.max(HEDGE_MIN))
    }

    fn copies(&self, piece: PieceIndex) -> usize {
        self.flights.iter().filter(|flight| flight.piece == piece).count()
    }

    fn hedge(&mut self, now: Instant, cap: usize) {
        if !self.wanted.is_empty() && self.readers.is_empty() {
            return;
        }
        let age = self.hedge_age();
        let late = |flight: &&Flight| now.since(flight.at) >= age && self.urgent(flight.piece);
        let late: Vec<PieceIndex> = self.flights.iter().filter(late).map(|flight| flight.piece).collect();
        for piece in late {
            if self.flights.len() >= cap {
                return;
            }
            if self.copies(piece) >= COPIES_MAX {
                continue;
            }
            let asked = self.flights.iter().find(|flight| flight.piece == piece).map(|flight| flight.slot);
            let other = self.freest(now, cap, |peer| Some(peer.slot) != asked && peer.offers(piece));
            if let Some(at) = other {
                self.request(now, at, piece);
            }
        }
    }

    /// Takes a flight off the books; its piece is wanted again unless it is here or still asked of another.
    fn land(&mut self, at: usize) -> Flight {
        let flight = self.flights.swap_remove(at);
        if let Some(peer) = self.peer(flight.slot) {
            peer.in_flight -= 1;
        }
        self.release(flight.piece);
        flight
    }

    fn release(&mut self, piece: PieceIndex) {
        if !self.have.contains(piece)
            && self.copies(piece) == 0
            && self.is_asked_for(piece)
            && self.wanted.insert(piece)
        {
            for peer in &mut self.peers {
                peer.dry &= !peer.has.as_ref().is_none_or(|set| set.contains(piece));
            }
        }
    }

    fn arrived(&mut self, now: Instant, slot: Slot, piece: PieceIndex, verdict: Verdict) {
        let flight = self.flights.iter().position(|flight| flight.slot == slot && flight.piece == piece);
        let took = flight.map(|at| now.since(self.flights[at].at));
        if verdict == Verdict::Good {
            self.have.insert(piece);
            self.wanted.remove(piece);
        }
        if let Some(at) = flight {
            self.land(at);
        }
        if let Some(took) = took {
            self.latency.sample(took);
        }
        if let Some(peer) = self.peer(slot) {
            peer.heard = now;
            peer.silences = 0;
            took.into_iter().for_each(|took| peer.latency.sample(took));
        }
        match verdict {
            Verdict::Good => {
                self.storage_failures = 0;
                self.cancel_all(piece);
                self.settle(now, slot, piece);
                self.advance_readers(piece);
            }
            Verdict::Wrong => self.wrong(now, slot, piece),
            Verdict::Storage => {
                let pause = STORAGE_PAUSE * 2u32.pow(u32::from(self.storage_failures.min(6)));
                self.storage_failures = self.storage_failures.saturating_add(1);
                self.paused_until = now + pause.min(STORAGE_PAUSE_MAX);
            }
        }
    }

    /// Moves the heads of readers that stood at the piece past all that is here.
    fn advance_readers(&mut self, piece: PieceIndex) {
        for reading in &mut self.readers {
            if reading.left.start == piece.get() {
                let missing = (reading.left.clone()).find(|n| !self.have.contains(PieceIndex(*n)));
                reading.left.start = missing.unwrap_or(reading.left.end);
            }
        }
    }

    // --- wrong pieces ---

    fn wrong(&mut self, now: Instant, slot: Slot, piece: PieceIndex) {
        let Some(peer) = self.peer(slot) else { return };
        let id = peer.id;
        peer.strikes += 1;
        let strikes = peer.strikes;
        peer.rests_until = now + SUSPENSE;
        let others = self.suspects.iter().any(|suspect| suspect.piece == piece && suspect.id != id);
        if !self.suspects.iter().any(|suspect| suspect.piece == piece && suspect.id == id) {
            self.suspects.push(Suspect { piece, id });
        }
        if self.suspects.len() > PEERS_MAX {
            self.suspects.remove(0);
        }
        if others {
            self.effects.push_back(Effect::SuspectLayout { piece });
        } else if strikes >= STRIKES_MAX {
            self.ban(now, &id, BanReason::WrongPieces);
        }
    }

    /// A proven copy of a piece came from `slot`: whoever sent a wrong one is to blame.
    fn settle(&mut self, now: Instant, slot: Slot, piece: PieceIndex) {
        if self.suspects.is_empty() {
            return;
        }
        let good = self.peer(slot).map(|peer| peer.id);
        let (about, rest) = core::mem::take(&mut self.suspects).into_iter().partition(|suspect| suspect.piece == piece);
        self.suspects = rest;
        let about: Vec<Suspect> = about;
        for suspect in about {
            if Some(suspect.id) == good {
                // Its second copy is right: the first was damaged on the way.
                self.peer(slot).into_iter().for_each(|peer| peer.strikes = peer.strikes.saturating_sub(1));
            } else {
                self.ban(now, &suspect.id, BanReason::WrongPiece(piece));
            }
        }
    }

    fn layout_holds(&mut self, now: Instant) {
        for suspect in core::mem::take(&mut self.suspects) {
            self.ban(now, &suspect.id, BanReason::WrongPiece(suspect.piece));
        }
    }

    // --- time ---

    /// Silence after which a peer that owes pieces is given up for them.
    fn patience(&self, peer: &Peer) -> Duration {
        let bound = self.latency.bound(4).into_iter().chain(peer.latency.bound(4)).max();
        let bound = bound.map_or(SILENCE_FIRST, |bound| bound.clamp(SILENCE_MIN, SILENCE_MAX));
        bound * 2u32.pow(u32::from(peer.silences.min(SILENCES_MAX)))
    }

    fn silent_at(&self, peer: &Peer) -> Option<Instant> {
        (peer.in_flight > 0).then(|| peer.heard + self.patience(peer))
    }

    fn tick(&mut self, now: Instant) {
        let silent = |peer: &&Peer| self.silent_at(peer).is_some_and(|at| at <= now);
        let silent: Vec<Slot> = self.peers.iter().filter(silent).map(|peer| peer.slot).collect();
        for slot in silent {
            self.silence(now, slot);
        }
    }

    /// A peer sent nothing of what it owes for too long: ask elsewhere what is to be had elsewhere.
    fn silence(&mut self, now: Instant, slot: Slot) {
        let Some(peer) = self.peer(slot) else { return };
        peer.heard = now;
        peer.silences += 1;
        if peer.silences >= SILENCES_MAX {
            if let Some(peer) = self.remove(slot) {
                self.effects.push_back(Effect::Drop { slot });
                self.lost(now, &peer.id);
            }
            return;
        }
        let owed: Vec<PieceIndex> = self.flights.iter().filter(|f| f.slot == slot).map(|flight| flight.piece).collect();
        for piece in owed {
            let elsewhere = self.peers.iter().any(|other| {
                other.slot != slot && other.silences == 0 && other.has.as_ref().is_none_or(|set| set.contains(piece))
            });
            let flight = self.flights.iter().position(|flight| flight.slot == slot && flight.piece == piece);
            if let (true, Some(at)) = (elsewhere, flight) {
                self.land(at);
                self.effects.push_back(Effect::Cancel { slot, piece });
            }
        }
        if let Some(peer) = self.peer(slot) {
            peer.rests_until = now + SUSPENSE;
        }
    }

    fn next_deadline(&self, now: Instant) -> Option<Instant> {
        if self.is_complete() || self.is_idle() {
            return None;
        }
        let silences = self.peers.iter().filter_map(|peer| self.silent_at(peer));
        let hidden = self.peers.iter().filter_map(|peer| peer.hidden.front()).map(|(until, _)| *until);
        let rests = self.peers.iter().map(|peer| peer.rests_until).filter(|until| *until > now);
        let dials = self.known.iter().filter_map(|known| match known.state {
            Contact::Idle(from) if from > now && self.room_for(known.candidate.origin) > 0 => Some(from),
            _ => None,
        });
        let pause = (self.paused_until > now).then_some(self.paused_until);
        let age = self.hedge_age();
        let urgent =
            |flight: &&Flight| (self.wanted.is_empty() || !self.readers.is_empty()) && self.urgent(flight.piece);
        let hedges = self.flights.iter().filter(urgent).map(|flight| flight.at + age).filter(|at| *at > now);
        silences.chain(rests).chain(hidden).chain(dials).chain(pause).chain(hedges).min()
    }
}

/// The length of a request's window in a blob of so many pieces: `lo × (pieces ÷ lo)^(u^e)`.
fn draw_window(rng: &mut Rng, pieces: u32, lo: u32, exponent: u8) -> u32 {
    let lo = lo.max(1);
    if pieces <= lo {
        return pieces;
    }
    let least = fixed::log2(u64::from(lo));
    let span = fixed::log2(u64::from(pieces)) - least;
    // Sixteen bits of chance are plenty.
    let u = rng.below(1 << 16);
    let u = (0..exponent).fold(1 << 16, |power, _| (power * u) >> 16);
    let window = fixed::exp2(least + ((span >> 16) * u));
    u32::try_from(window).unwrap_or(pieces).clamp(1, pieces)
}

#[cfg(test)]
mod tests;
