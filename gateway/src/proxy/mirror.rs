//! A mirror through the whole read path: a proxy, an index and two origins, with stores in memory, before a registry that comes
//! and goes.

use super::{Limits, Proxy, Store};
use crate::{
    client::{Index, tracker::Error::Limited},
    config::HostPort,
    http::Client,
    index,
    origin::tests::{Cluster, until},
    registry::{
        Rules, Service, Tags,
        harness::{Server, bytes},
    },
    tracker,
    upstream::{
        Mirror, Names, Upstreams,
        tests::{Gate, Mode, push, upstreams},
    },
};
use backends::{Memory, Naming, Route, Router};
use futures_util::future::join_all;
use std::{sync::Arc, time::Duration};

struct System {
    cluster: Cluster,
    proxy: Server<Proxy<Store>>,
    _index: Server<index::Service>,
}

impl System {
    /// `strict`: only what has a record is a repository's.
    async fn start(upstreams: &Upstreams, strict: bool) -> Self {
        let cluster = Cluster::mirroring(2, upstreams.clone()).await;
        let router = Router::new(vec![Route::new(".*", Naming::DockerTag, true, Arc::new(Memory::default())).unwrap()]);
        let config = index::Config::default();
        let index = Server::start(index::Service::new(router, &config, upstreams.clone(), Vec::new(), None)).await;
        let tags =
            Tags::new(Index::new(vec![HostPort::from(index.addr)], Client::default()).with_patience(Duration::ZERO))
                .recorded(strict);
        let configs = [toml::from_str("name = \"up.example\"").unwrap()];
        let mirror = Mirror { own_names: vec!["our.example".into()], default_upstream: None };
        let rules = Rules { names: Names::new(&configs, &mirror), ..Rules::default() };
        let store = Store::new(cluster.origins.clone(), tags, Duration::from_secs(60));
        let proxy = Server::start(Proxy::new(Service::new(store, rules), Limits::default(), Arc::default())).await;
        Self { cluster, proxy, _index: index }
    }

    async fn pull(&self, path: &str) -> (u16, bytes::Bytes) {
        let answer = self.proxy.get(path).await;
        (answer.status, answer.body)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_name_leads_to_an_upstream_and_each_blob_comes_once() {
    let gate = Gate::start(Mode::Open).await;
    let layer = bytes(3 << 20);
    let (manifest, blob) = push(&gate, "lib/app", "1", layer.clone()).await;
    let system = System::start(&upstreams(gate.addr, "", Some("up.example")), false).await;
    let pulls = join_all((0..20).map(|_| system.pull("/v2/up.example/lib/app/manifests/1"))).await;
    let body = pulls[0].1.clone();
    assert!(pulls.iter().all(|pull| *pull == (200, body.clone())));
    let path = format!("/v2/up.example/lib/app/blobs/{blob}");
    assert!(join_all((0..20).map(|_| system.pull(&path))).await.iter().all(|(_, bytes)| *bytes == layer));
    let seen = gate.service.seen();
    for digest in [manifest, blob] {
        let got = seen.iter().filter(|line| line.starts_with("GET ") && line.ends_with(&digest.to_string()));
        assert_eq!(got.count(), 1, "{seen:?}");
    }
    let tags = seen.iter().filter(|line| *line == "HEAD /v2/lib/app/manifests/1").count();
    assert!(tags < 20, "{tags} questions for 20 who asked at the same time");

    // By `ns`, and by a name that the cluster itself does not know.
    let by_name = system.proxy.get("/v2/lib/app/manifests/1?ns=up.example").await;
    assert_eq!((by_name.status, by_name.header("oci-namespace")), (200, "up.example"));
    assert_eq!(by_name.body, body);
    for path in ["/v2/lib/app/manifests/1", "/v2/lib/app/manifests/1?ns=our.example"] {
        assert_eq!(system.pull(path).await, (200, body.clone()), "{path}");
    }
    assert_eq!(system.pull(&format!("/v2/lib/app/blobs/{blob}")).await, (200, layer));
    let listed = system.proxy.get("/v2/lib/app/tags/list?ns=up.example").await;
    assert_eq!((listed.status, listed.json()["tags"][0].as_str()), (200, Some("1")));
    for unknown in ["/v2/lib/app/manifests/1?ns=evil.example", "/v2/?ns=evil.example"] {
        let answer = system.proxy.get(unknown).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "NAME_UNKNOWN"), "{unknown}");
    }
    assert_eq!(system.pull("/v2/up.example/lib/none/manifests/1").await.0, 404);
    assert_eq!(system.proxy.get("/v2/?ns=up.example").await.status, 200);

    // What is another's is not written, by no name of it.
    for (method, path) in [
        ("POST", "/v2/up.example/lib/app/blobs/uploads/"),
        ("POST", "/v2/lib/app/blobs/uploads/?ns=up.example"),
        ("PUT", "/v2/up.example/lib/app/manifests/2"),
        ("DELETE", "/v2/lib/app/manifests/1?ns=up.example"),
    ] {
        let answer = system.proxy.send(method, path, &[], "x").await;
        assert_eq!((answer.status, answer.code().as_str()), (405, "UNSUPPORTED"), "{method} {path}");
    }
    // What the cluster has itself comes before what an upstream has.
    let own = system.proxy.push("lib/app", "own").await;
    let config = system.proxy.push("lib/app", "{}").await;
    let own = crate::registry::harness::image(&config, &[own]);
    assert_eq!(system.proxy.put_manifest("/v2/lib/app/manifests/1", &own).await.status, 201);
    assert_ne!(system.pull("/v2/lib/app/manifests/1").await.1, body);
    assert_eq!(system.pull("/v2/lib/app/manifests/1?ns=up.example").await.1, body);
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_are_as_fresh_as_is_asked_for_and_outlive_the_upstream() {
    for (freshness, moved) in [("always", true), ("1h", false), ("pinned", false), ("1ms", true)] {
        let gate = Gate::start(Mode::Open).await;
        let (first, _) = push(&gate, "lib/app", "1", "one").await;
        let more = format!("freshness = {freshness:?}");
        let system = System::start(&upstreams(gate.addr, &more, None), false).await;
        let resolved = async || {
            let answer = system.proxy.send("HEAD", "/v2/up.example/lib/app/manifests/1", &[], "").await;
            (answer.status, answer.header("docker-content-digest").to_owned())
        };
        assert_eq!(resolved().await, (200, first.to_string()));
        let body = system.pull("/v2/up.example/lib/app/manifests/1").await.1;
        let (second, _) = push(&gate, "lib/app", "1", "two").await;
        let now = if moved { second } else { first };
        assert_eq!(resolved().await, (200, now.to_string()), "{freshness}");
        until("the manifest is kept", || system.cluster.in_backend(&body)).await;
        for mode in [Mode::Broken, Mode::Limited("60"), Mode::Basic] {
            gate.service.set(mode.clone());
            assert_eq!(resolved().await, (200, now.to_string()), "{freshness} {mode:?}");
        }
        gate.service.set(Mode::Broken);
        let unknown = system.pull("/v2/up.example/lib/app/manifests/2").await.0;
        let limited = moved;
        assert_eq!(
            unknown,
            if limited { 429 } else { 503 },
            "{freshness}: nobody can say; whoever has asked meanwhile keeps the limit"
        );
        drop(gate);
        assert_eq!(resolved().await, (200, now.to_string()), "{freshness}");
    }
    let gate = Gate::start(Mode::Open).await;
    push(&gate, "lib/app", "1", "one").await;
    let system = System::start(&upstreams(gate.addr, "", None), false).await;
    assert_eq!(system.pull("/v2/up.example/lib/app/manifests/1").await.0, 200);
    assert_eq!(gate.send("DELETE", "/v2/lib/app/manifests/1", &[], "").await.status, 202);
    assert_eq!(system.pull("/v2/up.example/lib/app/manifests/1").await.0, 404, "what is deleted there is not here");
    gate.service.set(Mode::Broken);
    assert_eq!(system.pull("/v2/up.example/lib/app/manifests/1").await.0, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_access_control_a_repository_has_what_the_upstreams_has() {
    let gate = Gate::start(Mode::Open).await;
    let (manifest, blob) = push(&gate, "lib/app", "1", "layer").await;
    let (_, other) = push(&gate, "lib/other", "1", "secret").await;
    let system = System::start(&upstreams(gate.addr, "", None), true).await;
    for (path, status) in [
        (format!("/v2/up.example/lib/app/manifests/{manifest}"), 200),
        (format!("/v2/up.example/lib/app/blobs/{blob}"), 200),
        (format!("/v2/up.example/lib/other/blobs/{other}"), 200),
        ("/v2/up.example/lib/app/manifests/1".into(), 200),
        (format!("/v2/lib/own/blobs/{blob}"), 404),
    ] {
        assert_eq!(system.pull(&path).await.0, status, "{path}");
    }
    gate.service.seen();
    gate.service.set(Mode::Broken);
    assert_eq!(system.pull(&format!("/v2/up.example/lib/app/blobs/{blob}")).await.0, 200, "asked once");
    assert!(gate.service.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_an_upstream_is_kept_for_everybody_at_once() {
    let gate = Gate::start(Mode::Open).await;
    let (manifest, blob) = push(&gate, "lib/app", "1", "layer").await;
    let system = System::start(&upstreams(gate.addr, "", None), false).await;
    gate.service.set(Mode::Limited("3600"));
    let limited = system.proxy.get("/v2/up.example/lib/app/manifests/1").await;
    assert_eq!((limited.status, limited.code().as_str()), (429, "TOOMANYREQUESTS"), "{limited:?}");
    assert_eq!(limited.header("retry-after"), "600", "the longest that is believed");
    assert_eq!(gate.service.seen().len(), 1);
    let of = |repository| (0..20).map(move |n| format!("/v2/up.example/{repository}/manifests/{n}"));
    let paths: Vec<String> = of("lib/app").chain(of("lib/other")).collect();
    let pulls = join_all(paths.iter().map(|path| system.pull(path))).await;
    for (path, (status, _)) in paths.iter().zip(pulls) {
        assert_eq!(status, 429, "{path}");
    }
    let seen = gate.service.seen();
    assert!(seen.is_empty(), "asked although told to wait: {seen:?}");

    // By digest the origins are asked, each of which learns of the limit by itself, once; and nobody waits for what will not come: the
    // proxy's patience is as long as the test's, an agent's likewise.
    let mut paths = Vec::new();
    for (kind, digest) in [("blobs", blob), ("manifests", manifest)] {
        paths.extend([(); 10].map(|()| format!("/v2/up.example/lib/app/{kind}/{digest}")));
    }
    for answer in join_all(paths.iter().map(|path| system.proxy.get(path))).await {
        assert_eq!((answer.status, answer.code().as_str()), (429, "TOOMANYREQUESTS"), "{answer:?}");
        assert!((1..=600).contains(&answer.header("retry-after").parse().unwrap()), "{answer:?}");
    }
    let (_tracker, tracker) = tracker::harness::start_of(&system.cluster.addrs()).await;
    let namespace = "up.example/lib/app".parse().unwrap();
    for answer in join_all([(); 10].map(|()| tracker.layout(&namespace, &blob))).await {
        assert!(matches!(answer, Err(Limited { after, .. }) if after.as_secs() <= 600), "{answer:?}");
    }
    let seen = gate.service.seen();
    assert!(seen.len() <= 2, "asked although told to wait: {seen:?}");
}
