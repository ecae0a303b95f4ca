//! Why a connection ends, and whose fault that is.

use crate::{
    id::PeerId,
    wire::{Farewell, WireError},
};

/// Why a connection ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Closed {
    /// The peer wrote what is no frame.
    #[error("peer sent garbage: {0}")]
    Garbage(#[from] WireError),
    /// The peer wrote a frame that is out of place.
    #[error("peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The peer speaks none of our versions.
    #[error("peer speaks versions {0} to {1}")]
    Version(u16, u16),
    /// The peer is this node itself.
    #[error("peer is this node")]
    Itself,
    /// Another node answered than the one that was dialled.
    #[error("peer is {0}, not the node dialled")]
    Stranger(PeerId),
    /// The peer was too slow.
    #[error("peer is too slow: {0}")]
    Slow(Slow),
    /// The peer does not read what it makes us write.
    #[error("peer does not read: {0} is full")]
    Unread(&'static str),
    /// The peer said goodbye.
    #[error("peer said goodbye: {0}")]
    Theirs(Farewell),
    /// This node said goodbye.
    #[error("closed: {0}")]
    Ours(Farewell),
    /// The socket failed or ended.
    #[error("connection lost")]
    Lost,
}

/// Whose fault an end is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The peer's: it is broken or hostile.
    Peer,
    /// The peer's or the network's: worth another try later.
    Network,
    /// Nobody's.
    Nobody,
}

impl Closed {
    /// Whose fault it is.
    pub const fn fault(&self) -> Fault {
        match self {
            Self::Garbage(_) | Self::Violation(_) => Fault::Peer,
            Self::Slow(_) | Self::Unread(_) | Self::Lost | Self::Stranger(_) => Fault::Network,
            Self::Version(..) | Self::Itself | Self::Theirs(_) | Self::Ours(_) => Fault::Nobody,
        }
    }

    /// What the peer is told, where anything is.
    pub(super) const fn farewell(&self) -> Option<Farewell> {
        match self {
            Self::Garbage(_) | Self::Violation(_) => Some(Farewell::Protocol),
            Self::Version(..) => Some(Farewell::Version),
            Self::Itself | Self::Stranger(_) => Some(Farewell::Identity),
            Self::Slow(_) | Self::Unread(_) => Some(Farewell::Timeout),
            Self::Ours(reason) => Some(*reason),
            Self::Theirs(_) | Self::Lost => None,
        }
    }
}

/// A frame of the peer that no sound node would send here and now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// Something other than HELLO first, or a second one.
    #[error("hello out of place")]
    Hello,
    /// A channel that is not open, or not for this frame.
    #[error("channel {0} is not open for this frame")]
    Channel(u32),
    /// An OPEN of a channel in use, or with the other side's parity.
    #[error("channel {0} is not the peer's to open")]
    ChannelTaken(u32),
    /// More than [`OPENING_MAX`](super::OPENING_MAX) unanswered OPENs.
    #[error("too many unanswered opens")]
    Opening,
    /// A piece that the blob does not have.
    #[error("piece {piece} of {pieces}")]
    Piece {
        /// The number.
        piece: u32,
        /// Pieces of the blob.
        pieces: u32,
    },
    /// More requests than the window.
    #[error("more than {0} requests")]
    Window(u8),
    /// A request that stands already.
    #[error("piece {0} is requested twice")]
    Twice(u32),
    /// An answer to no request.
    #[error("piece {0} was not requested")]
    Unrequested(u32),
    /// A piece of another length than the layout's.
    #[error("piece {piece} has {has} bytes, layout says {says}")]
    Length {
        /// The number.
        piece: u32,
        /// Bytes claimed.
        has: u32,
        /// Bytes of the piece.
        says: u32,
    },
}

/// In what the peer was too slow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Slow {
    /// No HELLO in [`HANDSHAKE_TIME`](super::HANDSHAKE_TIME).
    #[error("no hello")]
    Handshake,
    /// No frame in [`IDLE_MAX`](super::IDLE_MAX).
    #[error("silent")]
    Idle,
    /// A body came too slowly.
    #[error("body comes too slowly")]
    Reading,
    /// What we write is not taken.
    #[error("writes are not taken")]
    Writing,
}
