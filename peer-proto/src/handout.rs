//! A tracker: who has what, and whom to dial.
//!
//! Its memory is rebuilt by announces; nothing is kept on disk. A blob's swarm should be a random graph in which everybody has
//! about the same number of links, since hosts with a poor neighbourhood make the tail:
//!
//! - Each peer handed out is the one with the fewest links of [`DRAWS`] drawn at random, so that the least connected are filled first
//!   while the graph stays random. A link is counted at both ends when it is handed out, and the count is put right by the
//!   next announce of either.
//! - A newcomer to a large swarm gets [`NEWCOMER_PERCENT`] of what it wants; later ones will dial it. What is missing then it gets at
//!   its next announce, which comes soon: hosts that want peers are told a short interval, stretched by their number.
//! - Origins come from the ring of the blob. Each is given to at most [`Config::origin_links`] unfinished hosts at a time, one to a
//!   host in a large swarm; who finishes makes room for the next. Once somebody else has the whole blob, only those get one who are
//!   still short of peers at their second announce: their first peers may be dead.
//! - Hosts of a zone are given to each other. One of them at a time, the zone's gateway, is also given sources outside, so that a
//!   blob crosses into a zone about once. A zone with an origin of its own, or a seed, needs none.
//!
//! A (host, blob) pair costs 24 bytes and the slack of two vectors; an announce costs a few lookups for each blob named and a few
//! draws for each peer handed out, whatever the size of the swarm.

use crate::{
    announce::{Node, PEERS_PER_BLOB_MAX, Request, Response, State},
    id::{Digest, PeerId},
    ring::Ring,
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

/// Members drawn for each one handed out.
const DRAWS: usize = 4;
/// Part of the peers it wants that a newcomer gets at once. The least connected are the last to come, so that whoever fills its degree from
/// those present links with hosts that came just before it: a chain in the order of arrival, along which pieces travel slowly. What is left open
/// now goes to later ones and, at the next announce, to anybody. At 2,600 hosts the start costs the least at 30; half and less than a quarter cost more.
const NEWCOMER_PERCENT: usize = 30;
/// Swarms up to this size are handed out whole, origins included.
const SMALL: usize = 8;
/// Peers with whom a host needs no origin where the blob is whole at another.
const FEW_PEERS: u16 = 2;
/// Most hosts of a zone that are given sources outside it, for each blob. Each asks origins for what nobody it knows has, and origins send a
/// piece into a zone once ([`crate::swarm::SendOnce`]), so that several cost little more than one, and are not held up by the slowest.
const GATEWAYS_MAX: usize = 4;
/// Least unfinished hosts of a zone that an origin is given to.
const ORIGIN_LINKS_MIN: usize = 2;
/// Most zones.
const ZONES_MAX: usize = 1 << 12;
/// What an announce costs a tracker beside its blobs, in what one blob of it costs: measured, 15,000 hosts with one blob each and with fifty.
const ANNOUNCE_COST: u64 = 16;
/// How often the expired are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// Bounds and times of a tracker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// For random choices.
    pub seed: u64,
    /// Links beyond which a host is not handed out.
    pub links_max: u16,
    /// Unfinished hosts that an origin is given to, for each blob.
    pub origin_links: usize,
    /// Origins that own a blob.
    pub replicas: usize,
    /// Silence after which a host is forgotten.
    pub ttl: Duration,
    /// Interval told to hosts that want peers, at least [`crate::announce::INTERVAL_MIN`].
    pub interval_wanting: Duration,
    /// Interval told to other downloading hosts.
    pub interval_leeching: Duration,
    /// Interval told to hosts that only seed.
    pub interval_seeding: Duration,
    /// Announces of one blob a second that intervals are stretched for; of those that want peers for many blobs, so many fewer as they
    /// cost more.
    pub rate_max: u32,
    /// Most hosts.
    pub hosts_max: usize,
    /// Most swarms.
    pub swarms_max: usize,
    /// Most (host, blob) pairs of a host.
    pub blobs_per_host_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 0,
            links_max: 14,
            origin_links: 10,
            replicas: 3,
            ttl: Duration::from_secs(100),
            interval_wanting: crate::announce::INTERVAL_MIN,
            interval_leeching: Duration::from_secs(5),
            interval_seeding: Duration::from_secs(30),
            rate_max: 10_000,
            hosts_max: 1 << 17,
            swarms_max: 1 << 17,
            blobs_per_host_max: crate::announce::ACTIVE_MAX,
        }
    }
}

/// An origin that agents may be sent to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    /// Its label on the ring.
    pub label: Box<str>,
    /// Its name among peers.
    pub id: PeerId,
    /// Where agents reach it.
    pub addr: SocketAddr,
    /// Its zone.
    pub zone: Box<str>,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// A node announced.
    Announce {
        /// The caller's name for the request.
        token: u64,
        /// What it says.
        request: &'a Request,
    },
    /// The ring of origins, or their addresses, changed.
    Origins {
        /// The ring, with health.
        ring: Ring,
        /// Those of its nodes whose addresses are known.
        origins: Vec<Origin>,
    },
    /// The time of [`Handout::deadline`] came.
    Tick,
}

/// What to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Answer a request.
    Answer {
        /// Which.
        token: u64,
        /// With what.
        response: Response,
    },
}

/// A tracker's size, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Size {
    /// Hosts known.
    pub hosts: usize,
    /// Blobs with at least one host.
    pub swarms: usize,
    /// (host, blob) pairs.
    pub members: usize,
}

/// A tracker's whole state.
pub struct Handout {
    config: Config,
    rng: Rng,
    ring: Ring,
    origins: Vec<Source>,
    zones: Vec<Box<str>>,
    hosts: Slab<Host>,
    by_id: BTreeMap<PeerId, u32>,
    swarms: Slab<Swarm>,
    by_digest: BTreeMap<Digest, u32>,
    members: usize,
    /// What the last announces cost together that wanted peers, see [`cost`].
    wanting: u64,
    effects: VecDeque<Effect>,
    sweep_at: Option<Instant>,
}

struct Source {
    label: Box<str>,
    candidate: Candidate,
    zone: u16,
}

struct Host {
    candidate: Candidate,
    zone: u16,
    seen: Instant,
    /// Blobs that its last announce wanted peers for.
    wants: u32,
    /// By swarm.
    spots: Vec<Spot>,
}

/// Where a host stands in a swarm.
struct Spot {
    swarm: u32,
    /// Place in its group's members.
    at: u32,
}

struct Swarm {
    digest: Digest,
    /// Members by zone; most swarms have one.
    groups: Vec<Group>,
    /// The hosts that each origin is given to.
    guests: Vec<Guest>,
}

struct Group {
    zone: u16,
    members: Vec<Member>,
    seeds: usize,
    /// Hosts that are also given sources outside, at most [`GATEWAYS_MAX`].
    gateways: Vec<u32>,
}

#[derive(Clone, Copy)]
struct Member {
    host: u32,
    links: u16,
    seed: bool,
}

struct Guest {
    origin: PeerId,
    host: u32,
}

impl Handout {
    /// A tracker that knows nobody.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            rng: Rng::new(config.seed),
            ring: Ring::default(),
            origins: Vec::new(),
            zones: Vec::new(),
            hosts: Slab::new(),
            by_id: BTreeMap::new(),
            swarms: Slab::new(),
            by_digest: BTreeMap::new(),
            members: 0,
            wanting: 0,
            effects: VecDeque::new(),
            sweep_at: None,
        }
    }

    /// How much it knows.
    pub fn size(&self) -> Size {
        Size { hosts: self.by_id.len(), swarms: self.by_digest.len(), members: self.members }
    }

    /// The next thing to do, until there is none.
    pub fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Event::Tick`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        self.sweep_at
    }

    /// Takes an event in.
    pub fn handle(&mut self, now: Instant, event: Event<'_>) {
        match event {
            Event::Announce { token, request } => {
                let response = self.announce(now, request);
                self.effects.push_back(Effect::Answer { token, response });
            }
            Event::Origins { ring, origins } => self.set_origins(ring, origins),
            Event::Tick => {}
        }
        if self.sweep_at.is_some_and(|at| at <= now) {
            self.sweep(now);
        }
        self.sweep_at = (!self.by_id.is_empty()).then(|| self.sweep_at.filter(|at| *at > now).unwrap_or(now + SWEEP));
    }

    fn set_origins(&mut self, ring: Ring, origins: Vec<Origin>) {
        self.origins = origins
            .into_iter()
            .take(crate::ring::NODES_MAX)
            .map(|Origin { label, id, addr, zone }| Source {
                label,
                candidate: Candidate { id, addr, origin: true },
                zone: self.zone(&zone),
            })
            .collect();
        self.ring = ring;
    }

    /// The number of a zone; beyond [`ZONES_MAX`] they share the first.
    fn zone(&mut self, name: &str) -> u16 {
        let at = self.zones.iter().position(|zone| **zone == *name).unwrap_or_else(|| {
            if self.zones.len() >= ZONES_MAX {
                return 0;
            }
            self.zones.push(name.into());
            self.zones.len() - 1
        });
        u16::try_from(at).unwrap_or(0)
    }

    fn announce(&mut self, now: Instant, request: &Request) -> Response {
        let known = self.by_id.get(&request.node.id).copied();
        let resend = known.is_none() && !request.full;
        if let (Some(host), true) = (known, request.full) {
            self.forget(host);
        }
        let Some(host) = self.host(now, &request.node) else {
            // Full: better a late answer than a wrong one.
            return Response { interval: self.config.interval_seeding, resend: false, blobs: Vec::new() };
        };
        let mut blobs = Vec::new();
        let mut wants = 0;
        for blob in &request.blobs {
            match blob.state {
                State::Gone => self.leave(host, &blob.digest),
                State::Seeding { peers } => {
                    self.join(host, &blob.digest, peers, true);
                }
                State::Leeching { peers, want, .. } => {
                    let Some((swarm, newcomer)) = self.join(host, &blob.digest, peers, false) else { continue };
                    if want > 0 {
                        wants += 1;
                        let named = self.choose(now, swarm, host, usize::from(want), peers, newcomer);
                        if !named.is_empty() {
                            blobs.push((blob.digest, named));
                        }
                    }
                }
            }
        }
        let wanted = core::mem::replace(&mut self.hosts[host].wants, wants);
        self.wanting = self.wanting + cost(wants) - cost(wanted);
        let interval = self.interval(host);
        if self.hosts[host].spots.is_empty() {
            self.forget(host);
        }
        Response { interval, resend, blobs }
    }

    fn interval(&self, host: u32) -> Duration {
        let leeching = self.hosts[host].spots.iter().any(|spot| !self.member(host, spot).seed);
        // Those that want peers come the most often by far: only they matter to each other.
        let all = self.by_id.len() as u64 * cost(1);
        let (base, load) = match (self.hosts[host].wants, leeching) {
            (1.., _) => (self.config.interval_wanting, self.wanting),
            (0, true) => (self.config.interval_leeching, all),
            (0, false) => (self.config.interval_seeding, all),
        };
        base.max(Duration::from_nanos(load * 1_000_000_000 / (u64::from(self.config.rate_max.max(1)) * cost(1))))
    }

    fn host(&mut self, now: Instant, node: &Node) -> Option<u32> {
        let candidate = Candidate { id: node.id, addr: node.addr, origin: node.origin };
        let zone = self.zone(&node.zone);
        let known = self.by_id.get(&node.id).copied();
        // A host that moved to another zone starts anew.
        let known = known.filter(|host| {
            let same = self.hosts[*host].zone == zone;
            if !same {
                self.forget(*host);
            }
            same
        });
        if let Some(host) = known {
            self.hosts[host].candidate = candidate;
            self.hosts[host].seen = now;
            return Some(host);
        }
        if self.by_id.len() >= self.config.hosts_max {
            return None;
        }
        let host = self.hosts.insert(Host { candidate, zone, seen: now, wants: 0, spots: Vec::new() });
        self.by_id.insert(node.id, host);
        Some(host)
    }

    /// Removes a host from all its swarms, and itself.
    fn forget(&mut self, host: u32) {
        for spot in core::mem::take(&mut self.hosts[host].spots) {
            self.unseat(host, &spot);
        }
        let Host { candidate: Candidate { id, .. }, wants, .. } = self.hosts[host];
        self.wanting -= cost(wants);
        self.by_id.remove(&id);
        self.hosts.remove(host);
    }

    fn leave(&mut self, host: u32, digest: &Digest) {
        let Some(swarm) = self.by_digest.get(digest) else { return };
        let spots = &mut self.hosts[host].spots;
        if let Ok(found) = spots.binary_search_by_key(swarm, |spot| spot.swarm) {
            let spot = spots.remove(found);
            self.unseat(host, &spot);
        }
    }

    fn unseat(&mut self, host: u32, spot: &Spot) {
        let zone = self.hosts[host].zone;
        let swarm = &mut self.swarms[spot.swarm];
        swarm.dismiss(host);
        let Some(group) = swarm.groups.iter_mut().find(|group| group.zone == zone) else { return };
        let gone = group.members.swap_remove(spot.at as usize);
        group.seeds -= usize::from(gone.seed);
        let moved = group.members.get(spot.at as usize).copied();
        swarm.groups.retain(|group| !group.members.is_empty());
        self.members -= 1;
        if let Some(moved) = moved {
            let spots = &mut self.hosts[moved.host].spots;
            if let Ok(found) = spots.binary_search_by_key(&spot.swarm, |spot| spot.swarm) {
                spots[found].at = spot.at;
            }
        }
        if self.swarms[spot.swarm].groups.is_empty() {
            let digest = self.swarms[spot.swarm].digest;
            self.by_digest.remove(&digest);
            self.swarms.remove(spot.swarm);
        }
    }

    fn member(&self, host: u32, spot: &Spot) -> Member {
        let zone = self.hosts[host].zone;
        let group = self.swarms[spot.swarm].groups.iter().find(|group| group.zone == zone);
        group.and_then(|group| group.members.get(spot.at as usize)).copied().unwrap_or(Member {
            host,
            links: 0,
            seed: true,
        })
    }

    /// Enters a host's state; returns the swarm and whether the host is new there. None where a table is full.
    fn join(&mut self, host: u32, digest: &Digest, links: u16, seed: bool) -> Option<(u32, bool)> {
        let swarm = match self.by_digest.get(digest) {
            Some(swarm) => *swarm,
            None if self.by_digest.len() >= self.config.swarms_max => return None,
            None => {
                let swarm = self.swarms.insert(Swarm { digest: *digest, groups: Vec::new(), guests: Vec::new() });
                self.by_digest.insert(*digest, swarm);
                swarm
            }
        };
        let zone = self.hosts[host].zone;
        let spots = &mut self.hosts[host].spots;
        let found = spots.binary_search_by_key(&swarm, |spot| spot.swarm);
        if found.is_err() && spots.len() >= self.config.blobs_per_host_max {
            return None;
        }
        let state = &mut self.swarms[swarm];
        if seed {
            state.dismiss(host);
        }
        let group = match state.groups.iter().position(|group| group.zone == zone) {
            Some(at) => &mut state.groups[at],
            None => state.groups.push_mut(Group { zone, members: Vec::new(), seeds: 0, gateways: Vec::new() }),
        };
        match found {
            Ok(found) => {
                let member = &mut group.members[spots[found].at as usize];
                group.seeds = group.seeds + usize::from(seed) - usize::from(member.seed);
                *member = Member { host, links, seed };
            }
            Err(place) => {
                let at = u32::try_from(group.members.len()).ok()?;
                group.members.push(Member { host, links, seed });
                group.seeds += usize::from(seed);
                spots.insert(place, Spot { swarm, at });
                self.members += 1;
            }
        }
        Some((swarm, found.is_err()))
    }

    /// Peers for a downloading host.
    fn choose(
        &mut self,
        now: Instant,
        swarm: u32,
        host: u32,
        want: usize,
        links: u16,
        newcomer: bool,
    ) -> Vec<Candidate> {
        let want = want.min(PEERS_PER_BLOB_MAX);
        let zone = self.hosts[host].zone;
        let state = &self.swarms[swarm];
        let Some(group_at) = state.groups.iter().position(|group| group.zone == zone) else { return Vec::new() };
        let size: usize = state.groups.iter().map(|group| group.members.len()).sum();
        let small = size <= SMALL;
        let served = state.groups[group_at].seeds > 0 && (newcomer || links >= FEW_PEERS);
        let abroad = self.origins.iter().all(|origin| origin.zone != zone);
        let outside = abroad && self.may_look_outside(now, swarm, group_at, host);

        let most = match (served, small || outside) {
            (true, _) => 0,
            (false, true) => usize::MAX,
            (false, false) => 1,
        };
        let mut named = self.name_origins(swarm, host, most, outside);
        named.truncate(want);
        let share = if newcomer && !small { (want * NEWCOMER_PERCENT).div_ceil(100) } else { want };
        let in_zone = self.draw(swarm, group_at, host, share.saturating_sub(named.len()));
        named.extend(in_zone);
        if outside && named.len() < share && (0..self.origins.len()).all(|at| !self.ring.is_up(&self.origins[at].label))
        {
            let groups = self.swarms[swarm].groups.len();
            let first = self.rng.index(groups);
            for step in 0..groups {
                let other = (first + step) % groups;
                if other != group_at && named.len() < share {
                    named.extend(self.draw(swarm, other, host, 2.min(share - named.len())));
                }
            }
        }
        named
    }

    /// Whether the host is, or now becomes, one of its zone's gateways for the blob.
    fn may_look_outside(&mut self, now: Instant, swarm: u32, group: usize, host: u32) -> bool {
        let group = &mut self.swarms[swarm].groups[group];
        let silent = |host: &Host| now.since(host.seen) > 2 * self.config.interval_leeching;
        group.gateways.retain(|gateway| !self.hosts.get(*gateway).is_none_or(silent));
        if group.seeds > 0 {
            return false;
        }
        let known = group.gateways.contains(&host);
        if !known && group.gateways.len() < GATEWAYS_MAX {
            group.gateways.push(host);
            return true;
        }
        known
    }

    /// Origins for a host: those of its zone, or any where it may look outside.
    fn name_origins(&mut self, swarm: u32, host: u32, most: usize, outside: bool) -> Vec<Candidate> {
        let zone = self.hosts[host].zone;
        let digest = self.swarms[swarm].digest;
        let owners = self.ring.owners(&digest, self.config.replicas);
        let sources = owners.iter().filter_map(|label| self.origins.iter().find(|source| *source.label == **label));
        let mut sources: Vec<&Source> = sources.collect();
        if sources.iter().any(|source| source.zone == zone) {
            sources.retain(|source| source.zone == zone);
        } else if !outside {
            return Vec::new();
        }
        let guests = &self.swarms[swarm].guests;
        // Each zone has its share of an origin: a blob has to get into all of them.
        let links = self.config.origin_links.div_ceil(self.swarms[swarm].groups.len().max(1)).max(ORIGIN_LINKS_MIN);
        let of_zone = |guest: &&Guest| self.hosts.get(guest.host).is_some_and(|host| host.zone == zone);
        let load =
            |source: &Source| guests.iter().filter(|guest| guest.origin == source.candidate.id).filter(of_zone).count();
        let is_guest = |source: &Source| guests.iter().any(|g| g.host == host && g.origin == source.candidate.id);
        let held = sources.iter().filter(|source| is_guest(source)).count();
        // Those it was given already are named again: it may have lost them.
        let mut free: Vec<(bool, usize, u64, Candidate)> = sources
            .iter()
            .map(|source| (!is_guest(source), load(source), self.rng.next(), source.candidate))
            .filter(|(new, load, ..)| !new || (held < most && *load < links))
            .collect();
        free.sort_by_key(|(new, load, chance, _)| (*new, *load, *chance));
        let chosen: Vec<Candidate> = free.into_iter().take(most.max(held)).map(|(.., candidate)| candidate).collect();
        let swarm = &mut self.swarms[swarm];
        for candidate in &chosen {
            if !swarm.guests.iter().any(|guest| guest.host == host && guest.origin == candidate.id) {
                swarm.guests.push(Guest { origin: candidate.id, host });
            }
        }
        chosen
    }

    /// Up to `number` members of a group other than the host, few links first, and counts the links.
    fn draw(&mut self, swarm: u32, group: usize, host: u32, number: usize) -> Vec<Candidate> {
        let members = &mut self.swarms[swarm].groups[group].members;
        let others = members.len();
        let mut chosen: Vec<usize> = Vec::with_capacity(number);
        let open = |member: &Member, max: u16| member.host != host && member.links < max;
        if others <= 2 * number + 1 {
            // Nearly all of them: in order of links rather than by lot.
            let mut all: Vec<usize> = (0..others).filter(|at| open(&members[*at], u16::MAX)).collect();
            all.sort_by_key(|at| members[*at].links);
            chosen.extend(all.into_iter().take(number));
        } else {
            for _ in 0..number {
                let drawn = (0..DRAWS).map(|_| self.rng.index(others));
                let fit = drawn.filter(|at| open(&members[*at], self.config.links_max) && !chosen.contains(at));
                chosen.extend(fit.min_by_key(|at| members[*at].links));
            }
        }
        for at in &chosen {
            members[*at].links = members[*at].links.saturating_add(1);
        }
        let links = u16::try_from(chosen.len()).unwrap_or(u16::MAX);
        let zone = self.swarms[swarm].groups[group].zone;
        let names = chosen.iter().map(|at| self.hosts[self.swarms[swarm].groups[group].members[*at].host].candidate);
        let names = names.collect();
        let own = self.hosts[host].spots.binary_search_by_key(&swarm, |spot| spot.swarm);
        if let (Ok(found), true) = (own, self.hosts[host].zone == zone) {
            let at = self.hosts[host].spots[found].at as usize;
            let own = &mut self.swarms[swarm].groups[group].members[at];
            own.links = own.links.saturating_add(links);
        }
        names
    }

    fn sweep(&mut self, now: Instant) {
        let late = |host: &u32| now.since(self.hosts[*host].seen) > self.config.ttl;
        let late: Vec<u32> = self.by_id.values().copied().filter(late).collect();
        late.into_iter().for_each(|host| self.forget(host));
    }
}

impl Swarm {
    /// The host needs no origin and no gateway's part any more.
    fn dismiss(&mut self, host: u32) {
        self.guests.retain(|guest| guest.host != host);
        for group in &mut self.groups {
            group.gateways.retain(|gateway| *gateway != host);
        }
    }
}

/// Things by small numbers, which are used again.
struct Slab<T> {
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }

    fn insert(&mut self, value: T) -> u32 {
        if let Some(at) = self.free.pop() {
            self.slots[at as usize] = Some(value);
            return at;
        }
        self.slots.push(Some(value));
        u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
    }

    fn remove(&mut self, at: u32) {
        self.slots[at as usize] = None;
        self.free.push(at);
    }

    fn get(&self, at: u32) -> Option<&T> {
        self.slots.get(at as usize)?.as_ref()
    }
}

impl<T> core::ops::Index<u32> for Slab<T> {
    type Output = T;

    #[expect(clippy::expect_used, reason = "numbers are handed out by insert and forgotten at remove")]
    fn index(&self, at: u32) -> &T {
        self.get(at).expect("a live number")
    }
}

impl<T> core::ops::IndexMut<u32> for Slab<T> {
    #[expect(clippy::expect_used, reason = "numbers are handed out by insert and forgotten at remove")]
    fn index_mut(&mut self, at: u32) -> &mut T {
        self.slots[at as usize].as_mut().expect("a live number")
    }
}

/// What an announce costs that wants peers for so many blobs; nothing where it wants none. In blobs, see [`ANNOUNCE_COST`].
fn cost(wants: u32) -> u64 {
    if wants == 0 { 0 } else { ANNOUNCE_COST + u64::from(wants) }
}

#[cfg(test)]
mod tests;
