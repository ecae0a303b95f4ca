//! What a proxy's registry reads and writes: blobs at the origins, tags at the index.

use crate::{
    client::{Origins, origin},
    registry::{Chunk, Content, Failure, Listing, Page, Part, Push, Repository, Session, Spec, Tag, Tags},
};
use peer_proto::{Algorithm, Digest};
use std::time::Duration;
use uuid::Uuid;

/// Origins and index as content that can be written.
#[derive(Clone)]
pub struct Store {
    origins: Origins,
    tags: Tags,
    /// Longest wait for a blob that an origin has to fetch from its backend first.
    wait: Duration,
}

impl Store {
    /// Content of these origins and this index. `wait` is the longest wait of a reader for a blob that an origin has to fetch
    /// from its backend first.
    pub fn new(origins: Origins, tags: Tags, wait: Duration) -> Self {
        Self { origins, tags, wait }
    }

    fn session(&self, session: &Session) -> Result<crate::client::origins::Session, Failure> {
        self.origins.session(&session.to_string()).map_err(failure)
    }
}

impl Content for Store {
    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64, Failure> {
        let stat = async { self.origins.stat(repository.namespace(), digest).await.map_err(failure) };
        let ((), size) = tokio::try_join!(self.tags.renew(repository, digest), stat)?;
        Ok(size)
    }

    async fn read(&self, repository: &Repository, digest: &Digest, range: Option<Spec>) -> Result<Part, Failure> {
        let open = async { self.origins.open(repository.namespace(), digest, range, self.wait).await.map_err(failure) };
        let ((), blob) = tokio::try_join!(self.tags.kept(repository, digest), open)?;
        Ok(Part { total: blob.total(), range: blob.range(), bytes: blob.into_body() })
    }

    async fn resolve(&self, repository: &Repository, tag: &Tag) -> Result<Digest, Failure> {
        self.tags.resolve(repository, tag).await
    }

    async fn tags(&self, repository: &Repository, page: &Page) -> Result<Listing, Failure> {
        self.tags.list(repository, page).await
    }

    async fn repositories(&self, page: &Page) -> Result<Listing, Failure> {
        self.tags.repositories(page).await
    }

    async fn referrers(
        &self,
        repository: &Repository,
        subject: &Digest,
        page: &Page,
    ) -> Result<Listing<Digest>, Failure> {
        self.tags.referrers(repository, subject, page).await
    }

    async fn warm(&self, repository: &Repository, digest: &Digest) -> Result<(), Failure> {
        match self.origins.prefetch(repository.namespace(), digest).await {
            Ok(()) | Err(origin::Error::Pending) => Ok(()),
            Err(error) => Err(failure(error)),
        }
    }

    fn is_writable(&self) -> bool {
        true
    }

    async fn open(&self, repository: &Repository, algorithm: Algorithm) -> Result<Session, Failure> {
        let session = self.origins.start(repository.namespace(), algorithm, None, None).await.map_err(failure)?;
        let id = Uuid::try_parse(session.id());
        let id = id.map_err(|error| Failure::Internal(format!("{}: upload id: {error}", session.origin())))?;
        Ok(Session { id, place: session.origin().to_string() })
    }

    async fn received(&self, repository: &Repository, session: &Session) -> Result<u64, Failure> {
        self.origins.status(repository.namespace(), &self.session(session)?).await.map_err(failure)
    }

    async fn append(&self, repository: &Repository, session: &Session, chunk: Chunk) -> Result<u64, Failure> {
        let Chunk { at, length, bytes } = chunk;
        if length == Some(0) {
            let expected = self.received(repository, session).await?;
            return if at.is_some_and(|at| at != expected) { Err(Failure::Offset { expected }) } else { Ok(expected) };
        }
        let session = self.session(session)?;
        self.origins.append(repository.namespace(), &session, at, length, bytes).await.map_err(failure)
    }

    async fn commit(&self, repository: &Repository, session: &Session, digest: &Digest) -> Result<(), Failure> {
        self.origins.commit(repository.namespace(), &self.session(session)?, digest).await.map_err(failure)?;
        self.tags.keep(repository, digest).await
    }

    async fn cancel(&self, repository: &Repository, session: &Session) -> Result<(), Failure> {
        self.origins.cancel(repository.namespace(), &self.session(session)?).await.map_err(failure)
    }

    async fn mount(
        &self,
        repository: &Repository,
        digest: &Digest,
        from: Option<&Repository>,
    ) -> Result<bool, Failure> {
        if let Some(from) = from {
            match self.tags.kept(from, digest).await {
                Ok(()) => {}
                Err(Failure::Unknown) => return Ok(false),
                Err(failure) => return Err(failure),
            }
        }
        let linked = self.origins.link(repository.namespace(), digest).await.map_err(failure)?;
        if linked {
            self.tags.keep(repository, digest).await?;
        }
        Ok(linked)
    }

    async fn put_manifest(&self, repository: &Repository, push: Push<'_>) -> Result<(), Failure> {
        let Push { digest, bytes, subject, tags } = push;
        self.origins.put(repository.namespace(), digest, bytes).await.map_err(failure)?;
        self.tags.put_manifest(repository, digest, subject, tags).await
    }

    async fn untag(&self, repository: &Repository, tag: &Tag) -> Result<(), Failure> {
        self.tags.remove(repository, tag).await
    }

    async fn delete(&self, repository: &Repository, digest: &Digest, subject: Option<&Digest>) -> Result<(), Failure> {
        self.tags.delete(repository, digest, subject).await
    }
}

fn failure(error: origin::Error) -> Failure {
    use origin::Error;
    let message = error.to_string();
    match error {
        Error::NotFound => Failure::Unknown,
        Error::Limited { after, .. } => Failure::Limited { message, after },
        Error::UploadUnknown => Failure::UploadUnknown,
        Error::Offset { expected } => Failure::Offset { expected },
        Error::Mismatch(message) => Failure::Mismatch(message),
        Error::Range(total) => Failure::Range(total),
        Error::Body => Failure::Body,
        Error::Refused { status, .. } if status == hyper::StatusCode::INSUFFICIENT_STORAGE => Failure::NoSpace(message),
        // A fault of an origin may well be gone the next time.
        Error::Refused { .. } | Error::Pending | Error::Busy { .. } | Error::Unreachable(_) => {
            Failure::Unavailable(message)
        }
        _ => Failure::Internal(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        client::{Index, cluster::CALLING},
        config::HostPort,
        http::Client,
        index,
        proxy::{Limits, Proxy},
        registry::{
            Rules, Service,
            harness::{NOWHERE, Server},
        },
        upstream::Upstreams,
    };
    use backends::{Memory, Naming, Route, Router};
    use std::sync::Arc;

    #[tokio::test]
    async fn with_all_origins_gone_nothing_is_said_to_be_unknown() {
        let router = Router::new(vec![Route::new(".*", Naming::DockerTag, true, Arc::new(Memory::default())).unwrap()]);
        let upstreams = Upstreams::default();
        let index = index::Service::new(router, &index::Config::default(), upstreams, Vec::new(), None);
        let index = Server::start(index).await;
        // A port that nobody listens on: bound once, then free again.
        let origin = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let http = Client::default();
        let origins = Origins::new(&[HostPort::from(origin)], 1, CALLING, Duration::ZERO, &http).unwrap();
        let tags = Tags::new(Index::new(vec![HostPort::from(index.addr)], http));
        let (repository, digest) = ("lib/app".parse().unwrap(), NOWHERE.parse().unwrap());
        tags.put_manifest(&repository, &digest, None, &["1".parse().unwrap()]).await.unwrap();
        let registry = Service::new(Store::new(origins, tags, Duration::ZERO), Rules::default());
        let proxy = Server::start(Proxy::new(registry, Limits::default(), Arc::default())).await;

        let session = format!("/v2/a/blobs/uploads/{}~", Uuid::nil());
        for (method, path, status, code) in [
            ("GET", format!("/v2/lib/app/blobs/{NOWHERE}"), 503, "UNAVAILABLE"),
            ("GET", format!("/v2/lib/app/manifests/{NOWHERE}"), 503, "UNAVAILABLE"),
            ("GET", "/v2/lib/app/manifests/1".into(), 503, "UNAVAILABLE"),
            ("GET", "/v2/lib/app/manifests/2".into(), 404, "MANIFEST_UNKNOWN"),
            ("GET", "/v2/lib/none/tags/list".into(), 404, "NAME_UNKNOWN"),
            ("POST", "/v2/lib/app/blobs/uploads/".into(), 503, "UNAVAILABLE"),
            ("POST", format!("/v2/lib/app/blobs/uploads/?mount={NOWHERE}&from=a"), 503, "UNAVAILABLE"),
            ("PATCH", format!("{session}{origin}"), 503, "UNAVAILABLE"),
            // Only origins of the cluster are ever called, whatever a client names.
            ("PATCH", format!("{session}169.254.169.254:80"), 404, "BLOB_UPLOAD_UNKNOWN"),
            ("GET", format!("{session}169.254.169.254:80"), 404, "BLOB_UPLOAD_UNKNOWN"),
        ] {
            let answer = proxy.send(method, &path, &[], if method == "PATCH" { "x" } else { "" }).await;
            assert_eq!((answer.status, answer.code().as_str()), (status, code), "{method} {path}: {answer:?}");
        }
        assert_eq!(proxy.get("/v2/lib/app/tags/list").await.json()["tags"], serde_json::json!(["1"]));
        assert_eq!(proxy.get("/v2/_catalog").await.json()["repositories"], serde_json::json!(["lib/app"]));
        assert_eq!(proxy.send("DELETE", "/v2/lib/app/manifests/1", &[], "").await.status, 202);
        assert_eq!(proxy.get("/v2/lib/app/manifests/1").await.code(), "MANIFEST_UNKNOWN");
    }
}
