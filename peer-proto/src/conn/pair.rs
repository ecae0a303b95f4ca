//! Two connections joined by a pipe of bytes that is cut anywhere, in time of the test's own. Effects become words.

use super::*;
use crate::{Digest, layout::Geometry, pieces::PieceSet, swarm::Class, wire::Refusal};
use alloc::{format, string::String, vec, vec::Vec};

/// The dialling end.
pub(super) const A: usize = 0;
/// The accepting end.
pub(super) const B: usize = 1;

/// Four pieces: three of 1 MiB and one of 5 bytes, so that most tests need not move a whole piece.
pub(super) fn geometry() -> Geometry {
    Geometry::new((3 << 20) + 5, 1 << 20).unwrap()
}

pub(super) fn id(n: u8) -> PeerId {
    PeerId::new([n; 20])
}

/// `"#..#"`: pieces 0 and 3 of four.
pub(super) fn set(picture: &str) -> PieceSet {
    let geometry = geometry();
    let mut set = PieceSet::new(&geometry);
    assert_eq!(picture.len(), geometry.pieces() as usize);
    geometry.all().zip(picture.chars()).filter(|(_, c)| *c == '#').for_each(|(piece, _)| {
        set.insert(piece);
    });
    set
}

pub(super) fn open(blob: u8, has: &str) -> Open {
    let namespace = "library/app".parse().unwrap();
    Open { digest: Digest::sha256([blob; 32]), namespace, geometry: geometry(), has: set(has) }
}

fn picture(set: &PieceSet) -> String {
    let geometry = geometry();
    geometry.all().map(|piece| if set.contains(piece) { '#' } else { '.' }).collect()
}

pub(super) fn piece(n: u32) -> PieceIndex {
    geometry().piece(n).unwrap()
}

/// The bytes of a piece, told apart by their first.
fn bytes_of(piece: PieceIndex) -> Vec<u8> {
    vec![piece.get() as u8 + 1; geometry().piece_len(piece) as usize]
}

/// A write under way.
struct Write {
    head: Vec<u8>,
    piece: Option<PieceIndex>,
}

pub(super) struct End {
    pub(super) conn: Conn,
    /// What the pipe has delivered and nobody has read.
    inbox: Pipe,
    /// Bytes of the present need that were told of.
    told: usize,
    notes: Vec<String>,
    /// Sends that wait because the other end does not read.
    pub(super) stuck: bool,
    held: Option<Write>,
    /// Requests are granted as they come.
    pub(super) generous: bool,
    /// What left, frame by frame.
    pub(super) sends: usize,
    pub(super) hung_up: bool,
}

pub(super) struct Pair {
    pub(super) now: Instant,
    pub(super) ends: [End; 2],
    /// Bytes on their way to each end.
    wires: [Pipe; 2],
    seed: u64,
}

impl Pair {
    /// A has dialled B; nothing has been said.
    pub(super) fn of(a: Conn, b: Conn) -> Self {
        let end = |conn| End {
            conn,
            inbox: Pipe::default(),
            told: 0,
            notes: Vec::new(),
            stuck: false,
            held: None,
            generous: false,
            sends: 0,
            hung_up: false,
        };
        Self { now: Instant::ZERO, ends: [end(a), end(b)], wires: [Pipe::default(), Pipe::default()], seed: 1 }
    }

    /// Two nodes that know each other.
    pub(super) fn shaken() -> Self {
        let now = Instant::ZERO;
        let mut pair = Self::of(Conn::dialled(now, Hello::new(id(1)), None), Conn::accepted(now, Hello::new(id(2))));
        pair.run();
        assert_eq!(pair.told(A), ["handshaken 02020202"]);
        assert_eq!(pair.told(B), ["handshaken 01010101"]);
        pair
    }

    /// The same, and A has opened a channel.
    pub(super) fn opened(a: &str, b: &str) -> (Self, Channel) {
        let mut pair = Self::shaken();
        let on = pair.open(A, 9, a);
        pair.run();
        pair.does(B, Event::Accept { channel: on, has: set(b) });
        pair.run();
        pair.told(A);
        pair.told(B);
        (pair, on)
    }

    pub(super) fn seed(mut self, seed: u64) -> Self {
        self.seed = seed | 1;
        self
    }

    pub(super) fn random(&mut self, below: usize) -> usize {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed >> 33) as usize % below
    }

    pub(super) fn open(&mut self, end: usize, blob: u8, has: &str) -> Channel {
        let now = self.now;
        self.ends[end].conn.open(now, &open(blob, has)).unwrap()
    }

    pub(super) fn request(&mut self, end: usize, on: Channel, n: u32) -> Result<(), CommandError> {
        let now = self.now;
        self.ends[end].conn.request(now, on, piece(n))
    }

    pub(super) fn does(&mut self, end: usize, event: Event<'_>) {
        let now = self.now;
        self.ends[end].conn.handle(now, event);
    }

    /// What an end was told since last asked.
    pub(super) fn told(&mut self, end: usize) -> Vec<String> {
        core::mem::take(&mut self.ends[end].notes)
    }

    /// Bytes that the other end never wrote.
    pub(super) fn inject(&mut self, to: usize, bytes: &[u8]) {
        self.wires[to].extend(bytes);
        self.run();
    }

    /// Takes the bytes that are on their way to an end off the pipe.
    pub(super) fn intercept(&mut self, to: usize) -> Vec<u8> {
        let all = self.wires[to].len();
        self.wires[to].take(all)
    }

    /// Until nothing moves any more.
    pub(super) fn run(&mut self) {
        while self.step() {}
    }

    fn step(&mut self) -> bool {
        let mut moved = false;
        for end in [A, B] {
            moved |= self.write(end);
            moved |= self.deliver(end);
        }
        moved
    }

    /// Carries out an end's effects.
    pub(super) fn write(&mut self, end: usize) -> bool {
        let now = self.now;
        let mut moved = false;
        if !self.ends[end].stuck
            && let Some(Write { head, piece }) = self.ends[end].held.take()
        {
            self.wires[1 - end].extend(&head);
            piece.iter().for_each(|piece| self.wires[1 - end].extend(&bytes_of(*piece)));
            self.ends[end].conn.handle(now, Event::Sent(head));
            moved = true;
        }
        while let Some(effect) = self.ends[end].conn.poll() {
            moved = true;
            self.effect(end, effect);
        }
        moved
    }

    fn effect(&mut self, at: usize, effect: Effect) {
        let now = self.now;
        let end = &mut self.ends[at];
        assert!(!end.hung_up, "{effect:?} after the end");
        let note = match effect {
            Effect::Send { head, piece } => {
                assert!(end.held.is_none(), "two writes at once");
                assert!(!head.is_empty());
                end.sends += 1;
                end.held = Some(Write { head, piece: piece.map(|(_, piece)| piece) });
                return;
            }
            Effect::Handshaken(hello) => format!("handshaken {:?}", hello.id),
            Effect::Offered(offer) => {
                let Offer { channel, digest, namespace, geometry, has } = *offer;
                assert_eq!((namespace.as_str(), geometry), ("library/app", self::geometry()));
                format!("offered {}: blob {}, has {has}", channel.get(), digest.as_bytes()[0])
            }
            Effect::Opened { channel, has } => format!("opened {}: {}", channel.get(), picture(&has)),
            Effect::Refused { channel, reason } => format!("refused {}: {reason}", channel.get()),
            Effect::Has { channel, piece } => format!("has {} {piece:?}", channel.get()),
            Effect::HasAll { channel } => format!("has {} all", channel.get()),
            Effect::Serve { channel, piece, class } => {
                if end.generous {
                    end.conn.handle(now, Event::Ready { channel, piece });
                }
                let idly = if class == Class::Background { " idly" } else { "" };
                format!("serve {} {piece:?}{idly}", channel.get())
            }
            Effect::Unserve { channel, piece } => format!("unserve {} {piece:?}", channel.get()),
            Effect::Arrived { channel, piece } => format!("arrived {} {piece:?}", channel.get()),
            Effect::Rejected { channel, piece, reason } => format!("rejected {} {piece:?}: {reason}", channel.get()),
            Effect::Released { channel, piece } => format!("released {} {piece:?}", channel.get()),
            Effect::Shut { channel } => format!("shut {}", channel.get()),
            Effect::Closed(closed) => format!("closed, fault {:?}: {closed}", closed.fault()),
            Effect::Hangup => {
                end.hung_up = true;
                String::from("hangup")
            }
        };
        end.notes.push(note);
    }

    /// Brings some bytes to an end, cut anywhere, and lets it read.
    fn deliver(&mut self, to: usize) -> bool {
        let waiting = self.wires[to].len();
        if waiting == 0 {
            return false;
        }
        let cut = match self.random(4) {
            0 => 1 + self.random(waiting.min(40)),
            1 => 1 + self.random(waiting),
            _ => waiting,
        };
        let bytes = self.wires[to].take(cut);
        self.ends[to].read(self.now, &bytes);
        true
    }

    /// Lets time pass, in steps of the ends' deadlines.
    pub(super) fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        loop {
            self.run();
            let next = self.ends.iter().filter(|end| !end.hung_up).filter_map(|end| end.conn.deadline()).min();
            let Some(next) = next.filter(|next| *next <= until) else { break };
            self.now = next.max(self.now);
            for end in [A, B] {
                if self.ends[end].conn.deadline().is_some_and(|deadline| deadline <= self.now) {
                    self.does(end, Event::Tick);
                }
            }
        }
        self.now = until;
    }
}

impl End {
    /// Reads as the contract says: exactly what is needed, and payloads checked to be the piece's.
    pub(super) fn read(&mut self, now: Instant, bytes: &[u8]) {
        self.inbox.extend(bytes);
        loop {
            let need = self.conn.need();
            let len = match need {
                Need::Header => HEADER_LEN,
                Need::Body(len) | Need::Payload { len, .. } | Need::Discard(len) => len as usize,
                Need::Nothing => return self.inbox = Pipe::default(),
            };
            if self.inbox.len() < len {
                let fresh = self.inbox.len() - self.told;
                if fresh > 0 {
                    self.told += fresh;
                    self.conn.handle(now, Event::Read(fresh as u64));
                }
                return;
            }
            self.told = 0;
            let bytes = self.inbox.take(len);
            match need {
                Need::Header => self.conn.handle(now, Event::Header(bytes.as_array().unwrap())),
                Need::Body(_) => self.conn.handle(now, Event::Body(&bytes)),
                Need::Payload { piece, .. } => {
                    assert_eq!(bytes, bytes_of(piece));
                    self.conn.handle(now, Event::Payload);
                }
                Need::Discard(_) => self.conn.handle(now, Event::Payload),
                Need::Nothing => {}
            }
        }
    }
}

/// Bytes in order; what was taken is given back once all was.
#[derive(Default)]
struct Pipe {
    bytes: Vec<u8>,
    taken: usize,
}

impl Pipe {
    fn len(&self) -> usize {
        self.bytes.len() - self.taken
    }

    fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let out = self.bytes[self.taken..self.taken + len].to_vec();
        self.taken += len;
        if self.len() == 0 {
            self.bytes.clear();
            self.taken = 0;
        }
        out
    }
}

/// A refusal, for short.
pub(super) fn refuse(channel: Channel) -> Event<'static> {
    Event::Refuse { channel, reason: Refusal::Unknown }
}
