//! What keeps a blob on this origin's disk: work that still needs its bytes. A blob is pinned while the retry queue has a task for
//! it, so that no eviction takes what was acknowledged and is nowhere else yet.

use crate::retry::{self, Queue};
use bytes::Bytes;
use futures_util::future::try_join_all;
use peer_proto::Digest;
use std::time::Duration;
use tokio::sync::{Mutex, MutexGuard};

/// A blob that its namespace's backend may not have yet. The rest of the key is the namespace.
pub(super) const WRITE_BACK: &str = "write-back";
/// A blob that an owner lacks. The rest of the key is the owner's address.
pub(super) const REPLICATE: &str = "replicate";
/// A blob of a namespace that no backend keeps: never worked on, so the blob stays. The rest of the key is the namespace.
pub(super) const KEEP: &str = "keep";

const KINDS: [&str; 3] = [WRITE_BACK, REPLICATE, KEEP];
/// Locks that the digests share.
const STRIPES: usize = 64;

/// The holds of an origin.
pub(super) struct Holds {
    engine: engine::Handle,
    queue: Queue,
    /// A task is added and its blob pinned, or the last task found done and its blob unpinned: one at a time for a digest.
    stripes: Box<[Mutex<()>]>,
}

/// Why a hold was not taken or not let go.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Engine(#[from] engine::handle::Error),
    #[error(transparent)]
    Queue(#[from] retry::Error),
}

/// A task to hold a blob for.
pub(super) struct Hold<'a> {
    pub(super) kind: &'static str,
    pub(super) rest: &'a str,
    pub(super) payload: Bytes,
    pub(super) delay: Duration,
}

impl Holds {
    pub(super) fn new(engine: engine::Handle, queue: Queue) -> Self {
        Self { engine, queue, stripes: (0..STRIPES).map(|_| Mutex::default()).collect() }
    }

    /// Pins a blob, which need not be here yet, and adds tasks. Both are on the disk when this returns.
    pub(super) async fn take(&self, digest: &Digest, holds: &[Hold<'_>]) -> Result<(), Error> {
        let _stripe = self.stripe(digest).await;
        self.engine.pin(digest).await?;
        let adds = holds.iter().map(|hold| async {
            self.queue.add(hold.kind, &key(digest, hold.rest), hold.payload.clone(), hold.delay).await
        });
        try_join_all(adds).await?;
        Ok(())
    }

    /// Pins a blob for a task that is there already.
    pub(super) async fn renew(&self, digest: &Digest) -> Result<(), Error> {
        let _stripe = self.stripe(digest).await;
        Ok(self.engine.pin(digest).await?)
    }

    /// Unpins a blob whose task is done, unless another one needs it.
    pub(super) async fn release(&self, digest: &Digest, kind: &str, rest: &str) -> Result<(), Error> {
        let _stripe = self.stripe(digest).await;
        let (own, prefix) = (key(digest, rest), key(digest, ""));
        for other in KINDS {
            // The first key after the prefix is our own or shows another.
            let tasks = self.queue.tasks(other, Some(&prefix), 2).await?;
            if tasks.iter().any(|task| task.key.starts_with(&prefix) && (task.key != own || other != kind)) {
                return Ok(());
            }
        }
        Ok(self.engine.unpin(digest).await?)
    }

    /// Keeps anybody from holding a blob that nobody holds, for as long as the answer lives; none where somebody does.
    pub(super) async fn idle(&self, digest: &Digest) -> Result<Option<MutexGuard<'_, ()>>, Error> {
        let stripe = self.stripe(digest).await;
        let prefix = key(digest, "");
        for kind in KINDS {
            let tasks = self.queue.tasks(kind, Some(&prefix), 1).await?;
            if tasks.iter().any(|task| task.key.starts_with(&prefix)) {
                return Ok(None);
            }
        }
        Ok(Some(stripe))
    }

    async fn stripe(&self, digest: &Digest) -> MutexGuard<'_, ()> {
        let first = digest.as_bytes().first().copied().unwrap_or_default();
        self.stripes[usize::from(first) % STRIPES].lock().await
    }
}

fn key(digest: &Digest, rest: &str) -> String {
    format!("{digest} {rest}")
}

/// The parts of a task's key.
pub(super) fn parse_key(key: &str) -> Option<(Digest, &str)> {
    let (digest, rest) = key.split_once(' ')?;
    Some((digest.parse().ok()?, rest))
}
