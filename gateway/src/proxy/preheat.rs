//! Bringing images nearer before they are pulled: on a registry's push notification (Harbor's Kraken driver sends them) and on
//! a prefetch request. The origins fetch from their backend what they do not hold, and hosts from the swarm where the request
//! says so; nothing passes through the proxy.

use super::hosts::{self, Hosts};
use crate::{
    http::{self, Request, Response},
    preheat::{self, Id, Label, Progress, Task, Wanted},
    registry::{Content, Failure, Image, Repository, Service, Tag, manifest::Kind},
};
use futures_util::{StreamExt, stream};
use hyper::StatusCode;
use peer_proto::Digest;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
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
    hosts: Arc<Hosts>,
    asked: Family<AskedLabels, Counter>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct AskedLabels {
    to: To,
    result: &'static str,
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
    /// Kraken's clients say none of what follows.
    #[serde(default)]
    to: Option<To>,
    /// Only agents with this label.
    #[serde(default)]
    label: Option<Label>,
    /// How long agents that come later are told as well, and progress can be asked for; seconds.
    #[serde(default)]
    ttl_s: Option<u64>,
}

/// How near an image is brought.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Deserialize, prometheus_client::encoding::EncodeLabelValue)]
#[serde(rename_all = "snake_case")]
enum To {
    Origins,
    Agents,
}

#[derive(Serialize)]
struct Done<'a> {
    tag: &'a str,
    prefetched: bool,
    status: &'static str,
    message: &'static str,
    trace_id: &'a str,
    /// What progress is asked for by.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
}

/// What is told of a preheat under way.
#[derive(Serialize)]
struct Told {
    #[serde(flatten)]
    progress: Progress,
    /// Every host has said its last word.
    over: bool,
    /// Every host, and at least one, holds all of it.
    proven: bool,
    /// The same for people.
    message: String,
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
    pub(super) fn new(registry: Arc<Service<C>>, limits: Limits, hosts: Arc<Hosts>) -> Self {
        Self { registry, limits, hosts, asked: Family::default() }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let help = "Images that were asked to be brought nearer, by whom to and how it began";
        registry.register("proxy_preheats", help, self.asked.clone());
    }

    fn count(&self, to: To, begun: bool) {
        let result = if begun { "begun" } else { "failed" };
        self.asked.get_or_create(&AskedLabels { to, result }).inc();
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
            let preheated = self.preheat(target).await;
            self.count(To::Origins, preheated.is_ok());
            match preheated {
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
            match self.registry.image(&repository, &digest).await {
                Ok(image) => break image.blobs,
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
        let (parts, body) = request.into_parts();
        let decoded = http::read_body(body, BODY_MAX).await.and_then(|body| {
            serde_json::from_slice::<Asked>(&body).map_err(|error| http::Error::bad_request(error.to_string()))
        });
        let Asked { tag, trace_id, to, label, ttl_s } = match decoded {
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
        if let Err(error) = self.registry.admit(&parts, &repository).await {
            return error.into();
        }
        let to = match (to, &label) {
            (Some(To::Origins), Some(_)) => {
                return failed(
                    StatusCode::BAD_REQUEST,
                    "label: origins have none; leave out to, or say agents",
                    &trace_id,
                );
            }
            (None, Some(_)) => To::Agents,
            (to, _) => to.unwrap_or(To::Origins),
        };
        let begun = async {
            let image = self.try_prefetch(&repository, &name, version).await?;
            match to {
                To::Origins => Ok((image.blobs.len(), None)),
                To::Agents => {
                    let life = ttl_s.map_or(preheat::LIFE, Duration::from_secs);
                    let (blobs, id) = self.to_hosts(&repository, &name, image, label, life).await?;
                    Ok::<_, (StatusCode, String)>((blobs, Some(id)))
                }
            }
        };
        let begun = begun.await;
        self.count(to, begun.is_ok());
        match begun {
            Ok((blobs, id)) => {
                tracing::info!(%repository, tag = %name, trace_id, blobs, ?to, ?id, "prefetching");
                let tag = tag.rsplit('/').next().unwrap_or_default();
                let message = "prefetching initiated successfully";
                let id = id.map(|id: Id| id.to_string());
                let done = Done { tag, prefetched: true, status: "success", message, trace_id: &trace_id, id };
                http::json(StatusCode::OK, &done)
            }
            Err((status, why)) => {
                tracing::warn!(%repository, tag = %name, trace_id, why, "prefetch failed");
                failed(status, &why, &trace_id)
            }
        }
    }

    /// How far an image has come on its way to hosts.
    pub(super) async fn progress(&self, id: &str) -> Response {
        let told = match id.parse::<Id>() {
            Ok(id) => self.hosts.progress(&id).await,
            Err(error) => return failed(StatusCode::BAD_REQUEST, &format!("{id:?} {error}"), ""),
        };
        match told {
            Ok(progress) => {
                let (over, proven, message) = (progress.is_over(), progress.is_proven(), progress.to_string());
                http::json(StatusCode::OK, &Told { progress, over, proven, message })
            }
            Err(error) => failed(status(&error), &error.to_string(), ""),
        }
    }

    /// What an image is made of, as far as it is worth it, its blobs on their way to the origins.
    async fn try_prefetch(
        &self,
        repository: &Repository,
        tag: &Tag,
        version: Version,
    ) -> Result<Image, (StatusCode, String)> {
        let internal = |why: String| (StatusCode::INTERNAL_SERVER_ERROR, why);
        let digest = self.registry.content().resolve(repository, tag).await;
        let digest = digest
            .map_err(|failure| internal(format!("tag request: {repository}:{tag}, failed to get tag: {failure}")))?;
        let image = self.registry.image(repository, &digest).await;
        let mut image = image.map_err(|failure| internal(format!("error downloading manifest blob: {failure}")))?;
        image.blobs.retain(|_, size| self.limits.sizes.contains(size));
        match (version, self.warm(repository, image.blobs.keys().copied().collect()).await.as_slice()) {
            (_, []) => {}
            (Version::V1, failures) => {
                tracing::warn!(%repository, %tag, why = failures.join("; "), "prefetched in part");
            }
            (Version::V2, failures) => {
                let why = failures.join("; ");
                return Err(internal(format!(
                    "failed to trigger image prefetch: at least one layer could not be prefetched: {why}"
                )));
            }
        }
        Ok(image)
    }

    /// Has hosts told of an image, its manifests with it; its blobs, and what progress is asked for by.
    async fn to_hosts(
        &self,
        repository: &Repository,
        tag: &Tag,
        image: Image,
        label: Option<Label>,
        life: Duration,
    ) -> Result<(usize, Id), (StatusCode, String)> {
        let Image { manifests, mut blobs } = image;
        blobs.extend(manifests);
        let task = Task {
            id: Id::draw(),
            image: format!("{repository}:{tag}"),
            namespace: repository.namespace().clone(),
            blobs: blobs.into_iter().map(|(digest, size)| Wanted { digest, size }).collect(),
            label,
            left_ms: u64::try_from(life.as_millis()).unwrap_or(u64::MAX),
            again: false,
        };
        let task = task.checked().map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
        let (count, id) = (task.blobs.len(), task.id);
        self.hosts.preheat(task).await.map_err(|error| (status(&error), error.to_string()))?;
        Ok((count, id))
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

/// The answer's status where hosts are not preheated.
fn status(error: &hosts::Error) -> StatusCode {
    match error {
        hosts::Error::NoTrackers => StatusCode::NOT_IMPLEMENTED,
        hosts::Error::Full => StatusCode::TOO_MANY_REQUESTS,
        hosts::Error::Unknown(_) => StatusCode::NOT_FOUND,
        hosts::Error::Tracker(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
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
