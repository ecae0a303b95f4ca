//! Collecting what nothing reaches: blobs and manifests that were pushed and that no manifest, no tag and no push needs any more.
//!
//! What is reached: every tag, every manifest that was put and not deleted, every referrer, every manifest being put; and what
//! these name, and the manifests among that, and so on. Only content with a record can go, so nothing that others than registries
//! have put into a backend is touched; and only when its records in all repositories are older than the grace, which is for blobs
//! that were pushed and whose manifest is still to come.
//!
//! A round goes twice over everything: it claims what it finds unreached and old, looks again, and deletes what is so still.
//! `guard` says why no push can come in between. Anything that cannot be read ends the round before it deletes.

use super::{
    content::{CONTENT, REVISIONS},
    guard::{Guard, now},
    store::{Error, LINK, REFERRERS, Store, read_link},
};
use crate::{
    client::{Origins, origin},
    config::Span,
    registry::manifest::{self, Manifest},
};
use backends::{Backend, List, Naming};
use futures_util::{StreamExt, TryStreamExt, stream};
use peer_proto::{Digest, Namespace};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

/// Most objects of all repositories.
const LISTED_MAX: usize = 10_000_000;
/// Digests claimed at once; pushes of these are refused meanwhile.
const BATCH: usize = 1000;
/// Questions asked at once.
const AT_ONCE: usize = 16;
/// Blobs deleted at once.
const DELETED_AT_ONCE: usize = 4;
/// Longest wait while an origin fetches a manifest from its backend.
const FETCH_WAIT: Duration = Duration::from_secs(60);
/// Most reasons kept of one round.
const REASONS_MAX: usize = 100;

/// `[index.collect]`: when content that nothing reaches is deleted. The same at all indexes of a cluster.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How often.
    pub interval: Span,
    /// How old it must be: longer than any push takes from its first blob to its manifest, and than clocks differ.
    pub grace: Span,
}

impl Default for Config {
    fn default() -> Self {
        Self { interval: Span::secs(3600), grace: Span::secs(24 * 3600) }
    }
}

/// What a round did.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub(super) struct Report {
    /// Digests that something reaches.
    reached: usize,
    /// Digests that were claimed.
    claimed: usize,
    /// Digests that were deleted.
    pub(super) collected: usize,
    /// Why others were left, at most some of them.
    left: Vec<String>,
}

impl Report {
    fn leave(&mut self, digest: &Digest, why: impl std::fmt::Display) {
        tracing::warn!(?digest, %why, "not collected");
        if self.left.len() < REASONS_MAX {
            self.left.push(format!("{digest}: {why}"));
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// An index's collector.
pub(super) struct Collector {
    store: Arc<Store>,
    pub(super) guard: Guard,
    origins: Origins,
    config: Config,
    /// What manifests name: it never changes. Of what was reached in the last round.
    named: Mutex<Known>,
    /// One round at a time.
    round: tokio::sync::Mutex<()>,
    rounds: Family<Outcome, Counter>,
    collected: Counter,
}

type Known = HashMap<Digest, Arc<Named>>;

/// What a manifest names.
#[derive(Debug, Default)]
struct Named {
    /// Configurations and layers.
    blobs: Vec<Digest>,
    /// Manifests.
    manifests: Vec<Digest>,
}

/// Everything there is.
struct Seen {
    reached: BTreeSet<Digest>,
    /// Content that has records, with the repositories that it has them in.
    recorded: BTreeMap<Digest, Vec<Namespace>>,
}

/// A path below all repositories, read.
enum Entry {
    Tag,
    /// A manifest that was put, or one that is about another.
    Manifest(Namespace, Digest),
    Content(Namespace, Digest),
}

impl Collector {
    pub(super) fn new(store: Arc<Store>, guard: Guard, origins: Origins, config: Config) -> Self {
        Self {
            store,
            guard,
            origins,
            config,
            named: Mutex::default(),
            round: tokio::sync::Mutex::default(),
            rounds: Family::default(),
            collected: Counter::default(),
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let help = "Rounds of collecting what nothing reaches, by how they ended";
        registry.register("index_collections", help, self.rounds.clone());
        registry.register("index_collected", "Blobs and manifests deleted by them", self.collected.clone());
    }

    pub(super) fn grace(&self) -> Duration {
        self.config.grace.get()
    }

    /// Collects from time to time until `stop` is true.
    pub(super) async fn run(&self, mut stop: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.config.interval.get()) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            tokio::select! {
                collected = self.collect() => if let Err(error) = collected {
                    tracing::warn!(%error, "collect what nothing reaches");
                },
                // Claims that are left behind are finished or lifted by a later round.
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// One round.
    pub(super) async fn collect(&self) -> Result<Report, Error> {
        let _round = self.round.lock().await;
        let collected = self.round().await;
        let outcome = if collected.is_ok() { "done" } else { "failed" };
        self.rounds.get_or_create(&Outcome { outcome }).inc();
        collected
    }

    async fn round(&self) -> Result<Report, Error> {
        let mut report = Report::default();
        self.finish_doomed(&mut report).await?;
        let seen = self.look().await?;
        report.reached = seen.reached.len();
        let reached = &seen.reached;
        let unreached = seen.recorded.into_iter().filter(|(digest, _)| !reached.contains(digest));
        let old = stream::iter(unreached.collect::<Vec<_>>()).map(async |(digest, repositories)| {
            Ok::<_, Error>(self.is_old(&digest, &repositories).await?.then_some(digest))
        });
        let old: Vec<Digest> =
            old.buffer_unordered(AT_ONCE).try_filter_map(async |digest| Ok(digest)).try_collect().await?;
        for batch in old.chunks(BATCH) {
            report.claimed += batch.len();
            if let Err(error) = self.collect_batch(batch, &mut report).await {
                for digest in batch {
                    self.guard.lift_unless_doomed(digest).await?;
                }
                return Err(error);
            }
        }
        tracing::info!(?report, "collected what nothing reaches");
        Ok(report)
    }

    async fn collect_batch(&self, batch: &[Digest], report: &mut Report) -> Result<(), Error> {
        let claimed = stream::iter(batch.to_vec()).map(Ok);
        claimed.try_for_each_concurrent(AT_ONCE, async |digest| self.guard.claim(&digest).await).await?;
        let mut seen = self.look().await?;
        let batch: Vec<(Digest, Vec<Namespace>)> = batch
            .iter()
            .map(|digest| {
                let repositories = seen.recorded.remove(digest).unwrap_or_default();
                (*digest, if seen.reached.contains(digest) { Vec::new() } else { repositories })
            })
            .collect();
        let collected = stream::iter(batch).map(async |(digest, repositories)| {
            if !self.is_old(&digest, &repositories).await? {
                self.guard.lift(&digest).await?;
                return Ok((digest, Ok(false)));
            }
            Ok::<_, Error>((digest, self.delete(&digest, &repositories).await?.map(|()| true)))
        });
        let mut collected = collected.buffer_unordered(DELETED_AT_ONCE);
        while let Some(one) = collected.next().await {
            match one? {
                (_, Ok(true)) => {
                    report.collected += 1;
                    self.collected.inc();
                }
                (_, Ok(false)) => {}
                (digest, Err(why)) => report.leave(&digest, why),
            }
        }
        Ok(())
    }

    /// Deletes what this index has claimed. Where the origins refuse, nothing is deleted, and the claim is lifted unless it is
    /// doomed; where they fail in the middle, the digest stays doomed.
    async fn delete(&self, digest: &Digest, repositories: &[Namespace]) -> Result<Result<(), origin::Error>, Error> {
        if let Err(error) = self.origins.mark(digest).await {
            self.guard.lift_unless_doomed(digest).await?;
            return Ok(Err(error));
        }
        self.guard.doom(digest).await?;
        for repository in repositories {
            if let Err(error) = self.origins.discard(repository, digest).await {
                return Ok(Err(error));
            }
        }
        for repository in repositories {
            self.store.forget(repository, digest).await?;
        }
        if let Err(error) = self.origins.unmark(digest).await {
            // One that does not answer now forgets its mark by itself.
            tracing::debug!(?digest, %error, "unmark a deleted blob");
        }
        self.guard.lift(digest).await?;
        tracing::info!(?digest, "collected");
        Ok(Ok(()))
    }

    /// Finishes what a round began to delete and did not end.
    async fn finish_doomed(&self, report: &mut Report) -> Result<(), Error> {
        let doomed = self.guard.doomed().await?;
        if doomed.is_empty() {
            return Ok(());
        }
        let seen = self.look().await?;
        for (digest, claim) in doomed {
            self.guard.doom(&digest).await?;
            // Only while it stood until ours did is it certain that nobody has pushed the digest in between.
            if !self.guard.is_mine(claim) && !self.guard.stands(&digest, claim).await? {
                self.guard.lift(&digest).await?;
                continue;
            }
            let repositories = seen.recorded.get(&digest).map(Vec::as_slice).unwrap_or_default();
            let deleted = match seen.reached.contains(&digest) {
                // Something that asks no guard has named it. With the claims lifted, a push can make it whole.
                true => {
                    report.leave(&digest, "it is reached, and was about to be deleted");
                    Ok(())
                }
                false => self.delete(&digest, repositories).await?.inspect(|()| {
                    report.collected += 1;
                    self.collected.inc();
                }),
            };
            match deleted {
                Ok(()) => {
                    self.guard.lift_of(&digest, claim).await?;
                    self.guard.lift(&digest).await?;
                }
                Err(why) => report.leave(&digest, why),
            }
        }
        Ok(())
    }

    /// Whether some content has records, all of them older than the grace.
    async fn is_old(&self, digest: &Digest, repositories: &[Namespace]) -> Result<bool, Error> {
        for repository in repositories {
            let record = self.store.record(repository, digest).await?;
            if record.is_none_or(|record| now().saturating_sub(record.at) < self.config.grace.get()) {
                return Ok(false);
            }
        }
        Ok(!repositories.is_empty())
    }

    /// Goes over everything. Pins come first: what a push has done with by then is found in the lists that follow.
    async fn look(&self) -> Result<Seen, Error> {
        let mut roots: BTreeMap<Digest, Namespace> = BTreeMap::new();
        for (repository, digest) in self.guard.pins().await? {
            roots.insert(digest, repository);
        }
        let mut recorded: BTreeMap<Digest, Vec<Namespace>> = BTreeMap::new();
        let mut listed = 0;
        for route in self.store.routes() {
            let mut after: Option<String> = None;
            loop {
                let ask = List { prefix: Naming::DockerTag.base(), after: after.as_deref(), limit: 0 };
                let page = route.paths().list(ask).await?;
                listed += page.names.len();
                if listed > LISTED_MAX {
                    return Err(Error::Failed(format!("more than {LISTED_MAX} objects")));
                }
                let mut tags = Vec::new();
                for path in &page.names {
                    match parse(path) {
                        Some(Entry::Tag) => tags.extend(Naming::DockerTag.name(path)),
                        Some(Entry::Manifest(repository, digest)) => {
                            roots.entry(digest).or_insert(repository);
                        }
                        Some(Entry::Content(repository, digest)) => {
                            recorded.entry(digest).or_default().push(repository)
                        }
                        None => {}
                    }
                }
                roots.extend(self.tagged(&**route.store(), tags).await?);
                after = page.names.last().cloned();
                if !page.more {
                    break;
                }
            }
        }
        let (reached, known) = self.reach(roots).await?;
        *self.named.lock().unwrap_or_else(PoisonError::into_inner) = known;
        Ok(Seen { reached, recorded })
    }

    /// What tags stand for.
    async fn tagged(&self, store: &dyn Backend, tags: Vec<String>) -> Result<Vec<(Digest, Namespace)>, Error> {
        let read = stream::iter(tags).map(async |name| match read_link(store, &name).await {
            Ok(digest) => {
                let repository = name.split_once(':').and_then(|(repository, _)| repository.parse::<Namespace>().ok());
                repository
                    .map(|repository| Some((digest, repository)))
                    .ok_or_else(|| Error::Failed(format!("{name} is no tag")))
            }
            Err(Error::NotFound) => Ok(None),
            Err(error) => Err(error),
        });
        read.buffer_unordered(AT_ONCE).try_filter_map(async |one| Ok(one)).try_collect().await
    }

    /// Everything that a manifest needs, and itself.
    pub(super) async fn needed(&self, repository: &Namespace, digest: &Digest) -> Result<BTreeSet<Digest>, Error> {
        Ok(self.reach([(*digest, repository.clone())]).await?.0)
    }

    /// Everything that can be reached from `roots`, and what each manifest of it names.
    async fn reach(
        &self,
        roots: impl IntoIterator<Item = (Digest, Namespace)>,
    ) -> Result<(BTreeSet<Digest>, Known), Error> {
        let mut queue: VecDeque<(Digest, Namespace)> = roots.into_iter().collect();
        let mut reached: BTreeSet<Digest> = queue.iter().map(|(digest, _)| *digest).collect();
        let mut known = HashMap::new();
        while !queue.is_empty() {
            let layer = stream::iter(std::mem::take(&mut queue)).map(async |(digest, repository)| {
                let named = self.named(&repository, &digest).await?;
                Ok::<_, Error>((digest, repository, named))
            });
            let mut layer = layer.buffer_unordered(AT_ONCE);
            while let Some(one) = layer.next().await {
                let (digest, repository, named) = one?;
                reached.extend(&named.blobs);
                for manifest in &named.manifests {
                    if reached.insert(*manifest) {
                        queue.push_back((*manifest, repository.clone()));
                    }
                }
                known.insert(digest, named);
            }
        }
        Ok((reached, known))
    }

    /// What a digest names, if it is a manifest. What is certainly nowhere names nothing.
    async fn named(&self, repository: &Namespace, digest: &Digest) -> Result<Arc<Named>, Error> {
        if let Some(named) = self.named.lock().unwrap_or_else(PoisonError::into_inner).get(digest) {
            return Ok(named.clone());
        }
        let read = async {
            if self.origins.stat(repository, digest).await? > manifest::LEN_MAX as u64 {
                return Ok(None);
            }
            self.origins.read(repository, digest, manifest::LEN_MAX, FETCH_WAIT).await.map(Some)
        };
        let bytes = match read.await {
            Ok(bytes) => bytes,
            Err(origin::Error::NotFound) => None,
            Err(error) => return Err(Error::Unavailable(format!("read manifest {digest}: {error}"))),
        };
        let manifest = bytes.and_then(|bytes| Manifest::parse(&bytes).ok());
        let digests = |of: &mut dyn Iterator<Item = &manifest::Descriptor>| {
            of.filter_map(|one| one.digest.parse().ok()).collect::<Vec<Digest>>()
        };
        Ok(Arc::new(manifest.map_or_else(Named::default, |manifest| Named {
            blobs: digests(&mut manifest.config.iter().chain(&manifest.layers)),
            manifests: digests(&mut manifest.manifests.iter()),
        })))
    }
}

fn parse(path: &str) -> Option<Entry> {
    let below = path.strip_prefix(Naming::DockerTag.base())?;
    let digest = |text: &str| text.strip_suffix(LINK)?.replacen('/', ":", 1).parse::<Digest>().ok();
    if Naming::DockerTag.name(path).is_some() {
        return Some(Entry::Tag);
    }
    if let Some((repository, rest)) = below.split_once(CONTENT) {
        return Some(Entry::Content(repository.parse().ok()?, digest(rest)?));
    }
    if let Some((repository, rest)) = below.split_once(REVISIONS) {
        return Some(Entry::Manifest(repository.parse().ok()?, digest(rest)?));
    }
    let (repository, rest) = below.split_once(REFERRERS)?;
    let mut parts = rest.splitn(3, '/');
    let referrer = parts.nth(2)?;
    Some(Entry::Manifest(repository.parse().ok()?, digest(referrer)?))
}
