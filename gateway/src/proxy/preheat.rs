//! Bringing images nearer before they are pulled: on a registry's push notification (Harbor's Kraken driver sends them) and on
//! a prefetch request. The origins fetch from their backend what they do not hold; nothing passes through the proxy.

use crate::{
    http::{self, Request, Response},
    registry::{Content, Failure, Repository, Service, Tag, manifest::Kind},
};
use futures_util::{StreamExt, stream};
use hyper::StatusCode;
use peer_proto::Digest;
use serde::{Deserialize, Serialize};
use std::{ops::RangeInclusive, sync::Arc, time::Duration};

/// Longest request, bytes.
const BODY_MAX: usize = 1 << 20;
/// Blobs asked for at once by one request.
const CONCURRENT: usize = 16;
/// Waits before a manifest is asked for again: a registry may send its notification before the manifest can be read.
const RETRIES: [Duration; 3] = [Duration::from_millis(100), Duration::from_millis(200), Duration::from_millis(400)];

/// Which blobs are worth it.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Sizes in bytes of blobs that are prefetched; others are left for the first pull.
    pub sizes: RangeInclusive<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { sizes: 0..=50 << 30 }
    }
}

/// The two prefetch requests: the first answers before the blobs were asked for and cannot tell that one failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Version {
    V1,
    V2,
}

/// Preheat of the images of one registry.
pub struct Preheat<C> {
    registry: Arc<Service<C>>,
    limits: Limits,
}

#[derive(Deserialize)]
struct Envelope {
    #[serde(default)]
    events: Vec<Event>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    action: String,
    #[serde(default)]
    target: Target,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Target {
    media_type: String,
    repository: String,
    digest: String,
}

#[derive(Deserialize)]
struct Asked {
    #[serde(default)]
    tag: String,
    #[serde(default)]
    trace_id: String,
}

#[derive(Serialize)]
struct Done<'a> {
    tag: &'a str,
    prefetched: bool,
    status: &'static str,
    message: &'static str,
    trace_id: &'a str,
}

#[derive(Serialize)]
struct Failed<'a> {
    error: &'static str,
    prefetched: bool,
    status: &'static str,
    message: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    trace_id: &'a str,
}

impl<C: Content> Preheat<C> {
    pub(super) fn new(registry: Arc<Service<C>>, limits: Limits) -> Self {
        Self { registry, limits }
    }

    /// Takes a registry's notification. What goes wrong with an image is logged: the sender could do nothing about it.
    pub(super) async fn notify(&self, request: Request) -> Response {
        let decoded = http::read_body(request.into_body(), BODY_MAX).await.and_then(|body| {
            serde_json::from_slice::<Envelope>(&body)
                .map_err(|error| http::Error::internal(format!("decode body: {error}")))
        });
        let envelope = match decoded {
            Ok(envelope) => envelope,
            Err(error) => return error.into(),
        };
        let pushed =
            |event: &&Event| event.action == "push" && Kind::from_media_type(&event.target.media_type).is_some();
        for Event { target, .. } in envelope.events.iter().filter(pushed) {
            match self.preheat(target).await {
                Ok(blobs) => {
                    tracing::info!(repository = target.repository, digest = target.digest, blobs, "preheating")
                }
                Err(why) => {
                    tracing::warn!(repository = target.repository, digest = target.digest, why, "preheat failed");
                }
            }
        }
        http::status(StatusCode::OK)
    }

    async fn preheat(&self, target: &Target) -> Result<usize, String> {
        let repository: Repository = target.repository.parse().map_err(|error| format!("{error}"))?;
        let digest: Digest = target.digest.parse().map_err(|error| format!("{error}"))?;
        let mut retries = RETRIES.into_iter();
        let blobs = loop {
            match self.registry.image_blobs(&repository, &digest).await {
                Ok(blobs) => break blobs,
                Err(Failure::Unknown) if let Some(wait) = retries.next() => tokio::time::sleep(wait).await,
                Err(failure) => return Err(format!("manifest {failure}")),
            }
        };
        let asked = blobs.len();
        match self.warm(&repository, blobs.into_keys().collect()).await.as_slice() {
            [] => Ok(asked),
            failed => Err(failed.join("; ")),
        }
    }

    /// Prefetches the image of a tag.
    pub(super) async fn prefetch(&self, request: Request, version: Version) -> Response {
        let decoded = http::read_body(request.into_body(), BODY_MAX).await.and_then(|body| {
            serde_json::from_slice::<Asked>(&body).map_err(|error| http::Error::bad_request(error.to_string()))
        });
        let Asked { tag, trace_id } = match decoded {
            Ok(asked) => asked,
            Err(error) => {
                return failed(
                    StatusCode::BAD_REQUEST,
                    &format!("failed to decode request body: {}", error.message),
                    "",
                );
            }
        };
        let Some((repository, name)) = image(&tag) else {
            let why = format!("tag: {tag}, invalid tag format: expected host/repository:tag");
            return failed(StatusCode::BAD_REQUEST, &why, &trace_id);
        };
        match self.try_prefetch(&repository, &name, version).await {
            Ok(blobs) => {
                tracing::info!(%repository, tag = %name, trace_id, blobs, "prefetching");
                let tag = tag.rsplit('/').next().unwrap_or_default();
                let message = "prefetching initiated successfully";
                let done = Done { tag, prefetched: true, status: "success", message, trace_id: &trace_id };
                http::json(StatusCode::OK, &done)
            }
            Err(why) => {
                tracing::warn!(%repository, tag = %name, trace_id, why, "prefetch failed");
                failed(StatusCode::INTERNAL_SERVER_ERROR, &why, &trace_id)
            }
        }
    }

    async fn try_prefetch(&self, repository: &Repository, tag: &Tag, version: Version) -> Result<usize, String> {
        let digest = self.registry.content().resolve(repository, tag).await;
        let digest =
            digest.map_err(|failure| format!("tag request: {repository}:{tag}, failed to get tag: {failure}"))?;
        let blobs = self.registry.image_blobs(repository, &digest).await;
        let mut blobs = blobs.map_err(|failure| format!("error downloading manifest blob: {failure}"))?;
        blobs.retain(|_, size| self.limits.sizes.contains(size));
        let asked = blobs.len();
        let failures = self.warm(repository, blobs.into_keys().collect()).await;
        match (version, failures.as_slice()) {
            (_, []) => Ok(asked),
            (Version::V1, failures) => {
                tracing::warn!(%repository, %tag, why = failures.join("; "), "prefetched in part");
                Ok(asked - failures.len())
            }
            (Version::V2, failures) => {
                let why = failures.join("; ");
                Err(format!("failed to trigger image prefetch: at least one layer could not be prefetched: {why}"))
            }
        }
    }

    /// Has blobs brought nearer; what failed.
    async fn warm(&self, repository: &Repository, blobs: Vec<Digest>) -> Vec<String> {
        let warmed = stream::iter(blobs).map(async |digest: Digest| {
            let warmed = self.registry.content().warm(repository, &digest).await;
            warmed
                .err()
                .map(|failure| format!("digest {digest}, namespace {repository}, blob prefetch failure: {failure}"))
        });
        warmed.buffer_unordered(CONCURRENT).filter_map(async |failure| failure).collect().await
    }
}

/// The repository and tag of `host/repository:tag`.
fn image(text: &str) -> Option<(Repository, Tag)> {
    let (host, image) = text.split_once('/')?;
    let (repository, tag) = image.rsplit_once(':')?;
    if host.is_empty() { None } else { Some((repository.parse().ok()?, tag.parse().ok()?)) }
}

fn failed(status: StatusCode, message: &str, trace_id: &str) -> Response {
    let error = status.canonical_reason().unwrap_or_default();
    http::json(status, &Failed { error, prefetched: false, status: "failure", message, trace_id })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_named_with_their_host() {
        let parts = |text| image(text).map(|(repository, tag)| format!("{repository} {tag}"));
        for (text, expected) in [
            ("127.0.0.1:5055/uber-usi/abacus-go:bkt1-01", Some("uber-usi/abacus-go bkt1-01")),
            ("host/a/b/c/d:tag", Some("a/b/c/d tag")),
            ("host/app:1", Some("app 1")),
            ("host/app", None),
            ("app:1", None),
            ("/app:1", None),
            ("host/App:1", None),
            ("host/app:", None),
            ("host/app:1:2", None),
            ("", None),
        ] {
            assert_eq!(parts(text).as_deref(), expected, "{text}");
        }
    }
}
