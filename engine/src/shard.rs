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

pub(crate) mod command;
mod download;
mod link;
pub(crate) mod notices;
pub(crate) mod read;
pub(crate) mod stats;

use crate::{
    buf::Pool,
    driver::{Effect, Event, Recv, Send, SocketId, Token},
    handle::{Active, Class, Error, Notice, Peer},
    inbox,
    job::{Job, Outcome, Stored},
    limit::{self, Bucket},
    receive::{Intake, Pumped},
    store::{self, Blob, PieceError},
    workers::Sink,
};
use bytes::Bytes;
use command::{Answer, Command, Message, Reply};
use download::{Download, READERS_MAX, Reader, WAITERS_MAX, Wait};
use link::{Lane, Link};
use notices::Notices;
use peer_proto::{
    Digest, Instant, Layout, Namespace, PeerId, PieceIndex,
    conn::{self, Closed, CommandError, Conn, Fault, Need, Offer},
    pieces::PieceSet,
    swarm::{self, Candidate, Has, ReaderId, SendOnce, Slot, Swarm, Verdict},
    wire::{Channel, Farewell, HEADER_LEN, Header, Hello, Open, Refusal, Rejection},
};
use read::Reading;
use stats::Stats;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    ops::Range,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Connections of one shard at most.
const CONNECTIONS_MAX: usize = 4096;
/// Accepted connections of one remote address and shard at most; of this machine itself as many as of all.
const PER_ADDRESS_MAX: usize = 20;
/// Channels on which one blob is served by one shard at most.
const LANES_MAX: usize = 256;
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
    pub(crate) port: Option<NonZeroU16>,
    /// This shard's number, and how many there are.
    pub(crate) index: usize,
    pub(crate) shards: usize,
    /// For random choices.
    pub(crate) seed: u64,
    pub(crate) pool: Pool,
    pub(crate) limit_in: Option<Arc<Bucket>>,
    pub(crate) limit_out: Option<Arc<Bucket>>,
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
    /// Requests that wait for bandwidth to receive.
    in_queue: VecDeque<(Slot, PieceIndex)>,
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
            in_queue: VecDeque::new(),
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

    fn next_number(&mut self) -> u64 {
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
    fn settle(&mut self) {
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

    // --- connections: from the first byte to the last ---

    fn accepted(&mut self, socket: SocketId, from: SocketAddr) {
        self.setup.stats.accepts.add(1);
        self.admit(socket, from);
    }

    fn admit(&mut self, socket: SocketId, from: SocketAddr) {
        let count = self.accepted_from.get(&from.ip()).copied().unwrap_or(0);
        let refused = if self.links.len() >= CONNECTIONS_MAX || self.phase != Phase::Running {
            Some(&self.setup.stats.refused_node)
        } else if count >= PER_ADDRESS_MAX && !from.ip().is_loopback() {
            Some(&self.setup.stats.refused_address)
        } else {
            None
        };
        if let Some(refused) = refused {
            refused.add(1);
            self.effects.push_back(Effect::Close { socket });
            return;
        }
        *self.accepted_from.entry(from.ip()).or_default() += 1;
        let conn = Conn::accepted(self.now, self.hello());
        self.links.insert(socket, Link::new(socket, conn, from, None));
        self.touch(socket);
    }

    fn adopted(&mut self, socket: SocketId, from: SocketAddr, hello: &[u8]) {
        self.admit(socket, from);
        if let Some(link) = self.links.get_mut(&socket) {
            link.intake = Intake::with(hello);
            link.adopted = true;
        }
    }

    fn hello(&self) -> Hello {
        let shard = u16::try_from(self.setup.index).unwrap_or(0);
        Hello { origin: self.setup.origin, port: self.setup.port, shard, ..Hello::new(self.setup.id) }
    }

    fn dial(&mut self, digest: Digest, candidate: Candidate) -> bool {
        if self.links.len() >= CONNECTIONS_MAX || self.phase != Phase::Running {
            self.setup.stats.refused_node.add(1);
            return false;
        }
        self.setup.stats.dials.add(1);
        let socket = self.next_socket();
        let conn = Conn::dialled(self.now, self.hello(), Some(candidate.id));
        let mut link = Link::new(socket, conn, candidate.addr, Some(candidate));
        link.waiting.push(digest);
        link.patience = Some(self.now + DIAL_TIME);
        self.links.insert(socket, link);
        self.dialling.insert(candidate.id, socket);
        self.effects.push_back(Effect::Dial { socket, to: candidate.addr });
        self.touch(socket);
        true
    }

    fn dialled(&mut self, socket: SocketId, result: io::Result<()>) {
        let Some(link) = self.links.get_mut(&socket) else { return };
        match result {
            Ok(()) => {
                link.up = true;
                link.patience = None;
                self.touch(socket);
            }
            Err(error) => {
                tracing::debug!(peer = %link.from, %error, "dial failed");
                self.drop_link(socket);
            }
        }
    }

    fn received(&mut self, socket: SocketId, result: io::Result<usize>, op: Recv) {
        let Some(link) = self.links.get_mut(&socket) else { return };
        link.intake.received(self.now, op);
        match result {
            Ok(n) if n > 0 => {
                self.setup.stats.recv_syscalls.add(1);
                self.setup.stats.bytes_in.add(n as u64);
                link.conn.handle(self.now, conn::Event::Read(n as u64));
            }
            Ok(_) => link.conn.handle(self.now, conn::Event::Lost),
            Err(error) => {
                tracing::debug!(peer = %link.from, %error, "receive failed");
                link.conn.handle(self.now, conn::Event::Lost);
            }
        }
        self.touch(socket);
    }

    fn sent(&mut self, socket: SocketId, result: io::Result<usize>, op: Send) {
        let Some(link) = self.links.get_mut(&socket) else { return };
        match result {
            Ok(n) => {
                self.setup.stats.send_syscalls.add(1);
                self.setup.stats.bytes_out.add(n as u64);
                if op.is_over() {
                    link.sending = false;
                    link.conn.handle(self.now, conn::Event::Sent(op.control));
                } else {
                    link.conn.handle(self.now, conn::Event::Written(n as u64));
                    self.effects.push_back(Effect::Send { socket, op });
                }
            }
            Err(error) => {
                tracing::debug!(peer = %link.from, %error, "send failed");
                link.sending = false;
                link.conn.handle(self.now, conn::Event::Lost);
            }
        }
        self.touch(socket);
    }

    fn link_alarm(&mut self, id: SocketId) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.alarm = None;
        if link.patience.is_some_and(|at| at <= self.now) {
            if !link.up {
                tracing::debug!(peer = %link.from, "dial timed out");
                self.drop_link(id);
                return;
            }
            link.patience = None;
            if link.is_idle() {
                link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Done));
            }
        } else {
            link.conn.handle(self.now, conn::Event::Tick);
        }
        self.touch(id);
    }

    fn touch(&mut self, id: SocketId) {
        if let Some(link) = self.links.get_mut(&id)
            && !link.dirty
        {
            link.dirty = true;
            self.dirty_links.push_back(id);
        }
    }

    /// Takes a link out of the table while it is worked on.
    fn with_link(&mut self, id: SocketId, work: impl FnOnce(&mut Self, &mut Link)) {
        let Some(mut link) = self.links.remove(&id) else { return };
        work(self, &mut link);
        if link.over {
            self.ended(link);
        } else {
            self.set_link_alarm(&mut link);
            self.links.insert(id, link);
        }
    }

    fn set_link_alarm(&mut self, link: &mut Link) {
        if !link.is_idle() && link.up {
            link.patience = None;
        } else if link.is_idle() && link.patience.is_none() {
            link.patience = Some(self.now + IDLE_CLOSE);
        }
        let due = if link.up { link.conn.deadline() } else { None };
        let due = due.into_iter().chain(link.patience).min();
        if due != link.alarm {
            if let Some(old) = link.alarm {
                self.alarms.remove(&(old, Alarm::Link(link.id)));
            }
            self.alarms.extend(due.map(|at| (at, Alarm::Link(link.id))));
            link.alarm = due;
        }
    }

    fn settle_link(&mut self, link: &mut Link) {
        if !link.up {
            return;
        }
        // A piece that is ready leaves in one write with whatever else there is to say.
        self.serve(link);
        loop {
            if !self.converse(link) {
                return;
            }
            match self.pump(link) {
                Pumped::Fed => continue,
                Pumped::Piece(buf) => {
                    link.arrived = Some(buf);
                    continue;
                }
                Pumped::Receive(op) => self.effects.push_back(Effect::Recv { socket: link.id, op }),
                Pumped::Starved => {
                    self.setup.stats.starved.add(1);
                    self.starved.insert(link.id);
                    self.starve();
                }
                Pumped::Nothing => {}
            }
            if !self.serve(link) {
                return;
            }
        }
    }

    /// Says and hears all that there is; false where the link is over, or another shard's.
    fn converse(&mut self, link: &mut Link) -> bool {
        loop {
            self.ask_again(link);
            let mut quiet = true;
            while let Some(effect) = link.conn.poll() {
                quiet = false;
                self.connection_says(link, effect);
                if link.over {
                    return false;
                }
            }
            if quiet {
                return !self.belongs_elsewhere(link);
            }
        }
    }

    fn pump(&mut self, link: &mut Link) -> Pumped {
        // Jobs that wait for a worker hold buffers: no more of them until those are gone.
        if !self.held.is_empty() && matches!(link.conn.need(), Need::Payload { .. }) && link.intake.is_at_rest() {
            return Pumped::Starved;
        }
        link.intake.pump(self.now, &mut link.conn, &self.setup.pool)
    }

    /// Before an accepted connection says a word: does its HELLO name another of this node's shards?
    fn belongs_elsewhere(&mut self, link: &mut Link) -> bool {
        if link.peer.is_some() || link.dialled.is_some() || link.adopted {
            return false;
        }
        let Need::Header = link.conn.need() else { return false };
        let staged = link.intake.staged();
        let Some(header) = staged.first_chunk::<HEADER_LEN>() else { return false };
        // Whatever is not a sound HELLO is for the connection to complain about.
        let Ok(Header::Hello { body }) = Header::decode(header) else { return false };
        let end = HEADER_LEN + body.len as usize;
        let Some(hello) = staged.get(..end) else { return self.await_hello(link, end) };
        let Ok(said) = Hello::decode(&hello[HEADER_LEN..]) else { return false };
        let to = usize::from(said.shard) % self.setup.shards.max(1);
        if to == self.setup.index {
            return false;
        }
        // Nothing may be lost that came behind it.
        let hello = staged.into();
        self.effects.push_back(Effect::HandOver { socket: link.id, to, from: link.from, hello });
        link.over = true;
        link.handed_over = true;
        true
    }

    /// Reads on until the whole HELLO is there, without telling the connection of its header yet.
    fn await_hello(&mut self, link: &mut Link, len: usize) -> bool {
        if let Pumped::Receive(op) = link.intake.await_staged(self.now, len) {
            self.effects.push_back(Effect::Recv { socket: link.id, op });
        }
        true
    }

    fn connection_says(&mut self, link: &mut Link, effect: conn::Effect) {
        use conn::Effect as Says;
        match effect {
            Says::Send { head, piece } => {
                let body = piece.map(|(channel, piece)| link.serve.take(channel, piece));
                let body = match body {
                    Some(None) => {
                        // A header without its piece would put the peer out of step.
                        tracing::error!(peer = %link.from, "a piece was announced that is not at hand");
                        link.over = true;
                        return;
                    }
                    Some(Some(bytes)) => bytes,
                    None => Bytes::new(),
                };
                link.sending = true;
                let op = Send { control: head, control_sent: 0, body };
                self.effects.push_back(Effect::Send { socket: link.id, op });
            }
            Says::Handshaken(hello) => self.handshaken(link, &hello),
            Says::Offered(offer) => self.offered(link, offer),
            Says::Opened { channel, has } => self.opened(link, channel, has),
            Says::Refused { channel, reason } => {
                if let Some(lane) = self.remove_lane(link, channel)
                    && reason != Refusal::Duplicate
                {
                    self.tell_swarm(&lane.digest, link.peer.map(|id| swarm::Event::Failed { id }));
                }
            }
            Says::Has { channel, piece } => {
                if let Some(lane) = link.lanes.get_mut(&channel) {
                    lane.has.insert(piece);
                    let (slot, digest) = (lane.slot, lane.digest);
                    self.tell_swarm(&digest, Some(swarm::Event::Have { slot, piece }));
                    self.close_if_done(link, channel);
                }
            }
            Says::HasAll { channel } => {
                if let Some(lane) = link.lanes.get_mut(&channel)
                    && let Some(shared) = self.blobs.get(&lane.digest)
                {
                    lane.has = PieceSet::full(&shared.blob.layout().geometry());
                    let (slot, digest) = (lane.slot, lane.digest);
                    self.tell_swarm(&digest, Some(swarm::Event::HaveAll { slot }));
                    self.close_if_done(link, channel);
                }
            }
            Says::Serve { channel, piece } if self.sent_of_late(link, channel, piece) => {
                self.reject(link, channel, piece, Rejection::Elsewhere);
            }
            Says::Serve { channel, piece } => link.serve.push(channel, piece),
            Says::Unserve { channel, piece } => link.serve.remove(channel, piece),
            Says::Arrived { channel, piece } => self.arrived(link, channel, piece),
            Says::Rejected { channel, piece, reason } => {
                if let Some(lane) = link.lanes.get(&channel) {
                    let reason = match reason {
                        Rejection::Missing | Rejection::Failed => swarm::Reject::Missing,
                        Rejection::Busy | Rejection::Cancelled => swarm::Reject::Busy,
                        Rejection::Elsewhere => swarm::Reject::Elsewhere,
                    };
                    let slot = lane.slot;
                    self.tell_swarm(&lane.digest, Some(swarm::Event::Rejected { slot, piece, reason }));
                }
            }
            // The window has room again, which is looked at after every event.
            Says::Released { .. } => {}
            Says::Shut { channel } => {
                if let Some(lane) = self.remove_lane(link, channel) {
                    self.tell_swarm(&lane.digest, Some(swarm::Event::Gone { slot: lane.slot }));
                }
            }
            Says::Closed(closed) => self.closed(link, &closed),
            Says::Hangup => link.over = true,
        }
    }

    fn handshaken(&mut self, link: &mut Link, hello: &Hello) {
        link.peer = Some(hello.id);
        link.origin = hello.origin;
        link.shard = hello.shard;
        if let Some(candidate) = link.dialled {
            self.dialling.remove(&candidate.id);
        }
        if self.bans.get(&hello.id).is_some_and(|until| *until > self.now) {
            self.setup.stats.refused_banned.add(1);
            link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Banned));
            return;
        }
        if self.phase != Phase::Running {
            link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Leaving));
            return;
        }
        let twins = self.peers.entry(hello.id).or_default().clone();
        let mut duplicate = false;
        for twin in twins {
            let Some(other) = self.links.get_mut(&twin) else { continue };
            // Of two dials that crossed, the lower name's stays; its own is dropped by the other node.
            let theirs_wins = hello.id < self.setup.id;
            let drop_other = match (link.dialled.is_some(), other.dialled.is_some()) {
                (true, false) => {
                    duplicate |= theirs_wins;
                    false
                }
                (false, true) => theirs_wins,
                // The node at the other end came anew: it does not know the old connection any more.
                (false, false) => other.shard == hello.shard,
                (true, true) => true,
            };
            if drop_other {
                link.waiting.extend(other.lanes.values().map(|lane| lane.digest));
                other.conn.handle(self.now, conn::Event::Goodbye(Farewell::Duplicate));
                self.touch(twin);
            }
        }
        if duplicate {
            link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Duplicate));
            let waiting = std::mem::take(&mut link.waiting);
            self.peers.entry(hello.id).or_default().push(link.id);
            for digest in waiting {
                self.reconnect(&digest, hello.id);
            }
            return;
        }
        if let Some(own) = self.dialling.get(&hello.id).copied()
            && let Some(dial) = self.links.get_mut(&own)
        {
            // Our own dial is under way: what waits for it need wait no longer.
            link.waiting.append(&mut dial.waiting);
        }
        self.peers.entry(hello.id).or_default().push(link.id);
        self.count_links();
        for digest in std::mem::take(&mut link.waiting) {
            self.open_lane(link, &digest);
        }
    }

    /// A download wants a channel to a node that is connected, over whichever connection stands.
    fn reconnect(&mut self, digest: &Digest, peer: PeerId) {
        let up = self.connection_to(&peer);
        match up {
            Some(id) => self.with_link(id, |core, link| core.open_lane(link, digest)),
            None => self.tell_swarm(digest, Some(swarm::Event::Failed { id: peer })),
        }
        if let Some(id) = up {
            self.touch(id);
        }
    }

    fn connection_to(&self, peer: &PeerId) -> Option<SocketId> {
        let ids = self.peers.get(peer)?;
        ids.iter().copied().find(|id| self.links.get(id).is_some_and(|link| link.conn.peer().is_some()))
    }

    fn closed(&mut self, link: &mut Link, closed: &Closed) {
        let stats = &self.setup.stats;
        match closed.fault() {
            Fault::Peer => &stats.ends_peer,
            Fault::Network => &stats.ends_network,
            Fault::Nobody => &stats.ends_nobody,
        }
        .add(1);
        match closed.fault() {
            Fault::Peer => tracing::warn!(peer = %link.from, id = ?link.peer, reason = %closed, "peer misbehaved"),
            Fault::Network | Fault::Nobody => {
                tracing::debug!(peer = %link.from, id = ?link.peer, reason = %closed, "connection ended")
            }
        }
        if closed.fault() == Fault::Peer
            && let Some(peer) = link.peer
        {
            self.ban(peer);
        }
        self.detach(link);
    }

    /// Takes the link's channels from those who use them.
    fn detach(&mut self, link: &mut Link) {
        if let Some(peer) = link.peer
            && let Some(ids) = self.peers.get_mut(&peer)
        {
            ids.retain(|id| *id != link.id);
            if ids.is_empty() {
                self.peers.remove(&peer);
            }
        }
        if let Some(candidate) = link.dialled
            && self.dialling.get(&candidate.id) == Some(&link.id)
        {
            self.dialling.remove(&candidate.id);
        }
        let channels: Vec<Channel> = link.lanes.keys().copied().collect();
        for channel in channels {
            if let Some(lane) = self.remove_lane(link, channel) {
                let event = if lane.open {
                    Some(swarm::Event::Gone { slot: lane.slot })
                } else {
                    link.peer.filter(|_| lane.ours).map(|id| swarm::Event::Failed { id })
                };
                self.tell_swarm(&lane.digest, event);
            }
        }
        let wanted = link.peer.or_else(|| link.dialled.map(|candidate| candidate.id));
        for digest in std::mem::take(&mut link.waiting) {
            self.tell_swarm(&digest, wanted.map(|id| swarm::Event::Failed { id }));
        }
        link.asks.clear();
    }

    /// Ends a link without a word.
    fn drop_link(&mut self, id: SocketId) {
        self.with_link(id, |_, link| link.over = true);
    }

    /// The link is out of the table, and nothing of it may be left behind.
    fn ended(&mut self, mut link: Link) {
        self.detach(&mut link);
        if link.dialled.is_some() {
            if !link.up || link.peer.is_none() {
                self.setup.stats.dial_failures.add(1);
            }
        } else if let Some(count) = self.accepted_from.get_mut(&link.from.ip()) {
            *count -= 1;
            if *count == 0 {
                self.accepted_from.remove(&link.from.ip());
            }
        }
        if let Some(at) = link.alarm {
            self.alarms.remove(&(at, Alarm::Link(link.id)));
        }
        if !link.handed_over {
            self.effects.push_back(Effect::Close { socket: link.id });
        }
        self.count_links();
    }

    fn count_links(&self) {
        self.setup.stats.connections.set(self.peers.values().map(Vec::len).sum());
    }

    fn ban(&mut self, peer: PeerId) {
        self.setup.stats.bans.add(1);
        if self.bans.len() >= BANS_MAX
            && let Some(oldest) = self.bans.iter().min_by_key(|(_, until)| **until).map(|(id, _)| *id)
        {
            self.bans.remove(&oldest);
        }
        self.bans.insert(peer, self.now + BAN);
    }

    // --- channels ---

    fn next_slot(&mut self) -> Slot {
        // Slots of closed channels are free again long before four billion were opened.
        self.next_slot = self.next_slot.wrapping_add(1);
        Slot(self.next_slot)
    }

    fn add_lane(&mut self, link: &mut Link, channel: Channel, digest: Digest, ours: bool) {
        let Some(shared) = self.blobs.get(&digest) else { return };
        let has = PieceSet::new(&shared.blob.layout().geometry());
        let slot = self.next_slot();
        self.slots.insert(slot, (link.id, channel));
        if let Some(shared) = self.blobs.get_mut(&digest) {
            shared.lanes.insert(slot);
        }
        link.lanes.insert(channel, Lane { slot, digest, ours, open: false, has });
    }

    fn remove_lane(&mut self, link: &mut Link, channel: Channel) -> Option<Lane> {
        let lane = link.lanes.remove(&channel)?;
        link.serve.close(channel);
        link.asks.retain(|(of, _)| *of != channel);
        self.slots.remove(&lane.slot);
        if let Some(shared) = self.blobs.get_mut(&lane.digest) {
            shared.lanes.remove(&lane.slot);
            self.forget_unused(&lane.digest);
        }
        Some(lane)
    }

    fn forget_unused(&mut self, digest: &Digest) {
        if !self.downloads.contains_key(digest) && self.blobs.get(digest).is_some_and(|shared| shared.lanes.is_empty())
        {
            self.blobs.remove(digest);
        }
    }

    /// Opens a channel for a download, unless there is one.
    fn open_lane(&mut self, link: &mut Link, digest: &Digest) {
        let Some(peer) = link.peer else { return };
        if link.lane_of(digest).is_some() {
            return;
        }
        let failed = Some(swarm::Event::Failed { id: peer });
        let Some((shared, download)) = self.blobs.get(digest).zip(self.downloads.get(digest)) else { return };
        let open = Open {
            digest: *digest,
            namespace: download.namespace.clone(),
            geometry: shared.blob.layout().geometry(),
            has: shared.told.clone(),
        };
        match link.conn.open(self.now, &open) {
            Ok(channel) => self.add_lane(link, channel, *digest, true),
            Err(error) => {
                tracing::debug!(peer = %link.from, %digest, %error, "channel not opened");
                self.tell_swarm(digest, failed);
            }
        }
    }

    fn offered(&mut self, link: &mut Link, offer: Box<Offer>) {
        if self.phase != Phase::Running {
            return link
                .conn
                .handle(self.now, conn::Event::Refuse { channel: offer.channel, reason: Refusal::Leaving });
        }
        if self.blobs.contains_key(&offer.digest) {
            return self.answer_offer(link, &offer);
        }
        let digest = offer.digest;
        let waiting = self.offers.entry(digest).or_default();
        waiting.push((link.id, offer));
        if waiting.len() == 1 && !self.downloads.contains_key(&digest) {
            self.submit(Pending::Open(digest), Job::Open { digest });
        }
    }

    /// The blob is known: yes or no.
    fn answer_offer(&mut self, link: &mut Link, offer: &Offer) {
        let Offer { channel, digest, .. } = *offer;
        let refuse = |core: &Self, link: &mut Link, reason| {
            link.conn.handle(core.now, conn::Event::Refuse { channel, reason });
        };
        let Some(shared) = self.blobs.get(&digest).filter(|shared| !shared.blob.is_gone()) else {
            return refuse(self, link, Refusal::Unknown);
        };
        if shared.blob.layout().geometry() != offer.geometry {
            return refuse(self, link, Refusal::Geometry);
        }
        let swarm = self.downloads.get(&digest).and_then(|download| download.swarm.as_ref());
        let admitted = match (swarm, link.peer) {
            (Some(swarm), Some(peer)) => swarm.is_complete() || swarm.admits(&peer),
            _ => true,
        };
        if !admitted || shared.lanes.len() >= LANES_MAX {
            return refuse(self, link, Refusal::Busy);
        }
        let has = shared.told.clone();
        self.add_lane(link, channel, digest, false);
        link.conn.handle(self.now, conn::Event::Accept { channel, has });
    }

    fn answer_offers(&mut self, digest: &Digest) {
        for (socket, offer) in self.offers.remove(digest).unwrap_or_default() {
            self.with_link(socket, |core, link| core.answer_offer(link, &offer));
            self.touch(socket);
        }
    }

    /// Takes note of a blob, so that it can be served.
    fn share(&mut self, blob: Arc<Blob>) {
        let digest = *blob.digest();
        let told = piece_set(&blob);
        if !blob.is_whole() && home(&digest, self.setup.shards) != self.setup.index {
            let message = Message::Watch { digest, shard: self.setup.index };
            self.effects.push_back(Effect::Tell { to: home(&digest, self.setup.shards), message });
        }
        match self.blobs.get_mut(&digest) {
            Some(shared) => shared.blob = blob,
            None => {
                self.blobs.insert(digest, Shared { blob, told, lanes: BTreeSet::new(), once: None });
            }
        }
    }

    fn opened(&mut self, link: &mut Link, channel: Channel, has: PieceSet) {
        let Some(lane) = link.lanes.get_mut(&channel) else { return };
        lane.open = true;
        lane.has = has;
        self.introduce(link, channel);
        self.close_if_done(link, channel);
    }

    /// Tells a download of a peer with an open channel.
    fn introduce(&mut self, link: &Link, channel: Channel) {
        let Some((lane, id)) = link.lanes.get(&channel).zip(link.peer) else { return };
        let has = Has::Some(&lane.has);
        let (slot, origin, dialed) = (lane.slot, link.origin, lane.ours);
        self.tell_swarm(&lane.digest, Some(swarm::Event::Connected { slot, id, origin, dialed, has }));
    }

    /// A channel on which both sides have everything is of no use.
    fn close_if_done(&mut self, link: &mut Link, channel: Channel) {
        let Some(lane) = link.lanes.get(&channel).filter(|lane| lane.open) else { return };
        let complete = self.blobs.get(&lane.digest).is_some_and(|shared| shared.told.is_full());
        if complete && lane.has.is_full() {
            link.conn.handle(self.now, conn::Event::Close { channel });
            self.remove_lane(link, channel);
        }
    }

    /// Tells every channel of a blob which pieces have come since it was last told.
    fn announce(&mut self, digest: &Digest) {
        let Some(shared) = self.blobs.get_mut(digest) else { return };
        let fresh: Vec<PieceIndex> =
            shared.blob.pieces().iter().filter(|piece| !shared.told.contains(*piece)).collect();
        if fresh.is_empty() {
            return;
        }
        fresh.iter().for_each(|piece| {
            shared.told.insert(*piece);
        });
        let full = shared.told.is_full();
        for slot in shared.lanes.clone() {
            let Some((socket, channel)) = self.slots.get(&slot).copied() else { continue };
            let Some(link) = self.links.get_mut(&socket) else { continue };
            let Some(lane) = link.lanes.get(&channel) else { continue };
            if full && !lane.has.is_full() {
                link.conn.handle(self.now, conn::Event::HaveAll { channel });
            } else {
                for piece in fresh.iter().filter(|piece| !lane.has.contains(**piece)) {
                    link.conn.handle(self.now, conn::Event::Have { channel, piece: *piece });
                }
            }
            if full {
                self.with_link(socket, |core, link| core.close_if_done(link, channel));
            }
            self.touch(socket);
        }
    }

    // --- serving ---

    /// Makes the connection's next piece ready, where there is one and its turn has come. Whether it did.
    fn serve(&mut self, link: &mut Link) -> bool {
        if link.serve.is_ready() {
            return false;
        }
        let mut skip = 0;
        while let Some((at, channel, piece, fetched)) = link.serve.next(skip) {
            let shared = link.lanes.get(&channel).and_then(|lane| self.blobs.get(&lane.digest));
            let Some(blob) = shared.map(|shared| shared.blob.clone()).filter(|blob| blob.pieces().has(piece)) else {
                self.reject(link, channel, piece, Rejection::Missing);
                continue;
            };
            let range = blob.layout().geometry().range(piece);
            let mapped = || blob.resident(range.clone()).then(|| blob.slice(range.clone())).flatten();
            let cold = fetched.is_some();
            let Some(bytes) = fetched.cloned().or_else(mapped) else {
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
            if !self.take_bandwidth(link, bytes.len() as u64) {
                return false;
            }
            let stats = &self.setup.stats;
            if cold { &stats.pieces_cold } else { &stats.pieces_hot }.add(1);
            link.serve.ready(at, bytes);
            link.conn.handle(self.now, conn::Event::Ready { channel, piece });
            return true;
        }
        false
    }

    /// Whether this node is an origin that would rather send another piece than this one again.
    fn sent_of_late(&mut self, link: &Link, channel: Channel, piece: PieceIndex) -> bool {
        let shared = link.lanes.get(&channel).and_then(|lane| self.blobs.get_mut(&lane.digest));
        let Some(shared) = shared.filter(|_| self.setup.origin) else { return false };
        let once = shared.once.get_or_insert_with(|| SendOnce::new(&shared.blob.layout().geometry()));
        !once.allows(self.now, piece, shared.lanes.len())
    }

    fn reject(&mut self, link: &mut Link, channel: Channel, piece: PieceIndex, reason: Rejection) {
        self.setup.stats.rejects.add(1);
        link.serve.remove(channel, piece);
        link.conn.handle(self.now, conn::Event::Reject { channel, piece, reason });
    }

    fn fetched(&mut self, token: Token, socket: SocketId, result: Result<Bytes, store::ReadError>) {
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
    fn take_bandwidth(&mut self, link: &mut Link, bytes: u64) -> bool {
        let granted = std::mem::take(&mut link.granted);
        if !granted && !self.out_queue.is_empty() {
            if !link.queued {
                link.queued = true;
                self.out_queue.push_back(link.id);
            }
            return false;
        }
        match limit::take(self.setup.limit_out.as_deref(), self.now, bytes) {
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
    fn grant_out(&mut self) {
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

    // --- receiving ---

    /// A piece is in its buffer: a worker proves and writes it.
    fn arrived(&mut self, link: &mut Link, channel: Channel, piece: PieceIndex) {
        let Some(buf) = link.arrived.take() else { return };
        let Some(lane) = link.lanes.get(&channel) else { return };
        let (slot, digest) = (lane.slot, lane.digest);
        let Some(shared) = self.blobs.get(&digest).filter(|_| self.downloads.contains_key(&digest)) else { return };
        let job = Job::Piece { blob: shared.blob.clone(), piece, buf };
        self.submit(Pending::Piece { digest, slot, piece }, job);
    }

    fn submit(&mut self, pending: Pending, job: Job) -> Token {
        let token = Token(self.next_number());
        self.jobs.insert(token, pending);
        if self.held.is_empty() {
            self.effects.push_back(Effect::Job { token, job });
        } else {
            self.held.push_back((token, job));
        }
        token
    }

    fn starve(&mut self) {
        if self.starved_alarm.is_none() {
            self.starved_alarm = Some(self.now + STARVED_RETRY);
        }
    }

    /// Something may have become free: jobs first, then those who wait to receive.
    fn retry_starved(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.effects.extend(held.into_iter().map(|(token, job)| Effect::Job { token, job }));
        for id in std::mem::take(&mut self.starved) {
            self.touch(id);
        }
    }

    fn done(&mut self, token: Token, outcome: Outcome) {
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
    fn panicked(&mut self, token: Token, pending: Pending, outcome: &Outcome) {
        tracing::error!(?pending, ?outcome, "a job came to no outcome of its kind");
        let error = || io::Error::other("internal error");
        match pending {
            Pending::Open(digest) => self.looked_up(digest, Err(store::Error::Disk(error()))),
            Pending::Begin(digest) | Pending::Finish(digest) => self.fail(&digest, &Error::Disk(error())),
            Pending::Piece { digest, slot, piece } => self.judged(digest, slot, piece, Err(PieceError::Disk(error()))),
            Pending::Read(socket) => self.fetched(token, socket, Err(store::ReadError::Busy)),
        }
    }

    fn looked_up(&mut self, digest: Digest, result: Result<Option<Arc<Blob>>, store::Error>) {
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
    fn judged(&mut self, digest: Digest, slot: Slot, piece: PieceIndex, result: Result<Stored, PieceError>) {
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
            Err(PieceError::Gone) => return self.fail(&digest, &Error::Stopped(digest)),
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
            // Readers keep buffers for as long as they like: with few left they get the bytes from the file instead.
            let bytes = (!self.setup.pool.is_scarce()).then_some(&bytes);
            self.effects.extend(download.feed(bytes.map(|bytes| (piece, bytes))).into_iter().map(Effect::Answer));
            for shard in download.watchers.clone() {
                self.effects.push_back(Effect::Tell { to: shard, message: Message::Progress { digest } });
            }
            self.announce(&digest);
        }
        self.touch_download(digest);
    }

    // --- downloads ---

    fn command(&mut self, command: Command) {
        match command {
            Command::Download { namespace, layout, class, reply } => self.download(namespace, layout, class, reply),
            Command::Wait { digest, reply } => match self.downloads.get_mut(&digest) {
                Some(download) if download.waiters.len() < WAITERS_MAX => download.waiters.push(reply),
                Some(_) => self.answer(reply, Err(Error::Busy("list of waiters"))),
                None => self.answer(reply, Err(Error::NotFound(digest))),
            },
            Command::Forget { digest, reply } => {
                let here = self.downloads.contains_key(&digest);
                self.forget(&digest);
                self.effects.push_back(Effect::Answer(Answer::Bool(reply, Ok(here))));
            }
            Command::Peers { digest, peers } => self.named(digest, peers),
            Command::Read { digest, range, alive, reply } => {
                let reading = self.reader(digest, range, alive);
                self.effects.push_back(Effect::Answer(Answer::Reading(reply, reading)));
            }
            Command::Await { digest, reader, piece, all, patience, reply } => {
                self.wait_for(digest, reader, Wait { piece, all, since: self.now, patience, reply });
            }
            Command::Told(message) => self.told(message),
            Command::Probe { reply } => self.effects.push_back(Effect::Answer(Answer::Alive(reply))),
            Command::Stop { drain } => self.stop(drain),
            // Made an event of its own by the driver, which owns the socket.
            Command::Adopt { .. } => {}
        }
    }

    fn answer(&mut self, reply: Reply<()>, result: Result<(), Error>) {
        self.effects.push_back(Effect::Answer(Answer::Unit(reply, result)));
    }

    fn told(&mut self, message: Message) {
        match message {
            Message::Watch { digest, shard } => {
                if let Some(download) = self.downloads.get_mut(&digest) {
                    download.watchers.insert(shard);
                }
                // What came before it watched.
                self.effects.push_back(Effect::Tell { to: shard, message: Message::Progress { digest } });
            }
            Message::Progress { digest } => self.announce(&digest),
        }
    }

    fn download(&mut self, namespace: Namespace, layout: Arc<Layout>, class: Class, reply: Reply<()>) {
        let digest = *layout.digest();
        if self.phase != Phase::Running {
            return self.answer(reply, Err(Error::Closed));
        }
        if let Some(download) = self.downloads.get_mut(&digest) {
            if *download.layout != *layout {
                return self.answer(reply, Err(Error::LayoutDiffers(digest)));
            }
            download.class = download.class.max(class);
            match &mut download.swarm {
                Some(swarm) => {
                    swarm.handle(self.now, swarm::Event::Class(swarm_class(download.class)));
                    // Whoever asks again has the layout from somewhere: it is right, whatever two peers say.
                    if std::mem::take(&mut download.suspect) {
                        swarm.handle(self.now, swarm::Event::LayoutHolds);
                    }
                    self.answer(reply, Ok(()));
                }
                None if download.beginners.len() < WAITERS_MAX => download.beginners.push(reply),
                None => self.answer(reply, Err(Error::Busy("list of waiters"))),
            }
            return self.touch_download(digest);
        }
        if self.downloads.len() >= DOWNLOADS_MAX {
            return self.answer(reply, Err(Error::Busy("table of downloads")));
        }
        let mut download = Download::new(namespace.clone(), layout.clone(), class);
        download.beginners.push(reply);
        self.downloads.insert(digest, download);
        self.setup.active.fetch_add(1, Ordering::Relaxed);
        self.count_downloads();
        self.submit(Pending::Begin(digest), Job::Begin { layout, namespace });
    }

    fn count_downloads(&mut self) {
        self.setup.stats.downloads.set(self.downloads.len());
        let in_flight = swarm::share(self.setup.active.load(Ordering::Relaxed));
        if std::mem::replace(&mut self.share, in_flight) == in_flight {
            return;
        }
        let digests: Vec<Digest> = self.downloads.keys().copied().collect();
        for digest in digests {
            self.tell_swarm(&digest, Some(swarm::Event::Budget { in_flight }));
        }
    }

    /// Space is set aside, or there is none.
    fn begun(&mut self, digest: Digest, result: Result<Arc<Blob>, store::Error>) {
        let blob = match result {
            Ok(blob) => blob,
            Err(error) => {
                self.fail(&digest, &error.into());
                return self.answer_offers(&digest);
            }
        };
        let Some(download) = self.downloads.get_mut(&digest) else { return };
        if blob.is_whole() {
            self.share(blob);
            self.whole(digest);
            return self.answer_offers(&digest);
        }
        let mut config = swarm::Config::new(self.setup.id, self.setup.seed ^ self.next_id);
        config.accept_max = config.accept_max.max(config.degree);
        let geometry = blob.layout().geometry();
        let mut swarm = Swarm::new(config, geometry, piece_set(&blob), swarm_class(download.class));
        swarm.handle(
            self.now,
            swarm::Event::Budget { in_flight: swarm::share(self.setup.active.load(Ordering::Relaxed)) },
        );
        let named = std::mem::take(&mut download.named);
        download.swarm = Some(swarm);
        let beginners = std::mem::take(&mut download.beginners);
        self.share(blob);
        for reply in beginners {
            self.answer(reply, Ok(()));
        }
        // Channels on which it was served before it was wanted.
        let lanes = self.blobs.get(&digest).map(|shared| shared.lanes.clone()).unwrap_or_default();
        for slot in lanes {
            let Some((socket, channel)) = self.slots.get(&slot).copied() else { continue };
            self.with_link(socket, |core, link| {
                if link.lanes.get(&channel).is_some_and(|lane| lane.open) {
                    core.introduce(link, channel);
                }
            });
        }
        self.answer_offers(&digest);
        self.named(digest, named);
        self.notice(&digest);
        self.touch_download(digest);
    }

    fn named(&mut self, digest: Digest, peers: Vec<Peer>) {
        let Some(download) = self.downloads.get_mut(&digest) else { return };
        let Some(swarm) = &mut download.swarm else {
            download.named = peers;
            return;
        };
        let now = self.now;
        let candidates: Vec<Candidate> = peers
            .into_iter()
            .filter(|peer| self.bans.get(&peer.id).is_none_or(|until| *until <= now))
            .map(|Peer { id, addr, origin }| Candidate { id, addr, origin })
            .collect();
        swarm.handle(now, swarm::Event::Candidates(&candidates));
        self.touch_download(digest);
    }

    fn touch_download(&mut self, digest: Digest) {
        if let Some(download) = self.downloads.get_mut(&digest)
            && !download.dirty
        {
            download.dirty = true;
            self.dirty_downloads.push_back(digest);
        }
    }

    fn tell_swarm(&mut self, digest: &Digest, event: Option<swarm::Event<'_>>) {
        if let Some((swarm, event)) =
            self.downloads.get_mut(digest).and_then(|download| download.swarm.as_mut()).zip(event)
        {
            swarm.handle(self.now, event);
            self.touch_download(*digest);
        }
    }

    fn download_alarm(&mut self, digest: Digest) {
        let Some(download) = self.downloads.get_mut(&digest) else { return };
        download.alarm = None;
        if let Some(swarm) = &mut download.swarm {
            swarm.handle(self.now, swarm::Event::Tick);
        }
        self.effects.extend(download.expire(self.now).into_iter().map(Effect::Answer));
        self.touch_download(digest);
    }

    fn settle_download(&mut self, digest: Digest) {
        if let Some(download) = self.downloads.get_mut(&digest) {
            download.dirty = false;
            download.prune(self.now);
        }
        while let Some(effect) = self.downloads.get_mut(&digest).and_then(|download| download.swarm.as_mut()?.poll()) {
            self.swarm_wants(digest, effect);
        }
        let Some(download) = self.downloads.get_mut(&digest) else { return };
        let due = download.deadline();
        if due != download.alarm {
            if let Some(old) = std::mem::replace(&mut download.alarm, due) {
                self.alarms.remove(&(old, Alarm::Download(digest)));
            }
            self.alarms.extend(due.map(|at| (at, Alarm::Download(digest))));
        }
        if self.now.since(download.told) >= PROGRESS_NOTICE {
            self.notice(&digest);
        }
    }

    fn swarm_wants(&mut self, digest: Digest, effect: swarm::Effect) {
        use swarm::Effect as Wants;
        match effect {
            Wants::Connect(candidate) => self.connect(digest, candidate),
            Wants::Request { slot, piece } => {
                self.in_queue.push_back((slot, piece));
                self.grant_in();
            }
            Wants::Cancel { slot, piece } => {
                self.in_queue.retain(|queued| *queued != (slot, piece));
                if let Some((socket, channel)) = self.slots.get(&slot).copied()
                    && let Some(link) = self.links.get_mut(&socket)
                {
                    link.asks.retain(|ask| *ask != (channel, piece));
                    link.conn.handle(self.now, conn::Event::Cancel { channel, piece });
                    self.touch(socket);
                }
            }
            Wants::Drop { slot } => self.close_lane(slot),
            Wants::Ban { slot, id, reason } => {
                tracing::warn!(%digest, peer = %id, ?reason, "peer banned");
                self.ban(id);
                self.close_lane(slot);
                for socket in self.peers.get(&id).cloned().unwrap_or_default() {
                    if let Some(link) = self.links.get_mut(&socket) {
                        link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Banned));
                        self.touch(socket);
                    }
                }
            }
            Wants::SuspectLayout { piece } => {
                self.setup.stats.suspect_layouts.add(1);
                tracing::warn!(%digest, %piece, "two peers failed one piece: the layout may be wrong");
                let Some(download) = self.downloads.get_mut(&digest) else { return };
                download.suspect = true;
                for reply in std::mem::take(&mut download.waiters) {
                    self.answer(reply, Err(Error::Suspect(digest)));
                }
            }
            Wants::WantPeers(_) => self.notice(&digest),
            Wants::Complete => {
                if let Some(shared) = self.blobs.get(&digest) {
                    let job = Job::Finish { blob: shared.blob.clone() };
                    self.submit(Pending::Finish(digest), job);
                }
            }
        }
    }

    fn connect(&mut self, digest: Digest, candidate: Candidate) {
        let banned = self.bans.get(&candidate.id).is_some_and(|until| *until > self.now);
        if !banned {
            if let Some(id) = self.connection_to(&candidate.id) {
                self.with_link(id, |core, link| core.open_lane(link, &digest));
                return self.touch(id);
            }
            if let Some(link) = self.dialling.get(&candidate.id).and_then(|id| self.links.get_mut(id)) {
                return link.waiting.push(digest);
            }
            if self.dial(digest, candidate) {
                return;
            }
        }
        self.tell_swarm(&digest, Some(swarm::Event::Failed { id: candidate.id }));
    }

    fn close_lane(&mut self, slot: Slot) {
        let Some((socket, channel)) = self.slots.get(&slot).copied() else { return };
        self.with_link(socket, |core, link| {
            link.conn.handle(core.now, conn::Event::Close { channel });
            core.remove_lane(link, channel);
        });
        self.touch(socket);
    }

    /// Lets requests out as the limit for receiving allows.
    fn grant_in(&mut self) {
        if self.in_alarm.is_some_and(|at| at > self.now) {
            return;
        }
        self.in_alarm = None;
        while let Some((slot, piece)) = self.in_queue.pop_front() {
            let Some((socket, channel)) = self.slots.get(&slot).copied() else { continue };
            let Some(lane) = self.links.get(&socket).and_then(|link| link.lanes.get(&channel)) else { continue };
            let geometry = self.blobs.get(&lane.digest).map(|shared| shared.blob.layout().geometry());
            let bytes = geometry.map_or(0, |geometry| u64::from(geometry.piece_len(piece)));
            if let Err(at) = limit::take(self.setup.limit_in.as_deref(), self.now, bytes) {
                self.in_queue.push_front((slot, piece));
                self.in_alarm = Some(at);
                return;
            }
            if let Some(link) = self.links.get_mut(&socket) {
                link.asks.push_back((channel, piece));
                self.touch(socket);
            }
        }
    }

    /// Makes the requests that the connection's window has room for.
    fn ask_again(&mut self, link: &mut Link) {
        let mut later = VecDeque::new();
        while let Some((channel, piece)) = link.asks.pop_front() {
            match link.conn.request(self.now, channel, piece) {
                Ok(()) => {}
                Err(CommandError::Full) => {
                    link.asks.push_front((channel, piece));
                    break;
                }
                // Its cancelled request must be answered first.
                Err(CommandError::Twice) => later.push_back((channel, piece)),
                // The download is told when the channel goes.
                Err(CommandError::NotOpen) => {}
            }
        }
        link.asks.append(&mut later);
    }

    /// Every piece is proven, on disk and under its name.
    fn finished(&mut self, digest: Digest, result: Result<Arc<Blob>, store::Error>) {
        match result {
            Ok(blob) => {
                self.share(blob);
                self.whole(digest);
            }
            Err(error) => self.fail(&digest, &error.into()),
        }
    }

    fn whole(&mut self, digest: Digest) {
        let Some(mut download) = self.remove_download(&digest) else { return };
        self.setup.stats.downloads_done.add(1);
        let waits = download.readers.values_mut().filter_map(|reader| reader.wait.take());
        self.effects.extend(waits.map(|wait| Effect::Answer(Answer::Bytes(wait.reply, Ok(None)))));
        for reply in download.beginners.drain(..).chain(download.waiters.drain(..)).collect::<Vec<_>>() {
            self.answer(reply, Ok(()));
        }
        let pieces = download.layout.geometry().pieces();
        let namespace = download.namespace;
        self.setup.notices.put(Notice { digest, namespace, have: pieces, pieces, state: Active::Seeding });
        self.announce(&digest);
        self.forget_unused(&digest);
    }

    fn remove_download(&mut self, digest: &Digest) -> Option<Download> {
        let download = self.downloads.remove(digest)?;
        if let Some(at) = download.alarm {
            self.alarms.remove(&(at, Alarm::Download(*digest)));
        }
        self.setup.active.fetch_sub(1, Ordering::Relaxed);
        self.count_downloads();
        Some(download)
    }

    /// A download ends without its blob.
    fn fail(&mut self, digest: &Digest, error: &Error) {
        let Some(download) = self.remove_download(digest) else { return };
        if !matches!(error, Error::Stopped(_) | Error::Closed) {
            tracing::warn!(%digest, %error, "download given up");
        }
        self.setup.stats.downloads_failed.add(1);
        let (have, pieces) = progress(&download);
        let namespace = download.namespace.clone();
        self.setup.notices.put(Notice { digest: *digest, namespace, have, pieces, state: Active::Gone });
        self.effects.extend(download.give_up(error).into_iter().map(Effect::Answer));
        self.forget_unused(digest);
    }

    /// The blob is to be deleted: nobody here may hold on to it.
    fn forget(&mut self, digest: &Digest) {
        self.fail(digest, &Error::Stopped(*digest));
        for slot in self.blobs.get(digest).map(|shared| shared.lanes.clone()).unwrap_or_default() {
            self.close_lane(slot);
        }
        self.blobs.remove(digest);
    }

    fn notice(&mut self, digest: &Digest) {
        let Some(download) = self.downloads.get_mut(digest) else { return };
        let Some(swarm) = &download.swarm else { return };
        download.told = self.now;
        let state = Active::Leeching { want: swarm.want() };
        let (have, pieces) = progress(download);
        let namespace = download.namespace.clone();
        self.setup.notices.put(Notice { digest: *digest, namespace, have, pieces, state });
    }

    // --- readers ---

    fn reader(&mut self, digest: Digest, range: Range<u64>, alive: Weak<()>) -> Result<Reading, Error> {
        let id = ReaderId(self.next_number());
        let shared = self.blobs.get(&digest).ok_or(Error::NotFound(digest))?;
        let download = self.downloads.get_mut(&digest).ok_or(Error::NotFound(digest))?;
        let swarm = download.swarm.as_mut().ok_or(Error::NotFound(digest))?;
        let length = download.layout.length();
        if range.start > range.end || range.end > length {
            return Err(Error::Range(length));
        }
        if download.readers.len() >= READERS_MAX {
            return Err(Error::Busy("list of readers"));
        }
        let mut pieces = download.layout.geometry().covering(range);
        let have = swarm.have();
        let missing = pieces.clone().find(|n| download.layout.geometry().piece(*n).is_none_or(|p| !have.contains(p)));
        pieces.start = missing.unwrap_or(pieces.end);
        swarm.handle(self.now, swarm::Event::Reader { id, pieces: pieces.into() });
        download.readers.insert(id, Reader { alive, wait: None });
        let blob = shared.blob.clone();
        self.touch_download(digest);
        Ok(Reading { id, blob })
    }

    fn wait_for(&mut self, digest: Digest, id: ReaderId, wait: Wait) {
        let answer = match self.downloads.get_mut(&digest) {
            // It has ended: whole, and then the reader finds its piece there, or not.
            None if self.blobs.get(&digest).is_some_and(|shared| shared.blob.is_whole()) => Ok(None),
            None => Err(Error::Stopped(digest)),
            Some(download) if download.has(wait.piece, wait.all) => Ok(None),
            Some(download) => match download.readers.get_mut(&id) {
                Some(reader) => {
                    reader.wait = Some(wait);
                    return self.touch_download(digest);
                }
                None => Err(Error::NotFound(digest)),
            },
        };
        self.effects.push_back(Effect::Answer(Answer::Bytes(wait.reply, answer)));
    }

    // --- the end ---

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
