//! Taking acknowledged blobs to their namespace's backend: tasks of the retry queue, tried until done.
//!
//! A task is added twice: as an intent before the blob appears under its name, so that no crash leaves a blob that clients see and
//! nobody takes to the backend; and for good before the client gets its answer. An intent whose blob never appeared is dropped.
//! One whose blob was acknowledged and is found nowhere is kept for people to see, and counted.

use super::{
    Shared,
    blobs::bytes_of,
    figures::{self, Figures},
    holds::{self, WRITE_BACK},
};
use crate::retry::{Failure, Task};
use backends::Content;
use engine::handle::Stat;
use peer_proto::{Algorithm, Digest, Namespace};
use std::time::Duration;

/// Payload of a task before its blob is committed.
pub(super) const INTENT: &[u8] = b"intent";
/// Payload of a task whose blob was committed.
pub(super) const HELD: &[u8] = b"held";
/// How long an intent waits for its blob before it is looked at.
pub(super) const INTENT_DELAY: Duration = Duration::from_secs(60);

/// The name of a blob in a backend: Kraken's, which names no algorithm for SHA-256.
pub(super) fn name_in_backend(digest: &Digest) -> String {
    match digest.algorithm() {
        Algorithm::Sha256 => digest.hex(),
        Algorithm::Sha512 => digest.to_string(),
    }
}

impl Shared {
    /// A task of the retry queue.
    pub(super) async fn write_back(&self, task: Task) -> Result<(), Failure> {
        let Some((digest, namespace)) = holds::parse_key(&task.key) else {
            return Err(Failure::never("key is not a digest and a namespace"));
        };
        let namespace: Namespace = namespace.parse().map_err(Failure::never)?;
        self.holds.renew(&digest).await.map_err(Failure::later)?;
        let outcome = self.write_back_blob(&namespace, &digest, &task.payload).await;
        let how = match &outcome {
            Ok(how) => *how,
            Err(error) => {
                tracing::warn!(?digest, %namespace, failures = task.failures + 1, ?error, "write-back");
                figures::FAILED
            }
        };
        Figures::count(&self.figures.write_backs, how);
        outcome?;
        self.holds.release(&digest, WRITE_BACK, namespace.as_str()).await.map_err(Failure::later)
    }

    async fn write_back_blob(
        &self,
        namespace: &Namespace,
        digest: &Digest,
        payload: &[u8],
    ) -> Result<&'static str, Failure> {
        let route = self.backends.find(namespace.as_str());
        let route = route.ok_or_else(|| Failure::never("no backend keeps this namespace"))?;
        let name = name_in_backend(digest);
        let there = match route.store().stat(&name).await {
            Ok(size) => Some(size),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(Failure::later(error)),
        };
        let layout = match self.engine.stat(digest).await.map_err(Failure::later)? {
            Stat::Whole { layout } => layout,
            Stat::Absent | Stat::Partial { .. } => {
                if there.is_some() {
                    return Ok(figures::KNOWN);
                }
                if payload == INTENT {
                    return if self.is_committing(digest) {
                        Err(Failure::Later("blob is being committed".into()))
                    } else {
                        Ok(figures::KNOWN)
                    };
                }
                // Damaged or dropped by hand: another owner may have it still.
                self.fetch_from_origins(namespace, digest).await.map_err(|error| {
                    if error.status == hyper::StatusCode::NOT_FOUND && task_is_lost(self) {
                        self.figures.lost.inc();
                        tracing::error!(?digest, %namespace, "acknowledged blob is neither here, at other origins, nor in the backend");
                        return Failure::never("blob is nowhere");
                    }
                    Failure::later(error)
                })?
            }
        };
        let length = layout.length();
        if there == Some(length) {
            return Ok(figures::KNOWN);
        }
        let reader = self.engine.read(digest, 0..length).await.map_err(Failure::later)?;
        let content = Content::stream(Some(length), bytes_of(reader));
        route.store().write(&name, content).await.map_err(Failure::later)?;
        self.figures.write_back_bytes.inc_by(length);
        Ok(figures::DONE)
    }
}

/// With an origin down nobody can say that a blob is lost.
fn task_is_lost(shared: &Shared) -> bool {
    (0..shared.cluster.members().len()).all(|member| shared.cluster.is_up(member))
}
