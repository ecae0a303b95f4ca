//! The trackers: layouts of blobs, and announces.

use crate::{
    config::HostPort,
    http::{self, Client, client, encode_segment},
    preheat::{Id, ORDERS_LEN_MAX, Orders, PROGRESS_LEN_MAX, Poll, Progress, TRACKERS_MAX, Task},
};
use bytes::Bytes;
use hyper::{Method, Response, StatusCode, body::Incoming, header};
use peer_proto::{
    Digest, Layout, Namespace,
    announce::{BODY_MAX, Request, Response as Announced},
    ring::{Ring, RingError},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The media type of announces and their answers.
pub const ANNOUNCE_TYPE: &str = "application/vnd.shoal.announce";
/// Longest wait for an answer to an announce.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for an answer about preheats.
const PREHEAT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for a layout: a tracker asks origins, which may hold the request while they fetch the blob.
const LAYOUT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for a tracker's readiness.
const READINESS_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a tracker that was not reached is asked last.
const DOWN_TIME: Duration = Duration::from_secs(5);
/// Longest error text that is read, bytes.
const TEXT_LEN_MAX: usize = 4 << 10;
/// Longest encoded layout, bytes.
const LAYOUT_LEN_MAX: usize = 68 * peer_proto::layout::PIECES_MAX as usize + 4096;

/// What goes with a request.
enum Sent {
    Nothing,
    Announce(Bytes),
    Json(Bytes),
    /// As JSON, and the connection ends: every host polls, and a tracker has room for fewer connections than that.
    Poll(Bytes),
}

/// Why a tracker, or none of them, gave what was asked for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// Neither the origins nor the backend have it.
    #[error("no such blob")]
    NotFound,
    /// An origin is fetching it from its backend; ask again.
    #[error("blob is being fetched from the backend")]
    Pending,
    /// Nobody was reached who could say, or they have too much to do.
    #[error("{0}")]
    Unreachable(String),
    /// Where it would have to be fetched from, a limit is reached.
    #[error("{message}")]
    Limited {
        /// What the tracker said.
        message: String,
        /// When it may be asked again.
        after: Duration,
    },
    /// Somebody who should know says that it cannot be known.
    #[error("{tracker}: {message}")]
    Refused {
        /// Who.
        tracker: String,
        /// How.
        status: StatusCode,
        /// Why.
        message: String,
    },
    /// An answer that is not what the route promises.
    #[error("{tracker}: bad answer: {message}")]
    Answer {
        /// Whose.
        tracker: String,
        /// What is wrong with it.
        message: String,
    },
}

/// A client of all trackers of a cluster. Cheap to clone; clones share connections and what is known of the trackers' health.
#[derive(Clone)]
pub struct Tracker {
    inner: Arc<Inner>,
}

struct Inner {
    http: Client,
    ring: Ring,
    /// Trackers that were not reached, and when. Bounded by their number.
    down: Mutex<HashMap<String, Instant>>,
}

impl Tracker {
    /// A client of these trackers.
    pub fn new(trackers: &[HostPort], http: Client) -> Result<Self, RingError> {
        let ring = Ring::new(trackers.iter().map(HostPort::as_str))?;
        Ok(Self { inner: Arc::new(Inner { http, ring, down: Mutex::default() }) })
    }

    /// The trackers as a ring, for whoever shares out blobs among them.
    pub fn ring(&self) -> &Ring {
        &self.inner.ring
    }

    /// The layout of a blob. The tracker of the blob is asked first, the others where it cannot say.
    pub async fn layout(&self, namespace: &Namespace, digest: &Digest) -> Result<Layout, Error> {
        let mut last = Error::Unreachable("no tracker to ask".into());
        for tracker in self.order(digest) {
            match self.layout_from(&tracker, namespace, digest).await {
                Err(error @ (Error::Unreachable(_) | Error::Answer { .. })) => last = error,
                answer => return answer,
            }
        }
        Err(last)
    }

    async fn layout_from(&self, tracker: &str, namespace: &Namespace, digest: &Digest) -> Result<Layout, Error> {
        let path = format!("/namespace/{}/blobs/{digest}/layout", encode_segment(namespace.as_str()));
        let bytes = self.call(tracker, Method::GET, &path, Sent::Nothing, LAYOUT_TIMEOUT, LAYOUT_LEN_MAX).await?;
        let odd = |message| Error::Answer { tracker: tracker.to_owned(), message };
        let layout = Layout::decode(&bytes).map_err(|error| odd(error.to_string()))?;
        if layout.digest() == digest { Ok(layout) } else { Err(odd(format!("layout is of {}", layout.digest()))) }
    }

    /// Announces to one tracker.
    pub async fn announce(&self, tracker: &str, request: &Request) -> Result<Announced, Error> {
        let body = Sent::Announce(request.encode().into());
        let bytes = self.call(tracker, Method::POST, "/announce", body, ANNOUNCE_TIMEOUT, BODY_MAX).await?;
        let odd = |message| Error::Answer { tracker: tracker.to_owned(), message };
        Announced::decode(&bytes).map_err(|error| odd(error.to_string()))
    }

    /// The trackers that have to do with preheats: the same few for everybody, each of which knows every host.
    pub fn preheaters(&self) -> Vec<&str> {
        let mut trackers = self.inner.ring.order(&Digest::sha256([0; 32]));
        trackers.truncate(TRACKERS_MAX);
        trackers
    }

    /// Tells one tracker how far a host has come with its preheats, and hears what is new.
    pub async fn poll(&self, tracker: &str, poll: &Poll) -> Result<Orders, Error> {
        let body = Sent::Poll(json(poll)?);
        let bytes = self.call(tracker, Method::POST, "/preheat/poll", body, PREHEAT_TIMEOUT, ORDERS_LEN_MAX).await?;
        read(tracker, &bytes)
    }

    /// Gives one tracker a preheat.
    pub async fn preheat(&self, tracker: &str, task: &Task) -> Result<(), Error> {
        let path = format!("/preheat/{}", task.id);
        let body = Sent::Json(json(task)?);
        self.call(tracker, Method::PUT, &path, body, PREHEAT_TIMEOUT, TEXT_LEN_MAX).await.map(drop)
    }

    /// How far a preheat has come, as one tracker knows it; [`Error::NotFound`] where it does not know the preheat.
    pub async fn preheated(&self, tracker: &str, id: &Id) -> Result<Progress, Error> {
        let path = format!("/preheat/{id}");
        let bytes = self.call(tracker, Method::GET, &path, Sent::Nothing, PREHEAT_TIMEOUT, PROGRESS_LEN_MAX).await?;
        read(tracker, &bytes)
    }

    /// Whether any tracker can do its work.
    pub async fn readiness(&self) -> Result<(), Error> {
        let mut last = Error::Unreachable("no tracker to ask".into());
        for tracker in self.inner.ring.labels() {
            match self.call(tracker, Method::GET, "/readiness", Sent::Nothing, READINESS_TIMEOUT, TEXT_LEN_MAX).await {
                Ok(_) => return Ok(()),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// All trackers in the blob's order, those that were not reached lately behind the others.
    fn order(&self, digest: &Digest) -> Vec<String> {
        let mut order: Vec<String> = self.inner.ring.order(digest).into_iter().map(str::to_owned).collect();
        let mut down = self.down();
        down.retain(|_, since| since.elapsed() < DOWN_TIME);
        order.sort_by_key(|tracker| down.contains_key(tracker));
        order
    }

    fn down(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.inner.down.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn call(
        &self,
        tracker: &str,
        method: Method,
        path: &str,
        body: Sent,
        timeout: Duration,
        len_max: usize,
    ) -> Result<Bytes, Error> {
        let answer = match self.send(tracker, method, path, body, timeout).await {
            Ok(answer) => answer,
            Err(error) => {
                self.down().insert(tracker.to_owned(), Instant::now());
                return Err(Error::Unreachable(error.to_string()));
            }
        };
        self.down().remove(tracker);
        let status = answer.status();
        let after = http::retried_after(answer.headers());
        let len_max = if status == StatusCode::OK { len_max } else { TEXT_LEN_MAX };
        let read = tokio::time::timeout(timeout, http::read_body(answer.into_body(), len_max));
        let body = match read.await {
            Ok(Ok(body)) => body,
            Ok(Err(error)) => return Err(Error::Unreachable(format!("{tracker}: {}", error.message))),
            Err(_) => return Err(Error::Unreachable(format!("{tracker}: body did not end within {timeout:?}"))),
        };
        let message = || String::from_utf8_lossy(&body).trim().to_owned();
        match status {
            StatusCode::OK => Ok(body),
            StatusCode::ACCEPTED => Err(Error::Pending),
            StatusCode::NOT_FOUND => Err(Error::NotFound),
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => {
                Err(Error::Unreachable(format!("{tracker}: {}", message())))
            }
            StatusCode::TOO_MANY_REQUESTS if let Some(after) = after => {
                Err(Error::Limited { message: message(), after })
            }
            status => Err(Error::Refused { tracker: tracker.to_owned(), status, message: message() }),
        }
    }

    async fn send(
        &self,
        tracker: &str,
        method: Method,
        path: &str,
        body: Sent,
        timeout: Duration,
    ) -> Result<Response<Incoming>, client::Error> {
        let uri = format!("http://{tracker}{path}").parse().map_err(hyper::http::Error::from)?;
        let request = Client::request(method, uri);
        let request = match body {
            Sent::Nothing => request.body(http::empty())?,
            Sent::Announce(body) => request.header(header::CONTENT_TYPE, ANNOUNCE_TYPE).body(http::full(body))?,
            Sent::Json(body) => request.header(header::CONTENT_TYPE, "application/json").body(http::full(body))?,
            Sent::Poll(body) => {
                let request = request.header(header::CONTENT_TYPE, "application/json");
                request.header(header::CONNECTION, "close").body(http::full(body))?
            }
        };
        self.inner.http.send(request, timeout).await
    }
}

fn json(value: &impl serde::Serialize) -> Result<Bytes, Error> {
    serde_json::to_vec(value).map(Bytes::from).map_err(|error| Error::Unreachable(format!("encode request: {error}")))
}

fn read<T: serde::de::DeserializeOwned>(tracker: &str, bytes: &[u8]) -> Result<T, Error> {
    let odd = |error: serde_json::Error| Error::Answer { tracker: tracker.to_owned(), message: error.to_string() };
    serde_json::from_slice(bytes).map_err(odd)
}
