//! The agent's blob API: Kraken's routes, with lengths and ranges beside.

use super::{
    Preload,
    downloads::{self, Downloads, body},
};
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
    preload: Preload,
}

impl Api {
    /// The API over these downloads, with the tags of this index, for these runtimes.
    pub fn new(downloads: Downloads, index: Index, preload: Preload) -> Arc<Self> {
        Arc::new(Self { downloads, index, preload })
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
            // Kraken's says 500 for what is no tag.
            (&Method::GET, ["preload", "tags", tag]) => match twice(tag)?.parse() {
                Ok(tag) => self.preload.answer(&request, &tag).await,
                Err(error) => Err(Error::internal(format!("{error}"))),
            },
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
                | ["preload", "tags", _]
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
        let reader = self.downloads.send(namespace, layout, range.clone()).await?;
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
        Some("preload") => "preload",
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
            downloads::Error::Limited { message, after } => return Self::limited(message.clone(), *after),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        agent::harness::{Node, PATIENCE, namespace, no_runtimes, nobody},
        config::HostPort,
        http::Client,
        index,
        origin::tests::{Cluster, content},
        registry::{
            harness::{NOWHERE, Server},
            manifests::digest_of,
        },
        upstream::Upstreams,
    };
    use backends::{Memory, Naming, Route, Router};
    use engine::handle::Stat;
    use peer_proto::Algorithm;
    use std::time::Duration;

    /// An agent's API over these origins, with the tags of this index.
    async fn api(node: &Node, cluster: &Cluster, index: HostPort) -> Server<Api> {
        let downloads = node.downloads(&cluster.addrs(), Duration::from_millis(20), PATIENCE);
        Server::start(Api::new(downloads, Index::new(vec![index], Client::default()), no_runtimes())).await
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn blobs_are_krakens_with_lengths_and_ranges_beside() {
        let (cluster, node) = (Cluster::hasty(2).await, Node::start(false));
        let bytes = content(70, (2 << 20) + 9);
        let digest = digest_of(Algorithm::Sha256, &bytes);
        cluster.origins.put(&namespace(), &digest, bytes.clone()).await.unwrap();
        let api = api(&node, &cluster, nobody()).await;
        let total = bytes.len().to_string();
        let blob = format!("/namespace/lib%2Fapp/blobs/{digest}");

        let head = api.send("HEAD", &blob, &[], "").await;
        assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, total.as_str(), 0));
        assert!(matches!(node.engine.stat(&digest).await.unwrap(), Stat::Absent), "a HEAD brings nothing");
        for path in [
            blob.clone(),
            format!("/namespace/lib%252Fapp/blobs/{digest}"),
            format!("/namespace/lib%2Fapp/blobs/{}", digest.hex()),
        ] {
            let answer = api.get(&path).await;
            assert_eq!((answer.status, answer.header("content-length")), (200, total.as_str()), "{path}");
            assert_eq!(answer.header("etag"), format!("\"{digest}\""));
            assert!(answer.body == bytes, "{path}");
        }
        let part = api.send("GET", &blob, &[("range", "bytes=5-9")], "").await;
        assert_eq!((part.status, part.header("content-range")), (206, format!("bytes 5-9/{total}").as_str()));
        assert_eq!(part.body, bytes.slice(5..10));
        assert_eq!(api.send("GET", &blob, &[("range", "bytes=99999999-")], "").await.status, 416);

        for _ in 0..2 {
            assert_eq!(
                api.send("DELETE", &format!("/blobs/{digest}"), &[], "").await.status,
                200,
                "also where it is not"
            );
            assert!(matches!(node.engine.stat(&digest).await.unwrap(), Stat::Absent));
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_unknown_differs_from_what_cannot_be_known() {
        let (cluster, node) = (Cluster::hasty(1).await, Node::start(false));
        let api = api(&node, &cluster, nobody()).await;
        let blob = format!("/namespace/lib%2Fapp/blobs/{NOWHERE}");
        for method in ["GET", "HEAD"] {
            assert_eq!(api.send(method, &blob, &[], "").await.status, 404, "{method}");
        }
        cluster.faults.set_down(true);
        for method in ["GET", "HEAD"] {
            assert_eq!(api.send(method, &blob, &[], "").await.status, 500, "{method}: the backend is down");
        }
        cluster.faults.set_down(false);
        assert_eq!(api.get(&blob).await.status, 404);
        for (method, path, status) in [
            ("GET", "/namespace/lib%2Fapp/blobs/sha256:12".to_owned(), 400),
            ("GET", format!("/namespace/lib%2F..%2Fapp/blobs/{NOWHERE}"), 400),
            ("GET", "/namespace/%ff/blobs/x".into(), 400),
            ("DELETE", "/blobs/what".into(), 400),
            ("POST", blob, 405),
            ("PUT", "/tags/a%3A1".into(), 405),
            ("GET", "/tags/a".into(), 400),
            ("GET", "/tags/a%3A1".into(), 500),
            ("GET", "/preload/tags/a".into(), 500),
            ("GET", "/preload/tags/a%3A1".into(), 500),
            ("GET", "/preload/tags/a%3A1?runtime=lxc".into(), 500),
            ("GET", "/preload/tags/a%3A1?runtime=containerd&namespace=a%20b".into(), 400),
            ("POST", "/preload/tags/a%3A1".into(), 405),
            ("GET", "/what".into(), 404),
            ("GET", "/".into(), 404),
        ] {
            let answer = api.send(method, &path, &[], "").await;
            assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn tags_are_the_indexs_and_settings_are_files() {
        let (cluster, node) = (Cluster::hasty(1).await, Node::start(false));
        let route = Route::new(".*", Naming::DockerTag, true, Arc::new(Memory::default())).unwrap();
        let config = index::Config::default();
        let index = index::Service::new(Router::new(vec![route]), &config, Upstreams::default(), Vec::new(), None);
        let index = Server::start(index).await;
        assert_eq!(index.send("PUT", &format!("/tags/lib%2Fapp%3A1/digest/{NOWHERE}"), &[], "").await.status, 200);
        let api = api(&node, &cluster, HostPort::from(index.addr)).await;
        for path in ["/tags/lib%2Fapp:1", "/tags/lib%252Fapp%253A1"] {
            let answer = api.get(path).await;
            assert_eq!((answer.status, &*answer.body), (200, NOWHERE.as_bytes()), "{path}");
        }
        let answer = api.get("/tags/lib%2Fapp:2").await;
        assert_eq!((answer.status, answer.body.len()), (404, 0));

        let answer = api.get("/x/blacklist").await;
        assert_eq!((answer.status, &*answer.body), (200, &b"null"[..]));
        for (body, status) in [("{}", 200), ("{", 400), ("[]", 400), (r#"{"ConnTTI":1}"#, 422)] {
            assert_eq!(api.send("PATCH", "/x/config/scheduler", &[], body).await.status, status, "{body}");
        }
        let answer = api.send("PATCH", "/x/config/scheduler", &[], vec![b' '; BODY_MAX + 1]).await;
        assert_eq!(answer.status, 413);
    }
}
