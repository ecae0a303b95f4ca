//! Nodes of a swarm, and an agent's servers over them: what tests of agents need.

use super::{Api, Downloads, Preload, fallback::Source, registry::Store};
use crate::{
    client::{Index, Origins, Tracker, cluster::CALLING},
    config::{self, DownloadWaits, HostPort},
    http::Client,
    registry::{Rules, Service, Tags, harness::Server},
};
use bytes::Bytes;
use engine::handle::{Config, DriverChoice, Handle, Limits, Peer, Proof, Stat};
use peer_proto::{Algorithm, Layout, LayoutBuilder, Namespace};
use std::{num::NonZeroUsize, sync::Arc, time::Duration};
use tempfile::TempDir;

/// Longer than any test waits.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A node of a swarm.
pub(super) struct Node {
    pub(super) engine: Handle,
    origin: bool,
    _dir: TempDir,
}

impl Node {
    pub(super) fn start(origin: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let config = Config {
            data_dir: dir.path().to_owned(),
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise: None,
            id: None,
            origin,
            zone: peer_proto::wire::Zone::NONE,
            shards: NonZeroUsize::MIN,
            workers: NonZeroUsize::MIN,
            driver: DriverChoice::Auto,
            quota: None,
            proof: Proof::Full,
            mmap: true,
            send: engine::handle::SendPath::default(),
            limits: Limits::default(),
            peer_idle: peer_proto::conn::IDLE_MAX,
        };
        Self { engine: engine::start(config).unwrap(), origin, _dir: dir }
    }

    pub(super) async fn put(&self, content: &Bytes) -> Arc<Layout> {
        self.put_as(Algorithm::Sha256, content).await
    }

    pub(super) async fn put_as(&self, algorithm: Algorithm, content: &Bytes) -> Arc<Layout> {
        let mut builder = LayoutBuilder::new(algorithm);
        builder.update(content).unwrap();
        let mut upload = self.engine.upload(algorithm, None).await.unwrap();
        upload.write(0, content.clone()).await.unwrap();
        upload.commit(builder.finish().digest()).await.unwrap()
    }

    pub(super) fn peer(&self) -> Peer {
        Peer { id: self.engine.id(), addr: self.engine.peer_addr(), origin: self.origin }
    }

    /// Its downloads, with no tracker to be reached. What the swarm does not bring within `fallback` comes from the origins.
    pub(super) fn downloads(&self, origins: &[HostPort], fallback: Duration, piece: Duration) -> Downloads {
        let mut sources: Vec<Arc<dyn Source>> = Vec::new();
        if !origins.is_empty() {
            sources.push(Arc::new(Origins::new(origins, 1, CALLING, Duration::ZERO, &Client::default()).unwrap()));
        }
        self.downloads_from(sources, fallback, piece)
    }

    /// The same from other sources.
    pub(super) fn downloads_from(
        &self,
        sources: Vec<Arc<dyn Source>>,
        fallback: Duration,
        piece: Duration,
    ) -> Downloads {
        let waits = DownloadWaits { unreachable: Duration::ZERO, refresh: Duration::ZERO, piece, fallback };
        let tracker = Tracker::new(&[nobody()], Client::default()).unwrap();
        Downloads::new(self.engine.clone(), tracker, waits, sources)
    }

    /// A registry of this node, with neither tracker nor index to be reached.
    pub(super) async fn registry(&self) -> Server<Service<Store>> {
        serve(self.downloads(&[], PATIENCE, PATIENCE)).await
    }

    /// What its blobs are served by to whoever asks for ranges of them.
    pub(super) async fn blobs(&self) -> Server<Api> {
        let index = Index::new(vec![nobody()], Client::default());
        Server::start(Api::new(self.downloads(&[], PATIENCE, PATIENCE), index, no_runtimes())).await
    }

    /// Pieces it has of a blob.
    pub(super) async fn have(&self, layout: &Layout) -> u64 {
        match self.engine.stat(layout.digest()).await.unwrap() {
            Stat::Partial { have, .. } => have.div_ceil(u64::from(layout.geometry().piece_length())),
            Stat::Whole { .. } => u64::from(layout.geometry().pieces()),
            Stat::Absent => 0,
        }
    }
}

/// A host without container runtimes.
pub(super) fn no_runtimes() -> Preload {
    let nowhere = || "/nowhere".into();
    let config = config::Preload { docker: nowhere(), containerd: nowhere(), ctr: nowhere() };
    Preload::new(config, nobody().to_string(), false)
}

/// A port that nobody listens on: bound once, then free again.
pub(super) fn nobody() -> HostPort {
    HostPort::from(std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())
}

/// A registry over these downloads.
pub(super) async fn serve(downloads: Downloads) -> Server<Service<Store>> {
    let tags = Tags::new(Index::new(vec![nobody()], Client::default()));
    Server::start(Service::new(Store::new(downloads, tags), Rules::default())).await
}

pub(super) fn namespace() -> Namespace {
    "lib/app".parse().unwrap()
}
