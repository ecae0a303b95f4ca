//! Tags, lists and referrers as objects of the backends.
//!
//! ```text
//! docker/registry/v2/repositories/<repo>/_manifests/tags/<tag>/current/link                  the tag's digest
//! docker/registry/v2/repositories/<repo>/_referrers/<alg>/<hex>/<alg>/<hex>/link             the referrer's digest
//! ```

use super::{content::State, listing::Window, name::TagName, reads::Reads};
use crate::{http, registry::paging::Listing};
use backends::{Backend, List, Naming, Route, Router};
use bytes::Bytes;
use peer_proto::{Digest, Namespace};
use std::{
    collections::BTreeSet,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Mutex, MutexGuard},
    time::Instant,
};

/// Longest object a tag may be, bytes: a digest, and room for a newline.
const LINK_LEN_MAX: usize = 256;
/// Most names of one list.
const LIST_LEN_MAX: usize = 1_000_000;
/// Where a repository's referrers are, below it.
pub(super) const REFERRERS: &str = "/_referrers/";
/// The end of a referrer's path.
pub(super) const LINK: &str = "/link";
/// Locks that the repositories share.
const STRIPES: usize = 64;

/// Why a store did not do as asked. Shared by all who asked the same.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("not found")]
    NotFound,
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Unavailable(String),
    /// An upstream's limit is reached, for this long.
    #[error("{0}")]
    Limited(String, Duration),
    #[error("{0}")]
    Failed(String),
}

impl From<backends::Error> for Error {
    fn from(error: backends::Error) -> Self {
        match error {
            backends::Error::NotFound => Self::NotFound,
            backends::Error::Unavailable(_) => Self::Unavailable(format!("backend {error}")),
            _ => Self::Failed(format!("backend: {error}")),
        }
    }
}

impl From<Error> for http::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::NotFound => Self::not_found("not found"),
            Error::Invalid(message) => Self::bad_request(message),
            Error::Unavailable(message) => Self::unavailable(message),
            Error::Limited(message, after) => Self::limited(message, after),
            Error::Failed(message) => Self::internal(message),
        }
    }
}

type Reading = Result<Digest, Error>;

pub(super) struct Store {
    router: Router,
    reads: Reads<Reading>,
    /// Repositories as they were lately.
    catalog: Mutex<Option<Catalog>>,
    catalog_age: Duration,
    /// Counts the changes of ours that may change the catalog.
    changes: AtomicU64,
    /// What a repository's tags and manifests are is changed by one request at a time, as far as the requests come here.
    stripes: Box<[Mutex<()>]>,
}

struct Catalog {
    /// When, and after how many changes of ours, the reading began.
    began: Instant,
    changes: u64,
    names: Arc<[String]>,
}

impl Store {
    pub(super) fn new(router: Router, catalog_age: Duration) -> Self {
        Self {
            router,
            reads: Reads::default(),
            catalog: Mutex::default(),
            catalog_age,
            changes: AtomicU64::new(0),
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
        }
    }

    /// Taken by whoever changes a repository's tags or manifests.
    pub(super) async fn changing(&self, repository: &Namespace) -> MutexGuard<'_, ()> {
        let mut hash = DefaultHasher::new();
        repository.as_str().hash(&mut hash);
        let stripe = usize::try_from(hash.finish() % STRIPES as u64).unwrap_or_default();
        self.stripes[stripe].lock().await
    }

    pub(super) async fn ready(&self) -> Result<(), backends::Error> {
        self.router.ready().await
    }

    /// All stores, in the order in which they are chosen.
    pub(super) fn routes(&self) -> &[Route] {
        self.router.routes()
    }

    pub(super) fn route(&self, repository: &str) -> Result<&Route, Error> {
        self.router.find(repository).ok_or_else(|| Error::Failed(format!("no backend keeps {repository}")))
    }

    pub(super) async fn get(&self, tag: &TagName) -> Reading {
        let store = self.route(tag.repository().as_str())?.store().clone();
        let name = tag.to_string();
        let read = {
            let name = name.clone();
            move || {
                let (store, name) = (store.clone(), name.clone());
                async move { read_link(&*store, &name).await }
            }
        };
        let answer = self.reads.get(&name, read).await;
        answer.unwrap_or_else(|| Err(Error::Failed(format!("reading {tag} failed"))))
    }

    /// Lets a tag stand for a digest, which is the repository's from then on.
    pub(super) async fn put(&self, tag: &TagName, digest: &Digest) -> Result<(), Error> {
        let repository = tag.repository();
        let _changing = self.changing(repository).await;
        if self.record(repository, digest).await?.is_some_and(|record| record.state == State::Deleted) {
            self.keep(repository, digest).await?;
        }
        self.write_tag(tag, digest).await
    }

    pub(super) async fn write_tag(&self, tag: &TagName, digest: &Digest) -> Result<(), Error> {
        let store = self.route(tag.repository().as_str())?.store();
        let written = store.write(&tag.to_string(), Bytes::from(digest.to_string()).into()).await;
        // Also where it failed: it may have been done all the same.
        self.changes.fetch_add(1, Ordering::SeqCst);
        Ok(written?)
    }

    pub(super) async fn delete(&self, tag: &TagName) -> Result<(), Error> {
        let _changing = self.changing(tag.repository()).await;
        self.remove_tag(tag).await
    }

    pub(super) async fn remove_tag(&self, tag: &TagName) -> Result<(), Error> {
        let store = self.route(tag.repository().as_str())?.store();
        let deleted = store.delete(&tag.to_string()).await;
        self.changes.fetch_add(1, Ordering::SeqCst);
        Ok(deleted?)
    }

    /// A repository's tags, sorted. The tree's order is another: `a-b` comes before `a/`.
    pub(super) async fn tags(&self, repository: &Namespace, window: &Window) -> Result<Listing, Error> {
        let mut tags: Vec<String> =
            self.tag_names(repository).await?.into_iter().map(|name| name.tag().to_owned()).collect();
        tags.sort_unstable();
        Ok(window.of(&tags))
    }

    /// Every `repo:tag` whose path below the tree's base begins with `prefix`, in the order of paths.
    pub(super) async fn list(&self, prefix: &str, window: &Window) -> Result<Listing, Error> {
        let store = self.route(prefix)?.store();
        let limit = window.limit.unwrap_or(usize::MAX);
        let mut listing = Listing { items: Vec::new(), more: false };
        let mut after = window.after.clone();
        loop {
            let left = limit - listing.items.len();
            if left == 0 {
                listing.more = true;
                return Ok(listing);
            }
            let ask = List { prefix, after: after.as_deref(), limit: left.min(List::LIMIT_MAX) };
            let page = store.list(ask).await.map_err(|error| match error {
                backends::Error::Invalid(message) => Error::Invalid(message),
                error => error.into(),
            })?;
            after = page.names.last().cloned().or(after);
            listing.items.extend(page.names);
            bounded(listing.items.len())?;
            if !page.more {
                return Ok(listing);
            }
        }
    }

    /// The repositories that have tags, sorted. Changes made here are seen at once, those of other indexes after a while.
    pub(super) async fn repositories(&self, window: &Window) -> Result<Listing, Error> {
        // Held while the stores are read: who else asks waits for the same.
        let mut catalog = self.catalog.lock().await;
        let fresh = |catalog: &&Catalog| {
            catalog.began.elapsed() < self.catalog_age && catalog.changes == self.changes.load(Ordering::SeqCst)
        };
        let names = match catalog.as_ref().filter(fresh) {
            Some(fresh) => fresh.names.clone(),
            None => {
                let (began, changes) = (Instant::now(), self.changes.load(Ordering::SeqCst));
                let names: Arc<[String]> = self.read_repositories().await?.into_iter().collect();
                *catalog = Some(Catalog { began, changes, names: names.clone() });
                names
            }
        };
        drop(catalog);
        Ok(window.of(&names))
    }

    async fn read_repositories(&self) -> Result<BTreeSet<String>, Error> {
        let mut all = BTreeSet::new();
        for (number, route) in self.router.routes().iter().enumerate() {
            // What an earlier store keeps is not looked for here.
            let ours = |repository: &str| {
                let first = self.router.routes().iter().position(|route| route.keeps(repository));
                first == Some(number)
            };
            let mut after: Option<String> = None;
            loop {
                let ask = List { prefix: Naming::DockerTag.base(), after: after.as_deref(), limit: 0 };
                let page = route.paths().list(ask).await?;
                let names = page.names.iter().filter_map(|path| Naming::DockerTag.name(path));
                let repositories = names.filter_map(|name| Some(name.split_once(':')?.0.to_owned()));
                all.extend(repositories.filter(|repository| ours(repository)));
                bounded(all.len())?;
                if !page.more {
                    break;
                }
                after = page.names.last().map(|last| beyond(last));
            }
        }
        Ok(all)
    }

    pub(super) async fn refer(&self, repository: &Namespace, subject: &Digest, referrer: &Digest) -> Result<(), Error> {
        let path = referrer_path(repository, subject, referrer);
        let paths = self.route(repository.as_str())?.paths();
        Ok(paths.write(&path, Bytes::from(referrer.to_string()).into()).await?)
    }

    pub(super) async fn unrefer(
        &self,
        repository: &Namespace,
        subject: &Digest,
        referrer: &Digest,
    ) -> Result<(), Error> {
        let paths = self.route(repository.as_str())?.paths();
        Ok(paths.delete(&referrer_path(repository, subject, referrer)).await?)
    }

    /// The digests that are about `subject`, sorted, which here is the tree's order.
    pub(super) async fn referrers(
        &self,
        repository: &Namespace,
        subject: &Digest,
        window: &Window,
    ) -> Result<Listing, Error> {
        let paths = self.route(repository.as_str())?.paths();
        let prefix = referrers_path(repository, subject);
        let mut referrers: Vec<String> = Vec::new();
        let mut after: Option<String> = None;
        loop {
            let page = paths.list(List { prefix: &prefix, after: after.as_deref(), limit: 0 }).await?;
            referrers.extend(page.names.iter().filter_map(|path| {
                let digest = path.strip_prefix(&prefix)?.strip_suffix(LINK)?.replacen('/', ":", 1);
                Some(digest.parse::<Digest>().ok()?.to_string())
            }));
            bounded(referrers.len())?;
            after = page.names.last().cloned();
            if !page.more {
                break;
            }
        }
        Ok(window.of(&referrers))
    }
}

pub(super) async fn read_link(store: &dyn Backend, name: &str) -> Reading {
    let bytes = store.read(name, None).await?.collect(LINK_LEN_MAX).await?;
    let text = std::str::from_utf8(&bytes).ok().map(str::trim);
    let digest = text.and_then(|text| text.parse().ok());
    digest.ok_or_else(|| Error::Failed(format!("what is kept as {name} is no digest")))
}

pub(super) fn bounded(len: usize) -> Result<(), Error> {
    if len > LIST_LEN_MAX { Err(Error::Failed(format!("list is longer than {LIST_LEN_MAX}"))) } else { Ok(()) }
}

fn referrers_path(repository: &Namespace, subject: &Digest) -> String {
    let (base, algorithm) = (Naming::DockerTag.base(), subject.algorithm().name());
    format!("{base}{repository}{REFERRERS}{algorithm}/{}/", subject.hex())
}

fn referrer_path(repository: &Namespace, subject: &Digest, referrer: &Digest) -> String {
    let path = referrers_path(repository, subject);
    format!("{path}{}/{}{LINK}", referrer.algorithm().name(), referrer.hex())
}

/// Where to go on after a path to see other repositories or other parts of this one: beyond the tree's own directory that it is
/// in, which may hold any number of tags or layers. So one page is enough for each.
fn beyond(path: &str) -> String {
    let base = Naming::DockerTag.base();
    let below = path.strip_prefix(base).unwrap_or(path);
    let mut end = path.len() - below.len();
    for part in below.split_inclusive('/') {
        let own = part.starts_with('_') && part.ends_with('/');
        end += part.len();
        if own {
            // '0' is the byte after '/': everything in the directory comes before it.
            return format!("{}0", &path[..end - 1]);
        }
    }
    path.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalog_leaps_over_what_a_repository_holds() {
        let base = Naming::DockerTag.base();
        for (path, next) in [
            ("a/_manifests/tags/1/current/link", "a/_manifests0"),
            ("a/b/_layers/sha256/x/link", "a/b/_layers0"),
            ("stray/file", "stray/file"),
            ("a/_file", "a/_file"),
        ] {
            assert_eq!(beyond(&format!("{base}{path}")), format!("{base}{next}"));
        }
    }
}
