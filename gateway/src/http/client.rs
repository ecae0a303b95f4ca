//! The client: pooled connections, a deadline for the head of every answer, none of our own for bodies.

use super::{Body, chain, empty};
use hyper::{
    Method, Uri,
    body::Incoming,
    http::{request, uri::Scheme},
};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use rustls::ClientConfig;
use std::time::Duration;

/// Longest wait for a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Idle connections kept for one host.
const IDLE_PER_HOST: usize = 32;

/// An HTTP client. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Client {
    inner: Inner,
}

#[derive(Clone)]
enum Inner {
    Plain(legacy::Client<HttpConnector, Body>),
    Secure(legacy::Client<HttpsConnector<HttpConnector>, Body>),
    Outside(legacy::Client<HttpsConnector<HttpConnector>, Body>),
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address or a header cannot be.
    #[error("bad request: {0}")]
    Request(#[from] hyper::http::Error),
    /// Not reached, or broken off before an answer. Safe to retry elsewhere.
    #[error("{host}: {why}")]
    Network {
        /// Whom we asked.
        host: String,
        /// What happened, down to its cause.
        why: String,
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
        Self { inner: Inner::Plain(builder().build(connector())) }
    }
}

fn connector() -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_nodelay(true);
    connector
}

fn builder() -> legacy::Builder {
    let mut builder = legacy::Client::builder(TokioExecutor::new());
    builder.pool_timer(TokioTimer::new()).pool_max_idle_per_host(IDLE_PER_HOST);
    builder
}

impl Client {
    /// A client that speaks TLS with everybody, also where an address says `http`.
    pub fn secure(config: ClientConfig) -> Self {
        let mut tcp = connector();
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_only().enable_http1();
        Self { inner: Inner::Secure(builder().build(connector.wrap_connector(tcp))) }
    }

    /// A client that speaks TLS with those whose address says so.
    pub fn outside(config: ClientConfig) -> Self {
        let mut tcp = connector();
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_or_http().enable_http1();
        Self { inner: Inner::Outside(builder().build(connector.wrap_connector(tcp))) }
    }

    /// Sends a request and waits for the head of its answer, at most `timeout`.
    pub async fn send(
        &self,
        mut request: hyper::Request<Body>,
        timeout: Duration,
    ) -> Result<hyper::Response<Incoming>, Error> {
        let host = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        let answer = match &self.inner {
            Inner::Plain(client) => client.request(request),
            Inner::Outside(client) => client.request(request),
            Inner::Secure(client) => {
                let mut uri = std::mem::take(request.uri_mut()).into_parts();
                uri.scheme = Some(Scheme::HTTPS);
                *request.uri_mut() = Uri::from_parts(uri).map_err(hyper::http::Error::from)?;
                client.request(request)
            }
        };
        match tokio::time::timeout(timeout, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(Error::Network { host, why: chain(&error) }),
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
