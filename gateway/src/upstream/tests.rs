//! Our clients of upstreams before a real registry with a gate that does what registries on the internet do.

use super::*;
use crate::{
    http::{self, Request, Response},
    registry::{
        self, Rules,
        harness::{NOWHERE, Server, image},
        memory::Memory,
    },
};
use bytes::Bytes;
use futures_util::TryStreamExt;
use hyper::{
    Method, StatusCode,
    header::{self, HeaderValue},
};
use peer_proto::Digest;
use std::{
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

/// What a gate does with requests.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Open,
    /// Basic, `ann` with `pw`.
    Basic,
    /// Tokens, which the gate itself gives out; each is good for so many requests.
    Bearer {
        uses: usize,
    },
    /// 429 and this `Retry-After`.
    Limited(&'static str),
    /// Blobs are elsewhere.
    Redirect(SocketAddr),
    Broken,
}

/// A registry behind a gate.
pub(crate) struct Gate {
    registry: Arc<registry::Service<Memory>>,
    mode: Mutex<Mode>,
    /// Requests that came: method, path and whether they had an authorization.
    seen: Mutex<Vec<String>>,
    addr: Mutex<Option<SocketAddr>>,
    tokens: AtomicUsize,
    /// Uses left of the last token.
    left: AtomicUsize,
}

impl Gate {
    pub(crate) async fn start(mode: Mode) -> Server<Self> {
        let gate = Self {
            registry: registry::Service::new(Memory::default(), Rules::default()),
            mode: Mutex::new(Mode::Open),
            seen: Mutex::default(),
            addr: Mutex::default(),
            tokens: AtomicUsize::new(0),
            left: AtomicUsize::new(0),
        };
        let server = Server::start(Arc::new(gate)).await;
        *server.service.addr.lock().unwrap() = Some(server.addr);
        server.service.set(mode);
        server
    }

    pub(crate) fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    /// What came since this was asked last.
    pub(crate) fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    fn token(&self, request: &Request) -> Response {
        let authorized = request.headers().get(header::AUTHORIZATION).is_some_and(|value| value == BASIC);
        let query = request.uri().query().unwrap_or_default();
        if !authorized || !query.contains("service=gate") || !query.contains("scope=repository:") {
            return http::status(StatusCode::UNAUTHORIZED);
        }
        let Mode::Bearer { uses } = *self.mode.lock().unwrap() else { return http::status(StatusCode::NOT_FOUND) };
        self.left.store(uses, SeqCst);
        let token = format!("t{}", self.tokens.fetch_add(1, SeqCst) + 1);
        http::json(StatusCode::OK, &serde_json::json!({ "token": token, "expires_in": 300 }))
    }

    fn refusal(&self, request: &Request) -> Option<Response> {
        let given = request.headers().get(header::AUTHORIZATION);
        let challenge = |text: String| {
            let mut response = http::status(StatusCode::UNAUTHORIZED);
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::try_from(text).unwrap());
            Some(response)
        };
        match &*self.mode.lock().unwrap() {
            Mode::Open => None,
            Mode::Basic if given.is_some_and(|value| value == BASIC) => None,
            Mode::Basic => challenge("Basic realm=\"gate\"".into()),
            Mode::Bearer { .. } => {
                let token = format!("Bearer t{}", self.tokens.load(SeqCst));
                let good = given.is_some_and(|value| value == token.as_str())
                    && self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
                let addr = self.addr.lock().unwrap().unwrap();
                let scope = "repository:some/name:pull";
                let text = format!("Bearer realm=\"http://{addr}/token\",service=\"gate\",scope=\"{scope}\"");
                if good { None } else { challenge(text) }
            }
            Mode::Limited(after) => {
                let mut response = http::status(StatusCode::TOO_MANY_REQUESTS);
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(after));
                Some(response)
            }
            Mode::Redirect(to) if request.uri().path().contains("/blobs/") => {
                let mut response = http::status(StatusCode::TEMPORARY_REDIRECT);
                let location = format!("http://{to}{}", request.uri().path());
                response.headers_mut().insert(header::LOCATION, HeaderValue::try_from(location).unwrap());
                Some(response)
            }
            Mode::Redirect(_) => None,
            Mode::Broken => Some(http::status(StatusCode::BAD_GATEWAY)),
        }
    }
}

/// `ann:pw`
const BASIC: &str = "Basic YW5uOnB3";

impl http::Service for Gate {
    async fn answer(self: Arc<Self>, mut request: Request) -> Response {
        let known = if request.headers().contains_key(header::AUTHORIZATION) { " authorized" } else { "" };
        let line = format!("{} {}{known}", request.method(), request.uri().path());
        self.seen.lock().unwrap().push(line);
        if request.uri().path() == "/token" {
            return self.token(&request);
        }
        // The test itself pushes through the gate.
        let read = matches!(*request.method(), Method::GET | Method::HEAD);
        let mut response = match self.refusal(&request).filter(|_| read) {
            Some(refusal) => refusal,
            None => {
                request.headers_mut().remove(header::AUTHORIZATION);
                self.registry.clone().answer(request).await
            }
        };
        response.headers_mut().insert("docker-distribution-api-version", HeaderValue::from_static("registry/2.0"));
        response
    }
}

/// An upstream at this address, with `more` in its configuration.
pub(crate) fn upstreams(addr: SocketAddr, more: &str, fallback: Option<&str>) -> Upstreams {
    let config = format!("name = \"up.example\"\nurls = [\"http://{addr}\"]\n{more}");
    Upstreams::open(&[toml::from_str(&config).unwrap()], fallback).unwrap()
}

fn named(upstreams: &Upstreams, repository: &str) -> Repository {
    upstreams.find(&format!("up.example/{repository}").parse().unwrap()).unwrap()
}

fn with_password(dir: &tempfile::TempDir, password: &str) -> String {
    let file = dir.path().join("password");
    std::fs::write(&file, password).unwrap();
    format!("credentials = {{ kind = \"basic\", username = \"ann\", password_file = {file:?} }}")
}

/// Pushes an image of one layer; the digests of its manifest and its layer.
pub(crate) async fn push(
    gate: &Server<Gate>,
    repository: &str,
    tag: &str,
    layer: impl Into<Bytes>,
) -> (Digest, Digest) {
    let config = gate.push(repository, "{}").await;
    let layer = gate.push(repository, layer).await;
    let answer = gate.put_manifest(&format!("/v2/{repository}/manifests/{tag}"), &image(&config, &[layer])).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    gate.service.seen();
    (answer.header("docker-content-digest").parse().unwrap(), layer)
}

async fn read(repository: &Repository, digest: &Digest, kind: Kind, from: u64) -> Bytes {
    let object = repository.read(digest, kind, from).await.unwrap_or_else(|error| panic!("{error}"));
    let parts: Vec<Bytes> = object.bytes.try_collect().await.unwrap();
    parts.concat().into()
}

#[tokio::test]
async fn what_an_upstream_has_is_told_and_read() {
    let gate = Gate::start(Mode::Open).await;
    let content = registry::harness::bytes(200_000);
    let (manifest, layer) = push(&gate, "lib/app", "1", content.clone()).await;
    let all = upstreams(gate.addr, "", None);
    let repository = named(&all, "lib/app");
    assert_eq!(repository.resolve(&"1".parse().unwrap()).await, Ok(manifest));
    assert_eq!(repository.resolve(&"2".parse().unwrap()).await, Err(Error::NotFound));
    assert_eq!(repository.stat(&layer).await, Ok(Stat { size: 200_000, kind: Kind::Blob }));
    assert_eq!(repository.stat(&manifest).await.map(|stat| stat.size > 0), Ok(true));
    assert_eq!(repository.stat(&NOWHERE.parse().unwrap()).await, Err(Error::NotFound));
    assert!(read(&repository, &layer, Kind::Blob, 0).await == content);
    assert!(read(&repository, &layer, Kind::Blob, 150_000).await == content.slice(150_000..));
    assert!(!read(&repository, &manifest, Kind::Manifest, 0).await.is_empty());
    let page = |n, last: Option<&str>| registry::Page { n, last: last.map(Into::into) };
    push(&gate, "lib/app", "2", "x").await;
    push(&gate, "lib/app", "3", "y").await;
    let tags = repository.tags(&page(2, None)).await.unwrap();
    assert_eq!((tags.items, tags.more), (vec!["1".to_owned(), "2".into()], true));
    assert_eq!(repository.tags(&page(2, Some("2"))).await.unwrap().items, ["3"]);
    let about = repository.referrers(&manifest, &page(10, None)).await.unwrap();
    assert_eq!((about.items, about.more), (Vec::new(), false));

    // Blobs may be elsewhere, where nobody is told who we are.
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = Gate::start(Mode::Open).await;
    push(&elsewhere, "lib/app", "1", content.clone()).await;
    gate.service.set(Mode::Basic);
    let ours = upstreams(gate.addr, &with_password(&dir, "pw"), None);
    let repository = named(&ours, "lib/app");
    assert_eq!(repository.resolve(&"1".parse().unwrap()).await, Ok(manifest));
    gate.service.set(Mode::Redirect(elsewhere.addr));
    gate.service.seen();
    assert!(read(&repository, &layer, Kind::Blob, 100).await == content.slice(100..));
    let path = format!("GET /v2/lib/app/blobs/{layer}");
    assert_eq!((gate.service.seen(), elsewhere.service.seen()), (vec![format!("{path} authorized")], vec![path]));
}

#[tokio::test]
async fn names_and_tokens_are_given_where_they_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let tag = "1".parse().unwrap();
    for (mode, first, then) in [
        (Mode::Basic, 2, 1),
        // Challenged, a token fetched, answered; then with the same token.
        (Mode::Bearer { uses: 100 }, 3, 1),
        // Each token is refused when it is used again, and another is fetched.
        (Mode::Bearer { uses: 1 }, 3, 3),
    ] {
        let gate = Gate::start(mode.clone()).await;
        let (manifest, _) = push(&gate, "some/name", "1", "layer").await;
        let ann = upstreams(gate.addr, &with_password(&dir, "pw"), None);
        let repository = named(&ann, "some/name");
        for requests in [first, then, then] {
            assert_eq!(repository.resolve(&tag).await, Ok(manifest), "{mode:?}");
            let seen = gate.service.seen();
            assert_eq!(seen.len(), requests, "{mode:?}: {seen:?}");
        }
        for nobody in [String::new(), with_password(&dir, "wrong")] {
            let upstreams = upstreams(gate.addr, &nobody, None);
            let answer = named(&upstreams, "some/name").resolve(&tag).await;
            assert!(matches!(answer, Err(Error::Denied(_))), "{mode:?} {nobody}: {answer:?}");
        }
    }
}

#[tokio::test]
async fn limits_are_kept_and_outages_told() {
    let gate = Gate::start(Mode::Limited("3600")).await;
    let (manifest, _) = push(&gate, "a", "1", "layer").await;
    let all = upstreams(gate.addr, "", None);
    let (tag, repository) = ("1".parse().unwrap(), named(&all, "a"));
    for requests in [1, 0, 0] {
        assert!(matches!(repository.resolve(&tag).await, Err(Error::Limited { after, .. }) if after.as_secs() > 590));
        assert_eq!(gate.service.seen().len(), requests, "asked although told to wait");
    }
    // A short while is waited for.
    let others = upstreams(gate.addr, "", None);
    gate.service.set(Mode::Limited("1"));
    assert!(named(&others, "a").resolve(&tag).await.is_err());
    gate.service.set(Mode::Open);
    assert_eq!(named(&others, "a").resolve(&tag).await, Ok(manifest));

    // The next address answers where the first is gone or broken.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let broken = Gate::start(Mode::Broken).await;
    for (first, unanswered) in [(gone, 0), (broken.addr, 2)] {
        let config = format!("name = \"up.example\"\nurls = [\"http://{first}\", \"http://{}\"]", gate.addr);
        let both = Upstreams::open(&[toml::from_str(&config).unwrap()], None).unwrap();
        for _ in 0..2 {
            assert_eq!(named(&both, "a").resolve(&tag).await, Ok(manifest));
        }
        assert_eq!(broken.service.seen().len(), unanswered);
    }
}

#[test]
fn namespaces_stand_for_repositories_of_upstreams() {
    let configs = ["name = \"docker.io\"", "name = \"r.example:5000\""].map(|text| toml::from_str(text).unwrap());
    let upstreams = Upstreams::open(&configs, Some("docker.io")).unwrap();
    let named = |namespace: &str| upstreams.find(&namespace.parse().unwrap()).and_then(|found| found.namespace());
    let fallback =
        |namespace: &str| upstreams.fallback(&namespace.parse().unwrap()).and_then(|found| found.namespace());
    let text = |namespace: Option<Namespace>| namespace.map(|namespace| namespace.to_string());
    assert_eq!(text(named("docker.io/library/x")).as_deref(), Some("docker.io/library/x"));
    assert_eq!(text(named("docker.io/x")).as_deref(), Some("docker.io/library/x"));
    assert_eq!(text(named("r.example-5000/x")).as_deref(), Some("r.example-5000/x"));
    for own in ["docker.io", "docker.iox/a", "lib/docker.io/x"] {
        assert!(named(own).is_none(), "{own}");
    }
    assert_eq!(text(fallback("x")).as_deref(), Some("docker.io/library/x"));
    assert_eq!(text(fallback("lib/app")).as_deref(), Some("docker.io/lib/app"));
    assert_eq!(text(fallback("r.example-5000/x")), None);
}
