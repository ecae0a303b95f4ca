//! The trait: what a store of named bytes can do, in the verbs of an object store.

use crate::{BoxError, Error};
use bytes::Bytes;
use futures_util::{
    StreamExt, TryStreamExt,
    future::BoxFuture,
    stream::{self, BoxStream, Stream},
};
use std::{fmt, ops::Range};

/// What every verb returns.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, Error>>;
/// Bytes as they come. After an error the stream ends.
pub type ByteStream = BoxStream<'static, Result<Bytes, Error>>;

/// A store of named bytes, shared by any number of callers and, where the store is a shared one, of processes.
///
/// Names are what [`check_name`](crate::check_name) takes. A call dropped before it returns leaves nothing half done that a
/// reader could see.
pub trait Backend: Send + Sync + 'static {
    /// The object's size in bytes.
    fn stat<'a>(&'a self, name: &'a str) -> Answer<'a, u64>;

    /// The object's bytes, or a range of them. A range's end beyond the object's is cut to it; a start beyond it is
    /// [`Error::Range`].
    fn read<'a>(&'a self, name: &'a str, range: Option<Range<u64>>) -> Answer<'a, Object>;

    /// Makes or replaces an object. Readers see the old bytes or the new, never a part; once this returns, the new ones
    /// are durable.
    fn write<'a>(&'a self, name: &'a str, content: Content) -> Answer<'a, ()>;

    /// Names in byte order.
    fn list<'a>(&'a self, list: List<'a>) -> Answer<'a, Page>;

    /// Removes an object; [`Error::NotFound`] where there is none.
    fn delete<'a>(&'a self, name: &'a str) -> Answer<'a, ()>;
}

/// An object being read.
pub struct Object {
    /// The whole object's size in bytes.
    pub size: u64,
    /// Which of its bytes come.
    pub range: Range<u64>,
    /// The bytes: exactly the range's number, or an error at the end.
    pub bytes: ByteStream,
}

impl Object {
    /// All its bytes in one piece; [`Error::Invalid`] where there are more than `limit`.
    pub async fn collect(mut self, limit: usize) -> Result<Bytes, Error> {
        let len = self.range.end - self.range.start;
        let len = usize::try_from(len).ok().filter(|len| *len <= limit);
        let len =
            len.ok_or_else(|| Error::Invalid(format!("object of {} bytes, at most {limit} wanted", self.size)))?;
        let mut whole = Vec::with_capacity(len);
        while let Some(part) = self.bytes.try_next().await? {
            whole.extend_from_slice(&part);
        }
        Ok(whole.into())
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object").field("size", &self.size).field("range", &self.range).finish_non_exhaustive()
    }
}

/// The part of an object of `size` bytes that a caller asks for.
pub(crate) fn within(range: Option<Range<u64>>, size: u64) -> Result<Range<u64>, Error> {
    let Some(range) = range else { return Ok(0..size) };
    if range.start > size || range.start > range.end {
        return Err(Error::Range { start: range.start, end: range.end, size });
    }
    Ok(range.start..range.end.min(size))
}

/// What to write.
pub enum Content {
    /// Bytes at hand. Wrappers may send them again.
    Bytes(Bytes),
    /// Bytes as they come, once.
    Stream {
        /// Their exact number, where known: a stream of any other length fails the write.
        size: Option<u64>,
        /// The bytes.
        bytes: ByteStream,
    },
}

impl Content {
    /// A stream of exactly `size` bytes where that is known; an error in it fails the write as [`Error::Source`].
    pub fn stream<S, E>(size: Option<u64>, bytes: S) -> Self
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<BoxError> + 'static,
    {
        Self::Stream { size, bytes: bytes.map_err(|error| Error::Source(error.into())).boxed() }
    }

    /// The number of bytes, where known.
    pub fn size(&self) -> Option<u64> {
        match self {
            Self::Bytes(bytes) => Some(bytes.len() as u64),
            Self::Stream { size, .. } => *size,
        }
    }

    /// The bytes as a stream that fails where their number is not the one announced: what a store reads from.
    pub fn into_stream(self) -> ByteStream {
        match self {
            Self::Bytes(bytes) => stream::iter((!bytes.is_empty()).then_some(Ok(bytes))).boxed(),
            Self::Stream { size: None, bytes } => bytes,
            Self::Stream { size: Some(size), bytes } => exactly(size, bytes),
        }
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Content").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl<T: Into<Bytes>> From<T> for Content {
    fn from(bytes: T) -> Self {
        Self::Bytes(bytes.into())
    }
}

fn exactly(size: u64, bytes: ByteStream) -> ByteStream {
    let next = move |(mut bytes, seen): (ByteStream, u64)| async move {
        match bytes.try_next().await? {
            Some(part) if seen + part.len() as u64 > size => {
                Err(Error::Invalid(format!("content is longer than the {size} bytes announced")))
            }
            Some(part) => {
                let seen = seen + part.len() as u64;
                Ok(Some((part, (bytes, seen))))
            }
            None if seen < size => Err(Error::Invalid(format!("content ended after {seen} of {size} bytes"))),
            None => Ok(None),
        }
    };
    stream::try_unfold((bytes, 0), next).boxed()
}

/// What to list.
#[derive(Clone, Copy, Debug, Default)]
pub struct List<'a> {
    /// Only names that begin with this. It is a string's beginning and need not end at a `/`.
    pub prefix: &'a str,
    /// Only names after this one in byte order; it need not exist.
    pub after: Option<&'a str>,
    /// At most this many, and never more than [`List::LIMIT_MAX`]; 0 asks for that.
    pub limit: usize,
}

impl List<'_> {
    /// Most names in one page.
    pub const LIMIT_MAX: usize = 1000;

    /// The limit in force.
    pub fn limit(&self) -> usize {
        if self.limit == 0 { Self::LIMIT_MAX } else { self.limit.min(Self::LIMIT_MAX) }
    }
}

/// A part of a listing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Page {
    /// Names in byte order.
    pub names: Vec<String>,
    /// There are more: ask again with `after` the last of these.
    pub more: bool,
}
