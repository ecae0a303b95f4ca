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
    /// Only content with a record is a repository's.
    recorded: bool,
}

impl Tags {
    /// The tags that this index keeps.
    pub fn new(index: Index) -> Self {
        Self { index, recorded: false }
    }

    /// The same, taking content for a repository's only where a push has put it there.
    pub fn recorded(mut self, recorded: bool) -> Self {
        self.recorded = recorded;
        self
    }

    /// Nothing where [`Self::kept`] need not be asked of what was not deleted.
    pub async fn admits(&self, repository: &Repository, digest: &Digest) -> Result<(), Failure> {
        if self.recorded { self.kept(repository, digest).await } else { Ok(()) }
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

    /// Notes a manifest that is stored, what it is about, and its tags; afterwards that is durable.
    pub async fn put_manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
        subject: Option<&Digest>,
        tags: &[Tag],
    ) -> Result<(), Failure> {
        Ok(self.index.put_manifest(repository.namespace(), digest, subject, tags).await?)
    }

    /// Notes that a blob is the repository's.
    pub async fn keep(&self, repository: &Repository, digest: &Digest) -> Result<(), Failure> {
        Ok(self.index.keep(repository.namespace(), digest).await?)
    }

    /// [`Failure::Unknown`] where a blob or a manifest was deleted from the repository.
    pub async fn kept(&self, repository: &Repository, digest: &Digest) -> Result<(), Failure> {
        Ok(self.index.kept(repository.namespace(), digest, self.recorded).await?)
    }

    /// The same for a push, which then need not bring it.
    pub async fn renew(&self, repository: &Repository, digest: &Digest) -> Result<(), Failure> {
        Ok(self.index.renew(repository.namespace(), digest, self.recorded).await?)
    }

    /// Takes a blob or a manifest from the repository; a manifest with its tags, and from the list of what is about `subject`.
    pub async fn delete(
        &self,
        repository: &Repository,
        digest: &Digest,
        subject: Option<&Digest>,
    ) -> Result<(), Failure> {
        Ok(self.index.remove(repository.namespace(), digest, subject).await?)
    }

    /// Removes a tag.
    pub async fn remove(&self, repository: &Repository, tag: &Tag) -> Result<(), Failure> {
        Ok(self.index.delete(&TagName::new(repository, tag)).await?)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::NotFound => Self::Unknown,
            Error::Unavailable(_) => Self::Unavailable(message),
            Error::Limited { after, .. } => Self::Limited { message, after },
            Error::Refused { status, .. } if status.is_server_error() => Self::Unavailable(message),
            _ => Self::Internal(message),
        }
    }
}
