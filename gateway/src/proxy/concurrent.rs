//! Many clients at once at one proxy, over real origins and a real index.

use super::deletes::System;
use crate::{
    config::Span,
    http,
    origin::tests::content,
    registry::{harness::image, manifests::digest_of},
};
use bytes::Bytes;
use futures_util::future::join_all;
use peer_proto::Algorithm;
use std::collections::BTreeSet;

#[tokio::test(flavor = "multi_thread")]
async fn one_blob_is_pushed_by_fifty_at_once() {
    let system = System::start(Span::secs(3600)).await;
    let bytes = content(20, 300_000);
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        let digest = digest_of(algorithm, &bytes);
        let pushes = (0..50).map(|n| {
            let (system, bytes) = (&system, bytes.clone());
            async move {
                let repository = format!("r{}", n % 5);
                let path = format!("/v2/{repository}/blobs/uploads/?digest-algorithm={}", algorithm.name());
                let opened = system.proxy.send("POST", &path, &[], "").await;
                assert_eq!(opened.status, 202, "{opened:?}");
                let path = format!("{}?digest={digest}", opened.header("location"));
                let closed = system.proxy.send("PUT", &path, &[], bytes.clone()).await;
                assert_eq!(closed.status, 201, "{closed:?}");
                let got = system.proxy.get(&format!("/v2/{repository}/blobs/{digest}")).await;
                assert!(got.status == 200 && got.body == bytes, "{}", got.status);
            }
        });
        join_all(pushes).await;
    }
}

/// Only one writer at a time has a session; whatever the others are told, the bytes are those of one order.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_of_one_session_at_once_never_mix() {
    let system = System::start(Span::secs(3600)).await;
    let bytes = content(21, 200_000);
    for round in 0..5 {
        let location = system.proxy.open("a").await;
        let half = bytes.slice(..100_000);
        let patches = (0..8).map(|_| {
            let (system, location, half) = (&system, &location, half.clone());
            async move {
                let sent = system.proxy.try_send("PATCH", location, &[("content-range", "0-99999")], http::full(half));
                // A writer that another one takes over from may find its connection closed.
                sent.await.map(|answer| answer.status)
            }
        });
        let statuses: Vec<_> = join_all(patches).await.into_iter().flatten().collect();
        assert!(statuses.iter().filter(|status| **status == 202).count() <= 1, "round {round}: {statuses:?}");
        // 503 for the one that another took the session over from.
        assert!(statuses.iter().all(|status| matches!(status, 202 | 400 | 416 | 503)), "round {round}: {statuses:?}");
        let stands = system.proxy.get(&location).await;
        let received: usize = stands.header("range").split_once('-').unwrap().1.parse().unwrap();
        let from = if received == 0 { 0 } else { received + 1 };
        assert!(from <= half.len(), "round {round}: {received}");
        let rest = bytes.slice(from..);
        let range = format!("{from}-{}", bytes.len() - 1);
        let digest = digest_of(Algorithm::Sha256, &bytes);
        let path = format!("{location}?digest={digest}");
        let closed = system.proxy.send("PUT", &path, &[("content-range", &range)], rest).await;
        assert_eq!(closed.status, 201, "round {round}, from {from}: {closed:?}");
        assert!(system.proxy.get(&format!("/v2/a/blobs/{digest}")).await.body == bytes);
    }
}

/// A tag that is moved and deleted by many stands for one of the manifests or for nothing, never for what is gone.
#[tokio::test(flavor = "multi_thread")]
async fn tags_move_while_they_are_deleted() {
    let system = System::start(Span::secs(3600)).await;
    let config = system.proxy.push("a", "{}").await;
    let mut bodies = Vec::new();
    for n in 0..4u32 {
        let layer = system.proxy.push("a", Bytes::from(format!("layer {n}"))).await;
        bodies.push(image(&config, &[layer]));
    }
    let movers = bodies.iter().map(|body| async {
        for _ in 0..10 {
            let put = system.proxy.put_manifest("/v2/a/manifests/t", body).await;
            assert_eq!(put.status, 201, "{put:?}");
            let got = system.proxy.get("/v2/a/manifests/t").await;
            assert!(matches!(got.status, 200 | 404), "{got:?}");
        }
    });
    let deleters = (0..2).map(|_| async {
        for _ in 0..10 {
            let deleted = system.proxy.send("DELETE", "/v2/a/manifests/t", &[], "").await;
            assert!(matches!(deleted.status, 202 | 404), "{deleted:?}");
        }
    });
    tokio::join!(join_all(movers), join_all(deleters));
    let mut statuses = BTreeSet::new();
    for body in &bodies {
        let digest = digest_of(Algorithm::Sha256, &serde_json::to_vec(body).unwrap());
        statuses.insert(system.proxy.get(&format!("/v2/a/manifests/{digest}")).await.status);
    }
    assert_eq!(statuses, BTreeSet::from([200]), "a tag's deletion deletes no manifest");
}
