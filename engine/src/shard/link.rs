//! A connection as a shard holds it: the protocol's state and what is around it.

use crate::{buf::Buf, driver::SocketId, limit::Meter, receive::Intake, serve::Queue};
use peer_proto::{
    Digest, Instant, PeerId, PieceIndex,
    conn::Conn,
    pieces::PieceSet,
    swarm::{Candidate, Slot},
    wire::{Channel, Zone},
};
use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
};

/// One connection.
pub(super) struct Link {
    pub(super) id: SocketId,
    pub(super) conn: Conn,
    pub(super) from: SocketAddr,
    /// Who this node dialled; none where the other side did.
    pub(super) dialled: Option<Candidate>,
    /// Whether the socket is connected.
    pub(super) up: bool,
    /// Who is at the other end, once it has said so.
    pub(super) peer: Option<PeerId>,
    pub(super) origin: bool,
    pub(super) zone: Zone,
    /// The shard that dialled, where the other side did.
    pub(super) shard: u16,
    /// Downloads that want a channel once the other side is known.
    pub(super) waiting: Vec<Digest>,
    pub(super) lanes: BTreeMap<Channel, Lane>,
    pub(super) intake: Intake,
    /// A piece received, until the connection says which.
    pub(super) arrived: Option<Buf>,
    pub(super) serve: Queue,
    /// Whether a piece or a frame is on its way out.
    pub(super) sending: bool,
    /// Whether it stands in the queue for bandwidth.
    pub(super) queued: bool,
    /// Whether bandwidth is its to take now.
    pub(super) granted: bool,
    /// What the peer may be sent and send, where that is limited.
    pub(super) meter: Option<Arc<Meter>>,
    /// Until when the peer's own limit keeps pieces from it.
    pub(super) held: Option<Instant>,
    /// Requests for which the window had no room.
    pub(super) asks: VecDeque<(Channel, PieceIndex)>,
    /// When the dial, or doing nothing, ends.
    pub(super) patience: Option<Instant>,
    /// What is entered in the table of alarms.
    pub(super) alarm: Option<Instant>,
    pub(super) dirty: bool,
    /// Whether another shard accepted it and gave it to this one.
    pub(super) adopted: bool,
    /// Whether it is to be taken out of the table.
    pub(super) over: bool,
    /// Whether that is because another shard has its socket now.
    pub(super) handed_over: bool,
}

/// One blob on one connection.
pub(super) struct Lane {
    pub(super) slot: Slot,
    pub(super) digest: Digest,
    /// Whether this node opened it.
    pub(super) ours: bool,
    pub(super) open: bool,
    /// What the other side has.
    pub(super) has: PieceSet,
}

impl Link {
    pub(super) fn new(id: SocketId, conn: Conn, from: SocketAddr, dialled: Option<Candidate>) -> Self {
        Self {
            id,
            conn,
            from,
            up: dialled.is_none(),
            dialled,
            peer: None,
            origin: false,
            zone: Zone::NONE,
            shard: 0,
            waiting: Vec::new(),
            lanes: BTreeMap::new(),
            intake: Intake::new(),
            arrived: None,
            serve: Queue::default(),
            sending: false,
            queued: false,
            granted: false,
            meter: None,
            held: None,
            asks: VecDeque::new(),
            patience: None,
            alarm: None,
            dirty: false,
            adopted: false,
            over: false,
            handed_over: false,
        }
    }

    /// The channel for a blob, where there is one.
    pub(super) fn lane_of(&self, digest: &Digest) -> Option<&Lane> {
        self.lanes.values().find(|lane| lane.digest == *digest)
    }

    /// Whether nobody needs it.
    pub(super) fn is_idle(&self) -> bool {
        self.up && self.peer.is_some() && self.lanes.is_empty() && self.waiting.is_empty()
    }

    /// Whether something is on its way out, or ought to be.
    pub(super) fn is_serving(&self) -> bool {
        !self.serve.is_empty() || self.sending
    }
}
