//! Long bodies: whether one still moves, and one that goes on at the next origin where the last one stopped.

use super::{
    cluster::Member,
    origin::{Error, Opened},
    origins::Origins,
};
use crate::http::{self, Body, BoxError};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming, SizeHint};
use peer_proto::{Digest, Namespace};
use std::{
    ops::Range,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

/// Longest time in which a body may move no byte.
pub(crate) const STALL_MAX: Duration = Duration::from_secs(60);
/// Times that a reader goes on elsewhere without having received anything in between.
const BREAKS_MAX: u32 = 8;

/// How far a body on its way out has come.
#[derive(Clone, Default)]
pub(crate) struct Progress(Arc<Counters>);

#[derive(Default)]
struct Counters {
    bytes: AtomicU64,
    broke: AtomicBool,
}

impl Progress {
    /// The same body, watched.
    pub(crate) fn watch(&self, body: Body) -> Body {
        Watched { body, counters: self.0.clone() }.boxed()
    }

    /// Whether the body itself broke off.
    pub(crate) fn broke(&self) -> bool {
        self.0.broke.load(Ordering::Relaxed)
    }

    /// Until nothing moved for [`STALL_MAX`].
    pub(crate) async fn stalled(&self) -> Duration {
        let mut before = None;
        loop {
            let bytes = self.0.bytes.load(Ordering::Relaxed);
            if before == Some(bytes) {
                return STALL_MAX;
            }
            before = Some(bytes);
            tokio::time::sleep(STALL_MAX).await;
        }
    }
}

struct Watched {
    body: Body,
    counters: Arc<Counters>,
}

impl hyper::body::Body for Watched {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        match &frame {
            Poll::Ready(Some(Ok(frame))) => {
                let len = frame.data_ref().map_or(0, Bytes::len);
                self.counters.bytes.fetch_add(len as u64, Ordering::Relaxed);
            }
            Poll::Ready(Some(Err(_))) => self.counters.broke.store(true, Ordering::Relaxed),
            _ => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Bytes of a blob as they come from the origins, in order. Where one breaks off, the next owner goes on at that byte.
pub struct Blob {
    origins: Origins,
    namespace: Namespace,
    digest: Digest,
    total: u64,
    range: Range<u64>,
    /// The next byte.
    at: u64,
    from: Member,
    body: Option<Incoming>,
    breaks: u32,
}

impl Blob {
    pub(super) fn new(origins: Origins, namespace: Namespace, digest: Digest, from: Member, opened: Opened) -> Self {
        let Opened { total, range, body } = opened;
        let at = range.start;
        Self { origins, namespace, digest, total, range, at, from, body: Some(body), breaks: 0 }
    }

    /// Bytes of the whole blob.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The bytes that come: what was asked for, cut at the blob's end.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// The next bytes; none at the end of the range, and only there.
    pub async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        while self.at < self.range.end {
            let broke = match self.body.as_mut() {
                None => Error::Unreachable("body ended early".into()),
                Some(body) => match tokio::time::timeout(STALL_MAX, body.frame()).await {
                    Ok(Some(Ok(frame))) => match frame.into_data() {
                        Ok(bytes) if bytes.len() as u64 > self.range.end - self.at => {
                            return Some(Err(Error::Answer {
                                origin: self.origins.name(self.from),
                                message: "body is longer than its head says".into(),
                            }));
                        }
                        Ok(bytes) if !bytes.is_empty() => {
                            self.at += bytes.len() as u64;
                            self.breaks = 0;
                            return Some(Ok(bytes));
                        }
                        _ => continue,
                    },
                    Ok(Some(Err(error))) => Error::Unreachable(error.to_string()),
                    Ok(None) => Error::Unreachable("body ended early".into()),
                    Err(_) => Error::Unreachable(format!("no bytes for {STALL_MAX:?}")),
                },
            };
            if let Err(error) = self.go_on(broke).await {
                self.range.end = self.at;
                return Some(Err(error));
            }
        }
        None
    }

    /// As a body for an answer of ours.
    pub fn into_body(self) -> Body {
        http::stream(futures_util::stream::unfold(self, |mut blob| async {
            blob.next().await.map(|bytes| (bytes, blob))
        }))
    }

    async fn go_on(&mut self, broke: Error) -> Result<(), Error> {
        self.body = None;
        self.breaks += 1;
        if self.breaks > BREAKS_MAX {
            return Err(broke);
        }
        tracing::debug!(digest = ?self.digest, at = self.at, error = %broke, "blob broke off, going on elsewhere");
        let rest = self.at..self.range.end;
        let (from, opened) = self.origins.open_rest(&self.namespace, &self.digest, rest.clone(), self.from).await?;
        self.from = from;
        if opened.total != self.total || opened.range != rest {
            return Err(Error::Answer {
                origin: self.origins.name(from),
                message: format!(
                    "has bytes {:?} of {}, asked for {rest:?} of {}",
                    opened.range, opened.total, self.total
                ),
            });
        }
        self.body = Some(opened.body);
        Ok(())
    }
}
