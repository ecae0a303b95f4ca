//! Bytes by another way where the swarm brings none: a reader that has waited for a piece for long enough has it fetched from a
//! [`Source`], the origins first and then the upstream of its repository, by an ordinary request for a range. The piece goes to the
//! engine, which proves it like any other; so whoever waits for it gets it, no byte is sent unproven, and the answer goes on at the
//! byte where it stopped.
//!
//! What is fetched is a *stretch*: the rest of an aligned group of pieces, no further than the reader wants. All readers that are
//! held up in one stretch share its request, and few run at a time, so that a swarm in trouble does not become the origins' trouble.

use crate::{
    client::{Origins, origin},
    http::{self, Body, BoxError},
    registry::range::Spec,
    upstream::{Stat, Upstreams},
};
use bytes::{Bytes, BytesMut};
use engine::handle::Handle;
use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use http_body_util::BodyExt;
use peer_proto::{Digest, Layout, Namespace};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Semaphore, task::JoinSet};

/// Bytes of a stretch, where pieces are not longer.
const STRETCH: u64 = 16 << 20;
/// Stretches fetched at a time; each holds a piece in memory.
const STRETCHES_MAX: usize = 16;

/// Why a source does not tell what a blob looks like.
#[derive(Debug)]
pub enum NoLayout {
    /// It is certain that the blob is nowhere.
    Unknown,
    /// The source is fetching it itself; ask again.
    Pending,
    /// It cannot say now.
    Failed(BoxError),
}

/// Where bytes can be had by an ordinary request.
pub trait Source: Send + Sync + 'static {
    /// Its name in metrics and logs.
    fn name(&self) -> &'static str;

    /// What a blob looks like.
    fn layout<'a>(&'a self, namespace: &'a Namespace, digest: &'a Digest) -> BoxFuture<'a, Result<Layout, NoLayout>>;

    /// Opens a range of a blob: these bytes, after which more may follow, or an error.
    fn open<'a>(
        &'a self,
        namespace: &'a Namespace,
        digest: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Body, BoxError>>;
}

impl Source for Origins {
    fn name(&self) -> &'static str {
        "origin"
    }

    fn layout<'a>(&'a self, namespace: &'a Namespace, digest: &'a Digest) -> BoxFuture<'a, Result<Layout, NoLayout>> {
        Box::pin(async move {
            Self::layout(self, namespace, digest, Duration::ZERO).await.map_err(|error| match error {
                origin::Error::NotFound => NoLayout::Unknown,
                origin::Error::Pending => NoLayout::Pending,
                error => NoLayout::Failed(error.into()),
            })
        })
    }

    fn open<'a>(
        &'a self,
        namespace: &'a Namespace,
        digest: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Body, BoxError>> {
        Box::pin(async move {
            let spec = Spec::Between(range.start, range.end.saturating_sub(1));
            let blob = Self::open(self, namespace, digest, Some(spec), Duration::ZERO).await?;
            if blob.range() != range {
                return Err(format!("origin answers with bytes {:?}, asked for {range:?}", blob.range()).into());
            }
            Ok(blob.into_body())
        })
    }
}

/// The last resort: every agent that gets here asks for itself. An upstream knows no layouts, so a blob that nothing is known of does not
/// begin here.
impl Source for Upstreams {
    fn name(&self) -> &'static str {
        "upstream"
    }

    fn layout<'a>(&'a self, _: &'a Namespace, _: &'a Digest) -> BoxFuture<'a, Result<Layout, NoLayout>> {
        Box::pin(async { Err(NoLayout::Failed("an upstream knows no layouts".into())) })
    }

    fn open<'a>(
        &'a self,
        namespace: &'a Namespace,
        digest: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Body, BoxError>> {
        Box::pin(async move {
            let repository = self.any(namespace).ok_or("no upstream has the repository")?;
            let Stat { size, kind } = repository.stat(digest).await?;
            if range.end > size {
                return Err(format!("upstream has {size} bytes, asked for {range:?}").into());
            }
            Ok(http::stream(repository.read(digest, kind, range.start).await?.bytes))
        })
    }
}

/// What became of a stretch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// Fetched; the swarm brought nothing meanwhile.
    Fetched,
    /// The swarm brought a piece of it: it works again.
    Revived,
    /// No source had it.
    Failed,
}

/// A stretch on its way.
pub(super) struct Stretch {
    /// Where it ends.
    pub(super) end: u64,
    /// Resolved when it has.
    pub(super) done: Shared<BoxFuture<'static, Outcome>>,
}

type Running = HashMap<(Digest, u32), WeakShared<BoxFuture<'static, Outcome>>>;

/// The sources, and what is being fetched from them. Cheap to clone.
#[derive(Clone)]
pub struct Fallback {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Handle,
    sources: Vec<Arc<dyn Source>>,
    /// How long a reader waits for a piece before it is fetched.
    wait: Duration,
    running: Mutex<Running>,
    room: Semaphore,
    pieces: Family<SourceLabel, Counter>,
    layouts: Family<SourceLabel, Counter>,
    failures: Family<SourceLabel, Counter>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct SourceLabel {
    source: &'static str,
}

impl Fallback {
    /// Pieces for this engine from these sources, in order, once the swarm has brought none for `wait`.
    pub fn new(engine: Handle, sources: Vec<Arc<dyn Source>>, wait: Duration) -> Self {
        let inner = Inner {
            engine,
            sources,
            wait,
            running: Mutex::default(),
            room: Semaphore::new(STRETCHES_MAX),
            pieces: Family::default(),
            layouts: Family::default(),
            failures: Family::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Adds its figures to a role's.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Pieces fetched by an ordinary request because the swarm did not bring them in time";
        registry.register("agent_fallback_pieces", help, self.inner.pieces.clone());
        let help = "Layouts asked for where no tracker was reached";
        registry.register("agent_fallback_layouts", help, self.inner.layouts.clone());
        registry.register(
            "agent_fallback_failures",
            "Sources that could not be fetched from",
            self.inner.failures.clone(),
        );
    }

    /// How long to wait for the swarm; none where there is no other way.
    pub(super) fn wait(&self) -> Option<Duration> {
        (!self.inner.sources.is_empty()).then_some(self.inner.wait)
    }

    /// What a blob looks like, from the first source that can say.
    pub(super) async fn layout(&self, namespace: &Namespace, digest: &Digest) -> Result<Layout, NoLayout> {
        let mut last = NoLayout::Failed("there is nobody else to ask".into());
        for source in &self.inner.sources {
            let label = SourceLabel { source: source.name() };
            match source.layout(namespace, digest).await {
                Ok(layout) => {
                    self.inner.layouts.get_or_create(&label).inc();
                    return Ok(layout);
                }
                Err(error @ (NoLayout::Unknown | NoLayout::Pending)) => return Err(error),
                Err(error) => {
                    self.inner.failures.get_or_create(&label).inc();
                    last = error;
                }
            }
        }
        Err(last)
    }

    /// Has the pieces fetched from the one at `range.start` to the end of its stretch, or of the range.
    pub(super) fn fetch(&self, namespace: &Namespace, layout: &Arc<Layout>, range: Range<u64>) -> Stretch {
        let geometry = layout.geometry();
        let each = u32::try_from(STRETCH / u64::from(geometry.piece_length())).unwrap_or(1).max(1);
        let mut pieces = geometry.covering(range.clone());
        let group = pieces.start / each;
        pieces.end = pieces.end.min((group + 1).saturating_mul(each));
        let end =
            pieces.end.checked_sub(1).and_then(|last| geometry.piece(last)).map_or(0, |last| geometry.range(last).end);
        let key = (*layout.digest(), group);
        let mut running = self.running();
        if let Some(done) = running.get(&key).and_then(WeakShared::upgrade).filter(|done| done.peek().is_none()) {
            return Stretch { end, done };
        }
        running.retain(|_, other| other.upgrade().is_some());
        let mut task = JoinSet::new();
        task.spawn(Arc::clone(&self.inner).run(namespace.clone(), Arc::clone(layout), pieces));
        // Dropped with the last reader that waits for it, and then it ends.
        let done = async move { task.join_next().await.and_then(Result::ok).unwrap_or(Outcome::Failed) };
        let done = done.boxed().shared();
        running.extend(done.downgrade().map(|weak| (key, weak)));
        Stretch { end, done }
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.inner.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    async fn run(self: Arc<Self>, namespace: Namespace, layout: Arc<Layout>, mut pieces: Range<u32>) -> Outcome {
        // Never closed.
        let _room = self.room.acquire().await;
        for source in &self.sources {
            let label = SourceLabel { source: source.name() };
            match self.run_from(source.as_ref(), &namespace, &layout, &mut pieces).await {
                Ok(outcome) => return outcome,
                Err(error) => {
                    self.failures.get_or_create(&label).inc();
                    tracing::warn!(digest = %layout.digest(), source = label.source, %error, "fallback failed");
                }
            }
        }
        Outcome::Failed
    }

    /// Fetches `pieces`, which shrink from their start as they come.
    async fn run_from(
        &self,
        source: &dyn Source,
        namespace: &Namespace,
        layout: &Layout,
        pieces: &mut Range<u32>,
    ) -> Result<Outcome, BoxError> {
        let (digest, geometry) = (layout.digest(), layout.geometry());
        let Some(first) = geometry.piece(pieces.start) else { return Ok(Outcome::Fetched) };
        let last = pieces.end.checked_sub(1).and_then(|last| geometry.piece(last)).unwrap_or(first);
        let mut body = Stream {
            body: source.open(namespace, digest, geometry.range(first).start..geometry.range(last).end).await?,
            rest: Bytes::new(),
        };
        let brought = self.pieces.get_or_create_owned(&SourceLabel { source: source.name() });
        for piece in pieces.clone().filter_map(|n| geometry.piece(n)) {
            if self.engine.has(digest, geometry.range(piece)) {
                return Ok(Outcome::Revived);
            }
            let bytes = body.take(geometry.piece_len(piece) as usize).await?;
            if self.engine.supply(digest, piece, bytes).await? {
                brought.inc();
            }
            pieces.start += 1;
        }
        Ok(Outcome::Fetched)
    }
}

/// A body cut into pieces.
struct Stream {
    body: Body,
    rest: Bytes,
}

impl Stream {
    async fn take(&mut self, len: usize) -> Result<Bytes, BoxError> {
        let mut piece = BytesMut::with_capacity(len);
        loop {
            let part = self.rest.split_to(self.rest.len().min(len - piece.len()));
            piece.extend_from_slice(&part);
            if piece.len() == len {
                return Ok(piece.freeze());
            }
            let frame = self.body.frame().await.ok_or("body ended early")??;
            self.rest = frame.into_data().unwrap_or_default();
        }
    }
}
