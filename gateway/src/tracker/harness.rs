//! A tracker on a real socket: what tests of those who talk to trackers need.

use super::{Tracker, preheat::Table};
use crate::{
    client::{
        self,
        cluster::{CALLING, Cluster},
    },
    config::{HostPort, Raw, TrackerRole},
    http::Client,
    registry::harness::Server,
};
use peer_proto::Instant;
use std::sync::Arc;

fn config() -> TrackerRole {
    let raw: Raw = toml::from_str("[cluster]\norigins = [\"127.0.0.1:1\"]").unwrap();
    raw.tracker().unwrap()
}

/// A tracker whose one origin nobody can reach, and a client that calls it.
pub(crate) async fn start() -> (Server<Tracker>, client::Tracker) {
    start_of(&config().origins).await
}

/// A tracker of these origins, and a client that calls it.
pub(crate) async fn start_of(origins: &[HostPort]) -> (Server<Tracker>, client::Tracker) {
    let config = config();
    let cluster = Cluster::new(origins, None, config.replicas.get(), CALLING, &Client::default()).unwrap();
    let server = Server::start(Tracker::new(&config, Arc::new(cluster))).await;
    let client = client::Tracker::new(&[server.addr.into()], Client::default()).unwrap();
    (server, client)
}

impl Server<Tracker> {
    /// What a restart does to its preheats.
    pub(crate) fn forget_preheats(&self) {
        *self.service.preheats() = Table::new(config().preheat, Instant::ZERO);
    }
}
