//! Which content is a repository's: what was pushed to it, and what was deleted from it.
//!
//! ```text
//! docker/registry/v2/repositories/<repo>/_content/<alg>/<hex>/link                 "kept <time>" or "deleted <time>"
//! docker/registry/v2/repositories/<repo>/_manifests/revisions/<alg>/<hex>/link     the digest of a manifest put and not deleted
//! ```
//!
//! The time is when that was last said, in milliseconds since 1970. Content without a record may be a repository's all the same: it was
//! put into the backend by others, or before there were records. So only what was deleted is certain not to be there.

use super::{
    guard::now,
    name::TagName,
    store::{Error, Store, bounded, read_link},
};
use crate::registry::Tag;
use backends::{Backend, List, Naming};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use peer_proto::{Digest, Namespace};
use std::time::Duration;

/// Where a repository's records are, below it.
pub(super) const CONTENT: &str = "/_content/";
/// Where its manifests are noted.
pub(super) const REVISIONS: &str = "/_manifests/revisions/";
/// Longest record, bytes.
const RECORD_LEN_MAX: usize = 64;
/// Tags read at once to see which stand for a manifest that is to go.
const READ_AT_ONCE: usize = 16;

/// What is known of some content in one repository.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Record {
    pub(super) state: State,
    /// When that was last said, since 1970.
    pub(super) at: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    Kept,
    Deleted,
}

impl Record {
    pub(super) fn now(state: State) -> Self {
        Self { state, at: now() }
    }

    fn encode(self) -> Bytes {
        let state = match self.state {
            State::Kept => "kept",
            State::Deleted => "deleted",
        };
        format!("{state} {}", self.at.as_millis()).into()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (state, at) = std::str::from_utf8(bytes).ok()?.trim().split_once(' ')?;
        let state = match state {
            "kept" => State::Kept,
            "deleted" => State::Deleted,
            _ => return None,
        };
        Some(Self { state, at: Duration::from_millis(at.parse().ok()?) })
    }
}

/// A manifest that was stored, and what it is to be known by.
pub(super) struct Revision<'a> {
    pub(super) digest: &'a Digest,
    pub(super) subject: Option<&'a Digest>,
    pub(super) tags: &'a [Tag],
}

impl Store {
    /// What is known of content in a repository.
    pub(super) async fn record(&self, repository: &Namespace, digest: &Digest) -> Result<Option<Record>, Error> {
        let paths = self.route(repository.as_str())?.paths();
        read_record(&**paths, &record_path(repository, digest)).await
    }

    /// Notes that content is the repository's, also where it was deleted before.
    pub(super) async fn keep(&self, repository: &Namespace, digest: &Digest) -> Result<(), Error> {
        self.note(repository, digest, State::Kept).await
    }

    async fn note(&self, repository: &Namespace, digest: &Digest, state: State) -> Result<(), Error> {
        let paths = self.route(repository.as_str())?.paths();
        Ok(paths.write(&record_path(repository, digest), Record::now(state).encode().into()).await?)
    }

    /// Notes a manifest, what it is about, and its tags, in this order: what a tag stands for is always known.
    pub(super) async fn put_manifest(&self, repository: &Namespace, revision: Revision<'_>) -> Result<(), Error> {
        let _changing = self.changing(repository).await;
        let paths = self.route(repository.as_str())?.paths();
        let digest = revision.digest;
        let link = || Bytes::from(digest.to_string()).into();
        paths.write(&revision_path(repository, digest), link()).await?;
        self.keep(repository, digest).await?;
        if let Some(subject) = revision.subject {
            self.refer(repository, subject, digest).await?;
        }
        for tag in revision.tags {
            self.write_tag(&TagName::of(repository, tag), digest).await?;
        }
        Ok(())
    }

    /// Takes content from a repository: the tags that stand for it, the note of what it is about, then itself. Whoever asks again
    /// after a failure finds what is left to be done.
    pub(super) async fn remove(
        &self,
        repository: &Namespace,
        digest: &Digest,
        subject: Option<&Digest>,
    ) -> Result<(), Error> {
        let _changing = self.changing(repository).await;
        if self.record(repository, digest).await?.is_some_and(|record| record.state == State::Deleted) {
            return Err(Error::NotFound);
        }
        let paths = self.route(repository.as_str())?.paths();
        let revision = revision_path(repository, digest);
        for tag in self.tags_of(repository, digest).await? {
            absent_is_fine(self.remove_tag(&tag).await)?;
        }
        if let Some(subject) = subject {
            absent_is_fine(self.unrefer(repository, subject, digest).await)?;
        }
        absent_is_fine(paths.delete(&revision).await.map_err(Error::from))?;
        self.note(repository, digest, State::Deleted).await
    }

    /// Removes the record of content that is nowhere any more.
    pub(super) async fn forget(&self, repository: &Namespace, digest: &Digest) -> Result<(), Error> {
        let paths = self.route(repository.as_str())?.paths();
        absent_is_fine(paths.delete(&record_path(repository, digest)).await.map_err(Error::from))
    }

    /// The tags of a repository that stand for `digest`.
    async fn tags_of(&self, repository: &Namespace, digest: &Digest) -> Result<Vec<TagName>, Error> {
        let route = self.route(repository.as_str())?;
        let names = self.tag_names(repository).await?;
        let read = stream::iter(names).map(async |name| match read_link(&**route.store(), &name.to_string()).await {
            Ok(stands_for) => Ok((stands_for == *digest).then_some(name)),
            Err(Error::NotFound) => Ok(None),
            Err(error) => Err(error),
        });
        read.buffer_unordered(READ_AT_ONCE).try_filter_map(async |name| Ok(name)).try_collect().await
    }

    /// All tags of a repository, in the tree's order.
    pub(super) async fn tag_names(&self, repository: &Namespace) -> Result<Vec<TagName>, Error> {
        let paths = self.route(repository.as_str())?.paths();
        let prefix = Naming::tags_of(repository.as_str());
        let mut tags = Vec::new();
        let mut after: Option<String> = None;
        loop {
            let page = paths.list(List { prefix: &prefix, after: after.as_deref(), limit: 0 }).await?;
            let names = page.names.iter().filter_map(|path| Naming::DockerTag.name(path));
            tags.extend(names.filter_map(|name| name.parse::<TagName>().ok()));
            bounded(tags.len())?;
            after = page.names.last().cloned();
            if !page.more {
                return Ok(tags);
            }
        }
    }
}

async fn read_record(paths: &dyn Backend, path: &str) -> Result<Option<Record>, Error> {
    let read = async { paths.read(path, None).await?.collect(RECORD_LEN_MAX).await };
    match read.await {
        Ok(bytes) => {
            let record = Record::decode(&bytes);
            record.map(Some).ok_or_else(|| Error::Failed(format!("what is kept as {path} is no record")))
        }
        Err(backends::Error::NotFound) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn absent_is_fine(done: Result<(), Error>) -> Result<(), Error> {
    match done {
        Err(Error::NotFound) => Ok(()),
        done => done,
    }
}

fn record_path(repository: &Namespace, digest: &Digest) -> String {
    below(repository, CONTENT, digest)
}

fn revision_path(repository: &Namespace, digest: &Digest) -> String {
    below(repository, REVISIONS, digest)
}

fn below(repository: &Namespace, part: &str, digest: &Digest) -> String {
    format!("{}{repository}{part}{}/{}/link", Naming::DockerTag.base(), digest.algorithm().name(), digest.hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_text() {
        let record = |state, at| Record { state, at: Duration::from_millis(at) };
        for (text, expected) in [
            ("kept 12", Some(record(State::Kept, 12))),
            ("deleted 0", Some(record(State::Deleted, 0))),
            ("kept 12\n", Some(record(State::Kept, 12))),
            ("", None),
            ("kept", None),
            ("kept x", None),
            ("lost 1", None),
        ] {
            assert_eq!(Record::decode(text.as_bytes()), expected, "{text:?}");
        }
        let now = Record::now(State::Deleted);
        let millis = u64::try_from(now.at.as_millis()).unwrap();
        assert_eq!(Record::decode(&now.encode()), Some(record(State::Deleted, millis)));
    }
}
