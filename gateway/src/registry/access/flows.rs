//! What clients do to be let in, over real sockets: each as it asks, and what must not let anybody in.

use super::{
    super::{
        Relay, Rules, Service,
        harness::{Answer, Server, image},
        manifests::digest_of,
        memory::Memory,
    },
    Access, Action, Config, Rule, TokenConfig,
    keys::{Algorithm, Private},
    token::{self, Audience, Claims, Grant, Time},
};
use crate::{config::Span, http::Client};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use std::{path::PathBuf, sync::Arc, time::SystemTime};
use tempfile::TempDir;

const SERVICE: &str = "registry.test";

fn rule(repository: &str, users: &[&str], actions: &[Action]) -> Rule {
    let users = users.iter().map(|user| (*user).to_owned()).collect();
    Rule { repository: repository.into(), users, actions: actions.iter().copied().collect() }
}

fn basic(name: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{name}:{password}")))
}

fn tokens(signing_keys: Option<PathBuf>, trusted_keys: Option<PathBuf>, realm: Option<&str>) -> TokenConfig {
    let (service, issuer, life) = (SERVICE.into(), "issuer".into(), Span::secs(60));
    TokenConfig { service, issuer, signing_keys, trusted_keys, realm: realm.map(Into::into), life }
}

/// Files of names and keys, and the rules of the tests.
struct Fixture {
    dir: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let fixture = Self { dir: TempDir::new().unwrap() };
        let names = ["ann", "bob", "eve", "root"].map(|name| {
            let hash = bcrypt::hash(name, 4).unwrap();
            format!("{name}:{hash}\n")
        });
        std::fs::write(fixture.path("htpasswd"), names.concat()).unwrap();
        std::fs::create_dir(fixture.path("keys")).unwrap();
        fixture.key("keys/1.pem", Algorithm::Es256);
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn key(&self, name: &str, algorithm: Algorithm) -> Private {
        let pem = Private::generate(algorithm).unwrap();
        std::fs::write(self.path(name), &pem).unwrap();
        Private::parse(pem.as_bytes()).unwrap()
    }

    fn open(&self, tokens: TokenConfig) -> Arc<Access> {
        use Action::{Catalog, Create, Delete, Pull, Push};
        let rules = vec![
            rule("open/.*", &["anonymous"], &[Pull]),
            rule("team/.*", &["ann"], &[Pull, Push]),
            rule("team/.*", &["bob"], &[Pull, Create]),
            rule(".*", &["root"], &[Pull, Push, Delete, Catalog]),
        ];
        let htpasswd = tokens.signing_keys.as_ref().map(|_| self.path("htpasswd"));
        Access::open(Config { htpasswd, unrecorded: false, rules, tokens: Some(tokens) }).unwrap()
    }

    fn issuing(&self) -> Arc<Access> {
        self.open(tokens(Some(self.path("keys")), None, None))
    }
}

fn guarded(access: Arc<Access>) -> Arc<Service<Memory>> {
    Service::guarded(Memory::default(), Rules::default(), Some(access))
}

impl<S: crate::http::Service> Server<S> {
    async fn with(&self, authorization: &str, method: &str, path: &str) -> Answer {
        self.send(method, path, &[("authorization", authorization)], "").await
    }

    /// `Bearer` and the token that a name gets with this query.
    async fn bearer(&self, name: &str, query: &str) -> String {
        let path = format!("/token?service={SERVICE}&{query}");
        let answer = match name {
            "" => self.get(&path).await,
            name => self.with(&basic(name, name), "GET", &path).await,
        };
        assert_eq!(answer.status, 200, "{answer:?}");
        format!("Bearer {}", answer.json()["token"].as_str().unwrap())
    }
}

fn claims(bearer: &str) -> Value {
    let part = bearer.split('.').nth(1).unwrap();
    serde_json::from_slice(&base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test]
async fn refusals_say_where_a_token_is_had_and_which() {
    let fixture = Fixture::new();
    let server = Server::start(guarded(fixture.issuing())).await;
    let realm = format!("Bearer realm=\"http://{}/token\",service=\"{SERVICE}\"", server.addr);
    let digest = digest_of(peer_proto::Algorithm::Sha256, b"x");
    for (method, path, scope) in [
        ("GET", "/v2/".to_owned(), None),
        ("GET", "/v2/team/a/manifests/1".into(), Some("repository:team/a:pull")),
        ("HEAD", "/v2/team/a/manifests/1".into(), Some("repository:team/a:pull")),
        ("GET", "/v2/team/a/tags/list".into(), Some("repository:team/a:pull")),
        ("GET", format!("/v2/team/a/blobs/{digest}"), Some("repository:team/a:pull")),
        ("POST", "/v2/team/a/blobs/uploads/".into(), Some("repository:team/a:pull,push")),
        (
            "POST",
            format!("/v2/team/a/blobs/uploads/?mount={digest}&from=team/b"),
            Some("repository:team/a:pull,push repository:team/b:pull"),
        ),
        ("PUT", "/v2/team/a/manifests/1".into(), Some("repository:team/a:pull,push")),
        ("DELETE", "/v2/team/a/manifests/1".into(), Some("repository:team/a:delete")),
        ("GET", "/v2/_catalog".into(), Some("registry:catalog:*")),
    ] {
        let answer = server.send(method, &path, &[], "").await;
        let scope = scope.map(|scope| format!(",scope=\"{scope}\"")).unwrap_or_default();
        assert_eq!((answer.status, answer.header("www-authenticate")), (401, &*format!("{realm}{scope}")), "{path}");
        // With a token that is none, the client is told to get another.
        let answer = server.with("Bearer x", method, &path).await;
        let expected = format!("{realm}{scope},error=\"invalid_token\"");
        assert_eq!((answer.status, answer.header("www-authenticate")), (401, &*expected), "{path}");
        // With one that is not enough, a wider one.
        let narrow = server.bearer("root", "scope=repository:other:pull").await;
        let answer = server.with(&narrow, method, &path).await;
        let expected = format!("{realm}{scope},error=\"insufficient_scope\"");
        match path.as_str() {
            "/v2/" => assert_eq!(answer.status, 200),
            _ => assert_eq!((answer.status, answer.header("www-authenticate")), (401, &*expected), "{path}"),
        }
    }
    // Behind somebody who ends TLS, the address is the one that the client called.
    let forwarded = [("x-forwarded-proto", "https"), ("x-forwarded-host", "r.example")];
    let answer = server.send("GET", "/v2/", &forwarded, "").await;
    assert!(answer.header("www-authenticate").starts_with("Bearer realm=\"https://r.example/token\""), "{answer:?}");
    // Or the one that is configured.
    let configured = tokens(Some(fixture.path("keys")), None, Some("https://auth.example/token"));
    let server = Server::start(guarded(fixture.open(configured))).await;
    let answer = server.get("/v2/").await;
    assert!(answer.header("www-authenticate").starts_with("Bearer realm=\"https://auth.example/token\""), "{answer:?}");
}

#[tokio::test]
async fn each_client_gets_its_token() {
    let fixture = Fixture::new();
    let server = Server::start(guarded(fixture.issuing())).await;
    let granted = |answer: &Answer| claims(answer.json()["token"].as_str().unwrap())["access"].clone();
    let grant = |name: &str, actions: &[&str]| json!({"type": "repository", "name": name, "actions": actions});
    // skopeo, crane, regctl, docker: GET with Basic.
    for (name, query, expected) in [
        ("ann", "scope=repository:team/a:pull,push", json!([grant("team/a", &["pull", "push"])])),
        ("ann", "scope=repository%3Ateam%2Fa%3Apull", json!([grant("team/a", &["pull"])])),
        ("bob", "scope=repository:team/a:pull,push", json!([grant("team/a", &["pull", "create"])])),
        ("bob", "scope=repository:team/a:*", json!([grant("team/a", &["pull", "create"])])),
        ("eve", "scope=repository:team/a:pull,push", json!([])),
        (
            "ann",
            "account=ann&client_id=docker&scope=repository:team/a:pull&scope=repository:team/b:pull&scope=repository:team/a:push",
            json!([grant("team/a", &["pull", "push"]), grant("team/b", &["pull"])]),
        ),
        ("ann", "scope=repository:team/a:delete&scope=registry:catalog:*", json!([])),
        ("ann", "scope=repository:host:5000/team/a:pull&scope=nonsense&scope=", json!([])),
        ("root", "scope=registry:catalog:*", json!([{"type": "registry", "name": "catalog", "actions": ["*"]}])),
        ("root", "scope=repository:x:*", json!([grant("x", &["pull", "push", "delete"])])),
        // docker login.
        ("ann", "account=ann&client_id=docker&offline_token=true", json!([])),
        // Without a name.
        ("", "scope=repository:open/a:pull,push&scope=repository:team/a:pull", json!([grant("open/a", &["pull"])])),
    ] {
        let path = format!("/token?service={SERVICE}&{query}");
        let answer = match name {
            "" => server.get(&path).await,
            name => server.with(&basic(name, name), "GET", &path).await,
        };
        assert_eq!((answer.status, answer.header("cache-control")), (200, "no-store"), "{query}");
        let body = answer.json();
        assert_eq!((&body["token"], &body["expires_in"]), (&body["access_token"], &json!(60)));
        assert!(body.get("refresh_token").is_none() && body.get("issued_at").is_none());
        assert_eq!(granted(&answer), expected, "{name} {query}");
        let claims = claims(body["token"].as_str().unwrap());
        assert_eq!((&claims["iss"], &claims["aud"], &claims["sub"]), (&json!("issuer"), &json!(SERVICE), &json!(name)));
        assert_eq!(claims["exp"].as_u64().unwrap(), claims["nbf"].as_u64().unwrap() + 60);
    }
    // containerd: POST first.
    let form = |grant: &str, password: &str| {
        format!(
            "grant_type={grant}&service={SERVICE}&client_id=containerd-client&username=ann&password={password}&scope=\
             repository%3Ateam%2Fa%3Apull+repository%3Ateam%2Fb%3Apush"
        )
    };
    let answer = server.send("POST", "/token", &[], form("password", "ann")).await;
    assert_eq!(granted(&answer), json!([grant("team/a", &["pull"]), grant("team/b", &["push"])]));
    for (status, method, path, given, body) in [
        (401, "POST", "/token", "", form("password", "wrong")),
        (400, "POST", "/token", "", form("refresh_token", "ann")),
        (400, "POST", "/token", "", "grant_type=password".into()),
        (413, "POST", "/token", "", "x".repeat(40 << 10)),
        (405, "PUT", "/token", "", String::new()),
        (401, "GET", "/token", &*basic("ann", "wrong"), String::new()),
        (401, "GET", "/token", &basic("mallory", "x"), String::new()),
        (401, "GET", "/token", &server.bearer("ann", "").await, String::new()),
        (401, "GET", "/token", "Negotiate x", String::new()),
        (400, "GET", "/token?service=another", "", String::new()),
        (400, "GET", &format!("/token?{}", "scope=repository:a:pull&".repeat(51)), "", String::new()),
        (405, "POST", "/.well-known/jwks.json", "", String::new()),
    ] {
        let headers = [("authorization", given)];
        let answer = server.send(method, path, if given.is_empty() { &[] } else { &headers }, body).await;
        assert_eq!(answer.status, status, "{method} {path} {given}: {answer:?}");
        let asks = answer.header("www-authenticate");
        assert_eq!(asks, if status == 401 { "Basic realm=\"shoal\"" } else { "" }, "{method} {path}");
    }
    // As many scopes as can be asked for make a token that is taken.
    let name = format!("team/{}", "x".repeat(240));
    let many: Vec<String> = (0..50).map(|k| format!("scope=repository:{name}{k}:pull,push")).collect();
    let widest = server.bearer("ann", &many.join("&")).await;
    assert_eq!(server.with(&widest, "GET", &format!("/v2/{name}49/manifests/1")).await.status, 404, "{}", widest.len());
}

#[tokio::test]
async fn a_token_opens_what_it_was_given_for() {
    let fixture = Fixture::new();
    let server = Server::start(guarded(fixture.issuing())).await;
    let scope = "scope=repository:team/a:pull,push&scope=repository:team/b:pull,push";
    let (ann, bob) = (server.bearer("ann", scope).await, server.bearer("bob", scope).await);
    let push = async |given: &str, repository: &str, tag: &str, config: &'static str| {
        let digest = digest_of(peer_proto::Algorithm::Sha256, config.as_bytes());
        let path = format!("/v2/{repository}/blobs/uploads/?digest={digest}");
        let headers = [("authorization", given)];
        let blob = server.send("POST", &path, &headers, config).await.status;
        let body = serde_json::to_vec(&image(&digest, &[])).unwrap();
        (blob, server.send("PUT", &format!("/v2/{repository}/manifests/{tag}"), &headers, body).await.status)
    };
    assert_eq!(push(&ann, "team/a", "1", "{}").await, (201, 201));
    assert_eq!(push(&ann, "team/c", "1", "{}").await, (401, 401), "a token for other repositories");
    assert_eq!(push(&bob, "team/a", "1", "{ }").await, (201, 403), "no tag is moved with create alone");
    assert_eq!(push(&bob, "team/a", "2", "{ }").await, (201, 201));
    let reader = server.bearer("ann", "scope=repository:team/a:pull").await;
    assert_eq!(push(&reader, "team/a", "3", "{}").await, (401, 401));
    let lister = server.bearer("root", "scope=registry:catalog:*&scope=repository:team/a:delete").await;
    for (given, method, path, status) in [
        (&reader, "GET", "/v2/team/a/manifests/1", 200),
        (&reader, "GET", "/v2/team/b/manifests/1", 401),
        (&reader, "DELETE", "/v2/team/a/manifests/1", 401),
        (&reader, "GET", "/v2/_catalog", 401),
        (&reader, "GET", "/v2/open/x/manifests/1", 404),
        (&lister, "GET", "/v2/_catalog", 200),
        (&lister, "GET", "/v2/team/a/manifests/1", 401),
        (&lister, "DELETE", "/v2/team/a/manifests/1", 202),
        (&basic("ann", "ann"), "GET", "/v2/team/a/manifests/2", 200),
        (&basic("eve", "eve"), "GET", "/v2/team/a/manifests/2", 403),
        (&basic("eve", "eve"), "GET", "/v2/", 200),
    ] {
        let answer = server.with(given, method, path).await;
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
    }
    // A blob is mounted from where its holder may pull, and from nowhere else.
    let secret = digest_of(peer_proto::Algorithm::Sha256, b"secret");
    let headers = [("authorization", &*basic("root", "root"))];
    let path = format!("/v2/team/b/blobs/uploads/?digest={secret}");
    assert_eq!(server.send("POST", &path, &headers, "secret").await.status, 201);
    let path = format!("/v2/team/a/blobs/uploads/?mount={secret}&from=team/b");
    let writer = server.bearer("ann", "scope=repository:team/a:pull,push").await;
    assert_eq!(server.with(&writer, "POST", &path).await.status, 202, "to be uploaded");
    let pushes = server.bearer("ann", "scope=repository:team/a:push&scope=repository:team/b:push").await;
    assert_eq!(server.with(&pushes, "POST", &path).await.status, 202);
    assert_eq!(server.with(&ann, "POST", &path).await.status, 201);
}

#[tokio::test]
async fn agents_check_tokens_with_public_keys_alone() {
    let fixture = Fixture::new();
    let issuing = fixture.issuing();
    let proxy = Server::start(guarded(issuing.clone())).await;
    let published = proxy.get("/.well-known/jwks.json").await;
    assert_eq!((published.status, published.header("content-type")), (200, "application/jwk-set+json"));
    assert!(!published.body.windows(3).any(|part| part == b"\"d\""), "nothing private");
    std::fs::write(fixture.path("jwks.json"), &published.body).unwrap();
    let access = fixture.open(tokens(None, Some(fixture.path("jwks.json")), Some("https://proxy/token")));
    let agent = Server::start(guarded(access.clone())).await;
    let bearer = proxy.bearer("ann", "scope=repository:team/a:pull").await;
    assert_eq!(agent.with(&bearer, "GET", "/v2/team/a/manifests/1").await.status, 404, "allowed, but not there");
    assert_eq!(agent.with(&bearer, "GET", "/v2/team/b/manifests/1").await.status, 401);
    assert_eq!(agent.get("/v2/team/a/manifests/1").await.status, 401);
    assert_eq!(agent.with(&basic("ann", "ann"), "GET", "/v2/").await.status, 401, "it has no passwords");
    assert_eq!(agent.get("/token").await.status, 404);

    // Another key is put beside the first; agents hear of it before anything is signed with it.
    let next = fixture.key("keys/2.pem", Algorithm::EdDsa);
    assert!(issuing.reload().unwrap() && !issuing.reload().unwrap());
    let newer = proxy.bearer("ann", "scope=repository:team/a:pull").await;
    assert_eq!(
        agent.with(&newer, "GET", "/v2/team/a/manifests/1").await.status,
        401,
        "a key of which it has not heard"
    );
    assert_eq!(proxy.with(&bearer, "GET", "/v2/team/a/manifests/1").await.status, 404, "the old key is good");
    let both = proxy.get("/.well-known/jwks.json").await.body;
    std::fs::write(fixture.path("jwks.json"), &both).unwrap();
    assert!(access.reload().unwrap());
    for good in [&bearer, &newer] {
        assert_eq!(agent.with(good, "GET", "/v2/team/a/manifests/1").await.status, 404);
    }
    std::fs::write(fixture.path("jwks.json"), "{").unwrap();
    assert!(access.reload().is_err());
    assert_eq!(agent.with(&newer, "GET", "/v2/team/a/manifests/1").await.status, 404, "those before stay in force");
    std::fs::remove_file(fixture.path("keys/1.pem")).unwrap();
    assert!(issuing.reload().unwrap());
    assert_eq!(proxy.with(&bearer, "GET", "/v2/team/a/manifests/1").await.status, 401, "its key is gone");

    // Somebody else's tokens, of the same form.
    let claims = |change: &dyn Fn(&mut Claims)| {
        let grant = Grant { kind: "repository".into(), name: "team/a".into(), actions: vec!["*".into()] };
        let mut claims = Claims {
            iss: "issuer".into(),
            sub: "carl".into(),
            aud: Audience::Many(vec![SERVICE.into()]),
            exp: Time::Whole(now() + 60),
            nbf: None,
            iat: None,
            jti: None,
            access: Some(vec![grant]),
        };
        change(&mut claims);
        claims
    };
    let foreign = Private::parse(Private::generate(Algorithm::Es256).unwrap().as_bytes()).unwrap();
    let old = fixture.key("old.pem", Algorithm::Es256);
    type Change = Box<dyn Fn(&mut Claims)>;
    let cases: Vec<(&str, &Private, Change, u16)> = vec![
        ("as it should be", &next, Box::new(|_| ()), 404),
        ("a foreign key", &foreign, Box::new(|_| ()), 401),
        ("an unknown key", &old, Box::new(|_| ()), 401),
        ("wrong issuer", &next, Box::new(|claims| claims.iss = "another".into()), 401),
        ("wrong audience", &next, Box::new(|claims| claims.aud = Audience::One("another".into())), 401),
        ("expired", &next, Box::new(|claims| claims.exp = Time::Whole(now() - 60)), 401),
        ("not yet valid", &next, Box::new(|claims| claims.nbf = Some(Time::Whole(now() + 120))), 401),
        ("nothing allowed", &next, Box::new(|claims| claims.access = None), 401),
        ("another type", &next, Box::new(|claims| claims.access.as_mut().unwrap()[0].kind = "user".into()), 401),
    ];
    for (what, key, change, status) in cases {
        let bearer = format!("Bearer {}", token::sign(key, &claims(&*change)).unwrap());
        for path in ["/v2/team/a/manifests/1", "/v2/team/a/tags/list"] {
            assert_eq!(agent.with(&bearer, "GET", path).await.status, status, "{what}");
        }
    }
    let mut figures = prometheus_client::registry::Registry::default();
    access.register(&mut figures);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &figures).unwrap();
    for why in ["key", "issuer", "audience", "expired", "early"] {
        assert!(text.contains(&format!("access_refused_total{{why=\"token_{why}\"}}")), "{why}: {text}");
    }
}

#[tokio::test]
async fn a_host_gets_its_token_and_pushes_at_its_agent() {
    let fixture = Fixture::new();
    let proxy = Server::start(guarded(fixture.issuing())).await;
    std::fs::write(fixture.path("jwks.json"), proxy.get("/.well-known/jwks.json").await.body).unwrap();
    let access = fixture.open(tokens(None, Some(fixture.path("jwks.json")), None));
    let relay = Relay::new(guarded(access), Some((proxy.addr.into(), Client::default())));
    let agent = Server::start(relay).await;
    // Whichever of the two refuses, the client is sent to the one address that it knows.
    let realm = format!("Bearer realm=\"http://{}/token\"", agent.addr);
    for (method, path) in [("GET", "/v2/"), ("GET", "/v2/team/a/manifests/1"), ("POST", "/v2/team/a/blobs/uploads/")] {
        let answer = agent.send(method, path, &[], "").await;
        assert_eq!(answer.status, 401);
        assert!(answer.header("www-authenticate").starts_with(&realm), "{method} {path}: {answer:?}");
    }
    let bearer = agent.bearer("ann", "scope=repository:team/a:pull,push").await;
    assert_eq!(agent.with(&bearer, "POST", "/v2/team/a/blobs/uploads/").await.status, 202);
    assert_eq!(agent.with(&bearer, "GET", "/v2/team/a/manifests/1").await.status, 404);
    assert_eq!(agent.with(&bearer, "POST", "/v2/team/b/blobs/uploads/").await.status, 401);
    let form = "grant_type=password&username=ann&password=ann&scope=repository:team/a:push";
    assert_eq!(agent.send("POST", "/token", &[], form).await.status, 200);
    assert_eq!(agent.with(&basic("ann", "no"), "GET", "/token").await.status, 401);
    // One that issues tokens itself asks nobody.
    let relay = Relay::new(
        guarded(fixture.issuing()),
        Some((std::net::SocketAddr::from(([127, 0, 0, 1], 9)).into(), Client::default())),
    );
    let alone = Server::start(relay).await;
    alone.bearer("ann", "scope=repository:team/a:pull").await;
}

/// A registry whose clients have shown certificates with these names, as listeners that speak TLS note them.
struct Shown(Arc<Service<Memory>>, Vec<String>);

impl crate::http::Service for Shown {
    async fn answer(self: Arc<Self>, mut request: crate::http::Request) -> crate::http::Response {
        let names = self.1.clone().into();
        request.extensions_mut().insert(crate::http::server::Peer { secure: true, names });
        self.0.clone().answer(request).await
    }
}

#[tokio::test]
async fn certificates_are_names() {
    use Action::{Pull, Push};
    let fixture = Fixture::new();
    let rules = vec![
        rule("open/.*", &["anonymous"], &[Pull]),
        rule("hosts/.*", &["cert:host.example", "cert:spiffe://a/b"], &[Pull]),
        rule("ci/.*", &["cert:ci"], &[Pull, Push]),
        rule("team/.*", &["ann"], &[Pull]),
    ];
    let open =
        |htpasswd, tokens| Access::open(Config { htpasswd, unrecorded: false, rules: rules.clone(), tokens }).unwrap();
    let with_tokens = open(Some(fixture.path("htpasswd")), Some(tokens(Some(fixture.path("keys")), None, None)));
    let alone = open(None, None);
    for (access, names, expected) in [
        // /v2/, open/a, hosts/a, ci/a, team/a
        (&with_tokens, &["spiffe://a/b", "other"][..], [200, 404, 404, 401, 401]),
        (&with_tokens, &["ci"], [200, 404, 401, 404, 401]),
        (&with_tokens, &["unheard-of"], [401, 404, 401, 401, 401]),
        (&with_tokens, &["cert:ci"], [401, 404, 401, 401, 401]),
        (&with_tokens, &["ann"], [401, 404, 401, 401, 401]),
        (&with_tokens, &[], [401, 404, 401, 401, 401]),
        (&alone, &["host.example"], [200, 404, 404, 403, 403]),
        (&alone, &["unheard-of"], [200, 404, 403, 403, 403]),
        (&alone, &[], [200, 404, 403, 403, 403]),
    ] {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let server = Server::start(Arc::new(Shown(guarded(access.clone()), names.clone()))).await;
        let mut statuses = Vec::new();
        for repository in ["open/a", "hosts/a", "ci/a", "team/a"] {
            statuses.push(server.get(&format!("/v2/{repository}/manifests/1")).await.status);
        }
        statuses.insert(0, server.get("/v2/").await.status);
        assert_eq!(statuses, expected, "{names:?}");
    }
    // What a request says goes before what its connection does; and a token is had for a certificate.
    let server = Server::start(Arc::new(Shown(guarded(with_tokens), vec!["ci".into()]))).await;
    assert_eq!(server.with(&basic("ann", "ann"), "GET", "/v2/team/a/manifests/1").await.status, 404);
    assert_eq!(server.with(&basic("ann", "ann"), "GET", "/v2/ci/a/manifests/1").await.status, 403);
    assert_eq!(server.with(&basic("ann", "no"), "GET", "/v2/ci/a/manifests/1").await.status, 401);
    let bearer = server.bearer("", "scope=repository:ci/a:pull,push&scope=repository:team/a:pull").await;
    assert_eq!(claims(&bearer)["sub"], "cert:ci");
    assert_eq!(claims(&bearer)["access"].as_array().unwrap().len(), 1);
    assert!(
        server.get("/v2/team/a/manifests/1").await.header("www-authenticate").starts_with("Bearer realm=\"https://")
    );
}

#[test]
fn what_cannot_be_is_named_before_the_start() {
    let fixture = Fixture::new();
    std::fs::write(fixture.path("bad.pem"), "bad").unwrap();
    let (keys, bad) = (Some(fixture.path("keys")), Some(fixture.path("bad.pem")));
    let good = tokens(keys.clone(), None, None);
    for (config, said) in [
        (TokenConfig { signing_keys: None, ..good.clone() }, "tokens.trusted_keys: "),
        (TokenConfig { signing_keys: bad.clone(), ..good.clone() }, "bad.pem: must be an ES256"),
        (TokenConfig { trusted_keys: bad, ..good.clone() }, "bad.pem: no public key"),
        (TokenConfig { trusted_keys: Some("/nowhere".into()), ..good.clone() }, "keys of tokens: /nowhere: "),
        (TokenConfig { realm: Some("auth.example".into()), ..good.clone() }, "tokens.realm: "),
        (TokenConfig { realm: Some("https://a/\"".into()), ..good.clone() }, "tokens.realm: "),
        (TokenConfig { service: "a\"b".into(), ..good.clone() }, "tokens.service: "),
        (TokenConfig { issuer: String::new(), ..good.clone() }, "tokens.issuer: "),
        (TokenConfig { life: Span::secs(1), ..good.clone() }, "tokens.life: must be 60s to 86400s, not 1s"),
    ] {
        let config = Config { htpasswd: None, unrecorded: false, rules: Vec::new(), tokens: Some(config) };
        let why = Access::open(config).err().unwrap().to_string();
        assert!(why.contains(said), "{why}");
    }
}
