//! Fetching a blob that is asked for and not here: from another origin where one holds it, else from the backend.
//!
//! Whoever asks for the same blob meanwhile shares the work. The bytes are hashed on their way in and appear under their name only
//! if they are the digest.

use super::{
    Shared,
    blobs::bytes_of,
    figures, refusal,
    replicas::HOLDS_TIMEOUT,
    write_back::{HELD, name_in_backend},
};
use crate::{
    client::{cluster::Member, origin::Reach},
    http,
    registry::{
        manifest::{self, Manifest},
        range::Spec,
    },
    upstream,
};
use backends::Backend;
use bytes::Bytes;
use engine::handle::{Stat, Upload};
use futures_util::{
    StreamExt, TryStreamExt,
    stream::{BoxStream, FuturesUnordered},
};
use http_body_util::BodyExt;
use hyper::StatusCode;
use peer_proto::{Digest, Layout, Namespace};
use std::{sync::Arc, time::Duration};

/// Longest wait for a place among the fetches.
const PLACE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the next bytes of a source.
const BYTES_TIMEOUT: Duration = Duration::from_secs(60);
/// Times that a broken source is gone on with.
const BREAKS_MAX: u32 = 4;
/// The pause before that.
const BREAK_PAUSE: Duration = Duration::from_millis(200);

/// Where a blob that is not here can be had.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) size: u64,
    source: Source,
}

#[derive(Clone)]
enum Source {
    Origin(Member),
    Backend(Arc<dyn Backend>),
    Upstream(upstream::Repository, upstream::Kind),
}

/// A fetch under way, or its result.
pub(super) type Fetched = Result<Arc<Layout>, http::Error>;

impl Shared {
    /// Who has a blob that is not here. 404 where nobody has; 500 where the backend cannot be asked.
    pub(super) async fn locate(self: &Arc<Self>, namespace: &Namespace, digest: &Digest) -> Result<Found, http::Error> {
        let (shared, namespace, digest) = (self.clone(), namespace.clone(), *digest);
        let flight = self.lookups.join((namespace.clone(), digest), || async move {
            match shared.locate_origin(&namespace, &digest).await {
                Some(found) => Ok(found),
                None => shared.locate_backend(&namespace, &digest).await,
            }
        });
        flight.await.unwrap_or_else(|| Err(http::Error::internal("look-up ended early")))
    }

    async fn locate_origin(&self, namespace: &Namespace, digest: &Digest) -> Option<Found> {
        let others = self.cluster.order(digest).into_iter();
        let others: Vec<_> = others.filter(|member| *member != self.me && self.cluster.is_up(*member)).collect();
        let asked = others.into_iter().map(|member| async move {
            let origin = self.cluster.origin(member);
            let size = tokio::time::timeout(HOLDS_TIMEOUT, origin.stat(namespace, digest, Reach::Local));
            let size = size.await.ok()?.ok()?;
            Some(Found { size, source: Source::Origin(member) })
        });
        // The first that has it will do; one that hangs is not waited for then.
        let mut asked: FuturesUnordered<_> = asked.collect();
        while let Some(found) = asked.next().await {
            if found.is_some() {
                return found;
            }
        }
        None
    }

    async fn locate_backend(&self, namespace: &Namespace, digest: &Digest) -> Result<Found, http::Error> {
        let upstream = self.upstreams.any(namespace);
        let kept = match self.backends.find(namespace.as_str()) {
            None => Err(http::Error::not_found("no origin has the blob and no backend keeps its namespace")),
            Some(route) => match route.store().stat(&name_in_backend(digest)).await {
                Ok(size) => Ok(Found { size, source: Source::Backend(route.store().clone()) }),
                Err(error) if error.is_not_found() => Err(http::Error::not_found("blob not found")),
                Err(error) => {
                    tracing::warn!(?digest, %namespace, %error, "ask the backend for a blob");
                    Err(http::Error::internal(format!("backend: {error}")))
                }
            },
        };
        match (kept, upstream) {
            (Err(error), Some(upstream)) if error.status == StatusCode::NOT_FOUND => {
                locate_upstream(upstream, digest).await
            }
            (kept, _) => kept,
        }
    }

    /// Starts to fetch a blob that is not here, or joins whoever does. Returns once it is under way: what comes of it is told by
    /// the flight. 404, 500 and 503 where it cannot begin.
    pub(super) async fn refresh(
        self: &Arc<Self>,
        namespace: &Namespace,
        digest: &Digest,
    ) -> Result<super::flight::Flight<Fetched>, http::Error> {
        if let Some(flight) = self.fetches.find(digest) {
            return Ok(flight);
        }
        let found = self.locate(namespace, digest).await?;
        if let Some(most) = self.config.refresh.size_max
            && found.size > most.get()
        {
            let message = format!("blob has {} bytes, at most {} are fetched", found.size, most.get());
            return Err(http::Error::internal(message));
        }
        let place = tokio::time::timeout(PLACE_TIMEOUT, self.fetch_places.clone().acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            return Err(http::Error::unavailable("too many blobs are being fetched"));
        };
        let (shared, namespace, digest) = (self.clone(), namespace.clone(), *digest);
        Ok(self.fetches.join(digest, || async move {
            let _place = place;
            shared.refuse_marked(&digest)?;
            let fetched = shared.fetch(&namespace, &digest, found.clone()).await;
            if fetched.is_ok() && matches!(found.source, Source::Backend(_) | Source::Upstream(..)) {
                shared.share(digest);
            }
            if let (Ok(layout), Source::Upstream(..)) = (&fetched, &found.source) {
                shared.keep_manifest(&namespace, layout).await;
            }
            fetched
        }))
    }

    /// Has the other owners given what came from the backend, while clients already read it here. Where there is no place for that
    /// now, they fetch it when they are asked, or repair brings it.
    fn share(self: &Arc<Self>, digest: Digest) {
        for owner in self.cluster.owners(&digest) {
            if owner == self.me || self.transfers.available_permits() == 0 {
                continue;
            }
            let shared = self.clone();
            tokio::spawn(async move {
                if let Err(error) = shared.push(&digest, owner, None).await {
                    tracing::debug!(?digest, %error, "share a blob from the backend");
                }
            });
        }
    }

    /// Has a manifest from an upstream taken to the backend, so that it outlives the upstream. Its kind does not tell: registries
    /// may give manifests as blobs, too.
    async fn keep_manifest(&self, namespace: &Namespace, layout: &Layout) {
        let (digest, length) = (layout.digest(), layout.length());
        if length > manifest::LEN_MAX as u64 {
            return;
        }
        let read = async {
            let reader = self.engine.read(digest, 0..length).await?;
            bytes_of(reader).try_fold(Vec::new(), async |bytes, part| Ok([&bytes[..], &part].concat())).await
        };
        match read.await {
            Ok(bytes) if Manifest::parse(&bytes).is_ok() => {
                // `hold` says what went wrong; then it is fetched again when it is asked for.
                drop(self.hold(digest, &self.write_back_hold(namespace, HELD, Duration::ZERO)).await);
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(?digest, %error, "look at what came from an upstream"),
        }
    }

    /// Fetches an acknowledged blob that was lost here.
    pub(super) async fn fetch_from_origins(&self, namespace: &Namespace, digest: &Digest) -> Fetched {
        let found = self.locate_origin(namespace, digest).await;
        let found = found.ok_or_else(|| http::Error::not_found("no origin has the blob"))?;
        self.fetch(namespace, digest, found).await
    }

    async fn fetch(&self, namespace: &Namespace, digest: &Digest, found: Found) -> Fetched {
        let label = match found.source {
            Source::Origin(_) => "origin",
            Source::Backend(_) => "backend",
            Source::Upstream(..) => "upstream",
        };
        let fetched = self.fetch_blob(namespace, digest, &found).await;
        match &fetched {
            Ok(layout) => {
                self.figures.refreshed(label, figures::DONE);
                self.figures.refresh_bytes.inc_by(layout.length());
            }
            Err(error) => {
                self.figures.refreshed(label, figures::FAILED);
                tracing::warn!(?digest, %namespace, from = label, %error, "fetch a blob");
            }
        }
        fetched
    }

    async fn fetch_blob(&self, namespace: &Namespace, digest: &Digest, found: &Found) -> Fetched {
        // Somebody may have brought it while we looked for it.
        if let Stat::Whole { layout } = self.engine.stat(digest).await.map_err(refusal)? {
            return Ok(layout);
        }
        let mut upload = self.engine.upload(digest.algorithm(), Some(found.size)).await.map_err(refusal)?;
        if let Err(error) = self.fill(namespace, digest, found, &mut upload).await {
            upload.abort().await.map_err(refusal)?;
            return Err(error);
        }
        upload.commit(digest).await.map_err(|error| match error {
            engine::handle::Error::Mismatch { actual, .. } => {
                tracing::error!(?digest, %actual, "fetched bytes are not the blob");
                http::Error::internal(format!("fetched content has digest {actual}, expected {digest}"))
            }
            error => refusal(error),
        })
    }

    /// Takes all bytes from a source, going on where it broke off.
    async fn fill(
        &self,
        namespace: &Namespace,
        digest: &Digest,
        found: &Found,
        upload: &mut Upload,
    ) -> Result<(), http::Error> {
        let mut breaks = 0;
        loop {
            let before = upload.len();
            let error = match self.fill_once(namespace, digest, found, upload).await {
                Ok(()) => return Ok(()),
                Err(Broke::Source(error)) => error,
                Err(Broke::Off(error)) => return Err(error),
            };
            if upload.len() > before {
                breaks = 0;
            }
            breaks += 1;
            if breaks > BREAKS_MAX {
                return Err(http::Error::internal(error));
            }
            tokio::time::sleep(BREAK_PAUSE).await;
        }
    }

    async fn fill_once(
        &self,
        namespace: &Namespace,
        digest: &Digest,
        found: &Found,
        upload: &mut Upload,
    ) -> Result<(), Broke> {
        let rest = upload.len()..found.size;
        if rest.is_empty() {
            return Ok(());
        }
        let mut bytes: BoxStream<'static, Result<Bytes, String>> = match &found.source {
            Source::Origin(member) => {
                let origin = self.cluster.origin(*member);
                let wanted = Spec::Between(rest.start, rest.end - 1);
                let opened = origin.get(namespace, digest, Some(wanted), Reach::Local).await;
                let opened = opened.map_err(|error| Broke::Source(error.to_string()))?;
                if opened.total != found.size || opened.range != rest {
                    return Err(Broke::Off(http::Error::internal("another origin has another size for the blob")));
                }
                opened.body.into_data_stream().map(|part| part.map_err(|error| error.to_string())).boxed()
            }
            Source::Backend(store) => {
                let object = store.read(&name_in_backend(digest), Some(rest.clone())).await;
                let object = object.map_err(|error| Broke::Source(format!("backend: {error}")))?;
                if object.size != found.size {
                    return Err(Broke::Off(http::Error::internal("backend changed the blob's size")));
                }
                object.bytes.map(|part| part.map_err(|error| format!("backend: {error}"))).boxed()
            }
            Source::Upstream(repository, kind) => {
                let object = repository.read(digest, *kind, rest.start).await;
                let object = object.map_err(|error| match error {
                    upstream::Error::Limited { why, after } => {
                        Broke::Off(http::Error::limited(format!("upstream: {why}"), after))
                    }
                    error => Broke::Source(error.to_string()),
                })?;
                if object.size.is_some_and(|size| size != found.size) {
                    return Err(Broke::Off(http::Error::internal("upstream changed the blob's size")));
                }
                object.bytes.map(|part| part.map_err(|error| format!("upstream: {error}"))).boxed()
            }
        };
        while upload.len() < found.size {
            let part = tokio::time::timeout(BYTES_TIMEOUT, bytes.next()).await;
            let part = part.map_err(|_| Broke::Source(format!("source sent nothing for {BYTES_TIMEOUT:?}")))?;
            let part = part.ok_or_else(|| Broke::Source("source ended early".into()))?.map_err(Broke::Source)?;
            if part.len() as u64 > found.size - upload.len() {
                return Err(Broke::Off(http::Error::internal("source sent more than it said")));
            }
            upload.write(upload.len(), part).await.map_err(|error| Broke::Off(refusal(error)))?;
        }
        Ok(())
    }
}

/// What an upstream has. What it does not let us have is not there.
async fn locate_upstream(repository: upstream::Repository, digest: &Digest) -> Result<Found, http::Error> {
    match repository.stat(digest).await {
        Ok(upstream::Stat { size, kind }) => Ok(Found { size, source: Source::Upstream(repository, kind) }),
        Err(upstream::Error::NotFound) => Err(http::Error::not_found("upstream does not have the blob")),
        Err(error @ upstream::Error::Denied(_)) => {
            tracing::warn!(?digest, upstream = repository.upstream().name(), %error, "ask an upstream for a blob");
            Err(http::Error::not_found("upstream does not let us have the blob"))
        }
        Err(upstream::Error::Unavailable(why)) => Err(http::Error::unavailable(format!("upstream: {why}"))),
        Err(upstream::Error::Limited { why, after }) => Err(http::Error::limited(format!("upstream: {why}"), after)),
        Err(error @ upstream::Error::Answer(_)) => {
            tracing::warn!(?digest, upstream = repository.upstream().name(), %error, "ask an upstream for a blob");
            Err(http::Error::internal(error.to_string()))
        }
    }
}

/// Why the bytes did not all come.
enum Broke {
    /// Another try may go on.
    Source(String),
    /// It is no use.
    Off(http::Error),
}
