//! The seam between a shard and the world: what a shard asks for ([`Effect`]) and what it is told ([`Event`]).
//!
//! A driver carries effects out and brings their completions back. Rules for both sides:
//!
//! - An operation owns its buffer and its descriptor until its own completion arrives. Nothing is cancelled: [`Effect::Close`]
//!   shuts the socket down, and the operations under way on it then complete by themselves.
//! - At most one [`Effect::Recv`] and one [`Effect::Send`] are under way per socket.
//! - Every `Dial`, `Recv`, `Send` and `Job` is answered by exactly one event, whatever happens.
//! - Operations complete with what was moved so far; the shard asks again for the rest. So the shard sees progress, and a driver has no
//!   loops of its own.

pub(crate) mod monoio;
#[cfg(test)]
pub(crate) mod sim;

use crate::{
    buf::Buf,
    disk::Stretch,
    job::{Job, Outcome},
    shard::command::{Answer, Command, Message},
};
use bytes::{Buf as _, Bytes};
use std::{io, net::SocketAddr, os::fd::OwnedFd};

/// A connection of one shard. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct SocketId(pub(crate) u64);

/// A job of one shard, for its outcome to be recognised. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Token(pub(crate) u64);

/// What a shard wants done.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Connect; answered by [`Event::Dialed`].
    Dial { socket: SocketId, to: SocketAddr },
    /// Give a socket without operations under way to another shard of this node, as [`Event::Adopted`] there.
    HandOver { socket: SocketId, to: usize, from: SocketAddr, hello: Box<[u8]> },
    /// Receive; answered by [`Event::Received`].
    Recv { socket: SocketId, op: Recv },
    /// Send; answered by [`Event::Sent`].
    Send { socket: SocketId, op: Send },
    /// Shut the socket down and forget it once its operations are over.
    Close { socket: SocketId },
    /// Have a worker do it; answered by [`Event::Done`].
    Job { token: Token, job: Job },
    /// Answer whoever asked.
    Answer(Answer),
    /// Tell another shard of this node. Dropped where its inbox is full: messages only hasten what would happen anyway.
    Tell { to: usize, message: Message },
}

/// What a shard is told.
#[derive(Debug)]
pub(crate) enum Event {
    /// Somebody connected.
    Accepted {
        socket: SocketId,
        from: SocketAddr,
    },
    /// Another shard accepted this one; its HELLO names us.
    Adopted {
        socket: SocketId,
        from: SocketAddr,
        hello: Box<[u8]>,
    },
    Dialed {
        socket: SocketId,
        result: io::Result<()>,
    },
    /// Bytes received, payload first. None mean that the other side has closed.
    Received {
        socket: SocketId,
        result: io::Result<usize>,
        op: Recv,
    },
    /// Bytes sent, control first.
    Sent {
        socket: SocketId,
        result: io::Result<usize>,
        op: Send,
    },
    Done {
        token: Token,
        outcome: Outcome,
    },
    Command(Command),
}

/// Where received bytes go: first into the payload, as far as there is one, then onto the stage.
#[derive(Debug)]
pub(crate) struct Recv {
    /// The piece that is arriving, and how much of it has.
    pub(crate) payload: Option<Payload>,
    pub(crate) stage: Stage,
    /// Come back once that many bytes are there, or what the kernel can hold; at least 1.
    pub(crate) want: usize,
}

/// A piece on its way in.
#[derive(Debug)]
pub(crate) struct Payload {
    pub(crate) buf: Buf,
    /// Bytes of the buffer that have arrived.
    pub(crate) filled: usize,
}

/// Bytes received and not yet understood: headers, control bodies.
#[derive(Debug, Default)]
pub(crate) struct Stage {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Stage {
    /// Bytes of an idle connection's stage: some tens of control frames.
    pub(crate) const LEN: usize = 4096;

    /// What lies there.
    pub(crate) fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Drops the first `n` bytes of [`Self::filled`].
    pub(crate) fn consume(&mut self, n: usize) {
        self.start = (self.start + n).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Makes room for `len` bytes in all, filled ones included; back to [`Self::LEN`] once they fit.
    pub(crate) fn make_room(&mut self, len: usize) {
        let len = len.max(Self::LEN);
        let held = self.end - self.start;
        if self.bytes.len() == len || (self.bytes.len() > len && held > len) {
            self.bytes.copy_within(self.start..self.end, 0);
        } else {
            let mut bytes = vec![0; len].into_boxed_slice();
            bytes[..held].copy_from_slice(self.filled());
            self.bytes = bytes;
        }
        (self.start, self.end) = (0, held);
    }

    /// Puts bytes behind those that lie there; there must be room.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.vacant()[..bytes.len()].copy_from_slice(bytes);
        self.filled_by(bytes.len());
    }

    fn vacant(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    fn filled_by(&mut self, n: usize) {
        self.end = (self.end + n).min(self.bytes.len());
    }
}

impl Recv {
    /// Where the kernel, real or simulated, writes to.
    fn targets(&mut self) -> [&mut [u8]; 2] {
        let payload = match &mut self.payload {
            Some(payload) => &mut payload.buf[payload.filled..],
            None => &mut [],
        };
        [payload, self.stage.vacant()]
    }

    /// Books `n` bytes written to [`Self::targets`].
    fn arrived(&mut self, n: usize) {
        let to_payload = self.payload.as_mut().map_or(0, |payload| {
            let take = n.min(payload.buf.len() - payload.filled);
            payload.filled += take;
            take
        });
        self.stage.filled_by(n - to_payload);
    }
}

/// Bytes to be sent, one part behind the other.
#[derive(Debug)]
pub(crate) struct Send {
    /// Control frames, and the header of the piece that follows, where one does.
    pub(crate) control: Vec<u8>,
    /// Bytes of it that have gone.
    pub(crate) control_sent: usize,
    /// The piece, of which at most [`SEND_MAX`] go at a time.
    pub(crate) body: Body,
}

/// Where the bytes of a piece are that is sent.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    /// In a mapping or a buffer: the kernel copies them.
    Memory(Bytes),
    /// In the pages of a file, which the kernel sends as they are.
    File(Stretch),
}

impl Body {
    /// No piece.
    pub(crate) const NONE: Self = Self::Memory(Bytes::new());

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Memory(bytes) => bytes.len(),
            Self::File(stretch) => stretch.len(),
        }
    }

    fn advance(&mut self, n: usize) {
        match self {
            Self::Memory(bytes) => bytes.advance(n),
            Self::File(stretch) => stretch.range.start = (stretch.range.start + n as u64).min(stretch.range.end),
        }
    }
}

/// Bytes of a piece sent at a time at most: what the other connections of a shard wait for at worst.
pub(crate) const SEND_MAX: usize = 1 << 20;

impl Send {
    /// Whether all of it has gone.
    pub(crate) fn is_over(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that have not gone.
    pub(crate) fn len(&self) -> usize {
        self.control_left() + self.body.len()
    }

    fn control_left(&self) -> usize {
        self.control.len() - self.control_sent
    }

    /// Books `n` bytes as gone.
    fn left(&mut self, n: usize) {
        let control = n.min(self.control_left());
        self.control_sent += control;
        self.body.advance(n - control);
    }

    /// What is in memory of it.
    fn parts(&self) -> [&[u8]; 2] {
        let body = match &self.body {
            Body::Memory(bytes) => &bytes[..bytes.len().min(SEND_MAX)],
            Body::File(_) => &[],
        };
        [&self.control[self.control_sent..], body]
    }
}

/// A socket on its way between two shards' drivers.
#[derive(Debug)]
pub(crate) enum Carried {
    Socket(OwnedFd),
    #[cfg(test)]
    Simulated(sim::Wire),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(bytes: &[u8]) -> Stage {
        let mut stage = Stage::default();
        stage.make_room(0);
        stage.put(bytes);
        stage
    }

    #[test]
    fn a_stage_grows_and_shrinks_around_what_it_holds() {
        let mut stage = stage(b"abcdef");
        stage.consume(2);
        stage.make_room(10_000);
        assert_eq!((stage.filled(), stage.bytes.len()), (&b"cdef"[..], 10_000));
        stage.make_room(0);
        assert_eq!((stage.filled(), stage.bytes.len()), (&b"cdef"[..], Stage::LEN));
        stage.consume(100);
        assert_eq!((stage.filled(), stage.start), (&b""[..], 0));
    }
}
