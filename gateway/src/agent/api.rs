//! The agent's blob API: Kraken's routes, with lengths and ranges beside.

use super::downloads::{self, Downloads, body};
use crate::{
    client::index::{self, Index},
    http::{self, Error, Request, Response, Service, segments},
    index::TagName,
    registry::range,
};
use hyper::{
    Method, StatusCode,
    header::{self, HeaderValue},
};
use peer_proto::{Digest, Namespace};
use std::{ops::Range, sync::Arc};

/// Longest body of a request that has one.
const BODY_MAX: usize = 64 << 10;

/// An agent's blob API.
pub struct Api {
    downloads: Downloads,
    index: Index,
}

impl Api {
    /// The API over these downloads, with the tags of this index.
    pub fn new(downloads: Downloads, index: Index) -> Arc<Self> {
        Arc::new(Self { downloads, index })
    }

    async fn route(&self, request: Request) -> Result<Response, Error> {
        let (method, path) = (request.method().clone(), segments(request.uri().path())?);
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        match (&method, &*path) {
            (&Method::GET, ["namespace", namespace, "blobs", digest]) => {
                self.get(&request, &parse_namespace(namespace)?, &parse_digest(digest)?).await
            }
            (&Method::HEAD, ["namespace", namespace, "blobs", digest]) => {
                self.head(&parse_namespace(namespace)?, &parse_digest(digest)?).await
            }
            (&Method::GET, ["tags", tag]) => self.tag(tag).await,
            (&Method::DELETE, ["blobs", digest]) => {
                let digest = parse_digest(digest)?;
                self.downloads.engine().evict(&digest).await.map_err(downloads::Error::from)?;
                Ok(http::status(StatusCode::OK))
            }
            // Kraken's list of peers that connections to failed lately. Ours are retried with pauses and listed nowhere.
            (&Method::GET, ["x", "blacklist"]) => Ok(http::json(StatusCode::OK, &None::<()>)),
            (&Method::PATCH, ["x", "config", "scheduler"]) => scheduler(request).await,
            (
                _,
                ["namespace", _, "blobs", _]
                | ["tags" | "blobs", _]
                | ["x", "blacklist"]
                | ["x", "config", "scheduler"],
            ) => Err(Error::new(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not supported here"))),
            _ => Err(Error::not_found("no such path")),
        }
    }

    /// What a tag stands for: the digest alone, as the index answers.
    async fn tag(&self, tag: &str) -> Result<Response, Error> {
        let tag: TagName = twice(tag)?.parse().map_err(|error| Error::bad_request(format!("{error}")))?;
        match self.index.get(&tag).await {
            Ok(digest) => Ok(http::text(StatusCode::OK, digest.to_string())),
            Err(index::Error::NotFound) => Ok(http::status(StatusCode::NOT_FOUND)),
            Err(error) => Err(Error::internal(error.to_string())),
        }
    }

    async fn head(&self, namespace: &Namespace, digest: &Digest) -> Result<Response, Error> {
        let layout = self.downloads.layout(namespace, digest).await?;
        let mut response = Response::new(http::empty());
        describe(&mut response, digest);
        response.headers_mut().insert(header::CONTENT_LENGTH, layout.length().into());
        Ok(response)
    }

    /// Answers as soon as the length is known; the bytes follow as they arrive.
    async fn get(&self, request: &Request, namespace: &Namespace, digest: &Digest) -> Result<Response, Error> {
        let layout = self.downloads.find(namespace, digest).await?;
        let length = layout.length();
        let part = wanted(request, length)?;
        let range = part.clone().unwrap_or(0..length);
        let reader = self.downloads.open(namespace, layout, range.clone()).await?;
        let mut response = Response::new(body(reader));
        describe(&mut response, digest);
        response.headers_mut().insert(header::CONTENT_LENGTH, (range.end - range.start).into());
        if part.is_some() {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let value = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            let value = HeaderValue::try_from(value).map_err(|error| Error::internal(error.to_string()))?;
            response.headers_mut().insert(header::CONTENT_RANGE, value);
        }
        Ok(response)
    }
}

fn describe(response: &mut Response, digest: &Digest) {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if let Ok(tag) = HeaderValue::try_from(format!("\"{digest}\"")) {
        headers.insert(header::ETAG, tag);
    }
}

/// The part of the blob that is asked for: none where it is all of it. Several ranges are answered with the whole.
fn wanted(request: &Request, length: u64) -> Result<Option<Range<u64>>, Error> {
    let Some(asked) = request.headers().get(header::RANGE).and_then(|value| value.to_str().ok()) else {
        return Ok(None);
    };
    let specs = range::parse(asked).map_err(|error| Error::bad_request(error.to_string()))?;
    let Some([spec]) = specs.as_deref() else { return Ok(None) };
    match spec.resolve(length) {
        Some(range) => Ok(Some(range)),
        None if length == 0 => Ok(None),
        None => {
            let message = format!("range is not within the blob's {length} bytes");
            Err(Error::new(StatusCode::RANGE_NOT_SATISFIABLE, message))
        }
    }
}

/// Kraken's way to change a running agent. What it changes there has no counterpart here, or is fixed at the start.
async fn scheduler(request: Request) -> Result<Response, Error> {
    let body = http::read_body(request.into_body(), BODY_MAX).await?;
    let settings: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&body).map_err(|error| Error::bad_request(format!("decode body: {error}")))?;
    if settings.is_empty() {
        return Ok(http::status(StatusCode::OK));
    }
    let names: Vec<&str> = settings.keys().map(String::as_str).collect();
    let message = format!(
        "{} cannot be changed while the agent runs; see [engine], [limits] and [download] of its configuration file",
        names.join(", ")
    );
    Err(Error::new(StatusCode::UNPROCESSABLE_ENTITY, message))
}

/// The endpoint that a path belongs to: what requests are counted by.
pub fn class(path: &str) -> &'static str {
    match path.split('/').nth(1) {
        Some("namespace") => "blob",
        Some("tags") => "tag",
        Some("blobs") => "delete",
        _ => "other",
    }
}

/// A namespace as a path segment. Kraken's own clients may escape it twice.
fn parse_namespace(text: &str) -> Result<Namespace, Error> {
    let text = twice(text)?;
    text.parse().map_err(|error| Error::bad_request(format!("namespace {text:?}: {error}")))
}

/// A digest as a path segment. Kraken's agents take the bare hex as well.
fn parse_digest(text: &str) -> Result<Digest, Error> {
    let text = twice(text)?;
    let full = if text.contains(':') { text.clone() } else { format!("sha256:{text}") };
    full.parse().map_err(|error| Error::bad_request(format!("digest {text:?}: {error}")))
}

fn twice(text: &str) -> Result<String, Error> {
    let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
    decoded.map(Into::into).map_err(|_| Error::bad_request("path is not UTF-8"))
}

impl From<downloads::Error> for Error {
    fn from(error: downloads::Error) -> Self {
        let status = match &error {
            downloads::Error::NotFound(_) => StatusCode::NOT_FOUND,
            downloads::Error::Busy => StatusCode::SERVICE_UNAVAILABLE,
            downloads::Error::Unknowable(_) | downloads::Error::Pending { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            downloads::Error::Engine(error) => match **error {
                engine::Error::Busy(_) | engine::Error::Closed => StatusCode::SERVICE_UNAVAILABLE,
                engine::Error::Range(_) => StatusCode::RANGE_NOT_SATISFIABLE,
                engine::Error::NoSpace(_) => StatusCode::INSUFFICIENT_STORAGE,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            },
        };
        Self::new(status, error.to_string())
    }
}

impl Service for Api {
    async fn answer(self: Arc<Self>, request: Request) -> Response {
        self.route(request).await.unwrap_or_else(Response::from)
    }
}
