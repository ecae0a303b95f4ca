//! Blobs by digest: whole, in ranges, or only their size.

use super::{
    content::{Content, Failure, Part},
    error::{Code, Error},
    multipart::{Frame, content_range},
    name::Repository,
    range::{self, Spec},
    service::{CONTENT_DIGEST, Service, bare, etag, header_text, is_unchanged, text},
};
use crate::http::{self, Body, BoxError, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http_body_util::BodyDataStream;
use hyper::{
    Method, StatusCode,
    header::{self, HeaderMap, HeaderValue},
    http::request::Parts,
};
use peer_proto::Digest;
use std::{collections::VecDeque, ops::Range, sync::Arc};
use uuid::Uuid;

/// What blobs are to HTTP.
const BLOB_TYPE: &str = "application/octet-stream";
/// Parts of one answer that are opened while one before them is still sent: what is not here is then on its way.
const PARTS_AHEAD: usize = 8;
/// Content under a digest never changes: a year.
const FOREVER: HeaderValue = HeaderValue::from_static("max-age=31536000");

impl<C: Content> Service<C> {
    pub(super) async fn blob(
        self: &Arc<Self>,
        parts: &Parts,
        repository: Repository,
        digest: Digest,
    ) -> Result<Response, Error> {
        let unknown = |failure: Failure| failure.answer(Code::BlobUnknown).about(digest.to_string());
        let unchanged = is_unchanged(&parts.headers, &digest);
        if unchanged || parts.method == Method::HEAD {
            let total = self.content.stat(&repository, &digest).await.map_err(unknown)?;
            return if unchanged { not_modified(&digest) } else { head(&digest, BLOB_TYPE, total) };
        }
        let specs = ranges(&parts.headers, &digest)?;
        let read = async |spec| self.content.read(&repository, &digest, spec).await;
        match specs.as_deref() {
            None => whole(&digest, BLOB_TYPE, read(None).await.map_err(unknown)?),
            Some([spec]) => match read(Some(*spec)).await {
                Ok(part) => partial(&digest, BLOB_TYPE, part),
                Err(Failure::Range(0)) => whole(&digest, BLOB_TYPE, read(None).await.map_err(unknown)?),
                Err(failure) => Err(unknown(failure)),
            },
            Some(specs) => {
                let total = self.content.stat(&repository, &digest).await.map_err(unknown)?;
                let mut ranges = VecDeque::from(range::resolve(specs, total));
                let Some(first) = ranges.pop_front() else { return Err(unknown(Failure::Range(total))) };
                // The first is opened before there are headers, so that what is not here can still be said.
                let part = read(Some(spec(&first))).await.map_err(unknown)?;
                if ranges.is_empty() {
                    return partial(&digest, BLOB_TYPE, part);
                }
                let frame = Frame::new(Uuid::new_v4().simple().to_string(), BLOB_TYPE, total);
                let all: Vec<_> = std::iter::once(&first).chain(&ranges).cloned().collect();
                let length = frame.body_len(&all);
                let head = Bytes::from(frame.head(&first));
                let opened = stream::once(async { Ok(head) }).chain(data(part.bytes));
                let rest = self.clone().parts(repository, digest, frame.clone(), ranges);
                multipart(&digest, &frame, length, http::stream(opened.chain(rest)))
            }
        }
    }

    pub(super) async fn delete_blob(&self, repository: &Repository, digest: &Digest) -> Result<Response, Error> {
        let unknown = |failure: Failure| failure.answer(Code::BlobUnknown).about(digest.to_string());
        self.content.stat(repository, digest).await.map_err(unknown)?;
        self.content.delete(repository, digest, None).await.map_err(unknown)?;
        tracing::info!(%repository, %digest, "blob deleted");
        Ok(bare(StatusCode::ACCEPTED, []))
    }

    /// The parts of a multipart answer and its end, a few opened ahead of what is sent.
    fn parts(
        self: Arc<Self>,
        repository: Repository,
        digest: Digest,
        frame: Frame,
        ranges: VecDeque<Range<u64>>,
    ) -> impl Stream<Item = Result<Bytes, BoxError>> {
        let tail = Bytes::from(frame.tail());
        let service = self;
        let parts = stream::iter(ranges).map(move |range| {
            let (service, repository, head) = (service.clone(), repository.clone(), Bytes::from(frame.head(&range)));
            async move {
                let part = service.content.read(&repository, &digest, Some(spec(&range))).await?;
                Ok::<_, BoxError>(stream::once(async { Ok(head) }).chain(data(part.bytes)))
            }
        });
        let parts = parts.buffered(PARTS_AHEAD).flat_map(|part| match part {
            Ok(part) => part.left_stream(),
            Err(error) => stream::once(async { Err(error) }).right_stream(),
        });
        parts.chain(stream::once(async { Ok(tail) }))
    }
}

fn data(body: Body) -> impl Stream<Item = Result<Bytes, BoxError>> {
    BodyDataStream::new(body)
}

fn spec(range: &Range<u64>) -> Spec {
    Spec::Between(range.start, range.end - 1)
}

/// The ranges a request asks for, unless they are of other content than this: `Range` and `If-Range`.
pub(super) fn ranges(headers: &HeaderMap, digest: &Digest) -> Result<Option<Vec<Spec>>, Error> {
    let Some(header) = header_text(headers, header::RANGE) else { return Ok(None) };
    let same = headers.get(header::IF_RANGE).is_none_or(|tag| tag.as_bytes() == etag(digest).as_bytes());
    if same { Ok(range::parse(header)?) } else { Ok(None) }
}

/// Content from memory: what [`Service::blob`] is to content from elsewhere.
pub(super) fn from_memory(parts: &Parts, digest: &Digest, media_type: &str, bytes: &Bytes) -> Result<Response, Error> {
    let total = bytes.len() as u64;
    if is_unchanged(&parts.headers, digest) {
        return not_modified(digest);
    }
    if parts.method == Method::HEAD {
        return head(digest, media_type, total);
    }
    let slice = |range: &Range<u64>| {
        let bound = |at| usize::try_from(at).unwrap_or(bytes.len());
        bytes.slice(bound(range.start)..bound(range.end))
    };
    let part = |range: Range<u64>| Part { total, bytes: http::full(slice(&range)), range };
    let Some(specs) = ranges(&parts.headers, digest)?.filter(|_| total > 0) else {
        return whole(digest, media_type, part(0..total));
    };
    match &*range::resolve(&specs, total) {
        [] => Err(Failure::Range(total).answer(Code::Unknown)),
        [range] => partial(digest, media_type, part(range.clone())),
        ranges => {
            let frame = Frame::new(Uuid::new_v4().simple().to_string(), media_type, total);
            let mut body = Vec::new();
            for range in ranges {
                body.extend_from_slice(frame.head(range).as_bytes());
                body.extend_from_slice(&slice(range));
            }
            body.extend_from_slice(frame.tail().as_bytes());
            multipart(digest, &frame, body.len() as u64, http::full(body))
        }
    }
}

fn describe(response: &mut Response, digest: &Digest, media_type: &str, length: u64) -> Result<(), Error> {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, text(media_type)?);
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::ETAG, text(etag(digest))?);
    headers.insert(header::CACHE_CONTROL, FOREVER);
    headers.insert(CONTENT_DIGEST, text(digest.to_string())?);
    Ok(())
}

fn head(digest: &Digest, media_type: &str, total: u64) -> Result<Response, Error> {
    let mut response = http::status(StatusCode::OK);
    describe(&mut response, digest, media_type, total)?;
    Ok(response)
}

fn whole(digest: &Digest, media_type: &str, part: Part) -> Result<Response, Error> {
    let mut response = Response::new(part.bytes);
    describe(&mut response, digest, media_type, part.total)?;
    Ok(response)
}

fn partial(digest: &Digest, media_type: &str, part: Part) -> Result<Response, Error> {
    let mut response = Response::new(part.bytes);
    *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    describe(&mut response, digest, media_type, part.range.end - part.range.start)?;
    response.headers_mut().insert(header::CONTENT_RANGE, text(content_range(&part.range, part.total))?);
    Ok(response)
}

fn multipart(digest: &Digest, frame: &Frame, length: u64, body: Body) -> Result<Response, Error> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    describe(&mut response, digest, &frame.content_type(), length)?;
    Ok(response)
}

fn not_modified(digest: &Digest) -> Result<Response, Error> {
    let headers = [
        (header::ETAG, text(etag(digest))?),
        (header::CACHE_CONTROL, FOREVER),
        (CONTENT_DIGEST, text(digest.to_string())?),
    ];
    Ok(bare(StatusCode::NOT_MODIFIED, headers))
}
