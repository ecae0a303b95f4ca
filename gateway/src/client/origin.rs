//! One origin's blob API, as its callers see it: a method per route, answers turned into types, no retries.

use super::transfer::Progress;
use crate::{
    config::HostPort,
    http::{self, Body, Client, client, encode_segment},
    registry::range::Spec,
};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{
    HeaderMap, Method, Response, StatusCode, Uri,
    body::Incoming,
    header::{self, HeaderName},
};
use peer_proto::{Algorithm, Digest, Layout, Namespace, PeerId};
use serde::{Deserialize, Serialize};
use std::{net::IpAddr, ops::Range, sync::Arc, time::Duration};

/// Bytes an upload has; told beside 416 and every other answer about an upload's bytes.
pub const UPLOAD_OFFSET: HeaderName = HeaderName::from_static("upload-offset");
/// Longest an origin holds a layout request while it fetches the blob.
pub const LAYOUT_HOLD: Duration = Duration::from_secs(10);

/// Longest wait for the head of an answer that needs no work.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the head of an answer that asks other origins and the backend first.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for a commit: a sync of all bytes, and their way to the other owners.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// Longest answer of text or JSON, bytes.
const TEXT_LEN_MAX: usize = 64 << 10;
/// Longest metainfo, bytes: eleven digits and a comma for each of a blob's pieces.
const METAINFO_LEN_MAX: usize = 1 << 20;
/// Longest encoded layout, bytes: 68 for each of a blob's pieces, and its header.
const LAYOUT_LEN_MAX: usize = 68 * peer_proto::layout::PIECES_MAX as usize + 4096;

/// Why an origin, or none of them, did what it was asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Neither the origins nor the backend have it.
    #[error("no such blob")]
    NotFound,
    /// It is on its way from the backend; ask again.
    #[error("blob is being fetched from the backend")]
    Pending,
    /// No upload with that id, or it was closed.
    #[error("upload is unknown")]
    UploadUnknown,
    /// A write that does not start where the upload ends.
    #[error("write does not start where the upload ends, at byte {expected}")]
    Offset {
        /// Bytes the upload has.
        expected: u64,
    },
    /// The bytes are not the digest they were said to be.
    #[error("{0}")]
    Mismatch(String),
    /// The range is not within the blob.
    #[error("range is not within the blob's {0} bytes")]
    Range(u64),
    /// The blob is longer than the caller takes.
    #[error("blob has {has} bytes, at most {most} are taken")]
    TooLong {
        /// Its bytes.
        has: u64,
        /// The bound.
        most: u64,
    },
    /// The caller's own body broke off.
    #[error("body broke off")]
    Body,
    /// An origin said no.
    #[error("{origin}: {message}")]
    Refused {
        /// Which one.
        origin: String,
        /// How.
        status: StatusCode,
        /// Why.
        message: String,
    },
    /// An origin has too much to do.
    #[error("{origin}: {message}")]
    Busy {
        /// Which one.
        origin: String,
        /// What it said.
        message: String,
    },
    /// Where it would have to be fetched from, a limit is reached.
    #[error("{origin}: {message}")]
    Limited {
        /// Who found out.
        origin: String,
        /// What it said.
        message: String,
        /// When it may be asked again.
        after: Duration,
    },
    /// An origin, or the last of all, was not reached.
    #[error("{0}")]
    Unreachable(String),
    /// An answer that is not what the route promises.
    #[error("{origin}: bad answer: {message}")]
    Answer {
        /// Whose.
        origin: String,
        /// What is wrong with it.
        message: String,
    },
}

impl Error {
    /// Whether another origin may do better.
    pub fn elsewhere(&self) -> bool {
        match self {
            Self::Refused { status, .. } => status.is_server_error(),
            Self::Busy { .. } | Self::Limited { .. } | Self::Unreachable(_) | Self::Answer { .. } => true,
            _ => false,
        }
    }

    /// Whether the same may succeed a little later.
    pub fn later(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::Unreachable(_))
    }

    /// The status that tells a client of ours the same.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NotFound | Self::UploadUnknown => StatusCode::NOT_FOUND,
            Self::Pending => StatusCode::ACCEPTED,
            Self::Offset { .. } | Self::Range(_) => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Mismatch(_) | Self::Body => StatusCode::BAD_REQUEST,
            Self::TooLong { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Refused { status, .. } => *status,
            Self::Limited { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Busy { .. } | Self::Unreachable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Answer { .. } => StatusCode::BAD_GATEWAY,
        }
    }
}

impl From<Error> for http::Error {
    fn from(error: Error) -> Self {
        let after = if let Error::Limited { after, .. } = &error { Some(*after) } else { None };
        Self { after, ..Self::new(error.status(), error.to_string()) }
    }
}

/// Where an origin's peers reach it: Kraken's JSON.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerContext {
    /// Its address.
    pub ip: IpAddr,
    /// Its peer port.
    pub port: u16,
    /// Its name among peers; twenty numbers in JSON.
    #[serde(with = "twenty_numbers")]
    pub peer_id: PeerId,
    /// Its zone, where it has one.
    #[serde(default)]
    pub zone: String,
    /// Its cluster, where it has one.
    #[serde(default)]
    pub cluster: String,
    /// Whether it is an origin.
    pub origin: bool,
}

mod twenty_numbers {
    use super::PeerId;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(id: &PeerId, to: S) -> Result<S::Ok, S::Error> {
        id.as_bytes().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PeerId, D::Error> {
        <[u8; 20]>::deserialize(from).map(PeerId::new)
    }
}

/// An upload session, as the origin tells of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UploadStatus {
    /// Its id at that origin.
    pub id: String,
    /// Bytes it has.
    pub size: u64,
}

/// The head of a blob on its way.
pub struct Opened {
    /// Bytes of the whole blob.
    pub total: u64,
    /// The bytes that follow.
    pub range: Range<u64>,
    /// Their stream.
    pub body: Incoming,
}

/// Who may answer a question about a blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// The origin, the others, the backend.
    Everywhere,
    /// What the origin has on its own disk.
    Local,
}

impl Reach {
    fn query(self) -> &'static str {
        match self {
            Self::Everywhere => "",
            Self::Local => "?local=true",
        }
    }
}

type Answer = Result<Response<Incoming>, Error>;

/// A client of one origin. Cheap to clone.
#[derive(Clone)]
pub struct Origin {
    addr: Arc<HostPort>,
    http: Client,
}

impl Origin {
    /// A client of the origin whose blob API is at `addr`.
    pub fn new(addr: HostPort, http: Client) -> Self {
        Self { addr: Arc::new(addr), http }
    }

    /// Where it is.
    pub fn addr(&self) -> &HostPort {
        &self.addr
    }

    /// Whether it answers.
    pub async fn health(&self, timeout: Duration) -> Result<(), Error> {
        self.call(Method::GET, "/health", &[], http::empty(), timeout).await.map(drop)
    }

    /// Whether it can do its work: its readiness.
    pub async fn readiness(&self) -> Result<(), Error> {
        self.call(Method::GET, "/readiness", &[], http::empty(), ANSWER_TIMEOUT).await.map(drop)
    }

    /// Where the ring puts a blob, as this origin sees it: healthy owners in order.
    pub async fn locations(&self, digest: &Digest) -> Result<Vec<String>, Error> {
        let path = format!("/blobs/{digest}/locations");
        let answer = self.call(Method::GET, &path, &[], http::empty(), ANSWER_TIMEOUT).await?;
        let value = answer.headers().get("origin-locations").and_then(|value| value.to_str().ok());
        let value = value.ok_or_else(|| self.odd("no Origin-Locations"))?;
        Ok(value.split(',').filter(|part| !part.is_empty()).map(str::to_owned).collect())
    }

    /// How peers reach it.
    pub async fn peer(&self) -> Result<PeerContext, Error> {
        let answer = self.call(Method::GET, "/internal/peercontext", &[], http::empty(), ANSWER_TIMEOUT).await?;
        self.json(answer).await
    }

    /// Bytes of a blob.
    pub async fn stat(&self, namespace: &Namespace, digest: &Digest, reach: Reach) -> Result<u64, Error> {
        let path = format!("/internal{}{}", blob_path(namespace, digest), reach.query());
        let answer = self.look(Method::HEAD, &path, &[], LOOKUP_TIMEOUT).await?;
        number(answer.headers(), &header::CONTENT_LENGTH).ok_or_else(|| self.odd("no Content-Length"))
    }

    /// Whether this origin itself holds a blob; namespaces do not matter there.
    pub async fn holds(&self, digest: &Digest, timeout: Duration) -> Result<bool, Error> {
        let path = format!("/internal/blobs/{digest}");
        match self.call(Method::HEAD, &path, &[], http::empty(), timeout).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Bytes of a blob: `range`, cut at its end, or all of it.
    pub async fn get(
        &self,
        namespace: &Namespace,
        digest: &Digest,
        range: Option<Spec>,
        reach: Reach,
    ) -> Result<Opened, Error> {
        let path = format!("{}{}", blob_path(namespace, digest), reach.query());
        let asked = range.map(Spec::header);
        let headers: Vec<_> = asked.as_deref().map(|value| (header::RANGE, value)).into_iter().collect();
        let answer = self.look(Method::GET, &path, &headers, LOOKUP_TIMEOUT).await?;
        if answer.status() == StatusCode::PARTIAL_CONTENT {
            let (range, total) = content_range(answer.headers()).ok_or_else(|| self.odd("no Content-Range"))?;
            return Ok(Opened { total, range, body: answer.into_body() });
        }
        let total = number(answer.headers(), &header::CONTENT_LENGTH).ok_or_else(|| self.odd("no Content-Length"))?;
        Ok(Opened { total, range: 0..total, body: answer.into_body() })
    }

    /// A blob's layout. The origin holds the request while it fetches the blob, at most [`LAYOUT_HOLD`].
    pub async fn layout(&self, namespace: &Namespace, digest: &Digest) -> Result<Layout, Error> {
        let path = format!("/internal{}/layout", blob_path(namespace, digest));
        let answer = self.look(Method::GET, &path, &[], LOOKUP_TIMEOUT + LAYOUT_HOLD).await?;
        let bytes = self.body(answer, LAYOUT_LEN_MAX).await?;
        let layout = Layout::decode(&bytes).map_err(|error| self.odd(error.to_string()))?;
        if layout.digest() != digest {
            return Err(self.odd(format!("layout is of {}", layout.digest())));
        }
        Ok(layout)
    }

    /// A blob's Kraken metainfo, as JSON.
    pub async fn metainfo(&self, namespace: &Namespace, digest: &Digest) -> Result<Bytes, Error> {
        let path = format!("/internal{}/metainfo", blob_path(namespace, digest));
        let answer = self.look(Method::GET, &path, &[], LOOKUP_TIMEOUT).await?;
        self.body(answer, METAINFO_LEN_MAX).await
    }

    /// Has the origin fetch a blob from the backend where nobody has it. [`Error::Pending`] where that has begun.
    pub async fn prefetch(&self, namespace: &Namespace, digest: &Digest) -> Result<(), Error> {
        let path = format!("{}/prefetch", blob_path(namespace, digest));
        self.look(Method::POST, &path, &[], LOOKUP_TIMEOUT).await.map(drop)
    }

    /// Drops a blob from the origin's disk.
    pub async fn delete(&self, digest: &Digest) -> Result<(), Error> {
        let path = format!("/internal/blobs/{digest}");
        self.call(Method::DELETE, &path, &[], http::empty(), ANSWER_TIMEOUT).await.map(drop)
    }

    /// Has the origin neither store, fetch nor copy a blob that is to be deleted, until [`Self::unmark`]. Refused where its work
    /// still needs the blob.
    pub async fn mark(&self, digest: &Digest) -> Result<(), Error> {
        let path = format!("/internal/blobs/{digest}/mark");
        self.call(Method::PUT, &path, &[], http::empty(), ANSWER_TIMEOUT).await.map(drop)
    }

    /// Takes [`Self::mark`] back.
    pub async fn unmark(&self, digest: &Digest) -> Result<(), Error> {
        let path = format!("/internal/blobs/{digest}/mark");
        self.call(Method::DELETE, &path, &[], http::empty(), ANSWER_TIMEOUT).await.map(drop)
    }

    /// Deletes a marked blob from the origin's disk and from the namespace's backend.
    pub async fn discard(&self, namespace: &Namespace, digest: &Digest) -> Result<(), Error> {
        let path = format!("/internal{}", blob_path(namespace, digest));
        self.call(Method::DELETE, &path, &[], http::empty(), LOOKUP_TIMEOUT).await.map(drop)
    }

    /// Opens an upload.
    pub async fn start(
        &self,
        namespace: &Namespace,
        algorithm: Algorithm,
        size: Option<u64>,
    ) -> Result<UploadStatus, Error> {
        let size = size.map(|size| format!("&size={size}")).unwrap_or_default();
        let path = format!("{}?algorithm={}{size}", uploads_path(namespace), algorithm.name());
        let answer = self.call(Method::POST, &path, &[], http::empty(), ANSWER_TIMEOUT).await?;
        self.json(answer).await
    }

    /// Opens a copy of an upload that another origin receives; its id.
    pub async fn start_twin(&self, algorithm: Algorithm) -> Result<String, Error> {
        let path = format!("/internal/uploads?algorithm={}", algorithm.name());
        let answer = self.call(Method::POST, &path, &[], http::empty(), ANSWER_TIMEOUT).await?;
        let status: UploadStatus = self.json(answer).await?;
        Ok(status.id)
    }

    /// Adds bytes to such a copy at `offset`; the size it then has.
    pub async fn append_twin(&self, id: &str, offset: u64, body: Body) -> Result<u64, Error> {
        let path = format!("/internal/uploads/{}", encode_segment(id));
        let answer = self.send_bytes(&path, Some(offset), None, body).await.map_err(upload_unknown)?;
        let status: UploadStatus = self.json(answer).await?;
        Ok(status.size)
    }

    /// Bytes an upload has.
    pub async fn status(&self, namespace: &Namespace, id: &str) -> Result<UploadStatus, Error> {
        let path = upload_path(namespace, id);
        let answer = self.call(Method::GET, &path, &[], http::empty(), ANSWER_TIMEOUT).await;
        self.json(answer.map_err(upload_unknown)?).await
    }

    /// Adds bytes to an upload, at `offset` or where it ends, as `body` brings them; `length` of them where that is known. The
    /// size it then has.
    pub async fn append(
        &self,
        namespace: &Namespace,
        id: &str,
        offset: Option<u64>,
        length: Option<u64>,
        body: Body,
    ) -> Result<u64, Error> {
        let path = upload_path(namespace, id);
        let answer = self.send_bytes(&path, offset, length, body).await.map_err(upload_unknown)?;
        let status: UploadStatus = self.json(answer).await?;
        Ok(status.size)
    }

    /// Closes an upload under its digest. Done only when the bytes are durable on an owner.
    pub async fn commit(&self, namespace: &Namespace, id: &str, digest: &Digest) -> Result<(), Error> {
        let path = format!("{}?digest={digest}", upload_path(namespace, id));
        match self.call(Method::PUT, &path, &[], http::empty(), COMMIT_TIMEOUT).await {
            Ok(_) => Ok(()),
            Err(Error::Refused { status: StatusCode::BAD_REQUEST, message, .. }) => Err(Error::Mismatch(message)),
            Err(error) => Err(upload_unknown(error)),
        }
    }

    /// Drops an upload.
    pub async fn cancel(&self, namespace: &Namespace, id: &str) -> Result<(), Error> {
        let path = upload_path(namespace, id);
        let answer = self.call(Method::DELETE, &path, &[], http::empty(), ANSWER_TIMEOUT).await;
        answer.map(drop).map_err(upload_unknown)
    }

    /// Has the origin make sure that a blob it holds reaches this namespace's backend. False where it does not hold the blob.
    pub async fn link(&self, namespace: &Namespace, digest: &Digest) -> Result<bool, Error> {
        let path = format!("{}/link", blob_path(namespace, digest));
        match self.call(Method::POST, &path, &[], http::empty(), COMMIT_TIMEOUT).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Opens a transfer from one origin to another: its id, or none where the other has the blob.
    pub async fn offer(&self, digest: &Digest, size: u64) -> Result<Option<String>, Error> {
        let path = format!("/internal/blobs/{digest}/uploads?size={size}");
        match self.call(Method::POST, &path, &[], http::empty(), ANSWER_TIMEOUT).await {
            Ok(answer) => {
                let id = answer.headers().get(header::LOCATION).and_then(|id| id.to_str().ok());
                id.map(|id| Some(id.to_owned())).ok_or_else(|| self.odd("no Location"))
            }
            Err(Error::Refused { status: StatusCode::CONFLICT, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a transfer's bytes.
    pub async fn transfer(&self, digest: &Digest, id: &str, size: u64, body: Body) -> Result<(), Error> {
        let path = format!("/internal/blobs/{digest}/uploads/{id}");
        conflict_is_done(self.send_bytes(&path, Some(0), Some(size), body).await)
    }

    /// Closes a transfer. With a namespace, the receiver writes the blob back after `delay`, should nobody else have done it.
    pub async fn settle(
        &self,
        digest: &Digest,
        id: &str,
        write_back: Option<(&Namespace, Duration)>,
    ) -> Result<(), Error> {
        let (path, body) = match write_back {
            None => (format!("/internal/blobs/{digest}/uploads/{id}"), http::empty()),
            Some((namespace, delay)) => (
                format!("/internal/duplicate{}/uploads/{id}", blob_path(namespace, digest)),
                http::full(format!("{{\"Delay\":{}}}", delay.as_nanos())),
            ),
        };
        conflict_is_done(self.call(Method::PUT, &path, &[], body, COMMIT_TIMEOUT).await)
    }

    async fn send_bytes(&self, path: &str, offset: Option<u64>, length: Option<u64>, body: Body) -> Answer {
        let range = offset.map(|offset| {
            let end = length.map(|length| offset.saturating_add(length).to_string()).unwrap_or_default();
            format!("{offset}-{end}")
        });
        let mut headers: Vec<_> = range.as_deref().map(|range| (header::CONTENT_RANGE, range)).into_iter().collect();
        let length = length.map(|length| length.to_string());
        headers.extend(length.as_deref().map(|length| (header::CONTENT_LENGTH, length)));
        let progress = Progress::default();
        let body = progress.watch(body);
        let call = self.call(Method::PATCH, path, &headers, body, Duration::MAX);
        let answer = tokio::select! {
            answer = call => answer,
            stalled = progress.stalled() => Err(Error::Unreachable(format!("{}: took no bytes for {stalled:?}", self.addr))),
        };
        if answer.is_err() && progress.broke() { Err(Error::Body) } else { answer }
    }

    /// A question about a blob, which 202 puts off.
    async fn look(&self, method: Method, path: &str, headers: &[(HeaderName, &str)], timeout: Duration) -> Answer {
        let answer = self.call(method, path, headers, http::empty(), timeout).await?;
        if answer.status() == StatusCode::ACCEPTED { Err(Error::Pending) } else { Ok(answer) }
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        headers: &[(HeaderName, &str)],
        body: Body,
        timeout: Duration,
    ) -> Answer {
        let uri: Uri = format!("http://{}{path}", self.addr).parse().map_err(|error| self.odd(format!("{error}")))?;
        let mut request = Client::request(method, uri);
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let request = request.body(body).map_err(|error| self.odd(error.to_string()))?;
        let answer = self.http.send(request, timeout).await.map_err(|error| match error {
            client::Error::Request(error) => self.odd(error.to_string()),
            error => Error::Unreachable(error.to_string()),
        })?;
        match answer.status() {
            status if status.is_success() => Ok(answer),
            StatusCode::NOT_FOUND => Err(Error::NotFound),
            status => Err(self.refusal(status, answer).await),
        }
    }

    async fn refusal(&self, status: StatusCode, answer: Response<Incoming>) -> Error {
        if status == StatusCode::RANGE_NOT_SATISFIABLE {
            if let Some(expected) = number(answer.headers(), &UPLOAD_OFFSET) {
                return Error::Offset { expected };
            }
            if let Some(total) = unsatisfied(answer.headers()) {
                return Error::Range(total);
            }
        }
        let after = http::retried_after(answer.headers());
        let message = match http::read_body(answer.into_body(), TEXT_LEN_MAX).await {
            Ok(bytes) => String::from_utf8_lossy(&bytes).trim().to_owned(),
            Err(error) => error.message.into_owned(),
        };
        let origin = self.addr.to_string();
        match (status, after) {
            (StatusCode::TOO_MANY_REQUESTS, Some(after)) => Error::Limited { origin, message, after },
            (
                StatusCode::TOO_MANY_REQUESTS
                | StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT,
                _,
            ) => Error::Busy { origin, message },
            (status, _) => Error::Refused { origin, status, message },
        }
    }

    async fn json<T: serde::de::DeserializeOwned>(&self, answer: Response<Incoming>) -> Result<T, Error> {
        let bytes = self.body(answer, TEXT_LEN_MAX).await?;
        serde_json::from_slice(&bytes).map_err(|error| self.odd(error.to_string()))
    }

    async fn body(&self, answer: Response<Incoming>, limit: usize) -> Result<Bytes, Error> {
        let read =
            tokio::time::timeout(ANSWER_TIMEOUT, http_body_util::Limited::new(answer.into_body(), limit).collect());
        match read.await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(self.odd(error.to_string())),
            Ok(Err(error)) => Err(Error::Unreachable(format!("{}: {error}", self.addr))),
            Err(_) => Err(Error::Unreachable(format!("{}: answer stalled", self.addr))),
        }
    }

    fn odd(&self, message: impl Into<String>) -> Error {
        Error::Answer { origin: self.addr.to_string(), message: message.into() }
    }
}

fn blob_path(namespace: &Namespace, digest: &Digest) -> String {
    format!("/namespace/{}/blobs/{digest}", encode_segment(namespace.as_str()))
}

fn uploads_path(namespace: &Namespace) -> String {
    format!("/namespace/{}/uploads", encode_segment(namespace.as_str()))
}

fn upload_path(namespace: &Namespace, id: &str) -> String {
    format!("{}/{}", uploads_path(namespace), encode_segment(id))
}

/// What 404 means where an upload was asked about.
fn upload_unknown(error: Error) -> Error {
    if error == Error::NotFound { Error::UploadUnknown } else { error }
}

/// 409 to a transfer: somebody else brought the blob meanwhile.
fn conflict_is_done(answer: Answer) -> Result<(), Error> {
    match answer {
        Ok(_) | Err(Error::Refused { status: StatusCode::CONFLICT, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

/// `bytes 3-9/10`: bytes 3..10 of 10.
fn content_range(headers: &HeaderMap) -> Option<(Range<u64>, u64)> {
    let (range, total) = headers.get(header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, total): (u64, u64, u64) = (first.parse().ok()?, last.parse().ok()?, total.parse().ok()?);
    (first <= last && last < total).then(|| (first..last + 1, total))
}

/// `bytes */10`: no such range in 10 bytes.
fn unsatisfied(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes */")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_contexts_are_krakens() {
        let context = PeerContext {
            ip: "10.0.0.7".parse().unwrap(),
            port: 15001,
            peer_id: PeerId::new([7; 20]),
            zone: "a".into(),
            cluster: String::new(),
            origin: true,
        };
        let json = serde_json::to_string(&context).unwrap();
        let sevens = ["7"; 20].join(",");
        assert_eq!(
            json,
            format!(r#"{{"ip":"10.0.0.7","port":15001,"peer_id":[{sevens}],"zone":"a","cluster":"","origin":true}}"#)
        );
        assert_eq!(serde_json::from_str::<PeerContext>(&json).unwrap(), context);
    }

    #[test]
    fn content_ranges() {
        let headers = |value: &str| HeaderMap::from_iter([(header::CONTENT_RANGE, value.parse().unwrap())]);
        assert_eq!(content_range(&headers("bytes 3-9/10")), Some((3..10, 10)));
        for bad in ["bytes 3-10/10", "bytes 9-3/10", "3-9/10", "bytes */10", "bytes 3-9/*", "bytes a-b/c", ""] {
            assert_eq!(content_range(&headers(bad)), None, "{bad}");
        }
        assert_eq!(unsatisfied(&headers("bytes */10")), Some(10));
    }

    #[test]
    fn errors_say_what_to_do_next() {
        let refused = |status| Error::Refused { origin: "o:1".into(), status, message: String::new() };
        assert!(refused(StatusCode::INTERNAL_SERVER_ERROR).elsewhere() && !refused(StatusCode::FORBIDDEN).elsewhere());
        assert!(!Error::NotFound.elsewhere() && Error::Unreachable(String::new()).later());
        assert_eq!(Error::Offset { expected: 4 }.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    }
}
