//! Tags, repositories and referrers as the index keeps them: the half of any content that is not blobs.

use super::{
    content::Failure,
    name::{Repository, Tag},
    paging::{Listing, Page},
};
use crate::{
    client::index::{Error, Index},
    index::TagName,
};
use peer_proto::Digest;

/// The index as registries see it. Cheap to clone.
#[derive(Clone)]
pub struct Tags {
    index: Index,
}

impl Tags {
    /// The tags that this index keeps.
    pub fn new(index: Index) -> Self {
        Self { index }
    }

    /// What a tag stands for.
    pub async fn resolve(&self, repository: &Repository, tag: &Tag) -> Result<Digest, Failure> {
        Ok(self.index.get(&TagName::new(repository, tag)).await?)
    }

    /// A repository's tags, sorted.
    pub async fn list(&self, repository: &Repository, page: &Page) -> Result<Listing, Failure> {
        let listing = self.index.tags(repository.namespace(), page).await?;
        let none = listing.items.is_empty() && page.last.is_none() && page.n > 0;
        if none { Err(Failure::Unknown) } else { Ok(listing) }
    }

    /// The repositories that have tags, sorted.
    pub async fn repositories(&self, page: &Page) -> Result<Listing, Failure> {
        Ok(self.index.repositories(page).await?)
    }

    /// The manifests of a repository that are about `subject`, sorted by digest.
    pub async fn referrers(
        &self,
        repository: &Repository,
        subject: &Digest,
        page: &Page,
    ) -> Result<Listing<Digest>, Failure> {
        Ok(self.index.referrers(repository.namespace(), subject, page).await?)
    }

    /// Lets a tag stand for a manifest; afterwards that is durable.
    pub async fn set(&self, repository: &Repository, tag: &Tag, digest: &Digest) -> Result<(), Failure> {
        Ok(self.index.put(&TagName::new(repository, tag), digest).await?)
    }

    /// Removes a tag.
    pub async fn remove(&self, repository: &Repository, tag: &Tag) -> Result<(), Failure> {
        Ok(self.index.delete(&TagName::new(repository, tag)).await?)
    }

    /// Notes that the manifest `referrer` is about `subject`.
    pub async fn refer(&self, repository: &Repository, subject: &Digest, referrer: &Digest) -> Result<(), Failure> {
        Ok(self.index.refer(repository.namespace(), subject, referrer).await?)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::NotFound => Self::Unknown,
            Error::Unavailable(_) => Self::Unavailable(message),
            Error::Refused { status, .. } if status.is_server_error() => Self::Unavailable(message),
            _ => Self::Internal(message),
        }
    }
}
