//! Limits on what a store is asked to do: calls at once, bytes a second.

use crate::{Answer, Backend, ByteStream, Content, Error, List, Object, Page};
use futures_util::{StreamExt, future::FutureExt};
use serde::{Deserialize, Serialize};
use std::{
    num::{NonZeroU32, NonZeroU64},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep},
};

/// How far traffic may run ahead of its rate after a rest.
const BURST: Duration = Duration::from_millis(100);

/// Limits of one store. None: no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Calls under way at once, streams being read included. Further ones wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<NonZeroU32>,
    /// Bytes read a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_bytes_per_s: Option<NonZeroU64>,
    /// Bytes written a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_bytes_per_s: Option<NonZeroU64>,
}

/// A store with limits.
pub struct Limited {
    inner: Arc<dyn Backend>,
    places: Option<Arc<Semaphore>>,
    read: Option<Arc<Bucket>>,
    write: Option<Arc<Bucket>>,
}

impl Limited {
    /// Limits `inner`.
    pub fn new(inner: Arc<dyn Backend>, config: &LimitsConfig) -> Self {
        let bucket = |rate: Option<NonZeroU64>| rate.map(|rate| Arc::new(Bucket::new(rate)));
        let places = config.concurrency.map(|n| Arc::new(Semaphore::new(n.get() as usize)));
        Self { inner, places, read: bucket(config.read_bytes_per_s), write: bucket(config.write_bytes_per_s) }
    }

    async fn place(&self) -> Result<Option<OwnedSemaphorePermit>, Error> {
        match &self.places {
            None => Ok(None),
            // Never closed while we hold it.
            Some(places) => places.clone().acquire_owned().await.map(Some).map_err(|e| Error::Unavailable(e.into())),
        }
    }
}

/// The stream at the bucket's pace; `place` is given back at its end.
fn paced(bytes: ByteStream, bucket: Option<Arc<Bucket>>, place: Option<OwnedSemaphorePermit>) -> ByteStream {
    let paced = bytes.then(move |part| {
        let _held = &place;
        let wait = match (&bucket, &part) {
            (Some(bucket), Ok(part)) => bucket.take(part.len() as u64),
            _ => Duration::ZERO,
        };
        async move {
            if !wait.is_zero() {
                sleep(wait).await;
            }
            part
        }
    });
    paced.boxed()
}

impl Backend for Limited {
    fn stat<'a>(&'a self, name: &'a str) -> Answer<'a, u64> {
        async move {
            let _place = self.place().await?;
            self.inner.stat(name).await
        }
        .boxed()
    }

    fn read<'a>(&'a self, name: &'a str, range: Option<Range<u64>>) -> Answer<'a, Object> {
        async move {
            let place = self.place().await?;
            let mut object = self.inner.read(name, range).await?;
            object.bytes = paced(object.bytes, self.read.clone(), place);
            Ok(object)
        }
        .boxed()
    }

    fn write<'a>(&'a self, name: &'a str, content: Content) -> Answer<'a, ()> {
        async move {
            let _place = self.place().await?;
            let content = match (&self.write, content) {
                (Some(bucket), Content::Stream { size, bytes }) => {
                    Content::Stream { size, bytes: paced(bytes, Some(bucket.clone()), None) }
                }
                (Some(bucket), Content::Bytes(bytes)) => {
                    sleep(bucket.take(bytes.len() as u64)).await;
                    Content::Bytes(bytes)
                }
                (None, content) => content,
            };
            self.inner.write(name, content).await
        }
        .boxed()
    }

    fn list<'a>(&'a self, list: List<'a>) -> Answer<'a, Page> {
        async move {
            let _place = self.place().await?;
            self.inner.list(list).await
        }
        .boxed()
    }

    fn delete<'a>(&'a self, name: &'a str) -> Answer<'a, ()> {
        async move {
            let _place = self.place().await?;
            self.inner.delete(name).await
        }
        .boxed()
    }
}

/// A rate shared by all of a store's streams. Each part is let through whole, however large, and the next waits for it: what is
/// larger than a burst is delayed, never let off.
struct Bucket {
    bytes_per_s: NonZeroU64,
    /// When all that was let through so far is paid for.
    paid: Mutex<Instant>,
}

impl Bucket {
    fn new(bytes_per_s: NonZeroU64) -> Self {
        Self { bytes_per_s, paid: Mutex::new(Instant::now()) }
    }

    /// Counts `len` bytes and says how long to wait before they go.
    fn take(&self, len: u64) -> Duration {
        let cost = Duration::from_nanos_u128(u128::from(len) * 1_000_000_000 / u128::from(self.bytes_per_s.get()));
        let now = Instant::now();
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        *paid = (*paid).max(now) + cost;
        paid.saturating_duration_since(now).saturating_sub(BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Memory, conformance};

    fn limited(config: LimitsConfig) -> Limited {
        Limited::new(Arc::new(Memory::default()), &config)
    }

    #[tokio::test]
    async fn conforms() {
        let config = LimitsConfig { concurrency: NonZeroU32::new(4), ..LimitsConfig::default() };
        conformance::all(Arc::new(limited(config))).await;
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_keep_their_rate() {
        let rate = NonZeroU64::new(1_000_000);
        let store = limited(LimitsConfig { read_bytes_per_s: rate, write_bytes_per_s: rate, concurrency: None });
        let start = Instant::now();
        store.write("x", vec![1; 5_000_000].into()).await.unwrap();
        let wrote = start.elapsed();
        assert!((Duration::from_millis(4850)..=Duration::from_millis(5050)).contains(&wrote), "{wrote:?}");
        let start = Instant::now();
        let read = store.read("x", None).await.unwrap().collect(5_000_000).await.unwrap();
        assert_eq!(read.len(), 5_000_000);
        let took = start.elapsed();
        assert!((Duration::from_millis(4600)..=Duration::from_millis(5050)).contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_being_read_holds_its_place() {
        let store = limited(LimitsConfig { concurrency: NonZeroU32::new(1), ..LimitsConfig::default() });
        store.write("x", "abc".into()).await.unwrap();
        let reading = store.read("x", None).await.unwrap();
        let waits = tokio::time::timeout(Duration::from_secs(1), store.stat("x")).await;
        assert!(waits.is_err());
        drop(reading);
        assert_eq!(store.stat("x").await.unwrap(), 3);
    }
}
