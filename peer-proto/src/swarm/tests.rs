use super::{
    BanReason, Class, Config, Effect, Event, Has, PEERS_MAX, Range32, ReaderId, Reject, Slot, Swarm, Verdict,
    WINDOW_MAX,
};
use crate::{
    id::PeerId,
    layout::{Geometry, PieceIndex},
    pieces::PieceSet,
    time::Instant,
};
use alloc::{collections::BTreeMap, vec, vec::Vec};
use core::time::Duration;
use proptest::prelude::{ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

fn id(n: u32) -> PeerId {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    PeerId::new(bytes)
}

fn geometry(pieces: u32) -> Geometry {
    Geometry::new(u64::from(pieces) << 20, 1 << 20).unwrap()
}

fn download(pieces: u32) -> (Swarm, Geometry) {
    let g = geometry(pieces);
    (Swarm::new(Config::new(id(0), 1), g, PieceSet::new(&g), Class::Foreground), g)
}

fn ms(ms: u64) -> Instant {
    Instant::ZERO + Duration::from_millis(ms)
}

fn effects(swarm: &mut Swarm) -> Vec<Effect> {
    core::iter::from_fn(|| swarm.poll()).collect()
}

fn connect(swarm: &mut Swarm, now: Instant, slot: u32, origin: bool, has: Has<'_>) {
    swarm.handle(now, Event::Connected { slot: Slot(slot), id: id(slot), origin, dialed: true, has });
}

fn requests(effects: &[Effect]) -> Vec<(u32, PieceIndex)> {
    let request = |effect: &Effect| match effect {
        Effect::Request { slot, piece } => Some((slot.0, *piece)),
        _ => None,
    };
    effects.iter().filter_map(request).collect()
}

/// Requests outstanding in all of a short blob, where nothing else bounds them.
const AT_ONCE: usize = Config::new(PeerId::new([0; 20]), 0).in_flight_min as usize;

#[test]
fn the_longer_a_blob_the_more_of_it_is_asked_for_up_to_a_bound() {
    for (pieces, want) in [(100, AT_ONCE), (512, AT_ONCE + 2), (1500, AT_ONCE + 4), (50_000, AT_ONCE + 4)] {
        let (mut swarm, _) = download(pieces);
        connect(&mut swarm, ms(0), 1, false, Has::All);
        assert_eq!(requests(&effects(&mut swarm)).len(), want, "{pieces} pieces");
    }
}

#[test]
fn a_lone_source_gets_the_whole_window_and_several_share_it() {
    let (mut swarm, _) = download(100);
    connect(&mut swarm, ms(0), 1, false, Has::All);
    assert_eq!(requests(&effects(&mut swarm)).len(), AT_ONCE);
    let (mut swarm, g) = download(100);
    let none = PieceSet::new(&g);
    for slot in 1..=8 {
        connect(&mut swarm, ms(0), slot, false, Has::Some(&none));
    }
    for slot in 1..=8 {
        swarm.handle(ms(1), Event::HaveAll { slot: Slot(slot) });
    }
    let mut by_slot = BTreeMap::new();
    requests(&effects(&mut swarm)).iter().for_each(|(slot, _)| *by_slot.entry(*slot).or_insert(0) += 1);
    assert_eq!(by_slot.values().sum::<usize>(), AT_ONCE, "{by_slot:?}");
}

#[test]
fn the_liar_is_banned_when_the_truth_comes() {
    let (mut swarm, _) = download(40);
    connect(&mut swarm, ms(0), 1, false, Has::All);
    let (_, piece) = requests(&effects(&mut swarm))[0];
    swarm.handle(ms(5), Event::Arrived { slot: Slot(1), piece, verdict: Verdict::Wrong });
    assert!(effects(&mut swarm).iter().all(|effect| !matches!(effect, Effect::Ban { .. })));
    connect(&mut swarm, ms(6), 2, false, Has::All);
    effects(&mut swarm);
    swarm.handle(ms(9), Event::Arrived { slot: Slot(2), piece, verdict: Verdict::Good });
    let ban = Effect::Ban { slot: Slot(1), id: id(1), reason: BanReason::WrongPiece(piece) };
    assert!(effects(&mut swarm).contains(&ban));
    assert!(!swarm.have().is_empty() && swarm.peers() == 1);
}

#[test]
fn two_who_fail_one_piece_put_the_layout_in_doubt() {
    let (mut swarm, _) = download(40);
    connect(&mut swarm, ms(0), 1, false, Has::All);
    let (_, piece) = requests(&effects(&mut swarm))[0];
    swarm.handle(ms(5), Event::Arrived { slot: Slot(1), piece, verdict: Verdict::Wrong });
    connect(&mut swarm, ms(6), 2, false, Has::All);
    swarm.handle(ms(7), Event::Arrived { slot: Slot(2), piece, verdict: Verdict::Wrong });
    let told = effects(&mut swarm);
    assert!(told.contains(&Effect::SuspectLayout { piece }));
    assert!(told.iter().all(|effect| !matches!(effect, Effect::Ban { .. })));
    swarm.handle(ms(8), Event::LayoutHolds);
    let bans = effects(&mut swarm).iter().filter(|effect| matches!(effect, Effect::Ban { .. })).count();
    assert_eq!((bans, swarm.peers()), (2, 0));
}

#[test]
fn readers_come_first() {
    let (mut swarm, _) = download(1000);
    swarm.handle(ms(0), Event::Reader { id: ReaderId(1), pieces: Range32 { start: 300, end: 1000 } });
    connect(&mut swarm, ms(0), 1, false, Has::All);
    let asked = requests(&effects(&mut swarm));
    let near = asked.iter().filter(|(_, piece)| (300..400).contains(&piece.get())).count();
    assert!(near >= AT_ONCE * 5 / 8, "{asked:?}");
}

#[test]
fn what_a_reader_came_for_is_asked_for_first() {
    for seed in 0..50 {
        let g = geometry(1000);
        let mut swarm = Swarm::new(Config::new(id(0), seed), g, PieceSet::new(&g), Class::Foreground);
        read(&mut swarm, 1, 300, 1000);
        read(&mut swarm, 2, 701, 900);
        for slot in 1..=2 {
            let (origin, dialed, has) = (true, true, Has::All);
            swarm.handle(ms(1), Event::Connected { slot: Slot(slot), id: id(slot), origin, dialed, has });
        }
        let asked = requests(&effects(&mut swarm));
        assert_eq!(asked.len(), AT_ONCE + 3, "seed {seed}");
        assert_eq!([0, 1].map(|at| asked[at].1.get()), [300, 701], "seed {seed}");
        let beyond = |piece: u32| (piece..1000).find(|n| asked.iter().all(|(_, asked)| asked.get() != *n)).unwrap();
        let head = beyond(500);
        read(&mut swarm, 3, head, 1000);
        let (slot, piece) = asked[0];
        swarm.handle(ms(2), Event::Arrived { slot: Slot(slot), piece, verdict: Verdict::Good });
        assert_eq!(requests(&effects(&mut swarm))[0].1.get(), head, "seed {seed}, of whichever origin");
    }
}

fn ranges(pieces: u32) -> Swarm {
    let g = geometry(pieces);
    Swarm::of_ranges(Config::new(id(0), 1), g, PieceSet::new(&g), Class::Foreground)
}

fn read(swarm: &mut Swarm, reader: u64, start: u32, end: u32) {
    swarm.handle(ms(0), Event::Reader { id: ReaderId(reader), pieces: Range32 { start, end } });
}

fn asked(swarm: &mut Swarm) -> Vec<u32> {
    let mut asked: Vec<u32> = requests(&effects(swarm)).iter().map(|(_, piece)| piece.get()).collect();
    asked.sort_unstable();
    asked
}

#[test]
fn who_comes_once_all_is_here_is_served_however_many_they_are() {
    let g = geometry(4);
    for (have, dropped) in [(PieceSet::full(&g), 0), (PieceSet::new(&g), 6)] {
        let mut swarm = Swarm::new(Config::new(id(0), 1), g, have, Class::Foreground);
        for slot in 1..=20 {
            let (origin, dialed, has) = (false, false, Has::All);
            swarm.handle(ms(1), Event::Connected { slot: Slot(slot), id: id(slot), origin, dialed, has });
        }
        let drops = effects(&mut swarm).iter().filter(|effect| matches!(effect, Effect::Drop { .. })).count();
        assert_eq!(drops, dropped);
    }
}

#[test]
fn a_download_of_ranges_that_are_all_here_is_complete() {
    for pieces in [0, 7] {
        let g = geometry(pieces);
        let mut swarm = Swarm::of_ranges(Config::new(id(0), 1), g, PieceSet::full(&g), Class::Foreground);
        assert_eq!(effects(&mut swarm), [Effect::Complete]);
    }
}

#[test]
fn a_download_of_ranges_asks_for_them_alone_and_rests_when_they_are_here() {
    let mut swarm = ranges(10_000);
    assert!(swarm.is_idle() && swarm.want() == 0 && effects(&mut swarm).is_empty());
    read(&mut swarm, 1, 700, 701);
    assert!(effects(&mut swarm).iter().any(|effect| matches!(effect, Effect::WantPeers(_))));
    connect(&mut swarm, ms(0), 1, true, Has::All);
    assert_eq!(asked(&mut swarm), [700]);
    read(&mut swarm, 2, 9_998, 10_000);
    assert_eq!(asked(&mut swarm), [9_998, 9_999]);
    for n in [700, 9_998, 9_999] {
        assert!(!swarm.is_idle());
        swarm.handle(ms(2), Event::Arrived { slot: Slot(1), piece: PieceIndex(n), verdict: Verdict::Good });
    }
    assert!(swarm.is_idle() && !swarm.is_whole() && asked(&mut swarm).is_empty());
    assert_eq!((swarm.deadline(), swarm.want()), (None, 0));
}

#[test]
fn what_a_reader_that_left_wanted_is_asked_for_no_more() {
    let mut swarm = ranges(1000);
    read(&mut swarm, 1, 100, 200);
    read(&mut swarm, 2, 150, 160);
    swarm.handle(ms(0), Event::ReaderGone { id: ReaderId(1) });
    connect(&mut swarm, ms(0), 1, true, Has::All);
    assert_eq!(asked(&mut swarm), (150..160).collect::<Vec<_>>());
    swarm.handle(ms(1), Event::ReaderGone { id: ReaderId(2) });
    swarm.handle(ms(1), Event::Gone { slot: Slot(1) });
    assert!(swarm.is_idle(), "what was under way is not asked for again");
}

#[test]
fn a_quarter_makes_it_whole_and_so_does_somebody_who_wants_it() {
    let mut swarm = ranges(100);
    read(&mut swarm, 1, 0, 10);
    read(&mut swarm, 2, 5, 25);
    assert!(!swarm.is_whole());
    read(&mut swarm, 2, 90, 91);
    assert!(swarm.is_whole(), "what was asked for before counts");
    let mut swarm = ranges(100);
    swarm.handle(ms(0), Event::Whole);
    assert!(swarm.is_whole() && swarm.want() == 10);
    connect(&mut swarm, ms(0), 1, false, Has::All);
    assert_eq!(asked(&mut swarm).len(), AT_ONCE);
    let mut swarm = ranges(3);
    read(&mut swarm, 1, 2, 3);
    assert!(swarm.is_whole(), "a third");
}

#[test]
fn a_piece_from_elsewhere_is_asked_of_nobody() {
    let mut swarm = ranges(100);
    read(&mut swarm, 1, 7, 9);
    connect(&mut swarm, ms(0), 1, false, Has::All);
    assert_eq!(asked(&mut swarm), [7, 8]);
    swarm.handle(ms(1), Event::Supplied { piece: PieceIndex(7) });
    assert!(effects(&mut swarm).contains(&Effect::Cancel { slot: Slot(1), piece: PieceIndex(7) }));
    swarm.handle(ms(1), Event::Supplied { piece: PieceIndex(8) });
    assert!(swarm.is_idle() && swarm.have().count() == 2);
}

#[test]
fn a_silent_peers_pieces_are_asked_elsewhere() {
    let (mut swarm, _) = download(30);
    connect(&mut swarm, ms(0), 1, false, Has::All);
    let first = requests(&effects(&mut swarm));
    connect(&mut swarm, ms(1), 2, false, Has::All);
    effects(&mut swarm);
    let mut asked = vec![];
    while asked.len() < first.len() {
        let due = swarm.deadline().expect("a silence ends");
        assert!(due < ms(10_000));
        swarm.handle(due, Event::Tick);
        asked.extend(requests(&effects(&mut swarm)).into_iter().filter(|(slot, _)| *slot == 2));
    }
}

#[test]
fn an_origin_that_just_sent_a_piece_is_left_alone_for_it() {
    let (mut swarm, _) = download(2);
    connect(&mut swarm, ms(0), 1, true, Has::All);
    let asked = requests(&effects(&mut swarm));
    assert_eq!(asked.len(), 2);
    for (_, piece) in &asked {
        swarm.handle(ms(1), Event::Rejected { slot: Slot(1), piece: *piece, reason: Reject::Elsewhere });
    }
    assert!(requests(&effects(&mut swarm)).is_empty());
    let due = swarm.deadline().unwrap();
    assert_eq!(due, ms(1) + super::SENT_HOLD);
    swarm.handle(due, Event::Tick);
    assert_eq!(requests(&effects(&mut swarm)).len(), 2);
}

#[derive(Clone, Debug)]
enum Step {
    Connect(u32, bool, u64),
    Gone(u32),
    Have(u32, u32),
    HaveAll(u32),
    Arrive(usize, u8),
    Reject(usize, u8),
    Reader(u32),
    ReaderGone,
    Budget(u16),
    Supply(u32),
    Wait(u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..20u32, any::<bool>(), any::<u64>()).prop_map(|(slot, origin, seed)| Step::Connect(slot, origin, seed)),
        (0..20u32).prop_map(Step::Gone),
        (0..20u32, 0..90u32).prop_map(|(slot, piece)| Step::Have(slot, piece)),
        (0..20u32).prop_map(Step::HaveAll),
        (0..20usize, 0..12u8).prop_map(|(nth, how)| Step::Arrive(nth, how)),
        (0..20usize, 0..12u8).prop_map(|(nth, how)| Step::Arrive(nth, how.max(2))),
        (0..20usize, 0..3u8).prop_map(|(nth, why)| Step::Reject(nth, why)),
        (0..90u32).prop_map(Step::Reader),
        proptest::prelude::Just(Step::ReaderGone),
        (1..20u16).prop_map(Step::Budget),
        (0..90u32).prop_map(Step::Supply),
        (0..5000u16).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 0..150)
}

/// What the swarm is told and asks, checked at every step.
struct Watch {
    swarm: Swarm,
    g: Geometry,
    asked: Vec<(Slot, PieceIndex)>,
    now: Instant,
    complete: bool,
}

impl Watch {
    fn tell(&mut self, event: Event<'_>) {
        self.swarm.handle(self.now, event);
        for effect in effects(&mut self.swarm) {
            match effect {
                Effect::Request { slot, piece } => {
                    assert!(!self.swarm.have().contains(piece), "a piece that is here");
                    assert!(self.swarm.is_asked_for(piece), "a piece that nobody wants");
                    let twins = self.asked.iter().filter(|(_, other)| *other == piece).count();
                    // Twice only where it is urgent: the rest under way as well, or a reader there.
                    let missing = self.g.pieces() - self.swarm.have().count();
                    let under_way: PieceSet = self.asked.iter().fold(PieceSet::new(&self.g), |mut set, (_, piece)| {
                        set.insert(*piece);
                        set
                    });
                    let readers = !self.swarm.readers.is_empty();
                    let rest = readers || !self.swarm.is_whole() || under_way.count() == missing;
                    assert!(twins == 0 || (twins == 1 && rest), "{twins} twins");
                    self.asked.push((slot, piece));
                    let at_slot = self.asked.iter().filter(|(other, _)| *other == slot).count();
                    assert!(at_slot <= usize::from(WINDOW_MAX) && self.asked.len() <= AT_ONCE, "too many");
                }
                Effect::Cancel { slot, piece } => self.asked.retain(|asked| *asked != (slot, piece)),
                Effect::Drop { slot } | Effect::Ban { slot, .. } => self.asked.retain(|(other, _)| *other != slot),
                Effect::Complete => {
                    assert!(!self.complete && self.swarm.have().is_full());
                    self.complete = true;
                }
                Effect::Connect(_) | Effect::SuspectLayout { .. } | Effect::WantPeers(_) => {}
            }
        }
        assert_eq!(self.swarm.in_flight(), self.asked.len());
        assert!(self.swarm.peers() <= PEERS_MAX && self.swarm.suspects.len() <= PEERS_MAX + 1);
    }

    fn answer(&mut self, nth: usize, verdict: Verdict) {
        if self.asked.is_empty() {
            return;
        }
        let (slot, piece) = self.asked.swap_remove(nth % self.asked.len());
        self.tell(Event::Arrived { slot, piece, verdict });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn bounds_hold_under_any_events_and_everything_is_asked_for_in_the_end(pieces in 0u32..90, steps in steps(), seed: u64, whole: bool) {
        let g = geometry(pieces);
        let make = if whole { Swarm::new } else { Swarm::of_ranges };
        let swarm = make(Config::new(id(99), seed), g, PieceSet::new(&g), Class::Foreground);
        let mut w = Watch { swarm, g, asked: vec![], now: ms(0), complete: false };
        w.tell(Event::Tick);
        for step in steps {
            match step {
                Step::Connect(slot, origin, seed) => {
                    let mut set = PieceSet::new(&g);
                    g.all().filter(|piece| seed >> (piece.get() % 64) & 1 == 1).for_each(|piece| { set.insert(piece); });
                    let has = if origin { Has::All } else { Has::Some(&set) };
                    let event = Event::Connected { slot: Slot(slot), id: id(slot), origin, dialed: seed % 3 > 0, has };
                    w.tell(event);
                }
                Step::Gone(slot) => {
                    w.asked.retain(|(other, _)| *other != Slot(slot));
                    w.tell(Event::Gone { slot: Slot(slot) });
                }
                Step::Have(slot, piece) => {
                    if let Some(piece) = g.piece(piece) {
                        w.tell(Event::Have { slot: Slot(slot), piece });
                    }
                }
                Step::HaveAll(slot) => w.tell(Event::HaveAll { slot: Slot(slot) }),
                Step::Arrive(nth, 0) => w.answer(nth, Verdict::Wrong),
                Step::Arrive(nth, 1) => w.answer(nth, Verdict::Storage),
                Step::Arrive(nth, _) => w.answer(nth, Verdict::Good),
                Step::Reject(nth, why) => {
                    if !w.asked.is_empty() {
                        let (slot, piece) = w.asked.swap_remove(nth % w.asked.len());
                        let reason = [Reject::Missing, Reject::Busy, Reject::Elsewhere][usize::from(why)];
                        w.tell(Event::Rejected { slot, piece, reason });
                    }
                }
                Step::Reader(from) => {
                    let end = if seed % 2 == 0 { pieces } else { from + 2 };
                    w.tell(Event::Reader { id: ReaderId(u64::from(from % 3)), pieces: Range32 { start: from, end } });
                }
                Step::ReaderGone => w.tell(Event::ReaderGone { id: ReaderId(0) }),
                Step::Supply(piece) => {
                    if let Some(piece) = g.piece(piece) {
                        w.tell(Event::Supplied { piece });
                    }
                }
                Step::Budget(in_flight) => w.tell(Event::Budget { in_flight }),
                Step::Wait(ms) => {
                    w.now += Duration::from_millis(u64::from(ms));
                    w.tell(Event::Tick);
                }
            }
        }
        w.tell(Event::Whole);
        // One honest seed comes; whatever went before, the rest is asked of it or of others, and the download ends.
        for n in 0..4000u64 {
            if w.complete {
                break;
            }
            let slot = 1000 + u32::try_from(n / 500).unwrap();
            if n % 500 == 0 {
                w.tell(Event::Connected { slot: Slot(slot), id: id(slot), origin: false, dialed: true, has: Has::All });
            }
            w.now += Duration::from_millis(10);
            w.tell(Event::Tick);
            w.answer(0, Verdict::Good);
        }
        prop_assert!(w.complete, "{:?} with {} asked", w.swarm.have(), w.asked.len());
        prop_assert_eq!(w.swarm.deadline(), None);
    }
}
