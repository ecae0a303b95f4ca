//! Virtual hosts, links and a clock around the shipping cores.
//!
//! Each host runs the real download, announce schedule and, for the tracker, hand-out. What is modelled is only what lies between them:
//!
//! - A host's uplink sends one piece at a time, in the order asked, at its rate. Its downlink takes bytes at its rate; a piece may
//!   arrive while it is being sent, and waits where several come at once. A zone's link in from outside is a third such server.
//!   Or connections share the links: see [`shared`].
//! - Messages without payload take the latency and no bandwidth. Opening a channel takes three latencies, proving and storing a piece a
//!   fixed time.
//! - A host that dies says nothing: dials to it fail after a while, requests to it are never answered.
//! - The tracker is one queue with a service time.

mod shared;

use peer_proto::{
    Digest, Instant, PeerId, PieceIndex, PieceSet,
    announce::{self, Announcer, Blob, Node as Me, Request, Response, State},
    handout::{self, Handout, Origin},
    layout::Geometry,
    ring::Ring,
    swarm::{self, Class, Effect, Event, Has, Reject, SendOnce, Slot, Swarm, Verdict},
    wire::Zone,
};
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    net::{Ipv4Addr, SocketAddr},
};

/// Time a dial to a dead host takes to fail.
const DIAL_TIMEOUT: u64 = 3 * SECOND;
/// The tracker's service time for a request, and for each blob in it.
const TRACKER_REQUEST: u64 = 20_000;
const TRACKER_BLOB: u64 = 2_000;
/// Peers that a download aims at.
const DEGREE: u16 = swarm::Config::new(PeerId::new([0; 20]), 0).degree;
/// One second in the clock's unit.
pub(crate) const SECOND: u64 = 1_000_000_000;

/// A host as the scenario wants it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostPlan {
    /// Bytes a second.
    pub(crate) up: u64,
    /// Bytes a second.
    pub(crate) down: u64,
    pub(crate) zone: u16,
    pub(crate) origin: bool,
    /// Sends wrong pieces.
    pub(crate) liar: bool,
    pub(crate) dies_at: Option<u64>,
}

/// Someone wants blobs on a host.
#[derive(Clone, Debug)]
pub(crate) struct Pull {
    pub(crate) host: u32,
    pub(crate) at: u64,
    pub(crate) blobs: Vec<u16>,
    /// Somebody consumes the first blob in order at this rate, bytes a second.
    pub(crate) reader: Option<u64>,
    /// What the time is divided by.
    pub(crate) ideal: u64,
    /// Counted apart, or not at all.
    pub(crate) group: Group,
}

/// Which distribution a pull's time goes into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Group {
    /// The scenario's figure.
    Counted,
    /// Expected to be slow: watched only for whether it ends.
    Apart,
}

/// Everything a run depends on.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// Origins first.
    pub(crate) hosts: Vec<HostPlan>,
    /// Lengths.
    pub(crate) blobs: Vec<u64>,
    /// Piece length, where not the layout's own choice.
    pub(crate) piece: Option<u32>,
    pub(crate) pulls: Vec<Pull>,
    pub(crate) network: Network,
    /// Bytes a second into each zone from outside.
    pub(crate) zone_rate: Option<u64>,
    /// Origins that hold each blob.
    pub(crate) replicas: usize,
    pub(crate) tuning: Tuning,
    /// The run is stopped then.
    pub(crate) end: u64,
}

/// What lies between hosts, and what a piece waits for once it is there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Network {
    /// One way, nanoseconds.
    pub(crate) latency: u64,
    /// Proving and storing a piece, nanoseconds.
    pub(crate) proof: u64,
    /// Connections share the links, each of which queues so many bytes; none: a link takes one piece at a time.
    pub(crate) queue: Option<u64>,
}

/// Figures that are tried out; none: as shipped.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tuning {
    pub(crate) degree: Option<u16>,
    pub(crate) per_peer: Option<u16>,
    pub(crate) in_flight: Option<u16>,
    pub(crate) window_min: Option<u32>,
    pub(crate) window_exponent: Option<u8>,
    pub(crate) origin_exponent: Option<u8>,
    pub(crate) head_percent: Option<u8>,
    pub(crate) origin_head_percent: Option<u8>,
}

/// One pull's times, nanoseconds since it began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) host: u32,
    pub(crate) at: u64,
    pub(crate) ideal: u64,
    pub(crate) group: Group,
    /// All blobs whole.
    pub(crate) done: Option<u64>,
    /// The reader has its first piece.
    pub(crate) first: Option<u64>,
    /// The reader has consumed all.
    pub(crate) read: Option<u64>,
    /// The host died.
    pub(crate) died: bool,
}

/// What a run gave.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) samples: Vec<Sample>,
    /// Bytes sent by origins, by blob.
    pub(crate) origin_bytes: Vec<u64>,
    /// Bytes that crossed into zones, by zone.
    pub(crate) zone_bytes: Vec<u64>,
    pub(crate) tracker_requests: u64,
    pub(crate) wrong_sent: u64,
    pub(crate) wrong_accepted: u64,
    pub(crate) pieces_sent: u64,
    /// Right, and not there yet.
    pub(crate) pieces_taken: u64,
    pub(crate) events: u64,
    pub(crate) ended: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Wire {
    to: u32,
    from: u32,
    piece: u32,
    blob: u16,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Pull(u32),
    Die(u32),
    Tick { host: u32, blob: u16 },
    AnnounceTick { host: u32 },
    TrackerIn { host: u32 },
    TrackerOut { host: u32 },
    Open(Wire),
    Opened(Wire, bool),
    Closed(Wire),
    Elsewhere(Wire),
    Request(Wire),
    Cancel(Wire),
    Judged(Wire, bool),
    UpDone { host: u32 },
    ChunkSent { host: u32 },
    ChunkReceived { host: u32 },
    Have { host: u32, blob: u16, piece: u32 },
    Told(Wire),
    HaveAll { host: u32, blob: u16 },
    LayoutHolds { host: u32, blob: u16 },
}

struct Node {
    plan: HostPlan,
    alive: bool,
    up_busy: bool,
    up_queue: VecDeque<Wire>,
    down_free: u64,
    /// Of links that connections share.
    ends: shared::Ends,
    announcer: Announcer,
    announce_tick: u64,
    request: Option<Request>,
    response: Option<Response>,
    holdings: Vec<Holding>,
}

/// A blob at a host.
struct Holding {
    blob: u16,
    pull: u32,
    /// None: whole.
    swarm: Option<Box<Swarm>>,
    /// Hosts with an open channel.
    channels: Vec<u32>,
    tick: u64,
    /// Pieces of the unbroken start.
    prefix: u32,
    /// When the reader has consumed them.
    consumed: u64,
    /// An origin's.
    once: Option<SendOnce>,
}

pub(crate) struct World {
    plan: Plan,
    now: u64,
    seq: u64,
    heap: BinaryHeap<Reverse<(u64, u64, Kind)>>,
    nodes: Vec<Node>,
    geometry: Vec<Geometry>,
    digests: Vec<Digest>,
    tracker: Handout,
    tracker_free: u64,
    zone_free: Vec<u64>,
    pending: usize,
    /// Blobs missing, by pull.
    missing: Vec<usize>,
    out: Outcome,
}

fn peer_id(host: u32) -> PeerId {
    let mut id = [0; 20];
    // Names in no order, as real ones are.
    id[..8].copy_from_slice(&super::mix(u64::from(host)).to_le_bytes());
    id[16..].copy_from_slice(&host.to_le_bytes());
    PeerId::new(id)
}

fn host_of(id: &PeerId) -> u32 {
    let bytes = id.as_bytes();
    u32::from_le_bytes([bytes[16], bytes[17], bytes[18], bytes[19]])
}

fn addr(host: u32) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::from(0x0a00_0000 | host), 16001))
}

fn at(nanos: u64) -> Instant {
    Instant::from_nanos(nanos)
}

/// Time for bytes at a rate.
fn span(bytes: u64, rate: u64) -> u64 {
    u64::try_from(u128::from(bytes) * u128::from(SECOND) / u128::from(rate.max(1))).unwrap_or(u64::MAX)
}

impl World {
    pub(crate) fn new(plan: Plan) -> anyhow::Result<Self> {
        let geometry = plan.blobs.iter().map(|length| {
            let geometry = plan.piece.map_or_else(|| Geometry::of(*length), |piece| Geometry::new(*length, piece));
            geometry.ok_or_else(|| anyhow::anyhow!("no geometry for a blob of {length} bytes"))
        });
        let geometry = geometry.collect::<anyhow::Result<Vec<_>>>()?;
        let digests: Vec<Digest> = (0..plan.blobs.len() as u64)
            .map(|blob| {
                let mut bytes = [0; 32];
                bytes[..8].copy_from_slice(&super::mix(plan.seed ^ super::mix(blob)).to_le_bytes());
                bytes[8..16].copy_from_slice(&blob.to_le_bytes());
                Digest::sha256(bytes)
            })
            .collect();
        let mut tracker = Handout::new(handout::Config {
            seed: super::mix(plan.seed),
            replicas: plan.replicas,
            ..handout::Config::default()
        });
        let origins = (0u32..).zip(&plan.hosts).filter(|(_, host)| host.origin);
        let origins: Vec<Origin> = origins
            .map(|(host, of)| Origin {
                label: format!("origin-{host}").into(),
                id: peer_id(host),
                addr: addr(host),
                zone: zone_name(of.zone),
            })
            .collect();
        let ring = Ring::new(origins.iter().map(|origin| origin.label.clone()))?;
        let owners: Vec<Vec<u32>> = digests
            .iter()
            .map(|digest| {
                let owners = ring.owners(digest, plan.replicas);
                owners.iter().filter_map(|label| label.strip_prefix("origin-")?.parse().ok()).collect()
            })
            .collect();
        tracker.handle(Instant::ZERO, handout::Event::Origins { ring, origins });
        let trackers = Ring::new(["tracker"])?;
        let nodes = (0u32..).zip(&plan.hosts).map(|(host, of)| {
            let me = Me { id: peer_id(host), addr: addr(host), zone: zone_name(of.zone), origin: of.origin };
            let holdings = (0u16..).zip(&owners).filter(|(_, owners)| owners.contains(&host));
            Node {
                plan: *of,
                alive: true,
                up_busy: false,
                up_queue: VecDeque::new(),
                down_free: 0,
                ends: shared::Ends::default(),
                announcer: Announcer::new(me, trackers.clone(), super::mix(plan.seed ^ u64::from(host) << 20)),
                announce_tick: u64::MAX,
                request: None,
                response: None,
                holdings: holdings.map(|(blob, _)| Holding::whole(blob)).collect(),
            }
        });
        let nodes = nodes.collect();
        let zones = plan.hosts.iter().map(|host| usize::from(host.zone) + 1).max().unwrap_or(1);
        let mut world = Self {
            now: 0,
            seq: 0,
            heap: BinaryHeap::new(),
            nodes,
            geometry,
            digests,
            tracker,
            tracker_free: 0,
            zone_free: vec![0; zones],
            pending: plan.pulls.len(),
            missing: plan.pulls.iter().map(|pull| pull.blobs.len()).collect(),
            out: Outcome {
                origin_bytes: vec![0; plan.blobs.len()],
                zone_bytes: vec![0; zones],
                samples: plan.pulls.iter().map(Sample::new).collect(),
                ..Outcome::default()
            },
            plan,
        };
        for (number, pull) in (0..).zip(world.plan.pulls.clone()) {
            world.schedule(pull.at, Kind::Pull(number));
        }
        for (host, of) in (0..).zip(world.plan.hosts.clone()) {
            of.dies_at.into_iter().for_each(|dies_at| world.schedule(dies_at, Kind::Die(host)));
        }
        Ok(world)
    }

    fn schedule(&mut self, at: u64, kind: Kind) {
        self.seq += 1;
        self.heap.push(Reverse((at, self.seq, kind)));
    }

    /// Until every pull is done, or the plan's end.
    pub(crate) fn run(mut self) -> Outcome {
        while self.pending > 0 {
            let Some(Reverse((time, _, kind))) = self.heap.pop() else { break };
            if time > self.plan.end {
                break;
            }
            self.now = time;
            self.out.events += 1;
            self.step(kind);
        }
        self.out.ended = self.now;
        self.out
    }

    fn step(&mut self, kind: Kind) {
        match kind {
            Kind::Pull(pull) => self.pull(pull),
            Kind::Die(host) => self.die(host),
            Kind::Tick { host, blob } => self.tick(host, blob),
            Kind::AnnounceTick { host } => self.announce_tick(host),
            Kind::TrackerIn { host } => self.tracker_in(host),
            Kind::TrackerOut { host } => self.tracker_out(host),
            Kind::Open(wire) => self.open(wire),
            Kind::Opened(wire, taken) => self.opened(wire, taken),
            Kind::Closed(wire) => self.closed(wire),
            Kind::Elsewhere(wire) => self.elsewhere(wire),
            Kind::Request(wire) => self.request(wire),
            Kind::Cancel(wire) if self.plan.network.queue.is_some() => self.cancel_shared(wire),
            Kind::Cancel(wire) => {
                let queue = &mut self.nodes[wire.from as usize].up_queue;
                if let Some(at) = queue.iter().position(|queued| *queued == wire) {
                    queue.remove(at);
                }
            }
            Kind::Judged(wire, wrong) => self.judged(wire, wrong),
            Kind::UpDone { host } => {
                self.nodes[host as usize].up_busy = false;
                self.send(host);
            }
            Kind::ChunkSent { host } => self.chunk_sent(host),
            Kind::ChunkReceived { host } => self.chunk_received(host),
            Kind::Have { host, blob, piece } => self.have(host, blob, piece),
            Kind::Told(wire) => self.told(wire),
            Kind::HaveAll { host, blob } => self.have_all(host, blob),
            Kind::LayoutHolds { host, blob } => self.tell(host, blob, Event::LayoutHolds),
        }
    }

    fn holding(&mut self, host: u32, blob: u16) -> Option<&mut Holding> {
        let node = &mut self.nodes[host as usize];
        node.holdings.iter_mut().find(|holding| holding.blob == blob).filter(|_| node.alive)
    }

    fn pull(&mut self, number: u32) {
        let pull = self.plan.pulls[number as usize].clone();
        if !self.nodes[pull.host as usize].alive {
            return self.finished(number);
        }
        for blob in pull.blobs {
            let geometry = self.geometry[usize::from(blob)];
            let seed = super::mix(self.plan.seed ^ super::mix(u64::from(pull.host) << 16 | u64::from(blob)));
            let mut config = swarm::Config::new(peer_id(pull.host), seed);
            config.degree = self.plan.tuning.degree.unwrap_or(config.degree);
            config.per_peer = self.plan.tuning.per_peer.unwrap_or(config.per_peer);
            config.in_flight_min = self.plan.tuning.in_flight.unwrap_or(config.in_flight_min);
            config.in_flight_max = self.plan.tuning.in_flight.unwrap_or(config.in_flight_max);
            config.window_min = self.plan.tuning.window_min.unwrap_or(config.window_min);
            config.window_exponent = self.plan.tuning.window_exponent.unwrap_or(config.window_exponent);
            config.origin_exponent = self.plan.tuning.origin_exponent.unwrap_or(config.origin_exponent);
            config.head_percent = self.plan.tuning.head_percent.unwrap_or(config.head_percent);
            config.origin_head_percent = self.plan.tuning.origin_head_percent.unwrap_or(config.origin_head_percent);
            let swarm = Swarm::new(config, geometry, PieceSet::new(&geometry), Class::Foreground);
            self.nodes[pull.host as usize].holdings.push(Holding {
                pull: number,
                swarm: Some(Box::new(swarm)),
                ..Holding::whole(blob)
            });
            if pull.reader.is_some() {
                let pieces = (0..geometry.pieces()).into();
                self.tell(pull.host, blob, Event::Reader { id: swarm::ReaderId(0), pieces });
            }
            self.tell(pull.host, blob, Event::Tick);
        }
        self.share(pull.host);
    }

    /// Splits the host's requests among its downloads.
    fn share(&mut self, host: u32) {
        let active: Vec<u16> = self.nodes[host as usize]
            .holdings
            .iter()
            .filter(|holding| holding.swarm.is_some())
            .map(|holding| holding.blob)
            .collect();
        let in_flight = swarm::share(active.len());
        for blob in active {
            self.tell(host, blob, Event::Budget { in_flight });
        }
    }

    fn finished(&mut self, pull: u32) {
        let sample = &mut self.out.samples[pull as usize];
        if sample.done.is_none() && !sample.died {
            self.pending -= 1;
        }
    }

    fn die(&mut self, host: u32) {
        let node = &mut self.nodes[host as usize];
        node.alive = false;
        node.up_queue.clear();
        let pulls: Vec<u32> =
            (0..).zip(&self.plan.pulls).filter(|(_, pull)| pull.host == host).map(|(n, _)| n).collect();
        for pull in pulls {
            self.finished(pull);
            self.out.samples[pull as usize].died = true;
        }
    }

    /// Gives a download an event and carries its effects out.
    fn tell(&mut self, host: u32, blob: u16, event: Event<'_>) {
        let now = at(self.now);
        let Some(swarm) = self.holding(host, blob).and_then(|holding| holding.swarm.as_mut()) else { return };
        swarm.handle(now, event);
        self.pump(host, blob);
    }

    fn pump(&mut self, host: u32, blob: u16) {
        let latency = self.plan.network.latency;
        loop {
            let Some(holding) = self.holding(host, blob) else { return };
            let Some(swarm) = holding.swarm.as_mut() else { return };
            let Some(effect) = swarm.poll() else { break };
            let wire = |to: Slot, piece: PieceIndex| Wire { to: host, from: to.0, piece: piece.get(), blob };
            match effect {
                Effect::Connect(candidate) => {
                    let to = host_of(&candidate.id);
                    let wait = 2 * (latency + self.wait(host, to));
                    self.schedule(self.now + wait, Kind::Open(Wire { to, from: host, piece: 0, blob }));
                }
                Effect::Request { slot, piece } => self.message(host, slot.0, Kind::Request(wire(slot, piece))),
                Effect::Cancel { slot, piece } => self.message(host, slot.0, Kind::Cancel(wire(slot, piece))),
                Effect::Drop { slot } | Effect::Ban { slot, .. } => self.close(host, slot.0, blob),
                Effect::SuspectLayout { .. } => {
                    self.schedule(self.now + 4 * latency, Kind::LayoutHolds { host, blob });
                }
                Effect::WantPeers(want) => {
                    let (have, pieces) = (swarm.have().count(), swarm.have().pieces());
                    // As agents do.
                    let degree = self.plan.tuning.degree.unwrap_or(DEGREE);
                    let peers = degree.saturating_sub(want);
                    self.announce(host, blob, State::Leeching { have, pieces, peers, want });
                }
                Effect::Complete => return self.complete(host, blob),
            }
        }
        let now = self.now;
        let Some(holding) = self.holding(host, blob) else { return };
        if let Some(due) = holding.swarm.as_ref().and_then(|swarm| swarm.deadline()) {
            let due = due.as_nanos().max(now);
            if due < holding.tick {
                holding.tick = due;
                self.schedule(due, Kind::Tick { host, blob });
            }
        }
    }

    fn tick(&mut self, host: u32, blob: u16) {
        let now = self.now;
        let Some(holding) = self.holding(host, blob) else { return };
        if holding.tick > now {
            return;
        }
        holding.tick = u64::MAX;
        let due = holding.swarm.as_ref().and_then(|swarm| swarm.deadline());
        if due.is_some_and(|due| due.as_nanos() <= now) {
            self.tell(host, blob, Event::Tick);
        } else {
            self.pump(host, blob);
        }
    }

    fn complete(&mut self, host: u32, blob: u16) {
        let Some(holding) = self.holding(host, blob) else { return };
        holding.swarm = None;
        let pull = holding.pull;
        self.missing[pull as usize] -= 1;
        if self.missing[pull as usize] == 0 {
            self.finished(pull);
            let sample = &mut self.out.samples[pull as usize];
            sample.done = Some(self.now - sample.at);
        }
        self.schedule(self.now + self.plan.network.latency, Kind::HaveAll { host, blob });
        self.announce(host, blob, State::Seeding { peers: 0 });
        self.share(host);
    }

    // --- the tracker ---

    fn announce(&mut self, host: u32, blob: u16, state: State) {
        let digest = self.digests[usize::from(blob)];
        let now = at(self.now);
        self.nodes[host as usize].announcer.handle(now, announce::Event::Blob(Blob { digest, state }));
        self.pump_announcer(host);
    }

    fn announce_tick(&mut self, host: u32) {
        let now = self.now;
        let node = &mut self.nodes[host as usize];
        if !node.alive || node.announce_tick > now {
            return;
        }
        node.announce_tick = u64::MAX;
        if node.announcer.deadline().is_some_and(|due| due.as_nanos() <= now) {
            node.announcer.handle(at(now), announce::Event::Tick);
        }
        self.pump_announcer(host);
    }

    fn pump_announcer(&mut self, host: u32) {
        while let Some(effect) = self.nodes[host as usize].announcer.poll() {
            match effect {
                announce::Effect::Send { request, .. } => {
                    self.nodes[host as usize].request = Some(request);
                    self.schedule(self.now + self.plan.network.latency, Kind::TrackerIn { host });
                }
                announce::Effect::Candidates { digest, peers } => {
                    let blob = u16::from_le_bytes([digest.as_bytes()[8], digest.as_bytes()[9]]);
                    self.tell(host, blob, Event::Candidates(&peers));
                }
            }
        }
        let now = self.now;
        let node = &mut self.nodes[host as usize];
        if let Some(due) = node.announcer.deadline() {
            let due = due.as_nanos().max(now);
            if due < node.announce_tick {
                node.announce_tick = due;
                self.schedule(due, Kind::AnnounceTick { host });
            }
        }
    }

    fn tracker_in(&mut self, host: u32) {
        let Some(request) = self.nodes[host as usize].request.take() else { return };
        self.out.tracker_requests += 1;
        let service = TRACKER_REQUEST + TRACKER_BLOB * request.blobs.len() as u64;
        self.tracker_free = self.tracker_free.max(self.now) + service;
        self.tracker.handle(at(self.now), handout::Event::Announce { token: u64::from(host), request: &request });
        while let Some(handout::Effect::Answer { response, .. }) = self.tracker.poll() {
            self.nodes[host as usize].response = Some(response);
            self.schedule(self.tracker_free + self.plan.network.latency, Kind::TrackerOut { host });
        }
    }

    fn tracker_out(&mut self, host: u32) {
        let now = at(self.now);
        let node = &mut self.nodes[host as usize];
        let Some(response) = node.response.take().filter(|_| node.alive) else { return };
        let tracker = announce::TrackerId(0);
        node.announcer.handle(now, announce::Event::Answered { tracker, response: &response });
        self.pump_announcer(host);
    }

    // --- channels ---

    /// Someone else's state, as a handshake tells it.
    fn connected(&mut self, host: u32, of: u32, blob: u16, dialed: bool) {
        let node = &self.nodes[of as usize];
        let Some(theirs) = node.holdings.iter().find(|holding| holding.blob == blob) else { return };
        let set = theirs.swarm.as_ref().map(|swarm| swarm.have().clone());
        let has = set.as_ref().map_or(Has::All, Has::Some);
        let (id, origin) = (peer_id(of), node.plan.origin);
        self.tell(host, blob, Event::Connected { slot: Slot(of), id, origin, dialed, has });
    }

    fn open(&mut self, wire: Wire) {
        let Wire { to, from, blob, .. } = wire;
        let answer = Wire { to: from, from: to, ..wire };
        if !self.nodes[to as usize].alive {
            return self.schedule(self.now + DIAL_TIMEOUT, Kind::Opened(answer, false));
        }
        let origin = self.nodes[to as usize].plan.origin;
        let holding = self.nodes[to as usize].holdings.iter().find(|holding| holding.blob == blob);
        let taken = holding.is_some_and(|holding| {
            holding.channels.contains(&from)
                || match &holding.swarm {
                    Some(swarm) => swarm.admits(&peer_id(from)),
                    None => swarm::admits_leecher(holding.channels.len(), origin),
                }
        });
        let asker = self.holding(from, blob).is_some_and(|holding| holding.swarm.is_some());
        if taken && asker {
            for (one, other) in [(to, from), (from, to)] {
                let channels = self.holding(one, blob).map(|holding| &mut holding.channels);
                channels
                    .into_iter()
                    .filter(|channels| !channels.contains(&other))
                    .for_each(|channels| channels.push(other));
            }
            self.connected(to, from, blob, false);
        }
        self.message(to, from, Kind::Opened(answer, taken && asker));
    }

    fn opened(&mut self, wire: Wire, taken: bool) {
        let Wire { to, from, blob, .. } = wire;
        let open = self.holding(to, blob).is_some_and(|holding| holding.channels.contains(&from));
        if taken && open {
            self.connected(to, from, blob, true);
        } else {
            self.tell(to, blob, Event::Failed { id: peer_id(from) });
        }
    }

    /// `host` closes its channel with `other`.
    fn close(&mut self, host: u32, other: u32, blob: u16) {
        for (one, two) in [(host, other), (other, host)] {
            self.holding(one, blob).into_iter().for_each(|holding| holding.channels.retain(|channel| *channel != two));
        }
        self.nodes[host as usize].up_queue.retain(|queued| !(queued.to == other && queued.blob == blob));
        self.nodes[other as usize].up_queue.retain(|queued| !(queued.to == host && queued.blob == blob));
        if self.plan.network.queue.is_some() {
            self.shut_shared(host, other, blob);
            self.shut_shared(other, host, blob);
        }
        self.message(host, other, Kind::Closed(Wire { to: other, from: host, piece: 0, blob }));
    }

    fn closed(&mut self, wire: Wire) {
        let open = self.holding(wire.to, wire.blob).is_some_and(|holding| holding.channels.contains(&wire.from));
        if !open {
            self.tell(wire.to, wire.blob, Event::Gone { slot: Slot(wire.from) });
        }
    }

    // --- pieces ---

    fn request(&mut self, wire: Wire) {
        let geometry = self.geometry[usize::from(wire.blob)];
        let (now, origin) = (at(self.now), self.nodes[wire.from as usize].plan.origin);
        let zone = Zone::of(&zone_name(self.nodes[wire.to as usize].plan.zone));
        let Some(holding) = self.holding(wire.from, wire.blob) else { return };
        if holding.channels.contains(&wire.to) {
            if let Some(piece) = geometry.piece(wire.piece).filter(|_| origin) {
                let leechers = holding.channels.len();
                let once = holding.once.get_or_insert_with(|| SendOnce::new(&geometry));
                if !once.allows(now, piece, zone, leechers) {
                    return self.message(wire.from, wire.to, Kind::Elsewhere(wire));
                }
            }
            if self.plan.network.queue.is_some() {
                return self.ask_shared(wire);
            }
            self.nodes[wire.from as usize].up_queue.push_back(wire);
            self.send(wire.from);
        }
    }

    fn elsewhere(&mut self, wire: Wire) {
        if let Some(piece) = self.geometry[usize::from(wire.blob)].piece(wire.piece) {
            let rejected = Event::Rejected { slot: Slot(wire.from), piece, reason: Reject::Elsewhere };
            self.tell(wire.to, wire.blob, rejected);
        }
    }

    /// Starts the next piece on a free uplink.
    fn send(&mut self, host: u32) {
        let node = &mut self.nodes[host as usize];
        if node.up_busy || !node.alive {
            return;
        }
        let (plan, wrong) = (node.plan, node.plan.liar);
        let next = loop {
            let Some(wire) = self.nodes[host as usize].up_queue.pop_front() else { return };
            if self.nodes[wire.to as usize].alive {
                break wire;
            }
        };
        let geometry = self.geometry[usize::from(next.blob)];
        let Some(piece) = geometry.piece(next.piece) else { return };
        let bytes = u64::from(geometry.piece_len(piece));
        let up_end = self.now + span(bytes, plan.up);
        let to = self.nodes[next.to as usize].plan;
        let mut arrives = up_end;
        if to.zone != plan.zone {
            let zone = usize::from(to.zone);
            self.out.zone_bytes[zone] += bytes;
            if let Some(rate) = self.plan.zone_rate {
                self.zone_free[zone] = self.zone_free[zone].max(self.now) + span(bytes, rate);
                arrives = arrives.max(self.zone_free[zone]);
            }
        }
        let down_free = &mut self.nodes[next.to as usize].down_free;
        *down_free = (*down_free).max(self.now) + span(bytes, to.down);
        arrives = arrives.max(*down_free) + self.plan.network.latency;
        if plan.origin {
            self.out.origin_bytes[usize::from(next.blob)] += bytes;
        }
        self.out.pieces_sent += 1;
        self.out.wrong_sent += u64::from(wrong);
        self.nodes[host as usize].up_busy = true;
        self.schedule(up_end, Kind::UpDone { host });
        self.schedule(arrives + self.plan.network.proof, Kind::Judged(next, wrong));
    }

    fn judged(&mut self, wire: Wire, wrong: bool) {
        let Wire { to, from, blob, piece } = wire;
        let Some(index) = self.geometry[usize::from(blob)].piece(piece) else { return };
        let now = at(self.now);
        let Some(swarm) = self.holding(to, blob).and_then(|holding| holding.swarm.as_mut()) else { return };
        let had = swarm.have().contains(index);
        let verdict = if wrong { Verdict::Wrong } else { Verdict::Good };
        swarm.handle(now, Event::Arrived { slot: Slot(from), piece: index, verdict });
        let has = swarm.have().contains(index);
        self.out.wrong_accepted += u64::from(wrong && has && !had);
        if has && !had {
            self.out.pieces_taken += 1;
            self.announce_piece(to, blob, piece);
            self.read(to, blob);
        }
        self.pump(to, blob);
    }

    /// Moves a reader over what has become the unbroken start.
    fn read(&mut self, host: u32, blob: u16) {
        let geometry = self.geometry[usize::from(blob)];
        let now = self.now;
        let node = &mut self.nodes[host as usize];
        let Some(holding) = node.holdings.iter_mut().find(|holding| holding.blob == blob) else { return };
        let pull = holding.pull;
        let Some(swarm) = holding.swarm.as_ref() else { return };
        let Some(rate) = self.plan.pulls[pull as usize].reader else { return };
        let (mut prefix, mut consumed) = (holding.prefix, holding.consumed);
        let mut first = None;
        while let Some(piece) = geometry.piece(prefix).filter(|piece| swarm.have().contains(*piece)) {
            first = first.or_else(|| (prefix == 0).then_some(now));
            consumed = consumed.max(now) + span(u64::from(geometry.piece_len(piece)), rate);
            prefix += 1;
        }
        (holding.prefix, holding.consumed) = (prefix, consumed);
        let sample = &mut self.out.samples[pull as usize];
        sample.first = sample.first.or_else(|| first.map(|first| first - sample.at));
        if prefix == geometry.pieces() {
            sample.read = Some(consumed - sample.at);
        }
    }

    /// Tells all with a channel of a piece.
    fn announce_piece(&mut self, host: u32, blob: u16, piece: u32) {
        if self.plan.network.queue.is_none() {
            // They hear of it all at once.
            return self.schedule(self.now + self.plan.network.latency, Kind::Have { host, blob, piece });
        }
        let channels = self.holding(host, blob).map(|holding| holding.channels.clone()).unwrap_or_default();
        for to in channels {
            self.message(host, to, Kind::Told(Wire { to, from: host, piece, blob }));
        }
    }

    fn told(&mut self, wire: Wire) {
        let Wire { to, from, blob, piece } = wire;
        if let Some(piece) = self.geometry[usize::from(blob)].piece(piece) {
            self.tell(to, blob, Event::Have { slot: Slot(from), piece });
        }
    }

    fn have(&mut self, host: u32, blob: u16, piece: u32) {
        let Some(index) = self.geometry[usize::from(blob)].piece(piece) else { return };
        let Some(holding) = self.holding(host, blob) else { return };
        for at in 0..holding.channels.len() {
            let Some(to) = self.holding(host, blob).and_then(|holding| holding.channels.get(at).copied()) else {
                return;
            };
            self.tell(to, blob, Event::Have { slot: Slot(host), piece: index });
        }
    }

    fn have_all(&mut self, host: u32, blob: u16) {
        let Some(holding) = self.holding(host, blob) else { return };
        for to in holding.channels.clone() {
            if self.holding(to, blob).is_some_and(|holding| holding.swarm.is_some()) {
                self.tell(to, blob, Event::HaveAll { slot: Slot(host) });
            } else {
                // Neither has a use for the other.
                for (one, two) in [(host, to), (to, host)] {
                    self.holding(one, blob).into_iter().for_each(|h| h.channels.retain(|channel| *channel != two));
                }
            }
        }
    }
}

fn zone_name(zone: u16) -> Box<str> {
    if zone == 0 { "".into() } else { format!("zone-{zone}").into() }
}

impl Holding {
    fn whole(blob: u16) -> Self {
        Self {
            blob,
            pull: u32::MAX,
            swarm: None,
            channels: Vec::new(),
            tick: u64::MAX,
            prefix: 0,
            consumed: 0,
            once: None,
        }
    }
}

impl Sample {
    fn new(pull: &Pull) -> Self {
        Self {
            host: pull.host,
            at: pull.at,
            ideal: pull.ideal,
            group: pull.group,
            done: None,
            first: None,
            read: None,
            died: false,
        }
    }
}
