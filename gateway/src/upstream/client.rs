//! One upstream, asked by us: which of its addresses, with which authorization, and when not at all.
//!
//! A limit that it sets (429, or 503 with a time) is kept by everybody who asks through this client: until then nothing is asked.
//! An address that is not reached is left alone for some seconds, so that an outage is told at once.

use super::{
    Config, Freshness,
    credentials::Credentials,
    token::{self, Challenge, Tokens},
};
use crate::{
    http::{self, Client, encode_segment},
    registry::{
        Listing, Page, Tag,
        manifest::{self, Kind as ManifestKind},
        manifests::digest_of,
    },
};
use bytes::Bytes;
use futures_util::{StreamExt, stream::BoxStream};
use http_body_util::BodyDataStream;
use hyper::{
    Method, Response, StatusCode, Uri,
    body::Incoming,
    header::{self, HeaderMap, HeaderName, HeaderValue},
};
use peer_proto::{Algorithm, Digest, Namespace};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use serde::Deserialize;
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Longest wait for the head of an answer to a question.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the head of an answer with content: some registries fetch it from elsewhere first.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an address that was not reached is left alone.
const DOWN_TIME: Duration = Duration::from_secs(3);
/// How long nothing is asked where a limit is reached that says no time.
const QUIET_DEFAULT: Duration = Duration::from_secs(10);
/// Longest time that nothing is asked, whatever the limit says: it may be lifted.
const QUIET_MAX: Duration = Duration::from_secs(600);
/// The rest of such a time that is waited for.
const QUIET_WAIT: Duration = Duration::from_secs(2);
/// Most redirects followed for one request.
const REDIRECTS_MAX: usize = 5;
/// Longest list taken, bytes.
const LIST_LEN_MAX: usize = 16 << 20;
/// The digest of what an answer is about.
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Why there can be no such upstream.
#[derive(Debug, thiserror::Error)]
#[error("upstream {name}: {why}")]
pub struct Invalid {
    name: String,
    why: String,
}

/// Why an upstream, or all of its addresses, did not give what was asked for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// It has no such thing.
    #[error("upstream does not have it")]
    NotFound,
    /// It does not let us.
    #[error("{0}")]
    Denied(String),
    /// It cannot be asked now.
    #[error("{0}")]
    Unavailable(String),
    /// Its limit for us is reached.
    #[error("{why}")]
    Limited {
        /// Which of its addresses said so of what.
        why: String,
        /// When it may be asked again.
        after: Duration,
    },
    /// An answer that cannot be.
    #[error("{0}")]
    Answer(String),
}

/// What content is to an upstream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A blob.
    Blob,
    /// A manifest.
    Manifest,
}

/// Content that an upstream has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stat {
    /// Its bytes.
    pub size: u64,
    /// What it is.
    pub kind: Kind,
}

/// Content on its way from an upstream.
pub struct Object {
    /// All its bytes, where the upstream says.
    pub size: Option<u64>,
    /// Those asked for.
    pub bytes: BoxStream<'static, Result<Bytes, String>>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct Asked {
    upstream: String,
    result: &'static str,
}

/// What upstreams were asked.
pub(super) type Figures = Family<Asked, Counter>;

/// A registry that is mirrored.
pub struct Upstream {
    name: String,
    prefix: String,
    library: bool,
    freshness: Freshness,
    hosts: Vec<Host>,
    credentials: Credentials,
    tokens: Tokens,
    /// Held by whoever fetches a token.
    fetching: tokio::sync::Mutex<()>,
    http: Client,
    figures: Figures,
}

/// One address of it.
struct Host {
    /// Scheme and authority.
    base: String,
    secure: bool,
    /// It asks for names and passwords, not for tokens.
    basic: AtomicBool,
    silence: Mutex<Silence>,
}

/// Until when, and why, an address is not asked.
#[derive(Clone, Copy, Default)]
struct Silence {
    down: Option<Instant>,
    quiet: Option<Instant>,
}

impl Host {
    fn silence(&self) -> MutexGuard<'_, Silence> {
        self.silence.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Scheme and authority of an upstream's address; what is wrong with it otherwise.
pub(super) fn base(url: &str) -> Result<String, String> {
    let uri: Uri = url.parse().map_err(|_| format!("{url:?} is no address"))?;
    match (uri.scheme_str(), uri.authority(), uri.path()) {
        (Some(scheme @ ("http" | "https")), Some(authority), "" | "/") if uri.query().is_none() => {
            Ok(format!("{scheme}://{authority}"))
        }
        _ => Err(format!("{url:?} must be http:// or https:// and a host, without a path: /v2/ is added")),
    }
}

/// What we ask for, wherever it is.
struct Question<'a> {
    method: Method,
    /// Below `/v2/<repository>/`.
    path: &'a str,
    accept: Option<String>,
    /// Only what comes from here on.
    from: u64,
    timeout: Duration,
}

impl<'a> Question<'a> {
    fn new(method: Method, path: &'a str) -> Self {
        Self { method, path, accept: None, from: 0, timeout: ASK_TIMEOUT }
    }

    fn manifest(method: Method, path: &'a str) -> Self {
        let accept = ManifestKind::ALL.map(ManifestKind::media_type).join(", ");
        Self { accept: Some(accept), ..Self::new(method, path) }
    }
}

impl Upstream {
    /// A client of it; nobody is asked yet. Blocks on files.
    pub(super) fn open(config: &Config, figures: Figures) -> Result<Arc<Self>, Invalid> {
        let invalid = |why: String| Invalid { name: config.name.clone(), why };
        let host = |url: String| {
            let base = base(&url).map_err(invalid)?;
            let secure = base.starts_with("https:");
            Ok(Host { base, secure, basic: AtomicBool::new(false), silence: Mutex::default() })
        };
        let tls = http::tls::trusting_system(config.ca.as_deref()).map_err(|error| invalid(error.to_string()))?;
        Ok(Arc::new(Self {
            name: config.name.clone(),
            prefix: config.prefix(),
            library: config.has_library(),
            freshness: config.freshness,
            hosts: config.urls().into_iter().map(host).collect::<Result<_, _>>()?,
            credentials: Credentials::new(config.credentials.clone(), &config.name),
            tokens: Tokens::default(),
            fetching: tokio::sync::Mutex::default(),
            http: Client::outside(tls),
            figures,
        }))
    }

    /// What clients call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The first component of its repositories' names here.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// How old its tags may be.
    pub fn freshness(&self) -> Freshness {
        self.freshness
    }

    /// Asks its addresses, those that were not reached lately last, until one says something.
    async fn ask(&self, repository: &str, question: &Question<'_>) -> Result<Response<Incoming>, Error> {
        let answer = self.ask_all(repository, question).await;
        let result = match &answer {
            Ok(_) => "ok",
            Err(Error::NotFound) => "unknown",
            Err(Error::Denied(_)) => "denied",
            Err(Error::Unavailable(_)) => "unavailable",
            Err(Error::Limited { .. }) => "limited",
            Err(Error::Answer(_)) => "odd",
        };
        self.figures.get_or_create(&Asked { upstream: self.name.clone(), result }).inc();
        answer
    }

    async fn ask_all(&self, repository: &str, question: &Question<'_>) -> Result<Response<Incoming>, Error> {
        let (mut failures, mut limited) = (Vec::new(), None::<Duration>);
        for host in &self.hosts {
            match self.ask_one(host, repository, question).await {
                Err(Error::Unavailable(why)) => failures.push(why),
                Err(Error::Limited { why, after }) => {
                    failures.push(why);
                    limited = Some(limited.map_or(after, |other| other.min(after)));
                }
                answer => return answer,
            }
        }
        let why = failures.join("; ");
        Err(match limited {
            Some(after) => Error::Limited { why, after },
            None => Error::Unavailable(why),
        })
    }

    async fn ask_one(
        &self,
        host: &Host,
        repository: &str,
        question: &Question<'_>,
    ) -> Result<Response<Incoming>, Error> {
        let unavailable = |why: String| Error::Unavailable(format!("{}: {why}", host.base));
        let limited = |why: String, after| Error::Limited { why: format!("{}: {why}", host.base), after };
        let now = Instant::now();
        let Silence { down, quiet } = *host.silence();
        if down.is_some_and(|until| now < until) {
            return Err(unavailable("was not reached some seconds ago".into()));
        }
        if let Some(left) = quiet.map(|until| until.saturating_duration_since(now)).filter(|left| !left.is_zero()) {
            if left > QUIET_WAIT {
                return Err(limited(format!("its limit is reached, for {} s still", left.as_secs() + 1), left));
            }
            tokio::time::sleep(left).await;
        }
        let answer = self.authorized(host, repository, question).await?;
        let status = answer.status();
        let path = question.path;
        match status {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(answer),
            StatusCode::NOT_FOUND => Err(Error::NotFound),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(Error::Denied(format!("{}: {status} for {repository}/{path}", host.base)))
            }
            status if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() => {
                let why = format!("{status} for {repository}/{path}");
                let default = (status == StatusCode::TOO_MANY_REQUESTS).then_some(QUIET_DEFAULT);
                let Some(quiet) = http::retried_after(answer.headers()).or(default).map(|quiet| quiet.min(QUIET_MAX))
                else {
                    return Err(unavailable(why));
                };
                host.silence().quiet = Some(Instant::now() + quiet);
                tracing::warn!(upstream = self.name, host = host.base, %status, ?quiet, "asked to wait");
                Err(limited(why, quiet))
            }
            status => Err(Error::Answer(format!("{}: {status} for {repository}/{path}", host.base))),
        }
    }

    /// Asks with what authorization there is, and once more with that which a 401 asks for.
    async fn authorized(
        &self,
        host: &Host,
        repository: &str,
        question: &Question<'_>,
    ) -> Result<Response<Incoming>, Error> {
        let mut authorization = match self.tokens.get(repository) {
            Some(token) => Some(token),
            None if host.basic.load(Ordering::Relaxed) => self.basic().await?,
            None => None,
        };
        let answer = self.follow(host, repository, question, authorization.clone()).await?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        let Some(challenge) = Challenge::of(answer.headers()) else { return Ok(answer) };
        if authorization.is_some() {
            self.credentials.forget().await;
        }
        authorization = match &challenge {
            Challenge::Basic => {
                host.basic.store(true, Ordering::Relaxed);
                self.basic().await?
            }
            Challenge::Bearer { realm, .. } => {
                if host.secure && !realm.starts_with("https://") {
                    return Err(Error::Denied(format!("{}: its token service {realm} is not secure", host.base)));
                }
                Some(self.token(repository, &challenge, authorization.as_ref()).await?)
            }
        };
        if authorization.is_none() { Ok(answer) } else { self.follow(host, repository, question, authorization).await }
    }

    async fn basic(&self) -> Result<Option<HeaderValue>, Error> {
        let secret = self.credentials.secret().await.map_err(|error| Error::Denied(error.to_string()))?;
        let Some(basic) = secret.and_then(|secret| secret.basic()) else { return Ok(None) };
        let mut value = HeaderValue::try_from(basic).map_err(|error| Error::Denied(error.to_string()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    /// A token other than the one that was refused.
    async fn token(
        &self,
        repository: &str,
        challenge: &Challenge,
        refused: Option<&HeaderValue>,
    ) -> Result<HeaderValue, Error> {
        let _fetching = self.fetching.lock().await;
        if let Some(refused) = refused {
            self.tokens.refused(repository, refused);
        }
        if let Some(token) = self.tokens.get(repository) {
            return Ok(token);
        }
        let secret = self.credentials.secret().await.map_err(|error| Error::Denied(error.to_string()))?;
        let fetched = self.tokens.fetch(&self.http, repository, challenge, secret.as_ref()).await;
        fetched.map_err(|error| match error {
            token::Error::Unreachable(why) => Error::Unavailable(why),
            token::Error::Refused(why) => Error::Denied(why),
        })
    }

    /// Sends a request and follows where it is sent on to. Only the upstream itself is told who we are.
    async fn follow(
        &self,
        host: &Host,
        repository: &str,
        question: &Question<'_>,
        authorization: Option<HeaderValue>,
    ) -> Result<Response<Incoming>, Error> {
        let odd = |why: String| Error::Answer(format!("{}: {why}", host.base));
        let first = format!("{}/v2/{repository}/{}", host.base, question.path);
        let first: Uri = first.parse().map_err(|_| odd(format!("{first:?} is no address")))?;
        let mut uri = first.clone();
        for _ in 0..=REDIRECTS_MAX {
            let mut request = Client::request(question.method.clone(), uri.clone());
            if let Some(accept) = &question.accept {
                request = request.header(header::ACCEPT, accept);
            }
            if question.from > 0 {
                request = request.header(header::RANGE, format!("bytes={}-", question.from));
            }
            if let Some(value) = authorization.as_ref().filter(|_| uri.authority() == first.authority()) {
                request = request.header(header::AUTHORIZATION, value);
            }
            let request = request.body(http::empty()).map_err(|error| odd(error.to_string()))?;
            let answer = match self.http.send(request, question.timeout).await {
                Ok(answer) => answer,
                Err(error) => {
                    if uri.authority() == first.authority() {
                        host.silence().down = Some(Instant::now() + DOWN_TIME);
                    }
                    return Err(Error::Unavailable(error.to_string()));
                }
            };
            if !answer.status().is_redirection() {
                return Ok(answer);
            }
            let to = answer.headers().get(header::LOCATION).and_then(|to| to.to_str().ok()).unwrap_or_default();
            let next = match to.strip_prefix('/') {
                Some(path) if !path.starts_with('/') => {
                    let (scheme, authority) = (uri.scheme_str().unwrap_or("https"), uri.authority());
                    format!("{scheme}://{}{to}", authority.map_or("", |authority| authority.as_str()))
                }
                _ => to.to_owned(),
            };
            let next: Uri = next.parse().map_err(|_| odd(format!("redirect to {to:?}")))?;
            let scheme = next.scheme_str();
            if next.authority().is_none() || !(scheme == Some("https") || scheme == Some("http") && !host.secure) {
                return Err(odd(format!("redirect to {to:?}")));
            }
            uri = next;
        }
        Err(odd(format!("more than {REDIRECTS_MAX} redirects for {}", question.path)))
    }
}

/// A repository of an upstream. Cheap to clone.
#[derive(Clone)]
pub struct Repository {
    upstream: Arc<Upstream>,
    name: String,
}

#[derive(Deserialize)]
struct TagList {
    #[serde(default)]
    tags: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Referrers {
    #[serde(default)]
    manifests: Vec<Referrer>,
}

#[derive(Deserialize)]
struct Referrer {
    digest: String,
}

impl Repository {
    pub(super) fn new(upstream: Arc<Upstream>, name: &str) -> Self {
        let library = upstream.library && !name.contains('/');
        let name = if library { format!("library/{name}") } else { name.to_owned() };
        Self { upstream, name }
    }

    /// The upstream.
    pub fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    /// What it is called here, the same by whichever name it was found; none where that would be too long.
    pub fn namespace(&self) -> Option<Namespace> {
        format!("{}/{}", self.upstream.prefix, self.name).parse().ok()
    }

    /// What a tag stands for now.
    pub async fn resolve(&self, tag: &Tag) -> Result<Digest, Error> {
        let path = format!("manifests/{tag}");
        let head = self.upstream.ask(&self.name, &Question::manifest(Method::HEAD, &path)).await?;
        if let Some(digest) = text(head.headers(), &CONTENT_DIGEST).and_then(|text| text.parse().ok()) {
            return Ok(digest);
        }
        let answer = self.upstream.ask(&self.name, &Question::manifest(Method::GET, &path)).await?;
        let body = body(answer, manifest::LEN_MAX).await?;
        Ok(digest_of(Algorithm::Sha256, &body))
    }

    /// What content is, and how long.
    pub async fn stat(&self, digest: &Digest) -> Result<Stat, Error> {
        let path = path(Kind::Blob, digest);
        match self.upstream.ask(&self.name, &Question::new(Method::HEAD, &path)).await {
            Ok(answer) => Ok(Stat { size: length(&answer)?, kind: Kind::Blob }),
            Err(Error::NotFound) => {
                let path = self::path(Kind::Manifest, digest);
                let answer = self.upstream.ask(&self.name, &Question::manifest(Method::HEAD, &path)).await?;
                Ok(Stat { size: length(&answer)?, kind: Kind::Manifest })
            }
            Err(error) => Err(error),
        }
    }

    /// The bytes of content from an offset to its end.
    pub async fn read(&self, digest: &Digest, kind: Kind, from: u64) -> Result<Object, Error> {
        let path = path(kind, digest);
        let question = match kind {
            Kind::Blob => Question::new(Method::GET, &path),
            Kind::Manifest => Question::manifest(Method::GET, &path),
        };
        let question = Question { from, timeout: READ_TIMEOUT, ..question };
        let answer = self.upstream.ask(&self.name, &question).await?;
        let said = text(answer.headers(), &header::CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
        // A registry that knows no ranges sends all of it.
        let (size, skip) = match answer.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = text(answer.headers(), &header::CONTENT_RANGE).unwrap_or_default();
                if !range.starts_with(&format!("bytes {from}-")) {
                    return Err(Error::Answer(format!("asked for bytes from {from} on, got {range:?}")));
                }
                (range.rsplit('/').next().and_then(|total| total.parse().ok()), 0)
            }
            _ => (said, from),
        };
        let bytes = BodyDataStream::new(answer.into_body()).map(|part| part.map_err(|error| http::chain(&error)));
        let bytes = bytes.scan(skip, |skip, part| {
            let part = part.map(|part| {
                let over = usize::try_from(*skip).unwrap_or(usize::MAX).min(part.len());
                *skip -= over as u64;
                part.slice(over..)
            });
            std::future::ready(Some(part))
        });
        Ok(Object { size, bytes: bytes.boxed() })
    }

    /// Its tags, sorted.
    pub async fn tags(&self, page: &Page) -> Result<Listing, Error> {
        let last = page.last.as_ref().map(|last| format!("&last={}", encode_segment(last))).unwrap_or_default();
        let path = format!("tags/list?n={}{last}", page.n);
        let answer = self.upstream.ask(&self.name, &Question::new(Method::GET, &path)).await?;
        let more = answer.headers().contains_key(header::LINK);
        let list: TagList = json(&body(answer, LIST_LEN_MAX).await?)?;
        Ok(paged(list.tags.unwrap_or_default(), more, page))
    }

    /// The manifests that are about `subject`, sorted.
    pub async fn referrers(&self, subject: &Digest, page: &Page) -> Result<Listing<Digest>, Error> {
        let path = format!("referrers/{subject}");
        let answer = match self.upstream.ask(&self.name, &Question::new(Method::GET, &path)).await {
            Ok(answer) => answer,
            // One that knows no referrers.
            Err(Error::NotFound) => return Ok(Listing { items: Vec::new(), more: false }),
            Err(error) => return Err(error),
        };
        let list: Referrers = json(&body(answer, LIST_LEN_MAX).await?)?;
        let listing = paged(list.manifests.into_iter().map(|one| one.digest).collect(), false, page);
        let items = listing.items.iter().map(|digest| digest.parse());
        let items = items.collect::<Result<_, _>>().map_err(|error| Error::Answer(format!("referrers: {error}")))?;
        Ok(Listing { items, more: listing.more })
    }
}

/// One page: of a list that is one already, or of a whole list that an upstream without pages sent.
fn paged(mut items: Vec<String>, more: bool, page: &Page) -> Listing {
    let last = page.last.as_deref();
    if items.len() <= page.n && last.is_none_or(|last| items.iter().all(|item| item.as_str() > last)) {
        return Listing { items, more };
    }
    items.sort_unstable();
    items.retain(|item| last.is_none_or(|last| item.as_str() > last));
    let more = items.len() > page.n;
    items.truncate(page.n);
    Listing { items, more }
}

fn path(kind: Kind, digest: &Digest) -> String {
    match kind {
        Kind::Blob => format!("blobs/{digest}"),
        Kind::Manifest => format!("manifests/{digest}"),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn length(answer: &Response<Incoming>) -> Result<u64, Error> {
    let length = text(answer.headers(), &header::CONTENT_LENGTH).and_then(|text| text.parse().ok());
    length.ok_or_else(|| Error::Answer("upstream does not say how long it is".into()))
}

async fn body(answer: Response<Incoming>, limit: usize) -> Result<Bytes, Error> {
    let read = tokio::time::timeout(READ_TIMEOUT, http::read_body(answer.into_body(), limit)).await;
    let read =
        read.map_err(|_| Error::Unavailable(format!("upstream sent no whole answer within {READ_TIMEOUT:?}")))?;
    read.map_err(|error| Error::Unavailable(format!("upstream: {}", error.message)))
}

fn json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::Answer(format!("upstream's list: {error}")))
}
