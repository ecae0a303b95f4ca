//! Writes at a registry that holds no uploads, passed on to one that does: hosts push and pull at one address.
//!
//! Bodies pass through as they come. Locations are paths without a host, so what an upload goes on with comes here again. Whether
//! the client may write is for the registry behind to say; it sees the client's credentials.

use super::{
    access::endpoint::TOKEN_PATH,
    content::Content,
    error::{Code, Error},
    lent::Lent,
    service::{API_VERSION, Service, class, is_registry},
};
use crate::{
    config::HostPort,
    http::{self, Client, Request, Response},
};
use http_body_util::BodyExt;
use hyper::{
    HeaderMap, Method, Uri, Version,
    header::{self, HeaderName, HeaderValue},
};
use std::{sync::Arc, time::Duration};

/// Longest wait for the answer to a write, its body included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// Headers that are about one connection, beside those that `Connection` names.
const OF_CONNECTION: [HeaderName; 9] = [
    header::CONNECTION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// A registry that answers reads itself.
pub struct Relay<C> {
    reads: Arc<Service<C>>,
    writes: Option<(HostPort, Client)>,
}

impl<C: Content> Relay<C> {
    /// Passes writes on to the registry named; without one, `reads` refuses them.
    pub fn new(reads: Arc<Service<C>>, writes: Option<(HostPort, Client)>) -> Arc<Self> {
        Arc::new(Self { reads, writes })
    }
}

impl<C: Content> http::Service for Relay<C> {
    async fn answer(self: Arc<Self>, request: Request) -> Response {
        let own = request.uri().path() == TOKEN_PATH && self.reads.issues_tokens();
        match &self.writes {
            Some((to, client)) if !own && is_passed_on(&request) => pass_on(to, client, request).await,
            _ => self.reads.clone().answer(request).await,
        }
    }
}

/// Whether it is for the registry that holds uploads, as how far one has come is known there alone, or for a token.
fn is_passed_on(request: &Request) -> bool {
    let path = request.uri().path();
    !matches!(*request.method(), Method::GET | Method::HEAD) || class(path) == "uploads" || path == TOKEN_PATH
}

async fn pass_on(to: &HostPort, client: &Client, request: Request) -> Response {
    let (mut parts, body) = request.into_parts();
    let registry = is_registry(parts.uri.path());
    let (body, lent) = Lent::new(body, parts.headers.contains_key(header::EXPECT));
    strip(&mut parts.headers);
    // Where clients are told to get a token has to be an address that they can call: this one.
    if let Some((scheme, host)) = http::called(&parts).as_deref().and_then(|called| called.split_once("://"))
        && let (Ok(scheme), Ok(host)) = (scheme.parse(), host.parse())
    {
        parts.headers.insert(http::FORWARDED_PROTO, scheme);
        parts.headers.insert(http::FORWARDED_HOST, host);
    }
    // The connection to the registry behind has its own; the client was told to go on when its body was asked for.
    parts.headers.remove(header::HOST);
    parts.headers.remove(header::EXPECT);
    parts.version = Version::HTTP_11;
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let passed = match format!("http://{to}{path}").parse::<Uri>() {
        Ok(uri) => {
            parts.uri = uri;
            client.send(hyper::Request::from_parts(parts, body), ANSWER_TIMEOUT).await.map_err(|error| {
                tracing::warn!(%error, "pass on a write");
                Error::new(Code::Unavailable, format!("writes are passed on to {to}, which does not answer"))
            })
        }
        Err(error) => Err(Error::new(Code::NameInvalid, error.to_string())),
    };
    let mut response = match passed {
        Ok(answer) => {
            let (mut parts, body) = answer.into_parts();
            strip(&mut parts.headers);
            Response::from_parts(parts, body.map_err(Into::into).boxed())
        }
        Err(error) => error.into(),
    };
    if !response.status().is_success() {
        lent.drain().await;
    }
    if registry {
        response.headers_mut().insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    }
    response
}

fn strip(headers: &mut HeaderMap) {
    let named = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let named: Vec<HeaderName> =
        named.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok()).collect();
    for name in named.iter().chain(&OF_CONNECTION) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Rules,
            harness::{Server, bytes, image},
            manifests::digest_of,
            memory::Memory,
        },
        *,
    };

    #[tokio::test]
    async fn writes_go_to_the_registry_behind_and_reads_do_not() {
        let behind = Server::start(Service::new(Memory::default(), Rules::default())).await;
        let reads = Service::new(Memory::default(), Rules::default());
        let front = Server::start(Relay::new(reads, Some((behind.addr.into(), Client::default())))).await;
        // In one request, and by a session that is asked how far it has come.
        let config = front.push("a/b", "{}").await;
        let content = bytes(100_000);
        let layer = digest_of(peer_proto::Algorithm::Sha256, &content);
        let place = front.open("a/b").await;
        assert!(place.starts_with("/v2/"), "{place}");
        let answer = front.send("PATCH", &place, &[("connection", "x-one"), ("x-one", "1")], content.clone()).await;
        assert_eq!((answer.status, answer.header("range")), (202, "0-99999"));
        let place = answer.header("location").to_owned();
        let answer = front.get(&place).await;
        assert_eq!((answer.status, answer.header("range")), (204, "0-99999"));
        let mark = if place.contains('?') { '&' } else { '?' };
        assert_eq!(front.send("PUT", &format!("{place}{mark}digest={layer}"), &[], "").await.status, 201);
        assert_eq!(front.put_manifest("/v2/a/b/manifests/1", &image(&config, &[layer])).await.status, 201);
        assert_eq!(behind.get(&format!("/v2/a/b/blobs/{layer}")).await.body, content);
        assert_eq!(front.get(&format!("/v2/a/b/blobs/{layer}")).await.status, 404, "reads are its own");
        // What the registry behind refuses is refused in its words.
        let answer = front.send("PUT", "/v2/a/b/manifests/1", &[], "{").await;
        assert_eq!((answer.status, answer.code().as_str()), (400, "MANIFEST_INVALID"));
        assert_eq!(front.send("DELETE", "/v2/a/b/manifests/1", &[], "").await.status, 202);
    }

    #[tokio::test]
    async fn with_nobody_behind_writes_are_told_to_come_again() {
        let addr = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let reads = Service::new(Memory::default(), Rules::default());
        let front = Server::start(Relay::new(reads, Some((addr.into(), Client::default())))).await;
        let answer = front.send("POST", "/v2/a/blobs/uploads/", &[], bytes(10)).await;
        assert_eq!((answer.status, answer.code().as_str()), (503, "UNAVAILABLE"));
        assert_eq!(front.get("/v2/").await.status, 200);
    }
}
