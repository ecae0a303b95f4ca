//! What can go wrong, by who has to act on it.

use crate::disk;
use peer_proto::{Digest, PieceIndex, ProofError};
use std::io;

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No room, on the disk or in the quota, and nothing to evict.
    #[error("no space for {0} bytes")]
    NoSpace(u64),
    /// A table is full.
    #[error("busy: {0} is full")]
    Busy(&'static str),
    /// Pinned, so not evicted.
    #[error("blob {0} is pinned")]
    Pinned(Digest),
    /// A partial blob has another layout and is in use.
    #[error("blob {0} is being downloaded by another layout")]
    LayoutDiffers(Digest),
    /// Not all pieces are here.
    #[error("blob {0} lacks pieces")]
    Incomplete(Digest),
    /// Deleted meanwhile.
    #[error("blob {0} was deleted")]
    Gone(Digest),
    /// A wrong byte was found; the blob is in quarantine.
    #[error("blob {digest} was damaged on disk: {reason}")]
    Damaged {
        /// The blob.
        digest: Digest,
        /// What was found.
        reason: String,
    },
    /// No upload with that id, or it was closed.
    #[error("upload is unknown")]
    UploadUnknown,
    /// Somebody writes to that upload.
    #[error("upload has another writer")]
    UploadInUse,
    /// Its writer is just leaving it: ask again when it has.
    #[error("upload is being left by its writer")]
    UploadLeaving,
    /// Longer than a blob may be.
    #[error("upload is longer than a blob may be")]
    TooLong,
    /// Not the bytes they were said to be.
    #[error("content has digest {actual}, expected {expected}")]
    Mismatch {
        /// What was asked for.
        expected: Digest,
        /// What was written.
        actual: Box<Digest>,
    },
    /// The disk failed.
    #[error("disk: {0}")]
    Disk(io::Error),
}

impl From<io::Error> for Error {
    fn from(e: io::Error) -> Self {
        if disk::is_full(&e) { Self::NoSpace(0) } else { Self::Disk(e) }
    }
}

/// Why a piece was not stored.
#[derive(Debug, thiserror::Error)]
pub enum PieceError {
    /// It is not the piece: whoever sent it, or the layout, is wrong.
    #[error(transparent)]
    Proof(#[from] ProofError),
    /// The blob was deleted, or an upload of the same blob made it whole: open it again to see.
    #[error("blob was deleted")]
    Gone,
    /// The disk failed.
    #[error("disk: {0}")]
    Disk(#[source] io::Error),
}

/// Why bytes were not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The range is not within one piece.
    #[error("range is not within a piece")]
    Range,
    /// The piece is not here yet.
    #[error("piece {0} is not here")]
    Absent(PieceIndex),
    /// No buffer is free.
    #[error("busy: buffer pool is full")]
    Busy,
    /// A wrong or missing byte; the blob is in quarantine.
    #[error("piece {piece} was damaged on disk: {reason}")]
    Damaged {
        /// Where.
        piece: PieceIndex,
        /// What was found.
        reason: String,
    },
}
