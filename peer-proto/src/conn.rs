//! One connection between two nodes: many blobs, both directions, nobody trusted.
//!
//! ```text
//!            bytes read as `need` says                     commands
//!                      │ Header Body Payload                  │ request cancel have accept ready ..
//!                      ▼                                      ▼
//!   ┌─ Handshake ── HELLO both ways ──► Open ── goodbye, violation, timeout, loss ──► Closing ─┐
//!   │                                                                                          │
//!   └──────── poll: Send (one at a time), what the peer did, Closed, Hangup ◄──────────────────┘
//! ```
//!
//! **Reading.** [`Conn::need`] says what comes next on the socket: a header, a control body, or the bytes of a piece that was asked for.
//! The shell reads exactly that many bytes into memory of its choosing (a piece straight into a pooled buffer) and hands over
//! headers and control bodies; it parses nothing. A piece's length is that of the request, known before its first byte is read.
//!
//! **Writing.** One [`Effect::Send`] is out at a time, and the next is made when [`Event::Sent`] gives its buffer back: everything
//! that has to be said by then, then at most one piece. So control frames overtake queued pieces, and what gathers while a piece
//! is under way (HAVEs above all) leaves as one frame.
//!
//! **Channels.** A blob is a channel, opened by either side: OPEN, answered by OPENED or REFUSED, ended by CLOSE both ways. Each side
//! numbers its own: the dialler's are even, the acceptor's odd. Of two that cross for one blob the dialler's stands: the
//! dialler refuses the other as [`Refusal::Duplicate`](wire::Refusal::Duplicate).
//!
//! **Requests.** At most [`Hello::window`] of the answering side stand unanswered. Each is answered by PIECE or REJECT, also one that is
//! cancelled, unless its channel is closed; until then it is remembered, and its piece, should it come, is thrown away.
//!
//! **Time.** A handshake has [`HANDSHAKE_TIME`]. Whoever wrote nothing for [`PING_AFTER`] sends PING; whoever read no frame for
//! [`IDLE_MAX`] (or what [`Conn::idle_after`] sets) ends it. Within a body or a write under way, [`PROGRESS_MIN`] bytes (or its end) must pass every [`PROGRESS_TIME`].
//! Limits of our own must not run against that clock: take tokens for sending before [`Event::Ready`], those for receiving before
//! [`Conn::request`], and tell [`Event::Held`] while a piece waits for a buffer.

mod channels;
mod close;
mod event;
mod session;
mod writer;

pub use close::{Closed, Fault, Slow, Violation};
pub use event::{CommandError, Effect, Event, Need, Offer};

use crate::{
    PieceIndex,
    id::PeerId,
    time::Instant,
    wire::{self, Body, Channel, HEADER_LEN, Header, Hello, Open, WINDOW_MAX},
};
use alloc::collections::VecDeque;
use channels::Channels;
use core::time::Duration;
use session::{Out, Session};
use writer::Writer;

/// From the start to the peer's HELLO.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// Silence of ours after which a PING is sent.
pub const PING_AFTER: Duration = Duration::from_secs(20);
/// Silence of the peer after which the connection ends.
pub const IDLE_MAX: Duration = Duration::from_secs(60);
/// Bytes that must pass in [`PROGRESS_TIME`] while a body is read or a write is under way.
pub const PROGRESS_MIN: u64 = 64 << 10;
/// See [`PROGRESS_MIN`].
pub const PROGRESS_TIME: Duration = Duration::from_secs(10);
/// Time to get a GOODBYE out before the socket is dropped.
pub const LINGER: Duration = Duration::from_secs(2);
/// Most channels that each side has opened at once.
pub const CHANNELS_MAX: usize = 1024;
/// Most OPENs of each side that stand unanswered.
pub const OPENING_MAX: usize = 64;
/// Most bytes of control frames that wait to be written.
pub const CONTROL_QUEUE_MAX: usize = 1 << 20;
/// Most pieces that wait to be announced, all channels together.
pub const HAVES_QUEUE_MAX: usize = 1 << 16;

/// Who opened the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// This node.
    Dialler,
    /// The other node.
    Acceptor,
}

/// One connection. See the module's text.
pub struct Conn {
    side: Side,
    hello: Hello,
    stage: Stage,
    reading: Reading,
    /// See [`Self::idle_after`].
    idle: Duration,
    /// When the present body began and how it moves; in `Reading::Header`, when the last frame ended.
    pace: Pace,
    writer: Writer,
    effects: VecDeque<Effect>,
    now: Instant,
}

#[expect(clippy::large_enum_variant, reason = "a connection is open for nearly all of its life")]
enum Stage {
    Handshake(Handshake),
    Open(Session),
    Closing(Closing),
    Gone,
}

struct Handshake {
    /// The node dialled, where one was named.
    expect: Option<PeerId>,
    deadline: Instant,
}

struct Closing {
    hangup_at: Instant,
}

/// What is being read.
enum Reading {
    Header,
    Body { header: Header, body: Body },
    Payload { channel: Channel, piece: PieceIndex, len: u32 },
    Discard(u32),
}

/// Whether bytes pass fast enough.
struct Pace {
    since: Instant,
    bytes: u64,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { since: now, bytes: 0 }
    }

    fn progress(&mut self, now: Instant, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes >= PROGRESS_MIN {
            *self = Self::new(now);
        }
    }

    fn deadline(&self) -> Instant {
        self.since + PROGRESS_TIME
    }
}

impl Conn {
    /// This node has dialled another, the one named where `expect` names one.
    pub fn dialled(now: Instant, hello: Hello, expect: Option<PeerId>) -> Self {
        let mut conn = Self::new(now, Side::Dialler, hello, expect);
        conn.say_hello();
        conn
    }

    /// This node has accepted a connection. It says nothing before the other has.
    pub fn accepted(now: Instant, hello: Hello) -> Self {
        Self::new(now, Side::Acceptor, hello, None)
    }

    fn new(now: Instant, side: Side, hello: Hello, expect: Option<PeerId>) -> Self {
        let hello = Hello { window: hello.window.clamp(1, WINDOW_MAX), ..hello };
        Self {
            side,
            hello,
            stage: Stage::Handshake(Handshake { expect, deadline: now + HANDSHAKE_TIME }),
            reading: Reading::Header,
            idle: IDLE_MAX,
            pace: Pace::new(now),
            writer: Writer::new(now),
            effects: VecDeque::new(),
            now,
        }
    }

    /// Ends it after another time of silence than [`IDLE_MAX`]. Nodes that have nothing else to say PING every [`PING_AFTER`], so a
    /// shorter one ends sound connections as well.
    #[must_use]
    pub fn idle_after(self, idle: Duration) -> Self {
        Self { idle, ..self }
    }

    fn say_hello(&mut self) {
        if let Some(queue) = self.writer.idle_queue() {
            self.hello.encode(queue);
        }
    }

    /// Who opened the connection.
    pub fn side(&self) -> Side {
        self.side
    }

    /// What the peer said of itself; nothing before its HELLO and after the end.
    pub fn peer(&self) -> Option<&Hello> {
        self.session().map(|session| &session.peer)
    }

    /// Requests that may be made now, all channels together.
    pub fn room(&self) -> usize {
        self.session().map_or(0, Session::room)
    }

    /// Requests of this node without an answer.
    pub fn unanswered(&self) -> usize {
        self.session().map_or(0, Session::unanswered)
    }

    /// Channels that are open or on their way to or from it.
    pub fn channels(&self) -> usize {
        self.session().map_or(0, |session| session.channels.len())
    }

    fn session(&self) -> Option<&Session> {
        match &self.stage {
            Stage::Open(session) => Some(session),
            _ => None,
        }
    }

    /// What to read next.
    pub fn need(&self) -> Need {
        match (&self.stage, &self.reading) {
            (Stage::Closing(_) | Stage::Gone, _) => Need::Nothing,
            (_, Reading::Header) => Need::Header,
            (_, Reading::Body { body, .. }) => Need::Body(body.len),
            (_, &Reading::Payload { channel, piece, len }) => Need::Payload { channel, piece, len },
            (_, Reading::Discard(len)) => Need::Discard(*len),
        }
    }

    /// Opens a channel for a blob. Answered by [`Effect::Opened`] or [`Effect::Refused`].
    pub fn open(&mut self, now: Instant, open: &Open) -> Result<Channel, CommandError> {
        self.now = now;
        match &mut self.stage {
            Stage::Open(session) => session.open(open, &mut self.writer),
            _ => Err(CommandError::NotOpen),
        }
    }

    /// Asks for a piece that the peer has. Answered by [`Effect::Arrived`] or [`Effect::Rejected`], unless cancelled or the
    /// channel ends.
    pub fn request(&mut self, now: Instant, channel: Channel, piece: PieceIndex) -> Result<(), CommandError> {
        self.now = now;
        match &mut self.stage {
            Stage::Open(session) => session.request(channel, piece, &self.reading, &mut self.writer),
            _ => Err(CommandError::NotOpen),
        }
    }

    /// Takes in what happened and what is wanted. After the end, nothing does anything.
    pub fn handle(&mut self, now: Instant, event: Event<'_>) {
        self.now = now;
        if let Err(closed) = self.apply(now, event) {
            self.close(now, closed);
        }
    }

    fn apply(&mut self, now: Instant, event: Event<'_>) -> Result<(), Closed> {
        match event {
            Event::Header(bytes) => return self.header(now, bytes),
            Event::Body(bytes) => return self.body(now, bytes),
            Event::Payload => {
                if let Reading::Payload { channel, piece, .. } = self.reading {
                    self.effects.push_back(Effect::Arrived { channel, piece });
                }
                self.read(now, Reading::Header);
                return Ok(());
            }
            Event::Read(bytes) => {
                if !matches!(self.reading, Reading::Header) {
                    self.pace.progress(now, bytes);
                }
                return Ok(());
            }
            Event::Held => {
                self.pace = Pace::new(now);
                return Ok(());
            }
            Event::Written(bytes) => {
                self.writer.progress(now, bytes);
                return Ok(());
            }
            Event::Sent(head) => {
                self.writer.sent(now, head);
                return Ok(());
            }
            Event::Lost => return Err(Closed::Lost),
            Event::Tick => return self.tick(now),
            Event::Goodbye(reason) => return Err(Closed::Ours(reason)),
            _ => {}
        }
        let Stage::Open(session) = &mut self.stage else { return Ok(()) };
        let out = &mut Out { writer: &mut self.writer, effects: &mut self.effects };
        match event {
            Event::Accept { channel, has } => session.accept(channel, &has, out),
            Event::Refuse { channel, reason } => session.refuse(channel, reason, out),
            Event::Class { channel, class } => {
                session.set_class(channel, class);
                Ok(())
            }
            Event::Have { channel, piece } => session.have(channel, piece),
            Event::HaveAll { channel } => session.have_all(channel, out),
            Event::Cancel { channel, piece } => session.cancel(channel, piece, out),
            Event::Ready { channel, piece } => {
                session.ready(channel, piece);
                Ok(())
            }
            Event::Reject { channel, piece, reason } => session.reject(channel, piece, reason, out),
            Event::Close { channel } => session.close(channel, out),
            _ => Ok(()),
        }
    }

    fn header(&mut self, now: Instant, bytes: &[u8; HEADER_LEN]) -> Result<(), Closed> {
        let out = &mut Out { writer: &mut self.writer, effects: &mut self.effects };
        let reading = match &mut self.stage {
            Stage::Closing(_) | Stage::Gone => return Ok(()),
            Stage::Open(session) => session.header(Header::decode(bytes)?, out)?,
            Stage::Handshake(_) => match Header::decode(bytes)? {
                header @ Header::Hello { body } => Reading::Body { header, body },
                Header::Goodbye { reason } => return Err(Closed::Theirs(reason)),
                _ => return Err(Violation::Hello.into()),
            },
        };
        self.read(now, reading);
        Ok(())
    }

    fn body(&mut self, now: Instant, bytes: &[u8]) -> Result<(), Closed> {
        let Reading::Body { header, body } = self.reading else { return Ok(()) };
        let out = &mut Out { writer: &mut self.writer, effects: &mut self.effects };
        match &mut self.stage {
            Stage::Closing(_) | Stage::Gone => return Ok(()),
            Stage::Open(session) => session.body(header, bytes, out)?,
            Stage::Handshake(_) => {
                body.check(bytes)?;
                self.shake(Hello::decode(bytes)?)?;
            }
        }
        self.read(now, Reading::Header);
        Ok(())
    }

    fn read(&mut self, now: Instant, reading: Reading) {
        self.reading = reading;
        self.pace = Pace::new(now);
    }

    fn shake(&mut self, peer: Hello) -> Result<(), Closed> {
        let Stage::Handshake(Handshake { expect, .. }) = self.stage else { return Ok(()) };
        if self.side == Side::Acceptor {
            self.say_hello();
        }
        let Some(version) = wire::negotiate(peer.versions) else {
            return Err(Closed::Version(peer.versions.0, peer.versions.1));
        };
        if peer.id == self.hello.id {
            return Err(Closed::Itself);
        }
        if expect.is_some_and(|id| id != peer.id) {
            return Err(Closed::Stranger(peer.id));
        }
        self.stage = Stage::Open(Session::new(peer, version, self.hello.window, Channels::new(self.side)));
        self.effects.push_back(Effect::Handshaken(peer));
        Ok(())
    }

    fn tick(&mut self, now: Instant) -> Result<(), Closed> {
        match &self.stage {
            Stage::Gone => return Ok(()),
            Stage::Closing(closing) => {
                if closing.hangup_at <= now {
                    self.hang_up();
                }
                return Ok(());
            }
            Stage::Handshake(handshake) if handshake.deadline <= now => return Err(Closed::Slow(Slow::Handshake)),
            Stage::Handshake(_) | Stage::Open(_) => {}
        }
        if self.read_deadline() <= now {
            let silent = matches!(self.reading, Reading::Header);
            return Err(Closed::Slow(if silent { Slow::Idle } else { Slow::Reading }));
        }
        self.writer.tick(now, PING_AFTER)
    }

    fn read_deadline(&self) -> Instant {
        match self.reading {
            Reading::Header => self.pace.since + self.idle,
            _ => self.pace.deadline(),
        }
    }

    /// When to be told [`Event::Tick`], if nothing happens before.
    pub fn deadline(&self) -> Option<Instant> {
        let steady = self.read_deadline().min(self.writer.deadline(PING_AFTER));
        match &self.stage {
            Stage::Handshake(handshake) => Some(handshake.deadline.min(steady)),
            Stage::Open(_) => Some(steady),
            Stage::Closing(closing) => Some(closing.hangup_at),
            Stage::Gone => None,
        }
    }

    /// The next thing to do or to know. To be asked until there is none, after every [`Self::handle`], [`Self::open`] and [`Self::request`].
    pub fn poll(&mut self) -> Option<Effect> {
        if let Some(effect) = self.effects.pop_front() {
            return Some(effect);
        }
        let mut piece = None;
        match &mut self.stage {
            Stage::Gone => return None,
            Stage::Closing(_) if self.writer.is_idle() => {
                self.hang_up();
                return self.effects.pop_front();
            }
            Stage::Closing(_) | Stage::Handshake(_) => {}
            Stage::Open(session) => piece = session.compose(self.writer.idle_queue()?),
        }
        let head = self.writer.start(self.now)?;
        Some(Effect::Send { head, piece })
    }

    fn close(&mut self, now: Instant, closed: Closed) {
        if matches!(self.stage, Stage::Closing(_) | Stage::Gone) {
            // The last words cannot be waited for on a socket that is lost.
            if closed == Closed::Lost && !matches!(self.stage, Stage::Gone) {
                self.hang_up();
            }
            return;
        }
        self.effects.push_back(Effect::Closed(closed));
        if matches!(closed, Closed::Unread(_)) {
            self.writer.clear();
        }
        match closed.farewell().filter(|_| closed != Closed::Slow(Slow::Writing)) {
            Some(reason) => {
                self.stage = Stage::Closing(Closing { hangup_at: now + LINGER });
                if self.writer.push(&Header::Goodbye { reason }).is_err() {
                    self.hang_up();
                }
            }
            None => self.hang_up(),
        }
    }

    fn hang_up(&mut self) {
        self.stage = Stage::Gone;
        self.effects.push_back(Effect::Hangup);
    }
}

impl core::fmt::Debug for Conn {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Conn({:?}, {:?}, {:?})", self.side, self.peer().map(|peer| peer.id), self.need())
    }
}

#[cfg(test)]
mod pair;
#[cfg(test)]
mod tests;
