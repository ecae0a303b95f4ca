//! Tags and content of registries that are mirrored: asked of them as their freshness says, and kept for when they cannot be asked.
//!
//! ```text
//! docker/registry/v2/shoal/mirrored/<prefix>/<repo>/_tags/<tag>            the digest that the tag stood for last
//! docker/registry/v2/shoal/mirrored/<prefix>/<repo>/_content/<alg>/<hex>   the upstream has it in this repository
//! ```
//!
//! They are outside of the tree of repositories: nothing of it is a push, so nothing of it is collected.

use super::{
    TagName,
    reads::Reads,
    store::{Error, Store, read_link},
};
use crate::{
    registry::{Listing, Page, Tag},
    upstream::{self, Freshness, Repository, Upstreams},
};
use bytes::Bytes;
use peer_proto::{Digest, Namespace};
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

const MIRRORED: &str = "docker/registry/v2/shoal/mirrored/";
/// Longest wait for an upstream to say what a tag stands for: less than registries wait for an index.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(7);
/// Most tags whose time of asking is remembered; one that is forgotten is asked for again.
const CHECKED_MAX: usize = 100_000;

/// What other registries have. Cheap to clone.
#[derive(Clone)]
pub(super) struct Mirror {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<Store>,
    upstreams: Upstreams,
    reads: Reads<Result<Digest, Error>>,
    /// When upstreams with a lifetime of tags were asked last.
    checked: Mutex<HashMap<String, Instant>>,
    stale: Counter,
}

impl Mirror {
    pub(super) fn new(store: Arc<Store>, upstreams: Upstreams) -> Self {
        let inner =
            Inner { store, upstreams, reads: Reads::default(), checked: Mutex::default(), stale: Counter::default() };
        Self { inner: Arc::new(inner) }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        self.inner.upstreams.register(registry);
        let help = "Tags of upstreams answered as they were, because the upstream could not be asked";
        registry.register("index_stale_tags", help, self.inner.stale.clone());
    }

    /// The upstream's repository that this one stands for.
    pub(super) fn named(&self, repository: &Namespace) -> Option<Repository> {
        self.inner.upstreams.find(repository)
    }

    /// The one that has what the cluster does not know under this name.
    pub(super) fn fallback(&self, repository: &Namespace) -> Option<Repository> {
        self.inner.upstreams.fallback(repository)
    }

    /// What a tag of an upstream stands for. Those who ask at the same time share the question.
    pub(super) async fn resolve(&self, upstream: Repository, tag: &TagName) -> Result<Digest, Error> {
        let Ok(tag) = tag.tag().parse::<Tag>() else { return Err(Error::NotFound) };
        let namespace = upstream.namespace().ok_or(Error::NotFound)?;
        let key = format!("{namespace}:{tag}");
        let read = {
            let (inner, key) = (self.inner.clone(), key.clone());
            move || {
                let (inner, key) = (inner.clone(), key.clone());
                let (upstream, namespace, tag) = (upstream.clone(), namespace.clone(), tag.clone());
                async move { inner.resolve(&key, &upstream, &namespace, &tag).await }
            }
        };
        let answer = self.inner.reads.get(&key, read).await;
        answer.unwrap_or_else(|| Err(Error::Failed(format!("asking for {key} failed"))))
    }

    /// Whether an upstream's repository has this content: [`Error::NotFound`] where it has not. It is asked once.
    pub(super) async fn admits(&self, upstream: &Repository, digest: &Digest) -> Result<(), Error> {
        let namespace = upstream.namespace().ok_or(Error::NotFound)?;
        let paths = self.inner.store.route(namespace.as_str())?.paths();
        let path = format!("{MIRRORED}{namespace}/_content/{}/{}", digest.algorithm().name(), digest.hex());
        match paths.stat(&path).await {
            Ok(_) => return Ok(()),
            Err(backends::Error::NotFound) => {}
            Err(error) => return Err(error.into()),
        }
        upstream.stat(digest).await?;
        Ok(paths.write(&path, Bytes::from(digest.to_string()).into()).await?)
    }

    /// The tags of an upstream's repository.
    pub(super) async fn tags(&self, upstream: &Repository, page: &Page) -> Result<Listing, Error> {
        Ok(upstream.tags(page).await?)
    }

    /// What is about `subject` there.
    pub(super) async fn referrers(
        &self,
        upstream: &Repository,
        subject: &Digest,
        page: &Page,
    ) -> Result<Listing, Error> {
        let Listing { items, more } = upstream.referrers(subject, page).await?;
        Ok(Listing { items: items.iter().map(ToString::to_string).collect(), more })
    }
}

impl Inner {
    async fn resolve(
        &self,
        key: &str,
        upstream: &Repository,
        namespace: &Namespace,
        tag: &Tag,
    ) -> Result<Digest, Error> {
        let paths = self.store.route(namespace.as_str())?.paths();
        let path = format!("{MIRRORED}{namespace}/_tags/{tag}");
        let kept = match read_link(&**paths, &path).await {
            Ok(digest) => Some(digest),
            Err(Error::NotFound) => None,
            Err(error) => return Err(error),
        };
        if let Some(kept) = kept.filter(|_| self.is_fresh(key, upstream.upstream().freshness())) {
            return Ok(kept);
        }
        let asked = tokio::time::timeout(RESOLVE_TIMEOUT, upstream.resolve(tag)).await;
        let asked = asked.unwrap_or_else(|_| Err(upstream::Error::Unavailable("upstream is slow".into())));
        match (asked, kept) {
            (Ok(digest), kept) => {
                if kept != Some(digest) {
                    paths.write(&path, Bytes::from(digest.to_string()).into()).await?;
                }
                self.note(key, upstream.upstream().freshness());
                Ok(digest)
            }
            (Err(upstream::Error::NotFound), Some(_)) => match paths.delete(&path).await {
                Ok(()) | Err(backends::Error::NotFound) => Err(Error::NotFound),
                Err(error) => Err(error.into()),
            },
            (Err(upstream::Error::NotFound), None) => Err(Error::NotFound),
            (Err(error), Some(kept)) => {
                tracing::warn!(tag = key, %error, "upstream cannot be asked: the tag is answered as it was");
                self.stale.inc();
                Ok(kept)
            }
            (Err(error), None) => {
                tracing::warn!(tag = key, %error, "ask an upstream for a tag");
                Err(error.into())
            }
        }
    }

    fn is_fresh(&self, key: &str, freshness: Freshness) -> bool {
        match freshness {
            Freshness::Always => false,
            Freshness::Pinned => true,
            Freshness::Ttl(ttl) => {
                let checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
                checked.get(key).is_some_and(|checked| checked.elapsed() < ttl)
            }
        }
    }

    fn note(&self, key: &str, freshness: Freshness) {
        let Freshness::Ttl(ttl) = freshness else { return };
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if checked.len() >= CHECKED_MAX {
            checked.retain(|_, at| at.elapsed() < ttl);
        }
        if checked.len() < CHECKED_MAX {
            checked.insert(key.to_owned(), Instant::now());
        }
    }
}

impl From<upstream::Error> for Error {
    fn from(error: upstream::Error) -> Self {
        match error {
            // A registry says so of what it does not have, too; and with a 404 clients go on to it with names of their own.
            upstream::Error::NotFound | upstream::Error::Denied(_) => Self::NotFound,
            upstream::Error::Unavailable(why) => Self::Unavailable(format!("upstream: {why}")),
            upstream::Error::Limited { why, after } => Self::Limited(format!("upstream: {why}"), after),
            upstream::Error::Answer(why) => Self::Failed(why),
        }
    }
}
