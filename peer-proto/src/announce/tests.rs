use super::{Announcer, Blob, Effect, Event, GATHER, Node, Request, Response, State, TrackerId};
use crate::{
    id::{Digest, PeerId},
    ring::Ring,
    swarm::Candidate,
    time::Instant,
};
use alloc::{vec, vec::Vec};
use core::{net::SocketAddr, time::Duration};

const LEECHING: State = State::Leeching { have: 0, pieces: 9, peers: 0, want: 10 };
const CONTENT: State = State::Leeching { have: 0, pieces: 9, peers: 10, want: 0 };
const SEEDING: State = State::Seeding { peers: 0 };

fn announcer(trackers: &[&str]) -> Announcer {
    let node = Node {
        id: PeerId::new([9; 20]),
        addr: SocketAddr::from(([10, 0, 0, 1], 16001)),
        zone: "".into(),
        origin: false,
    };
    Announcer::new(node, Ring::new(trackers.iter().copied()).unwrap(), 1)
}

fn digest(n: u8) -> Digest {
    Digest::sha256([n; 32])
}

fn blob(n: u8, state: State) -> Event<'static> {
    Event::Blob(Blob { digest: digest(n), state })
}

fn answer(ms: u64) -> Response {
    Response { interval: Duration::from_millis(ms), resend: false, blobs: vec![] }
}

/// The one request due by the deadline; the clock moves there.
fn next_request(a: &mut Announcer, now: &mut Instant) -> (TrackerId, Request) {
    if let Some(Effect::Send { tracker, request }) = a.poll() {
        return (tracker, request);
    }
    *now = (*now).max(a.deadline().expect("something is due"));
    a.handle(*now, Event::Tick);
    match a.poll() {
        Some(Effect::Send { tracker, request }) => (tracker, request),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_first_layer_of_an_image_goes_at_once_and_the_others_together() {
    let mut a = announcer(&["t"]);
    let mut now = Instant::ZERO + Duration::from_secs(5);
    assert_eq!(a.deadline(), None);
    let start = now;
    for n in 0..60 {
        a.handle(now, blob(n, LEECHING));
    }
    let (tracker, request) = next_request(&mut a, &mut now);
    assert_eq!((now.since(start), request.full, request.blobs.len()), (Duration::ZERO, true, 1));
    a.handle(now, Event::Answered { tracker, response: &answer(3000) });
    let (_, request) = next_request(&mut a, &mut now);
    assert_eq!((now.since(start), request.full, request.blobs.len()), (GATHER, false, 60));
}

#[test]
fn known_states_are_not_repeated_and_wishes_are() {
    let mut a = announcer(&["t"]);
    let mut now = Instant::ZERO;
    a.handle(now, blob(1, CONTENT));
    a.handle(now, blob(2, LEECHING));
    let mut seen = vec![];
    for _ in 0..3 {
        let (tracker, request) = next_request(&mut a, &mut now);
        seen.push(request.blobs.iter().map(|blob| blob.digest.as_bytes()[0]).collect::<Vec<_>>());
        a.handle(now, Event::Answered { tracker, response: &answer(3000) });
    }
    assert_eq!(seen, [vec![1, 2], vec![2], vec![2]]);
    // The end is told soon, the blob's going as well, and then nothing is left to say.
    a.handle(now, blob(1, SEEDING));
    a.handle(now, blob(2, State::Gone));
    let before = now;
    let (tracker, request) = next_request(&mut a, &mut now);
    assert!(now.since(before) <= super::SOON);
    assert_eq!(
        request.blobs,
        [Blob { digest: digest(1), state: SEEDING }, Blob { digest: digest(2), state: State::Gone }]
    );
    a.handle(now, Event::Answered { tracker, response: &answer(3000) });
    a.handle(now, blob(1, State::Gone));
    let (tracker, _) = next_request(&mut a, &mut now);
    a.handle(now, Event::Answered { tracker, response: &answer(3000) });
    assert_eq!((a.active(), a.deadline()), (0, None));
}

/// As one of ranges does, whose reader comes a moment after it was begun.
#[test]
fn a_download_is_announced_at_once_when_it_first_wants_peers() {
    let mut a = announcer(&["t"]);
    let mut now = Instant::ZERO;
    let idle = State::Leeching { have: 0, pieces: 1, peers: 0, want: 0 };
    // Another one's end has been told, and its tracker asks to be left alone.
    a.handle(now, blob(1, LEECHING));
    let (tracker, _) = next_request(&mut a, &mut now);
    a.handle(now, Event::Answered { tracker, response: &answer(5000) });
    a.handle(now, blob(1, SEEDING));
    for n in 2..5 {
        now += GATHER;
        a.handle(now, blob(n, idle));
        assert_eq!(a.poll(), None, "it wants nobody yet");
        a.handle(now, blob(n, LEECHING));
        let Some(Effect::Send { tracker, request }) = a.poll() else { panic!("blob {n} waits") };
        assert!(request.blobs.iter().any(|blob| blob.digest == digest(n) && blob.state == LEECHING));
        a.handle(now, Event::Answered { tracker, response: &answer(5000) });
        // Later wishes are in no hurry.
        a.handle(now, blob(n, CONTENT));
        a.handle(now, blob(n, LEECHING));
        assert_eq!(a.poll(), None);
        a.handle(now, blob(n, State::Gone));
    }
}

#[test]
fn a_tracker_that_restarted_hears_everything() {
    let mut a = announcer(&["t"]);
    let mut now = Instant::ZERO;
    a.handle(now, blob(1, SEEDING));
    a.handle(now, blob(2, CONTENT));
    for _ in 0..2 {
        let (tracker, _) = next_request(&mut a, &mut now);
        a.handle(now, Event::Answered { tracker, response: &answer(3000) });
    }
    let (tracker, request) = next_request(&mut a, &mut now);
    assert_eq!((request.full, request.blobs.len()), (false, 0));
    let before = now;
    a.handle(now, Event::Answered { tracker, response: &Response { resend: true, ..answer(3000) } });
    let (_, request) = next_request(&mut a, &mut now);
    assert_eq!((request.full, request.blobs.len(), now.since(before)), (true, 2, GATHER));
}

#[test]
fn a_dead_trackers_blobs_go_to_the_next_and_come_back() {
    let mut a = announcer(&["a", "b"]);
    let mut now = Instant::ZERO;
    let ring = Ring::new(["a", "b"]).unwrap();
    let of_a = (0..).find(|n| ring.owners(&digest(*n), 1) == ["a"]).unwrap();
    a.handle(now, blob(of_a, LEECHING));
    let start = now;
    for _ in 0..2 {
        let (tracker, _) = next_request(&mut a, &mut now);
        assert_eq!(tracker, TrackerId(0));
        a.handle(now, Event::Failed { tracker });
    }
    let (tracker, request) = next_request(&mut a, &mut now);
    assert_eq!((tracker, request.blobs.len()), (TrackerId(1), 1));
    assert!(now.since(start) < Duration::from_secs(1));
    let peer = Candidate { id: PeerId::new([1; 20]), addr: SocketAddr::from(([10, 0, 0, 2], 1)), origin: true };
    let named = Response { blobs: vec![(digest(of_a), vec![peer])], ..answer(60_000) };
    a.handle(now, Event::Answered { tracker, response: &named });
    assert_eq!(a.poll(), Some(Effect::Candidates { digest: digest(of_a), peers: vec![peer] }));
    // The dead one is asked now and then, and takes its blobs back.
    let (tracker, request) = next_request(&mut a, &mut now);
    assert_eq!((tracker, request.blobs.len()), (TrackerId(0), 0));
    a.handle(now, Event::Answered { tracker, response: &answer(3000) });
    let (tracker, request) = next_request(&mut a, &mut now);
    assert_eq!((tracker, request.blobs.len()), (TrackerId(0), 1));
}
