//! Whole origins in one process: real engines, queues and sockets; stores in memory.

use super::*;
use crate::{
    client::{
        Origins,
        cluster::CALLING,
        health::Rules,
        origin::{Error as Call, Origin, UPLOAD_OFFSET},
    },
    registry::range::Spec,
};
use backends::{Backend, FaultConfig, Faulty, Memory, Naming, Route};
use bytes::Bytes;
use engine::handle::Stat;
use http_body_util::BodyExt;
use hyper::{Method, Uri, body::Incoming, header};
use peer_proto::{Algorithm, Layout, LayoutBuilder};
use std::{num::NonZeroU64, path::Path, time::Instant};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

const DEADLINE: Duration = Duration::from_secs(60);

/// Origins of one cluster and the store behind them.
pub(crate) struct Cluster {
    nodes: Vec<Node>,
    store: Arc<Memory>,
    pub(crate) faults: Arc<Faulty>,
    pub(crate) origins: Origins,
    http: Client,
    config: Config,
    upstreams: Upstreams,
}

struct Node {
    dir: TempDir,
    addr: HostPort,
    listener: Option<TcpListener>,
    /// Most bytes of its store, from its next start on.
    quota: Option<NonZeroU64>,
    running: Option<Running>,
}

struct Running {
    engine: engine::Handle,
    queue: Queue,
    service: Arc<Service>,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

fn config() -> Config {
    let short = |millis: u64| format!("{millis}ms").parse::<Span>().unwrap();
    Config { replication: Replication { settle: short(50), ..Replication::default() }, ..Config::default() }
}

pub(crate) fn engine_config(dir: &Path) -> engine::handle::Config {
    engine::handle::Config {
        data_dir: dir.join("blobs"),
        listen: ([127, 0, 0, 1], 0).into(),
        advertise: None,
        id: None,
        origin: true,
        zone: peer_proto::wire::Zone::NONE,
        shards: NonZeroUsize::MIN,
        workers: NonZeroUsize::new(2).unwrap(),
        driver: engine::handle::DriverChoice::Auto,
        quota: None,
        proof: engine::handle::Proof::Full,
        mmap: true,
        send: engine::handle::SendPath::default(),
        limits: engine::handle::Limits::default(),
        peer_idle: peer_proto::conn::IDLE_MAX,
    }
}

/// Waits for something to become true.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, check: impl Fn() -> F) {
    let began = Instant::now();
    while !check().await {
        assert!(began.elapsed() < DEADLINE, "still waiting until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn content(seed: u32, len: usize) -> Bytes {
    let mut x = seed | 1;
    let words = std::iter::repeat_with(|| {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x
    });
    let bytes: Vec<u8> = words.take(len.div_ceil(4)).flat_map(u32::to_le_bytes).collect();
    Bytes::from(bytes).slice(..len)
}

fn layout_of(bytes: &[u8]) -> Layout {
    let mut builder = LayoutBuilder::new(Algorithm::Sha256);
    builder.update(bytes).unwrap();
    builder.finish()
}

pub(crate) fn digest_of(bytes: &[u8]) -> Digest {
    *layout_of(bytes).digest()
}

fn namespace() -> Namespace {
    "lib/app".parse().unwrap()
}

impl Cluster {
    async fn start(count: usize, replicas: usize) -> Self {
        Self::start_with(config(), count, replicas).await
    }

    /// Origins whose replicas do not wait to see that a blob is in the backend.
    pub(crate) async fn hasty(count: usize) -> Self {
        let replica_delay = Span::of(Duration::ZERO);
        let write_back = WriteBack { replica_delay, ..WriteBack::default() };
        Self::start_with(Config { write_back, ..config() }, count, count).await
    }

    /// The same, which fetch from these upstreams too.
    pub(crate) async fn mirroring(count: usize, upstreams: Upstreams) -> Self {
        let replica_delay = Span::of(Duration::ZERO);
        let write_back = WriteBack { replica_delay, ..WriteBack::default() };
        Self::start_all(Config { write_back, ..config() }, count, count, upstreams).await
    }

    async fn start_with(config: Config, count: usize, replicas: usize) -> Self {
        Self::start_all(config, count, replicas, Upstreams::default()).await
    }

    async fn start_all(config: Config, count: usize, replicas: usize, upstreams: Upstreams) -> Self {
        // RUST_LOG shows what happens; set before, it is another test's.
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        drop(tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init());
        let store = Arc::new(Memory::default());
        let faults = Arc::new(Faulty::new(store.clone(), FaultConfig::default()));
        let mut nodes = Vec::new();
        for _ in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap().to_string().parse().unwrap();
            let dir = tempfile::tempdir().unwrap();
            nodes.push(Node { dir, addr, listener: Some(listener), quota: None, running: None });
        }
        let addrs: Vec<HostPort> = nodes.iter().map(|node| node.addr.clone()).collect();
        let http = Client::default();
        let rules = Rules { pause: Duration::from_millis(20), ..CALLING };
        let origins = Origins::new(&addrs, replicas, rules, DEADLINE, &http).unwrap();
        let mut cluster = Self { nodes, store, faults, origins, http, config, upstreams };
        for node in 0..count {
            cluster.up(node, replicas).await;
        }
        cluster
    }

    pub(crate) fn addrs(&self) -> Vec<HostPort> {
        self.nodes.iter().map(|node| node.addr.clone()).collect()
    }

    /// Starts a node, with what it has on its disk.
    pub(crate) async fn up(&mut self, node: usize, replicas: usize) {
        let origins = self.addrs();
        let node = &mut self.nodes[node];
        let listener = match node.listener.take() {
            Some(listener) => listener,
            None => TcpListener::bind(node.addr.as_str()).await.unwrap(),
        };
        let engine =
            engine::start(engine::handle::Config { quota: node.quota, ..engine_config(node.dir.path()) }).unwrap();
        let pause = "20ms".parse().unwrap();
        let retries = retry::Config { pause, pause_max: "100ms".parse().unwrap(), ..retry::Config::default() };
        let queue = Queue::open(&node.dir.path().join("retry.db"), retries).unwrap();
        let route = Route::new(".*", Naming::ShardedDockerBlob, true, self.faults.clone()).unwrap();
        let place = Place { this: node.addr.clone(), origins, replicas, zone: "z".into(), plain: true };
        let backends = Router::new(vec![route]);
        let service = Service::start(
            self.config.clone(),
            place,
            engine.clone(),
            backends,
            self.upstreams.clone(),
            queue.clone(),
            &Client::default(),
        )
        .await
        .unwrap();
        let (stop, stopped) = watch::channel(false);
        let run = {
            let (service, stopped) = (service.clone(), stopped.clone());
            tokio::spawn(async move { service.run(stopped).await })
        };
        let serve = tokio::spawn(http::serve(listener, service.clone(), stopped, Duration::ZERO));
        node.running = Some(Running { engine, queue, service, stop, tasks: vec![run, serve] });
    }

    /// Stops a node in the middle of whatever it does.
    pub(crate) async fn down(&mut self, node: usize) {
        let Running { engine, queue, service, stop, tasks } = self.nodes[node].running.take().unwrap();
        stop.send_replace(true);
        for task in tasks {
            task.await.unwrap();
        }
        drop(service);
        queue.close(Duration::ZERO).await;
        engine.shutdown(Duration::ZERO).await;
    }

    fn running(&self, node: usize) -> &Running {
        self.nodes[node].running.as_ref().unwrap()
    }

    pub(crate) async fn holds(&self, node: usize, digest: &Digest) -> bool {
        matches!(self.running(node).engine.stat(digest).await.unwrap(), Stat::Whole { .. })
    }

    pub(crate) async fn in_backend(&self, bytes: &Bytes) -> bool {
        let name = Naming::ShardedDockerBlob.path(&digest_of(bytes).hex()).unwrap();
        match self.store.read(&name, None).await {
            Ok(object) => object.collect(1 << 30).await.unwrap() == bytes,
            Err(_) => false,
        }
    }

    async fn put_in_backend(&self, bytes: &Bytes) -> Digest {
        let digest = digest_of(bytes);
        let name = Naming::ShardedDockerBlob.path(&digest.hex()).unwrap();
        self.store.write(&name, bytes.clone().into()).await.unwrap();
        digest
    }

    async fn push(&self, bytes: &Bytes) -> Result<Digest, Call> {
        let digest = digest_of(bytes);
        self.origins.put(&namespace(), &digest, bytes.clone()).await.map(|()| digest)
    }

    async fn pull(&self, digest: &Digest) -> Result<Bytes, Call> {
        self.origins.read(&namespace(), digest, 1 << 30, DEADLINE).await
    }

    /// The node that comes first in a blob's order.
    fn first(&self, digest: &Digest) -> usize {
        let first = &self.origins.locations(digest)[0];
        self.nodes.iter().position(|node| node.addr == *first).unwrap()
    }

    async fn call(
        &self,
        node: usize,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, &str)],
        body: Bytes,
    ) -> hyper::Response<Incoming> {
        let uri: Uri = format!("http://{}{path}", self.nodes[node].addr).parse().unwrap();
        let mut request = Client::request(method, uri);
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        self.http.send(request.body(http::full(body)).unwrap(), DEADLINE).await.unwrap()
    }

    /// Status, and the body as text.
    async fn say(
        &self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, &str)],
        body: Bytes,
    ) -> (u16, String) {
        let answer = self.call(0, method, path, headers, body).await;
        let status = answer.status().as_u16();
        (status, String::from_utf8_lossy(&answer.into_body().collect().await.unwrap().to_bytes()).into_owned())
    }
}

const NONE: &[(header::HeaderName, &str)] = &[];

/// Opens a session at node 0 and sends it these parts; its path.
async fn send_parts(cluster: &Cluster, parts: &[Bytes]) -> String {
    let (status, started) = cluster.say(Method::POST, "/namespace/lib%2Fapp/uploads", NONE, Bytes::new()).await;
    assert_eq!(status, 201);
    let id = serde_json::from_str::<serde_json::Value>(&started).unwrap()["id"].as_str().unwrap().to_owned();
    let path = format!("/namespace/lib%2Fapp/uploads/{id}");
    for part in parts {
        assert_eq!(cluster.say(Method::PATCH, &path, NONE, part.clone()).await.0, 200);
    }
    path
}

fn twins(cluster: &Cluster, node: usize) -> String {
    let mut registry = Registry::default();
    cluster.running(node).service.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let counts =
        text.lines().filter(|line| line.starts_with("origin_twins_total") || line.contains("replications_total{"));
    counts.collect::<Vec<_>>().join(" ")
}

#[tokio::test(flavor = "multi_thread")]
async fn where_every_origin_owns_every_blob_copies_are_written_while_an_upload_arrives() {
    let cluster = Cluster::start(2, 2).await;
    let bytes = content(7, (5 << 20) + 77);
    let digest = digest_of(&bytes);
    let path = send_parts(&cluster, &[bytes.slice(..2 << 20), bytes.slice(2 << 20..)]).await;
    assert!(!cluster.holds(1, &digest).await);
    assert_eq!(cluster.say(Method::PUT, &format!("{path}?digest={digest}"), NONE, Bytes::new()).await.0, 201);
    assert!(cluster.holds(0, &digest).await && cluster.holds(1, &digest).await);
    let counts = twins(&cluster, 0);
    assert!(counts.contains(r#"origin_twins_total{outcome="done"} 1"#), "{counts}");
    assert!(counts.contains(r#"origin_replications_total{outcome="known"} 1"#), "{counts}");
    assert_eq!(cluster.pull(&digest).await.unwrap(), bytes);

    // Of bytes that are not the digest, neither keeps anything.
    let path = send_parts(&cluster, &[content(11, 2 << 20)]).await;
    let other = digest_of(&content(13, 2 << 20));
    assert_eq!(cluster.say(Method::PUT, &format!("{path}?digest={other}"), NONE, Bytes::new()).await.0, 400);
    assert!(!cluster.holds(0, &other).await && !cluster.holds(1, &other).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_lost_in_mid_upload_is_made_after_it() {
    let mut cluster = Cluster::start(2, 2).await;
    let bytes = content(7, 5 << 20);
    let digest = digest_of(&bytes);
    let path = send_parts(&cluster, &[bytes.slice(..2 << 20)]).await;
    cluster.down(1).await;
    assert_eq!(cluster.say(Method::PATCH, &path, NONE, bytes.slice(2 << 20..)).await.0, 200);
    assert_eq!(cluster.say(Method::PUT, &format!("{path}?digest={digest}"), NONE, Bytes::new()).await.0, 201);
    assert!(cluster.holds(0, &digest).await);
    cluster.up(1, 2).await;
    until("the second has it", || cluster.holds(1, &digest)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn krakens_upload_and_what_can_be_read_back() {
    let cluster = Cluster::start(1, 2).await;
    let bytes = content(1, (2 << 20) + 77);
    let layout = layout_of(&bytes);
    let (digest, total) = (layout.digest(), bytes.len());
    let blob = format!("/namespace/lib%2Fapp/blobs/{digest}");

    assert_eq!(cluster.say(Method::GET, &blob, NONE, Bytes::new()).await.0, 404);
    let started = cluster.call(0, Method::POST, &format!("{blob}/uploads?size={total}"), NONE, Bytes::new()).await;
    assert_eq!(started.status(), 200);
    let id = started.headers()[header::LOCATION].to_str().unwrap().to_owned();
    assert!(!id.contains('/'), "a bare id: {id}");
    let upload = format!("{blob}/uploads/{id}");
    let at = |range: &'static str| [(header::CONTENT_RANGE, range)];
    assert_eq!(
        cluster.say(Method::PATCH, &upload, &at("0-1048576"), bytes.slice(..1 << 20)).await,
        (200, String::new())
    );
    for wrong in ["1048576-", "bytes 1048576-2", "0-1048576", "7-8"] {
        assert_eq!(cluster.say(Method::PATCH, &upload, &at(wrong), bytes.slice(..1)).await.0, 400, "{wrong}");
    }
    let rest = format!("1048576-{total}");
    let rest = [(header::CONTENT_RANGE, rest.as_str())];
    assert_eq!(cluster.say(Method::PATCH, &upload, &rest, bytes.slice(1 << 20..)).await.0, 200);
    assert_eq!(cluster.say(Method::PUT, &upload, NONE, Bytes::new()).await, (200, String::new()));
    assert_eq!(cluster.say(Method::PUT, &upload, NONE, Bytes::new()).await.0, 404, "it is closed");
    let again = format!("{blob}/uploads");
    assert_eq!(cluster.say(Method::POST, &again, NONE, Bytes::new()).await.0, 409);

    let got = cluster.call(0, Method::GET, &blob, NONE, Bytes::new()).await;
    assert_eq!(got.headers()[header::CONTENT_LENGTH], total.to_string().as_str());
    assert_eq!(got.into_body().collect().await.unwrap().to_bytes(), bytes);
    let part = cluster.call(0, Method::GET, &blob, &[(header::RANGE, "bytes=1048570-1048579")], Bytes::new()).await;
    assert_eq!(part.status(), 206);
    assert_eq!(part.headers()[header::CONTENT_RANGE], format!("bytes 1048570-1048579/{total}").as_str());
    assert_eq!(part.into_body().collect().await.unwrap().to_bytes(), bytes.slice(1_048_570..1_048_580));
    let outside = cluster.call(0, Method::GET, &blob, &[(header::RANGE, "bytes=99999999-")], Bytes::new()).await;
    assert_eq!(outside.status(), 416);
    for path in [blob.clone(), format!("/internal{blob}"), format!("/internal{blob}?local=true")] {
        let head = cluster.call(0, Method::HEAD, &path, NONE, Bytes::new()).await;
        assert_eq!(
            (head.status().as_u16(), head.headers()[header::CONTENT_LENGTH].to_str().unwrap()),
            (200, "2097229")
        );
    }
    let (status, json) = cluster.say(Method::GET, &format!("/internal{blob}/metainfo"), NONE, Bytes::new()).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(status, 200);
    assert_eq!(json["Info"]["Name"], digest.hex());
    assert_eq!(json["Info"]["PieceSums"].as_array().unwrap().len(), 3);
    assert_eq!(cluster.origins.layout(&namespace(), digest, Duration::ZERO).await.unwrap(), layout);
    let located = cluster.call(0, Method::GET, &format!("/blobs/{digest}/locations"), NONE, Bytes::new()).await;
    assert_eq!(located.headers()["origin-locations"], cluster.nodes[0].addr.as_str());
    let peers = cluster.origins.peers(digest).await;
    assert_eq!((peers.len(), peers[0].peer_id), (1, cluster.running(0).engine.id()));
    until("the backend has it", || cluster.in_backend(&bytes)).await;

    for (method, path, status) in [
        (Method::GET, "/health".to_owned(), 200),
        (Method::GET, "/readiness".to_owned(), 200),
        (Method::POST, format!("{blob}/prefetch"), 200),
        (Method::POST, format!("/internal/blobs/{digest}/metainfo?piece_length=1000"), 200),
        (Method::POST, format!("/internal/blobs/{digest}/metainfo?piece_length=x"), 400),
        (Method::POST, "/forcecleanup".to_owned(), 400),
        (Method::POST, format!("{blob}/remote/other:15002"), 501),
        (Method::POST, "/forcecleanup/v2".to_owned(), 501),
        (Method::GET, "/nothing".to_owned(), 404),
        (Method::PUT, blob.clone(), 405),
        (Method::GET, "/namespace/x/blobs/sha256:00".to_owned(), 400),
    ] {
        assert_eq!(cluster.say(method, &path, NONE, Bytes::new()).await.0, status, "{path}");
    }
    let held = format!("/internal/blobs/{digest}");
    until("nothing needs it any more", async || cluster.say(Method::DELETE, &held, NONE, Bytes::new()).await.0 == 202)
        .await;
    assert_eq!(cluster.say(Method::DELETE, &held, NONE, Bytes::new()).await.0, 404);
    assert_eq!(cluster.pull(digest).await.unwrap(), bytes, "from the backend");
    let (status, report) = cluster.say(Method::POST, "/forcecleanup?ttl_hr=0", NONE, Bytes::new()).await;
    assert_eq!((status, report), (200, format!(r#"{{"deleted":["{}"],"errors":[]}}"#, digest.hex())));
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_without_a_digest_say_exactly_where_they_are() {
    let cluster = Cluster::start(1, 1).await;
    let (origins, ns) = (&cluster.origins, namespace());
    let bytes = content(2, 300_000);
    let session = origins.start(&ns, Algorithm::Sha256, None, None).await.unwrap();
    let session = origins.session(&session.to_string()).unwrap();
    let part = |range: std::ops::Range<usize>| http::full(bytes.slice(range));
    assert_eq!(origins.append(&ns, &session, Some(0), Some(100_000), part(0..100_000)).await, Ok(100_000));
    for wrong in [0, 99_999, 100_001] {
        let error = origins.append(&ns, &session, Some(wrong), None, part(0..10)).await.unwrap_err();
        assert_eq!(error, Call::Offset { expected: 100_000 }, "{wrong}");
    }
    assert_eq!(origins.append(&ns, &session, None, None, part(100_000..150_000)).await, Ok(150_000));
    let path = format!("/namespace/lib%2Fapp/uploads/{}", session.id());
    for (range, status) in [("x", 400), ("150000-150001", 400), ("150000-150099", 400)] {
        // Bytes beyond a range are refused, and too few are kept.
        let headers = [(header::CONTENT_RANGE, range)];
        assert_eq!(
            cluster.say(Method::PATCH, &path, &headers, bytes.slice(150_000..150_010)).await.0,
            status,
            "{range}"
        );
    }
    assert_eq!(origins.status(&ns, &session).await, Ok(150_010));
    assert_eq!(origins.append(&ns, &session, Some(150_010), None, part(150_010..300_000)).await, Ok(300_000));
    let digest = digest_of(&bytes);
    origins.commit(&ns, &session, &digest).await.unwrap();
    assert_eq!(cluster.pull(&digest).await.unwrap(), bytes);

    // What is wrong is told, and leaves nothing behind.
    let session = origins.start(&ns, Algorithm::Sha256, Some(10), None).await.unwrap();
    origins.append(&ns, &session, Some(0), None, part(0..10)).await.unwrap();
    let other = digest_of(b"other");
    assert!(matches!(origins.commit(&ns, &session, &other).await, Err(Call::Mismatch(_))));
    assert_eq!(origins.stat(&ns, &other).await, Err(Call::NotFound));
    assert_eq!(origins.status(&ns, &session).await, Err(Call::UploadUnknown));
    let session = origins.start(&ns, Algorithm::Sha256, None, Some(&digest)).await.unwrap();
    origins.cancel(&ns, &session).await.unwrap();
    assert_eq!(origins.append(&ns, &session, Some(0), None, part(0..1)).await, Err(Call::UploadUnknown));
    assert_eq!(origins.commit(&ns, &session, &digest).await, Err(Call::UploadUnknown));
    let kraken = format!("/namespace/lib%2Fapp/blobs/{other}/uploads");
    let started = cluster.call(0, Method::POST, &kraken, NONE, Bytes::new()).await;
    let id = started.headers()[header::LOCATION].to_str().unwrap();
    let (status, text) = cluster.say(Method::PUT, &format!("{kraken}/{id}"), NONE, Bytes::new()).await;
    assert_eq!(status, 500, "Kraken's answer to a mismatch");
    assert!(text.contains("content has digest sha256:e3b0c442"), "{text}");
    assert_eq!(cluster.say(Method::PUT, &format!("{path}?digest=md5:1"), NONE, Bytes::new()).await.0, 400);
    assert_eq!(cluster.say(Method::POST, "/namespace/a/uploads?algorithm=md5", NONE, Bytes::new()).await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_off_leaves_what_was_whole() {
    let cluster = Cluster::start(1, 1).await;
    let (origins, ns) = (&cluster.origins, namespace());
    let bytes = content(3, 50_000);
    let session = origins.start(&ns, Algorithm::Sha256, None, None).await.unwrap();
    let head = format!(
        "PATCH /namespace/lib%2Fapp/uploads/{} HTTP/1.1\r\nhost: o\r\ncontent-range: 0-50000\r\ncontent-length: 50000\r\n\r\n",
        session.id()
    );
    let mut socket = TcpStream::connect(cluster.nodes[0].addr.as_str()).await.unwrap();
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(&bytes[..20_000]).await.unwrap();
    until("they arrived", async || origins.status(&ns, &session).await == Ok(20_000)).await;
    // The client hangs, without a word; another connection takes over where the first one stopped.
    assert_eq!(
        origins.append(&ns, &session, Some(20_000), None, http::full(bytes.slice(20_000..30_000))).await,
        Ok(30_000)
    );
    let mut told = Vec::new();
    socket.read_to_end(&mut told).await.unwrap();
    let told = String::from_utf8_lossy(&told);
    assert!(told.starts_with("HTTP/1.1 409") && told.contains(&format!("{UPLOAD_OFFSET}: 20000")), "{told}");

    // A connection that closes in mid-body.
    let mut socket = TcpStream::connect(cluster.nodes[0].addr.as_str()).await.unwrap();
    let head = head.replace("0-50000", "30000-50000").replace("length: 50000", "length: 20000");
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(&bytes[30_000..41_000]).await.unwrap();
    until("they arrived", async || origins.status(&ns, &session).await == Ok(41_000)).await;
    drop(socket);
    assert_eq!(origins.append(&ns, &session, Some(41_000), None, http::full(bytes.slice(41_000..))).await, Ok(50_000));
    origins.commit(&ns, &session, &digest_of(&bytes)).await.unwrap();
    // And a body of the caller's own that breaks off.
    let session = origins.start(&ns, Algorithm::Sha256, None, None).await.unwrap();
    let parts = [Ok(Bytes::from_static(b"abc")), Err("gone")];
    let broken = http::stream(futures_util::stream::iter(parts));
    assert_eq!(origins.append(&ns, &session, Some(0), None, broken).await, Err(Call::Body));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_is_on_both_owners_and_in_the_backend() {
    let cluster = Cluster::start(3, 2).await;
    for seed in 0..6 {
        let bytes = content(seed, 1_500_000);
        let digest = digest_of(&bytes);
        // Begun anywhere: also where the blob does not belong.
        let session = cluster.origins.start(&namespace(), Algorithm::Sha256, None, None).await.unwrap();
        cluster.origins.append(&namespace(), &session, Some(0), None, http::full(bytes.clone())).await.unwrap();
        cluster.origins.commit(&namespace(), &session, &digest).await.unwrap();
        let owners = cluster.origins.locations(&digest);
        assert_eq!(owners.len(), 2);
        for (node, _) in cluster.nodes.iter().enumerate().filter(|(_, node)| owners.contains(&node.addr)) {
            assert!(cluster.holds(node, &digest).await, "owner {node} of blob {seed}");
        }
        until("the backend has it", || cluster.in_backend(&bytes)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_is_down_during_a_push_gets_its_copy_later() {
    let mut cluster = Cluster::start(2, 2).await;
    cluster.down(1).await;
    let blobs: Vec<_> = (10..14).map(|seed| content(seed, 200_000)).collect();
    for bytes in &blobs {
        cluster.push(bytes).await.unwrap();
    }
    cluster.up(1, 2).await;
    for bytes in &blobs {
        let digest = digest_of(bytes);
        until("the copy is restored", || cluster.holds(1, &digest)).await;
    }
    // Nothing is left to do, so nothing is held any more.
    for bytes in &blobs {
        let digest = digest_of(bytes);
        until("it may be evicted", async || cluster.running(0).engine.evict(&digest).await.is_ok()).await;
        assert_eq!(cluster.pull(&digest).await.unwrap(), *bytes, "from the other, or the backend");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_owner_is_given_what_it_lacks() {
    let mut cluster = Cluster::start(3, 2).await;
    let bytes = content(20, 400_000);
    let digest = cluster.push(&bytes).await.unwrap();
    let first = cluster.first(&digest);
    let third = (0..3).find(|node| !cluster.origins.locations(&digest).contains(&cluster.nodes[*node].addr)).unwrap();
    assert!(!cluster.holds(third, &digest).await);
    cluster.down(first).await;
    until("the next in order has taken its place", || cluster.holds(third, &digest)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_here_comes_from_the_backend() {
    let cluster = Cluster::start(2, 2).await;
    let bytes = content(30, (3 << 20) + 1);
    let digest = cluster.put_in_backend(&bytes).await;
    let size = cluster.origins.stat(&namespace(), &digest).await.unwrap();
    assert_eq!(size, bytes.len() as u64);
    let unknown = digest_of(b"nobody has this");
    assert_eq!(cluster.pull(&unknown).await, Err(Call::NotFound));
    assert_eq!(cluster.origins.layout(&namespace(), &unknown, DEADLINE).await, Err(Call::NotFound));

    let first = cluster.first(&digest);
    let blob = format!("/namespace/lib%2Fapp/blobs/{digest}");
    let answer = cluster.call(first, Method::GET, &blob, NONE, Bytes::new()).await;
    assert_eq!(answer.status(), 202);
    assert_eq!(cluster.origins.layout(&namespace(), &digest, DEADLINE).await.unwrap(), layout_of(&bytes));
    assert_eq!(cluster.call(first, Method::GET, &blob, NONE, Bytes::new()).await.status(), 200);
    assert_eq!(cluster.pull(&digest).await.unwrap(), bytes);
    for node in 0..2 {
        until("both owners have it", || cluster.holds(node, &digest)).await;
    }

    // Many at once.
    let bytes = content(31, 2 << 20);
    let digest = cluster.put_in_backend(&bytes).await;
    let pulls = (0..20).map(|_| cluster.pull(&digest));
    for pulled in futures_util::future::join_all(pulls).await {
        assert_eq!(pulled.unwrap(), bytes);
    }

    // A backend that holds other bytes under the name.
    let wrong = digest_of(b"right");
    let name = Naming::ShardedDockerBlob.path(&wrong.hex()).unwrap();
    cluster.store.write(&name, "wrong".into()).await.unwrap();
    let error = cluster.pull(&wrong).await.unwrap_err();
    assert!(matches!(&error, Call::Refused { message, .. } if message.contains("expected")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_is_down_is_a_500_until_it_is_up() {
    let cluster = Cluster::start(1, 1).await;
    let bytes = content(40, 100_000);
    let digest = cluster.put_in_backend(&bytes).await;
    cluster.faults.set_down(true);
    let blob = format!("/namespace/lib%2Fapp/blobs/{digest}");
    let (status, text) = cluster.say(Method::GET, &blob, NONE, Bytes::new()).await;
    assert_eq!((status, text.as_str()), (500, "backend: unavailable: injected outage"));
    assert_eq!(cluster.say(Method::GET, "/readiness", NONE, Bytes::new()).await.0, 503);
    assert!(matches!(cluster.pull(&digest).await, Err(Call::Refused { .. })));
    cluster.faults.set_down(false);
    assert_eq!(cluster.pull(&digest).await.unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn write_back_survives_a_restart_and_holds_the_blob_until_done() {
    let mut cluster = Cluster::start(1, 1).await;
    cluster.faults.set_down(true);
    let bytes = content(50, 700_000);
    let digest = cluster.push(&bytes).await.unwrap();
    let held = format!("/internal/blobs/{digest}");
    assert_eq!(cluster.say(Method::DELETE, &held, NONE, Bytes::new()).await.0, 500, "still needed");
    cluster.down(0).await;
    cluster.up(0, 1).await;
    assert_eq!(cluster.say(Method::DELETE, &held, NONE, Bytes::new()).await.0, 500, "still needed");
    assert!(!cluster.in_backend(&bytes).await);
    cluster.faults.set_down(false);
    until("the backend has it", || cluster.in_backend(&bytes)).await;
    until("it may go", async || cluster.say(Method::DELETE, &held, NONE, Bytes::new()).await.0 == 202).await;
    assert_eq!(cluster.pull(&digest).await.unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_never_came_is_forgotten_and_one_that_is_lost_is_not() {
    let cluster = Cluster::start(2, 2).await;
    let (origin, bytes) = (cluster.running(0), content(55, 5000));
    let digest = digest_of(&bytes);
    let task = |payload: &'static [u8]| retry::Task {
        key: format!("{digest} {}", namespace()),
        payload: Bytes::from_static(payload),
        failures: 0,
    };
    // An upload that was refused at its commit leaves an intent, and a pin.
    let start = format!("/internal/blobs/{digest}/uploads");
    let started = cluster.call(0, Method::POST, &start, NONE, Bytes::new()).await;
    let id = started.headers()[header::LOCATION].to_str().unwrap();
    let commit = format!("/namespace/lib%2Fapp/uploads/{id}?digest={digest}");
    assert_eq!(cluster.say(Method::PUT, &commit, NONE, Bytes::new()).await.0, 400);
    assert!(matches!(origin.engine.evict(&digest).await, Err(engine::handle::Error::Pinned(_))));
    origin.service.shared.write_back(task(write_back::INTENT)).await.unwrap();
    assert!(!origin.engine.evict(&digest).await.unwrap());
    // One that was acknowledged and is nowhere is told, and kept as a task.
    let lost = origin.service.shared.write_back(task(write_back::HELD)).await;
    assert_eq!(lost, Err(retry::Failure::Never("blob is nowhere".into())));
    assert_eq!(origin.service.shared.figures.lost.get(), 1);
    // Lost here only: it comes back from the other owner, and goes to the backend.
    cluster.faults.set_down(true);
    let (client, ns) = (Origin::new(cluster.nodes[0].addr.clone(), Client::default()), namespace());
    let id = client.start(&ns, Algorithm::Sha256, None).await.unwrap().id;
    client.append(&ns, &id, None, None, http::full(bytes.clone())).await.unwrap();
    client.commit(&ns, &id, &digest).await.unwrap();
    origin.engine.unpin(&digest).await.unwrap();
    assert!(origin.engine.evict(&digest).await.unwrap());
    cluster.faults.set_down(false);
    until("the backend has it", || cluster.in_backend(&bytes)).await;
    until("it is here again", || cluster.holds(0, &digest)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_of_one_blob_at_once_all_succeed() {
    let cluster = Cluster::start(2, 2).await;
    let bytes = content(60, 1_200_000);
    let pushes = (0..8).map(|_| cluster.push(&bytes));
    let digests: Vec<_> = futures_util::future::join_all(pushes).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(cluster.pull(&digests[0]).await.unwrap(), bytes);
    assert!(cluster.holds(0, &digests[0]).await && cluster.holds(1, &digests[0]).await);
    until("the backend has it", || cluster.in_backend(&bytes)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_goes_on_at_the_next_owner() {
    let mut cluster = Cluster::start(2, 2).await;
    let bytes = content(70, 24 << 20);
    let digest = cluster.push(&bytes).await.unwrap();
    let range = Some(Spec::From(5));
    let mut blob = cluster.origins.open(&namespace(), &digest, range, DEADLINE).await.unwrap();
    assert_eq!((blob.total(), blob.range()), (24 << 20, 5..24 << 20));
    let mut read = blob.next().await.unwrap().unwrap().to_vec();
    cluster.down(cluster.first(&digest)).await;
    while let Some(part) = blob.next().await {
        read.extend_from_slice(&part.unwrap());
    }
    assert!(read == bytes[5..], "{} bytes, wrong ones", read.len());
}

#[tokio::test]
async fn an_owner_without_room_passes_readers_on() {
    let mut cluster = Cluster::start(2, 1).await;
    let bytes = content(41, 3 << 20);
    let first = cluster.first(&digest_of(&bytes));
    cluster.down(first).await;
    let digest = cluster.push(&bytes).await.unwrap();
    cluster.nodes[first].quota = NonZeroU64::new(1 << 20);
    cluster.up(first, 1).await;
    until("the client sees that it is back", async || cluster.first(&digest) == first).await;

    assert_eq!(cluster.pull(&digest).await.unwrap(), bytes);
    assert!(!cluster.holds(first, &digest).await);
    let refreshes = &cluster.running(first).service.shared.figures.refreshes;
    let fetches = refreshes.get_or_create(&figures::Refreshed { source: "origin", outcome: figures::FAILED }).get();
    assert!((1..=2).contains(&fetches), "{fetches} fetches for one read");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_waits_for_origins_that_come_back() {
    let mut cluster = Cluster::start(2, 2).await;
    let bytes = content(80, 1000);
    let digest = cluster.push(&bytes).await.unwrap();
    cluster.down(0).await;
    cluster.down(1).await;
    let (origins, ns) = (cluster.origins.clone(), namespace());
    let pull = origins.read(&ns, &digest, 1000, DEADLINE);
    let back = async {
        until("the client has tried", async || (0..2).all(|member| !origins.cluster().is_up(member))).await;
        cluster.up(1, 2).await;
    };
    assert_eq!(tokio::join!(pull, back).0.unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_is_taken_into_another_namespace_without_its_bytes() {
    let cluster = Cluster::start(2, 2).await;
    let bytes = content(90, 5000);
    let digest = cluster.push(&bytes).await.unwrap();
    let other: Namespace = "lib/other".parse().unwrap();
    assert_eq!(cluster.origins.link(&other, &digest).await, Ok(true));
    assert_eq!(cluster.origins.link(&other, &digest_of(b"?")).await, Ok(false));
}

/// Not a test of its own: the process whose memory the next one measures.
#[tokio::test(flavor = "multi_thread")]
async fn victim_of_a_long_stream() {
    if std::env::var_os("SHOAL_TEST_ORIGIN_STREAM").is_none() {
        return;
    }
    let memory = |name: &str| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let peak = || memory("VmHWM:");
    const PARTS: usize = 1024;
    let cluster = Cluster::start(2, 2).await;
    let part = content(100, 64 << 10);
    // The store in memory would keep it all.
    cluster.faults.set_down(true);
    let mut builder = LayoutBuilder::new(Algorithm::Sha256);
    (0..PARTS).for_each(|_| builder.update(&part).unwrap());
    let (layout, ns) = (builder.finish(), namespace());
    cluster.push(&part).await.unwrap();
    let (before, own_before) = (peak(), memory("RssAnon:"));
    let session = cluster.origins.start(&ns, Algorithm::Sha256, None, None).await.unwrap();
    let parts = std::iter::repeat_n(part.clone(), PARTS).map(Ok::<_, std::convert::Infallible>);
    let body = http::stream(futures_util::stream::iter(parts));
    let length = Some(layout.length());
    assert_eq!(cluster.origins.append(&ns, &session, Some(0), length, body).await, Ok(64 << 20));
    cluster.origins.commit(&ns, &session, layout.digest()).await.unwrap();
    let stored = peak() - before;
    let mut blob = cluster.origins.open(&ns, layout.digest(), None, DEADLINE).await.unwrap();
    let mut read = 0;
    while let Some(bytes) = blob.next().await {
        read += bytes.unwrap().len();
    }
    assert_eq!(read, 64 << 20);
    // What goes out is mapped: pages of the file, which are nobody's memory.
    println!("grew by {} KiB", stored.max(memory("RssAnon:").saturating_sub(own_before)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_stream_needs_little_memory() {
    let victim = tokio::task::spawn_blocking(|| {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "origin::tests::victim_of_a_long_stream", "--nocapture"])
            .env("SHOAL_TEST_ORIGIN_STREAM", "1")
            .output()
            .unwrap()
    });
    let output = victim.await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let grew = text.split("grew by ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
    // In, to the replica and out: 64 MiB each, of which a few pieces at a time are in memory.
    assert!(grew.is_some_and(|kib| kib < 40 << 10), "{text}{}", String::from_utf8_lossy(&output.stderr));
}
