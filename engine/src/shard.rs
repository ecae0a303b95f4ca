//! A shard: an event machine that owns its connections, the downloads of the blobs hashed to it, and nothing that others lock.
//!
//! [`Core::handle`] takes an event in, [`Core::poll`] gives out what is to be done, [`Core::deadline`] says when to come back. Each
//! event marks what it touched, and whatever is marked is brought back in order afterwards, whichever event it was: a
//! connection reads on, says what it has to say, serves; a download dials, asks, tells.
//!
//! Which shard a blob's download runs on is a matter of its digest ([`home`]). Complete pieces are immutable, so any shard serves
//! any blob; one that serves a blob which another downloads is told when there is more of it ([`Message`]).
//!
//! One connection joins a pair of nodes per shard, and carries all their blobs both ways. Where both dial at once, the dial of the
//! lower name stays: the other node drops its own.

mod channels;
pub(crate) mod command;
mod connections;
mod download;
mod downloads;
mod jobs;
mod link;
pub(crate) mod notices;
pub(crate) mod read;
mod readers;
mod serving;
pub(crate) mod stats;
mod talk;

use crate::{
    buf::Pool,
    driver::{Effect, Event, SocketId, Token},
    handle::{Class, Error},
    inbox,
    job::{Job, Outcome},
    limit::Meters,
    store::Blob,
    workers::Sink,
};
use command::Command;
use download::Download;
use link::Link;
use notices::Notices;
use peer_proto::{
    Digest, Instant, PeerId, PieceIndex,
    conn::{self, Offer},
    pieces::PieceSet,
    swarm::{self, SendOnce, Slot},
    wire::{Channel, Farewell, Zone},
};
use stats::Stats;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    num::NonZeroU16,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

/// Connections of one shard at most.
const CONNECTIONS_MAX: usize = 4096;
/// Accepted connections of one remote address and shard at most; of this machine itself as many as of all.
const PER_ADDRESS_MAX: usize = 20;
/// Channels on which one blob is served by one shard at most.
const LANES_MAX: usize = 1024;
/// Downloads of one shard at most.
const DOWNLOADS_MAX: usize = 4096;
/// Peers banned at once at most; the oldest ban is lifted for the newest.
const BANS_MAX: usize = 1024;
/// How long a ban lasts.
const BAN: Duration = Duration::from_secs(600);
/// From a dial to the connection.
const DIAL_TIME: Duration = Duration::from_secs(5);
/// How long a connection without channels is kept.
const IDLE_CLOSE: Duration = Duration::from_secs(30);
/// Pieces read from disk at once by one shard at most.
const READS_MAX: usize = 16;
/// Between tries of what waits for a buffer or a worker.
const STARVED_RETRY: Duration = Duration::from_millis(2);
/// Pieces in a row that could not be stored, before a download is given up.
const STORE_FAILURES_MAX: u8 = 3;
/// Between two notices that only tell progress.
const PROGRESS_NOTICE: Duration = Duration::from_secs(1);
/// Time to say goodbye in.
const LEAVE_TIME: Duration = Duration::from_millis(500);

/// The shard that a blob is downloaded on.
pub(crate) fn home(digest: &Digest, shards: usize) -> usize {
    let head = digest.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    usize::try_from(head % shards.max(1) as u64).unwrap_or(0)
}

/// How other threads reach a shard.
pub(crate) type Outbox = inbox::Outbox<Command, Done>;

/// What a job came to.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) token: Token,
    pub(crate) outcome: Outcome,
}

impl Sink for Outbox {
    fn done(&self, token: u64, outcome: Outcome) {
        self.report(Done { token: Token(token), outcome });
    }
}

/// What a shard is made of.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) id: PeerId,
    pub(crate) origin: bool,
    pub(crate) zone: Zone,
    pub(crate) port: Option<NonZeroU16>,
    /// Silence of a peer that ends its connection.
    pub(crate) peer_idle: Duration,
    /// This shard's number, and how many there are.
    pub(crate) index: usize,
    pub(crate) shards: usize,
    /// For random choices.
    pub(crate) seed: u64,
    pub(crate) pool: Pool,
    pub(crate) meters: Arc<Meters>,
    pub(crate) notices: Arc<Notices>,
    pub(crate) stats: Arc<Stats>,
    /// Downloads of the whole node.
    pub(crate) active: Arc<AtomicUsize>,
}

/// See the module's text.
pub(crate) struct Core {
    setup: Setup,
    now: Instant,
    phase: Phase,
    links: BTreeMap<SocketId, Link>,
    /// Connections whose other end is known.
    peers: BTreeMap<PeerId, Vec<SocketId>>,
    /// Connections under way, by whom was dialled.
    dialling: BTreeMap<PeerId, SocketId>,
    accepted_from: BTreeMap<IpAddr, usize>,
    bans: BTreeMap<PeerId, Instant>,
    blobs: BTreeMap<Digest, Shared>,
    downloads: BTreeMap<Digest, Download>,
    slots: BTreeMap<Slot, (SocketId, Channel)>,
    /// Channels offered for blobs that are being looked up, with the geometry the peer knows.
    offers: BTreeMap<Digest, Vec<(SocketId, Box<Offer>)>>,
    /// Requests outstanding that each download may have.
    share: u16,
    jobs: BTreeMap<Token, Pending>,
    /// Jobs that the workers had no room for.
    held: VecDeque<(Token, Job)>,
    /// Connections with a piece to receive and no buffer.
    starved: BTreeSet<SocketId>,
    starved_alarm: Option<Instant>,
    reads: usize,
    /// Connections that wait for a read to end before they start theirs.
    read_queue: BTreeSet<SocketId>,
    /// Connections that wait for bandwidth to send, in turn.
    out_queue: VecDeque<SocketId>,
    out_alarm: Option<Instant>,
    /// Requests that wait for bandwidth to receive: those that a client waits for, and the others.
    in_queues: [VecDeque<(Slot, PieceIndex)>; 2],
    in_alarm: Option<Instant>,
    alarms: BTreeSet<(Instant, Alarm)>,
    dirty_links: VecDeque<SocketId>,
    dirty_downloads: VecDeque<Digest>,
    effects: VecDeque<Effect>,
    next_id: u64,
    next_slot: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Running,
    /// What is being sent may end until then.
    Draining(Instant),
    /// Goodbyes may be written until then.
    Leaving(Instant),
    Stopped,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Alarm {
    Link(SocketId),
    Download(Digest),
}

/// A blob that this shard has channels for, or downloads.
struct Shared {
    blob: Arc<Blob>,
    /// Pieces that every channel's other end has been told of.
    told: PieceSet,
    lanes: BTreeSet<Slot>,
    /// What this shard of an origin has sent of late.
    once: Option<SendOnce>,
}

/// What a job is for.
#[derive(Debug)]
enum Pending {
    Open(Digest),
    Begin(Digest),
    Piece { digest: Digest, slot: Slot, piece: PieceIndex },
    Finish(Digest),
    Read(SocketId),
}

impl Core {
    pub(crate) fn new(setup: Setup) -> Self {
        Self {
            setup,
            now: Instant::ZERO,
            phase: Phase::Running,
            links: BTreeMap::new(),
            peers: BTreeMap::new(),
            dialling: BTreeMap::new(),
            accepted_from: BTreeMap::new(),
            bans: BTreeMap::new(),
            blobs: BTreeMap::new(),
            downloads: BTreeMap::new(),
            slots: BTreeMap::new(),
            offers: BTreeMap::new(),
            share: swarm::share(0),
            jobs: BTreeMap::new(),
            held: VecDeque::new(),
            starved: BTreeSet::new(),
            starved_alarm: None,
            reads: 0,
            read_queue: BTreeSet::new(),
            out_queue: VecDeque::new(),
            out_alarm: None,
            in_queues: Default::default(),
            in_alarm: None,
            alarms: BTreeSet::new(),
            dirty_links: VecDeque::new(),
            dirty_downloads: VecDeque::new(),
            effects: VecDeque::new(),
            next_id: 0,
            next_slot: 0,
        }
    }

    /// A name for a socket that the driver has accepted.
    pub(crate) fn next_socket(&mut self) -> SocketId {
        SocketId(self.next_number())
    }

    pub(super) fn next_number(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// The next thing to do, until there is none.
    pub(crate) fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Self::tick`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Draining(until) | Phase::Leaving(until) => Some(until),
            Phase::Running | Phase::Stopped => None,
        };
        let alarm = self.alarms.first().map(|(at, _)| *at);
        [phase, alarm, self.starved_alarm, self.out_alarm, self.in_alarm].into_iter().flatten().min()
    }

    /// Whether it is over; its sockets may be closed.
    pub(crate) fn stopped(&self) -> bool {
        self.phase == Phase::Stopped
    }

    /// Takes an event in.
    pub(crate) fn handle(&mut self, now: Instant, event: Event) {
        self.now = now;
        match event {
            Event::Accepted { socket, from } => self.accepted(socket, from),
            Event::Adopted { socket, from, hello } => self.adopted(socket, from, &hello),
            Event::Dialed { socket, result } => self.dialled(socket, result),
            Event::Received { socket, result, op } => self.received(socket, result, op),
            Event::Sent { socket, result, op } => self.sent(socket, result, op),
            Event::Done { token, outcome } => self.done(token, outcome),
            Event::Command(command) => self.command(command),
        }
        self.settle();
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.now = now;
        while let Some((at, alarm)) = self.alarms.first().copied()
            && at <= now
        {
            self.alarms.pop_first();
            match alarm {
                Alarm::Link(id) => self.link_alarm(id),
                Alarm::Download(digest) => self.download_alarm(digest),
            }
        }
        if self.starved_alarm.is_some_and(|at| at <= now) {
            self.starved_alarm = None;
            self.retry_starved();
        }
        self.settle();
        self.grant_out();
        self.grant_in();
        self.settle();
        self.advance_phase();
    }

    /// A job that the workers had no room for: tried again later.
    pub(crate) fn refused(&mut self, token: Token, job: Job) {
        self.setup.stats.starved.add(1);
        self.held.push_back((token, job));
        self.starve();
    }

    /// Brings everything in order that an event has touched.
    pub(super) fn settle(&mut self) {
        loop {
            if let Some(id) = self.dirty_links.pop_front() {
                self.with_link(id, |core, link| {
                    link.dirty = false;
                    core.settle_link(link);
                });
            } else if let Some(digest) = self.dirty_downloads.pop_front() {
                self.settle_download(digest);
            } else {
                return;
            }
        }
    }

    fn stop(&mut self, drain: Duration) {
        if self.phase != Phase::Running {
            return;
        }
        self.phase = Phase::Draining(self.now + drain);
        let digests: Vec<Digest> = self.downloads.keys().copied().collect();
        for digest in digests {
            self.fail(&digest, &Error::Closed);
        }
    }

    fn advance_phase(&mut self) {
        if let Phase::Draining(until) = self.phase
            && (self.now >= until || !self.links.values().any(Link::is_serving))
        {
            self.phase = Phase::Leaving(self.now + LEAVE_TIME);
            let ids: Vec<SocketId> = self.links.keys().copied().collect();
            for id in ids {
                match self.links.get_mut(&id) {
                    Some(link) if link.up => link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Leaving)),
                    Some(_) => self.drop_link(id),
                    None => {}
                }
                self.touch(id);
            }
            self.settle();
        }
        if let Phase::Leaving(until) = self.phase
            && (self.now >= until || self.links.is_empty())
        {
            let ids: Vec<SocketId> = self.links.keys().copied().collect();
            ids.into_iter().for_each(|id| self.drop_link(id));
            self.phase = Phase::Stopped;
        }
    }
}

fn progress(download: &Download) -> (u32, u32) {
    let have = download.swarm.as_ref().map_or(0, |swarm| swarm.have().count());
    (have, download.layout.geometry().pieces())
}

fn piece_set(blob: &Blob) -> PieceSet {
    let geometry = blob.layout().geometry();
    let mut set = PieceSet::new(&geometry);
    blob.pieces().iter().for_each(|piece| {
        set.insert(piece);
    });
    set
}

fn swarm_class(class: Class) -> swarm::Class {
    match class {
        Class::Background => swarm::Class::Background,
        Class::Foreground => swarm::Class::Foreground,
    }
}
