//! The tracker: who has which blob and whom to dial, in memory; what a blob looks like, relayed from the origins.

#[cfg(test)]
pub(crate) mod harness;
mod kraken;
pub mod preheat;
mod relay;

use crate::{
    client::{Origins, cluster::Cluster, origin, tracker::ANNOUNCE_TYPE},
    config::TrackerRole,
    http::{self, Error, Request, Response, Service, segments},
    preheat::{POLL_LEN_MAX, Poll, TASK_LEN_MAX, Task},
};
use hyper::{Method, StatusCode, header};
use peer_proto::{
    Digest, Instant, Namespace,
    announce::{self, BODY_MAX},
    handout::{self, Effect, Event, Handout, Origin},
    ring::Ring,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{MetricType, counter::Counter, family::Family, gauge::ConstGauge},
    registry::Registry,
};
use relay::Relay;
use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{self, Duration},
};
use tokio::sync::{Notify, oneshot, watch};

/// How often origins are asked where their peers reach them.
const ORIGINS_INTERVAL: Duration = Duration::from_secs(10);
/// The same while an origin that is up has not told.
const ORIGINS_RETRY: Duration = Duration::from_secs(1);

/// A tracker.
pub struct Tracker {
    state: Mutex<State>,
    /// The hand-out's deadline may be earlier than before.
    wake: Notify,
    epoch: time::Instant,
    cluster: Arc<Cluster>,
    layouts: Relay,
    metainfos: Relay,
    announces: Family<KindLabel, Counter>,
    preheats: Mutex<preheat::Table>,
    polls: Counter,
}

struct State {
    handout: Handout,
    tokens: u64,
    /// Announces that have no answer yet; bounded by the listener's connections.
    waiting: HashMap<u64, oneshot::Sender<announce::Response>>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

impl Tracker {
    /// A tracker of these origins that knows nobody yet.
    pub fn new(config: &TrackerRole, cluster: Arc<Cluster>) -> Arc<Self> {
        let (seed, _) = uuid::Uuid::new_v4().as_u64_pair();
        let handout = Handout::new(handout::Config { seed, ..config.handout });
        // An agent waits by itself; the tracker tells at once that nobody is there.
        let origins = Origins::of(cluster.clone(), Duration::ZERO);
        let layouts = Relay::new({
            let origins = origins.clone();
            move |namespace: Namespace, digest: Digest| {
                let origins = origins.clone();
                async move {
                    let layout = origins.layout(&namespace, &digest, Duration::ZERO).await?;
                    Ok::<_, origin::Error>(layout.encode().into())
                }
            }
        });
        let metainfos = Relay::new(move |namespace: Namespace, digest: Digest| {
            let origins = origins.clone();
            async move { origins.metainfo(&namespace, &digest).await }
        });
        Arc::new(Self {
            state: Mutex::new(State { handout, tokens: 0, waiting: HashMap::new() }),
            wake: Notify::new(),
            epoch: time::Instant::now(),
            cluster,
            layouts,
            metainfos,
            announces: Family::default(),
            preheats: Mutex::new(preheat::Table::new(config.preheat, Instant::ZERO)),
            polls: Counter::default(),
        })
    }

    /// Adds its figures to a role's.
    pub fn register(self: &Arc<Self>, registry: &mut Registry) {
        registry.register("tracker_announces", "Announces taken, by protocol", self.announces.clone());
        registry.register("tracker_preheat_polls", "Times that agents asked for preheats", self.polls.clone());
        self.layouts.register(registry, "layout");
        self.metainfos.register(registry, "metainfo");
        registry.register_collector(Box::new(SizeOf(self.clone())));
    }

    /// Forgets who is silent, and keeps an eye on the origins, until `stop` is true.
    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let watching = self.cluster.clone().watch(stop.clone());
        let stopped = async move {
            let _ = stop.wait_for(|stop| *stop).await;
        };
        tokio::select! {
            () = self.forget_silent() => {}
            () = self.follow_origins() => {}
            () = stopped => {}
            () = watching => {}
        }
    }

    async fn forget_silent(&self) {
        loop {
            let deadline = self.state().handout.deadline();
            match deadline {
                Some(deadline) => tokio::select! {
                    () = tokio::time::sleep(deadline.since(self.now())) => self.handle(Event::Tick),
                    () = self.wake.notified() => {}
                },
                None => self.wake.notified().await,
            }
        }
    }

    async fn follow_origins(&self) {
        let mut changes = self.cluster.changes();
        let mut known: HashMap<usize, Origin> = HashMap::new();
        loop {
            changes.mark_unchanged();
            let up: Vec<usize> = (0..self.cluster.members().len()).filter(|at| self.cluster.is_up(*at)).collect();
            let told = futures_util::future::join_all(up.iter().map(|at| self.ask(*at))).await;
            let silent = told.iter().any(Option::is_none);
            known.extend(up.into_iter().zip(told).filter_map(|(at, origin)| Some((at, origin?))));
            self.set_origins(known.values().cloned().collect());
            let wait = if silent { ORIGINS_RETRY } else { ORIGINS_INTERVAL };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Where peers reach an origin.
    async fn ask(&self, member: usize) -> Option<Origin> {
        let origin = self.cluster.origin(member);
        match origin.peer().await {
            Ok(context) => {
                self.cluster.passed(member);
                Some(Origin {
                    label: origin.addr().as_str().into(),
                    id: context.peer_id,
                    addr: SocketAddr::new(context.ip, context.port),
                    zone: context.zone.into(),
                })
            }
            Err(error) => {
                tracing::debug!(%error, "ask an origin for its peer address");
                if let origin::Error::Unreachable(_) = error {
                    self.cluster.failed(member);
                }
                None
            }
        }
    }

    fn set_origins(&self, origins: Vec<Origin>) {
        let members = self.cluster.members();
        let mut ring = match Ring::new(members.iter().map(|origin| origin.addr().as_str())) {
            Ok(ring) => ring,
            Err(error) => {
                tracing::error!(%error, "ring of origins");
                return;
            }
        };
        for (at, origin) in members.iter().enumerate() {
            ring.set_up(origin.addr().as_str(), self.cluster.is_up(at));
        }
        self.handle(Event::Origins { ring, origins });
    }

    fn handle(&self, event: Event<'_>) {
        let mut state = self.state();
        state.handle(self.now(), event);
    }

    /// Takes an announce and waits for its answer.
    async fn announce(&self, request: &announce::Request) -> Result<announce::Response, Error> {
        let answer = {
            let mut state = self.state();
            let (answer, answered) = oneshot::channel();
            state.tokens += 1;
            let token = state.tokens;
            state.waiting.insert(token, answer);
            state.handle(self.now(), Event::Announce { token, request });
            answered
        };
        self.wake.notify_one();
        answer.await.map_err(|_| Error::unavailable("tracker is stopping"))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn preheats(&self) -> MutexGuard<'_, preheat::Table> {
        self.preheats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Instant {
        Instant::from_nanos(u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    async fn route(&self, request: Request) -> Result<Response, Error> {
        let (method, path) = (request.method().clone(), segments(request.uri().path())?);
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        match (&method, &*path) {
            (&Method::POST, ["announce"]) => self.announced(request).await,
            (&Method::GET, ["announce"]) => self.kraken(request, None).await,
            (&Method::POST, ["announce", info_hash]) => self.kraken(request, Some(info_hash)).await,
            (&Method::GET, ["namespace", namespace, "blobs", digest, what @ ("layout" | "metainfo")]) => {
                let namespace = namespace.parse().map_err(|error| Error::bad_request(format!("{error}")))?;
                let digest = digest.parse().map_err(|error| Error::bad_request(format!("{error}")))?;
                let (relay, media_type) = match *what {
                    "layout" => (&self.layouts, "application/octet-stream"),
                    _ => (&self.metainfos, "application/json"),
                };
                let bytes = relay.get(namespace, digest).await?;
                Ok(http::with_type(StatusCode::OK, media_type, bytes))
            }
            (&Method::POST, ["preheat", "poll"]) => {
                let poll: Poll = decode(&http::read_body(request.into_body(), POLL_LEN_MAX).await?)?;
                self.polls.inc();
                Ok(http::json(StatusCode::OK, &self.preheats().poll(self.now(), poll)?))
            }
            (&Method::PUT, ["preheat", id]) => {
                let task: Task = decode(&http::read_body(request.into_body(), TASK_LEN_MAX).await?)?;
                let task = task.checked().map_err(|error| Error::bad_request(error.to_string()))?;
                if task.id.to_string() != *id {
                    return Err(Error::bad_request(format!("preheat {} was put as {id}", task.id)));
                }
                self.preheats().put(self.now(), task)?;
                Ok(http::status(StatusCode::OK))
            }
            (&Method::GET, ["preheat", id]) => {
                let id = id.parse().map_err(|error| Error::bad_request(format!("{id:?} {error}")))?;
                let progress = self.preheats().progress(self.now(), &id);
                let progress = progress.ok_or_else(|| Error::not_found(format!("preheat {id} is unknown or over")))?;
                Ok(http::json(StatusCode::OK, &progress))
            }
            (_, ["announce", ..] | ["preheat", _] | ["namespace", _, "blobs", _, "layout" | "metainfo"]) => {
                Err(Error::new(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not supported here")))
            }
            _ => Err(Error::not_found("no such path")),
        }
    }

    /// Our own protocol.
    async fn announced(&self, request: Request) -> Result<Response, Error> {
        let media_type = request.headers().get(header::CONTENT_TYPE);
        if media_type.is_none_or(|media_type| media_type != ANNOUNCE_TYPE) {
            let wanted =
                format!("expected a body of type {ANNOUNCE_TYPE}; Kraken's JSON goes to /announce/<info hash>");
            return Err(Error::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, wanted));
        }
        let body = http::read_body(request.into_body(), BODY_MAX).await?;
        let request =
            announce::Request::decode(&body).map_err(|error| Error::bad_request(format!("announce: {error}")))?;
        self.announces.get_or_create(&KindLabel { kind: "shoal" }).inc();
        let response = self.announce(&request).await?;
        Ok(http::with_type(StatusCode::OK, ANNOUNCE_TYPE, response.encode()))
    }

    /// Kraken's protocol, over the same state.
    async fn kraken(&self, request: Request, info_hash: Option<&str>) -> Result<Response, Error> {
        let body = http::read_body(request.into_body(), kraken::BODY_MAX).await?;
        let asked = kraken::Request::decode(&body, info_hash)?;
        self.announces.get_or_create(&KindLabel { kind: "kraken" }).inc();
        let response = self.announce(&asked.announce()?).await?;
        asked.answer(&response)
    }
}

impl State {
    fn handle(&mut self, now: Instant, event: Event<'_>) {
        self.handout.handle(now, event);
        while let Some(Effect::Answer { token, response }) = self.handout.poll() {
            if let Some(waiting) = self.waiting.remove(&token) {
                // Gone where the client hung up.
                let _ = waiting.send(response);
            }
        }
    }
}

impl Service for Tracker {
    async fn answer(self: Arc<Self>, request: Request) -> Response {
        self.route(request).await.unwrap_or_else(Response::from)
    }
}

fn decode<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| Error::bad_request(format!("decode body: {error}")))
}

impl From<preheat::Refused> for Error {
    fn from(refused: preheat::Refused) -> Self {
        let status = match refused {
            preheat::Refused::Tasks => StatusCode::TOO_MANY_REQUESTS,
            preheat::Refused::Other(_) => StatusCode::CONFLICT,
            preheat::Refused::Hosts(_) => StatusCode::SERVICE_UNAVAILABLE,
            preheat::Refused::Long => StatusCode::BAD_REQUEST,
        };
        Self::new(status, refused.to_string())
    }
}

/// The endpoint that a path belongs to: what requests are counted by.
pub fn class(path: &str) -> &'static str {
    match path.rsplit('/').next() {
        _ if path.starts_with("/announce") => "announce",
        _ if path.starts_with("/preheat/") => "preheat",
        Some("layout") => "layout",
        Some("metainfo") => "metainfo",
        _ => "other",
    }
}

/// How much the tracker knows, told when asked.
struct SizeOf(Arc<Tracker>);

impl fmt::Debug for SizeOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SizeOf")
    }
}

impl Collector for SizeOf {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let size = self.0.state().handout.size();
        let (preheats, polling) = self.0.preheats().size();
        let origins = (0..self.0.cluster.members().len()).filter(|at| self.0.cluster.is_up(*at)).count();
        for (name, help, count) in [
            ("tracker_hosts", "Hosts known", size.hosts),
            ("tracker_swarms", "Blobs with at least one host", size.swarms),
            ("tracker_members", "Pairs of a host and a blob", size.members),
            ("tracker_origins_up", "Origins that answer", origins),
            ("tracker_preheats", "Preheats of hosts under way", preheats),
            ("tracker_preheat_hosts", "Hosts that ask for preheats", polling),
        ] {
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        client::tracker,
        http::Client,
        preheat::{Id, Report, State, Wanted},
    };
    use peer_proto::{
        PeerId,
        announce::{self, Blob, Node},
    };
    use serde_json::{Value, json};

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn request(n: u8, state: announce::State) -> announce::Request {
        let node = Node {
            id: PeerId::new([n; 20]),
            addr: SocketAddr::from(([10, 0, 0, n], 16001)),
            zone: "".into(),
            origin: false,
        };
        announce::Request { node, full: true, blobs: vec![Blob { digest: Digest::sha256([7; 32]), state }] }
    }

    async fn kraken(addr: &str, method: Method, path: &str, body: Value) -> (u16, String) {
        let uri = format!("http://{addr}{path}").parse().unwrap();
        let request = Client::request(method, uri).body(http::full(body.to_string())).unwrap();
        let answer = Client::default().send(request, TIMEOUT).await.unwrap();
        let status = answer.status().as_u16();
        let body = http::read_body(answer.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn both_protocols_share_one_swarm() {
        let (server, tracker) = harness::start().await;
        let addr = server.addr.to_string();
        let seeding = request(1, announce::State::Seeding { peers: 0 });
        let told = tracker.announce(&addr, &seeding).await.unwrap();
        assert!(told.blobs.is_empty());

        let info_hash = [9u8; 20];
        let peer =
            json!({ "peer_id": vec![2u8; 20], "ip": "10.0.0.2", "port": 16001, "origin": false, "complete": false });
        let asked = json!({
            "name": "07".repeat(32), "digest": format!("sha256:{}", "07".repeat(32)),
            "info_hash": info_hash, "peer": peer,
        });
        let path = format!("/announce/{}", "09".repeat(20));
        let (status, body) = kraken(&addr, Method::POST, &path, asked.clone()).await;
        assert_eq!(status, 200, "{body}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        let seeder =
            json!({ "peer_id": vec![1u8; 20], "ip": "10.0.0.1", "port": 16001, "origin": false, "complete": false });
        assert_eq!(answer, json!({ "peers": [seeder], "interval": 100_000_000 }));
        assert_eq!(kraken(&addr, Method::GET, "/announce", asked.clone()).await.0, 200);

        let leeching = request(3, announce::State::Leeching { have: 0, pieces: 4, peers: 0, want: 10 });
        let told = tracker.announce(&addr, &leeching).await.unwrap();
        let mut named: Vec<u8> = told.blobs[0].1.iter().map(|peer| peer.id.as_bytes()[0]).collect();
        named.sort_unstable();
        assert_eq!(named, [1, 2]);

        let mut done = asked.clone();
        done["peer"]["complete"] = true.into();
        let (status, body) = kraken(&addr, Method::POST, &path, done).await;
        assert_eq!((status, serde_json::from_str::<Value>(&body).unwrap()["peers"].clone()), (200, Value::Null));
    }

    #[tokio::test]
    async fn preheats_are_kept_and_handed_out() {
        let (server, tracker) = harness::start().await;
        let addr = server.addr.to_string();
        let task = Task {
            id: Id::draw(),
            image: "lib/app:1".into(),
            namespace: "lib/app".parse().unwrap(),
            blobs: vec![Wanted { digest: Digest::sha256([7; 32]), size: 5 }],
            label: None,
            left_ms: 60_000,
            again: false,
        };
        assert_eq!(tracker.preheated(&addr, &task.id).await, Err(tracker::Error::NotFound));
        tracker.preheat(&addr, &task).await.unwrap();
        tracker.preheat(&addr, &task).await.unwrap();
        let poll = Poll { host: SocketAddr::from(([10, 0, 0, 1], 1)), labels: Vec::new(), reports: Vec::new() };
        let orders = tracker.poll(&addr, &poll).await.unwrap();
        assert_eq!(orders.tasks.into_iter().map(|task| task.id).collect::<Vec<_>>(), [task.id]);
        let reports = vec![Report { id: task.id, state: State::Holding, bytes: 5 }];
        tracker.poll(&addr, &Poll { reports, ..poll }).await.unwrap();
        assert_eq!(tracker.preheated(&addr, &task.id).await.unwrap().to_string(), "1 of 1 hosts hold all layers");
        let none = tracker.preheat(&addr, &Task { blobs: Vec::new(), ..task.clone() }).await;
        let said = "a preheat has 1 to 1024 blobs, not 0";
        assert!(matches!(&none, Err(tracker::Error::Refused { message, .. }) if message == said), "{none:?}");
        let path = format!("/preheat/{}", Id::draw());
        assert_eq!(kraken(&addr, Method::PUT, &path, serde_json::to_value(&task).unwrap()).await.0, 400);
    }

    #[tokio::test]
    async fn nonsense_is_refused() {
        let (server, tracker) = harness::start().await;
        let addr = server.addr.to_string();
        for (method, path, status) in [
            (Method::POST, "/announce", 415),
            (Method::GET, "/announce", 500),
            (Method::POST, "/announce/xyz", 500),
            (Method::GET, "/namespace/a%2Fb/blobs/sha256:00/layout", 400),
            (Method::GET, "/namespace/../blobs/sha256:00/layout", 400),
            (Method::PUT, "/announce", 405),
            (Method::POST, "/preheat/poll", 400),
            (Method::GET, "/preheat/poll", 400),
            (Method::GET, "/preheat/0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f0", 404),
            (Method::PUT, "/preheat/0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f0", 400),
            (Method::DELETE, "/preheat/x", 405),
            (Method::GET, "/elsewhere", 404),
        ] {
            let (answered, body) = kraken(&addr, method.clone(), path, json!({})).await;
            assert_eq!(answered, status, "{method} {path}: {body}");
        }
        let asked = json!({
            "name": "07".repeat(32), "info_hash": vec![9u8; 20],
            "peer": { "peer_id": vec![2u8; 20], "ip": "10.0.0.2", "port": 1, "origin": false, "complete": false },
        });
        let other = format!("/announce/{}", "08".repeat(20));
        assert_eq!(kraken(&addr, Method::POST, &other, asked.clone()).await.0, 400);
        let alone = kraken(&addr, Method::GET, "/announce", asked).await;
        assert_eq!(alone, (500, "no peers available".into()));
        let unreachable = tracker.layout(&"ns".parse().unwrap(), &Digest::sha256([7; 32])).await;
        assert!(matches!(unreachable, Err(tracker::Error::Unreachable(_))), "{unreachable:?}");
    }
}
