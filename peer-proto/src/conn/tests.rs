use super::{pair::*, *};
use crate::{
    pieces::PieceSet,
    swarm::Class,
    wire::{CONTROL_LEN_MAX, Farewell, Form, Refusal, Rejection, WireError},
};
use alloc::{collections::BTreeSet, format, string::String, vec, vec::Vec};
use proptest::prelude::*;

const MIB: u32 = 1 << 20;
const S: Duration = Duration::from_secs(1);

fn request(channel: Channel, piece: u32) -> [u8; HEADER_LEN] {
    Header::Request { channel, piece, class: Class::Foreground }.encode()
}

fn piece_of(channel: Channel, piece: u32, len: u32) -> [u8; HEADER_LEN] {
    Header::Piece { channel, piece, len }.encode()
}

// How it goes.

#[test]
fn requests_say_whether_somebody_waits_to_those_that_know_classes() {
    for (versions, idly) in [((1, 2), " idly"), ((1, 1), "")] {
        let b = Conn::accepted(Instant::ZERO, Hello { versions, ..Hello::new(id(2)) });
        let mut p = Pair::of(Conn::dialled(Instant::ZERO, Hello::new(id(1)), None), b);
        p.run();
        let on = p.open(A, 9, "....");
        p.run();
        p.does(B, Event::Accept { channel: on, has: set("####") });
        p.run();
        p.told(B);
        p.request(A, on, 0).unwrap();
        p.does(A, Event::Class { channel: on, class: Class::Background });
        p.request(A, on, 1).unwrap();
        p.does(A, Event::Class { channel: on, class: Class::Foreground });
        p.request(A, on, 2).unwrap();
        p.run();
        assert_eq!(p.told(B), ["serve 0 #0", &format!("serve 0 #1{idly}"), "serve 0 #2"]);
    }
}

#[test]
fn both_ends_learn_who_is_there() {
    let dialler = Hello { shard: 3, ..Hello::new(id(1)) };
    let acceptor = Hello { origin: true, port: core::num::NonZeroU16::new(15001), window: 4, ..Hello::new(id(2)) };
    let a = Conn::dialled(Instant::ZERO, dialler, Some(id(2)));
    let mut p = Pair::of(a, Conn::accepted(Instant::ZERO, acceptor));
    p.run();
    assert_eq!(p.told(A), ["handshaken 02020202"]);
    assert_eq!(p.told(B), ["handshaken 01010101"]);
    assert_eq!(p.ends[A].conn.peer(), Some(&acceptor));
    assert_eq!(p.ends[B].conn.peer(), Some(&dialler));
    assert_eq!((p.ends[A].conn.room(), p.ends[B].conn.room()), (4, 16));
}

#[test]
fn an_acceptor_says_nothing_to_a_silent_stranger() {
    let mut p =
        Pair::of(Conn::accepted(Instant::ZERO, Hello::new(id(1))), Conn::accepted(Instant::ZERO, Hello::new(id(2))));
    p.run();
    assert_eq!(p.ends[A].sends, 0);
}

#[test]
fn a_blob_is_offered_opened_and_a_piece_fetched_each_way() {
    let mut p = Pair::shaken();
    let on = p.open(A, 9, "#...");
    p.run();
    assert_eq!(p.told(B), ["offered 0: blob 9, has 1"]);
    p.does(B, Event::Accept { channel: on, has: set("...#") });
    p.run();
    assert_eq!(p.told(A), ["opened 0: ...#"]);
    assert_eq!(p.told(B), ["opened 0: #..."]);

    p.request(A, on, 3).unwrap();
    p.request(B, on, 0).unwrap();
    p.run();
    assert_eq!(p.told(A), ["serve 0 #0"]);
    assert_eq!(p.told(B), ["serve 0 #3"]);
    p.does(A, Event::Ready { channel: on, piece: piece(0) });
    p.does(B, Event::Ready { channel: on, piece: piece(3) });
    p.run();
    assert_eq!(p.told(A), ["arrived 0 #3"]);
    assert_eq!(p.told(B), ["arrived 0 #0"]);
    assert_eq!((p.ends[A].conn.room(), p.ends[B].conn.room()), (16, 16));

    p.does(A, Event::Close { channel: on });
    p.run();
    assert_eq!((p.told(A), p.told(B)), (vec![], vec![String::from("shut 0")]));
    assert_eq!((p.ends[A].conn.channels(), p.ends[B].conn.channels()), (0, 0));
    assert_eq!(p.request(A, on, 1), Err(CommandError::NotOpen));
}

#[test]
fn each_side_numbers_its_own_channels_and_never_the_same_soon() {
    let mut p = Pair::shaken();
    let (first, second, third) = (p.open(A, 1, "...."), p.open(A, 2, "...."), p.open(B, 3, "...."));
    assert_eq!([first, second, third].map(Channel::get), [0, 2, 1]);
    p.run();
    p.does(B, refuse(first));
    p.run();
    assert_eq!(p.told(A), ["offered 1: blob 3, has 0", "refused 0: blob is unknown"]);
    let again = p.open(A, 1, "....");
    assert_eq!(again.get(), 2048, "the same slot, used once before");
    p.run();
    p.told(B);
    p.does(B, Event::Accept { channel: first, has: set("####") });
    p.run();
    assert_eq!(p.told(B), [""; 0], "a late command meets no other channel");
    p.does(B, Event::Accept { channel: again, has: set("####") });
    p.run();
    assert_eq!(p.told(A), ["opened 2048: ####"]);
}

#[test]
fn announcements_gather_while_a_write_is_under_way() {
    let (mut p, on) = Pair::opened("....", "....");
    p.ends[B].stuck = true;
    p.does(B, Event::Have { channel: on, piece: piece(2) });
    p.write(B);
    let before = p.ends[B].sends;
    for n in [3, 0, 1] {
        p.does(B, Event::Have { channel: on, piece: piece(n) });
    }
    p.run();
    assert_eq!((p.ends[B].sends, p.told(A)), (before, vec![]));
    p.ends[B].stuck = false;
    p.run();
    assert_eq!(p.ends[B].sends, before + 1, "three in one frame");
    assert_eq!(p.told(A), ["has 0 #2", "has 0 #0", "has 0 #1", "has 0 #3"]);
    p.does(B, Event::Have { channel: on, piece: piece(0) });
    p.does(B, Event::HaveAll { channel: on });
    p.run();
    assert_eq!(p.told(A), ["has 0 all"], "which says it all");
}

#[test]
fn pieces_that_come_before_the_answer_are_in_it() {
    let mut p = Pair::shaken();
    let on = p.open(A, 9, "....");
    p.run();
    for n in [1, 3] {
        p.does(A, Event::Have { channel: on, piece: piece(n) });
    }
    p.run();
    assert_eq!(p.told(B), ["offered 0: blob 9, has 0"]);
    p.does(B, Event::Accept { channel: on, has: set("....") });
    p.run();
    assert_eq!(p.told(B), ["opened 0: .#.#"]);
    let on = p.open(A, 8, "....");
    p.does(A, Event::HaveAll { channel: on });
    p.run();
    p.does(B, Event::Accept { channel: on, has: set("....") });
    p.run();
    assert_eq!(p.told(B), ["offered 2: blob 8, has 0", "opened 2: ####"]);
}

#[test]
fn control_frames_overtake_queued_pieces() {
    let (mut p, on) = Pair::opened("....", "####");
    p.ends[B].generous = true;
    for n in 0..3 {
        p.request(A, on, n).unwrap();
    }
    p.write(A);
    p.ends[B].stuck = true;
    p.run();
    // The first piece is under way; two wait. What is said now goes before them.
    let other = p.open(B, 7, "....");
    p.ends[B].stuck = false;
    p.run();
    let offered = format!("offered {}: blob 7, has 0", other.get());
    assert_eq!(p.told(A), ["arrived 0 #0", &offered, "arrived 0 #1", "arrived 0 #2"]);
}

#[test]
fn the_oldest_ready_request_is_served_and_each_alone() {
    let (mut p, on) = Pair::opened("....", "####");
    for n in [0, 1, 2] {
        p.request(A, on, n).unwrap();
    }
    p.run();
    p.does(B, Event::Ready { channel: on, piece: piece(2) });
    let before = p.ends[B].sends;
    p.run();
    p.does(B, Event::Ready { channel: on, piece: piece(1) });
    p.does(B, Event::Ready { channel: on, piece: piece(0) });
    p.run();
    assert_eq!(p.told(A), ["arrived 0 #2", "arrived 0 #0", "arrived 0 #1"]);
    assert_eq!(p.ends[B].sends, before + 3);
}

#[test]
fn a_request_may_be_turned_down() {
    let (mut p, on) = Pair::opened("....", "#...");
    p.request(A, on, 3).unwrap();
    p.run();
    p.does(B, Event::Reject { channel: on, piece: piece(3), reason: Rejection::Missing });
    p.run();
    assert_eq!(p.told(A), ["rejected 0 #3: piece is missing"]);
    assert_eq!(p.ends[A].conn.room(), 16);
    // Late words about it do nothing.
    p.does(B, Event::Ready { channel: on, piece: piece(3) });
    p.run();
    assert_eq!(p.told(A), [""; 0]);
}

#[test]
fn the_window_is_kept_and_a_twin_refused() {
    let acceptor = Hello { window: 2, ..Hello::new(id(2)) };
    let now = Instant::ZERO;
    let mut p = Pair::of(Conn::dialled(now, Hello::new(id(1)), None), Conn::accepted(now, acceptor));
    p.run();
    let on = p.open(A, 9, "....");
    assert_eq!(p.request(A, on, 0), Err(CommandError::NotOpen), "not yet");
    p.run();
    p.does(B, Event::Accept { channel: on, has: set("####") });
    p.run();
    p.request(A, on, 0).unwrap();
    assert_eq!(p.request(A, on, 0), Err(CommandError::Twice));
    p.request(A, on, 3).unwrap();
    assert_eq!(p.request(A, on, 1), Err(CommandError::Full));
    p.run();
    p.does(B, Event::Ready { channel: on, piece: piece(3) });
    p.run();
    assert_eq!(p.request(A, on, 1), Ok(()));
}

#[test]
fn unanswered_openings_and_channels_are_bounded() {
    let mut p = Pair::shaken();
    let mut opened = Vec::new();
    for _ in 0..CHANNELS_MAX / OPENING_MAX {
        let batch: Vec<Channel> = (0..OPENING_MAX).map(|_| p.open(A, 9, "#...")).collect();
        assert_eq!(p.ends[A].conn.open(p.now, &open(9, "#...")), Err(CommandError::Full));
        p.run();
        for channel in &batch {
            p.does(B, Event::Accept { channel: *channel, has: set("...#") });
        }
        p.run();
        opened.extend(batch);
    }
    assert_eq!(p.ends[A].conn.open(p.now, &open(9, "#...")), Err(CommandError::Full));
    assert_eq!((p.ends[A].conn.channels(), p.ends[B].conn.channels()), (CHANNELS_MAX, CHANNELS_MAX));
    assert_eq!(opened.iter().collect::<BTreeSet<_>>().len(), CHANNELS_MAX);
    p.does(B, Event::Close { channel: opened[500] });
    p.run();
    assert!(p.told(A).contains(&format!("shut {}", opened[500].get())));
    p.open(A, 9, "#...");
}

// Cancelling and closing, with everything that can cross on the way.

#[test]
fn a_cancel_in_time_is_answered_and_frees_the_window() {
    let (mut p, on) = Pair::opened("....", "####");
    p.request(A, on, 0).unwrap();
    p.run();
    p.does(A, Event::Cancel { channel: on, piece: piece(0) });
    p.does(A, Event::Cancel { channel: on, piece: piece(0) });
    assert_eq!(p.ends[A].conn.room(), 15, "remembered until answered");
    assert_eq!(p.request(A, on, 0), Err(CommandError::Twice));
    p.run();
    assert_eq!(p.told(B), ["serve 0 #0", "unserve 0 #0"]);
    assert_eq!(p.told(A), ["released 0 #0"]);
    p.request(A, on, 0).unwrap();
    p.ends[B].generous = true;
    p.run();
    assert_eq!(p.told(B), ["serve 0 #0"]);
}

#[test]
fn a_cancel_that_crosses_its_piece_has_it_thrown_away() {
    let (mut p, on) = Pair::opened("....", "####");
    p.ends[B].generous = true;
    p.request(A, on, 1).unwrap();
    p.write(A);
    p.write(A);
    let bytes = p.intercept(B);
    p.does(A, Event::Cancel { channel: on, piece: piece(1) });
    p.inject(B, &bytes);
    assert_eq!(p.told(B), ["serve 0 #1"]);
    assert_eq!(p.told(A), ["released 0 #1"]);
    assert_eq!(p.ends[A].conn.room(), 16);
    assert_eq!(p.ends[A].conn.need(), Need::Header);
}

#[test]
fn a_cancel_comes_too_late_for_a_piece_being_read() {
    let (mut p, on) = Pair::opened("....", "####");
    p.request(A, on, 3).unwrap();
    p.run();
    p.inject(A, &piece_of(on, 3, 5));
    assert_eq!(p.ends[A].conn.need(), Need::Payload { channel: on, piece: piece(3), len: 5 });
    p.does(A, Event::Cancel { channel: on, piece: piece(3) });
    assert_eq!(p.request(A, on, 3), Err(CommandError::Twice));
    p.inject(A, &[4; 5]);
    assert_eq!(p.told(A), ["arrived 0 #3"]);
}

#[test]
fn the_peer_may_ask_again_before_our_write_is_known_to_have_ended() {
    let (mut p, on) = Pair::opened("....", "####");
    p.ends[B].generous = true;
    for n in [0, 1, 2, 3] {
        p.request(A, on, n).unwrap();
    }
    p.write(A);
    p.write(A);
    p.run();
    assert_eq!(p.told(A), ["arrived 0 #0", "arrived 0 #1", "arrived 0 #2", "arrived 0 #3"]);
    // B sends piece 3 again, its write not yet reported, and A asks once more.
    p.ends[B].stuck = true;
    p.request(A, on, 3).unwrap();
    p.run();
    p.inject(A, &[&piece_of(on, 3, 5)[..], &[4; 5]].concat());
    p.request(A, on, 3).unwrap();
    p.run();
    assert_eq!(p.ends[B].conn.peer().map(|peer| peer.id), Some(id(1)), "still there");
}

#[test]
fn closing_takes_everything_on_the_channel_with_it() {
    let (mut p, on) = Pair::opened("#...", "####");
    p.ends[A].stuck = true;
    p.ends[B].stuck = true;
    p.request(A, on, 1).unwrap();
    p.request(B, on, 0).unwrap();
    p.does(A, Event::Close { channel: on });
    p.does(B, Event::Have { channel: on, piece: piece(3) });
    assert_eq!(p.ends[A].conn.room(), 15);
    p.ends[A].stuck = false;
    p.ends[B].stuck = false;
    p.run();
    // B's request reached A after its CLOSE and is ignored; A's own ends with B's CLOSE.
    assert_eq!(p.told(A), ["released 0 #1"]);
    assert_eq!(p.told(B), ["serve 0 #1", "shut 0"]);
    assert_eq!((p.ends[A].conn.room(), p.ends[B].conn.room()), (16, 16));
    assert_eq!((p.ends[A].conn.channels(), p.ends[B].conn.channels()), (0, 0));
}

#[test]
fn closes_that_cross_end_quietly() {
    let (mut p, on) = Pair::opened("#...", "####");
    p.request(A, on, 1).unwrap();
    p.run();
    p.told(B);
    p.does(A, Event::Close { channel: on });
    p.does(B, Event::Close { channel: on });
    p.run();
    assert_eq!((p.told(A), p.told(B)), (vec![String::from("released 0 #1")], vec![]));
    assert_eq!((p.ends[A].conn.channels(), p.ends[B].conn.channels()), (0, 0));
    p.open(A, 9, "....");
    p.run();
    assert_eq!(p.told(B), ["offered 2048: blob 9, has 0"]);
}

#[test]
fn a_piece_under_way_when_its_channel_closes_still_ends_its_frame() {
    for closer in [A, B] {
        let (mut p, on) = Pair::opened("....", "####");
        p.ends[B].generous = true;
        p.request(A, on, 1).unwrap();
        p.write(A);
        p.ends[B].stuck = true;
        p.run();
        p.does(closer, Event::Close { channel: on });
        p.ends[B].stuck = false;
        p.run();
        let (a, b) = (p.told(A), p.told(B));
        match closer {
            A => assert_eq!((&a[..], &b[1..]), (&[String::from("released 0 #1")][..], &[String::from("shut 0")][..])),
            _ => assert_eq!((a, b.len()), (vec![String::from("arrived 0 #1"), String::from("shut 0")], 1)),
        }
        assert_eq!((p.ends[A].conn.channels(), p.ends[B].conn.channels()), (0, 0));
        assert_eq!(p.ends[A].conn.room(), 16);
    }
}

#[test]
fn an_opening_given_up_is_closed_once_answered() {
    for accepted in [true, false] {
        let mut p = Pair::shaken();
        let on = p.open(A, 9, "....");
        p.does(A, Event::Close { channel: on });
        p.run();
        let answer = Event::Accept { channel: on, has: set("##..") };
        p.does(B, if accepted { answer } else { refuse(on) });
        p.run();
        assert_eq!(p.told(A), [""; 0]);
        let b = p.told(B);
        assert_eq!(b.last().unwrap(), if accepted { "shut 0" } else { "offered 0: blob 9, has 0" });
        assert_eq!((p.ends[A].conn.channels(), p.ends[B].conn.channels()), (0, 0));
    }
}

#[test]
fn an_acceptance_with_other_edges_is_a_refusal() {
    let mut p = Pair::shaken();
    let on = p.open(A, 9, "....");
    p.run();
    let other = crate::layout::Geometry::of(1).unwrap();
    p.does(B, Event::Accept { channel: on, has: PieceSet::full(&other) });
    p.run();
    assert_eq!(p.told(A), ["refused 0: geometry differs"]);
    assert_eq!(p.told(B)[1..], ["refused 0: geometry differs"]);
}

#[test]
fn goodbye_is_heard_and_both_hang_up() {
    let (mut p, on) = Pair::opened("....", "####");
    p.request(A, on, 0).unwrap();
    p.does(A, Event::Goodbye(Farewell::Leaving));
    assert_eq!(p.ends[A].conn.need(), Need::Nothing);
    p.run();
    assert_eq!(p.told(A), ["closed, fault Nobody: closed: leaving", "hangup"]);
    assert_eq!(p.told(B), ["serve 0 #0", "closed, fault Nobody: peer said goodbye: leaving", "hangup"]);
    assert_eq!((p.ends[A].conn.deadline(), p.ends[B].conn.deadline()), (None, None));
    p.does(A, Event::Have { channel: on, piece: piece(1) });
    p.does(A, Event::Tick);
    assert_eq!(p.request(A, on, 2), Err(CommandError::NotOpen));
    assert!(p.ends[A].conn.poll().is_none());
}

#[test]
fn goodbye_to_a_peer_that_does_not_read_is_not_waited_for() {
    let (mut p, on) = Pair::opened("....", "....");
    p.ends[A].stuck = true;
    p.does(A, Event::Have { channel: on, piece: piece(0) });
    p.run();
    p.does(A, Event::Goodbye(Farewell::Done));
    p.pass(LINGER);
    assert_eq!(p.told(A), ["closed, fault Nobody: closed: done", "hangup"]);
}

#[test]
fn a_lost_socket_ends_at_once() {
    let (mut p, _) = Pair::opened("....", "....");
    p.does(A, Event::Lost);
    p.does(B, Event::Goodbye(Farewell::Done));
    p.does(B, Event::Lost);
    p.run();
    assert_eq!(p.told(A), ["closed, fault Network: connection lost", "hangup"]);
    assert_eq!(p.told(B), ["closed, fault Nobody: closed: done", "hangup"]);
}

// Handshakes that come to nothing.

/// What becomes of an acceptor to whom this is said first.
fn greeted(bytes: &[u8]) -> String {
    let now = Instant::ZERO;
    let mut p = Pair::of(Conn::accepted(now, Hello::new(id(9))), Conn::accepted(now, Hello::new(id(2))));
    p.inject(B, bytes);
    p.told(B).join(", then ")
}

#[test]
fn whoever_does_not_say_hello_is_sent_away() {
    let out_of_place = "closed, fault Peer: peer broke the protocol: hello out of place, then hangup";
    let garbage = "closed, fault Peer: peer sent garbage: ";
    assert_eq!(greeted(&Header::Ping.encode()), out_of_place);
    assert_eq!(greeted(&request(Channel(0), 0)), out_of_place);
    assert_eq!(
        greeted(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"),
        format!("{garbage}header fails its checksum, then hangup")
    );
    assert_eq!(greeted(&[0; 64]), format!("{garbage}header fails its checksum, then hangup"));
    let body = Body { len: 40, crc: crc32fast::hash(&[1; 40]) };
    let hello = [&Header::Hello { body }.encode()[..], &[1; 40]].concat();
    assert_eq!(greeted(&hello), format!("{garbage}hello has a wrong magic, then hangup"));
    assert_eq!(greeted(&[&hello[..32], &[2; 40]].concat()), format!("{garbage}body fails its checksum, then hangup"));
    let busy = Header::Goodbye { reason: Farewell::Busy }.encode();
    assert_eq!(greeted(&busy), "closed, fault Nobody: peer said goodbye: busy, then hangup");
}

#[test]
fn half_a_handshake_has_five_seconds() {
    let mut hello = Vec::new();
    Hello::new(id(3)).encode(&mut hello);
    for len in [0, 1, 31, 32, 40, hello.len() - 1] {
        let now = Instant::ZERO;
        let mut p = Pair::of(Conn::accepted(now, Hello::new(id(1))), Conn::dialled(now, Hello::new(id(2)), None));
        p.ends[A].read(now, &hello[..len]);
        assert_eq!(p.ends[A].conn.deadline(), Some(now + HANDSHAKE_TIME));
        p.ends[B].stuck = true;
        p.pass(HANDSHAKE_TIME);
        assert_eq!(p.told(A), ["closed, fault Network: peer is too slow: no hello", "hangup"], "{len} bytes");
    }
}

#[test]
fn versions_without_a_common_one_part_and_say_so() {
    let now = Instant::ZERO;
    let newer = Hello { versions: (3, 9), ..Hello::new(id(2)) };
    let mut p = Pair::of(Conn::dialled(now, Hello::new(id(1)), None), Conn::accepted(now, newer));
    p.run();
    assert_eq!(p.told(A), ["closed, fault Nobody: peer speaks versions 3 to 9", "hangup"]);
    let mut p = Pair::of(Conn::dialled(now, newer, None), Conn::accepted(now, Hello::new(id(1))));
    p.run();
    assert_eq!(p.told(B), ["closed, fault Nobody: peer speaks versions 3 to 9", "hangup"]);
}

#[test]
fn a_node_does_not_talk_to_itself_or_to_a_stranger() {
    let now = Instant::ZERO;
    let mut p = Pair::of(Conn::dialled(now, Hello::new(id(1)), None), Conn::accepted(now, Hello::new(id(1))));
    p.run();
    assert_eq!(p.told(B), ["closed, fault Nobody: peer is this node", "hangup"]);
    assert_eq!(p.told(A), ["closed, fault Nobody: peer is this node", "hangup"]);
    let mut p = Pair::of(Conn::dialled(now, Hello::new(id(1)), Some(id(3))), Conn::accepted(now, Hello::new(id(2))));
    p.run();
    let stranger = format!("closed, fault Network: peer is {}, not the node dialled", id(2));
    assert_eq!(p.told(A), [&stranger, "hangup"]);
    assert_eq!(p.told(B)[1..], ["closed, fault Nobody: peer said goodbye: wrong peer", "hangup"]);
}

// A peer that breaks the rules: what B says when these bytes come as if from A.

/// Of an open channel 0 on which B has everything, and B has asked A for piece 3.
fn said(bytes: impl AsRef<[u8]>) -> String {
    let (mut p, on) = Pair::opened("...#", "####");
    p.request(B, on, 3).unwrap();
    p.run();
    p.told(A);
    p.inject(B, bytes.as_ref());
    let mut notes = p.told(B);
    if notes.last().is_some_and(|last| last == "hangup") {
        notes.pop();
        assert_eq!(p.told(A).last().unwrap(), "hangup", "the peer is told");
    }
    notes.pop().map_or(String::new(), |last| {
        last.replace("closed, fault Peer: peer broke the protocol: ", "violation: ")
            .replace("closed, fault Peer: peer sent garbage: ", "garbage: ")
    })
}

const ON: Channel = Channel(0);

#[test]
fn requests_out_of_bounds() {
    assert_eq!(said(request(ON, 3)), "serve 0 #3");
    assert_eq!(said(request(ON, 4)), "violation: piece 4 of 4");
    assert_eq!(said(request(ON, -1i32 as u32)), "violation: piece 4294967295 of 4");
    assert_eq!(said(request(Channel(2), 0)), "violation: channel 2 is not open for this frame");
    assert_eq!(said(request(Channel(1), 0)), "violation: channel 1 is not open for this frame");
    assert_eq!(said(request(Channel(2048), 0)), "violation: channel 2048 is not open for this frame");
    assert_eq!(said(request(Channel(u32::MAX), 0)), "violation: channel 4294967295 is not open for this frame");
    assert_eq!(said([request(ON, 1), request(ON, 1)].concat()), "violation: piece 1 is requested twice");
    assert_eq!(said(Header::Cancel { channel: ON, piece: 4 }.encode()), "violation: piece 4 of 4");
    assert_eq!(said(Header::Cancel { channel: ON, piece: 2 }.encode()), "", "answered just now, for all we know");
}

#[test]
fn more_requests_than_the_window() {
    let now = Instant::ZERO;
    let narrow = Hello { window: 2, ..Hello::new(id(2)) };
    let mut p = Pair::of(Conn::dialled(now, Hello::new(id(1)), None), Conn::accepted(now, narrow));
    p.run();
    let on = p.open(A, 9, "....");
    p.run();
    p.does(B, Event::Accept { channel: on, has: set("####") });
    p.run();
    p.inject(B, &[request(on, 0), request(on, 1), request(on, 2)].concat());
    let notes = p.told(B);
    assert_eq!(notes[notes.len() - 2], "closed, fault Peer: peer broke the protocol: more than 2 requests");
}

#[test]
fn pieces_that_nobody_asked_for_or_of_another_length() {
    assert_eq!(said(piece_of(ON, 3, 5)), "");
    assert_eq!(said([&piece_of(ON, 3, 5)[..], &[4; 5]].concat()), "arrived 0 #3");
    assert_eq!(said(piece_of(ON, 2, MIB)), "violation: piece 2 was not requested");
    assert_eq!(said(piece_of(ON, 77, MIB)), "violation: piece 77 was not requested");
    assert_eq!(said(piece_of(Channel(4), 3, 5)), "violation: channel 4 is not open for this frame");
    assert_eq!(said(piece_of(ON, 3, 4)), "violation: piece 3 has 4 bytes, layout says 5");
    assert_eq!(said(piece_of(ON, 3, 16 * MIB)), "violation: piece 3 has 16777216 bytes, layout says 5");
    assert_eq!(said(piece_of(ON, 3, u32::MAX)), "garbage: frame of type 8 has a body of 4294967295 bytes");
    let reason = Rejection::Busy;
    assert_eq!(said(Header::Reject { channel: ON, piece: 1, reason }.encode()), "violation: piece 1 was not requested");
    let twice = [&piece_of(ON, 3, 5)[..], &[4; 5], &piece_of(ON, 3, 5)].concat();
    assert_eq!(said(twice), "violation: piece 3 was not requested");
}

#[test]
fn openings_out_of_place() {
    let frame = |channel, n: u8| {
        let mut frame = Vec::new();
        open(n, "....").encode(Channel(channel), &mut frame);
        frame
    };
    assert_eq!(said(frame(2, 5)), "offered 2: blob 5, has 0");
    assert_eq!(said(frame(0, 5)), "violation: channel 0 is not the peer's to open");
    assert_eq!(said(frame(2048, 5)), "violation: channel 2048 is not the peer's to open", "the same slot");
    assert_eq!(said(frame(1, 5)), "violation: channel 1 is not the peer's to open");
    let many: Vec<u8> = (1..=OPENING_MAX as u32 + 1).flat_map(|n| frame(2 * n, 5)).collect();
    assert_eq!(said(&many), "violation: too many unanswered opens");
    let not_open = "is not open for this frame";
    assert_eq!(
        said([frame(2, 5), request(Channel(2), 0).to_vec()].concat()),
        format!("violation: channel 2 {not_open}")
    );
    let opened = Header::Opened { channel: ON, form: Form::All, body: Body { len: 0, crc: 0 } };
    assert_eq!(said(opened.encode()), format!("violation: channel 0 {not_open}"));
    let refused = Header::Refused { channel: ON, reason: Refusal::Busy };
    assert_eq!(said(refused.encode()), format!("violation: channel 0 {not_open}"));
    assert_eq!(said(Header::Close { channel: Channel(2) }.encode()), format!("violation: channel 2 {not_open}"));
    assert_eq!(said(Header::HaveAll { channel: Channel(2) }.encode()), format!("violation: channel 2 {not_open}"));
    let close = Header::Close { channel: ON }.encode();
    assert_eq!(said([close, close].concat()), format!("violation: channel 0 {not_open}"));
}

#[test]
fn announcements_out_of_bounds_and_damaged() {
    let have = |pieces: &[u32]| {
        let mut frame = Vec::new();
        wire::encode_have(ON, pieces.iter().copied(), &mut frame);
        frame
    };
    assert_eq!(said(have(&[0, 3])), "has 0 #3");
    assert_eq!(said(have(&[0, 4])), "violation: piece 4 of 4");
    assert_eq!(said(have(&[u32::MAX])), "violation: piece 4294967295 of 4");
    let mut damaged = have(&[2]);
    damaged[32] ^= 1;
    assert_eq!(said(damaged), "garbage: body fails its checksum");
    let body = Body { len: CONTROL_LEN_MAX, crc: 0 };
    let mut giant = Header::Have { channel: ON, body }.encode();
    giant[4..8].copy_from_slice(&(1u32 << 30).to_le_bytes());
    let seal = crc32fast::hash(&giant[..28]);
    giant[28..].copy_from_slice(&seal.to_le_bytes());
    assert_eq!(said(giant), "garbage: frame of type 5 has a body of 1073741824 bytes");
}

#[test]
fn a_second_hello_and_plain_garbage() {
    let mut hello = Vec::new();
    Hello::new(id(1)).encode(&mut hello);
    assert_eq!(said(&hello), "violation: hello out of place");
    assert_eq!(said([0xff; 32]), "garbage: header fails its checksum");
    assert_eq!(said([0xff; 31]), "", "not a header yet");
}

#[test]
fn opened_with_bits_of_another_blob() {
    let mut p = Pair::shaken();
    let on = p.open(B, 9, "....");
    p.run();
    let other = crate::layout::Geometry::of(20 << 20).unwrap();
    let mut bits = PieceSet::new(&other);
    bits.insert(other.piece(17).unwrap());
    let mut frame = Vec::new();
    wire::encode_opened(on, &bits, &mut frame);
    p.inject(B, &frame);
    assert_eq!(p.told(B)[0], "closed, fault Peer: peer sent garbage: piece set is out of bounds");
}

#[test]
fn what_a_peer_makes_us_write_is_bounded() {
    // It never reads, and asks and takes back; or opens what is refused.
    let (mut p, on) = Pair::opened("....", "####");
    p.ends[B].stuck = true;
    let pings = Header::Ping.encode().repeat(2 * CONTROL_QUEUE_MAX / HEADER_LEN);
    p.inject(B, &pings);
    assert_eq!(p.told(B), [""; 0], "a hundred PINGs have one PONG");
    let turn = [request(on, 0), Header::Cancel { channel: on, piece: 0 }.encode()].concat();
    p.inject(B, &turn.repeat(CONTROL_QUEUE_MAX / HEADER_LEN + 2));
    let notes = p.told(B);
    let unread = "closed, fault Network: peer does not read: queue of control frames is full";
    assert!(notes.iter().any(|note| note == unread), "{:?}", notes.last());

    let (mut p, on) = Pair::opened("....", "####");
    p.ends[B].stuck = true;
    p.does(B, Event::Have { channel: on, piece: piece(0) });
    p.write(B);
    for _ in 0..=HAVES_QUEUE_MAX {
        p.does(B, Event::Have { channel: on, piece: piece(0) });
    }
    p.write(B);
    assert_eq!(p.told(B), ["closed, fault Network: peer does not read: queue of announcements is full"]);
}

// Time.

#[test]
fn a_quiet_connection_is_kept_alive() {
    let (mut p, on) = Pair::opened("....", "####");
    let sends = p.ends[A].sends;
    p.pass(600 * S);
    assert_eq!((p.told(A), p.told(B)), (vec![], vec![]));
    let pings = p.ends[A].sends - sends;
    assert!((28..=62).contains(&pings), "{pings} in ten minutes");
    p.request(A, on, 0).unwrap();
    p.run();
    assert_eq!(p.told(B), ["serve 0 #0"]);
}

#[test]
fn silence_ends_it_after_a_minute() {
    let (mut p, _) = Pair::opened("....", "....");
    let start = p.now;
    // B's words are lost from now on.
    while p.now - start < IDLE_MAX {
        p.now = p.ends[A].conn.deadline().unwrap();
        p.does(A, Event::Tick);
        p.write(A);
        p.write(A);
        p.intercept(B);
    }
    assert_eq!(p.now - start, IDLE_MAX);
    assert_eq!(p.told(A), ["closed, fault Network: peer is too slow: silent", "hangup"]);
}

#[test]
fn another_time_of_silence_may_be_set() {
    let a = Conn::dialled(Instant::ZERO, Hello::new(id(1)), None).idle_after(7 * S);
    let mut p = Pair::of(a, Conn::accepted(Instant::ZERO, Hello::new(id(2))));
    p.run();
    p.told(A);
    assert_eq!(p.ends[A].conn.deadline(), Some(p.now + 7 * S));
    p.now += 7 * S;
    p.does(A, Event::Tick);
    p.run();
    assert_eq!(p.told(A)[0], "closed, fault Network: peer is too slow: silent");
}

#[test]
fn a_header_that_trickles_in_is_no_sign_of_life() {
    let (mut p, on) = Pair::opened("....", "####");
    let start = p.now;
    for byte in &request(on, 0)[..31] {
        p.now += 2 * S;
        let now = p.now;
        p.ends[B].read(now, &[*byte]);
        if p.ends[B].conn.deadline().is_some_and(|deadline| deadline <= now) {
            p.does(B, Event::Tick);
            p.write(B);
            p.write(B);
        }
    }
    assert!(p.now - start >= IDLE_MAX);
    assert_eq!(p.told(B)[0], "closed, fault Network: peer is too slow: silent");
}

#[test]
fn a_body_must_move() {
    // 64 KiB each ten seconds is enough, a byte less is not.
    for (chunk, enough) in [(64 << 10, true), ((64 << 10) - 1, false)] {
        let (mut p, on) = Pair::opened("....", "####");
        p.request(A, on, 0).unwrap();
        p.run();
        p.inject(A, &piece_of(on, 0, MIB));
        let mut left = MIB as usize;
        while left > 0 && !p.ends[A].hung_up {
            p.now += PROGRESS_TIME - Duration::from_nanos(1);
            let now = p.now;
            let take = left.min(chunk);
            p.ends[A].read(now, &vec![1; take]);
            left -= take;
            p.now += Duration::from_nanos(1);
            if p.ends[A].conn.deadline().is_some_and(|deadline| deadline <= p.now) {
                p.does(A, Event::Tick);
            }
            p.write(A);
            p.write(A);
        }
        let end = p.told(A);
        let slow = "closed, fault Network: peer is too slow: body comes too slowly";
        assert_eq!(end[0], if enough { "arrived 0 #0" } else { slow });
    }
    let (mut p, _) = Pair::opened("....", "####");
    let mut frame = Vec::new();
    wire::encode_have(ON, [1, 2].into_iter(), &mut frame);
    p.inject(B, &frame[..39]);
    p.pass(PROGRESS_TIME);
    assert_eq!(p.told(B)[0], "closed, fault Network: peer is too slow: body comes too slowly");
}

#[test]
fn what_we_keep_waiting_is_not_the_peers_fault() {
    let (mut p, on) = Pair::opened("....", "####");
    p.request(A, on, 3).unwrap();
    p.run();
    p.inject(A, &piece_of(on, 3, 5));
    for _ in 0..30 {
        p.now += 5 * S;
        p.does(A, Event::Held);
        p.does(A, Event::Tick);
        p.does(B, Event::Tick);
    }
    p.inject(A, &[4; 5]);
    assert_eq!(p.told(A), ["arrived 0 #3"]);
}

#[test]
fn a_write_must_move() {
    let (mut p, on) = Pair::opened("....", "####");
    p.ends[B].generous = true;
    p.request(A, on, 0).unwrap();
    p.write(A);
    p.ends[B].stuck = true;
    p.run();
    for _ in 0..5 {
        p.pass(9 * S);
        p.does(B, Event::Written(PROGRESS_MIN));
    }
    assert_eq!(p.told(B), ["serve 0 #0"]);
    p.does(B, Event::Written(PROGRESS_MIN - 1));
    p.pass(PROGRESS_TIME);
    // Nothing more can be said on a socket that takes nothing.
    assert_eq!(p.told(B), ["closed, fault Network: peer is too slow: writes are not taken", "hangup"]);
}

#[test]
fn a_write_begins_when_it_is_asked_for() {
    let (mut p, on) = Pair::opened("....", "####");
    p.now += 19 * S;
    p.request(A, on, 0).unwrap();
    p.ends[A].stuck = true;
    p.write(A);
    assert_eq!(p.ends[A].conn.deadline(), Some(p.now + PROGRESS_TIME));
}

// Everything at once.

/// What an end must hold to, kept beside it.
#[derive(Default)]
struct Ledger {
    asked: BTreeSet<(u32, u32)>,
    open: Vec<Channel>,
}

/// Both ends do sound things in any order over a pipe that is cut anywhere and stalls at times. Nobody is ever blamed, every
/// request has one answer, and in the end nothing is left over.
fn soak(seed: u64, turns: usize) {
    let mut p = Pair::shaken().seed(seed);
    let mut ledgers = [Ledger::default(), Ledger::default()];
    for turn in 0..turns {
        let end = p.random(2);
        let some = p.random(4) as u32;
        let pick = p.random(64);
        let on = ledgers[end].open.get(pick % ledgers[end].open.len().max(1)).copied();
        match (p.random(12), on) {
            (0, _) if ledgers[end].open.len() < 6 => {
                p.open(end, turn as u8, "#..#");
            }
            (1, Some(on)) if pick < 16 => {
                p.does(end, Event::Close { channel: on });
                ledgers[end].open.retain(|open| *open != on);
            }
            (2..=5, Some(on)) => {
                // Mostly the short piece: the others take a while to copy.
                let n = if pick.is_multiple_of(8) { some } else { 3 };
                let room = p.ends[end].conn.room();
                match p.request(end, on, n) {
                    Ok(()) => assert!(ledgers[end].asked.insert((on.get(), n))),
                    Err(CommandError::Full) => assert_eq!(room, 0),
                    Err(CommandError::Twice) => {}
                    Err(error) => panic!("{error} on an open channel"),
                }
            }
            (6, Some(on)) => p.does(end, Event::Cancel { channel: on, piece: piece(some) }),
            (7, Some(on)) => p.does(end, Event::Have { channel: on, piece: piece(some) }),
            (8, _) => p.ends[end].stuck ^= true,
            (9, _) => p.ends[end].generous ^= true,
            (10, Some(on)) => {
                let answer = Event::Reject { channel: on, piece: piece(some), reason: Rejection::Busy };
                let ready = Event::Ready { channel: on, piece: piece(some) };
                p.does(end, if pick.is_multiple_of(2) { answer } else { ready });
            }
            _ => p.pass(S / 100),
        }
        for _ in 0..p.random(3) {
            p.write(end);
        }
        if p.random(3) == 0 {
            p.run();
        }
        settle(&mut p, &mut ledgers);
    }
    // Let everything out: what is asked of either is granted, and all channels close.
    for end in [A, B] {
        p.ends[end].stuck = false;
        p.ends[end].generous = true;
    }
    for _ in 0..3 {
        p.run();
        settle(&mut p, &mut ledgers);
    }
    for end in [A, B] {
        for on in core::mem::take(&mut ledgers[end].open) {
            p.does(end, Event::Close { channel: on });
        }
    }
    p.run();
    settle(&mut p, &mut ledgers);
    for (end, ledger) in p.ends.iter().zip(ledgers) {
        assert!(ledger.asked.is_empty(), "unanswered: {:?}", ledger.asked);
        assert_eq!((end.conn.room(), end.conn.unanswered(), end.conn.channels()), (16, 0, 0));
    }
}

/// Books what the ends were told, and answers offers.
fn settle(p: &mut Pair, ledgers: &mut [Ledger; 2]) {
    for end in [A, B] {
        for note in p.told(end) {
            let mut words = note.split([' ', ':', '#']).filter(|word| !word.is_empty());
            let verb = words.next().unwrap();
            let mut number = || words.next().unwrap().parse::<u32>().unwrap();
            let ledger = &mut ledgers[end];
            match verb {
                "arrived" | "rejected" | "released" => {
                    let key = (number(), number());
                    assert!(ledger.asked.remove(&key), "{note}, unasked or answered twice");
                }
                "shut" => {
                    let on = number();
                    ledger.open.retain(|open| open.get() != on);
                    ledger.asked.retain(|(channel, _)| *channel != on);
                }
                "opened" => ledger.open.push(Channel(number())),
                "offered" => {
                    let channel = Channel(number());
                    let refuses = p.random(4) == 0;
                    let accept = Event::Accept { channel, has: set("####") };
                    p.does(end, if refuses { refuse(channel) } else { accept });
                }
                "has" | "serve" | "unserve" | "refused" => {}
                _ => panic!("{note}"),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sound_nodes_never_blame_each_other(seed in any::<u64>()) {
        soak(seed, 300);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), shaken in any::<bool>()) {
        let now = Instant::ZERO;
        let mut p = match shaken {
            true => Pair::opened("#...", "####").0,
            false => Pair::of(Conn::dialled(now, Hello::new(id(1)), None), Conn::accepted(now, Hello::new(id(2)))),
        };
        p.inject(B, &bytes);
    }

    /// Headers with a good seal and wild fields, and bodies with a good checksum and wild content.
    #[test]
    fn sealed_nonsense_never_panics(frames in proptest::collection::vec((1u8..15, 0u8..3, 0u32..6, 0u32..6, 0usize..80, any::<u8>()), 1..20)) {
        let (mut p, on) = Pair::opened("#...", "####");
        for n in [1, 3] {
            p.request(B, on, n).unwrap();
        }
        p.run();
        for (kind, code, channel, piece, len, fill) in frames {
            let body = vec![fill; len];
            let mut bytes = [0; HEADER_LEN];
            bytes[0] = kind;
            bytes[1] = code;
            bytes[4..8].copy_from_slice(&(len as u32).to_le_bytes());
            bytes[8..12].copy_from_slice(&channel.to_le_bytes());
            bytes[12..16].copy_from_slice(&piece.to_le_bytes());
            bytes[16..20].copy_from_slice(&crc32fast::hash(&body).to_le_bytes());
            let seal = crc32fast::hash(&bytes[..28]);
            bytes[28..].copy_from_slice(&seal.to_le_bytes());
            p.inject(B, &[&bytes[..], &body].concat());
        }
    }

    /// One bit turned anywhere in what A says, payloads aside: B blames A for it, or waits for more.
    #[test]
    fn a_bit_turned_on_the_way_is_noticed(bit in 0usize..8 * (72 + 32 + 60 + 36)) {
        let now = Instant::ZERO;
        let mut p = Pair::of(Conn::dialled(now, Hello::new(id(1)), None), Conn::accepted(now, Hello::new(id(2))));
        p.write(A);
        p.write(A);
        let mut said = p.intercept(B);
        open(9, "#...").encode(Channel(0), &mut said);
        wire::encode_have(Channel(0), [2].into_iter(), &mut said);
        let bit = bit % (8 * said.len());
        said[bit / 8] ^= 1 << (bit % 8);
        p.inject(B, &said);
        let notes = p.told(B);
        let noticed = notes.iter().any(|note| note.starts_with("closed, fault Peer"));
        prop_assert!(noticed, "{:?}", notes);
    }
}

#[test]
fn garbage_is_told_apart_by_type() {
    let closed = Closed::from(WireError::Type(99));
    assert_eq!((closed.fault(), closed.farewell()), (Fault::Peer, Some(Farewell::Protocol)));
}
