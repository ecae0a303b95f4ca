//! What pushes and a collection say to each other, so that neither undoes the other: objects that both see.
//!
//! ```text
//! docker/registry/v2/shoal/pins/<uuid>                        "<digest> <time> <repository>": a manifest being put
//! docker/registry/v2/shoal/claims/<alg>/<hex>/<collector>     "claimed <time>" or "doomed <time>"
//! ```
//!
//! A push writes first what makes its content reachable (a pin, or a record of the content) and then looks for claims; a collector
//! writes first a claim and then looks for what is reachable. So at least one of the two sees the other, in whatever order their
//! steps happen: the push that sees a claim is refused and tried again, the collector that sees content reached lifts its claim.
//!
//! A doomed claim says that deleting has begun. Whoever finds one finishes that; until then pushes of the digest are refused, so
//! that nobody relies on what is half deleted.

use super::store::Error;
use backends::{Backend, List};
use bytes::Bytes;
use peer_proto::{Digest, Namespace};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};
use uuid::Uuid;

const PINS: &str = "docker/registry/v2/shoal/pins/";
const CLAIMS: &str = "docker/registry/v2/shoal/claims/";
/// Longest pin or claim, bytes.
const LEN_MAX: usize = 1024;
/// Most pins or claims looked at.
const LISTED_MAX: usize = 100_000;
/// The age at which a pin is of a push that ended without a word.
const PIN_AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// The age at which a claim that is not doomed is of a collector that ended without a word.
const CLAIM_AGE_MAX: Duration = Duration::from_secs(6 * 3600);

/// The age at which a doomed claim is of a collector that does not come back to it.
const DOOMED_AGE_MIN: Duration = Duration::from_secs(3600);

/// Pins and claims of one index.
#[derive(Clone)]
pub(super) struct Guard {
    /// The same store for all indexes.
    paths: Arc<dyn Backend>,
    /// Names this index among collectors.
    me: Uuid,
}

/// What a collector has said about a digest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Claim {
    pub(super) doomed: bool,
    collector: Uuid,
    /// How long ago.
    age: Duration,
}

/// Unix time.
pub(super) fn now() -> Duration {
    SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default()
}

impl Guard {
    pub(super) fn new(paths: Arc<dyn Backend>) -> Self {
        Self { paths, me: Uuid::new_v4() }
    }

    /// Says that a manifest is being put. The name of the pin, to be lifted when it has been.
    pub(super) async fn pin(&self, repository: &Namespace, digest: &Digest) -> Result<String, Error> {
        let path = format!("{PINS}{}", Uuid::new_v4());
        let text = format!("{digest} {} {repository}", now().as_millis());
        self.paths.write(&path, Bytes::from(text).into()).await?;
        Ok(path)
    }

    pub(super) async fn unpin(&self, pin: &str) -> Result<(), Error> {
        Ok(self.paths.delete(pin).await?)
    }

    /// The manifests being put.
    pub(super) async fn pins(&self) -> Result<Vec<(Namespace, Digest)>, Error> {
        let mut pins = Vec::new();
        for path in self.list(PINS).await? {
            let Some(text) = self.read(&path).await? else { continue };
            let mut words = text.splitn(3, ' ');
            let digest = words.next().and_then(|word| word.parse::<Digest>().ok());
            let since = words.next().and_then(|word| word.parse().ok()).map(Duration::from_millis);
            let repository = words.next().and_then(|word| word.parse::<Namespace>().ok());
            let (Some(digest), Some(since), Some(repository)) = (digest, since, repository) else {
                return Err(Error::Failed(format!("what is kept as {path} is no pin")));
            };
            if now().saturating_sub(since) < PIN_AGE_MAX {
                pins.push((repository, digest));
            } else {
                self.remove(&path).await?;
            }
        }
        Ok(pins)
    }

    /// The digests that any collector has claimed.
    pub(super) async fn claimed(&self) -> Result<BTreeSet<Digest>, Error> {
        Ok(self.list(CLAIMS).await?.iter().filter_map(|path| Some(parse(path)?.0)).collect())
    }

    /// Whether any collector has claimed a digest.
    pub(super) async fn is_claimed(&self, digest: &Digest) -> Result<bool, Error> {
        let prefix = claims_path(digest);
        let page = self.paths.list(List { prefix: &prefix, after: None, limit: 1 }).await?;
        Ok(!page.names.is_empty())
    }

    /// The claims that are doomed and that nobody else is at work on, one for a digest. Others that are old are lifted.
    pub(super) async fn doomed(&self) -> Result<BTreeMap<Digest, Claim>, Error> {
        let mut doomed = BTreeMap::new();
        for path in self.list(CLAIMS).await? {
            let Some((digest, claim)) = self.read_claim(&path).await? else { continue };
            if claim.doomed && (self.is_mine(claim) || claim.age >= DOOMED_AGE_MIN) {
                doomed.insert(digest, claim);
            } else if !claim.doomed && claim.age >= CLAIM_AGE_MAX {
                self.remove(&path).await?;
            }
        }
        Ok(doomed)
    }

    /// Lifts our own claim, unless deleting has begun.
    pub(super) async fn lift_unless_doomed(&self, digest: &Digest) -> Result<(), Error> {
        let path = claim_path(digest, self.me);
        match self.read_claim(&path).await? {
            Some((_, claim)) if !claim.doomed => self.remove(&path).await,
            _ => Ok(()),
        }
    }

    async fn read_claim(&self, path: &str) -> Result<Option<(Digest, Claim)>, Error> {
        let (Some((digest, collector)), Some(text)) = (parse(path), self.read(path).await?) else { return Ok(None) };
        let (what, since) = text.split_once(' ').unwrap_or_default();
        let since = since.trim().parse().map(Duration::from_millis);
        let since = since.map_err(|_| Error::Failed(format!("what is kept as {path} is no claim")))?;
        let age = now().saturating_sub(since);
        Ok(Some((digest, Claim { doomed: what == "doomed", collector, age })))
    }

    /// Whether another collector's claim still stands.
    pub(super) async fn stands(&self, digest: &Digest, claim: Claim) -> Result<bool, Error> {
        Ok(self.read(&claim_path(digest, claim.collector)).await?.is_some())
    }

    pub(super) async fn claim(&self, digest: &Digest) -> Result<(), Error> {
        self.say(digest, "claimed").await
    }

    pub(super) async fn doom(&self, digest: &Digest) -> Result<(), Error> {
        self.say(digest, "doomed").await
    }

    async fn say(&self, digest: &Digest, what: &str) -> Result<(), Error> {
        let text = format!("{what} {}", now().as_millis());
        Ok(self.paths.write(&claim_path(digest, self.me), Bytes::from(text).into()).await?)
    }

    pub(super) async fn lift(&self, digest: &Digest) -> Result<(), Error> {
        self.remove(&claim_path(digest, self.me)).await
    }

    /// Lifts another collector's claim, once what it began is finished.
    pub(super) async fn lift_of(&self, digest: &Digest, claim: Claim) -> Result<(), Error> {
        self.remove(&claim_path(digest, claim.collector)).await
    }

    pub(super) fn is_mine(&self, claim: Claim) -> bool {
        claim.collector == self.me
    }

    async fn remove(&self, path: &str) -> Result<(), Error> {
        match self.paths.delete(path).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            _ => Ok(()),
        }
    }

    async fn read(&self, path: &str) -> Result<Option<String>, Error> {
        let read = async { self.paths.read(path, None).await?.collect(LEN_MAX).await };
        match read.await {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let mut paths: Vec<String> = Vec::new();
        loop {
            let page = self.paths.list(List { prefix, after: paths.last().map(String::as_str), limit: 0 }).await?;
            paths.extend(page.names);
            if paths.len() > LISTED_MAX {
                return Err(Error::Failed(format!("more than {LISTED_MAX} objects below {prefix}")));
            }
            if !page.more {
                return Ok(paths);
            }
        }
    }
}

fn claims_path(digest: &Digest) -> String {
    format!("{CLAIMS}{}/{}/", digest.algorithm().name(), digest.hex())
}

fn claim_path(digest: &Digest, collector: Uuid) -> String {
    format!("{}{collector}", claims_path(digest))
}

fn parse(path: &str) -> Option<(Digest, Uuid)> {
    let (digest, collector) = path.strip_prefix(CLAIMS)?.rsplit_once('/')?;
    Some((digest.replacen('/', ":", 1).parse().ok()?, Uuid::try_parse(collector).ok()?))
}
