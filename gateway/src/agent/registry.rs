//! What an agent's registry reads: blobs from the swarm, while they still arrive; tags from the index. Nothing is written.

use super::downloads::{self, Downloads};
use crate::registry::{Content, Failure, Listing, Page, Part, Repository, Spec, Tag, Tags};
use engine::handle::Class;
use peer_proto::Digest;

/// An agent's engine and the index as content that is read only.
#[derive(Clone)]
pub struct Store {
    downloads: Downloads,
    tags: Tags,
}

impl Store {
    /// Content that these downloads bring, under the tags of the index.
    pub fn new(downloads: Downloads, tags: Tags) -> Self {
        Self { downloads, tags }
    }
}

impl Content for Store {
    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64, Failure> {
        self.tags.admits(repository, digest).await?;
        let layout = self.downloads.layout(repository.namespace(), digest).await.map_err(failure)?;
        Ok(layout.length())
    }

    async fn read(&self, repository: &Repository, digest: &Digest, spec: Option<Spec>) -> Result<Part, Failure> {
        self.tags.admits(repository, digest).await?;
        let layout = self.downloads.find(repository.namespace(), digest).await.map_err(failure)?;
        let total = layout.length();
        let range = match spec {
            None => 0..total,
            Some(spec) => spec.resolve(total).ok_or(Failure::Range(total))?,
        };
        let reader = self.downloads.send(repository.namespace(), layout, range.clone()).await.map_err(failure)?;
        Ok(Part { total, range, bytes: downloads::body(reader) })
    }

    async fn inspect(&self, repository: &Repository, digest: &Digest) -> Result<Part, Failure> {
        self.tags.admits(repository, digest).await?;
        let layout = self.downloads.find(repository.namespace(), digest).await.map_err(failure)?;
        let range = 0..layout.length();
        let reader = self.downloads.open(repository.namespace(), layout, range.clone()).await.map_err(failure)?;
        Ok(Part { total: range.end, range, bytes: downloads::body(reader) })
    }

    async fn resolve(&self, repository: &Repository, tag: &Tag) -> Result<Digest, Failure> {
        self.tags.resolve(repository, tag).await
    }

    async fn tags(&self, repository: &Repository, page: &Page) -> Result<Listing, Failure> {
        self.tags.list(repository, page).await
    }

    async fn repositories(&self, page: &Page) -> Result<Listing, Failure> {
        self.tags.repositories(page).await
    }

    async fn referrers(
        &self,
        repository: &Repository,
        subject: &Digest,
        page: &Page,
    ) -> Result<Listing<Digest>, Failure> {
        self.tags.referrers(repository, subject, page).await
    }

    async fn warm(&self, repository: &Repository, digest: &Digest) -> Result<(), Failure> {
        self.downloads.ensure(repository.namespace(), digest, Class::Background).await.map_err(failure)
    }
}

fn failure(error: downloads::Error) -> Failure {
    use downloads::Error;
    let message = error.to_string();
    match error {
        Error::NotFound(_) => Failure::Unknown,
        Error::Limited { after, .. } => Failure::Limited { message, after },
        Error::Unknowable(_) | Error::Pending { .. } | Error::Busy => Failure::Unavailable(message),
        Error::Engine(error) => match &*error {
            engine::Error::NotFound(_) => Failure::Unknown,
            engine::Error::NoSpace(_) => Failure::NoSpace(message),
            engine::Error::Busy(_)
            | engine::Error::Closed
            | engine::Error::Stopped(_)
            | engine::Error::Stalled { .. } => Failure::Unavailable(message),
            _ => Failure::Internal(message),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        agent::{
            fallback::Source,
            harness::{Node, PATIENCE, namespace, nobody, serve},
        },
        client::{Origins, cluster::CALLING},
        config::HostPort,
        http::{self, Client},
        origin::tests::{Cluster, content},
        registry::{
            Session,
            harness::{NOWHERE, bytes, image},
            manifest::Kind,
            manifests::digest_of,
        },
        upstream::tests::{Gate, Mode, push, upstreams},
    };
    use bytes::Bytes;
    use engine::handle::{MetricValue, Stat};
    use futures_util::future::join_all;
    use http_body_util::BodyExt;
    use hyper::Method;
    use peer_proto::Algorithm;
    use std::{sync::Arc, time::Duration};

    #[tokio::test]
    async fn blobs_are_answered_while_they_arrive() {
        let (seeder, agent) = (Node::start(true), Node::start(false));
        let content = bytes(20 << 20);
        let layout = seeder.put(&content).await;
        let digest = *layout.digest();
        agent.engine.download(namespace(), layout.clone(), Class::Foreground).await.unwrap();
        let registry = agent.registry().await;
        let path = format!("/v2/lib/app/blobs/{digest}");

        // Nothing has arrived, and the size is known.
        let head = registry.send("HEAD", &path, &[], "").await;
        assert_eq!((head.status, head.header("content-length")), (200, (20 << 20).to_string().as_str()));
        assert!(matches!(agent.engine.stat(&digest).await.unwrap(), Stat::Partial { have: 0, .. }));
        let get = |range: Option<&'static str>| {
            let mut request = Client::request(Method::GET, format!("http://{}{path}", registry.addr).parse().unwrap());
            if let Some(range) = range {
                request = request.header("range", range);
            }
            let request = request.body(http::empty()).unwrap();
            async { Client::default().send(request, PATIENCE).await.unwrap() }
        };
        let (whole, tail, many) =
            tokio::join!(get(None), get(Some("bytes=-10")), get(Some("bytes=0-9,5000000-5999999")));
        assert_eq!((whole.status().as_u16(), tail.status().as_u16(), many.status().as_u16()), (200, 206, 206));
        assert_eq!(whole.headers()["docker-content-digest"], digest.to_string());
        assert_eq!(whole.headers()["content-length"], (20 << 20).to_string());
        assert_eq!(tail.headers()["content-range"], "bytes 20971510-20971519/20971520");

        agent.engine.peers(&digest, vec![seeder.peer()]);
        let (whole, tail, many) =
            tokio::join!(whole.into_body().collect(), tail.into_body().collect(), many.into_body().collect());
        assert!(whole.unwrap().to_bytes() == content);
        assert_eq!(tail.unwrap().to_bytes(), content.slice(content.len() - 10..));
        let many = many.unwrap().to_bytes();
        assert!(many.windows(10).any(|window| window == &content[..10]));
        agent.engine.wait(&digest).await.unwrap();
        assert!(registry.get(&path).await.body == content, "and again from here");
    }

    #[tokio::test]
    async fn ranges_of_a_blob_that_is_not_here_bring_the_pieces_they_need() {
        let (seeder, agent) = (Node::start(true), Node::start(false));
        let content = bytes(60 << 20);
        let layout = seeder.put(&content).await;
        let digest = *layout.digest();
        // The agent knows the blob, and has nothing of it.
        drop(agent.engine.open(namespace(), layout.clone(), 0..0).await.unwrap());
        agent.engine.peers(&digest, vec![seeder.peer()]);
        let registry = agent.registry().await;
        let path = format!("/v2/lib/app/blobs/{digest}");
        let get = async |range: &str| registry.send("GET", &path, &[("range", range)], "").await;
        assert_eq!(registry.send("HEAD", &path, &[], "").await.header("content-length"), content.len().to_string());
        assert_eq!(agent.have(&layout).await, 0, "a HEAD downloads nothing");

        let answer = get("bytes=50000000-50001023").await;
        assert_eq!((answer.status, &answer.body), (206, &content.slice(50_000_000..50_001_024)));
        assert_eq!(agent.have(&layout).await, 1);
        let answer = get("bytes=-1024").await;
        assert_eq!((answer.status, &answer.body), (206, &content.slice(content.len() - 1024..)));
        assert_eq!(agent.have(&layout).await, 2);
        let answer = get(&format!("bytes={}-", content.len() - (2 << 20))).await;
        assert_eq!((answer.status, &answer.body), (206, &content.slice(content.len() - (2 << 20)..)));
        assert_eq!(agent.have(&layout).await, 3, "an open end is two pieces here, one of which was there");
        let many: Vec<String> = (10..20).map(|n| format!("{0}-{0}", n << 21)).collect();
        let answer = get(&format!("bytes={}", many.join(","))).await;
        assert_eq!(answer.status, 206);
        assert_eq!(answer.body.len().to_string(), answer.header("content-length"));
        assert_eq!(agent.have(&layout).await, 13);
        // The same again, warm: nothing comes.
        assert_eq!(get("bytes=50000000-50001023").await.body, content.slice(50_000_000..50_001_024));
        assert_eq!(agent.have(&layout).await, 13);
        // All of it, from where it stands.
        assert!(registry.get(&path).await.body == content);
        agent.engine.wait(&digest).await.unwrap();
        assert_eq!(get("bytes=1-3").await.body, content.slice(1..4));
    }

    #[tokio::test]
    async fn many_ranges_at_once_share_one_download() {
        let (seeder, agent) = (Node::start(true), Node::start(false));
        let content = bytes(20 << 20);
        let layout = seeder.put(&content).await;
        let digest = *layout.digest();
        drop(agent.engine.open(namespace(), layout.clone(), 0..0).await.unwrap());
        agent.engine.peers(&digest, vec![seeder.peer()]);
        let registry = agent.registry().await;
        let path = format!("/v2/lib/app/blobs/{digest}");
        // From the end, each over the half of its neighbour: all of the blob, twice.
        let step = 512 << 10;
        let starts: Vec<usize> = (0..content.len()).step_by(step).rev().collect();
        let answers = join_all(starts.iter().map(async |start| {
            let range = format!("bytes={start}-{}", start + 2 * step - 1);
            registry.send("GET", &path, &[("range", &range)], "").await
        }));
        for (start, answer) in starts.iter().zip(answers.await) {
            let end = content.len().min(start + 2 * step);
            assert!(answer.status == 206 && answer.body == content.slice(*start..end), "{start}");
        }
        agent.engine.wait(&digest).await.unwrap();
        let good = agent.engine.metrics().into_iter().find(|metric| metric.label == Some(("proof", "good")));
        let MetricValue::Counter(good) = good.unwrap().value else { panic!("pieces are counted") };
        assert_eq!(good, u64::from(layout.geometry().pieces()), "each piece came once");
    }

    #[tokio::test]
    async fn where_the_swarm_brings_nothing_an_answer_goes_on_from_the_origins() {
        let (origin, agent) = (Node::start(true), Node::start(false));
        let content = bytes(20 << 20);
        let layout = origin.put(&content).await;
        let digest = *layout.digest();
        drop(agent.engine.open(namespace(), layout.clone(), 0..0).await.unwrap());
        let blobs = origin.blobs().await;
        let path = format!("/v2/lib/app/blobs/{digest}");
        let origins = [HostPort::from(blobs.addr)];
        let registry = serve(agent.downloads(&origins, Duration::from_millis(20), PATIENCE)).await;

        let answer = registry.send("GET", &path, &[("range", "bytes=9000000-9000999")], "").await;
        assert_eq!((answer.status, &answer.body), (206, &content.slice(9_000_000..9_001_000)));
        assert_eq!(agent.have(&layout).await, 1, "no more than was asked for");
        let (one, two) = tokio::join!(registry.get(&path), registry.get(&path));
        assert!(one.body == content && two.body == content);
        agent.engine.wait(&digest).await.unwrap();
    }

    /// One answer, of which a peer has the first pieces, an origin those that follow until it goes, and the upstream the rest.
    #[tokio::test(flavor = "multi_thread")]
    async fn an_answer_goes_on_from_an_upstream_where_the_origins_go_too() {
        let gate = Gate::start(Mode::Open).await;
        let content = bytes(40 << 20);
        let (_, digest) = push(&gate, "lib/app", "1", content.clone()).await;
        let (origin, peer, agent) = (Node::start(true), Node::start(false), Node::start(false));
        let layout = origin.put(&content).await;
        assert_eq!(*layout.digest(), digest);
        let here = peer.downloads(&[], PATIENCE, PATIENCE);
        let mut some = here.open(&namespace(), layout.clone(), 0..4 << 20).await.unwrap();
        peer.engine.peers(&digest, vec![origin.peer()]);
        while some.next().await.transpose().unwrap().is_some() {}
        assert_eq!(peer.have(&layout).await, 4);

        let namespace = "up.example/lib/app".parse().unwrap();
        drop(agent.engine.open(namespace, layout.clone(), 0..0).await.unwrap());
        agent.engine.peers(&digest, vec![peer.peer()]);
        let blobs = origin.blobs().await;
        let origins = Origins::new(&[blobs.addr.into()], 1, CALLING, Duration::ZERO, &Client::default()).unwrap();
        let sources: Vec<Arc<dyn Source>> = vec![Arc::new(origins), Arc::new(upstreams(gate.addr, "", None))];
        let mut figures = prometheus_client::registry::Registry::default();
        let downloads = agent.downloads_from(sources, Duration::from_secs(2), PATIENCE);
        downloads.register(&mut figures);
        let registry = serve(downloads).await;
        let uri = format!("http://{}/v2/up.example/lib/app/blobs/{digest}", registry.addr).parse().unwrap();
        let mut body = Client::default().get(uri, PATIENCE).await.unwrap().into_body();
        let mut blobs = Some(blobs);
        let mut got = Vec::new();
        while let Some(frame) = body.frame().await {
            got.extend_from_slice(&frame.expect("no cut").into_data().unwrap());
            // The reader is at most a socket's buffers ahead, which is less than a stretch.
            if got.len() > 17 << 20 {
                drop(blobs.take());
            }
        }
        assert!(got == content);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &figures).unwrap();
        let pieces = |source| {
            let line = text.lines().find(|line| line.starts_with("agent_fallback_pieces") && line.contains(source));
            line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        let (origin, upstream) = (pieces("origin"), pieces("upstream"));
        assert!(origin >= 12 && upstream >= 8 && origin + upstream == 36, "{origin} {upstream}: {text}");
    }

    #[tokio::test]
    async fn long_digests_are_proven_through_the_swarm() {
        let (seeder, agent) = (Node::start(true), Node::start(false));
        let content = bytes((5 << 20) + 3);
        let layout = seeder.put_as(Algorithm::Sha512, &content).await;
        let digest = digest_of(Algorithm::Sha512, &content);
        assert_eq!(*layout.digest(), digest);
        drop(agent.engine.open(namespace(), layout.clone(), 0..0).await.unwrap());
        agent.engine.peers(&digest, vec![seeder.peer()]);
        let registry = agent.registry().await;
        let path = format!("/v2/lib/app/blobs/{digest}");
        let answer = registry.send("GET", &path, &[("range", "bytes=3000000-3000999")], "").await;
        assert_eq!((answer.status, &answer.body), (206, &content.slice(3_000_000..3_001_000)));
        let answer = registry.get(&path).await;
        assert_eq!(answer.header("docker-content-digest"), digest.to_string());
        assert!(answer.body == content);
        agent.engine.wait(&digest).await.unwrap();
    }

    /// No tracker is there when the pull begins, and none comes: the origins tell what the blob looks like, and bring it.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_pull_begins_without_trackers() {
        let cluster = Cluster::hasty(2).await;
        let content = content(60, (3 << 20) + 7);
        let digest = digest_of(Algorithm::Sha256, &content);
        cluster.origins.put(&namespace(), &digest, content.clone()).await.unwrap();
        let agent = Node::start(false);
        let registry = serve(agent.downloads(&cluster.addrs(), Duration::from_millis(20), PATIENCE)).await;
        let path = format!("/v2/lib/app/blobs/{digest}");
        let head = registry.send("HEAD", &path, &[], "").await;
        assert_eq!((head.status, head.header("content-length")), (200, content.len().to_string().as_str()));
        assert!(registry.get(&path).await.body == content);
        let answer = registry.get(&format!("/v2/lib/app/blobs/{NOWHERE}")).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (404, "BLOB_UNKNOWN"),
            "the origins know that it is nowhere"
        );
    }

    #[tokio::test]
    async fn an_answer_that_cannot_be_finished_is_cut() {
        let agent = Node::start(false);
        let layout = Node::start(true).put(&bytes(5 << 20)).await;
        let digest = *layout.digest();
        drop(agent.engine.open(namespace(), layout.clone(), 0..0).await.unwrap());
        let soon = Duration::from_millis(50);
        let registry = serve(agent.downloads(&[nobody()], soon, soon * 4)).await;
        let uri = format!("http://{}/v2/lib/app/blobs/{digest}", registry.addr).parse().unwrap();
        let answer = Client::default().get(uri, PATIENCE).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(answer.into_body().collect().await.is_err());
    }

    #[tokio::test]
    async fn a_reader_gone_and_a_download_stopped_leave_the_registry_well() {
        let agent = Node::start(false);
        let layout = Node::start(true).put(&bytes(5 << 20)).await;
        let digest = *layout.digest();
        agent.engine.download(namespace(), layout.clone(), Class::Foreground).await.unwrap();
        let registry = agent.registry().await;
        let path = format!("/v2/lib/app/blobs/{digest}");
        let request = || {
            let uri = format!("http://{}{path}", registry.addr).parse().unwrap();
            Client::request(Method::GET, uri).body(http::empty()).unwrap()
        };
        drop(Client::default().send(request(), PATIENCE).await.unwrap());
        let answer = Client::default().send(request(), PATIENCE).await.unwrap();
        assert_eq!(answer.status(), 200);
        agent.engine.stop(&digest).await.unwrap();
        assert!(answer.into_body().collect().await.is_err(), "a body that cannot be finished is cut");
        let answer = registry.get(&path).await;
        assert_eq!((answer.status, answer.code().as_str()), (503, "UNAVAILABLE"), "nobody can be asked for it now");
    }

    #[tokio::test]
    async fn manifests_come_by_digest_and_nothing_is_written() {
        let agent = Node::start(false);
        let config = *agent.put(&Bytes::from_static(b"{}")).await.digest();
        let body = Bytes::from(image(&config, &[]).to_string());
        let manifest = *agent.put(&body).await.digest();
        let empty = *agent.put(&Bytes::new()).await.digest();
        let registry = agent.registry().await;
        for method in ["GET", "HEAD"] {
            let answer = registry.send(method, &format!("/v2/lib/app/manifests/{manifest}"), &[], "").await;
            assert_eq!((answer.status, answer.header("content-type")), (200, Kind::OciManifest.media_type()));
            assert_eq!(answer.header("content-length"), body.len().to_string());
        }
        let answer = registry.get(&format!("/v2/lib/app/blobs/{empty}")).await;
        assert_eq!((answer.status, answer.header("content-length")), (200, "0"));
        let answer = registry.get(&format!("/v2/lib/app/manifests/{config}")).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "MANIFEST_UNKNOWN"));
        let session = Session { id: uuid::Uuid::nil(), place: "x:1".into() };
        for (method, path, status) in [
            ("GET", format!("/v2/lib/app/blobs/{NOWHERE}"), 503),
            ("GET", "/v2/lib/app/manifests/1".into(), 503),
            ("GET", "/v2/lib/app/tags/list".into(), 503),
            ("POST", "/v2/lib/app/blobs/uploads/".into(), 405),
            ("PATCH", format!("/v2/lib/app/blobs/uploads/{}", session.segment()), 405),
            ("PUT", "/v2/lib/app/manifests/1".into(), 405),
        ] {
            let answer = registry.send(method, &path, &[], "").await;
            let code = if status == 405 { "UNSUPPORTED" } else { "UNAVAILABLE" };
            assert_eq!((answer.status, answer.code().as_str()), (status, code), "{method} {path}");
        }
    }
}
