//! The sending side of one connection: pieces asked for, in the order they were asked for, until they are on the socket.
//!
//! What is in memory goes straight from the file's pages; what is not is read by a worker into a pooled buffer while what
//! stands behind it goes first. One piece at a time is readied, just before its turn, so that one connection does not spend the
//! bandwidth of the others.

use crate::driver::{Body, Token};
use bytes::Bytes;
use peer_proto::{PieceIndex, swarm::Class, wire::Channel};
use std::collections::VecDeque;

/// Pieces of one connection being read from disk at most.
const READS_MAX: usize = 4;

/// A piece asked for.
#[derive(Debug)]
struct Request {
    channel: Channel,
    piece: PieceIndex,
    class: Class,
    state: State,
}

/// A request whose turn it may be.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Next<'a> {
    /// Its place among the requests.
    pub(crate) at: usize,
    pub(crate) channel: Channel,
    pub(crate) piece: PieceIndex,
    pub(crate) class: Class,
    /// Its bytes, where they have been read from disk.
    pub(crate) fetched: Option<&'a Bytes>,
}

#[derive(Debug)]
enum State {
    Waiting,
    Reading(Token),
    Fetched(Bytes),
}

/// Requests of one connection.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    requests: VecDeque<Request>,
    /// The piece whose header goes out next.
    ready: Option<(Channel, PieceIndex, Body)>,
}

impl Queue {
    /// Adds a request. The connection bounds their number by its window.
    pub(crate) fn push(&mut self, channel: Channel, piece: PieceIndex, class: Class) {
        self.requests.push_back(Request { channel, piece, class, state: State::Waiting });
    }

    /// Whether nothing is left to be sent.
    pub(crate) fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.ready.is_none()
    }

    /// Whether a piece stands ready.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.is_some()
    }

    /// Forgets a request.
    pub(crate) fn remove(&mut self, channel: Channel, piece: PieceIndex) {
        self.requests.retain(|request| (request.channel, request.piece) != (channel, piece));
        self.ready.take_if(|ready| (ready.0, ready.1) == (channel, piece));
    }

    /// Forgets all requests of a channel.
    pub(crate) fn close(&mut self, channel: Channel) {
        self.requests.retain(|request| request.channel != channel);
        self.ready.take_if(|ready| ready.0 == channel);
    }

    /// The first request, past the first `skip`, that is not being read.
    pub(crate) fn next(&self, skip: usize) -> Option<Next<'_>> {
        let mut rest = self.requests.iter().enumerate().skip(skip);
        rest.find_map(|(at, &Request { channel, piece, class, ref state })| {
            let fetched = match state {
                State::Waiting => None,
                State::Fetched(bytes) => Some(bytes),
                State::Reading(_) => return None,
            };
            Some(Next { at, channel, piece, class, fetched })
        })
    }

    /// Whether another read may start.
    pub(crate) fn may_read(&self) -> bool {
        self.requests.iter().filter(|request| matches!(request.state, State::Reading(_))).count() < READS_MAX
    }

    /// Notes that request number `at` is being read.
    pub(crate) fn reading(&mut self, at: usize, token: Token) {
        self.requests[at].state = State::Reading(token);
    }

    /// A read is over: its bytes, or the request that cannot be answered.
    pub(crate) fn fetched(&mut self, token: Token, bytes: Option<Bytes>) -> Option<(Channel, PieceIndex)> {
        let reads = |request: &Request| matches!(request.state, State::Reading(of) if of == token);
        let at = self.requests.iter().position(reads)?;
        match bytes {
            Some(bytes) => {
                self.requests[at].state = State::Fetched(bytes);
                None
            }
            None => self.requests.remove(at).map(|request| (request.channel, request.piece)),
        }
    }

    /// Takes request number `at` out to be sent next.
    pub(crate) fn ready(&mut self, at: usize, body: Body) {
        if let Some(request) = self.requests.remove(at) {
            self.ready = Some((request.channel, request.piece, body));
        }
    }

    /// The piece that the connection writes now.
    pub(crate) fn take(&mut self, channel: Channel, piece: PieceIndex) -> Option<Body> {
        self.ready.take_if(|ready| (ready.0, ready.1) == (channel, piece)).map(|ready| ready.2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peer_proto::{layout::Geometry, wire::Header};

    #[test]
    fn what_is_in_memory_overtakes_what_is_being_read() {
        let piece = |i| Geometry::of(8 << 20).unwrap().piece(i).unwrap();
        let channel = channel();
        let mut queue = Queue::default();
        (0..3).for_each(|i| queue.push(channel, piece(i), Class::Foreground));
        queue.reading(0, Token(7));
        let next = queue.next(0).unwrap();
        assert_eq!((next.at, next.piece, next.fetched), (1, piece(1), None));
        queue.ready(1, Body::Memory(Bytes::from_static(b"one")));
        assert!(queue.is_ready());
        assert_eq!(queue.fetched(Token(7), Some(Bytes::from_static(b"null"))), None);
        assert!(matches!(queue.take(channel, piece(1)), Some(Body::Memory(bytes)) if bytes == "one"));
        let next = queue.next(0).unwrap();
        assert_eq!((next.at, next.piece, next.fetched.map(|bytes| &bytes[..])), (0, piece(0), Some(&b"null"[..])));
        queue.reading(1, Token(8));
        assert_eq!(queue.fetched(Token(8), None), Some((channel, piece(2))), "cannot be answered");
        queue.close(channel);
        assert!(queue.is_empty());
    }

    /// As it comes off the wire, the only way to get one without a connection.
    fn channel() -> Channel {
        let mut close = [0; peer_proto::wire::HEADER_LEN];
        close[0] = 11;
        let seal = crc32fast::hash(&close[..28]);
        close[28..].copy_from_slice(&seal.to_le_bytes());
        match Header::decode(&close) {
            Ok(Header::Close { channel }) => channel,
            other => panic!("{other:?}"),
        }
    }
}
