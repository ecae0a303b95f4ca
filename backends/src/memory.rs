//! A store in memory: for tests and for trying things out. Gone with the process.

use crate::{
    Answer, Backend, Content, Error, List, Object, Page,
    backend::within,
    name::{check, check_prefix},
};
use bytes::Bytes;
use futures_util::{
    StreamExt, TryStreamExt,
    future::{FutureExt, ready},
    stream,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    num::NonZeroU64,
    ops::{Bound, Range},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Bytes a reader gets at a time.
const CHUNK_LEN: usize = 256 << 10;
/// Most bytes kept where the configuration says nothing.
const CAPACITY_DEFAULT: NonZeroU64 = NonZeroU64::new(1 << 30).expect("not zero");

/// A store in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Most bytes kept, all objects together; a write beyond fails with [`Error::NoSpace`].
    pub bytes_max: NonZeroU64,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { bytes_max: CAPACITY_DEFAULT }
    }
}

/// The store.
#[derive(Debug, Default)]
pub struct Memory {
    config: MemoryConfig,
    objects: Mutex<Objects>,
}

#[derive(Debug, Default)]
struct Objects {
    by_name: BTreeMap<String, Bytes>,
    /// Bytes of all of them.
    len: u64,
}

impl Memory {
    /// An empty store.
    pub fn new(config: MemoryConfig) -> Self {
        Self { config, objects: Mutex::default() }
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        // Nothing panics between the two halves of a change.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Result<Bytes, Error> {
        check(name)?;
        self.objects().by_name.get(name).cloned().ok_or(Error::NotFound)
    }

    fn full(&self) -> Error {
        Error::NoSpace(format!("memory store holds at most {} bytes", self.config.bytes_max).into())
    }

    async fn keep(&self, name: &str, content: Content) -> Result<(), Error> {
        check(name)?;
        let mut whole = Vec::new();
        let mut parts = content.into_stream();
        while let Some(part) = parts.try_next().await? {
            if (whole.len() + part.len()) as u64 > self.config.bytes_max.get() {
                return Err(self.full());
            }
            whole.extend_from_slice(&part);
        }
        let mut objects = self.objects();
        let old = objects.by_name.get(name).map_or(0, |old| old.len() as u64);
        let len = objects.len - old + whole.len() as u64;
        if len > self.config.bytes_max.get() {
            return Err(self.full());
        }
        objects.len = len;
        objects.by_name.insert(name.to_owned(), whole.into());
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        check(name)?;
        let mut objects = self.objects();
        let old = objects.by_name.remove(name).ok_or(Error::NotFound)?;
        objects.len -= old.len() as u64;
        Ok(())
    }

    fn page(&self, list: List<'_>) -> Result<Page, Error> {
        check_prefix(list.prefix)?;
        let from = match list.after {
            Some(after) if after >= list.prefix => Bound::Excluded(after),
            _ => Bound::Included(list.prefix),
        };
        let objects = self.objects();
        let names = objects.by_name.range::<str, _>((from, Bound::Unbounded)).map(|(name, _)| name);
        let mut names = names.take_while(|name| name.starts_with(list.prefix));
        let page = names.by_ref().take(list.limit()).cloned().collect();
        Ok(Page { names: page, more: names.next().is_some() })
    }
}

impl Backend for Memory {
    fn stat<'a>(&'a self, name: &'a str) -> Answer<'a, u64> {
        ready(self.find(name).map(|bytes| bytes.len() as u64)).boxed()
    }

    fn read<'a>(&'a self, name: &'a str, range: Option<Range<u64>>) -> Answer<'a, Object> {
        let object = self.find(name).and_then(|bytes| {
            let size = bytes.len() as u64;
            let range = within(range, size)?;
            // Both ends are within a slice that is in memory.
            let at = |offset: u64| usize::try_from(offset).unwrap_or(bytes.len());
            let mut rest = bytes.slice(at(range.start)..at(range.end));
            let parts =
                std::iter::from_fn(move || (!rest.is_empty()).then(|| Ok(rest.split_to(rest.len().min(CHUNK_LEN)))));
            Ok(Object { size, range, bytes: stream::iter(parts).boxed() })
        });
        ready(object).boxed()
    }

    fn write<'a>(&'a self, name: &'a str, content: Content) -> Answer<'a, ()> {
        self.keep(name, content).boxed()
    }

    fn list<'a>(&'a self, list: List<'a>) -> Answer<'a, Page> {
        ready(self.page(list)).boxed()
    }

    fn delete<'a>(&'a self, name: &'a str) -> Answer<'a, ()> {
        ready(self.remove(name)).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance;
    use std::sync::Arc;

    #[tokio::test]
    async fn conforms() {
        conformance::all(Arc::new(Memory::default())).await;
    }

    #[tokio::test]
    async fn full_is_said_and_harmless() {
        let store = Memory::new(MemoryConfig { bytes_max: NonZeroU64::new(10).unwrap() });
        store.write("a", "123456".into()).await.unwrap();
        assert!(matches!(store.write("b", "12345".into()).await, Err(Error::NoSpace(_))));
        assert!(matches!(store.write("a", "12345678901".into()).await, Err(Error::NoSpace(_))));
        assert_eq!(store.stat("a").await.unwrap(), 6);
        store.write("a", "1234567890".into()).await.unwrap();
        store.delete("a").await.unwrap();
        store.write("b", "1234567890".into()).await.unwrap();
    }
}
