//! Blobs that nothing refers to any more, taken away for good: from the disks of all origins and from the backend.
//!
//! Whoever collects them calls every origin three times, so that none brings back what another has dropped. Between the first
//! call and the last a digest is *marked*: it is neither stored, fetched nor copied here.
//!
//! | method and path | answer |
//! |---|---|
//! | `PUT /internal/blobs/{digest}/mark` | 200: marked; 409 where work of ours still needs the blob |
//! | `DELETE /internal/namespace/{ns}/blobs/{digest}` | 200: on neither this disk nor the namespace's backend; 409 unless marked |
//! | `DELETE /internal/blobs/{digest}/mark` | 200: not marked |

use super::{Shared, refusal, write_back::name_in_backend};
use crate::http::{self, Response};
use hyper::StatusCode;
use peer_proto::{Digest, Namespace};
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Most digests marked at once.
const MARKED_MAX: usize = 4096;
/// How long a mark holds: whoever set it may be gone. Far longer than the three calls take.
const MARK_TTL: Duration = Duration::from_secs(15 * 60);

/// The digests that are being taken away, and since when.
#[derive(Default)]
pub(super) struct Marks(Mutex<HashMap<Digest, Instant>>);

impl Marks {
    fn marks(&self) -> MutexGuard<'_, HashMap<Digest, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, digest: &Digest) -> bool {
        let mut marks = self.marks();
        if marks.len() >= MARKED_MAX {
            marks.retain(|_, since| since.elapsed() < MARK_TTL);
        }
        let room = marks.len() < MARKED_MAX || marks.contains_key(digest);
        if room {
            marks.insert(*digest, Instant::now());
        }
        room
    }

    fn clear(&self, digest: &Digest) {
        self.marks().remove(digest);
    }

    fn has(&self, digest: &Digest) -> bool {
        self.marks().get(digest).is_some_and(|since| since.elapsed() < MARK_TTL)
    }
}

impl Shared {
    /// 503 for a blob that is being taken away.
    pub(super) fn refuse_marked(&self, digest: &Digest) -> Result<(), http::Error> {
        if self.marks.has(digest) { Err(http::Error::unavailable("blob is being deleted")) } else { Ok(()) }
    }

    pub(super) async fn mark(&self, digest: &Digest) -> Result<Response, http::Error> {
        if self.backends.routes().is_empty() {
            return Err(http::Error::new(StatusCode::CONFLICT, "without a backend, all blobs are kept here"));
        }
        if !self.marks.set(digest) {
            return Err(http::Error::unavailable("too many blobs are being deleted"));
        }
        // The mark first: what begins from here on sees it, what began before is seen here.
        let held = self.holds.idle(digest).await.map(|idle| idle.is_none());
        let copied = (0..self.cluster.members().len()).any(|member| self.pushes.find(&(*digest, member)).is_some());
        if matches!(held, Ok(false)) && !copied && !self.is_committing(digest) && self.fetches.find(digest).is_none() {
            return Ok(http::status(StatusCode::OK));
        }
        self.marks.clear(digest);
        held.map_err(|error| http::Error::unavailable(error.to_string()))?;
        Err(http::Error::new(StatusCode::CONFLICT, "work still needs the blob"))
    }

    pub(super) fn unmark(&self, digest: &Digest) -> Response {
        self.marks.clear(digest);
        http::status(StatusCode::OK)
    }

    pub(super) async fn discard(&self, namespace: &Namespace, digest: &Digest) -> Result<Response, http::Error> {
        let conflict = |message| http::Error::new(StatusCode::CONFLICT, message);
        if !self.marks.has(digest) {
            return Err(conflict("blob is not marked"));
        }
        let idle = self.holds.idle(digest).await.map_err(|error| http::Error::unavailable(error.to_string()))?;
        // Held until it is gone: a commit that is about to hold the blob waits, and then finds it absent.
        let _idle = idle.ok_or_else(|| conflict("work still needs the blob"))?;
        if let Some(route) = self.backends.find(namespace.as_str()) {
            match route.store().delete(&name_in_backend(digest)).await {
                Ok(()) => {}
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(http::Error::unavailable(format!("backend: {error}"))),
            }
        }
        // Of two tasks that ended at the same time, each left the pin to the other.
        self.engine.unpin(digest).await.map_err(refusal)?;
        self.engine.evict(digest).await.map_err(refusal)?;
        tracing::info!(?digest, %namespace, "blob discarded");
        Ok(http::status(StatusCode::OK))
    }
}
