//! Disk work and proofs as values: a shard makes a [`Job`], a worker thread (or the simulator, inline) runs it, its
//! [`Outcome`] comes back as an event.

use crate::{
    buf::Buf,
    store::{Blob, Error, PieceError, ReadError, Store},
    workers::Lane,
};
use bytes::Bytes;
use peer_proto::{Algorithm, Digest, Layout, Namespace, PieceIndex, ProofError, layout::Candidate};
use std::{ops::Range, sync::Arc};

/// Work that may block or take a core for a while.
#[derive(Debug)]
pub enum Job {
    /// Find a blob, whole or partial.
    Open {
        /// Which.
        digest: Digest,
    },
    /// Set space aside for a blob, or take up what is here of it.
    Begin {
        /// What it will be.
        layout: Arc<Layout>,
        /// What it was asked under.
        namespace: Namespace,
    },
    /// Prove a received piece and put it in its place.
    Piece(Piece),
    /// Make a blob of which all pieces are here durable under its name.
    Finish {
        /// Which.
        blob: Arc<Blob>,
    },
    /// Read bytes within one piece that is here.
    Read {
        /// Of which blob.
        blob: Arc<Blob>,
        /// Which bytes.
        range: Range<u64>,
    },
    /// Delete a blob.
    Evict {
        /// Which.
        digest: Digest,
    },
}

/// A received piece.
#[derive(Debug)]
pub struct Piece {
    /// Of which blob.
    pub blob: Arc<Blob>,
    /// Which piece.
    pub piece: PieceIndex,
    /// Its bytes, all of them.
    pub buf: Buf,
}

impl Piece {
    /// Whether several like it can be hashed at once.
    pub fn fits_lanes(&self) -> bool {
        self.blob.layout().digest().algorithm() == Algorithm::Sha256
    }

    /// What it says it is.
    pub fn candidate(&self) -> Candidate<'_> {
        Candidate { layout: self.blob.layout(), piece: self.piece, bytes: &self.buf }
    }

    /// Puts it in its place, where it was proven.
    pub fn place(self, proven: Result<(), ProofError>, store: &Store) -> Outcome {
        let Self { blob, piece, buf } = self;
        let stored = store.place(&blob, piece, &buf, proven);
        Outcome::Piece { piece, result: stored.map(|fresh| Stored { bytes: buf.freeze(), fresh }) }
    }
}

/// What became of a [`Job`].
#[derive(Debug)]
pub enum Outcome {
    /// Of [`Job::Open`].
    Opened(Result<Option<Arc<Blob>>, Error>),
    /// Of [`Job::Begin`]: partial, or whole where it is here already.
    Begun(Result<Arc<Blob>, Error>),
    /// Of [`Job::Piece`].
    Piece {
        /// Which piece.
        piece: PieceIndex,
        /// Its bytes, for readers who wait for them.
        result: Result<Stored, PieceError>,
    },
    /// Of [`Job::Finish`]: the blob to use from now on.
    Finished(Result<Arc<Blob>, Error>),
    /// Of [`Job::Read`].
    Read(Result<Bytes, ReadError>),
    /// Of [`Job::Evict`]: whether there was something to delete.
    Evicted(Result<bool, Error>),
    /// The job panicked. A bug, and no state of the store can be told from it.
    Panicked,
}

/// A piece that is proven and on disk.
#[derive(Debug)]
pub struct Stored {
    /// The piece, in the buffer it was received in.
    pub bytes: Bytes,
    /// False where another arrival of it was first. That one may still be on its way to the disk.
    pub fresh: bool,
}

impl Job {
    /// Who does it.
    pub fn lane(&self) -> Lane {
        match self {
            Self::Piece(_) => Lane::Hash,
            Self::Open { .. } | Self::Begin { .. } | Self::Finish { .. } | Self::Evict { .. } => Lane::Disk,
            Self::Read { .. } => Lane::Fetch,
        }
    }

    /// Does the work, on the caller's thread.
    pub fn run(self, store: &Store) -> Outcome {
        match self {
            Self::Open { digest } => Outcome::Opened(store.blob(&digest)),
            Self::Begin { layout, namespace } => Outcome::Begun(store.begin(&layout, Some(&namespace))),
            Self::Piece(piece) => {
                let proven = store.prove(piece.candidate());
                piece.place(proven, store)
            }
            Self::Finish { blob } => Outcome::Finished(store.finish(&blob)),
            Self::Read { blob, range } => Outcome::Read(store.read(&blob, range)),
            Self::Evict { digest } => Outcome::Evicted(store.evict(&digest)),
        }
    }
}
