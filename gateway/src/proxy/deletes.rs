//! Deletes and collections through a whole push path: a proxy, an index and two origins, with stores in memory.

use super::{Limits, Proxy, Store};
use crate::{
    client::Index,
    config::{HostPort, Span},
    http::Client,
    index,
    origin::tests::{Cluster, content, until},
    registry::{
        Rules, Service, Tags,
        harness::{Server, image},
        manifests::digest_of,
    },
    upstream::Upstreams,
};
use backends::{Memory, Naming, Route, Router};
use bytes::Bytes;
use futures_util::future::join_all;
use peer_proto::{Algorithm, Digest};
use serde_json::Value;
use std::{sync::Arc, time::Duration};

pub(super) struct System {
    cluster: Cluster,
    index: Server<index::Service>,
    pub(super) proxy: Server<Proxy<Store>>,
}

impl System {
    pub(super) async fn start(grace: Span) -> Self {
        let cluster = Cluster::hasty(2).await;
        let route = Route::new(".*", Naming::DockerTag, true, Arc::new(Memory::default())).unwrap();
        let collect = index::Collect { grace, ..index::Collect::default() };
        let router = Router::new(vec![route]);
        let index = index::Service::collecting(
            router,
            &index::Config::default(),
            Upstreams::default(),
            Vec::new(),
            cluster.origins.clone(),
            collect,
        );
        let index = Server::start(index).await;
        let tags = Tags::new(Index::new(vec![HostPort::from(index.addr)], Client::default()));
        let store = Store::new(cluster.origins.clone(), tags, Duration::from_secs(10));
        let proxy =
            Server::start(Proxy::new(Service::new(store, Rules::default()), Limits::default(), Arc::default())).await;
        Self { cluster, index, proxy }
    }

    async fn push(&self, repository: &str, tag: &str, blobs: &[&Bytes]) -> (u16, Digest) {
        let config = self.proxy.push(repository, "{}").await;
        let mut layers = Vec::new();
        for blob in blobs {
            layers.push(self.proxy.push(repository, (*blob).clone()).await);
        }
        let body = image(&config, &layers);
        let answer = self.proxy.put_manifest(&format!("/v2/{repository}/manifests/{tag}"), &body).await;
        (answer.status, digest_of(Algorithm::Sha256, &serde_json::to_vec(&body).unwrap()))
    }

    async fn delete(&self, path: &str) -> u16 {
        self.proxy.send("DELETE", path, &[], "").await.status
    }

    async fn get(&self, path: &str) -> u16 {
        self.proxy.get(path).await.status
    }

    /// How many digests a collection deleted.
    async fn collect(&self) -> u64 {
        let answer = self.index.try_send("POST", "/collect", &[], crate::http::empty()).await.unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        let report: Value = serde_json::from_slice(&answer.body).unwrap();
        report["collected"].as_u64().unwrap()
    }

    /// Until the backend has what was pushed: before that, origins' own work still needs it.
    async fn written_back(&self, bytes: &Bytes) {
        until("it is written back", || self.cluster.in_backend(bytes)).await;
        let digest = digest_of(Algorithm::Sha256, bytes);
        until("nothing holds it", || async {
            let marked = self.cluster.origins.mark(&digest).await.is_ok();
            self.cluster.origins.unmark(&digest).await.unwrap();
            marked
        })
        .await;
    }

    async fn gone(&self, bytes: &Bytes) -> bool {
        let digest = digest_of(Algorithm::Sha256, bytes);
        let held = self.cluster.holds(0, &digest).await || self.cluster.holds(1, &digest).await;
        !held && !self.cluster.in_backend(bytes).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nothing_reaches_is_collected_and_nothing_else() {
    let system = System::start(Span::secs(0)).await;
    let (shared, own, loose) = (content(1, 100_000), content(2, 100_000), content(3, 1000));
    let (status, first) = system.push("a", "1", &[&shared, &own]).await;
    assert_eq!(status, 201);
    assert_eq!(system.push("b", "1", &[&shared]).await.0, 201);
    let digest = |bytes: &Bytes| digest_of(Algorithm::Sha256, bytes);
    system.proxy.push("a", loose.clone()).await;
    for bytes in [&shared, &own, &loose] {
        system.written_back(bytes).await;
    }
    assert_eq!(system.collect().await, 1, "what no manifest names");
    assert!(system.gone(&loose).await);
    assert_eq!(system.get(&format!("/v2/a/blobs/{}", digest(&loose))).await, 404);
    assert_eq!(system.collect().await, 0);

    // One tag less is a manifest that can still be asked for by its digest.
    assert_eq!(system.delete("/v2/a/manifests/1").await, 202);
    assert_eq!(system.collect().await, 0);
    let manifest = format!("/v2/a/manifests/{first}");
    assert_eq!(system.get(&manifest).await, 200);

    assert_eq!(system.delete(&manifest).await, 202);
    assert_eq!(system.get(&manifest).await, 404, "at once");
    let body: Bytes =
        serde_json::to_vec(&image(&digest(&Bytes::from("{}")), &[digest(&shared), digest(&own)])).unwrap().into();
    system.written_back(&body).await;
    assert_eq!(system.collect().await, 2, "the manifest, and the layer that it alone had");
    assert!(system.gone(&own).await && system.gone(&body).await && !system.gone(&shared).await);
    assert_eq!(system.get(&format!("/v2/b/blobs/{}", digest(&shared))).await, 200);
    assert_eq!(system.get("/v2/b/manifests/1").await, 200);

    assert_eq!(system.push("a", "1", &[&shared, &own]).await, (201, first), "and pushed again");
    assert_eq!(system.get(&format!("/v2/a/blobs/{}", digest(&own))).await, 200);
    assert_eq!(system.collect().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_young_or_held_or_half_out_of_reach_stays() {
    let mut system = System::start(Span::secs(3600)).await;
    let loose = content(4, 1000);
    system.proxy.push("a", loose.clone()).await;
    system.written_back(&loose).await;
    assert_eq!(system.collect().await, 0, "its manifest may still come");
    assert!(!system.gone(&loose).await);

    system = System::start(Span::secs(0)).await;
    let digest = system.proxy.push("a", loose.clone()).await;
    system.written_back(&loose).await;
    system.cluster.down(1).await;
    assert_eq!(system.collect().await, 0, "an origin that cannot be asked may still have it");
    assert!(system.cluster.holds(0, &digest).await && system.cluster.in_backend(&loose).await);
    system.cluster.up(1, 2).await;
    until("all origins are there again", || async { system.cluster.origins.mark(&digest).await.is_ok() }).await;
    system.cluster.origins.unmark(&digest).await.unwrap();
    assert_eq!(system.collect().await, 1);
    assert!(system.gone(&loose).await);
}

/// Pushes of images that share layers with what is deleted and collected meanwhile: whatever is acknowledged can be pulled whole.
#[tokio::test(flavor = "multi_thread")]
async fn pushes_and_collections_do_not_undo_each_other() {
    let system = System::start(Span::of(Duration::from_millis(300))).await;
    let layers: Vec<Bytes> = (0..12).map(|n| content(10 + n, 2000)).collect();
    let collected = std::cell::Cell::new(0);
    let pushes = async {
        for round in 0..12usize {
            let tagged = (0..3usize).map(|k| {
                let (system, layers) = (&system, &layers);
                async move {
                    let repository = format!("r{k}");
                    let blobs = [&layers[(round + k) % 12], &layers[(round + k + 1) % 12]];
                    // A push that is told to be made again is made again.
                    for _ in 0..50 {
                        let config = try_push(system, &repository, &Bytes::from("{}")).await;
                        let (one, two) = (
                            try_push(system, &repository, blobs[0]).await,
                            try_push(system, &repository, blobs[1]).await,
                        );
                        let (Some(config), Some(one), Some(two)) = (config, one, two) else { continue };
                        let body = image(&config, &[one, two]);
                        let path = format!("/v2/{repository}/manifests/t");
                        let answer = system.proxy.put_manifest(&path, &body).await;
                        if answer.status == 201 {
                            for digest in [config, one, two] {
                                let got = system.get(&format!("/v2/{repository}/blobs/{digest}")).await;
                                assert_eq!(got, 200, "round {round}: {digest} of {repository}, acknowledged");
                            }
                            let digest = answer.header("docker-content-digest").to_owned();
                            assert_eq!(system.delete(&format!("/v2/{repository}/manifests/{digest}")).await, 202);
                            return;
                        }
                        assert!(matches!(answer.status, 400 | 503), "{answer:?}");
                    }
                    panic!("round {round}: no push of 50 got through");
                }
            });
            join_all(tagged).await;
        }
    };
    let collections = async {
        loop {
            collected.set(collected.get() + system.collect().await);
        }
    };
    tokio::select! {
        () = pushes => {}
        () = collections => {}
    }
    assert!(collected.get() > 0, "nothing was collected meanwhile");
}

async fn try_push(system: &System, repository: &str, bytes: &Bytes) -> Option<Digest> {
    let digest = digest_of(Algorithm::Sha256, bytes);
    if system.proxy.send("HEAD", &format!("/v2/{repository}/blobs/{digest}"), &[], "").await.status == 200 {
        return Some(digest);
    }
    let path = format!("/v2/{repository}/blobs/uploads/?digest={digest}");
    let answer = system.proxy.send("POST", &path, &[], bytes.clone()).await;
    assert!(matches!(answer.status, 201 | 503), "{answer:?}");
    (answer.status == 201).then_some(digest)
}
