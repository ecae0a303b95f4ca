//! Whole nodes on a simulated network and simulated disks, in one thread, in virtual time, from one seed.
//!
//! The nodes are the real ones: shards, stores and jobs are the code that serves. The network delivers in order and without
//! loss, as TCP does, but takes its time: bytes queue at the sender's uplink, travel for the latency, and wait at the receiver
//! until they are read, a window's worth at most. Nodes can be killed (their connections end), lose power (they fall silent), be cut off
//! (what is sent to and by them waits), and come back; single connections can be cut.

mod scenarios;

use super::{Carried, Effect, Event, Recv, Send, SocketId};
use crate::{
    buf::Pool,
    disk::sim::Sim,
    handle::{Class, Error, Limits, Peer, Proof},
    job::{Job, Outcome},
    limit::Meters,
    shard::{
        Core, Setup,
        command::{Command, Extent},
        home,
        notices::Notices,
        stats::Stats,
    },
    store::{Options, Store},
};
use bytes::{Buf as _, Bytes};
use peer_proto::{Algorithm, Digest, Instant, Layout, LayoutBuilder, PeerId, wire::Zone};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    net::SocketAddr,
    num::NonZeroU16,
    ops::Range,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};
use tokio::sync::oneshot;
use uuid::Uuid;

const MIB: usize = 1 << 20;
/// Bytes on their way or unread, per direction of a connection.
const WINDOW: usize = 3 << 20;
/// What proving and writing takes, bytes a second.
const WORKER_BYTES_PER_S: u64 = 1_000_000_000;
/// What any job takes at least.
const JOB_TIME: Duration = Duration::from_micros(30);
/// Steps after which a run is taken to go in circles.
const STEPS_MAX: u64 = 20_000_000;
/// Unix time of the simulation's start.
const EPOCH_S: u64 = 1_700_000_000;

/// How the network is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Net {
    pub(crate) latency: Duration,
    /// Of each node's uplink.
    pub(crate) bytes_per_s: u64,
}

impl Default for Net {
    fn default() -> Self {
        Self { latency: Duration::from_micros(200), bytes_per_s: 1_250_000_000 }
    }
}

/// A wire's end, as another shard's driver takes it over.
#[derive(Debug)]
pub(crate) struct Wire {
    end: EndId,
}

/// Which end of which connection: even ones dialled, the odd one above is its other end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct EndId(u64);

impl EndId {
    fn other(self) -> Self {
        Self(self.0 ^ 1)
    }
}

/// One shard of one life of a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct At {
    node: usize,
    life: u32,
    shard: usize,
}

enum Action {
    Happen {
        at: At,
        event: Event,
    },
    Tick {
        at: At,
    },
    /// A dial reaches the other side.
    Knock {
        end: EndId,
        at: At,
        socket: SocketId,
        to: SocketAddr,
    },
    Deliver {
        to: EndId,
        bytes: Bytes,
    },
    /// The other side's end reaches this one.
    Fin {
        to: EndId,
    },
}

struct End {
    /// None where a rogue or nobody is at this end.
    holder: Option<(At, SocketId)>,
    node: usize,
    inbound: VecDeque<Bytes>,
    /// Bytes sent to this end and not yet read by it.
    afloat: usize,
    arrives: Instant,
    fin: bool,
    closed: bool,
    recv: Option<Recv>,
    send: Option<Send>,
}

impl End {
    fn new(node: usize, holder: Option<(At, SocketId)>) -> Self {
        Self {
            holder,
            node,
            inbound: VecDeque::new(),
            afloat: 0,
            arrives: Instant::ZERO,
            fin: false,
            closed: false,
            recv: None,
            send: None,
        }
    }

    fn waiting(&self) -> usize {
        self.inbound.iter().map(Bytes::len).sum()
    }
}

struct Shard {
    core: Core,
    sockets: BTreeMap<SocketId, EndId>,
    tick: Option<Instant>,
}

/// What is at an address.
enum Resident {
    Engine,
    /// Says this to everybody who connects, and never reads.
    Rogue(Bytes),
}

pub(crate) struct Node {
    pub(crate) id: PeerId,
    pub(crate) addr: SocketAddr,
    pub(crate) origin: bool,
    pub(crate) disk: Sim,
    pub(crate) store: Option<Arc<Store>>,
    pub(crate) stats: Vec<Arc<Stats>>,
    pub(crate) notices: Arc<Notices>,
    limits: Limits,
    resident: Resident,
    life: u32,
    shards: Vec<Shard>,
    uplink_free: Instant,
    workers_free: Instant,
}

/// What a node is made with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Made {
    pub(crate) origin: bool,
    pub(crate) shards: usize,
    pub(crate) disk_bytes: u64,
    pub(crate) limits: Limits,
}

impl Default for Made {
    fn default() -> Self {
        Self { origin: false, shards: 2, disk_bytes: 1 << 40, limits: Limits::default() }
    }
}

/// SplitMix64.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, which is not 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n
    }
}

/// The simulation.
pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) net: Net,
    pub(crate) nodes: Vec<Node>,
    pub(crate) rng: Rng,
    seed: u64,
    queue: BTreeMap<(Instant, u64), Action>,
    next: u64,
    ends: BTreeMap<EndId, End>,
    next_end: u64,
    /// Nodes cut off, and what waits until they are not.
    cut: BTreeSet<usize>,
    held: Vec<Action>,
    steps: u64,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            now: Instant::from_nanos(1_000_000_000),
            net: Net::default(),
            nodes: Vec::new(),
            rng: Rng(seed),
            seed,
            queue: BTreeMap::new(),
            next: 0,
            ends: BTreeMap::new(),
            next_end: 0,
            cut: BTreeSet::new(),
            held: Vec::new(),
            steps: 0,
        }
    }

    // --- nodes ---

    pub(crate) fn node(&mut self, made: Made) -> usize {
        let node = self.place(Resident::Engine, made.origin, made.disk_bytes);
        self.nodes[node].limits = made.limits;
        self.boot(node, made.shards);
        node
    }

    /// An address where somebody says `bytes` to whoever comes, and nothing else.
    pub(crate) fn rogue(&mut self, bytes: impl Into<Bytes>) -> usize {
        self.place(Resident::Rogue(bytes.into()), false, 0)
    }

    fn place(&mut self, resident: Resident, origin: bool, disk_bytes: u64) -> usize {
        let number = u8::try_from(self.nodes.len()).unwrap();
        self.nodes.push(Node {
            id: PeerId::new([number + 1; 20]),
            addr: SocketAddr::from(([10, 0, 0, number + 1], 16_001)),
            origin,
            disk: Sim::new(self.seed ^ u64::from(number), disk_bytes),
            store: None,
            stats: Vec::new(),
            notices: Arc::default(),
            limits: Limits::default(),
            resident,
            life: 0,
            shards: Vec::new(),
            uplink_free: Instant::ZERO,
            workers_free: Instant::ZERO,
        });
        self.nodes.len() - 1
    }

    /// Starts a node's process, for the first time or again.
    pub(crate) fn boot(&mut self, node: usize, shards: usize) {
        let seed = self.rng.next_u64();
        let place = &mut self.nodes[node];
        let options = Options { quota: None, proof: Proof::Full, boot: [7; 16] };
        let pool = Pool::new(64 * MIB);
        let store = Store::open(Arc::new(place.disk.clone()), options, pool.clone(), EPOCH_S).unwrap();
        place.store = Some(Arc::new(store));
        place.life += 1;
        place.stats = (0..shards).map(|_| Arc::default()).collect();
        let active = Arc::new(AtomicUsize::new(0));
        let meters = Arc::new(Meters::new(place.limits));
        place.shards = (0..shards)
            .map(|index| Shard {
                core: Core::new(Setup {
                    id: place.id,
                    origin: place.origin,
                    zone: Zone::NONE,
                    peer_idle: peer_proto::conn::IDLE_MAX,
                    port: NonZeroU16::new(place.addr.port()),
                    index,
                    shards,
                    seed: seed ^ index as u64,
                    pool: pool.clone(),
                    meters: meters.clone(),
                    notices: place.notices.clone(),
                    stats: place.stats[index].clone(),
                    active: active.clone(),
                }),
                sockets: BTreeMap::new(),
                tick: None,
            })
            .collect();
    }

    /// kill -9: the kernel closes its sockets, its files stay as they were written.
    pub(crate) fn kill(&mut self, node: usize) {
        for end in self.ends_of(node) {
            self.close(end);
        }
        self.fall_silent(node);
        self.nodes[node].disk.kill();
    }

    /// The power goes: nobody is told, and what was not durable is kept or lost by chance.
    pub(crate) fn power_cut(&mut self, node: usize) {
        self.fall_silent(node);
        self.nodes[node].disk.crash();
    }

    fn fall_silent(&mut self, node: usize) {
        let place = &mut self.nodes[node];
        place.life += 1;
        place.shards.clear();
        place.store = None;
        for end in self.ends_of(node) {
            if let Some(end) = self.ends.get_mut(&end) {
                end.holder = None;
                end.recv = None;
                end.send = None;
            }
        }
    }

    fn ends_of(&self, node: usize) -> Vec<EndId> {
        self.ends.iter().filter(|(_, end)| end.node == node).map(|(id, _)| *id).collect()
    }

    /// Nothing reaches the node or leaves it until [`Self::mend`]; connections stay.
    pub(crate) fn cut_off(&mut self, node: usize) {
        self.cut.insert(node);
    }

    pub(crate) fn mend(&mut self, node: usize) {
        self.cut.remove(&node);
        for action in std::mem::take(&mut self.held) {
            self.schedule(self.now + self.net.latency, action);
        }
    }

    /// Ends every connection, as a switch that restarts.
    pub(crate) fn reset_connections(&mut self) {
        let ends: Vec<EndId> = self.ends.keys().copied().collect();
        for end in ends {
            self.close(end);
        }
    }

    pub(crate) fn peer(&self, node: usize) -> Peer {
        let Node { id, addr, origin, .. } = self.nodes[node];
        Peer { id, addr, origin }
    }

    /// Puts a blob into a node's store.
    pub(crate) fn put(&mut self, node: usize, blob: &Bytes) -> Arc<Layout> {
        let store = self.nodes[node].store.clone().unwrap();
        let mut incoming = store
            .create_upload(Uuid::from_u128(u128::from(self.rng.next_u64())), Algorithm::Sha256, Some(blob.len() as u64))
            .unwrap();
        store.append_upload(&mut incoming, blob).unwrap();
        let layout = layout_of(blob);
        store.commit_upload(incoming, layout.digest()).unwrap();
        layout
    }

    // --- commands ---

    fn home(&self, node: usize, digest: &Digest) -> At {
        At { node, life: self.nodes[node].life, shard: home(digest, self.nodes[node].shards.len()) }
    }

    pub(crate) fn command(&mut self, node: usize, digest: &Digest, command: Command) {
        let at = self.home(node, digest);
        self.happen(at, Event::Command(command));
    }

    pub(crate) fn ask<T>(
        &mut self,
        node: usize,
        digest: &Digest,
        command: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Command,
    ) -> oneshot::Receiver<Result<T, Error>> {
        let (reply, answer) = oneshot::channel();
        self.command(node, digest, command(reply));
        answer
    }

    /// Starts a download and names peers; the end is what comes back.
    pub(crate) fn download(
        &mut self,
        node: usize,
        layout: &Arc<Layout>,
        from: &[usize],
    ) -> oneshot::Receiver<Result<(), Error>> {
        self.download_as(Class::Foreground, node, layout, from)
    }

    /// Begins a download of what is read, and names those who may have it.
    pub(crate) fn download_ranges(&mut self, node: usize, layout: &Arc<Layout>, from: &[usize]) {
        let digest = *layout.digest();
        let (class, extent) = (Class::Foreground, Extent::Ranges);
        let (namespace, layout) = ("lib/app".parse().unwrap(), layout.clone());
        let mut begun = self.ask(node, &digest, |reply| Command::Download { namespace, layout, class, extent, reply });
        self.answer(&mut begun, Duration::from_secs(1)).expect("no space in sight").unwrap();
        let peers = from.iter().map(|node| self.peer(*node)).collect();
        self.command(node, &digest, Command::Peers { digest, peers });
    }

    /// As [`Self::download`], of a class.
    pub(crate) fn download_as(
        &mut self,
        class: Class,
        node: usize,
        layout: &Arc<Layout>,
        from: &[usize],
    ) -> oneshot::Receiver<Result<(), Error>> {
        let digest = *layout.digest();
        let namespace = "lib/app".parse().unwrap();
        let layout = layout.clone();
        let extent = Extent::Whole;
        let begun = self.ask(node, &digest, |reply| Command::Download { namespace, layout, class, extent, reply });
        drop(begun);
        let peers = from.iter().map(|node| self.peer(*node)).collect();
        self.command(node, &digest, Command::Peers { digest, peers });
        self.ask(node, &digest, |reply| Command::Wait { digest, reply })
    }

    /// Runs until the answer is there, for at most `limit`.
    pub(crate) fn answer<T>(&mut self, answer: &mut oneshot::Receiver<T>, limit: Duration) -> Option<T> {
        let until = self.now + limit;
        loop {
            if let Ok(value) = answer.try_recv() {
                return Some(value);
            }
            if !self.step(until) {
                return None;
            }
        }
    }

    /// Reads a range as a reader does, waiting for pieces.
    pub(crate) fn read(
        &mut self,
        node: usize,
        layout: &Layout,
        range: Range<u64>,
        limit: Duration,
    ) -> Result<Vec<u8>, Error> {
        let digest = *layout.digest();
        let alive = Arc::new(());
        let weak = Arc::downgrade(&alive);
        let mut opened =
            self.ask(node, &digest, |reply| Command::Read { digest, range: range.clone(), alive: weak, reply });
        let reading = self.answer(&mut opened, limit).expect("no answer to a reader")?;
        let whole = range == (0..layout.length());
        let mut bytes = Vec::new();
        for piece in layout.geometry().covering(range.clone()) {
            let index = layout.geometry().piece(piece).unwrap();
            let bounds = layout.geometry().range(index);
            let all = whole && bounds.end == layout.length();
            let here = if all { reading.blob.pieces().is_full() } else { reading.blob.pieces().has(index) };
            if !here {
                let reader = reading.id;
                let await_piece = |reply| Command::Await { digest, reader, piece, all, patience: limit, reply };
                let mut come = self.ask(node, &digest, await_piece);
                self.answer(&mut come, limit * 2).expect("no answer to a waiting reader")?;
            }
            let part = range.start.max(bounds.start)..range.end.min(bounds.end);
            let store = self.nodes[node].store.clone().unwrap();
            bytes.extend_from_slice(&store.read_or_allocate(&reading.blob, part).unwrap());
        }
        Ok(bytes)
    }

    // --- time ---

    fn schedule(&mut self, at: Instant, action: Action) {
        self.next += 1;
        self.queue.insert((at.max(self.now), self.next), action);
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        while self.step(until) {}
    }

    /// Runs until the condition holds; false where it does not within `limit`.
    pub(crate) fn run_until(&mut self, limit: Duration, mut condition: impl FnMut(&mut Self) -> bool) -> bool {
        let until = self.now + limit;
        loop {
            if condition(self) {
                return true;
            }
            if !self.step(until) {
                return false;
            }
        }
    }

    /// The next thing that happens; false, and the time is `until`, where nothing does before.
    fn step(&mut self, until: Instant) -> bool {
        self.steps += 1;
        assert!(self.steps < STEPS_MAX, "going in circles at {:?}, seed {}", self.now, self.seed);
        let Some(next) = self.queue.first_entry().filter(|next| next.key().0 <= until) else {
            self.now = self.now.max(until);
            return false;
        };
        let ((at, _), action) = next.remove_entry();
        self.now = at;
        self.act(action);
        true
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Happen { at, event } => self.happen(at, event),
            Action::Tick { at } => {
                if let Some(shard) = self.shard(at)
                    && shard.tick.is_some_and(|tick| tick <= self.now)
                {
                    let shard = self.shard_mut(at);
                    shard.tick = None;
                    self.turn(at, None);
                }
            }
            Action::Knock { end, at, socket, to } => self.knock(end, at, socket, to),
            Action::Deliver { to, bytes } => {
                if self.is_cut(to) {
                    return self.held.push(Action::Deliver { to, bytes });
                }
                if let Some(end) = self.ends.get_mut(&to) {
                    end.inbound.push_back(bytes);
                }
                self.try_recv(to);
            }
            Action::Fin { to } => {
                if self.is_cut(to) {
                    return self.held.push(Action::Fin { to });
                }
                if let Some(end) = self.ends.get_mut(&to) {
                    end.fin = true;
                }
                self.try_recv(to);
                self.try_send(to);
            }
        }
    }

    fn is_cut(&self, end: EndId) -> bool {
        [end, end.other()].iter().any(|end| self.ends.get(end).is_some_and(|end| self.cut.contains(&end.node)))
    }

    fn shard(&self, at: At) -> Option<&Shard> {
        let node = &self.nodes[at.node];
        (node.life == at.life).then(|| &node.shards[at.shard])
    }

    fn shard_mut(&mut self, at: At) -> &mut Shard {
        &mut self.nodes[at.node].shards[at.shard]
    }

    fn happen(&mut self, at: At, event: Event) {
        if self.shard(at).is_some() {
            self.turn(at, Some(event));
        }
    }

    /// One turn of a shard, as the real driver makes it.
    fn turn(&mut self, at: At, event: Option<Event>) {
        let now = self.now;
        let event = event.and_then(|event| self.unpack(at, event));
        let core = &mut self.shard_mut(at).core;
        if let Some(event) = event {
            core.handle(now, event);
        }
        core.tick(now);
        while let Some(effect) = self.shard_mut(at).core.poll() {
            self.carry_out(at, effect);
        }
        let shard = self.shard_mut(at);
        if let Some(deadline) = shard.core.deadline()
            && shard.tick.is_none_or(|tick| deadline < tick)
        {
            shard.tick = Some(deadline.max(now));
            self.schedule(deadline, Action::Tick { at });
        }
    }

    fn unpack(&mut self, at: At, event: Event) -> Option<Event> {
        let Event::Command(Command::Adopt { carried, from, hello }) = event else { return Some(event) };
        let Carried::Simulated(Wire { end }) = carried else { return None };
        let socket = self.shard_mut(at).core.next_socket();
        self.shard_mut(at).sockets.insert(socket, end);
        self.ends.get_mut(&end)?.holder = Some((at, socket));
        Some(Event::Adopted { socket, from, hello })
    }

    fn carry_out(&mut self, at: At, effect: Effect) {
        match effect {
            Effect::Dial { socket, to } => {
                let end = EndId(self.next_end);
                self.next_end += 2;
                self.ends.insert(end, End::new(at.node, Some((at, socket))));
                self.shard_mut(at).sockets.insert(socket, end);
                self.schedule(self.now + self.net.latency, Action::Knock { end, at, socket, to });
            }
            Effect::HandOver { socket, to, from, hello } => {
                let Some(end) = self.shard_mut(at).sockets.remove(&socket) else { return };
                let carried = Carried::Simulated(Wire { end });
                let event = Event::Command(Command::Adopt { carried, from, hello });
                self.schedule(self.now, Action::Happen { at: At { shard: to, ..at }, event });
            }
            Effect::Recv { socket, op } => match self.end_of(at, socket) {
                Some(end) => {
                    if let Some(end) = self.ends.get_mut(&end) {
                        assert!(end.recv.is_none(), "two receives at once");
                        end.recv = Some(op);
                    }
                    self.try_recv(end);
                }
                None => self.later(at, Event::Received { socket, result: Err(io::ErrorKind::NotConnected.into()), op }),
            },
            Effect::Send { socket, op } => match self.end_of(at, socket) {
                Some(end) => {
                    if let Some(end) = self.ends.get_mut(&end) {
                        assert!(end.send.is_none(), "two sends at once");
                        end.send = Some(op);
                    }
                    self.try_send(end);
                }
                None => self.later(at, Event::Sent { socket, result: Err(io::ErrorKind::NotConnected.into()), op }),
            },
            Effect::Close { socket } => {
                if let Some(end) = self.shard_mut(at).sockets.remove(&socket) {
                    self.close(end);
                }
            }
            Effect::Job { token, job } => {
                let (outcome, took) = self.work(at.node, job);
                let free = self.nodes[at.node].workers_free.max(self.now) + took;
                self.nodes[at.node].workers_free = free;
                self.schedule(free, Action::Happen { at, event: Event::Done { token, outcome } });
            }
            Effect::Answer(answer) => answer.give(),
            Effect::Tell { to, message } => {
                let event = Event::Command(Command::Told(message));
                self.schedule(self.now, Action::Happen { at: At { shard: to, ..at }, event });
            }
        }
    }

    fn work(&mut self, node: usize, job: Job) -> (Outcome, Duration) {
        let bytes = match &job {
            Job::Piece(piece) => piece.buf.len() as u64,
            Job::Read { range, .. } => range.end - range.start,
            _ => 0,
        };
        let store = self.nodes[node].store.clone().unwrap();
        let took = Duration::from_nanos(bytes * 1_000_000_000 / WORKER_BYTES_PER_S);
        (job.run(&store), JOB_TIME + took)
    }

    fn later(&mut self, at: At, event: Event) {
        self.schedule(self.now, Action::Happen { at, event });
    }

    // --- the network ---

    fn end_of(&self, at: At, socket: SocketId) -> Option<EndId> {
        self.shard(at)?.sockets.get(&socket).copied().filter(|end| self.ends.get(end).is_some_and(|end| !end.closed))
    }

    fn knock(&mut self, end: EndId, at: At, socket: SocketId, to: SocketAddr) {
        let node = self.nodes.iter().position(|node| node.addr == to);
        if self.cut.contains(&at.node) || node.is_some_and(|node| self.cut.contains(&node)) {
            return self.held.push(Action::Knock { end, at, socket, to });
        }
        if self.ends.get(&end).is_none_or(|end| end.closed) {
            return;
        }
        let back = self.now + self.net.latency;
        let happen = |result| Action::Happen { at, event: Event::Dialed { socket, result } };
        let Some(node) = node.filter(|node| self.is_listening(*node)) else {
            self.ends.remove(&end);
            return self.schedule(back, happen(Err(io::ErrorKind::ConnectionRefused.into())));
        };
        self.schedule(back, happen(Ok(())));
        let other = end.other();
        if let Resident::Rogue(says) = &self.nodes[node].resident {
            let says = says.clone();
            self.ends.insert(other, End::new(node, None));
            self.send_bytes(other, says);
            return;
        }
        let shards = self.nodes[node].shards.len() as u64;
        let shard = usize::try_from(self.rng.below(shards)).unwrap();
        let there = At { node, life: self.nodes[node].life, shard };
        let accepted = self.shard_mut(there).core.next_socket();
        self.shard_mut(there).sockets.insert(accepted, other);
        self.ends.insert(other, End::new(node, Some((there, accepted))));
        let from = SocketAddr::new(self.nodes[at.node].addr.ip(), 40_000);
        self.happen(there, Event::Accepted { socket: accepted, from });
    }

    fn is_listening(&self, node: usize) -> bool {
        matches!(self.nodes[node].resident, Resident::Rogue(_)) || !self.nodes[node].shards.is_empty()
    }

    fn send_bytes(&mut self, from: EndId, bytes: Bytes) {
        let to = from.other();
        let node = self.ends[&from].node;
        let free = self.nodes[node].uplink_free.max(self.now);
        let took = Duration::from_nanos(bytes.len() as u64 * 1_000_000_000 / self.net.bytes_per_s);
        self.nodes[node].uplink_free = free + took;
        let Some(end) = self.ends.get_mut(&to) else { return };
        end.afloat += bytes.len();
        end.arrives = end.arrives.max(free + took + self.net.latency);
        let arrives = end.arrives;
        self.schedule(arrives, Action::Deliver { to, bytes });
    }

    fn try_send(&mut self, id: EndId) {
        let afloat = self.ends.get(&id.other()).map(|other| other.afloat);
        let Some(end) = self.ends.get_mut(&id) else { return };
        let Some((at, socket)) = end.holder else { return };
        let Some(mut op) = end.send.take() else { return };
        let room = WINDOW.saturating_sub(afloat.unwrap_or(0));
        if end.fin || end.closed || afloat.is_none() {
            return self.later(at, Event::Sent { socket, result: Err(io::ErrorKind::BrokenPipe.into()), op });
        }
        if room == 0 {
            end.send = Some(op);
            return;
        }
        let mut bytes = op.parts().concat();
        bytes.truncate(room);
        let n = bytes.len();
        op.left(n);
        self.send_bytes(id, bytes.into());
        self.later(at, Event::Sent { socket, result: Ok(n), op });
    }

    fn try_recv(&mut self, id: EndId) {
        let Some(end) = self.ends.get_mut(&id) else { return };
        let (waiting, fin) = (end.waiting(), end.fin || end.closed);
        let Some((at, socket)) = end.holder else { return };
        let Some(mut op) = end.recv.take_if(|op| waiting >= op.want || fin) else { return };
        let mut n = 0;
        for target in op.targets() {
            let mut target = &mut target[..];
            while !target.is_empty()
                && let Some(front) = end.inbound.front_mut()
            {
                let take = front.len().min(target.len());
                let (now, later) = target.split_at_mut(take);
                front.copy_to_slice(now);
                target = later;
                n += take;
                if front.is_empty() {
                    end.inbound.pop_front();
                }
            }
        }
        op.arrived(n);
        end.afloat -= n;
        self.later(at, Event::Received { socket, result: Ok(n), op });
        self.try_send(id.other());
    }

    fn close(&mut self, id: EndId) {
        let Some(end) = self.ends.get_mut(&id) else { return };
        if std::mem::replace(&mut end.closed, true) {
            return;
        }
        end.inbound.clear();
        self.try_recv(id);
        self.try_send(id);
        let arrives = self.ends.get(&id.other()).map_or(self.now, |other| other.arrives);
        self.schedule(arrives.max(self.now + self.net.latency), Action::Fin { to: id.other() });
    }
}

pub(crate) fn layout_of(blob: &[u8]) -> Arc<Layout> {
    let mut builder = LayoutBuilder::new(Algorithm::Sha256);
    builder.update(blob).unwrap();
    Arc::new(builder.finish())
}
