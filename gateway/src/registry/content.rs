//! What stands behind a registry: blobs by digest, tags by name. The proxy's is the origins and the index, read and written;
//! an agent's is its engine and the index, read only.

use super::{
    error::{Code, Error},
    name::{Repository, Tag},
    paging::{Listing, Page},
    range::Spec,
    session::Session,
};
use crate::http::{self, Body};
use bytes::Bytes;
use hyper::{
    StatusCode,
    header::{self, HeaderValue},
};
use peer_proto::{Algorithm, Digest};
use std::{future::Future, ops::Range, time::Duration};

/// Why content was not read or written.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// It is certain that there is no such thing.
    #[error("not here")]
    Unknown,
    /// No such upload, or it was closed.
    #[error("upload is unknown")]
    UploadUnknown,
    /// A chunk that does not start where the upload ends.
    #[error("chunk does not start where the upload ends, at byte {expected}")]
    Offset {
        /// Bytes the upload has.
        expected: u64,
    },
    /// The bytes are not what the digest says.
    #[error("{0}")]
    Mismatch(String),
    /// The range is not within the blob.
    #[error("range is not within the blob's {0} bytes")]
    Range(u64),
    /// The client's own body broke off or stood still.
    #[error("body broke off")]
    Body,
    /// No room for it.
    #[error("{0}")]
    NoSpace(String),
    /// Whether it is here cannot be known now, or it cannot be done now.
    #[error("{0}")]
    Unavailable(String),
    /// Where it would have to be fetched from, a limit is reached.
    #[error("{message}")]
    Limited {
        /// Whose.
        message: String,
        /// When it may be asked for again.
        after: Duration,
    },
    /// Never possible here.
    #[error("{0}")]
    Unsupported(&'static str),
    /// A fault of ours.
    #[error("{0}")]
    Internal(String),
}

impl Failure {
    /// The answer, where `unknown` is the code for "there is no such thing".
    pub fn answer(self, unknown: Code) -> Error {
        let message = self.to_string();
        match self {
            Self::Unknown => Error::new(unknown, message),
            Self::UploadUnknown => Error::new(Code::BlobUploadUnknown, message),
            Self::Offset { .. } => {
                Error::new(Code::BlobUploadInvalid, message).status(StatusCode::RANGE_NOT_SATISFIABLE)
            }
            Self::Mismatch(_) => Error::new(Code::DigestInvalid, message),
            Self::Range(total) => match HeaderValue::try_from(format!("bytes */{total}")) {
                Ok(value) => Error::new(Code::RangeInvalid, message).header(header::CONTENT_RANGE, value),
                Err(_) => Error::new(Code::RangeInvalid, message),
            },
            Self::Body => Error::new(Code::BlobUploadInvalid, message),
            Self::NoSpace(_) => Error::new(Code::Unavailable, message).status(StatusCode::INSUFFICIENT_STORAGE),
            Self::Unavailable(_) => Error::new(Code::Unavailable, message),
            Self::Limited { after, .. } => {
                Error::new(Code::TooManyRequests, message).header(header::RETRY_AFTER, http::retry_after(after))
            }
            Self::Unsupported(_) => Error::new(Code::Unsupported, message),
            Self::Internal(_) => Error::new(Code::Unknown, message),
        }
    }
}

/// Bytes of a blob on their way.
#[derive(Debug)]
pub struct Part {
    /// Bytes of the whole blob.
    pub total: u64,
    /// The bytes that follow.
    pub range: Range<u64>,
    /// They themselves; an error in mid-way ends the client's connection.
    pub bytes: Body,
}

/// Bytes to be added to an upload.
#[derive(Debug)]
pub struct Chunk {
    /// Where they begin; where the upload ends unless the client says so.
    pub at: Option<u64>,
    /// How many there are, where the client says so.
    pub length: Option<u64>,
    /// They themselves.
    pub bytes: Body,
}

/// A manifest to be stored.
#[derive(Clone, Debug)]
pub struct Push<'a> {
    /// The digest of its bytes.
    pub digest: &'a Digest,
    /// They themselves.
    pub bytes: Bytes,
    /// What it is about.
    pub subject: Option<&'a Digest>,
    /// The tags that are to stand for it.
    pub tags: &'a [Tag],
}

/// Blobs and tags, as a registry sees them. Everything but the first half is for content that can be written.
pub trait Content: Send + Sync + 'static {
    /// Bytes of a blob. Starts no download.
    fn stat(&self, repository: &Repository, digest: &Digest) -> impl Future<Output = Result<u64, Failure>> + Send;

    /// Opens a blob, or a range of it, for an answer: nobody here looks at the bytes. Returns once the size is known.
    fn read(
        &self,
        repository: &Repository,
        digest: &Digest,
        range: Option<Spec>,
    ) -> impl Future<Output = Result<Part, Failure>> + Send;

    /// Opens a blob for reading it here.
    fn inspect(&self, repository: &Repository, digest: &Digest) -> impl Future<Output = Result<Part, Failure>> + Send {
        self.read(repository, digest, None)
    }

    /// What a tag stands for.
    fn resolve(&self, repository: &Repository, tag: &Tag) -> impl Future<Output = Result<Digest, Failure>> + Send;

    /// A repository's tags, sorted.
    fn tags(&self, repository: &Repository, page: &Page) -> impl Future<Output = Result<Listing, Failure>> + Send;

    /// The repositories that have tags, sorted.
    fn repositories(&self, page: &Page) -> impl Future<Output = Result<Listing, Failure>> + Send;

    /// The manifests of a repository that are about `subject`, sorted by digest; not those that only its fallback tag lists.
    fn referrers(
        &self,
        repository: &Repository,
        subject: &Digest,
        page: &Page,
    ) -> impl Future<Output = Result<Listing<Digest>, Failure>> + Send;

    /// Begins to bring a blob nearer, because it will be asked for; returns once that has begun.
    fn warm(&self, repository: &Repository, digest: &Digest) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Whether what follows is possible at all.
    fn is_writable(&self) -> bool {
        false
    }

    /// Opens an upload.
    fn open(
        &self,
        _repository: &Repository,
        _algorithm: Algorithm,
    ) -> impl Future<Output = Result<Session, Failure>> + Send {
        read_only()
    }

    /// Bytes an upload has.
    fn received(
        &self,
        _repository: &Repository,
        _session: &Session,
    ) -> impl Future<Output = Result<u64, Failure>> + Send {
        read_only()
    }

    /// Adds bytes to an upload, as they come. The bytes it then has.
    fn append(
        &self,
        _repository: &Repository,
        _session: &Session,
        _chunk: Chunk,
    ) -> impl Future<Output = Result<u64, Failure>> + Send {
        read_only()
    }

    /// Closes an upload under its digest; afterwards the blob is durable and the repository's. A mismatch drops the upload.
    fn commit(
        &self,
        _repository: &Repository,
        _session: &Session,
        _digest: &Digest,
    ) -> impl Future<Output = Result<(), Failure>> + Send {
        read_only()
    }

    /// Drops an upload.
    fn cancel(&self, _repository: &Repository, _session: &Session) -> impl Future<Output = Result<(), Failure>> + Send {
        read_only()
    }

    /// Makes a blob that is here, in the repository `from` where that is given, also one of `repository`'s. False where it is not
    /// here.
    fn mount(
        &self,
        _repository: &Repository,
        _digest: &Digest,
        _from: Option<&Repository>,
    ) -> impl Future<Output = Result<bool, Failure>> + Send {
        read_only()
    }

    /// Stores a manifest whose digest was checked, with what it is known by; afterwards that is durable.
    fn put_manifest(
        &self,
        _repository: &Repository,
        _push: Push<'_>,
    ) -> impl Future<Output = Result<(), Failure>> + Send {
        read_only()
    }

    /// Removes a tag.
    fn untag(&self, _repository: &Repository, _tag: &Tag) -> impl Future<Output = Result<(), Failure>> + Send {
        read_only()
    }

    /// Takes a blob or a manifest from the repository: a manifest with its tags, and from the list of what is about `subject`.
    /// Afterwards it is not there any more, whatever other repositories have.
    fn delete(
        &self,
        _repository: &Repository,
        _digest: &Digest,
        _subject: Option<&Digest>,
    ) -> impl Future<Output = Result<(), Failure>> + Send {
        read_only()
    }
}

async fn read_only<T>() -> Result<T, Failure> {
    Err(Failure::Unsupported("this registry is read-only; push to the proxy"))
}
