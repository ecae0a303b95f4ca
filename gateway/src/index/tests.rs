//! The index over real HTTP and real stores, by its typed client and by hand.

use super::*;
use crate::{
    client::{
        Origins,
        cluster::CALLING,
        index::{Error, Index},
    },
    http::Client,
    registry::paging::Page,
};
use backends::{Backend, FaultConfig, Faulty, Fs, FsConfig, Memory, Naming, Route};
use futures_util::{
    FutureExt,
    future::{BoxFuture, join_all},
};
use hyper::header;
use serde_json::{Value, json};
use std::{sync::Mutex, time::Duration};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

/// An index that listens, until it is dropped.
struct Node {
    addr: HostPort,
    service: Arc<Service>,
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
}

impl Node {
    async fn over(store: Arc<dyn Backend>, dependencies: Option<Arc<dyn Dependencies>>) -> Self {
        let router = Router::new(vec![Route::new(".*", Naming::DockerTag, true, store).unwrap()]);
        let origins = ["o1:15002", "o2:15002"].map(|origin| origin.parse().unwrap()).to_vec();
        let service = Service::new(router, &Config::default(), Upstreams::default(), origins, dependencies);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = HostPort::from(listener.local_addr().unwrap());
        let (stop, stopped) = watch::channel(false);
        let server = tokio::spawn(http::serve(listener, service.clone(), stopped, Duration::from_secs(1)));
        Self { addr, service, stop, server }
    }

    async fn start() -> Self {
        Self::over(Arc::new(Memory::default()), None).await
    }

    async fn stop(self) {
        self.stop.send_replace(true);
        self.server.await.unwrap();
    }

    fn client(&self) -> Index {
        Index::new(vec![self.addr.clone()], Client::default()).with_patience(Duration::ZERO)
    }

    /// Status, content type and body of a request by hand.
    async fn ask(&self, method: &str, path: &str) -> (u16, String, String) {
        let uri = format!("http://{}{path}", self.addr).parse().unwrap();
        let request = Client::request(method.parse().unwrap(), uri).body(http::empty()).unwrap();
        let answer = Client::default().send(request, Duration::from_secs(10)).await.unwrap();
        let status = answer.status().as_u16();
        let kind = answer.headers().get(header::CONTENT_TYPE).map_or("", |kind| kind.to_str().unwrap()).to_owned();
        let body = http::read_body(answer.into_body(), 1 << 20).await.unwrap();
        (status, kind, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn status(&self, method: &str, path: &str) -> u16 {
        self.ask(method, path).await.0
    }

    async fn json(&self, path: &str) -> Value {
        let (status, kind, body) = self.ask("GET", path).await;
        assert_eq!((status, kind.as_str()), (200, "application/json"), "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }
}

fn digest(n: u8) -> Digest {
    Digest::sha256([n; 32])
}

fn tag(text: &str) -> TagName {
    text.parse().unwrap()
}

fn all() -> Page {
    Page { n: 1000, last: None }
}

async fn put_all(index: &Index, tags: &[&str]) {
    for name in tags {
        index.put(&tag(name), &digest(1)).await.unwrap();
    }
}

/// Where Kraken's indexes copy to each other and to other clusters, scripts and neighbours get the answers they know.
#[tokio::test]
async fn what_kraken_copies_is_taken() {
    let node = Node::start().await;
    let d1 = digest(1);
    assert_eq!(node.status("POST", "/remotes/tags/lib%2Fapp:1").await, 404);
    assert_eq!(node.status("PUT", &format!("/internal/duplicate/tags/lib%2Fapp:1/digest/{d1}")).await, 200);
    assert_eq!(node.ask("GET", "/tags/lib%2Fapp:1").await.2, d1.to_string());
    assert_eq!(node.status("POST", "/remotes/tags/lib%252Fapp:1").await, 200);
    let duplicate = format!("/internal/duplicate/remotes/tags/lib%2Fapp:1/digest/{d1}");
    for (method, path, status) in [
        ("POST", duplicate.as_str(), 200),
        ("GET", &duplicate, 405),
        ("GET", "/remotes/tags/lib%2Fapp:1", 405),
        ("POST", "/remotes/tags/..%2Fapp:1", 400),
        ("POST", "/internal/duplicate/remotes/tags/a:1/digest/x", 400),
        ("PUT", "/internal/duplicate/tags/a/digest/x", 400),
    ] {
        assert_eq!(node.status(method, path).await, status, "{method} {path}");
    }
}

#[tokio::test]
async fn a_tag_is_put_read_moved_and_removed() {
    let node = Node::start().await;
    let (d1, d2) = (digest(1), digest(2));
    assert_eq!(node.status("GET", "/tags/lib%2Fapp:1").await, 404);
    assert_eq!(node.status("HEAD", "/tags/lib%2Fapp:1").await, 404);
    assert_eq!(node.status("DELETE", "/tags/lib%2Fapp:1").await, 404);
    assert_eq!(node.ask("PUT", &format!("/tags/lib%2Fapp:1/digest/{d1}")).await, (200, String::new(), String::new()));
    let (status, _, body) = node.ask("GET", "/tags/lib%2Fapp:1").await;
    assert_eq!((status, body), (200, d1.to_string()));
    assert_eq!(node.ask("HEAD", "/tags/lib%2Fapp:1").await.0, 200);
    assert_eq!(node.status("PUT", &format!("/tags/lib%2Fapp:1/digest/{d2}?replicate=true")).await, 200);
    assert_eq!(node.ask("GET", "/tags/lib%2Fapp:1").await.2, d2.to_string());
    assert_eq!(node.status("DELETE", "/tags/lib%2Fapp:1").await, 200);
    assert_eq!(node.status("GET", "/tags/lib%2Fapp:1").await, 404);
    node.stop().await;
}

#[tokio::test]
async fn names_may_be_escaped_once_or_twice() {
    let node = Node::start().await;
    let d = digest(1);
    let ways = ["lib%2Fapp:1", "lib%2Fapp%3A1", "lib%252Fapp%253A1", "lib%252fapp:1"];
    for put in ways {
        assert_eq!(node.status("PUT", &format!("/tags/{put}/digest/{d}")).await, 200, "{put}");
        for get in ways {
            assert_eq!(node.ask("GET", &format!("/tags/{get}")).await.2, d.to_string(), "{put} {get}");
        }
        assert_eq!(node.status("DELETE", &format!("/tags/{put}")).await, 200);
    }
    let escaped = d.to_string().replace(':', "%253A");
    assert_eq!(node.status("PUT", &format!("/tags/lib%2Fapp:1/digest/{escaped}")).await, 200);
    for repo in ["lib%2Fapp", "lib%252Fapp"] {
        assert_eq!(node.json(&format!("/repositories/{repo}/tags")).await["result"], json!(["1"]));
    }
    for prefix in ["lib/app", "lib%2Fapp", "lib%252Fapp", "lib/", ""] {
        assert_eq!(node.json(&format!("/list/{prefix}")).await["result"], json!(["lib/app:1"]), "{prefix}");
    }
    node.stop().await;
}

#[tokio::test]
async fn bad_requests_are_told_apart() {
    let node = Node::start().await;
    let d = digest(1);
    for (method, path, status) in [
        ("GET", "/tags/app".to_owned(), 400),
        ("GET", "/tags/..%2Fx:1".to_owned(), 400),
        ("GET", "/tags/a:b:c".to_owned(), 400),
        ("GET", "/tags/%ff:1".to_owned(), 400),
        ("GET", "/tags/%25ff:1".to_owned(), 400),
        ("PUT", format!("/tags/app/digest/{d}"), 400),
        ("PUT", "/tags/app:1/digest/sha256:12".to_owned(), 400),
        ("PUT", "/tags/app:1/digest/md5:12".to_owned(), 400),
        ("POST", "/tags/app:1".to_owned(), 405),
        ("GET", format!("/tags/app:1/digest/{d}"), 405),
        ("GET", "/repositories/_x/tags".to_owned(), 400),
        ("GET", "/repositories/a/tags?limit=0".to_owned(), 400),
        ("GET", "/repositories/a/tags?page=1".to_owned(), 400),
        ("GET", "/list/a/../b".to_owned(), 400),
        ("GET", "/list/a?offset=a".to_owned(), 400),
        ("GET", "/nothing".to_owned(), 404),
        ("GET", "/".to_owned(), 404),
    ] {
        assert_eq!(node.status(method, &path).await, status, "{method} {path}");
    }
    node.stop().await;
}

#[tokio::test]
async fn lists_are_sorted_and_paged_both_ways() {
    let node = Node::start().await;
    let index = node.client();
    assert_eq!(node.json("/repositories").await["result"], json!([]));
    assert_eq!(node.json("/repositories/a/tags").await["result"], json!([]));
    put_all(&index, &["a:2", "a:1", "a:1-x", "a:1.0", "a-b:1", "a/b:1", "b:z"]).await;
    let tags = ["1", "1-x", "1.0", "2"];
    assert_eq!(index.tags(&"a".parse().unwrap(), &all()).await.unwrap().items, tags);
    assert_eq!(index.repositories(&all()).await.unwrap().items, ["a", "a-b", "a/b", "b"]);

    let first = node.json("/repositories/a/tags?limit=3").await;
    let next = "/repositories/a/tags?limit=3&offset=1.0";
    let links = json!({"next": next, "self": "/repositories/a/tags?limit=3"});
    assert_eq!(first, json!({"links": links, "size": 3, "result": ["1", "1-x", "1.0"]}));
    let second = node.json(next).await;
    assert_eq!(second, json!({"links": {"next": "", "self": next}, "size": 1, "result": ["2"]}));
    assert_eq!(node.json("/repositories?n=2&last=a").await["links"]["next"], "/repositories?n=2&last=a%2Fb");

    let mut seen = Vec::new();
    let mut page = Page { n: 2, last: None };
    loop {
        let part = index.list("", &page).await.unwrap();
        page.last = part.items.last().cloned();
        seen.extend(part.items);
        if !part.more {
            break;
        }
    }
    seen.sort();
    assert_eq!(seen, ["a-b:1", "a/b:1", "a:1", "a:1-x", "a:1.0", "a:2", "b:z"]);
    assert_eq!(index.list("a/", &all()).await.unwrap().items, ["a:1-x", "a:1.0", "a:1", "a:2", "a/b:1"]);

    index.delete(&tag("b:z")).await.unwrap();
    assert_eq!(index.repositories(&all()).await.unwrap().items, ["a", "a-b", "a/b"], "seen at once");
    node.stop().await;
}

#[tokio::test]
async fn a_catalog_of_large_repositories_is_whole() {
    let store = Arc::new(Memory::default());
    let base = Naming::DockerTag.base();
    for repo in ["big", "big/inner", "other"] {
        for i in 0..1500 {
            let layer = format!("{base}{repo}/_layers/sha256/{i:04}/link");
            store.write(&layer, "x".into()).await.unwrap();
            store.write(&Naming::DockerTag.path(&format!("{repo}:{i:04}")).unwrap(), "x".into()).await.unwrap();
        }
    }
    let node = Node::over(store, None).await;
    let index = node.client();
    assert_eq!(index.repositories(&all()).await.unwrap().items, ["big", "big/inner", "other"]);
    let answer = node.json("/repositories/big/tags").await;
    assert_eq!(answer["size"], 1500);
    assert_eq!(node.json("/list/?limit=4400").await["size"], 4400);
    assert_eq!(node.json("/list/").await["size"], 4500);
    node.stop().await;
}

#[tokio::test]
async fn several_indexes_over_one_backend_are_one_index() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Arc::new(Fs::open(&FsConfig { root: dir.path().into() }).unwrap());
    let (one, two) = (Node::over(open(), None).await, Node::over(open(), None).await);
    let (first, second) = (one.client(), two.client());
    for n in 0..50 {
        let (writer, reader) = if n % 2 == 0 { (&first, &second) } else { (&second, &first) };
        writer.put(&tag("lib/app:1"), &digest(n)).await.unwrap();
        let name = tag("lib/app:1");
        let seen = join_all((0..8).map(|_| reader.get(&name))).await;
        assert!(seen.iter().all(|seen| *seen == Ok(digest(n))), "{n}: {seen:?}");
    }
    let path = dir.path().join(Naming::DockerTag.path("lib/app:1").unwrap());
    assert_eq!(std::fs::read_to_string(path).unwrap(), digest(49).to_string());

    let both = Index::new(vec![one.addr.clone(), two.addr.clone()], Client::default());
    let both = both.with_patience(Duration::ZERO);
    assert_eq!(both.get(&tag("lib/app:1")).await, Ok(digest(49)));
    one.stop().await;
    assert_eq!(both.get(&tag("lib/app:1")).await, Ok(digest(49)), "the other answers");
    both.put(&tag("lib/app:1"), &digest(50)).await.unwrap();
    assert_eq!(both.get(&tag("lib/none:1")).await, Err(Error::NotFound));
    two.stop().await;
    assert!(matches!(both.get(&tag("lib/app:1")).await, Err(Error::Unavailable(_))));
}

#[tokio::test]
async fn an_outage_is_not_an_absence() {
    let store = Arc::new(Faulty::new(Arc::new(Memory::default()), FaultConfig::default()));
    let node = Node::over(store.clone(), None).await;
    let index = node.client();
    index.put(&tag("a:1"), &digest(1)).await.unwrap();
    assert_eq!(node.service.readiness().await, Ok(()));
    store.set_down(true);
    for path in ["/tags/a:1", "/repositories/a/tags", "/list/a", "/repositories"] {
        assert_eq!(node.status("GET", path).await, 503, "{path}");
    }
    assert_eq!(node.status("PUT", &format!("/tags/a:1/digest/{}", digest(2))).await, 503);
    assert!(matches!(index.get(&tag("a:1")).await, Err(Error::Unavailable(_))));
    assert!(node.service.readiness().await.is_err());
    store.set_down(false);
    assert_eq!(index.get(&tag("a:1")).await, Ok(digest(1)));
    assert!(index.head(&tag("a:1")).await.unwrap());
    assert!(!index.head(&tag("a:2")).await.unwrap());
    node.stop().await;
}

#[tokio::test]
async fn a_client_waits_for_an_index_to_be_back() {
    let store = Arc::new(Faulty::new(Arc::new(Memory::default()), FaultConfig::default()));
    let node = Node::over(store.clone(), None).await;
    let patient = node.client().with_patience(Duration::from_secs(60));
    patient.put(&tag("a:1"), &digest(1)).await.unwrap();
    store.set_down(true);
    let name = tag("a:1");
    let mut get = std::pin::pin!(patient.get(&name));
    while store.refused() == 0 {
        assert!(get.as_mut().now_or_never().is_none());
        tokio::task::yield_now().await;
    }
    store.set_down(false);
    assert_eq!(get.await, Ok(digest(1)));
    node.stop().await;
}

#[tokio::test]
async fn what_is_no_digest_is_a_fault_of_the_store() {
    let store = Arc::new(Memory::default());
    store.write(&Naming::DockerTag.path("a:1").unwrap(), "garbage".into()).await.unwrap();
    store.write(&Naming::DockerTag.path("a:2").unwrap(), format!("{}\n", digest(2)).into()).await.unwrap();
    let node = Node::over(store, None).await;
    assert_eq!(node.status("GET", "/tags/a:1").await, 500);
    assert_eq!(node.client().get(&tag("a:2")).await, Ok(digest(2)), "as other registries may write it");
    node.stop().await;
}

/// Origins that have some blobs.
#[derive(Default)]
struct Holdings {
    blobs: Vec<Digest>,
    down: Mutex<bool>,
}

impl Dependencies for Holdings {
    fn check<'a>(&'a self, _: &'a Namespace, digest: &'a Digest) -> BoxFuture<'a, Result<(), Unmet>> {
        let answer = match () {
            () if *self.down.lock().unwrap() => Err(Unmet::Unavailable("nobody answers".into())),
            () if self.blobs.contains(digest) => Ok(()),
            () => Err(Unmet::Missing(*digest)),
        };
        std::future::ready(answer).boxed()
    }

    fn exists<'a>(&'a self, repository: &'a Namespace, digest: &'a Digest) -> BoxFuture<'a, Result<(), Unmet>> {
        self.check(repository, digest)
    }

    fn readiness(&self) -> BoxFuture<'_, Result<(), String>> {
        std::future::ready(if *self.down.lock().unwrap() { Err("down".into()) } else { Ok(()) }).boxed()
    }
}

#[tokio::test]
async fn a_tag_needs_its_content() {
    let origins = Arc::new(Holdings { blobs: vec![digest(1)], ..Holdings::default() });
    let node = Node::over(Arc::new(Memory::default()), Some(origins.clone())).await;
    let index = node.client();
    index.put(&tag("a:1"), &digest(1)).await.unwrap();
    let missing = node.ask("PUT", &format!("/tags/a:1/digest/{}", digest(2))).await;
    assert_eq!((missing.0, missing.2), (500, format!("tag a:1: missing dependency {}", digest(2))));
    let refused = index.put(&tag("a:1"), &digest(2)).await;
    assert!(matches!(refused, Err(Error::Refused { status: StatusCode::INTERNAL_SERVER_ERROR, .. })), "{refused:?}");
    *origins.down.lock().unwrap() = true;
    assert!(matches!(index.put(&tag("a:1"), &digest(1)).await, Err(Error::Unavailable(_))));
    assert!(node.service.readiness().await.is_err());
    assert_eq!(index.get(&tag("a:1")).await, Ok(digest(1)), "reads do not need the origins");
    node.stop().await;
}

/// An origin's two routes that a check uses, over blobs at hand.
struct Blobs(Vec<Vec<u8>>);

impl Blobs {
    fn find(&self, path: &str) -> Option<&[u8]> {
        let wanted = path.rsplit('/').next()?;
        self.0.iter().find(|blob| digest_of(blob).to_string() == wanted).map(Vec::as_slice)
    }
}

fn digest_of(bytes: &[u8]) -> Digest {
    let mut hash = peer_proto::chain::Hasher::new(peer_proto::Algorithm::Sha256);
    hash.update(bytes);
    hash.finish()
}

impl http::Service for Blobs {
    async fn answer(self: Arc<Self>, request: Request) -> Response {
        match self.find(request.uri().path()) {
            Some(blob) => http::with_type(StatusCode::OK, "application/octet-stream", blob.to_vec()),
            None => http::status(StatusCode::NOT_FOUND),
        }
    }
}

#[tokio::test]
async fn a_manifest_needs_what_it_refers_to() {
    let described =
        |blob: &[u8]| json!({"mediaType": "x/y", "digest": digest_of(blob).to_string(), "size": blob.len()});
    let image = |config: &[u8], layers: &[&[u8]]| {
        let layers: Vec<Value> = layers.iter().map(|layer| described(layer)).collect();
        json!({"schemaVersion": 2, "config": described(config), "layers": layers}).to_string().into_bytes()
    };
    let whole = image(b"config", &[b"layer", b"layer"]);
    let broken = image(b"config", &[b"layer", b"nowhere"]);
    let many = json!({"schemaVersion": 2, "manifests": [described(&whole), described(b"nowhere")]});
    let many = many.to_string().into_bytes();
    let plain = b"no manifest at all".to_vec();
    let blobs = [b"config".to_vec(), b"layer".to_vec(), whole.clone(), broken.clone(), many.clone(), plain.clone()];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = HostPort::from(listener.local_addr().unwrap());
    let (stop, stopped) = watch::channel(false);
    let server = tokio::spawn(http::serve(listener, Arc::new(Blobs(blobs.into())), stopped, Duration::from_secs(1)));
    let origins = Origins::new(&[origin], 1, CALLING, Duration::ZERO, &Client::default()).unwrap();
    let nowhere = digest_of(b"nowhere");
    let repo: Namespace = "lib/app".parse().unwrap();
    let (strict, sparse) = (OfOrigins::new(origins.clone(), false), OfOrigins::new(origins, true));
    for (blob, strictly, sparsely) in [
        (&whole, Ok(()), Ok(())),
        (&broken, Err(Unmet::Missing(nowhere)), Err(Unmet::Missing(nowhere))),
        (&many, Err(Unmet::Missing(nowhere)), Ok(())),
        (&plain, Ok(()), Ok(())),
        (&b"nowhere".to_vec(), Err(Unmet::Missing(nowhere)), Err(Unmet::Missing(nowhere))),
    ] {
        let digest = digest_of(blob);
        assert_eq!(strict.check(&repo, &digest).await, strictly, "{}", String::from_utf8_lossy(blob));
        assert_eq!(sparse.check(&repo, &digest).await, sparsely, "{}", String::from_utf8_lossy(blob));
    }
    stop.send_replace(true);
    server.await.unwrap();
    assert!(matches!(strict.check(&repo, &digest_of(&whole)).await, Err(Unmet::Unavailable(_))));
}

#[tokio::test]
async fn referrers_are_kept_and_listed() {
    let node = Node::start().await;
    let index = node.client();
    let repo: Namespace = "lib/app".parse().unwrap();
    let long = Digest::sha512([1; 64]);
    assert_eq!(index.referrers(&repo, &digest(1), &all()).await.unwrap().items, []);
    for referrer in [&long, &digest(3), &digest(2), &digest(3)] {
        index.refer(&repo, &digest(1), referrer).await.unwrap();
    }
    index.refer(&repo, &digest(9), &digest(4)).await.unwrap();
    assert_eq!(index.referrers(&repo, &digest(1), &all()).await.unwrap().items, [digest(2), digest(3), long]);
    let page = Page { n: 1, last: Some(digest(2).to_string()) };
    let part = index.referrers(&repo, &digest(1), &page).await.unwrap();
    assert_eq!((part.items, part.more), (vec![digest(3)], true));
    index.unrefer(&repo, &digest(1), &digest(2)).await.unwrap();
    assert_eq!(index.unrefer(&repo, &digest(1), &digest(2)).await, Err(Error::NotFound));
    assert_eq!(index.repositories(&all()).await.unwrap().items, Vec::<String>::new(), "no tags yet");
    node.stop().await;
}

#[tokio::test]
async fn content_is_kept_and_removed_with_what_names_it() {
    let store: Arc<dyn Backend> = Arc::new(Memory::default());
    let (one, two) = (Node::over(store.clone(), None).await, Node::over(store.clone(), None).await);
    let (index, other) = (one.client(), two.client());
    let repo: Namespace = "lib/app".parse().unwrap();
    assert_eq!(
        index.kept(&repo, &digest(1), false).await,
        Ok(()),
        "nothing is said of what was never pushed or deleted"
    );
    assert_eq!(index.kept(&repo, &digest(1), true).await, Err(Error::NotFound), "unless a record is asked for");
    let tags = ["1", "2"].map(|tag| tag.parse().unwrap());
    index.put_manifest(&repo, &digest(1), Some(&digest(9)), &tags).await.unwrap();
    index.put_manifest(&repo, &digest(2), Some(&digest(9)), &["3".parse().unwrap()]).await.unwrap();
    index.keep(&repo, &digest(3)).await.unwrap();
    assert_eq!(other.get(&tag("lib/app:2")).await, Ok(digest(1)));
    assert_eq!(other.referrers(&repo, &digest(9), &all()).await.unwrap().items, [digest(1), digest(2)]);

    for gone in [1, 3] {
        assert_eq!(other.remove(&repo, &digest(gone), Some(&digest(9))).await, Ok(()));
        assert_eq!(index.kept(&repo, &digest(gone), false).await, Err(Error::NotFound));
        assert_eq!(index.remove(&repo, &digest(gone), None).await, Err(Error::NotFound));
        assert_eq!(index.kept(&"lib/other".parse().unwrap(), &digest(gone), false).await, Ok(()), "of one repository");
    }
    assert_eq!(index.tags(&repo, &all()).await.unwrap().items, ["3"]);
    assert_eq!(index.referrers(&repo, &digest(9), &all()).await.unwrap().items, [digest(2)]);

    index.keep(&repo, &digest(3)).await.unwrap();
    index.put(&tag("lib/app:1"), &digest(1)).await.unwrap();
    for back in [1, 3] {
        assert_eq!(other.kept(&repo, &digest(back), false).await, Ok(()), "a tag brings content back, too");
    }
    assert_eq!(one.status("PUT", &format!("/repositories/lib%2Fapp/manifests/{}?tag=.x", digest(1))).await, 400);
    assert_eq!(one.status("GET", &format!("/repositories/lib%2Fapp/manifests/{}", digest(1))).await, 405);
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn tags_that_move_while_their_manifest_is_deleted_are_not_lost() {
    let node = Node::start().await;
    let index = node.client();
    let repo: Namespace = "lib/app".parse().unwrap();
    let tags: Vec<Tag> = (0..10).map(|n| format!("t{n}").parse().unwrap()).collect();
    for round in 0..20u8 {
        index.put_manifest(&repo, &digest(1), None, &tags).await.unwrap();
        let (gone, moved) = (digest(1), digest(100 + round));
        let moving = index.put_manifest(&repo, &moved, None, &tags[..5]);
        let (removed, put) = tokio::join!(index.remove(&repo, &gone, None), moving);
        assert_eq!((removed, put), (Ok(()), Ok(())));
        for (n, tag) in tags.iter().enumerate() {
            let expected = if n < 5 { Ok(moved) } else { Err(Error::NotFound) };
            assert_eq!(index.get(&TagName::of(&repo, tag)).await, expected, "round {round}, {tag}");
        }
    }
    node.stop().await;
}

#[tokio::test]
async fn origins_are_named_in_turn() {
    let node = Node::start().await;
    let mut named = [node.ask("GET", "/origin").await.2, node.ask("GET", "/origin").await.2];
    named.sort();
    assert_eq!(named, ["o1:15002", "o2:15002"]);
    node.stop().await;
}

#[test]
fn routes_have_classes() {
    for (path, expected) in
        [("/tags/a:1", "tags"), ("/list/", "list"), ("/repositories", "repositories"), ("/x", "other")]
    {
        assert_eq!(class(path), expected);
    }
}

#[test]
fn the_configuration_takes_only_trees_of_tags() {
    let config = |naming: &str| -> Config {
        let route = json!({"store": {"kind": "memory"}, "naming": naming});
        serde_json::from_value(json!({"backends": [route]})).unwrap()
    };
    assert!(config("docker_tag").router().is_ok());
    assert!(config("identity").router().is_err());
    assert!(serde_json::from_value::<Config>(json!({"backend": []})).is_err());
    assert!(Config::default().router().unwrap().routes().is_empty());
}
