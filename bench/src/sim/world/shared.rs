//! Links that connections share, about as TCP has them.
//!
//! - An uplink takes turns between the connections that have a piece to send, [`CHUNK`] bytes each; one piece at a time goes over a
//!   connection. [`AHEAD`] chunks of a connection at most are between the two hosts, so that a sender turns to others while a
//!   receiver's downlink is busy. A downlink takes chunks in the order they come.
//! - A link that is busy has a full queue, which whatever passes waits for. A message waits, too, for the rest of a piece that is
//!   being sent on its connection.
//! - Nothing is lost, and no connection has to find its rate.

use super::{Kind, Wire, World, span};
use std::collections::VecDeque;

/// Bytes that a connection sends in its turn: a packet of segmentation offload.
const CHUNK: u64 = 64 << 10;
/// Chunks of a connection under way at most.
const AHEAD: u8 = 2;

/// A host's two links.
#[derive(Default)]
pub(super) struct Ends {
    connections: Vec<Connection>,
    /// Whose turn is next.
    turn: usize,
    /// Being sent.
    leaving: Option<Chunk>,
    /// Being received, the first of them now.
    arriving: VecDeque<Chunk>,
}

/// The sending side of a connection.
#[derive(Default)]
struct Connection {
    to: u32,
    /// Pieces asked for, in order.
    asked: VecDeque<Wire>,
    /// Bytes of the first one that have been sent.
    sent: u64,
    ahead: u8,
    /// Messages behind the first piece.
    behind: Vec<Kind>,
}

#[derive(Clone, Copy)]
struct Chunk {
    from: u32,
    to: u32,
    bytes: u64,
    /// The piece that it is the end of, and whether it is a wrong one.
    ends: Option<(Wire, bool)>,
}

impl Ends {
    fn connection(&mut self, to: u32) -> &mut Connection {
        let at = self.connections.iter().position(|connection| connection.to == to).unwrap_or_else(|| {
            self.connections.push(Connection { to, ..Connection::default() });
            self.connections.len() - 1
        });
        &mut self.connections[at]
    }

    /// The next connection in turn that can send.
    fn next(&mut self) -> Option<usize> {
        let count = self.connections.len();
        let mut turns = (0..count).map(|turn| (self.turn + turn) % count);
        let at = turns.find(|at| {
            let Connection { asked, ahead, .. } = &self.connections[*at];
            !asked.is_empty() && *ahead < AHEAD
        })?;
        self.turn = at + 1;
        Some(at)
    }
}

impl World {
    /// A message from one host to another.
    pub(super) fn message(&mut self, from: u32, to: u32, kind: Kind) {
        if self.plan.network.queue.is_some() {
            let connection = self.nodes[from as usize].ends.connection(to);
            if connection.sent > 0 {
                return connection.behind.push(kind);
            }
        }
        self.schedule(self.now + self.plan.network.latency + self.wait(from, to), kind);
    }

    /// The wait in the queues of two hosts' links.
    pub(super) fn wait(&self, from: u32, to: u32) -> u64 {
        let Some(queue) = self.plan.network.queue else { return 0 };
        let (from, to) = (&self.nodes[from as usize], &self.nodes[to as usize]);
        let up = from.ends.leaving.map_or(0, |_| span(queue, from.plan.up));
        let down = to.ends.arriving.front().map_or(0, |_| span(queue, to.plan.down));
        up + down
    }

    /// A piece is asked for.
    pub(super) fn ask_shared(&mut self, wire: Wire) {
        self.nodes[wire.from as usize].ends.connection(wire.to).asked.push_back(wire);
        self.send_shared(wire.from);
    }

    /// A piece that has not begun to be sent is withdrawn.
    pub(super) fn cancel_shared(&mut self, wire: Wire) {
        let connection = self.nodes[wire.from as usize].ends.connection(wire.to);
        let begun = usize::from(connection.sent > 0);
        if let Some(at) = connection.asked.iter().skip(begun).position(|asked| *asked == wire) {
            connection.asked.remove(begun + at);
        }
    }

    /// Nothing more of a blob goes from one host to another.
    pub(super) fn shut_shared(&mut self, from: u32, to: u32, blob: u16) {
        let connection = self.nodes[from as usize].ends.connection(to);
        let first = connection.asked.front().copied();
        connection.asked.retain(|asked| asked.blob != blob);
        if connection.asked.front().copied() != first {
            self.piece_is_over(from, to);
        }
    }

    /// What stood behind a piece goes on.
    fn piece_is_over(&mut self, from: u32, to: u32) {
        let connection = self.nodes[from as usize].ends.connection(to);
        connection.sent = 0;
        for kind in std::mem::take(&mut connection.behind) {
            self.schedule(self.now + self.plan.network.latency + self.wait(from, to), kind);
        }
    }

    /// Starts the next chunk on a free uplink.
    pub(super) fn send_shared(&mut self, host: u32) {
        loop {
            let node = &mut self.nodes[host as usize];
            if node.ends.leaving.is_some() || !node.alive {
                return;
            }
            let Some(at) = node.ends.next() else { return };
            let to = node.ends.connections[at].to;
            if self.nodes[to as usize].alive {
                return self.send_chunk(host, at);
            }
            // What is under way to it still is.
            let ahead = self.nodes[host as usize].ends.connections[at].ahead;
            self.nodes[host as usize].ends.connections[at] = Connection { to, ahead, ..Connection::default() };
        }
    }

    fn send_chunk(&mut self, host: u32, at: usize) {
        let node = &mut self.nodes[host as usize];
        let connection = &mut node.ends.connections[at];
        let Some(wire) = connection.asked.front().copied() else { return };
        let geometry = self.geometry[usize::from(wire.blob)];
        let Some(len) = geometry.piece(wire.piece).map(|piece| u64::from(geometry.piece_len(piece))) else { return };
        if connection.sent == 0 {
            if node.plan.origin {
                self.out.origin_bytes[usize::from(wire.blob)] += len;
            }
            self.out.pieces_sent += 1;
            self.out.wrong_sent += u64::from(node.plan.liar);
        }
        let bytes = CHUNK.min(len - connection.sent);
        connection.sent += bytes;
        connection.ahead += 1;
        let ends = (connection.sent == len).then_some((wire, node.plan.liar));
        node.ends.leaving = Some(Chunk { from: host, to: wire.to, bytes, ends });
        let at = self.now + span(bytes, node.plan.up);
        self.schedule(at, Kind::ChunkSent { host });
    }

    /// A chunk has left its host.
    pub(super) fn chunk_sent(&mut self, host: u32) {
        let Some(chunk) = self.nodes[host as usize].ends.leaving.take() else { return };
        if let Some((wire, _)) = chunk.ends {
            let connection = self.nodes[host as usize].ends.connection(chunk.to);
            // It was not withdrawn in between.
            if connection.asked.front() == Some(&wire) {
                connection.asked.pop_front();
                self.piece_is_over(host, chunk.to);
            }
        }
        let receiver = &mut self.nodes[chunk.to as usize];
        receiver.ends.arriving.push_back(chunk);
        if receiver.ends.arriving.len() == 1 {
            let at = self.now + span(chunk.bytes, receiver.plan.down);
            self.schedule(at, Kind::ChunkReceived { host: chunk.to });
        }
        self.send_shared(host);
    }

    /// A chunk has arrived.
    pub(super) fn chunk_received(&mut self, host: u32) {
        let receiver = &mut self.nodes[host as usize];
        let Some(chunk) = receiver.ends.arriving.pop_front() else { return };
        if let Some(next) = receiver.ends.arriving.front() {
            let at = self.now + span(next.bytes, receiver.plan.down);
            self.schedule(at, Kind::ChunkReceived { host });
        }
        self.nodes[chunk.from as usize].ends.connection(chunk.to).ahead -= 1;
        if let Some((wire, wrong)) = chunk.ends {
            let passed = self.now + self.plan.network.latency + self.wait(chunk.from, chunk.to);
            self.schedule(passed + self.plan.network.proof, Kind::Judged(wire, wrong));
        }
        self.send_shared(chunk.from);
    }
}
