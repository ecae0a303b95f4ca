//! The origin role: keeps blobs for the cluster, seeds them, takes them to the storage backend and fetches them from it.
//!
//! What clients see is Kraken's blob API (`uploads`, `blobs`) and, beside it, upload sessions that need no digest beforehand and
//! binary layouts. Behind it: [`replicas`] puts copies on the owners the ring names, [`write_back`] takes blobs to the backend
//! through the durable retry queue, [`refresh`] fetches what is asked for and not here, and [`holds`] keeps on the disk what is
//! still needed for any of these.

mod blobs;
mod cleanup;
mod discard;
mod figures;
mod flight;
mod holds;
mod refresh;
mod replicas;
mod route;
mod twins;
mod uploads;
mod write_back;

#[cfg(test)]
pub(crate) mod tests;

use crate::{
    client::{
        cluster::{self, Cluster, Member, PROBING},
        origin::Error as Call,
    },
    config::{HostPort, Rate, Size, Span},
    http::{self, Client, Request, Response},
    retry::{self, Queue},
    upstream::Upstreams,
};
use backends::Router;
use discard::Marks;
use figures::Figures;
use flight::Flights;
use holds::{Holds, REPLICATE, WRITE_BACK};
use hyper::StatusCode;
use peer_proto::{Digest, Namespace};
use prometheus_client::registry::Registry;
use refresh::{Fetched, Found};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{Semaphore, watch};
use twins::Twins;
use uploads::Writers;

pub use route::class;

/// Longest wait for the engine's threads to show that they turn.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// How an origin works.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Longest wait for an uploading client's next bytes.
    pub upload_idle: Span,
    /// Taking blobs to the backend.
    pub write_back: WriteBack,
    /// Fetching blobs from the backend.
    pub refresh: Refresh,
    /// Copies on other origins.
    pub replication: Replication,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            upload_idle: Span::secs(60),
            write_back: WriteBack::default(),
            refresh: Refresh::default(),
            replication: Replication::default(),
        }
    }
}

/// Taking blobs to the backend.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WriteBack {
    /// Blobs at once.
    pub workers: NonZeroUsize,
    /// How long the first replica waits for the origin that took an upload to write it back, before it does so itself; the
    /// second waits twice as long.
    pub replica_delay: Span,
}

impl Default for WriteBack {
    fn default() -> Self {
        Self { workers: const { NonZeroUsize::new(8).unwrap() }, replica_delay: Span::secs(30 * 60) }
    }
}

/// Fetching blobs from the backend.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Refresh {
    /// Blobs at once.
    pub workers: NonZeroUsize,
    /// Longest blob fetched; as long as blobs may be unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_max: Option<Size>,
}

impl Default for Refresh {
    fn default() -> Self {
        Self { workers: const { NonZeroUsize::new(64).unwrap() }, size_max: None }
    }
}

/// Copies on other origins.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Replication {
    /// Blobs sent to other origins at once.
    pub transfers: NonZeroUsize,
    /// How long the cluster has to stay as it is before missing replicas are restored.
    pub settle: Span,
    /// How often they are looked for when nothing changes.
    pub repair_interval: Span,
    /// Most bytes a second sent to restore them; as the network allows unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repair_rate: Option<Rate>,
}

impl Default for Replication {
    fn default() -> Self {
        Self {
            transfers: const { NonZeroUsize::new(16).unwrap() },
            settle: Span::secs(10),
            repair_interval: Span::secs(3600),
            repair_rate: None,
        }
    }
}

/// Where an origin stands in its cluster.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its own blob API as the others reach it: one of `origins`.
    pub this: HostPort,
    /// All origins.
    pub origins: Vec<HostPort>,
    /// Origins that keep each blob.
    pub replicas: usize,
    /// Its network zone.
    pub zone: String,
    /// Whether its API is plain HTTP, so that what it sends reaches the kernel as it is.
    pub plain: bool,
}

/// Why an origin does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The list of origins.
    #[error(transparent)]
    Cluster(#[from] cluster::Error),
    /// The retry queue.
    #[error(transparent)]
    Queue(#[from] retry::Error),
}

/// The role: answers its HTTP API, and does its work in the background while [`Self::run`] runs.
pub struct Service {
    shared: Arc<Shared>,
}

struct Shared {
    config: Config,
    engine: engine::Handle,
    backends: Router,
    upstreams: Upstreams,
    cluster: Arc<Cluster>,
    me: Member,
    zone: String,
    plain: bool,
    holds: Holds,
    figures: Figures,
    writers: Writers,
    twins: Twins,
    /// Digests being committed.
    committing: Mutex<HashMap<Digest, usize>>,
    /// Digests being taken away.
    marks: Marks,
    /// Who has a blob, being asked.
    lookups: Arc<Flights<(Namespace, Digest), Result<Found, http::Error>>>,
    /// Blobs on their way here. Bounded by `fetch_places`.
    fetches: Arc<Flights<Digest, Fetched>>,
    fetch_places: Arc<Semaphore>,
    /// Blobs on their way to other origins; those under way are bounded by `transfers`.
    pushes: Arc<Flights<(Digest, Member), Result<(), Call>>>,
    transfers: Arc<Semaphore>,
}

impl Service {
    /// Puts an origin together and starts its part of the retry queue's work.
    pub async fn start(
        config: Config,
        place: Place,
        engine: engine::Handle,
        backends: Router,
        upstreams: Upstreams,
        queue: Queue,
        http: &Client,
    ) -> Result<Arc<Self>, Error> {
        let cluster = Cluster::new(&place.origins, Some(&place.this), place.replicas, PROBING, http)?;
        let me = cluster.me().ok_or_else(|| cluster::Error::Stranger(place.this.clone()))?;
        let shared = Arc::new(Shared {
            holds: Holds::new(engine.clone(), queue.clone()),
            engine,
            backends,
            upstreams,
            cluster: Arc::new(cluster),
            me,
            zone: place.zone,
            plain: place.plain,
            figures: Figures::default(),
            writers: Writers::default(),
            twins: Twins::default(),
            committing: Mutex::default(),
            marks: Marks::default(),
            lookups: Arc::default(),
            fetches: Arc::default(),
            fetch_places: Arc::new(Semaphore::new(config.refresh.workers.get())),
            pushes: Arc::default(),
            transfers: Arc::new(Semaphore::new(config.replication.transfers.get())),
            config,
        });
        let own = shared.clone();
        let write_back = move |task| {
            let own = own.clone();
            async move { own.write_back(task).await }
        };
        queue.work(WRITE_BACK, shared.config.write_back.workers, write_back).await?;
        let own = shared.clone();
        let replicate = move |task| {
            let own = own.clone();
            async move { own.replicate(task).await }
        };
        queue.work(REPLICATE, shared.config.replication.transfers, replicate).await?;
        Ok(Arc::new(Self { shared }))
    }

    /// Probes the other origins and restores missing replicas until `stop` is true.
    pub async fn run(&self, stop: watch::Receiver<bool>) {
        let shared = &self.shared;
        tokio::join!(shared.cluster.clone().watch(stop.clone()), shared.clone().repair(stop));
    }

    /// The cluster as this origin sees it.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.shared.cluster
    }

    /// Adds its figures.
    pub fn register(&self, registry: &mut Registry) {
        self.shared.figures.register(registry);
        self.shared.upstreams.register(registry);
    }

    /// Whether the engine's threads turn.
    pub async fn health(&self) -> Result<(), String> {
        self.shared.engine.probe(PROBE_TIMEOUT).await.map_err(|error| error.to_string())
    }

    /// Whether the backends that must be there are.
    pub async fn readiness(&self) -> Result<(), String> {
        self.shared.backends.ready().await.map_err(|error| format!("backend: {error}"))
    }
}

impl http::Service for Service {
    async fn answer(self: Arc<Self>, request: Request) -> Response {
        route::answer(&self, request).await
    }
}

/// Takes a digest off the table of those being committed.
struct Committing<'a> {
    shared: &'a Shared,
    digest: Digest,
}

impl Shared {
    fn committing(&self, digest: &Digest) -> Committing<'_> {
        *self.commits().entry(*digest).or_insert(0) += 1;
        Committing { shared: self, digest: *digest }
    }

    fn is_committing(&self, digest: &Digest) -> bool {
        self.commits().contains_key(digest)
    }

    fn commits(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        self.committing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Committing<'_> {
    fn drop(&mut self) {
        let mut commits = self.shared.commits();
        if let Some(count) = commits.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                commits.remove(&self.digest);
            }
        }
    }
}

/// What a client is told when the engine refuses.
fn refusal(error: engine::handle::Error) -> http::Error {
    use engine::handle::Error as E;
    let status = match &error {
        E::NotFound(_) | E::UploadUnknown => StatusCode::NOT_FOUND,
        E::Mismatch { .. } => StatusCode::BAD_REQUEST,
        E::Offset { .. } | E::Range(_) => StatusCode::RANGE_NOT_SATISFIABLE,
        E::UploadInUse | E::Pinned(_) => StatusCode::CONFLICT,
        E::TooLong => StatusCode::PAYLOAD_TOO_LARGE,
        E::NoSpace(_) => StatusCode::INSUFFICIENT_STORAGE,
        E::Busy(_) | E::Closed | E::Stopped(_) | E::Stalled { .. } => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    if status.is_server_error() {
        tracing::warn!(%error, "engine");
    }
    http::Error::new(status, error.to_string())
}
