//! What an agent's registry reads: blobs from the swarm, while they still arrive; tags from the index. Nothing is written.

use super::downloads::{self, Downloads};
use crate::registry::{Content, Failure, Listing, Page, Part, Repository, Spec, Tag, Tags};
use engine::handle::Class;
use peer_proto::Digest;

/// An agent's engine and the index as content that is read only.
#[derive(Clone)]
pub struct Store {
    downloads: Downloads,
    tags: Tags,
}

impl Store {
    /// Content that these downloads bring, under the tags of the index.
    pub fn new(downloads: Downloads, tags: Tags) -> Self {
        Self { downloads, tags }
    }
}

impl Content for Store {
    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64, Failure> {
        let layout = self.downloads.layout(repository.namespace(), digest).await.map_err(failure)?;
        Ok(layout.length())
    }

    async fn read(&self, repository: &Repository, digest: &Digest, spec: Option<Spec>) -> Result<Part, Failure> {
        let layout = self.downloads.ensure(repository.namespace(), digest, Class::Foreground).await.map_err(failure)?;
        let total = layout.length();
        let range = match spec {
            None => 0..total,
            Some(spec) => spec.resolve(total).ok_or(Failure::Range(total))?,
        };
        let reader = self.downloads.read(digest, range.clone()).await.map_err(failure)?;
        Ok(Part { total, range, bytes: downloads::body(reader) })
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
        self.downloads.ensure(repository.namespace(), digest, Class::Background).await.map(drop).map_err(failure)
    }
}

fn failure(error: downloads::Error) -> Failure {
    use downloads::Error;
    let message = error.to_string();
    match error {
        Error::NotFound(_) => Failure::Unknown,
        Error::Unknowable(_) | Error::Pending { .. } | Error::Busy => Failure::Unavailable(message),
        Error::Engine(error) => match &*error {
            engine::Error::NotFound(_) => Failure::Unknown,
            engine::Error::NoSpace(_) => Failure::NoSpace(message),
            engine::Error::Busy(_)
            | engine::Error::Closed
            | engine::Error::Stopped(_)
            | engine::Error::Stalled { .. } => Failure::Unavailable(message),
            _ => Failure::Internal(message),
        },
    }
}
