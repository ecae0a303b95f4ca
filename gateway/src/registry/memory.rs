//! Content in memory: a whole registry without engine, origins or index, so that the protocol can be tested by itself.

use super::{
    content::{Chunk, Content, Failure, Part, Push},
    manifests::digest_of,
    name::{Repository, Tag},
    paging::{Listing, Page},
    range::Spec,
    session::Session,
};
use crate::http;
use bytes::Bytes;
use futures_util::stream;
use http_body_util::BodyExt;
use peer_proto::{Algorithm, Digest};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard},
};
use uuid::Uuid;

/// Bytes handed out at a time.
const CHUNK_LEN: usize = 64 << 10;

#[derive(Default)]
pub(crate) struct Memory {
    state: Mutex<State>,
    read_only: bool,
}

#[derive(Default)]
struct State {
    blobs: BTreeMap<Digest, Bytes>,
    /// Blobs whose bytes break off in the middle.
    broken: BTreeSet<Digest>,
    /// Blobs of which nothing can be known.
    unreachable: BTreeSet<Digest>,
    tags: BTreeMap<(String, String), Digest>,
    referrers: BTreeSet<(String, Digest, Digest)>,
    /// What was deleted, from which repository.
    deleted: BTreeSet<(String, Digest)>,
    uploads: BTreeMap<Uuid, Vec<u8>>,
    /// Blobs that were asked to be brought nearer.
    warmed: BTreeSet<Digest>,
}

impl State {
    fn is_deleted(&self, repository: &Repository, digest: &Digest) -> bool {
        self.deleted.contains(&(repository.to_string(), *digest))
    }
}

impl Memory {
    /// As an agent's content is.
    pub(crate) fn read_only() -> Self {
        Self { read_only: true, ..Self::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn break_off(&self, digest: Digest) {
        self.state().broken.insert(digest);
    }

    pub(crate) fn lose(&self, digest: Digest) {
        self.state().unreachable.insert(digest);
    }

    pub(crate) fn uploads(&self) -> usize {
        self.state().uploads.len()
    }

    pub(crate) fn warmed(&self) -> BTreeSet<Digest> {
        self.state().warmed.clone()
    }

    fn blob(&self, repository: &Repository, digest: &Digest) -> Result<Bytes, Failure> {
        let state = self.state();
        if state.unreachable.contains(digest) {
            return Err(Failure::Unavailable("store is away".into()));
        }
        let blob = state.blobs.get(digest).filter(|_| !state.is_deleted(repository, digest));
        blob.cloned().ok_or(Failure::Unknown)
    }
}

fn page<T: Clone>(
    sorted: impl IntoIterator<Item = T>,
    n: usize,
    key: impl Fn(&T) -> String,
    last: Option<&str>,
) -> Listing<T> {
    let mut items: Vec<T> =
        sorted.into_iter().filter(|item| last.is_none_or(|last| *key(item) > *last)).take(n + 1).collect();
    let more = n > 0 && items.len() > n;
    items.truncate(n);
    Listing { items, more }
}

impl Content for Memory {
    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64, Failure> {
        self.blob(repository, digest).map(|bytes| bytes.len() as u64)
    }

    async fn read(&self, repository: &Repository, digest: &Digest, range: Option<Spec>) -> Result<Part, Failure> {
        let bytes = self.blob(repository, digest)?;
        let total = bytes.len() as u64;
        let range = match range {
            None => 0..total,
            Some(spec) => spec.resolve(total).ok_or(Failure::Range(total))?,
        };
        let slice = bytes.slice(range.start as usize..range.end as usize);
        let mut chunks: Vec<_> = slice.chunks(CHUNK_LEN).map(|chunk| Ok(slice.slice_ref(chunk))).collect();
        if self.state().broken.contains(digest) {
            chunks.truncate(chunks.len() / 2);
            chunks.push(Err("disk failed"));
        }
        Ok(Part { total, range, bytes: http::stream(stream::iter(chunks)) })
    }

    async fn resolve(&self, repository: &Repository, tag: &Tag) -> Result<Digest, Failure> {
        let key = (repository.to_string(), tag.to_string());
        self.state().tags.get(&key).copied().ok_or(Failure::Unknown)
    }

    async fn tags(&self, repository: &Repository, asked: &Page) -> Result<Listing, Failure> {
        let state = self.state();
        let own = |(key, _): (&(String, String), _)| (key.0 == repository.as_str()).then(|| key.1.clone());
        let tags: Vec<String> = state.tags.iter().filter_map(own).collect();
        if tags.is_empty() {
            return Err(Failure::Unknown);
        }
        Ok(page(tags, asked.n, String::clone, asked.last.as_deref()))
    }

    async fn repositories(&self, asked: &Page) -> Result<Listing, Failure> {
        let names: BTreeSet<String> = self.state().tags.keys().map(|key| key.0.clone()).collect();
        Ok(page(names, asked.n, String::clone, asked.last.as_deref()))
    }

    async fn referrers(
        &self,
        repository: &Repository,
        subject: &Digest,
        asked: &Page,
    ) -> Result<Listing<Digest>, Failure> {
        let state = self.state();
        let own = |(name, about, referrer): &(String, Digest, Digest)| {
            (name == repository.as_str() && about == subject).then_some(*referrer)
        };
        let referrers: Vec<Digest> = state.referrers.iter().filter_map(own).collect();
        Ok(page(referrers, asked.n, Digest::to_string, asked.last.as_deref()))
    }

    async fn warm(&self, repository: &Repository, digest: &Digest) -> Result<(), Failure> {
        self.blob(repository, digest)?;
        self.state().warmed.insert(*digest);
        Ok(())
    }

    fn is_writable(&self) -> bool {
        !self.read_only
    }

    async fn open(&self, _: &Repository, _: Algorithm) -> Result<Session, Failure> {
        let id = Uuid::new_v4();
        self.state().uploads.insert(id, Vec::new());
        Ok(Session { id, place: "memory:1".into() })
    }

    async fn received(&self, _: &Repository, session: &Session) -> Result<u64, Failure> {
        self.state().uploads.get(&session.id).map(|bytes| bytes.len() as u64).ok_or(Failure::UploadUnknown)
    }

    async fn append(&self, repository: &Repository, session: &Session, chunk: Chunk) -> Result<u64, Failure> {
        let expected = self.received(repository, session).await?;
        if chunk.at.is_some_and(|at| at != expected) {
            return Err(Failure::Offset { expected });
        }
        let bytes = chunk.bytes.collect().await.map_err(|_| Failure::Body)?.to_bytes();
        if chunk.length.is_some_and(|length| length != bytes.len() as u64) {
            return Err(Failure::Body);
        }
        let mut state = self.state();
        let upload = state.uploads.get_mut(&session.id).ok_or(Failure::UploadUnknown)?;
        upload.extend_from_slice(&bytes);
        Ok(upload.len() as u64)
    }

    async fn commit(&self, repository: &Repository, session: &Session, digest: &Digest) -> Result<(), Failure> {
        let mut state = self.state();
        let bytes = state.uploads.remove(&session.id).ok_or(Failure::UploadUnknown)?;
        let actual = digest_of(digest.algorithm(), &bytes);
        if actual != *digest {
            return Err(Failure::Mismatch(format!("content has digest {actual}, expected {digest}")));
        }
        state.blobs.insert(*digest, bytes.into());
        state.deleted.remove(&(repository.to_string(), *digest));
        Ok(())
    }

    async fn cancel(&self, _: &Repository, session: &Session) -> Result<(), Failure> {
        self.state().uploads.remove(&session.id).map(drop).ok_or(Failure::UploadUnknown)
    }

    async fn mount(
        &self,
        repository: &Repository,
        digest: &Digest,
        from: Option<&Repository>,
    ) -> Result<bool, Failure> {
        let mut state = self.state();
        if !state.blobs.contains_key(digest) || from.is_some_and(|from| state.is_deleted(from, digest)) {
            return Ok(false);
        }
        state.deleted.remove(&(repository.to_string(), *digest));
        Ok(true)
    }

    async fn put_manifest(&self, repository: &Repository, push: Push<'_>) -> Result<(), Failure> {
        let mut state = self.state();
        state.blobs.insert(*push.digest, push.bytes);
        state.deleted.remove(&(repository.to_string(), *push.digest));
        state.referrers.extend(push.subject.map(|subject| (repository.to_string(), *subject, *push.digest)));
        state.tags.extend(push.tags.iter().map(|tag| ((repository.to_string(), tag.to_string()), *push.digest)));
        Ok(())
    }

    async fn untag(&self, repository: &Repository, tag: &Tag) -> Result<(), Failure> {
        let key = (repository.to_string(), tag.to_string());
        self.state().tags.remove(&key).map(drop).ok_or(Failure::Unknown)
    }

    async fn delete(&self, repository: &Repository, digest: &Digest, subject: Option<&Digest>) -> Result<(), Failure> {
        let mut state = self.state();
        state.tags.retain(|key, stands_for| key.0 != repository.as_str() || stands_for != digest);
        if let Some(subject) = subject {
            state.referrers.remove(&(repository.to_string(), *subject, *digest));
        }
        state.deleted.insert((repository.to_string(), *digest));
        Ok(())
    }
}
