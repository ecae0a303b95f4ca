//! From a digest to its bytes: asks the tracker what the blob looks like, has the engine download it, reads it while it comes.

use super::fallback::{Fallback, NoLayout, Outcome, Source, Stretch};
use crate::{
    client::{self, tracker},
    config::DownloadWaits,
    http::{self, Body},
};
use bytes::Bytes;
use engine::handle::{Class, Handle, Reader, Stat};
use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use peer_proto::{Digest, Layout, Namespace};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use std::{
    collections::HashMap,
    ops::Range,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// First wait before the trackers are asked again; doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(100);
/// Longest such wait.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Most lookups under way. Each is held by at least one client's request.
const LOOKUPS_MAX: usize = 4096;

/// Why a blob cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// It is certain that nobody has it.
    #[error("blob {0} is unknown")]
    NotFound(Digest),
    /// Whether anybody has it cannot be known now.
    #[error("{0}")]
    Unknowable(#[source] tracker::Error),
    /// Where it would have to be fetched from, a limit is reached.
    #[error("{message}")]
    Limited {
        /// Whose.
        message: String,
        /// When it may be asked for again.
        after: Duration,
    },
    /// It did not come from the backend in time.
    #[error("blob {digest} is still being fetched from the backend after {waited:?}")]
    Pending {
        /// The blob.
        digest: Digest,
        /// How long we waited.
        waited: Duration,
    },
    /// Too many lookups.
    #[error("busy: {LOOKUPS_MAX} lookups are under way")]
    Busy,
    /// The engine did not do it.
    #[error("{0}")]
    Engine(#[source] Arc<engine::Error>),
}

impl From<engine::Error> for Error {
    fn from(error: engine::Error) -> Self {
        match error {
            engine::Error::NotFound(digest) => Self::NotFound(digest),
            error => Self::Engine(Arc::new(error)),
        }
    }
}

type Key = (Namespace, Digest);
type Found = BoxFuture<'static, Result<Arc<Layout>, Error>>;
/// Lookups under way, so that a tracker is asked once for what many clients want.
type Lookups = HashMap<Key, WeakShared<Found>>;

/// Blobs on demand. Cheap to clone; clones share lookups.
#[derive(Clone)]
pub struct Downloads {
    inner: Arc<Inner>,
    /// Whether bodies reach the kernel as they are.
    plain: bool,
}

struct Inner {
    engine: Handle,
    tracker: client::Tracker,
    waits: DownloadWaits,
    fallback: Fallback,
    lookups: Mutex<Lookups>,
    asked: Family<AskedLabels, Counter>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct AskedLabels {
    result: &'static str,
}

impl Downloads {
    /// Blobs of this engine, looked up at these trackers. What the swarm does not bring in time is had from the sources.
    pub fn new(engine: Handle, tracker: client::Tracker, waits: DownloadWaits, sources: Vec<Arc<dyn Source>>) -> Self {
        let fallback = Fallback::new(engine.clone(), sources, waits.fallback);
        let inner = Inner { engine, tracker, waits, fallback, lookups: Mutex::default(), asked: Family::default() };
        Self { inner: Arc::new(inner), plain: false }
    }

    /// Whether what it opens is sent as it is, over plain HTTP, and not encrypted by us on the way.
    pub fn plain(self, plain: bool) -> Self {
        Self { plain, ..self }
    }

    /// Adds its figures to a role's.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Blobs asked for, by whether they were here, had to be downloaded, or cannot be had";
        registry.register("agent_blobs_asked", help, self.inner.asked.clone());
        self.inner.fallback.register(registry);
    }

    /// The engine that the blobs are in.
    pub fn engine(&self) -> &Handle {
        &self.inner.engine
    }

    /// What a blob looks like, from here or from the trackers. Starts no download.
    pub async fn layout(&self, namespace: &Namespace, digest: &Digest) -> Result<Arc<Layout>, Error> {
        match self.inner.engine.stat(digest).await? {
            Stat::Whole { layout } | Stat::Partial { layout, .. } => Ok(layout),
            Stat::Absent => self.lookup(namespace, digest).await,
        }
    }

    /// As [`Self::layout`], for a client that is about to read: it counts.
    pub async fn find(&self, namespace: &Namespace, digest: &Digest) -> Result<Arc<Layout>, Error> {
        let found = match self.inner.engine.stat(digest).await? {
            Stat::Whole { layout } => Ok((layout, "here")),
            Stat::Partial { layout, .. } => Ok((layout, "download")),
            Stat::Absent => self.lookup(namespace, digest).await.map(|layout| (layout, "download")),
        };
        let result = match &found {
            Ok((_, result)) => result,
            Err(Error::NotFound(_)) => "unknown",
            Err(_) => "failed",
        };
        self.inner.asked.get_or_create(&AskedLabels { result }).inc();
        found.map(|(layout, _)| layout)
    }

    /// Sees to it that all of a blob is here or on its way.
    pub async fn ensure(&self, namespace: &Namespace, digest: &Digest, class: Class) -> Result<(), Error> {
        let layout = self.find(namespace, digest).await?;
        if !matches!(self.inner.engine.stat(digest).await?, Stat::Whole { .. }) {
            self.inner.engine.download(namespace.clone(), layout, class).await?;
        }
        Ok(())
    }

    /// Opens a range of a blob for a client that waits: the bytes go into the body of an answer and nowhere else. What is not here of it
    /// is downloaded.
    pub async fn send(&self, namespace: &Namespace, layout: Arc<Layout>, range: Range<u64>) -> Result<Reading, Error> {
        let mut reading = self.open(namespace, layout, range).await?;
        if self.plain {
            reading.reader.unseen();
        }
        Ok(reading)
    }

    /// The same for bytes that are looked at here.
    pub async fn open(&self, namespace: &Namespace, layout: Arc<Layout>, range: Range<u64>) -> Result<Reading, Error> {
        let mut reader = self.inner.engine.open(namespace.clone(), layout.clone(), range.clone()).await?;
        reader.patience(self.inner.waits.piece);
        let (fallback, namespace) = (self.inner.fallback.clone(), namespace.clone());
        Ok(Reading { reader, wait: fallback.wait(), fallback, namespace, layout, rest: range, stretch: None })
    }

    /// The layout from the trackers, one lookup for all who wait for the same.
    async fn lookup(&self, namespace: &Namespace, digest: &Digest) -> Result<Arc<Layout>, Error> {
        let key = (namespace.clone(), *digest);
        let lookup = {
            let mut lookups = self.lookups();
            match lookups.get(&key).and_then(WeakShared::upgrade) {
                Some(lookup) => lookup,
                None => {
                    if lookups.len() >= LOOKUPS_MAX {
                        lookups.retain(|_, lookup| lookup.upgrade().is_some_and(|lookup| lookup.peek().is_none()));
                    }
                    if lookups.len() >= LOOKUPS_MAX {
                        return Err(Error::Busy);
                    }
                    let lookup: Shared<Found> = self.clone().look(key.clone()).boxed().shared();
                    lookups.extend(lookup.downgrade().map(|weak| (key.clone(), weak)));
                    lookup
                }
            }
        };
        let found = lookup.clone().await;
        let mut lookups = self.lookups();
        // A later lookup of the same blob may stand there by now.
        if lookups.get(&key).and_then(WeakShared::upgrade).is_some_and(|other| other.ptr_eq(&lookup)) {
            lookups.remove(&key);
        }
        found
    }

    fn lookups(&self) -> MutexGuard<'_, Lookups> {
        self.inner.lookups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks until there is an answer, or the time for one is over. Trackers first, as they spare the origins; the sources of
    /// bytes where no tracker was reached for as long as a reader waits for the swarm, so that a pull can begin without trackers.
    async fn look(self, (namespace, digest): Key) -> Result<Arc<Layout>, Error> {
        let start = Instant::now();
        let waits = self.inner.waits;
        let (mut pause, mut unreachable_since) = (PAUSE, None);
        loop {
            match self.inner.tracker.layout(&namespace, &digest).await {
                Ok(layout) => return Ok(Arc::new(layout)),
                Err(tracker::Error::NotFound) => return Err(Error::NotFound(digest)),
                Err(tracker::Error::Pending) => {
                    unreachable_since = None;
                    if start.elapsed() >= waits.refresh {
                        return Err(Error::Pending { digest, waited: start.elapsed() });
                    }
                }
                Err(tracker::Error::Limited { message, after }) => return Err(Error::Limited { message, after }),
                Err(error @ tracker::Error::Refused { .. }) => return Err(Error::Unknowable(error)),
                Err(error) => {
                    let since: Instant = *unreachable_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= waits.fallback.min(waits.unreachable) {
                        match self.inner.fallback.layout(&namespace, &digest).await {
                            Ok(layout) if *layout.digest() == digest => return Ok(Arc::new(layout)),
                            Err(NoLayout::Unknown) => return Err(Error::NotFound(digest)),
                            Err(NoLayout::Pending) if start.elapsed() < waits.refresh => {
                                unreachable_since = Some(Instant::now());
                            }
                            Ok(_) | Err(NoLayout::Pending) => {}
                            Err(NoLayout::Failed(why)) => {
                                tracing::debug!(%digest, %why, "nor do origins tell a layout")
                            }
                        }
                    }
                    let since = unreachable_since.unwrap_or(since);
                    if since.elapsed() >= waits.unreachable || start.elapsed() >= waits.refresh.max(waits.unreachable) {
                        return Err(Error::Unknowable(error));
                    }
                    tracing::debug!(%digest, %error, "nobody to ask for a layout; asking again");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// Bytes of a blob for a client, from the swarm as long as it brings them.
pub struct Reading {
    reader: Reader,
    fallback: Fallback,
    namespace: Namespace,
    layout: Arc<Layout>,
    rest: Range<u64>,
    /// How long the swarm has for the next piece; not at all once it brought nothing of a stretch.
    wait: Option<Duration>,
    /// What is on its way by another way.
    stretch: Option<Stretch>,
}

impl Reading {
    /// The next bytes, at most a piece; none at the end of the range.
    pub async fn next(&mut self) -> Option<Result<Bytes, engine::Error>> {
        let Self { reader, fallback, namespace, layout, rest, wait, stretch } = self;
        let mut next = pin!(reader.next());
        let bytes = loop {
            if let Some(running) = stretch.take_if(|running| running.end <= rest.start) {
                drop(running);
            }
            let Some(patience) = *wait else { break next.await };
            let Some(running) = stretch.as_ref() else {
                match tokio::time::timeout(patience, &mut next).await {
                    Ok(bytes) => break bytes,
                    Err(_) => *stretch = Some(fallback.fetch(namespace, layout, rest.clone())),
                }
                continue;
            };
            tokio::select! {
                biased;
                bytes = &mut next => break bytes,
                outcome = running.done.clone() => {
                    *stretch = None;
                    *wait = match outcome {
                        Outcome::Fetched => Some(Duration::ZERO),
                        Outcome::Revived | Outcome::Failed => fallback.wait(),
                    };
                }
            }
        };
        if let Some(Ok(bytes)) = &bytes {
            rest.start += bytes.len() as u64;
        }
        bytes
    }
}

/// A reader's bytes as the body of an answer. A failure in mid-way ends the connection, so that no short body looks whole.
pub fn body(reader: Reading) -> Body {
    http::stream(futures_util::stream::unfold(reader, |mut reader| async {
        let bytes = reader.next().await?;
        if let Err(error) = &bytes {
            tracing::warn!(%error, "blob broke off while it was served");
        }
        Some((bytes, reader))
    }))
}
