use super::{Config, Effect, Event, GATEWAYS_MAX, Handout, Origin, PEERS_PER_BLOB_MAX, cost};
use crate::{
    announce::{Blob, Node, Request, Response, State},
    id::{Digest, PeerId},
    ring::Ring,
    swarm::Candidate,
    time::Instant,
};
use alloc::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    format, vec,
    vec::Vec,
};
use core::time::Duration;
use proptest::prelude::{ProptestConfig, Strategy, any, prop_oneof, proptest};

/// Hosts from here on are origins.
const ORIGINS: u16 = 1000;
const TOKEN: u64 = 7;

fn id(n: u16) -> PeerId {
    let mut bytes = [9; 20];
    bytes[..2].copy_from_slice(&n.to_be_bytes());
    PeerId::new(bytes)
}

fn number(id: &PeerId) -> u16 {
    u16::from_be_bytes([id.as_bytes()[0], id.as_bytes()[1]])
}

fn digest(n: u8) -> Digest {
    Digest::sha256([n; 32])
}

fn zone(n: u8) -> alloc::boxed::Box<str> {
    if n == 0 { "".into() } else { format!("zone-{n}").into() }
}

fn secs(s: u64) -> Instant {
    Instant::ZERO + Duration::from_secs(s)
}

fn request(host: u16, in_zone: u8, full: bool, blobs: &[(u8, State)]) -> Request {
    let node = Node { id: id(host), addr: ([10, 0, 0, 1], 1 + host).into(), zone: zone(in_zone), origin: false };
    let blobs = blobs.iter().map(|(blob, state)| Blob { digest: digest(*blob), state: *state });
    Request { node, full, blobs: blobs.collect() }
}

fn origins(tracker: &mut Handout, number: u16, down: u16) {
    let mut ring = Ring::new((0..number).map(|n| format!("origin-{n}"))).unwrap();
    (0..number).filter(|n| down >> n & 1 == 1).for_each(|n| {
        ring.set_up(&format!("origin-{n}"), false);
    });
    let origins = (0..number).map(|n| Origin {
        label: format!("origin-{n}").into(),
        id: id(ORIGINS + n),
        addr: ([10, 1, 0, 1], 1 + n).into(),
        zone: zone(0),
    });
    tracker.handle(Instant::ZERO, Event::Origins { ring, origins: origins.collect() });
}

fn ask(tracker: &mut Handout, now: Instant, request: &Request) -> Response {
    tracker.handle(now, Event::Announce { token: TOKEN, request });
    let Some(Effect::Answer { token: TOKEN, response }) = tracker.poll() else { panic!("no answer") };
    assert_eq!(tracker.poll(), None);
    response
}

fn leeching(peers: u16, want: u16) -> State {
    State::Leeching { have: 0, pieces: 9, peers, want }
}

fn names(response: &Response) -> (Vec<u16>, usize) {
    let all: Vec<&Candidate> = response.blobs.iter().flat_map(|(_, peers)| peers).collect();
    let agents = all.iter().filter(|peer| !peer.origin).map(|peer| number(&peer.id)).collect();
    (agents, all.iter().filter(|peer| peer.origin).count())
}

#[test]
fn a_swarm_is_one_nearly_regular_graph() {
    const HOSTS: u16 = 800;
    let mut tracker = Handout::new(Config::default());
    origins(&mut tracker, 5, 0);
    let mut links: BTreeMap<u16, BTreeSet<u16>> = BTreeMap::new();
    let mut fed = BTreeSet::new();
    for round in 0..3 {
        for host in 0..HOSTS {
            let known = links.get(&host).map_or(0, BTreeSet::len);
            let known = u16::try_from(known).unwrap();
            let response = ask(
                &mut tracker,
                secs(0),
                &request(host, 0, round == 0, &[(1, leeching(known, 10u16.saturating_sub(known)))]),
            );
            let (agents, from_origins) = names(&response);
            fed.extend((from_origins > 0).then_some(host));
            for other in agents {
                links.entry(host).or_default().insert(other);
                links.entry(other).or_default().insert(host);
            }
        }
    }
    let degrees: Vec<usize> = links.values().map(BTreeSet::len).collect();
    assert_eq!(links.len(), usize::from(HOSTS));
    assert!(degrees.iter().all(|degree| (8..=24).contains(degree)), "{degrees:?}");
    assert!(!fed.is_empty() && fed.len() <= 50, "{} hosts were given an origin", fed.len());
    let (mut seen, mut queue) = (BTreeSet::from([0]), VecDeque::from([0]));
    while let Some(at) = queue.pop_front() {
        links[&at].iter().filter(|next| seen.insert(**next)).for_each(|next| queue.push_back(*next));
    }
    assert_eq!(seen.len(), usize::from(HOSTS), "in one piece");
}

#[test]
fn origins_are_for_the_first_and_for_those_whose_peers_are_dead() {
    let mut tracker = Handout::new(Config::default());
    origins(&mut tracker, 3, 0);
    assert_eq!(names(&ask(&mut tracker, secs(0), &request(1, 0, true, &[(1, leeching(0, 10))]))), (vec![], 3));
    ask(&mut tracker, secs(1), &request(1, 0, false, &[(1, State::Seeding { peers: 0 })]));
    assert_eq!(names(&ask(&mut tracker, secs(2), &request(2, 0, true, &[(1, leeching(0, 10))]))), (vec![1], 0));
    assert_eq!(names(&ask(&mut tracker, secs(3), &request(2, 0, false, &[(1, leeching(2, 8))]))).1, 0);
    assert_eq!(names(&ask(&mut tracker, secs(4), &request(2, 0, false, &[(1, leeching(0, 10))]))).1, 3);
}

#[test]
fn a_zone_has_a_few_gateways_and_new_ones_for_the_dead() {
    let mut tracker = Handout::new(Config::default());
    origins(&mut tracker, 5, 0);
    let fed = |tracker: &mut Handout, at: u64, hosts: core::ops::Range<u16>| {
        let has_origin = |host: &u16| {
            let (agents, origins) = names(&ask(tracker, secs(at), &request(*host, 1, false, &[(1, leeching(0, 10))])));
            assert!(agents.iter().all(|agent| (100..200).contains(agent)), "zones do not mix");
            origins > 0
        };
        hosts.filter(has_origin).count()
    };
    assert_eq!(fed(&mut tracker, 0, 100..140), GATEWAYS_MAX);
    assert_eq!(fed(&mut tracker, 1, 140..150), 0);
    assert_eq!(fed(&mut tracker, 20, 140..150), GATEWAYS_MAX, "the first ones were silent for 20 s");
}

#[test]
fn a_newcomer_leaves_room_for_those_who_come_later() {
    let mut tracker = Handout::new(Config::default());
    for host in 0..40 {
        ask(&mut tracker, secs(0), &request(host, 0, true, &[(1, leeching(0, 10))]));
    }
    let newcomer = request(40, 0, true, &[(1, leeching(0, 10))]);
    assert_eq!(names(&ask(&mut tracker, secs(0), &newcomer)).0.len(), 3);
    let again = names(&ask(&mut tracker, secs(0), &request(40, 0, false, &[(1, leeching(3, 7))]))).0.len();
    assert!((5..=7).contains(&again), "{again}");
}

#[test]
fn hosts_that_want_peers_come_often_and_are_slowed_by_their_own_number_alone() {
    const HOSTS: u16 = 900;
    let mut tracker = Handout::new(Config { rate_max: 3000, ..Config::default() });
    for host in 0..HOSTS {
        ask(&mut tracker, secs(0), &request(host, 0, true, &[(2, State::Seeding { peers: 0 })]));
    }
    let mut told = |host, state| ask(&mut tracker, secs(0), &request(host, 0, false, &[(1, state)])).interval;
    assert_eq!(told(0, leeching(0, 10)), Duration::from_millis(100), "others are many, but they have what they want");
    let last = (1..HOSTS).map(|host| told(host, leeching(0, 10))).last();
    assert_eq!(last, Some(Duration::from_millis(300)));
    let many: Vec<_> = (1..=18).map(|blob| (blob, leeching(0, 10))).collect();
    let dearer = ask(&mut tracker, secs(0), &request(1, 0, false, &many)).interval;
    assert_eq!(dearer.as_micros(), 300_333, "one of 18 blobs costs twice what one of one does");
    let mut told = |host, state| ask(&mut tracker, secs(0), &request(host, 0, false, &[(1, state)])).interval;
    (1..HOSTS).for_each(|host| {
        told(host, leeching(10, 0));
    });
    assert_eq!(told(0, leeching(0, 10)), Duration::from_millis(100), "the others are content");
}

#[derive(Clone, Debug)]
enum Step {
    Announce { host: u16, zone: u8, full: bool, blobs: Vec<(u8, u8, u16)> },
    Origins { number: u16, down: u16 },
    Wait(u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let blobs = proptest::collection::vec((0..5u8, 0..6u8, 0..60u16), 0..5);
    let announce = (0..30u16, 0..8u8, any::<bool>(), blobs).prop_map(|(host, zone, full, blobs)| Step::Announce {
        host,
        // Mostly where it belongs.
        zone: if zone == 7 { 1 } else { u8::try_from(host % 3).unwrap() },
        full,
        blobs,
    });
    let step = prop_oneof![
        20 => announce,
        1 => (1..5u16, any::<u16>()).prop_map(|(number, down)| Step::Origins { number, down }),
        2 => (0..40_000u16).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 0..200)
}

/// Every table agrees with every other, and is within its bounds.
fn check(tracker: &Handout) {
    let mut members = 0;
    for (digest, at) in &tracker.by_digest {
        let swarm = &tracker.swarms[*at];
        assert_eq!(swarm.digest, *digest);
        assert!(!swarm.groups.is_empty());
        for group in &swarm.groups {
            members += group.members.len();
            assert!(!group.members.is_empty() && group.gateways.len() <= GATEWAYS_MAX);
            assert_eq!(group.seeds, group.members.iter().filter(|member| member.seed).count());
            for (place, member) in group.members.iter().enumerate() {
                let host = &tracker.hosts[member.host];
                assert_eq!(host.zone, group.zone);
                assert!(host.spots.iter().any(|spot| spot.swarm == *at && spot.at as usize == place));
            }
        }
        for guest in &swarm.guests {
            assert!(tracker.hosts.get(guest.host).is_some(), "a guest that is gone");
        }
    }
    assert_eq!(members, tracker.size().members);
    assert_eq!(members, tracker.by_id.values().map(|host| tracker.hosts[*host].spots.len()).sum::<usize>());
    assert_eq!(tracker.wanting, tracker.by_id.values().map(|host| cost(tracker.hosts[*host].wants)).sum::<u64>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn only_live_members_are_named_and_tables_agree_whatever_comes(steps in steps(), seed: u64) {
        let config = Config { seed, ..Config::default() };
        let mut tracker = Handout::new(config);
        let mut now = Instant::ZERO;
        // Who has, or wants, which blob by its own last word, and when it was heard last.
        let mut said: BTreeSet<(u16, u8)> = BTreeSet::new();
        let mut seen: BTreeMap<u16, Instant> = BTreeMap::new();
        let mut all_down = true;
        for step in steps {
            match step {
                Step::Origins { number, down } => {
                    origins(&mut tracker, number, down);
                    all_down = (0..number).all(|n| down >> n & 1 == 1);
                }
                Step::Wait(ms) => {
                    now += Duration::from_millis(u64::from(ms));
                    tracker.handle(now, Event::Tick);
                }
                Step::Announce { host, zone: in_zone, full, blobs } => {
                    let states: Vec<(u8, State)> = blobs.iter().map(|(blob, kind, n)| (*blob, match kind {
                        0 => State::Gone,
                        1 => State::Seeding { peers: *n },
                        _ => leeching(n % 13, *n),
                    })).collect();
                    for (blob, state) in &states {
                        match state {
                            State::Gone => said.remove(&(host, *blob)),
                            _ => said.insert((host, *blob)),
                        };
                    }
                    seen.insert(host, now);
                    let response = ask(&mut tracker, now, &request(host, in_zone, full, &states));
                    assert!(response.interval >= crate::announce::INTERVAL_MIN);
                    for (of, peers) in &response.blobs {
                        let asked = |(blob, state): &(u8, State)| match state {
                            State::Leeching { want, .. } if digest(*blob) == *of => Some(usize::from(*want)),
                            _ => None,
                        };
                        let want = states.iter().filter_map(asked).max().expect("a blob that wants peers");
                        assert!(!peers.is_empty() && peers.len() <= want.min(PEERS_PER_BLOB_MAX));
                        let distinct: BTreeSet<PeerId> = peers.iter().map(|peer| peer.id).collect();
                        assert_eq!(distinct.len(), peers.len(), "a peer twice");
                        for peer in peers.iter().filter(|peer| !peer.origin) {
                            let other = number(&peer.id);
                            assert_ne!(other, host);
                            let blob = of.as_bytes()[0];
                            assert!(said.contains(&(other, blob)), "a host that never said so");
                            let seen = seen[&other];
                            assert!(now.since(seen) <= config.ttl + super::SWEEP, "seen {seen:?}, now {now:?}");
                        }
                    }
                    assert!(all_down || response.blobs.iter().all(|(_, peers)| peers.iter().all(|peer| peer.origin || {
                        let host = tracker.by_id[&peer.id];
                        let own = tracker.zones[usize::from(tracker.hosts[host].zone)].clone();
                        own == zone(in_zone)
                    })), "zones do not mix while there are origins");
                }
            }
            check(&tracker);
        }
        now += config.ttl + super::SWEEP + super::SWEEP;
        tracker.handle(now, Event::Tick);
        assert_eq!(tracker.size(), super::Size::default(), "who is silent is forgotten");
    }
}
