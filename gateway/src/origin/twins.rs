//! Copies of an upload that are written while it still arrives, so that a commit does not begin to send what has long been here.
//!
//! Which origins own a blob is known with its digest, at the end of an upload. Where a cluster has no more origins than a blob has
//! copies, every one will be an owner whatever the digest, and the origin that takes an upload passes the bytes on to the others as
//! they come. At the commit the twins are closed under the digest beside the upload itself. A twin is no more than a head start:
//! one that falls behind or fails is dropped, and the commit finds out by itself who holds the blob and copies what is missing.

use super::{
    Shared,
    figures::{self, Figures},
};
use crate::{
    client::{
        cluster::Member,
        origin::{Error, Origin},
    },
    http,
};
use bytes::Bytes;
use peer_proto::{Algorithm, Digest, Namespace};
use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

/// Uploads whose twins are remembered; others are copied at their commit.
const UPLOADS_MAX: usize = 1024;
/// Uploads shorter than this are copied at their commit: the round trips would cost more than they save.
const LEN_MIN: u64 = 1 << 20;
/// Parts of a body on their way to one twin.
const PARTS_AHEAD: usize = 8;
/// Longest time for which an upload waits for a twin to take a part.
const PATIENCE: Duration = Duration::from_secs(2);

/// An upload at another origin that has the bytes of one here. Dropping it before it is settled cancels it there: what it holds is room
/// that the other's next push may need.
struct Twin {
    member: Member,
    origin: Origin,
    id: String,
    len: u64,
    settled: bool,
}

impl Drop for Twin {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.settled {
            return;
        }
        let (origin, id) = (self.origin.clone(), std::mem::take(&mut self.id));
        runtime.spawn(async move {
            // The path wants a namespace, and an upload has none before it is settled.
            let Ok(namespace) = "twin".parse() else { return };
            if let Err(error) = origin.cancel(&namespace, &id).await {
                // It ends there by itself, as nobody writes to it.
                tracing::debug!(%error, to = %origin.addr(), "cancel a twin");
            }
        });
    }
}

/// Twins of uploads that nobody writes to just now, by the id of the upload here.
#[derive(Default)]
pub(super) struct Twins {
    entries: Mutex<HashMap<String, (Instant, Vec<Twin>)>>,
}

impl Twins {
    fn entries(&self) -> MutexGuard<'_, HashMap<String, (Instant, Vec<Twin>)>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, id: &str) -> Vec<Twin> {
        self.entries().remove(id).map(|(_, twins)| twins).unwrap_or_default()
    }

    /// Keeps the twins of an upload, in the place of those kept longest where there are too many.
    fn keep(&self, id: &str, twins: Vec<Twin>) {
        let mut entries = self.entries();
        if entries.len() >= UPLOADS_MAX {
            let oldest = entries.iter().min_by_key(|(_, (since, _))| *since).map(|(id, _)| id.clone());
            oldest.and_then(|id| entries.remove(&id));
        }
        entries.insert(id.to_owned(), (Instant::now(), twins));
    }

    /// Gives up the twins of an upload.
    pub(super) fn forget(&self, id: &str) {
        drop(self.take(id));
    }
}

/// What passes a body on to the twins of an upload.
#[derive(Default)]
pub(super) struct Tee {
    ways: Vec<Way>,
}

struct Way {
    twin: Twin,
    parts: mpsc::Sender<Bytes>,
    /// Resolves to the size that the twin then has.
    sent: JoinHandle<Result<u64, Error>>,
}

impl Way {
    fn open(twin: Twin) -> Self {
        let (parts, body) = mpsc::channel(PARTS_AHEAD);
        let body = futures_util::stream::unfold(body, |mut body| async {
            body.recv().await.map(|bytes| (Ok::<_, Infallible>(bytes), body))
        });
        let (origin, id, at) = (twin.origin.clone(), twin.id.clone(), twin.len);
        let sent = tokio::spawn(async move { origin.append_twin(&id, at, http::stream(body)).await });
        Self { twin, parts, sent }
    }
}

impl Tee {
    /// Passes bytes on. A twin that does not take them is given up.
    pub(super) async fn pass(&mut self, bytes: &Bytes, figures: &Figures) {
        let mut at = 0;
        while let Some(way) = self.ways.get(at) {
            match timeout(PATIENCE, way.parts.send(bytes.clone())).await {
                Ok(Ok(())) => at += 1,
                Ok(Err(_)) | Err(_) => {
                    let way = self.ways.swap_remove(at);
                    tracing::debug!(member = way.twin.member, "a twin fell behind");
                    Figures::count(&figures.twins, figures::FAILED);
                    way.sent.abort();
                }
            }
        }
    }

    /// The body is at its end, and the upload has `len` bytes: the twins that have as many.
    async fn end(self, len: u64, figures: &Figures) -> Vec<Twin> {
        let mut twins = Vec::new();
        for Way { mut twin, parts, sent } in self.ways {
            drop(parts);
            match timeout(PATIENCE, sent).await {
                Ok(Ok(Ok(has))) if has == len => {
                    twin.len = len;
                    twins.push(twin);
                }
                outcome => {
                    tracing::debug!(?outcome, len, "a twin is given up");
                    Figures::count(&figures.twins, figures::FAILED);
                }
            }
        }
        twins
    }
}

impl Shared {
    /// What passes the next bytes of an upload on, which has `len` of them by now and is about to receive `coming` where that is known.
    pub(super) async fn tee(&self, id: &str, algorithm: Algorithm, len: u64, coming: Option<u64>) -> Tee {
        let mut twins = self.twins.take(id);
        twins.retain(|twin| twin.len == len);
        let everybody = self.cluster.members().len() <= self.cluster.replicas();
        if len == 0 && everybody && coming.is_none_or(|coming| coming >= LEN_MIN) {
            let others = (0..self.cluster.members().len()).filter(|member| *member != self.me);
            for member in others.filter(|member| self.cluster.is_up(*member)) {
                let origin = self.cluster.origin(member).clone();
                match origin.start_twin(algorithm).await {
                    Ok(id) => twins.push(Twin { member, origin, id, len: 0, settled: false }),
                    Err(error) => tracing::debug!(%error, "open a twin"),
                }
            }
        }
        Tee { ways: twins.into_iter().map(Way::open).collect() }
    }

    /// The end of [`Self::tee`]: keeps the twins until the upload goes on, or is committed.
    pub(super) async fn keep_twins(&self, id: &str, tee: Tee, len: u64) {
        let twins = tee.end(len, &self.figures).await;
        if !twins.is_empty() {
            self.twins.keep(id, twins);
        }
    }

    /// Closes the twins of an upload of `len` bytes under its digest. Whoever could not is found out by whoever copies.
    pub(super) async fn close_twins(&self, id: &str, len: u64, namespace: &Namespace, digest: &Digest) {
        let twins = self.twins.take(id).into_iter().filter(|twin| twin.len == len).enumerate();
        let closing = twins.map(|(rank, twin)| self.close_twin(twin, rank, namespace, digest));
        futures_util::future::join_all(closing).await;
    }

    async fn close_twin(&self, mut twin: Twin, rank: usize, namespace: &Namespace, digest: &Digest) {
        let settled = twin.origin.settle(digest, &twin.id, Some((namespace, self.replica_delay(rank)))).await;
        twin.settled = settled.is_ok();
        Figures::count(&self.figures.twins, if settled.is_ok() { figures::DONE } else { figures::FAILED });
        if let Err(error) = settled {
            tracing::debug!(?digest, to = %twin.origin.addr(), %error, "close a twin");
        }
    }
}
