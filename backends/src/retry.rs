//! Retries of what may succeed later, with growing, jittered pauses.

use crate::{Answer, Backend, ByteStream, Content, Error, List, Object, Page, random::Random};
use futures_util::{StreamExt, TryStreamExt, future::FutureExt, stream};
use serde::{Deserialize, Serialize};
use std::{
    future::Future,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::sleep;

/// How often and when to try again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetriesConfig {
    /// Tries of one call, the first included; 1 or 0: no retries.
    pub tries: u32,
    /// The pause before the first retry, milliseconds; each further one doubles.
    pub pause_ms: u64,
    /// The longest pause, milliseconds.
    pub pause_ms_max: u64,
}

impl Default for RetriesConfig {
    fn default() -> Self {
        Self { tries: 3, pause_ms: 100, pause_ms_max: 5000 }
    }
}

impl RetriesConfig {
    /// The pause after `failures` failed tries: between a half and the whole of the doubled one, by `random`.
    fn pause(&self, failures: u32, random: u64) -> Duration {
        let doubled = self.pause_ms.saturating_mul(1 << failures.saturating_sub(1).min(32));
        let whole = doubled.min(self.pause_ms_max);
        Duration::from_millis(whole - random % (whole / 2 + 1))
    }
}

/// A store whose [retryable](Error::is_retryable) failures are tried again. A read that breaks off goes on where it broke. A
/// write of [`Content::Bytes`] is sent again; a stream is not: who wants that writes anew.
pub struct Retrying {
    shared: Arc<Shared>,
}

struct Shared {
    inner: Arc<dyn Backend>,
    config: RetriesConfig,
    random: Mutex<Random>,
}

impl Retrying {
    /// Retries the calls of `inner`.
    pub fn new(inner: Arc<dyn Backend>, config: RetriesConfig) -> Self {
        Self { shared: Arc::new(Shared { inner, config, random: Mutex::new(Random::unseeded()) }) }
    }
}

impl Shared {
    /// After the `failures`-th failure: waits, or gives the error back.
    async fn again(&self, failures: u32, error: Error) -> Result<(), Error> {
        if !error.is_retryable() || failures >= self.config.tries {
            return Err(error);
        }
        let random = self.random.lock().unwrap_or_else(PoisonError::into_inner).next();
        sleep(self.config.pause(failures, random)).await;
        Ok(())
    }

    async fn retried<T, F: Future<Output = Result<T, Error>>>(&self, mut call: impl FnMut() -> F) -> Result<T, Error> {
        let mut failures = 0;
        loop {
            match call().await {
                Ok(done) => return Ok(done),
                Err(error) => {
                    failures += 1;
                    self.again(failures, error).await?;
                }
            }
        }
    }
}

/// A read that goes on where it broke off.
struct Reading {
    shared: Arc<Shared>,
    name: String,
    size: u64,
    /// What is still to come.
    left: Range<u64>,
    bytes: ByteStream,
    /// Failures since the last byte.
    failures: u32,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<bytes::Bytes>, Error> {
        loop {
            match self.bytes.try_next().await {
                Ok(Some(part)) => {
                    self.left.start += part.len() as u64;
                    self.failures = 0;
                    return Ok(Some(part));
                }
                Ok(None) => return Ok(None),
                Err(error) => self.reopen(error).await?,
            }
        }
    }

    async fn reopen(&mut self, mut error: Error) -> Result<(), Error> {
        loop {
            self.failures += 1;
            self.shared.again(self.failures, error).await?;
            match self.shared.inner.read(&self.name, Some(self.left.clone())).await {
                Ok(object) if object.size == self.size => {
                    self.bytes = object.bytes;
                    return Ok(());
                }
                // The rest of another object is not the rest of this one.
                Ok(_) => return Err(Error::Failed("object was replaced while it was read".into())),
                Err(next) => error = next,
            }
        }
    }
}

impl Backend for Retrying {
    fn stat<'a>(&'a self, name: &'a str) -> Answer<'a, u64> {
        self.shared.retried(move || self.shared.inner.stat(name)).boxed()
    }

    fn read<'a>(&'a self, name: &'a str, range: Option<Range<u64>>) -> Answer<'a, Object> {
        async move {
            let shared = self.shared.clone();
            let Object { size, range, bytes } = shared.retried(|| shared.inner.read(name, range.clone())).await?;
            let reading = Reading {
                shared: shared.clone(),
                name: name.to_owned(),
                size,
                left: range.clone(),
                bytes,
                failures: 0,
            };
            let bytes = stream::try_unfold(reading, |mut reading| async move {
                Ok(reading.next().await?.map(|part| (part, reading)))
            });
            Ok(Object { size, range, bytes: bytes.boxed() })
        }
        .boxed()
    }

    fn write<'a>(&'a self, name: &'a str, content: Content) -> Answer<'a, ()> {
        match content {
            Content::Bytes(bytes) => {
                self.shared.retried(move || self.shared.inner.write(name, Content::Bytes(bytes.clone()))).boxed()
            }
            content => self.shared.inner.write(name, content),
        }
    }

    fn list<'a>(&'a self, list: List<'a>) -> Answer<'a, Page> {
        self.shared.retried(move || self.shared.inner.list(list)).boxed()
    }

    fn delete<'a>(&'a self, name: &'a str) -> Answer<'a, ()> {
        async move {
            let mut failures = 0;
            loop {
                match self.shared.inner.delete(name).await {
                    // The try that failed may have removed it.
                    Err(Error::NotFound) if failures > 0 => return Ok(()),
                    Err(error) => {
                        failures += 1;
                        self.shared.again(failures, error).await?;
                    }
                    Ok(()) => return Ok(()),
                }
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FaultConfig, Faulty, Memory, conformance};
    use tokio::time::Instant;

    fn patient() -> RetriesConfig {
        RetriesConfig { tries: 30, pause_ms: 10, pause_ms_max: 1000 }
    }

    #[test]
    fn pauses_grow_to_their_bound() {
        let config = RetriesConfig { tries: 9, pause_ms: 100, pause_ms_max: 1000 };
        let pauses = |random| [1, 2, 3, 4, 5, 40, u32::MAX].map(|n| config.pause(n, random).as_millis());
        assert_eq!(pauses(0), [100, 200, 400, 800, 1000, 1000, 1000]);
        for random in 0..2000 {
            let pause = config.pause(3, random).as_millis();
            assert!((200..=400).contains(&pause), "{pause}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn conforms_over_a_store_that_fails() {
        for seed in 0..8 {
            println!("seed {seed}");
            let faults = FaultConfig { seed, call_per_mille: 200, chunk_per_mille: 200 };
            let faulty = Faulty::new(Arc::new(Memory::default()), faults);
            conformance::replayable(Arc::new(Retrying::new(Arc::new(faulty), patient()))).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_waited_for_or_told() {
        let faulty = Arc::new(Faulty::new(Arc::new(Memory::default()), FaultConfig::default()));
        let store = Retrying::new(faulty.clone(), RetriesConfig { tries: 3, pause_ms: 100, pause_ms_max: 5000 });
        faulty.set_down(true);
        let start = Instant::now();
        assert!(matches!(store.stat("x").await, Err(Error::Unavailable(_))));
        assert!(start.elapsed() <= Duration::from_millis(300), "{:?}", start.elapsed());
        let back = async {
            sleep(Duration::from_millis(40)).await;
            faulty.set_down(false);
        };
        let (written, ()) = tokio::join!(store.write("x", "1".into()), back);
        written.unwrap();
        assert!(matches!(store.stat("y").await, Err(Error::NotFound)), "not retried");
    }

    #[tokio::test(start_paused = true)]
    async fn a_replaced_object_is_not_spliced() {
        let memory = Arc::new(Memory::default());
        memory.write("x", vec![1; 1 << 20].into()).await.unwrap();
        let faulty = Arc::new(Faulty::new(memory.clone(), FaultConfig::default()));
        let store = Retrying::new(faulty.clone(), patient());
        let mut object = store.read("x", None).await.unwrap();
        object.bytes.try_next().await.unwrap().unwrap();
        memory.write("x", vec![2; 1 << 19].into()).await.unwrap();
        faulty.set_down(true);
        let back = async {
            sleep(Duration::from_millis(1)).await;
            faulty.set_down(false);
        };
        let (next, ()) = tokio::join!(object.bytes.try_next(), back);
        assert!(matches!(next, Err(Error::Failed(_) | Error::Range { .. })), "{next:?}");
    }
}
