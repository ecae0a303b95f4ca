//! Uploads: opened, continued in order, closed under a digest. Bytes go through as they come; nothing is kept here.

use super::{
    content::{Chunk, Content, Failure},
    content_range,
    error::{Code, Error},
    name::Repository,
    service::{CONTENT_DIGEST, Client, Service, bare, header_text, text},
    session::Session,
};
use crate::http::{self, Body, Response};
use hyper::{
    StatusCode,
    body::Body as _,
    header::{self, HeaderName, HeaderValue},
    http::request::Parts,
};
use peer_proto::{Algorithm, Digest, DigestError};

/// The name of an upload by itself; by custom.
const UPLOAD_UUID: HeaderName = HeaderName::from_static("docker-upload-uuid");

impl<C: Content> Service<C> {
    pub(super) async fn open_upload(
        &self,
        parts: &Parts,
        body: Body,
        repository: &Repository,
        client: Client,
    ) -> Result<Response, Error> {
        let failed = |failure: Failure| failure.answer(Code::NameUnknown);
        if let Some(digest) = http::query(&parts.uri, "mount") {
            let digest: Digest = digest.parse()?;
            let from = http::query(&parts.uri, "from").map(|from| from.parse::<Repository>()).transpose()?;
            if client.mounts && self.content.mount(repository, &digest, from.as_ref()).await.map_err(failed)? {
                return created(repository, &digest);
            }
            // Unknown to us: the client may upload it.
            return self.opened(repository, digest.algorithm()).await;
        }
        if let Some(digest) = http::query(&parts.uri, "digest") {
            let digest: Digest = digest.parse()?;
            let bytes = chunk(parts, body)?;
            let session = self.content.open(repository, digest.algorithm()).await.map_err(failed)?;
            let filled = self.fill(repository, &session, &digest, Some(bytes)).await;
            if filled.is_err()
                && let Err(failure) = self.content.cancel(repository, &session).await
            {
                // Its client does not know the session, so nobody would go on with it. Most failures have ended it already.
                tracing::debug!(%repository, %failure, "drop an upload that failed");
            }
            return filled;
        }
        let algorithm = match http::query(&parts.uri, "digest-algorithm").as_deref() {
            None | Some("sha256") => Algorithm::Sha256,
            Some("sha512") => Algorithm::Sha512,
            Some(_) => return Err(DigestError::Algorithm.into()),
        };
        self.opened(repository, algorithm).await
    }

    async fn opened(&self, repository: &Repository, algorithm: Algorithm) -> Result<Response, Error> {
        let session = self.content.open(repository, algorithm).await;
        let session = session.map_err(|failure| failure.answer(Code::NameUnknown))?;
        progress(StatusCode::ACCEPTED, repository, &session, 0)
    }

    pub(super) async fn upload(&self, repository: &Repository, session: &Session) -> Result<Response, Error> {
        let received = self.content.received(repository, session).await.map_err(upload_failed)?;
        progress(StatusCode::NO_CONTENT, repository, session, received)
    }

    pub(super) async fn append(
        &self,
        parts: &Parts,
        body: Body,
        repository: &Repository,
        session: &Session,
    ) -> Result<Response, Error> {
        let chunk = chunk(parts, body)?;
        match self.content.append(repository, session, chunk).await {
            Ok(received) => progress(StatusCode::ACCEPTED, repository, session, received),
            Err(failure) => Err(out_of_order(failure, repository, session)?),
        }
    }

    pub(super) async fn close_upload(
        &self,
        parts: &Parts,
        body: Body,
        repository: &Repository,
        session: &Session,
    ) -> Result<Response, Error> {
        let digest = http::query(&parts.uri, "digest")
            .ok_or_else(|| Error::new(Code::DigestInvalid, "the upload's digest is missing"))?;
        let digest: Digest = digest.parse()?;
        let chunk = if body.is_end_stream() { None } else { Some(chunk(parts, body)?) };
        self.fill(repository, session, &digest, chunk).await
    }

    /// The last bytes of an upload, and its end.
    async fn fill(
        &self,
        repository: &Repository,
        session: &Session,
        digest: &Digest,
        chunk: Option<Chunk>,
    ) -> Result<Response, Error> {
        if let Some(chunk) = chunk
            && let Err(failure) = self.content.append(repository, session, chunk).await
        {
            return Err(out_of_order(failure, repository, session)?);
        }
        self.content.commit(repository, session, digest).await.map_err(upload_failed)?;
        tracing::debug!(%repository, %digest, "blob pushed");
        created(repository, digest)
    }

    pub(super) async fn cancel_upload(&self, repository: &Repository, session: &Session) -> Result<Response, Error> {
        self.content.cancel(repository, session).await.map_err(upload_failed)?;
        Ok(bare(StatusCode::NO_CONTENT, []))
    }
}

fn upload_failed(failure: Failure) -> Error {
    failure.answer(Code::BlobUploadUnknown)
}

/// A chunk at the wrong place leaves the upload as it was, and the answer says where it stands.
fn out_of_order(failure: Failure, repository: &Repository, session: &Session) -> Result<Error, Error> {
    let Failure::Offset { expected } = failure else { return Ok(upload_failed(failure)) };
    Ok(upload_failed(failure)
        .header(header::LOCATION, location(repository, session)?)
        .header(header::RANGE, text(content_range::received(expected))?))
}

/// The bytes of a PATCH, a PUT or a POST, and where they belong.
fn chunk(parts: &Parts, bytes: Body) -> Result<Chunk, Error> {
    let length = bytes.size_hint().exact();
    let at = match header_text(&parts.headers, header::CONTENT_RANGE) {
        None => None,
        Some(header) => Some(content_range::parse(header, length)?),
    };
    let length = length.or_else(|| at.as_ref().map(|range| range.end - range.start));
    Ok(Chunk { at: at.map(|range| range.start), length, bytes })
}

fn location(repository: &Repository, session: &Session) -> Result<HeaderValue, Error> {
    text(format!("/v2/{repository}/blobs/uploads/{}", session.segment()))
}

fn progress(status: StatusCode, repository: &Repository, session: &Session, received: u64) -> Result<Response, Error> {
    let mut headers = vec![
        (header::LOCATION, location(repository, session)?),
        (header::RANGE, text(content_range::received(received))?),
        (UPLOAD_UUID, text(session.id.to_string())?),
    ];
    if status == StatusCode::ACCEPTED {
        headers.push((header::CONTENT_LENGTH, HeaderValue::from(0)));
    }
    Ok(bare(status, headers))
}

fn created(repository: &Repository, digest: &Digest) -> Result<Response, Error> {
    let headers = [
        (header::LOCATION, text(format!("/v2/{repository}/blobs/{digest}"))?),
        (CONTENT_DIGEST, text(digest.to_string())?),
        (header::CONTENT_LENGTH, HeaderValue::from(0)),
    ];
    Ok(bare(StatusCode::CREATED, headers))
}
