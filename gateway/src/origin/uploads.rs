//! Bytes in: upload sessions, Kraken's per digest and ours without one, and transfers from other origins.
//!
//! A session is the engine's upload; nothing else remembers it, so it survives a restart. It has one writer at a time; a new one
//! makes the old one leave, because the old one's client may be gone without a word.

use super::{
    Shared,
    figures::{self, Figures},
    holds::WRITE_BACK,
    refusal,
    twins::Tee,
    write_back::{HELD, INTENT, INTENT_DELAY},
};
use crate::{
    client::origin::{UPLOAD_OFFSET, UploadStatus},
    http::{self, Arriving, Request, Response},
};
use engine::handle::{Error, Stat, Upload};
use http_body_util::BodyExt;
use hyper::{
    StatusCode,
    body::Body as _,
    header::{self, HeaderValue},
};
use peer_proto::{Algorithm, Digest, Layout, Namespace};
use serde::Deserialize;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// Longest wait for an upload's other writer to leave.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause before an upload that is in use is tried again.
const TAKE_OVER_PAUSE: Duration = Duration::from_millis(20);
/// Bytes read away after a refusal, so that a client still sending gets to read its answer.
const DRAIN_MAX: usize = 16 << 20;
/// Longest time for it.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest body of a duplicate's commit.
const DUPLICATE_LEN_MAX: usize = 4 << 10;

/// Whose protocol an upload is by: their answers differ.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    Kraken,
    Us,
    /// Ours, from an origin that receives the same upload.
    Twin,
}

impl By {
    fn is_ours(self) -> bool {
        self != Self::Kraken
    }
}

/// Uploads that are being written.
#[derive(Default)]
pub(super) struct Writers {
    entries: Mutex<HashMap<String, Entry>>,
}

struct Entry {
    /// Has the writer leave.
    leave: watch::Sender<()>,
    /// Bytes the upload has.
    size: Arc<AtomicU64>,
}

/// One writer of an upload.
struct Writer<'a> {
    writers: &'a Writers,
    upload: Option<Upload>,
    id: String,
    leave: watch::Receiver<()>,
    size: Arc<AtomicU64>,
}

impl Writers {
    fn entries(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the writer of an upload leave, where there is one.
    fn dismiss(&self, id: &str) {
        if let Some(entry) = self.entries().get(id) {
            entry.leave.send_replace(());
        }
    }

    /// Bytes of an upload that is being written.
    fn size(&self, id: &str) -> Option<u64> {
        self.entries().get(id).map(|entry| entry.size.load(Ordering::Relaxed))
    }

    fn enter(&self, upload: Upload) -> Writer<'_> {
        let (sender, leave) = watch::channel(());
        let (id, size) = (upload.id().to_owned(), Arc::new(AtomicU64::new(upload.len())));
        self.entries().insert(id.clone(), Entry { leave: sender, size: size.clone() });
        Writer { writers: self, upload: Some(upload), id, leave, size }
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        // The entry first: once the upload is let go, the next writer makes its own.
        self.writers.entries().remove(&self.id);
        drop(self.upload.take());
    }
}

/// Bytes that were refused or did not all come: what was whole is kept, and the client is told how much that is.
struct Broken {
    error: http::Error,
    size: Option<u64>,
    /// The client is likely still to send.
    sending: bool,
}

impl From<http::Error> for Broken {
    fn from(error: http::Error) -> Self {
        Self { error, size: None, sending: true }
    }
}

/// Where a body's bytes belong: `start-end`, the end exclusive, as Kraken has it; ours may leave out the end, or all.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Place {
    start: Option<u64>,
    end: Option<u64>,
}

fn place(text: Option<&str>) -> Option<Place> {
    let number = |text: &str| match text {
        "" => Some(None),
        text if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok().map(Some),
        _ => None,
    };
    let Some(text) = text else { return Some(Place::default()) };
    let (start, end) = text.split_once('-')?;
    let place = Place { start: number(start)?, end: number(end)? };
    let sound = place.start.is_some() && place.end.is_none_or(|end| place.start.is_some_and(|start| start <= end));
    sound.then_some(place)
}

/// Body of a duplicate's commit. Go's field name.
#[derive(Deserialize)]
struct Duplicate {
    /// Nanoseconds.
    #[serde(rename = "Delay")]
    delay: u64,
}

impl Shared {
    /// `POST /namespace/{ns}/uploads[?algorithm=][&size=]`: 201, `Location`, and the session as JSON.
    pub(super) async fn start(&self, request: &Request, namespace: &Namespace) -> Result<Response, http::Error> {
        let algorithm = algorithm(request)?;
        let upload = self.engine.upload(algorithm, size(request)?).await.map_err(refusal)?;
        let status = UploadStatus { id: upload.id().to_owned(), size: 0 };
        let mut response = http::json(StatusCode::CREATED, &status);
        let path = format!("/namespace/{}/uploads/{}", http::encode_segment(namespace.as_str()), status.id);
        if let Ok(path) = HeaderValue::try_from(path) {
            response.headers_mut().insert(header::LOCATION, path);
        }
        Ok(response)
    }

    /// `POST /internal/uploads[?algorithm=]`, of an origin that passes on what it receives: 201, and the session as JSON.
    pub(super) async fn start_twin(&self, request: &Request) -> Result<Response, http::Error> {
        let upload = self.engine.upload(algorithm(request)?, None).await.map_err(refusal)?;
        Ok(http::json(StatusCode::CREATED, &UploadStatus { id: upload.id().to_owned(), size: 0 }))
    }

    /// `POST /namespace/{ns}/blobs/{digest}/uploads`, with a namespace, and `/internal/blobs/{digest}/uploads`: 200 and the bare
    /// id as `Location`; 409 where the blob is here, its way to the backend assured first.
    pub(super) async fn start_kraken(
        self: &Arc<Self>,
        request: &Request,
        namespace: Option<&Namespace>,
        digest: &Digest,
    ) -> Result<Response, http::Error> {
        self.refuse_known(namespace, digest).await?;
        let upload = self.engine.upload(digest.algorithm(), size(request)?).await.map_err(refusal)?;
        let mut response = http::status(StatusCode::OK);
        if let Ok(id) = HeaderValue::try_from(upload.id()) {
            response.headers_mut().insert(header::LOCATION, id);
        }
        Ok(response)
    }

    /// 409 where a blob is here.
    async fn refuse_known(self: &Arc<Self>, namespace: Option<&Namespace>, digest: &Digest) -> Result<(), http::Error> {
        if !matches!(self.engine.stat(digest).await.map_err(refusal)?, Stat::Whole { .. }) {
            return Ok(());
        }
        if let Some(namespace) = namespace {
            self.ensure(namespace, digest).await?;
        }
        Err(http::Error::new(StatusCode::CONFLICT, "blob is here already"))
    }

    /// [`Self::secure`], which goes on when the client does not wait for it.
    async fn ensure(self: &Arc<Self>, namespace: &Namespace, digest: &Digest) -> Result<(), http::Error> {
        let (shared, namespace, digest) = (self.clone(), namespace.clone(), *digest);
        let secured = tokio::spawn(async move { shared.secure(&namespace, &digest).await });
        secured.await.unwrap_or_else(|_| Err(http::Error::internal("commit ended early")))
    }

    /// `POST /namespace/{ns}/blobs/{digest}/link`: a blob that is here is to reach this namespace's backend too. 201, or 404.
    pub(super) async fn link(
        self: &Arc<Self>,
        namespace: &Namespace,
        digest: &Digest,
    ) -> Result<Response, http::Error> {
        match self.engine.stat(digest).await.map_err(refusal)? {
            Stat::Whole { .. } => self.ensure(namespace, digest).await.map(|()| http::status(StatusCode::CREATED)),
            Stat::Absent | Stat::Partial { .. } => Err(http::Error::not_found("blob is not here")),
        }
    }

    /// `GET /namespace/{ns}/uploads/{id}`: the session as JSON.
    pub(super) async fn status(&self, id: &str) -> Result<Response, http::Error> {
        let size = match self.writers.size(id) {
            Some(size) => size,
            None => self.take(id, false).await?.len(),
        };
        Ok(http::json(StatusCode::OK, &UploadStatus { id: id.to_owned(), size }))
    }

    /// `DELETE /namespace/{ns}/uploads/{id}`: 204.
    pub(super) async fn cancel(&self, id: &str) -> Result<Response, http::Error> {
        self.take(id, true).await?.abort().await.map_err(refusal)?;
        self.twins.forget(id);
        Ok(http::status(StatusCode::NO_CONTENT))
    }

    /// `PATCH` of any session: bytes at `Content-Range: start-end`. Ours answers the session as JSON, Kraken's nothing. What
    /// arrived whole is kept whatever happens, and its size told in `Upload-Offset`.
    pub(super) async fn patch(&self, request: Request, id: &str, by: By) -> Response {
        let expects = request.headers().contains_key(header::EXPECT);
        let place = request.headers().get(header::CONTENT_RANGE).map(|value| value.to_str());
        let place = match place {
            None if by.is_ours() => Some(Place::default()),
            Some(Ok(text)) => place_of(text, by),
            _ => None,
        };
        let mut body = request.into_body();
        let outcome = match place {
            Some(place) => self.receive(id, place, by, &mut body).await,
            None => Err(http::Error::bad_request("Content-Range is not start-end").into()),
        };
        let (mut response, size) = match outcome {
            Ok(size) if by.is_ours() => {
                (http::json(StatusCode::OK, &UploadStatus { id: id.to_owned(), size }), Some(size))
            }
            Ok(size) => (http::status(StatusCode::OK), Some(size)),
            Err(Broken { error, size, sending }) => {
                if sending && !expects {
                    drain(&mut body).await;
                }
                (error.into(), size)
            }
        };
        if let Some(size) = size {
            response.headers_mut().insert(UPLOAD_OFFSET, HeaderValue::from(size));
        }
        response
    }

    async fn receive(&self, id: &str, place: Place, by: By, body: &mut Arriving) -> Result<u64, Broken> {
        let mut writer = self.writers.enter(self.take(id, true).await?);
        let mut tee = match (&writer.upload, by) {
            (Some(upload), By::Us) => self.tee(id, upload.algorithm(), upload.len(), body.size_hint().exact()).await,
            _ => Tee::default(),
        };
        let received = self.receive_into(&mut writer, &mut tee, place, by, body).await;
        // Before the upload is let go, so that whoever goes on with it finds them.
        if let Some(upload) = &writer.upload {
            self.keep_twins(id, tee, upload.len()).await;
        }
        received
    }

    async fn receive_into(
        &self,
        writer: &mut Writer<'_>,
        tee: &mut Tee,
        place: Place,
        by: By,
        body: &mut Arriving,
    ) -> Result<u64, Broken> {
        let Writer { upload: Some(upload), leave, size: told, .. } = &mut *writer else {
            return Err(http::Error::internal("upload was let go").into());
        };
        let has = upload.len();
        let refused = |status, message: String, size| Broken {
            error: http::Error::new(status, message),
            size: Some(size),
            sending: true,
        };
        let broken = |status, message, size| Broken { sending: false, ..refused(status, message, size) };
        if let Some(start) = place.start.filter(|start| *start != has) {
            let status = match by {
                By::Us | By::Twin => StatusCode::RANGE_NOT_SATISFIABLE,
                By::Kraken => StatusCode::BAD_REQUEST,
            };
            return Err(refused(status, format!("bytes begin at {start}, the upload has {has}"), has));
        }
        loop {
            let frame = tokio::select! {
                frame = tokio::time::timeout(self.config.upload_idle.get(), body.frame()) => frame,
                _ = leave.changed() => {
                    return Err(broken(StatusCode::CONFLICT, "another request took the upload over".into(), upload.len()));
                }
            };
            let bytes = match frame {
                Ok(None) => break,
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(bytes) => bytes,
                    Err(_trailers) => continue,
                },
                Ok(Some(Err(error))) => {
                    return Err(broken(StatusCode::BAD_REQUEST, format!("body broke off: {error}"), upload.len()));
                }
                Err(_) => {
                    let idle = self.config.upload_idle;
                    return Err(broken(StatusCode::REQUEST_TIMEOUT, format!("no bytes for {idle}"), upload.len()));
                }
            };
            let at = upload.len();
            if place.end.is_some_and(|end| at + bytes.len() as u64 > end) {
                return Err(refused(StatusCode::BAD_REQUEST, "body is longer than its Content-Range".into(), at));
            }
            self.figures.upload_bytes.inc_by(bytes.len() as u64);
            tee.pass(&bytes, &self.figures).await;
            if let Err(error) = upload.write(at, bytes).await {
                if matches!(error, Error::NoSpace(_))
                    && let Some(upload) = writer.upload.take()
                    && let Err(error) = upload.abort().await
                {
                    // What did not fit holds room that others need until it has been idle for long.
                    tracing::warn!(%error, "drop an upload that does not fit");
                }
                return Err(refusal(error).into());
            }
            told.store(upload.len(), Ordering::Relaxed);
        }
        let size = upload.len();
        match place.end.filter(|end| *end != size) {
            Some(end) => Err(broken(
                StatusCode::BAD_REQUEST,
                format!("body ended at byte {size}, Content-Range says {end}"),
                size,
            )),
            None => Ok(size),
        }
    }

    /// `PUT /namespace/{ns}/uploads/{id}?digest=`: 201; 400 where the bytes are not the digest.
    pub(super) async fn commit(
        self: &Arc<Self>,
        request: &Request,
        namespace: &Namespace,
        id: &str,
    ) -> Result<Response, http::Error> {
        let digest =
            http::query(request.uri(), "digest").ok_or_else(|| http::Error::bad_request("digest is missing"))?;
        let digest = digest.parse().map_err(|error| http::Error::bad_request(format!("digest: {error}")))?;
        let goal = Goal::Push(namespace.clone());
        self.close(id, digest, goal, StatusCode::BAD_REQUEST).await?;
        Ok(http::status(StatusCode::CREATED))
    }

    /// `PUT` of Kraken's sessions: 200; 409 where the blob is here already; 500 where the bytes are not the digest.
    pub(super) async fn commit_kraken(
        self: &Arc<Self>,
        namespace: Option<&Namespace>,
        digest: &Digest,
        id: &str,
    ) -> Result<Response, http::Error> {
        if let Err(known) = self.refuse_known(namespace, digest).await {
            self.take(id, false).await?.abort().await.map_err(refusal)?;
            return Err(known);
        }
        let goal = namespace.map_or(Goal::Transfer, |namespace| Goal::Push(namespace.clone()));
        self.close(id, *digest, goal, StatusCode::INTERNAL_SERVER_ERROR).await?;
        Ok(http::status(StatusCode::OK))
    }

    /// `PUT /internal/duplicate/namespace/{ns}/blobs/{digest}/uploads/{id}`: a replica, to be written back after a delay should
    /// nobody else have done it.
    pub(super) async fn duplicate(
        self: &Arc<Self>,
        request: Request,
        namespace: &Namespace,
        digest: &Digest,
        id: &str,
    ) -> Result<Response, http::Error> {
        let body = http::read_body(request.into_body(), DUPLICATE_LEN_MAX).await?;
        let body: Duplicate =
            serde_json::from_slice(&body).map_err(|error| http::Error::bad_request(error.to_string()))?;
        let delay = Duration::from_nanos(body.delay).min(crate::retry::DELAY_MAX);
        let known = matches!(self.engine.stat(digest).await.map_err(refusal)?, Stat::Whole { .. });
        let goal = Goal::Replica(namespace.clone(), delay);
        self.close(id, *digest, goal, StatusCode::INTERNAL_SERVER_ERROR).await?;
        if known {
            return Err(http::Error::new(StatusCode::CONFLICT, "blob is here already"));
        }
        Ok(http::status(StatusCode::OK))
    }

    /// Closes an upload under its digest, to its end even if the client does not wait for it.
    async fn close(
        self: &Arc<Self>,
        id: &str,
        digest: Digest,
        goal: Goal,
        mismatch: StatusCode,
    ) -> Result<(), http::Error> {
        let upload = self.take(id, false).await?;
        let shared = self.clone();
        let closed = tokio::spawn(async move { shared.close_upload(upload, &digest, &goal).await }).await;
        let closed = closed.unwrap_or_else(|_| Err(Closing::Refused(http::Error::internal("commit ended early"))));
        let (outcome, closed) = match closed {
            Ok(_) => (figures::DONE, Ok(())),
            Err(Closing::Mismatch(message)) => (figures::MISMATCH, Err(http::Error::new(mismatch, message))),
            Err(Closing::Refused(error)) => (figures::FAILED, Err(error)),
        };
        Figures::count(&self.figures.uploads, outcome);
        closed
    }

    async fn close_upload(&self, upload: Upload, digest: &Digest, goal: &Goal) -> Result<Arc<Layout>, Closing> {
        let _committing = self.committing(digest);
        self.refuse_marked(digest).map_err(Closing::Refused)?;
        if let Goal::Push(namespace) | Goal::Replica(namespace, _) = goal {
            // Before the name appears: from then on clients may take the blob for pushed, whether or not we still live.
            let intent = self.write_back_hold(namespace, INTENT, INTENT_DELAY);
            if intent.iter().any(|hold| hold.kind == WRITE_BACK) {
                self.hold(digest, &intent).await.map_err(Closing::Refused)?;
            }
        }
        // At once: a twin that is durable while this one fails is a blob that nobody refers to, as after a crash in between.
        let (id, len) = (upload.id().to_owned(), upload.len());
        let twins = async {
            if let Goal::Push(namespace) = goal {
                self.close_twins(&id, len, namespace, digest).await;
            }
        };
        let (committed, ()) = tokio::join!(upload.commit(digest), twins);
        let layout = committed.map_err(|error| match error {
            Error::Mismatch { .. } => Closing::Mismatch(error.to_string()),
            error => Closing::Refused(refusal(error)),
        })?;
        let assured = match goal {
            Goal::Push(namespace) => self.secure(namespace, digest).await,
            Goal::Replica(namespace, delay) => self.hold(digest, &self.write_back_hold(namespace, HELD, *delay)).await,
            // With no backend at all, the origins are the only place for it.
            Goal::Transfer if self.backends.routes().is_empty() => self.hold(digest, &[]).await,
            Goal::Transfer => Ok(()),
        };
        assured.map(|()| layout).map_err(Closing::Refused)
    }

    /// Takes an upload by its id, from its writer if need be and allowed.
    async fn take(&self, id: &str, dismiss: bool) -> Result<Upload, http::Error> {
        let until = Instant::now() + TAKE_OVER_TIMEOUT;
        loop {
            match self.engine.resume(id).await {
                Err(Error::UploadInUse) if Instant::now() < until => {
                    if dismiss {
                        self.writers.dismiss(id);
                    }
                    tokio::time::sleep(TAKE_OVER_PAUSE).await;
                }
                taken => return taken.map_err(refusal),
            }
        }
    }
}

/// What an upload is for.
enum Goal {
    /// A client's: replicated and written back before it is acknowledged.
    Push(Namespace),
    /// Another origin's, which may never come to write it back.
    Replica(Namespace, Duration),
    /// Another origin's, in passing.
    Transfer,
}

/// Why an upload was not closed.
enum Closing {
    Mismatch(String),
    Refused(http::Error),
}

fn place_of(text: &str, by: By) -> Option<Place> {
    place(Some(text)).filter(|place| by.is_ours() || place.end.is_some())
}

fn algorithm(request: &Request) -> Result<Algorithm, http::Error> {
    match http::query(request.uri(), "algorithm").as_deref() {
        None | Some("sha256") => Ok(Algorithm::Sha256),
        Some("sha512") => Ok(Algorithm::Sha512),
        Some(_) => Err(http::Error::bad_request("algorithm is neither sha256 nor sha512")),
    }
}

fn size(request: &Request) -> Result<Option<u64>, http::Error> {
    let size = http::query(request.uri(), "size").map(|text| text.parse());
    size.transpose().map_err(|_| http::Error::bad_request("size is not a number of bytes"))
}

async fn drain(body: &mut Arriving) {
    let drained = tokio::time::timeout(DRAIN_TIMEOUT, async {
        let mut left = DRAIN_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            let len = frame.data_ref().map_or(0, bytes::Bytes::len);
            let Some(rest) = left.checked_sub(len) else { return };
            left = rest;
        }
    });
    if drained.await.is_err() {
        tracing::debug!("client went on sending slowly after a refusal");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_bytes() {
        let at = |start, end| Some(Place { start, end });
        assert_eq!(place(Some("0-5")), at(Some(0), Some(5)));
        assert_eq!(place(Some("7-")), at(Some(7), None));
        assert_eq!(place(None), at(None, None));
        for bad in ["", "-", "-5", "5", "5-4", "bytes 0-5", "0-5/6", "+1-5", "0--1", "0-99999999999999999999"] {
            assert_eq!(place(Some(bad)), None, "{bad}");
        }
        assert_eq!(place_of("7-", By::Kraken), None);
    }
}
