//! A connection's machine fed with frames that a peer made up, their checksums right, and with commands of this node in between.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer_proto::{
    Instant, PeerId, PieceSet,
    conn::{Conn, Effect, Event, Need},
    wire::{CONTROL_LEN_MAX, HEADER_LEN, Hello, Refusal, Rejection},
};
use std::time::Duration;

/// Everything the machine wants done, done.
fn drain(conn: &mut Conn, now: Instant, choice: u8) {
    for _ in 0..10_000 {
        match conn.poll() {
            None => return,
            Some(Effect::Send { head, .. }) => conn.handle(now, Event::Sent(head)),
            Some(Effect::Offered(offer)) => {
                let event = if choice.is_multiple_of(3) {
                    Event::Refuse { channel: offer.channel, reason: Refusal::Unknown }
                } else {
                    Event::Accept { channel: offer.channel, has: PieceSet::new(&offer.geometry) }
                };
                conn.handle(now, event);
            }
            Some(Effect::Opened { channel, has }) => {
                for piece in has.iter().take(20) {
                    // Refused where the window is full.
                    let _ = conn.request(now, channel, piece);
                }
            }
            Some(Effect::Serve { channel, piece, .. }) => {
                let event = if choice.is_multiple_of(2) {
                    Event::Ready { channel, piece }
                } else {
                    Event::Reject { channel, piece, reason: Rejection::Busy }
                };
                conn.handle(now, event);
            }
            Some(_) => {}
        }
    }
    panic!("the machine has no end of effects");
}

fuzz_target!(|data: &[u8]| {
    let Some((first, mut data)) = data.split_first() else { return };
    let mut now = Instant::ZERO;
    let hello = Hello::new(PeerId::new([1; 20]));
    let mut conn = if first.is_multiple_of(2) { Conn::dialled(now, hello, None) } else { Conn::accepted(now, hello) };
    // A peer that greets properly gets further than most.
    if first & 2 == 0 {
        let mut greeting = Vec::new();
        Hello::new(PeerId::new([2; 20])).encode(&mut greeting);
        if let Some((header, body)) = greeting.split_first_chunk::<HEADER_LEN>() {
            conn.handle(now, Event::Header(header));
            conn.handle(now, Event::Body(body));
        }
    }
    while let Some((&choice, rest)) = data.split_first() {
        data = rest;
        drain(&mut conn, now, choice);
        now += Duration::from_millis(u64::from(choice));
        if conn.deadline().is_some_and(|at| at <= now) {
            conn.handle(now, Event::Tick);
        }
        match conn.need() {
            Need::Header => {
                let Some((frame, rest)) = data.split_first_chunk::<28>() else { return };
                let mut header = [0; HEADER_LEN];
                header[..28].copy_from_slice(frame);
                // Small lengths are what gets past the first check; the body that follows gets its checksum.
                header[6..8].fill(0);
                let len = usize::from(u16::from_le_bytes([header[4], header[5]]));
                if header[16] != 0 {
                    let body = &rest[..len.min(rest.len())];
                    header[16..20].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
                }
                let crc = crc32fast::hash(&header[..28]);
                header[28..].copy_from_slice(&crc.to_le_bytes());
                data = rest;
                conn.handle(now, Event::Header(&header));
            }
            Need::Body(len) => {
                assert!(len <= CONTROL_LEN_MAX);
                let Some((body, rest)) = data.split_at_checked(len as usize) else { return };
                data = rest;
                conn.handle(now, Event::Body(body));
            }
            Need::Payload { .. } | Need::Discard(_) => conn.handle(now, Event::Payload),
            Need::Nothing => return,
        }
        assert!(conn.unanswered() <= 16);
    }
    drain(&mut conn, now, 0);
});
