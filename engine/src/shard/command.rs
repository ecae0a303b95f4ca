//! What crosses into a shard from other threads, and what it answers.

use super::read::Reading;
use crate::{
    driver::Carried,
    handle::{Class, Error, Peer},
};
use bytes::Bytes;
use peer_proto::{Digest, Layout, Namespace, PieceIndex, swarm::ReaderId};
use std::{
    net::SocketAddr,
    ops::Range,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::sync::oneshot;

/// Where an answer goes. An asker that is gone needs none.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// How much of a blob a download is to bring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Extent {
    /// All of it.
    Whole,
    /// What readers ask for, for as long as they are few and ask for little.
    Ranges,
}

/// A request to a shard.
#[derive(Debug)]
pub(crate) enum Command {
    /// Start or join a download.
    Download { namespace: Namespace, layout: Arc<Layout>, class: Class, extent: Extent, reply: Reply<()> },
    /// Answer once the blob is whole; [`Error::NotFound`] where it is not being downloaded.
    Wait { digest: Digest, reply: Reply<()> },
    /// Forget a blob: stop its download, close its channels.
    Forget { digest: Digest, reply: Reply<bool> },
    /// Nodes that may have it.
    Peers { digest: Digest, peers: Vec<Peer> },
    /// Open a reader; [`Error::NotFound`] where it is not being downloaded.
    Read { digest: Digest, range: Range<u64>, alive: Weak<()>, reply: Reply<Reading> },
    /// Answer once the piece is here, with its bytes where they are at hand; `all`: once every piece is.
    Await { digest: Digest, reader: ReaderId, piece: u32, all: bool, patience: Duration, reply: Reply<Option<Bytes>> },
    /// A connection that another shard accepted, for this one by its HELLO.
    Adopt { carried: Carried, from: SocketAddr, hello: Box<[u8]> },
    /// A piece of a download came by another way than from a peer, and is proven and stored.
    Supplied { digest: Digest, piece: PieceIndex, bytes: Bytes },
    /// From another shard of this node.
    Told(Message),
    /// Answer at once.
    Probe { reply: oneshot::Sender<()> },
    /// Stop: take nothing new, let what is being sent end for at most `drain`.
    Stop { drain: Duration },
}

/// From one shard of a node to another. May be lost: repeated when there is more to tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Message {
    /// Tell me when this blob, which you download, gets pieces.
    Watch { digest: Digest, shard: usize },
    /// It has got some.
    Progress { digest: Digest },
}

/// An answer on its way out.
#[derive(Debug)]
pub(crate) enum Answer {
    Unit(Reply<()>, Result<(), Error>),
    Bool(Reply<bool>, Result<bool, Error>),
    Reading(Reply<Reading>, Result<Reading, Error>),
    Bytes(Reply<Option<Bytes>>, Result<Option<Bytes>, Error>),
    Alive(oneshot::Sender<()>),
}

impl Answer {
    /// Gives it to whoever asked; one who is gone needs none.
    pub(crate) fn give(self) {
        match self {
            Self::Unit(reply, result) => drop(reply.send(result)),
            Self::Bool(reply, result) => drop(reply.send(result)),
            Self::Reading(reply, result) => drop(reply.send(result)),
            Self::Bytes(reply, result) => drop(reply.send(result)),
            Self::Alive(reply) => drop(reply.send(())),
        }
    }
}
