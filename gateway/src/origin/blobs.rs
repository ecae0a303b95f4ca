//! Serving blobs: their bytes, sizes, layouts and Kraken's metainfo.

use super::{Shared, refresh::Fetched, refusal};
use crate::{
    client::origin::{LAYOUT_HOLD, PeerContext, Reach},
    http::{self, Request, Response},
    registry::range,
};
use bytes::Bytes;
use engine::handle::{Reader, Stat};
use futures_util::Stream;
use hyper::{
    HeaderMap, Method, StatusCode,
    header::{self, HeaderValue},
};
use peer_proto::{Digest, Layout, Namespace};
use serde::Serialize;
use std::{ops::Range, sync::Arc};

/// A reader's bytes as a stream.
pub(super) fn bytes_of(reader: Reader) -> impl Stream<Item = Result<Bytes, engine::handle::Error>> + Send + 'static {
    futures_util::stream::unfold(reader, |mut reader| async { reader.next().await.map(|bytes| (bytes, reader)) })
}

/// Kraken's metainfo.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Metainfo {
    info: Info,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Info {
    piece_length: u32,
    /// Null for a blob without pieces, as Go has it.
    piece_sums: Option<Vec<u32>>,
    name: String,
    length: u64,
}

/// What may be done about a blob that is not here.
enum Local {
    Whole(Arc<Layout>),
    Missing,
}

impl Shared {
    async fn local(&self, digest: &Digest) -> Result<Local, http::Error> {
        match self.engine.stat(digest).await.map_err(refusal)? {
            Stat::Whole { layout } => Ok(Local::Whole(layout)),
            Stat::Absent | Stat::Partial { .. } => Ok(Local::Missing),
        }
    }

    /// `GET` and `HEAD /namespace/{ns}/blobs/{digest}`: 200 or 206 with the bytes; 202 once a fetch has begun; 404, 500, 503.
    pub(super) async fn blob(
        self: &Arc<Self>,
        request: &Request,
        namespace: &Namespace,
        digest: &Digest,
    ) -> Result<Response, http::Error> {
        if request.method() == Method::HEAD {
            return self.size(namespace, digest, reach(request)).await;
        }
        match self.local(digest).await? {
            Local::Whole(layout) => self.bytes(request, digest, &layout).await,
            Local::Missing if reach(request) == Reach::Local => Err(http::Error::not_found("blob is not here")),
            Local::Missing => {
                drop(self.refresh(namespace, digest).await?);
                Ok(http::status(StatusCode::ACCEPTED))
            }
        }
    }

    async fn bytes(&self, request: &Request, digest: &Digest, layout: &Layout) -> Result<Response, http::Error> {
        let total = layout.length();
        let Ok(range) = wanted(request.headers(), total) else {
            let mut response = http::text(StatusCode::RANGE_NOT_SATISFIABLE, format!("blob has {total} bytes\n"));
            set(response.headers_mut(), header::CONTENT_RANGE, format!("bytes */{total}"));
            return Ok(response);
        };
        let bytes = range.clone().unwrap_or(0..total);
        let mut reader = self.engine.read(digest, bytes.clone()).await.map_err(refusal)?;
        if self.plain {
            reader.unseen();
        }
        let mut response = Response::new(http::stream(bytes_of(reader)));
        let headers = response.headers_mut();
        describe(headers, digest, bytes.end - bytes.start);
        if let Some(range) = range {
            set(headers, header::CONTENT_RANGE, format!("bytes {}-{}/{total}", range.start, range.end - 1));
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        }
        Ok(response)
    }

    /// `HEAD /internal/namespace/{ns}/blobs/{digest}`: 200 with the size, here or, unless only that is asked for, anywhere.
    pub(super) async fn size(
        self: &Arc<Self>,
        namespace: &Namespace,
        digest: &Digest,
        reach: Reach,
    ) -> Result<Response, http::Error> {
        let size = match self.local(digest).await? {
            Local::Whole(layout) => layout.length(),
            Local::Missing if reach == Reach::Local => return Err(http::Error::not_found("blob is not here")),
            Local::Missing => self.locate(namespace, digest).await?.size,
        };
        let mut response = http::status(StatusCode::OK);
        describe(response.headers_mut(), digest, size);
        Ok(response)
    }

    /// `HEAD /internal/blobs/{digest}`: whether this origin itself holds it.
    pub(super) async fn held(&self, digest: &Digest) -> Result<Response, http::Error> {
        match self.local(digest).await? {
            Local::Whole(layout) => {
                let mut response = http::status(StatusCode::OK);
                describe(response.headers_mut(), digest, layout.length());
                Ok(response)
            }
            Local::Missing => Err(http::Error::not_found("blob is not here")),
        }
    }

    /// `POST /namespace/{ns}/blobs/{digest}/prefetch`: 200 where it is here, 202 once a fetch has begun.
    pub(super) async fn prefetch(
        self: &Arc<Self>,
        namespace: &Namespace,
        digest: &Digest,
    ) -> Result<Response, http::Error> {
        if let Local::Missing = self.local(digest).await? {
            drop(self.refresh(namespace, digest).await?);
            return Ok(http::status(StatusCode::ACCEPTED));
        }
        Ok(http::status(StatusCode::OK))
    }

    /// `GET /internal/namespace/{ns}/blobs/{digest}/layout`: the layout, for which the request waits a while where the blob is
    /// being fetched; then 202.
    pub(super) async fn layout(
        self: &Arc<Self>,
        namespace: &Namespace,
        digest: &Digest,
    ) -> Result<Response, http::Error> {
        let layout = match self.local(digest).await? {
            Local::Whole(layout) => layout,
            Local::Missing => {
                let flight = self.refresh(namespace, digest).await?;
                let fetched: Fetched = match tokio::time::timeout(LAYOUT_HOLD, flight).await {
                    Ok(fetched) => fetched.unwrap_or_else(|| Err(http::Error::internal("fetch ended early"))),
                    Err(_) => return Ok(http::status(StatusCode::ACCEPTED)),
                };
                fetched?
            }
        };
        Ok(http::with_type(StatusCode::OK, "application/vnd.shoal.layout", layout.encode()))
    }

    /// `GET /internal/namespace/{ns}/blobs/{digest}/metainfo`: Kraken's JSON, or 202 once a fetch has begun.
    pub(super) async fn metainfo(
        self: &Arc<Self>,
        namespace: &Namespace,
        digest: &Digest,
    ) -> Result<Response, http::Error> {
        match self.local(digest).await? {
            Local::Whole(layout) => Ok(http::json(StatusCode::OK, &metainfo(&layout))),
            Local::Missing => {
                drop(self.refresh(namespace, digest).await?);
                Ok(http::status(StatusCode::ACCEPTED))
            }
        }
    }

    /// `POST /internal/blobs/{digest}/metainfo?piece_length=`: Kraken's benchmarks have it made anew. Ours follows from the blob
    /// and stays.
    pub(super) async fn remake_metainfo(&self, request: &Request, digest: &Digest) -> Result<Response, http::Error> {
        let piece_length = http::query(request.uri(), "piece_length").and_then(|text| text.parse::<u64>().ok());
        if piece_length.is_none_or(|length| length == 0) {
            return Err(http::Error::bad_request("piece_length is not a positive number"));
        }
        match self.local(digest).await? {
            Local::Whole(_) => Ok(http::status(StatusCode::OK)),
            Local::Missing => Err(http::Error::internal("blob is not here")),
        }
    }

    /// `DELETE /internal/blobs/{digest}`: 202; 404; 500 where work still needs it.
    pub(super) async fn delete(&self, digest: &Digest) -> Result<Response, http::Error> {
        match self.engine.evict(digest).await {
            Ok(true) => Ok(http::status(StatusCode::ACCEPTED)),
            Ok(false) => Err(http::Error::not_found("blob is not here")),
            Err(error) => Err(http::Error::internal(error.to_string())),
        }
    }

    /// `GET /blobs/{digest}/locations`: the owners that are up, in order.
    pub(super) fn locations(&self, digest: &Digest) -> Response {
        let owners = self.cluster.owners(digest);
        let addrs: Vec<_> = owners.iter().map(|owner| self.cluster.origin(*owner).addr().as_str()).collect();
        let mut response = http::status(StatusCode::OK);
        if let Ok(value) = HeaderValue::try_from(addrs.join(",")) {
            response.headers_mut().insert("origin-locations", value);
        }
        response
    }

    /// `GET /internal/peercontext`.
    pub(super) fn peer_context(&self) -> Response {
        let addr = self.engine.peer_addr();
        let context = PeerContext {
            ip: addr.ip(),
            port: addr.port(),
            peer_id: self.engine.id(),
            zone: self.zone.clone(),
            cluster: String::new(),
            origin: true,
        };
        http::json(StatusCode::OK, &context)
    }
}

fn metainfo(layout: &Layout) -> Metainfo {
    let geometry = layout.geometry();
    let sums: Vec<_> = geometry.all().map(|piece| layout.crc(piece)).collect();
    Metainfo {
        info: Info {
            piece_length: geometry.piece_length(),
            piece_sums: (!sums.is_empty()).then_some(sums),
            name: layout.digest().hex(),
            length: layout.length(),
        },
    }
}

fn reach(request: &Request) -> Reach {
    match http::query(request.uri(), "local").as_deref() {
        Some("true" | "1") => Reach::Local,
        _ => Reach::Everywhere,
    }
}

/// The one range asked for; none for the whole blob, which also answers a list of ranges. An error where it is not within the
/// blob.
fn wanted(headers: &HeaderMap, total: u64) -> Result<Option<Range<u64>>, ()> {
    let Some(text) = headers.get(header::RANGE).and_then(|value| value.to_str().ok()) else { return Ok(None) };
    match range::parse(text) {
        Ok(Some(specs)) if specs.len() == 1 => specs[0].resolve(total).map(Some).ok_or(()),
        _ => Ok(None),
    }
}

fn describe(headers: &mut HeaderMap, digest: &Digest, length: u64) {
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    set(headers, header::ETAG, format!("\"{digest}\""));
}

fn set(headers: &mut HeaderMap, name: header::HeaderName, value: String) {
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peer_proto::{Algorithm, LayoutBuilder};

    #[test]
    fn metainfo_is_krakens() {
        let mut builder = LayoutBuilder::new(Algorithm::Sha256);
        builder.update(&[0; (1 << 20) + 1]).unwrap();
        let layout = builder.finish();
        let (whole, one) = (crc32(&[0; 1 << 20]), crc32(&[0]));
        let hex = layout.digest().hex();
        assert_eq!(
            serde_json::to_string(&metainfo(&layout)).unwrap(),
            format!(
                r#"{{"Info":{{"PieceLength":1048576,"PieceSums":[{whole},{one}],"Name":"{hex}","Length":1048577}}}}"#
            )
        );
        let empty = LayoutBuilder::new(Algorithm::Sha256).finish();
        assert!(serde_json::to_string(&metainfo(&empty)).unwrap().contains(r#""PieceSums":null"#));
    }

    /// IEEE, bit by bit.
    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1)))
        })
    }

    #[test]
    fn ranges_of_a_blob() {
        let asked = |text: &str| wanted(&HeaderMap::from_iter([(header::RANGE, text.parse().unwrap())]), 10);
        assert_eq!(asked("bytes=2-3"), Ok(Some(2..4)));
        assert_eq!(asked("bytes=-3"), Ok(Some(7..10)));
        assert_eq!(asked("bytes=10-"), Err(()));
        assert_eq!(asked("bytes=0-1,3-4"), Ok(None), "a list is answered by the whole");
        assert_eq!(asked("pieces=1-2"), Ok(None));
    }
}
