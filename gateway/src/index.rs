//! The index: which digest a tag stands for, and which content is a repository's.
//!
//! Tags are small objects in a storage backend, in the tree a registry keeps them in, so several indexes over one backend are
//! one index, and none has anything to lose. Nothing is cached that could be old: a tag that was put is in the backend before
//! it is acknowledged, and every read that begins later, at any index, sees it. Reads of the same tag at the same time share
//! one read of the backend instead ([`reads`]).
//!
//! | method and path | answer |
//! |---|---|
//! | `PUT /tags/{tag}/digest/{digest}` | 200; 500 where the digest or something it needs is nowhere; 503 |
//! | `GET`, `HEAD /tags/{tag}` | 200 and the digest; 404; 503 |
//! | `DELETE /tags/{tag}` | 200; 404 |
//! | `GET /repositories/{repo}/tags` | 200 and a list of tags |
//! | `GET /repositories` | 200 and a list of repositories that have tags |
//! | `GET /list/{prefix}` | 200 and a list of `repo:tag`, in the order of the tree |
//! | `PUT`, `DELETE /repositories/{repo}/referrers/{subject}/{digest}` | 200; 404 |
//! | `GET /repositories/{repo}/referrers/{subject}` | 200 and a list of digests |
//! | `PUT /repositories/{repo}/manifests/{digest}?subject=&tag=` | 200: a manifest that the origins have, and its tags; as of tags |
//! | `PUT /repositories/{repo}/content/{digest}` | 200: it is the repository's |
//! | `GET`, `HEAD /repositories/{repo}/content/{digest}[?recorded][&renew]` | 200 unless it was deleted from the repository; then 404 |
//! | `DELETE /repositories/{repo}/content/{digest}?subject=` | 200: it is not the repository's any more, nor are its tags; 404 |
//! | `POST /collect` | 200 and a report: content that nothing reaches is deleted now |
//! | `GET /origin` | 200 and an origin's address |
//!
//! Tags are `repo:tag`; in a path they may be escaped once or twice. Lists are in pages by `n` and `last`, or by Kraken's
//! `limit` and `offset`, where an offset is what the last answer's `links.next` says.

mod collect;
mod content;
mod dependencies;
mod guard;
mod listing;
mod mirror;
mod name;
mod reads;
mod store;

pub use collect::Config as Collect;
pub use dependencies::{Dependencies, OfOrigins, Unmet};
pub use listing::{Links, ListAnswer};
pub use name::{TagName, TagNameError};

use crate::{
    client::Origins,
    config::{HostPort, Span},
    http::{self, Request, Response},
    registry::{Page, Tag, paging},
    upstream::Upstreams,
};
use backends::{Naming, RouteConfig, Router};
use collect::Collector;
use content::{Revision, State};
use guard::Guard;
use hyper::{Method, StatusCode, Uri};
use listing::Window;
use mirror::Mirror;
use peer_proto::{Digest, Namespace};
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use std::{
    borrow::Cow,
    future::Future,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use store::Store;
use tokio::sync::watch;

/// What an index is made from.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where tags are kept, by repository; the first match wins. Names are `docker_tag`'s.
    pub backends: Vec<RouteConfig>,
    /// Take a tag only if the origins have all it needs.
    pub check_dependencies: bool,
    /// Take an index although some of its manifests are not there.
    pub sparse_indexes: bool,
    /// How old the list of repositories may be as far as other indexes change it.
    pub catalog_age: Span,
    /// Delete what nothing reaches; not unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collect: Option<Collect>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            backends: Vec::new(),
            check_dependencies: true,
            sparse_indexes: false,
            catalog_age: Span::secs(1),
            collect: None,
        }
    }
}

impl Config {
    /// Opens the backends. Blocks on the file system.
    pub fn router(&self) -> Result<Router, backends::Error> {
        let router = Router::open(&self.backends, Naming::DockerTag)?;
        match router.routes().iter().find(|route| route.naming() != Naming::DockerTag) {
            Some(route) => Err(backends::Error::Invalid(format!("{route:?}: an index needs naming docker_tag"))),
            None => Ok(router),
        }
    }
}

/// An index.
pub struct Service {
    store: Arc<Store>,
    dependencies: Option<Arc<dyn Dependencies>>,
    /// Where content that nothing reaches is deleted, what does that.
    collector: Option<Collector>,
    /// What other registries have.
    mirror: Mirror,
    origins: Vec<HostPort>,
    /// Which origin is named next.
    turn: AtomicUsize,
}

impl Service {
    /// An index over the stores of `router`, all of naming `docker_tag` ([`Config::router`]). `origins` are those it names;
    /// with `dependencies` it takes no tag whose content is not there.
    pub fn new(
        router: Router,
        config: &Config,
        upstreams: Upstreams,
        origins: Vec<HostPort>,
        dependencies: Option<Arc<dyn Dependencies>>,
    ) -> Arc<Self> {
        let store = Arc::new(Store::new(router, config.catalog_age.get()));
        let mirror = Mirror::new(store.clone(), upstreams);
        Arc::new(Self { store, dependencies, collector: None, mirror, origins, turn: AtomicUsize::new(0) })
    }

    /// The same, which deletes from these origins what nothing reaches. It must have dependencies checked.
    pub fn collecting(
        router: Router,
        config: &Config,
        upstreams: Upstreams,
        origins: Vec<HostPort>,
        from: Origins,
        collect: Collect,
    ) -> Arc<Self> {
        let guard = router.routes().first().map(|route| Guard::new(route.paths().clone()));
        let store = Arc::new(Store::new(router, config.catalog_age.get()));
        let collector = guard.map(|guard| Collector::new(store.clone(), guard, from.clone(), collect));
        let dependencies: Arc<dyn Dependencies> = Arc::new(OfOrigins::new(from, config.sparse_indexes));
        let mirror = Mirror::new(store.clone(), upstreams);
        Arc::new(Self {
            store,
            dependencies: Some(dependencies),
            collector,
            mirror,
            origins,
            turn: AtomicUsize::new(0),
        })
    }

    /// Adds its figures.
    pub fn register(&self, registry: &mut Registry) {
        self.mirror.register(registry);
        if let Some(collector) = &self.collector {
            collector.register(registry);
        }
    }

    /// Does its work in the background until `stop` is true.
    pub async fn run(&self, stop: watch::Receiver<bool>) {
        if let Some(collector) = &self.collector {
            collector.run(stop).await;
        }
    }

    /// Why it cannot do its work, if so: a backend that must be ready, or the origins, do not answer.
    pub async fn readiness(&self) -> Result<(), String> {
        self.store.ready().await.map_err(|error| format!("backend: {error}"))?;
        match &self.dependencies {
            Some(dependencies) => dependencies.readiness().await.map_err(|error| format!("origins: {error}")),
            None => Ok(()),
        }
    }

    async fn route(&self, method: &Method, uri: &Uri) -> Result<Response, http::Error> {
        let segments = http::segments(uri.path())?;
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let read = matches!(*method, Method::GET | Method::HEAD);
        match *segments {
            ["tags", tag] if read => self.get(&named(tag)?).await,
            ["tags", tag] if method == Method::DELETE => self.delete(&named(tag)?).await,
            ["tags", tag, "digest", digest] if method == Method::PUT => {
                self.put(&named(tag)?, &digested(digest)?).await
            }
            // A Kraken neighbour's copy. Our indexes share a backend and need none.
            ["internal", "duplicate", "tags", tag, "digest", digest] if method == Method::PUT => {
                self.put(&named(tag)?, &digested(digest)?).await
            }
            // What Kraken answers where no other cluster is configured for the tag: there is nothing to do.
            ["remotes", "tags", tag] if method == Method::POST => self.get(&named(tag)?).await.map(|_| done()),
            ["internal", "duplicate", "remotes", "tags", tag, "digest", digest] if method == Method::POST => {
                named(tag)?;
                digested(digest)?;
                Ok(done())
            }
            ["repositories"] if read => {
                let window = Window::parse(uri)?;
                let listing = self.store.repositories(&window).await?;
                Ok(listing::answer(uri, &window, listing))
            }
            ["repositories", repo, "tags"] if read => {
                let (repo, window) = (repository(repo)?, Window::parse(uri)?);
                let listing = match self.mirror.named(&repo) {
                    Some(upstream) => self.mirror.tags(&upstream, &page(&window)).await?,
                    None => self.store.tags(&repo, &window).await?,
                };
                Ok(listing::answer(uri, &window, listing))
            }
            ["repositories", repo, "referrers", subject] if read => {
                let (repo, subject, window) = (repository(repo)?, digested(subject)?, Window::parse(uri)?);
                let listing = match self.mirror.named(&repo) {
                    Some(upstream) => self.mirror.referrers(&upstream, &subject, &page(&window)).await?,
                    None => self.store.referrers(&repo, &subject, &window).await?,
                };
                Ok(listing::answer(uri, &window, listing))
            }
            ["repositories", repo, "referrers", subject, digest] if method == Method::PUT => {
                self.store.refer(&repository(repo)?, &digested(subject)?, &digested(digest)?).await?;
                Ok(done())
            }
            ["repositories", repo, "referrers", subject, digest] if method == Method::DELETE => {
                self.store.unrefer(&repository(repo)?, &digested(subject)?, &digested(digest)?).await?;
                Ok(done())
            }
            ["repositories", repo, "manifests", digest] if method == Method::PUT => {
                self.put_manifest(uri, &repository(repo)?, &digested(digest)?).await
            }
            ["repositories", repo, "content", digest] if read => {
                let asked = |what| http::query(uri, what).is_some();
                self.kept(&repository(repo)?, &digested(digest)?, asked("renew"), asked("recorded")).await
            }
            ["repositories", repo, "content", digest] if method == Method::PUT => {
                self.keep(&repository(repo)?, &digested(digest)?).await
            }
            ["repositories", repo, "content", digest] if method == Method::DELETE => {
                self.store.remove(&repository(repo)?, &digested(digest)?, subject(uri)?.as_ref()).await?;
                Ok(done())
            }
            ["list", ..] if read => {
                let (prefix, window) = (segments[1..].join("/"), Window::parse(uri)?);
                let listing = self.store.list(&unescaped(&prefix)?, &window).await?;
                Ok(listing::answer(uri, &window, listing))
            }
            ["collect"] if method == Method::POST => match &self.collector {
                Some(collector) => Ok(http::json(StatusCode::OK, &collector.collect().await?)),
                None => Err(http::Error::not_found("nothing is collected here; see index.collect")),
            },
            ["origin"] if read => self.origin(),
            ["tags", _] | ["tags", _, "digest", _] | ["repositories"] | ["list", ..] | ["origin" | "collect"] => {
                Err(not_here(method))
            }
            ["remotes", "tags", _]
            | ["internal", "duplicate", "tags", _, "digest", _]
            | ["internal", "duplicate", "remotes", "tags", _, "digest", _] => Err(not_here(method)),
            ["repositories", _, "tags"] | ["repositories", _, "referrers", _] => Err(not_here(method)),
            ["repositories", _, "referrers", _, _] | ["repositories", _, "manifests" | "content", _] => {
                Err(not_here(method))
            }
            _ => Err(http::Error::not_found("no such route")),
        }
    }

    async fn get(&self, tag: &TagName) -> Result<Response, http::Error> {
        let digest = match self.mirror.named(tag.repository()) {
            Some(upstream) => self.mirror.resolve(upstream, tag).await?,
            None => match (self.store.get(tag).await, self.mirror.fallback(tag.repository())) {
                (Err(store::Error::NotFound), Some(upstream)) => self.mirror.resolve(upstream, tag).await?,
                (digest, _) => digest?,
            },
        };
        Ok(http::text(StatusCode::OK, digest.to_string()))
    }

    async fn put(&self, tag: &TagName, digest: &Digest) -> Result<Response, http::Error> {
        self.pinned(tag.repository(), digest, async {
            self.check(tag.repository(), digest, &format!("tag {tag}")).await?;
            Ok(self.store.put(tag, digest).await?)
        })
        .await
    }

    async fn put_manifest(&self, uri: &Uri, repo: &Namespace, digest: &Digest) -> Result<Response, http::Error> {
        let tags: Result<Vec<Tag>, _> = http::query_all(uri, "tag").iter().map(|tag| tag.parse()).collect();
        let tags = tags.map_err(|_| http::Error::bad_request("no name for a tag"))?;
        let subject = subject(uri)?;
        self.pinned(repo, digest, async {
            self.check(repo, digest, &format!("manifest {repo}@{digest}")).await?;
            Ok(self.store.put_manifest(repo, Revision { digest, subject: subject.as_ref(), tags: &tags }).await?)
        })
        .await
    }

    /// Does `put` while nothing that `digest` needs is collected; 503 where some of it just is.
    async fn pinned(
        &self,
        repo: &Namespace,
        digest: &Digest,
        put: impl Future<Output = Result<(), http::Error>>,
    ) -> Result<Response, http::Error> {
        self.refuse_mirrored(repo)?;
        let Some(collector) = &self.collector else { return put.await.map(|()| done()) };
        let pin = collector.guard.pin(repo, digest).await?;
        let put = async {
            // After the pin: see `guard`.
            let claimed = collector.guard.claimed().await?;
            if !claimed.is_empty() {
                let needed = collector.needed(repo, digest).await?;
                if !needed.is_disjoint(&claimed) {
                    return Err(http::Error::unavailable("some of what it needs is being deleted; push it again"));
                }
            }
            put.await
        };
        let outcome = put.await;
        if let Err(error) = collector.guard.unpin(&pin).await {
            // It keeps something from being collected for a day, no more.
            tracing::warn!(%pin, %error, "lift a pin");
        }
        outcome.map(|()| done())
    }

    fn refuse_mirrored(&self, repo: &Namespace) -> Result<(), http::Error> {
        match self.mirror.named(repo) {
            Some(_) => Err(http::Error::new(StatusCode::FORBIDDEN, format!("{repo} is another registry's"))),
            None => Ok(()),
        }
    }

    /// Notes that content is a repository's.
    async fn keep(&self, repo: &Namespace, digest: &Digest) -> Result<Response, http::Error> {
        self.refuse_mirrored(repo)?;
        self.store.keep(repo, digest).await?;
        if let Some(collector) = &self.collector {
            if collector.guard.is_claimed(digest).await? {
                return Err(http::Error::unavailable("it is being deleted; push it again"));
            }
            // A collection may have been through between the push of the bytes and the note.
            if let Some(dependencies) = &self.dependencies {
                let there = dependencies.exists(repo, digest).await;
                there.map_err(|unmet| http::Error::unavailable(format!("{unmet}; push it again")))?;
            }
        }
        Ok(done())
    }

    /// 404 for content that was deleted from a repository; for what has no record only where that is asked for. With `renew`, what is kept stays so for another grace.
    async fn kept(
        &self,
        repo: &Namespace,
        digest: &Digest,
        renew: bool,
        recorded: bool,
    ) -> Result<Response, http::Error> {
        if let Some(upstream) = self.mirror.named(repo) {
            if recorded {
                self.mirror.admits(&upstream, digest).await?;
            }
            return Ok(done());
        }
        let Some(record) = self.store.record(repo, digest).await? else {
            return match self.mirror.fallback(repo) {
                _ if !recorded => Ok(done()),
                Some(upstream) => self.mirror.admits(&upstream, digest).await.map(|()| done()).map_err(Into::into),
                None => Err(http::Error::not_found("no record")),
            };
        };
        if record.state == State::Deleted {
            return Err(http::Error::not_found("deleted"));
        }
        if let Some(collector) = self.collector.as_ref().filter(|_| renew)
            && guard::now().saturating_sub(record.at) >= collector.grace() / 4
        {
            self.store.keep(repo, digest).await?;
            // Whoever relies on its being here has to push it again.
            if collector.guard.is_claimed(digest).await? {
                return Err(http::Error::not_found("being deleted"));
            }
        }
        Ok(done())
    }

    /// Whether the origins have all that `digest` needs, where that is to be checked.
    async fn check(&self, repository: &Namespace, digest: &Digest, what: &str) -> Result<(), http::Error> {
        let Some(dependencies) = &self.dependencies else { return Ok(()) };
        dependencies.check(repository, digest).await.map_err(|unmet| match unmet {
            Unmet::Unavailable(_) => http::Error::unavailable(format!("{what}: {unmet}")),
            // 500 is Kraken's answer; its clients tell nothing else from success.
            Unmet::Missing(_) | Unmet::Invalid(_) => http::Error::internal(format!("{what}: {unmet}")),
        })
    }

    async fn delete(&self, tag: &TagName) -> Result<Response, http::Error> {
        self.store.delete(tag).await?;
        Ok(done())
    }

    fn origin(&self) -> Result<Response, http::Error> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.origins.len().max(1);
        let origin = self.origins.get(turn).ok_or_else(|| http::Error::not_found("no origin is known"))?;
        Ok(http::text(StatusCode::OK, origin.to_string()))
    }
}

impl http::Service for Service {
    async fn answer(self: Arc<Self>, request: Request) -> Response {
        match self.route(request.method(), request.uri()).await {
            Ok(response) => response,
            Err(error) => {
                if error.status.is_server_error() {
                    tracing::warn!(method = %request.method(), path = request.uri().path(), %error, "request failed");
                }
                error.into()
            }
        }
    }
}

/// The class of a path, for counting requests.
pub fn class(path: &str) -> &'static str {
    let first = path.trim_start_matches('/').split('/').next().unwrap_or("");
    ["tags", "list", "repositories", "origin", "collect", "remotes", "internal"]
        .into_iter()
        .find(|class| *class == first)
        .unwrap_or("other")
}

fn done() -> Response {
    http::status(StatusCode::OK)
}

/// The part of an upstream's list that is asked for.
fn page(window: &Window) -> Page {
    Page { n: window.limit.unwrap_or(paging::PAGE_MAX), last: window.after.clone() }
}

fn not_here(method: &Method) -> http::Error {
    http::Error::new(StatusCode::METHOD_NOT_ALLOWED, format!("{method} does nothing here"))
}

/// A segment that was escaped twice is unescaped once more: nothing we name has a `%` of its own.
fn unescaped(segment: &str) -> Result<Cow<'_, str>, http::Error> {
    let decoded = percent_encoding::percent_decode_str(segment).decode_utf8();
    decoded.map_err(|_| http::Error::bad_request("path is not UTF-8"))
}

fn parsed<T: FromStr<Err: ToString>>(segment: &str) -> Result<T, http::Error> {
    unescaped(segment)?.parse().map_err(|error: T::Err| http::Error::bad_request(error.to_string()))
}

fn named(segment: &str) -> Result<TagName, http::Error> {
    parsed(segment)
}

fn digested(segment: &str) -> Result<Digest, http::Error> {
    parsed(segment)
}

/// What the manifest of a request is about.
fn subject(uri: &Uri) -> Result<Option<Digest>, http::Error> {
    http::query(uri, "subject").map(|subject| digested(&subject)).transpose()
}

/// A repository is what could stand before a tag.
fn repository(segment: &str) -> Result<Namespace, http::Error> {
    parsed(&format!("{segment}:_")).map(|tag: TagName| tag.repository().clone())
}

#[cfg(test)]
mod tests;
