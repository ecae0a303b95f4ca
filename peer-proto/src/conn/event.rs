//! What goes into a connection's machine and what comes out.

use super::Closed;
use crate::{
    PieceIndex,
    id::{Digest, Namespace},
    layout::Geometry,
    pieces::PieceSet,
    swarm::Class,
    wire::{Channel, Farewell, HEADER_LEN, Hello, Refusal, Rejection},
};
use alloc::{boxed::Box, vec::Vec};

/// What to read next from the socket. Changes only in [`Conn::handle`](super::Conn::handle) of what was read, and to `Nothing` at the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// [`HEADER_LEN`] bytes, for [`Event::Header`].
    Header,
    /// This many bytes, at most [`CONTROL_LEN_MAX`](crate::wire::CONTROL_LEN_MAX), for [`Event::Body`].
    Body(u32),
    /// `len` bytes of a piece, into a buffer of its own; then [`Event::Payload`].
    Payload {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
        /// Bytes of the piece.
        len: u32,
    },
    /// This many bytes of a piece that nobody wants any more, to be thrown away; then [`Event::Payload`].
    Discard(u32),
    /// The connection is over.
    Nothing,
}

/// What happened to the socket, and what this node wants.
#[derive(Debug)]
pub enum Event<'a> {
    /// The header was read.
    Header(&'a [u8; HEADER_LEN]),
    /// The control body was read.
    Body(&'a [u8]),
    /// All bytes of [`Need::Payload`] or [`Need::Discard`] were read. In the former case the next effect is [`Effect::Arrived`].
    Payload,
    /// Some bytes of the present need arrived, but not all: tell at least every [`PROGRESS_MIN`](super::PROGRESS_MIN) of them.
    Read(u64),
    /// This node itself keeps what is needed next waiting, for want of a buffer or of bandwidth: the peer's clock starts anew. To be
    /// told before every [`Event::Tick`] while it lasts.
    Held,
    /// Some bytes of the present [`Effect::Send`] left, but not all: tell at least every [`PROGRESS_MIN`](super::PROGRESS_MIN) of them.
    Written(u64),
    /// All of it left; its head comes back to be used again.
    Sent(Vec<u8>),
    /// The socket failed or ended.
    Lost,
    /// Time passed: [`Conn::deadline`](super::Conn::deadline) is here.
    Tick,
    /// Yes to [`Effect::Offered`], with what is here. Answered by [`Effect::Opened`].
    Accept {
        /// The channel.
        channel: Channel,
        /// What is here.
        has: PieceSet,
    },
    /// No to [`Effect::Offered`].
    Refuse {
        /// The channel.
        channel: Channel,
        /// Why.
        reason: Refusal,
    },
    /// A piece came to be here. At most once for each piece and channel, and only what the channel's opening did not say.
    Have {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
    },
    /// Every piece is here.
    HaveAll {
        /// The channel.
        channel: Channel,
    },
    /// How urgent further requests on a channel are; until told, somebody waits for their pieces.
    Class {
        /// The channel.
        channel: Channel,
        /// How urgent.
        class: Class,
    },
    /// A request is no longer wanted. Answered by [`Effect::Released`] unless it has been answered already or is being read, in which
    /// case [`Effect::Arrived`] comes.
    Cancel {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
    },
    /// The piece asked for by [`Effect::Serve`] can be sent at once: it comes back in [`Effect::Send`].
    Ready {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
    },
    /// No to [`Effect::Serve`].
    Reject {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
        /// Why.
        reason: Rejection,
    },
    /// Ends a channel. No effect for it follows but a [`Effect::Send`] of a piece that is under way.
    Close {
        /// The channel.
        channel: Channel,
    },
    /// Ends the connection, telling the peer why.
    Goodbye(Farewell),
}

/// What the shell has to do or to know.
#[derive(Debug)]
pub enum Effect {
    /// Write these bytes, then those of the piece where there is one; then [`Event::Sent`]. The head is never empty.
    Send {
        /// Control frames, and the piece's header last.
        head: Vec<u8>,
        /// The piece whose bytes follow.
        piece: Option<(Channel, PieceIndex)>,
    },
    /// The peer is known and agreed with; commands may follow.
    Handshaken(Hello),
    /// The peer opens a channel; to be answered by [`Event::Accept`] or [`Event::Refuse`].
    Offered(Box<Offer>),
    /// A channel is open, whoever opened it.
    Opened {
        /// The channel.
        channel: Channel,
        /// What the peer has.
        has: PieceSet,
    },
    /// The peer does not open a channel, and the channel is gone.
    Refused {
        /// The channel.
        channel: Channel,
        /// Why.
        reason: Refusal,
    },
    /// The peer has another piece. May repeat itself.
    Has {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
    },
    /// The peer has every piece.
    HasAll {
        /// The channel.
        channel: Channel,
    },
    /// The peer asks for a piece; to be answered by [`Event::Ready`] or [`Event::Reject`].
    Serve {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
        /// How urgent the peer says it is.
        class: Class,
    },
    /// The peer no longer wants it; answered already.
    Unserve {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
    },
    /// The piece that [`Need::Payload`] named was read.
    Arrived {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
    },
    /// A request was not granted.
    Rejected {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
        /// Why.
        reason: Rejection,
    },
    /// A cancelled request was answered, one way or the other: its place in the window is free.
    Released {
        /// The channel.
        channel: Channel,
        /// The piece.
        piece: PieceIndex,
    },
    /// The peer ended a channel: everything asked for on it, either way, is off.
    Shut {
        /// The channel.
        channel: Channel,
    },
    /// The connection is over, and every channel with it. One more `Send` may follow.
    Closed(Closed),
    /// Drop the socket. The last effect.
    Hangup,
}

/// A channel that the peer opens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// The channel.
    pub channel: Channel,
    /// The blob.
    pub digest: Digest,
    /// The group it was asked under.
    pub namespace: Namespace,
    /// Where its edges are, by the peer's layout.
    pub geometry: Geometry,
    /// How many pieces the peer has; which ones comes with [`Effect::Opened`].
    pub has: u32,
}

/// Why a request or an opening was not made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CommandError {
    /// Not now: the window, the channels or the queue is full. Tried again after an answer.
    #[error("connection has no room for it now")]
    Full,
    /// The channel (or the connection) is not open.
    #[error("channel is not open")]
    NotOpen,
    /// The same piece is requested already, or its cancelled request is not answered yet.
    #[error("piece is requested already")]
    Twice,
}
