//! The client: pooled connections, a deadline for the head of every answer, none of our own for bodies.

use super::{Body, BoxError, empty};
use hyper::{Method, Uri, body::Incoming, http::request};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use std::time::Duration;

/// Longest wait for a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Idle connections kept for one host.
const IDLE_PER_HOST: usize = 32;

/// An HTTP client. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Client {
    inner: legacy::Client<HttpConnector, Body>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address or a header cannot be.
    #[error("bad request: {0}")]
    Request(#[from] hyper::http::Error),
    /// Not reached, or broken off before an answer. Safe to retry elsewhere.
    #[error("{host}: {source}")]
    Network {
        /// Whom we asked.
        host: String,
        /// What happened.
        #[source]
        source: BoxError,
    },
    /// No answer in time.
    #[error("{host}: no answer within {after:?}")]
    Timeout {
        /// Whom we asked.
        host: String,
        /// How long we waited.
        after: Duration,
    },
}

impl Default for Client {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        let inner = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(IDLE_PER_HOST)
            .build(connector);
        Self { inner }
    }
}

impl Client {
    /// Sends a request and waits for the head of its answer, at most `timeout`.
    pub async fn send(
        &self,
        request: hyper::Request<Body>,
        timeout: Duration,
    ) -> Result<hyper::Response<Incoming>, Error> {
        let host = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        match tokio::time::timeout(timeout, self.inner.request(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(Error::Network { host, source: error.into() }),
            Err(_) => Err(Error::Timeout { host, after: timeout }),
        }
    }

    /// A GET without a body.
    pub async fn get(&self, uri: Uri, timeout: Duration) -> Result<hyper::Response<Incoming>, Error> {
        self.send(Self::request(Method::GET, uri).body(empty())?, timeout).await
    }

    /// The start of a request.
    pub fn request(method: Method, uri: Uri) -> request::Builder {
        hyper::Request::builder().method(method).uri(uri)
    }
}
