//! HTTP as every role serves and speaks it: one server loop, one client, bodies, path segments, plain-text errors. HTTP/1.1, and
//! HTTP/2 beside it where a client asks for it over TLS.

pub mod client;
mod plain;
pub mod server;
mod stall;
mod streams;
pub mod tls;

pub use client::Client;
pub use server::{Service, serve};
pub use stall::Arriving;
pub use tls::Tls;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use http_body_util::{BodyExt, Empty, Full, Limited, StreamBody, combinators::BoxBody};
use hyper::{
    StatusCode,
    body::Frame,
    header::{self, HeaderMap, HeaderName, HeaderValue},
    http::{request::Parts, uri::Authority},
};
use std::{
    borrow::Cow,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

/// Whatever went wrong inside a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// The body of our responses and of our client's requests.
pub type Body = BoxBody<Bytes, BoxError>;
/// A request as the server hands it on.
pub type Request = hyper::Request<Arriving>;
/// A response of ours.
pub type Response = hyper::Response<Body>;

/// No body.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed()
}

/// A body of bytes at hand.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// A body of bytes as they come. An error ends the connection instead of the body, so that a short body never looks whole.
pub fn stream<S, E>(bytes: S) -> Body
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: Into<BoxError> + 'static,
{
    let frames = bytes.map_ok(Frame::data).map_err(Into::into);
    BodyExt::boxed(StreamBody::new(Exclusive(Mutex::new(Box::pin(frames)))))
}

/// A stream that only its one owner polls: `Sync`, as bodies have to be, although what it waits for may not be. The mutex is
/// never locked.
struct Exclusive<S>(Mutex<Pin<Box<S>>>);

impl<S: Stream> Stream for Exclusive<S> {
    type Item = S::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let inner = self.get_mut().0.get_mut().unwrap_or_else(PoisonError::into_inner);
        inner.as_mut().poll_next(cx)
    }
}

/// A response with a body of text.
pub fn text(status: StatusCode, text: impl Into<Bytes>) -> Response {
    with_type(status, "text/plain; charset=utf-8", text)
}

/// A response with a body of JSON.
pub fn json(status: StatusCode, value: &impl serde::Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => with_type(status, "application/json", bytes),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("encode answer: {error}")),
    }
}

/// A response with a body of a given type.
pub fn with_type(status: StatusCode, media_type: &'static str, bytes: impl Into<Bytes>) -> Response {
    let mut response = Response::new(full(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}

/// A response without a body.
pub fn status(status: StatusCode) -> Response {
    let mut response = Response::new(empty());
    *response.status_mut() = status;
    response
}

/// A failed request: the status and the plain text the client sees, as Kraken's services answer. The registry has its own.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{status}: {message}")]
pub struct Error {
    /// The answer's status.
    pub status: StatusCode,
    /// The answer's text: what is wrong and, where it helps, what to do.
    pub message: Cow<'static, str>,
    /// When to ask again, where that is known.
    pub after: Option<Duration>,
}

impl Error {
    /// An error with this status and text.
    pub fn new(status: StatusCode, message: impl Into<Cow<'static, str>>) -> Self {
        Self { status, message: message.into(), after: None }
    }

    /// 400.
    pub fn bad_request(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 404.
    pub fn not_found(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// 500.
    pub fn internal(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 429: not before this time is over.
    pub fn limited(message: impl Into<Cow<'static, str>>, after: Duration) -> Self {
        Self { after: Some(after), ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    /// 503.
    pub fn unavailable(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }
}

impl From<Error> for Response {
    fn from(error: Error) -> Self {
        let mut response = text(error.status, error.message.into_owned());
        response.headers_mut().extend(error.after.map(|after| (header::RETRY_AFTER, retry_after(after))));
        response
    }
}

/// An error with what lies beneath: "connect error" alone tells nobody anything.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

/// A `Retry-After`: whole seconds, at least one.
pub fn retry_after(after: Duration) -> HeaderValue {
    HeaderValue::from((after + Duration::from_millis(999)).as_secs().max(1))
}

/// The seconds of a `Retry-After`; none of a date, as clocks differ.
pub fn retried_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

/// Reads a whole body of at most `limit` bytes; 413 beyond, 400 where it breaks off.
pub async fn read_body<B>(body: B, limit: usize) -> Result<Bytes, Error>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    match Limited::new(body, limit).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            Err(Error::new(StatusCode::PAYLOAD_TOO_LARGE, format!("body is longer than {limit} bytes")))
        }
        Err(error) => Err(Error::bad_request(format!("body broke off: {error}"))),
    }
}

/// The segments of a path, each percent-decoded once; 400 where one is not UTF-8. `/a//b/` has the segments a, "", b, "".
pub fn segments(path: &str) -> Result<Vec<String>, Error> {
    let decode = |part| percent_encoding::percent_decode_str(part).decode_utf8().map(Cow::into_owned);
    let parts = path.strip_prefix('/').unwrap_or(path).split('/').map(decode);
    parts.collect::<Result<_, _>>().map_err(|_| Error::bad_request("path is not UTF-8"))
}

/// The value of one query parameter, decoded (`+` stands for itself); the first where it stands several times.
pub fn query(uri: &hyper::Uri, name: &str) -> Option<String> {
    query_all(uri, name).into_iter().next()
}

/// Every value of a query parameter, in order.
pub fn query_all(uri: &hyper::Uri, name: &str) -> Vec<String> {
    let pairs = uri.query().unwrap_or("").split('&');
    let values = pairs.filter_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key) == name).then(|| decoded(value).into_owned())
    });
    values.collect()
}

fn decoded(text: &str) -> Cow<'_, str> {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy()
}

/// What whoever stands before us says that the client called, in names.
pub const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
/// And over TLS or not.
pub const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The address that a client called, as it wrote it: `https://host:port`. Its own words, or those of whoever passed its request
/// on: good for nothing but to be told to that client again.
pub fn called(parts: &Parts) -> Option<String> {
    let header = |name: HeaderName| {
        let first = parts.headers.get(name)?.to_str().ok()?.split(',').next()?.trim();
        Some(first.to_owned())
    };
    let own = || parts.uri.authority().map(ToString::to_string).or_else(|| header(header::HOST));
    let host = header(FORWARDED_HOST).or_else(own)?;
    let sound = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
    if !host.bytes().all(sound) || host.parse::<Authority>().is_err() {
        return None;
    }
    let secure = match header(FORWARDED_PROTO) {
        Some(scheme) => scheme.eq_ignore_ascii_case("https"),
        None => parts.extensions.get::<server::Peer>().is_some_and(|peer| peer.secure),
    };
    Some(format!("{}://{host}", if secure { "https" } else { "http" }))
}

/// Percent-encodes one path segment, slashes included.
pub fn encode_segment(text: &str) -> String {
    const KEPT: &percent_encoding::AsciiSet =
        &percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b':');
    percent_encoding::utf8_percent_encode(text, KEPT).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_queries_are_decoded_once() {
        assert_eq!(segments("/tags/lib%2Fapp:1").unwrap(), ["tags", "lib/app:1"]);
        assert_eq!(segments("/a//b/").unwrap(), ["a", "", "b", ""]);
        assert!(segments("/%ff").is_err());
        let uri: hyper::Uri = "/x?n=5&last=a%2Fb&n=6&flag".parse().unwrap();
        assert_eq!(query(&uri, "n").as_deref(), Some("5"));
        assert_eq!(query_all(&uri, "n"), ["5", "6"]);
        assert_eq!(query(&uri, "last").as_deref(), Some("a/b"));
        assert_eq!(query(&uri, "flag").as_deref(), Some(""));
        assert_eq!(query(&uri, "none"), None);
        assert_eq!(encode_segment("lib/app:1"), "lib%2Fapp:1");
    }

    #[test]
    fn an_address_is_told_as_the_client_wrote_it() {
        for (uri, headers, expected) in [
            ("/v2/", &[("host", "a:1")][..], Some("http://a:1")),
            ("https://b/v2/", &[("host", "a:1")], Some("http://b")),
            ("/v2/", &[("host", "a:1"), ("x-forwarded-proto", "https")], Some("https://a:1")),
            (
                "/v2/",
                &[("host", "a"), ("x-forwarded-host", "c:2, d"), ("x-forwarded-proto", "HTTPS")],
                Some("https://c:2"),
            ),
            ("/v2/", &[("host", "[::1]:5000")], Some("http://[::1]:5000")),
            ("/v2/", &[], None),
            ("/v2/", &[("host", "")], None),
            ("/v2/", &[("host", "a\",error=\"x")], None),
            ("/v2/", &[("host", "eve@a")], None),
            ("/v2/", &[("host", "a/b")], None),
        ] {
            let mut request = hyper::Request::builder().uri(uri);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let (parts, ()) = request.body(()).unwrap().into_parts();
            assert_eq!(called(&parts).as_deref(), expected, "{uri} {headers:?}");
        }
    }
}
