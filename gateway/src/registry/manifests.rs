//! Manifests by tag and digest: read, stored, tagged.

use super::{
    blobs,
    content::{Content, Failure, Push},
    error::{Code, Entry, Error},
    manifest::{self, Descriptor, Manifest},
    name::{Reference, Repository, Tag},
    service::{CONTENT_DIGEST, Client, Service, bare, header_text, text},
};
use crate::http::{self, Body, Response};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream};
use hyper::{
    StatusCode,
    header::{self, HeaderName, HeaderValue},
    http::request::Parts,
};
use peer_proto::{Algorithm, Digest, DigestError, chain::Hasher};
use std::{collections::BTreeSet, time::Duration};

/// Tells a client that its manifest's subject was understood, and its fallback tag is not needed.
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
/// The tags that a push by digest set as well.
const TAG: HeaderName = HeaderName::from_static("oci-tag");
/// Most tags set by one push.
const TAGS_MAX: usize = 64;
/// Questions asked at once about one manifest's parts.
const CONCURRENT: usize = 16;
/// Longest wait for a manifest's bytes from a client or from a blob that has opened.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

impl<C: Content> Service<C> {
    /// A manifest that is here, its bytes checked against its digest.
    pub(crate) async fn load(&self, repository: &Repository, digest: &Digest) -> Result<(Bytes, Manifest), Failure> {
        let part = self.content.inspect(repository, digest).await?;
        if part.total > manifest::LEN_MAX as u64 {
            return Err(Failure::Unknown);
        }
        let read = tokio::time::timeout(BODY_TIMEOUT, collect(part.bytes)).await;
        let read = read.map_err(|_| Failure::Unavailable(format!("no manifest within {BODY_TIMEOUT:?}")))?;
        let bytes = read.map_err(|error| Failure::Unavailable(error.message.into_owned()))?;
        let actual = digest_of(digest.algorithm(), &bytes);
        if actual != *digest {
            return Err(Failure::Unavailable(format!("content of {digest} has digest {actual}")));
        }
        // A layer asked for as a manifest is no manifest.
        let manifest = Manifest::parse(&bytes).map_err(|_| Failure::Unknown)?;
        Ok((bytes, manifest))
    }

    pub(super) async fn manifest(
        &self,
        parts: &Parts,
        repository: &Repository,
        reference: &Reference,
    ) -> Result<Response, Error> {
        let unknown = |failure: Failure| {
            let asked = match reference {
                Reference::Tag(tag) => serde_json::json!({ "name": repository.as_str(), "tag": tag.as_str() }),
                Reference::Digest(digest) => {
                    serde_json::json!({ "name": repository.as_str(), "digest": digest.to_string() })
                }
            };
            failure.answer(Code::ManifestUnknown).about(asked)
        };
        let digest = match reference {
            Reference::Digest(digest) => *digest,
            Reference::Tag(tag) => self.content.resolve(repository, tag).await.map_err(unknown)?,
        };
        let (bytes, manifest) = self.load(repository, &digest).await.map_err(unknown)?;
        let mut response = blobs::from_memory(parts, &digest, manifest.kind.media_type(), &bytes)?;
        if let Reference::Tag(_) = reference {
            response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        }
        Ok(response)
    }

    pub(super) async fn put_manifest(
        &self,
        parts: &Parts,
        body: Body,
        repository: &Repository,
        reference: &Reference,
        client: Client,
    ) -> Result<Response, Error> {
        let tags = tags(parts, reference)?;
        let bytes = read(parts, body).await?;
        let digest = match reference {
            Reference::Tag(_) => digest_of(Algorithm::Sha256, &bytes),
            Reference::Digest(digest) => {
                let actual = digest_of(digest.algorithm(), &bytes);
                if actual != *digest {
                    return Err(Error::new(Code::DigestInvalid, format!("manifest has digest {actual}, not {digest}")));
                }
                actual
            }
        };
        let content_type = header_text(&parts.headers, header::CONTENT_TYPE);
        let manifest = Manifest::parse_typed(&bytes, content_type)
            .map_err(|error| Error::new(Code::ManifestInvalid, error.to_string()))?;
        let subject = manifest.subject.as_ref().map(|subject| subject.digest.parse::<Digest>()).transpose()?;
        self.check_references(repository, &manifest).await?;

        let failed = |failure: Failure| failure.answer(Code::NameUnknown);
        if !client.moves_tags {
            for tag in &tags {
                match self.content.resolve(repository, tag).await {
                    Ok(before) if before != digest => {
                        return Err(Error::new(Code::Denied, format!("tag {tag} is set, and may not be moved")));
                    }
                    Ok(_) | Err(Failure::Unknown) => {}
                    Err(failure) => return Err(failed(failure)),
                }
            }
        }
        let push = Push { digest: &digest, bytes, subject: subject.as_ref(), tags: &tags };
        self.content.put_manifest(repository, push).await.map_err(failed)?;
        tracing::info!(%repository, %digest, tags = tags.len(), "manifest pushed");

        let location = text(format!("/v2/{repository}/manifests/{digest}"))?;
        let mut response =
            bare(StatusCode::CREATED, [(header::LOCATION, location), (CONTENT_DIGEST, text(digest.to_string())?)]);
        if let Some(subject) = &subject {
            response.headers_mut().insert(SUBJECT, text(subject.to_string())?);
        }
        if let Reference::Digest(_) = reference {
            for tag in &tags {
                response.headers_mut().append(TAG, text(tag.as_str())?);
            }
        }
        Ok(response)
    }

    /// Whether everything is here that the manifest needs; an entry for each thing that is not.
    async fn check_references(&self, repository: &Repository, manifest: &Manifest) -> Result<(), Error> {
        let needed: BTreeSet<String> =
            manifest.references().filter(|one| !one.is_elsewhere()).map(|one| one.digest.clone()).collect();
        let mut found = stream::iter(needed)
            .map(async |digest: String| {
                let found = match digest.parse::<Digest>() {
                    Ok(_) if self.rules.sparse => Ok(()),
                    Ok(digest) => self.content.stat(repository, &digest).await.map(drop),
                    Err(DigestError::Algorithm) => Err(Failure::Unknown),
                    Err(error) => Err(Failure::Mismatch(format!("{digest}: {error}"))),
                };
                (digest, found)
            })
            .buffered(CONCURRENT);
        let mut missing = Vec::new();
        while let Some((digest, found)) = found.next().await {
            match found {
                Ok(()) => {}
                Err(Failure::Unknown) => missing.push(Entry {
                    code: Code::ManifestBlobUnknown,
                    message: "manifest names a blob that is not here".into(),
                    detail: Some(serde_json::json!({ "digest": digest })),
                }),
                Err(failure) => return Err(failure.answer(Code::ManifestBlobUnknown)),
            }
        }
        if missing.is_empty() { Ok(()) } else { Err(Error::of_all(missing)) }
    }

    pub(super) async fn untag(&self, repository: &Repository, tag: &Tag) -> Result<Response, Error> {
        self.content.untag(repository, tag).await.map_err(|failure| failure.answer(Code::ManifestUnknown))?;
        tracing::info!(%repository, %tag, "tag deleted");
        Ok(bare(StatusCode::ACCEPTED, []))
    }

    pub(super) async fn delete_manifest(&self, repository: &Repository, digest: &Digest) -> Result<Response, Error> {
        let unknown = |failure: Failure| failure.answer(Code::ManifestUnknown).about(digest.to_string());
        let (_, manifest) = self.load(repository, digest).await.map_err(unknown)?;
        let subject = manifest.subject.as_ref().map(|subject| subject.digest.parse::<Digest>()).transpose()?;
        self.content.delete(repository, digest, subject.as_ref()).await.map_err(unknown)?;
        tracing::info!(%repository, %digest, "manifest deleted");
        Ok(bare(StatusCode::ACCEPTED, []))
    }

    /// The descriptors of manifests that are here, in order, with the digest each was asked by; those that are not are left out.
    pub(super) async fn describe(
        &self,
        repository: &Repository,
        digests: Vec<Digest>,
        bytes_max: usize,
    ) -> Result<Described, Failure> {
        let mut described = Described { items: Vec::new(), last: None, more: false };
        let mut loaded = stream::iter(digests)
            .map(async |digest| (digest, self.load(repository, &digest).await))
            .buffered(CONCURRENT);
        let mut bytes_left = bytes_max;
        while let Some((digest, loaded)) = loaded.next().await {
            match loaded {
                Ok((bytes, manifest)) => {
                    // A descriptor is a part of its manifest, so never longer by much.
                    match bytes_left.checked_sub(bytes.len()) {
                        Some(left) => bytes_left = left,
                        None if described.items.is_empty() => bytes_left = 0,
                        None => {
                            described.more = true;
                            break;
                        }
                    }
                    described.items.push(manifest.descriptor(&digest, bytes.len() as u64));
                }
                Err(Failure::Unknown) => {}
                Err(failure) => return Err(failure),
            }
            described.last = Some(digest);
        }
        Ok(described)
    }
}

/// Descriptors of manifests, as many as fit.
pub(super) struct Described {
    pub(super) items: Vec<Descriptor>,
    /// The last digest looked at.
    pub(super) last: Option<Digest>,
    /// Whether the list was cut.
    pub(super) more: bool,
}

/// The bytes of a manifest. Boxed, because the compiler cannot see through the error's type in a larger future.
fn collect(body: Body) -> BoxFuture<'static, Result<Bytes, http::Error>> {
    http::read_body(body, manifest::LEN_MAX).boxed()
}

/// The digest of bytes at hand.
pub(crate) fn digest_of(algorithm: Algorithm, bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::new(algorithm);
    hasher.update(bytes);
    hasher.finish()
}

/// The tags a push sets: the one it is by, or those of its query.
fn tags(parts: &Parts, reference: &Reference) -> Result<Vec<Tag>, Error> {
    match reference {
        Reference::Tag(tag) => Ok(vec![tag.clone()]),
        Reference::Digest(_) => {
            let tags = http::query_all(&parts.uri, "tag");
            if tags.len() > TAGS_MAX {
                let error =
                    Error::new(Code::ManifestInvalid, format!("{} tags, at most {TAGS_MAX} are taken", tags.len()));
                return Err(error.status(StatusCode::URI_TOO_LONG));
            }
            Ok(tags.iter().map(|tag| tag.parse()).collect::<Result<_, _>>()?)
        }
    }
}

async fn read(parts: &Parts, body: Body) -> Result<Bytes, Error> {
    let too_long = || {
        let limit = manifest::LEN_MAX;
        Error::new(Code::SizeInvalid, format!("manifest is longer than {limit} bytes"))
            .status(StatusCode::PAYLOAD_TOO_LARGE)
    };
    let length = header_text(&parts.headers, header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
    if length.is_some_and(|length| length > manifest::LEN_MAX as u64) {
        return Err(too_long());
    }
    match tokio::time::timeout(BODY_TIMEOUT, collect(body)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if error.status == StatusCode::PAYLOAD_TOO_LARGE => Err(too_long()),
        Ok(Err(error)) => Err(Error::new(Code::ManifestInvalid, error.message)),
        Err(_) => {
            let error = Error::new(Code::ManifestInvalid, format!("no whole manifest within {BODY_TIMEOUT:?}"));
            Err(error.status(StatusCode::REQUEST_TIMEOUT))
        }
    }
}
