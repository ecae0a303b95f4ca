//! What must be there before a tag may name it: a pull of a tag should not fail half way.

use crate::{
    client::{Origins, origin},
    registry::manifest::{self, Manifest},
};
use futures_util::{
    StreamExt, TryStreamExt,
    future::{BoxFuture, FutureExt},
    stream,
};
use peer_proto::{Digest, Namespace};
use std::{collections::BTreeSet, time::Duration};

/// Longest wait while an origin fetches a manifest from its backend.
const FETCH_WAIT: Duration = Duration::from_secs(30);
/// Questions to the origins at once, for one tag.
const ASKED_AT_ONCE: usize = 8;

/// Knows whether what a digest needs is there.
pub trait Dependencies: Send + Sync + 'static {
    /// Whether the content of `digest`, and all that it needs, is there.
    fn check<'a>(&'a self, repository: &'a Namespace, digest: &'a Digest) -> BoxFuture<'a, Result<(), Unmet>>;

    /// Whether the content of `digest` is there, whatever it needs.
    fn exists<'a>(&'a self, repository: &'a Namespace, digest: &'a Digest) -> BoxFuture<'a, Result<(), Unmet>>;

    /// Why this cannot be known now, if so.
    fn readiness(&self) -> BoxFuture<'_, Result<(), String>>;
}

/// Why a tag may not stand for a digest.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unmet {
    /// Nobody has it.
    #[error("missing dependency {0}")]
    Missing(Digest),
    /// It names something that cannot be.
    #[error("dependency {0:?} is no digest")]
    Invalid(String),
    /// Nobody can be asked.
    #[error("check dependencies: {0}")]
    Unavailable(String),
}

/// Asks the origins: a manifest needs all it refers to, anything else only itself.
pub struct OfOrigins {
    origins: Origins,
    sparse_indexes: bool,
}

impl OfOrigins {
    /// Asks these origins. With `sparse_indexes` an index of manifests need not be whole.
    pub fn new(origins: Origins, sparse_indexes: bool) -> Self {
        Self { origins, sparse_indexes }
    }

    async fn stat(&self, repository: &Namespace, digest: &Digest) -> Result<u64, Unmet> {
        self.origins.stat(repository, digest).await.map_err(|error| unmet(digest, &error))
    }

    async fn all(&self, repository: &Namespace, digest: &Digest) -> Result<(), Unmet> {
        let size = self.stat(repository, digest).await?;
        if size > manifest::LEN_MAX as u64 {
            return Ok(());
        }
        let read = self.origins.read(repository, digest, manifest::LEN_MAX, FETCH_WAIT).await;
        let bytes = read.map_err(|error| unmet(digest, &error))?;
        let Ok(manifest) = Manifest::parse(&bytes) else { return Ok(()) };
        if manifest.kind.is_index() && self.sparse_indexes {
            return Ok(());
        }
        let needed = manifest.references().filter(|reference| !reference.is_elsewhere());
        let needed: BTreeSet<Digest> = needed
            .map(|reference| reference.digest.parse().map_err(|_| Unmet::Invalid(reference.digest.clone())))
            .collect::<Result<_, _>>()?;
        let asked = stream::iter(needed).map(|digest| async move { self.stat(repository, &digest).await });
        asked.buffer_unordered(ASKED_AT_ONCE).try_for_each(|_| async { Ok(()) }).await
    }
}

impl Dependencies for OfOrigins {
    fn check<'a>(&'a self, repository: &'a Namespace, digest: &'a Digest) -> BoxFuture<'a, Result<(), Unmet>> {
        self.all(repository, digest).boxed()
    }

    fn exists<'a>(&'a self, repository: &'a Namespace, digest: &'a Digest) -> BoxFuture<'a, Result<(), Unmet>> {
        async { self.stat(repository, digest).await.map(drop) }.boxed()
    }

    fn readiness(&self) -> BoxFuture<'_, Result<(), String>> {
        async { self.origins.readiness().await.map_err(|error| error.to_string()) }.boxed()
    }
}

fn unmet(digest: &Digest, error: &origin::Error) -> Unmet {
    match error {
        origin::Error::NotFound => Unmet::Missing(*digest),
        error => Unmet::Unavailable(error.to_string()),
    }
}
