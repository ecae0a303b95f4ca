//! Injected faults, drawn from a seed: for tests of what must live with a failing store.

use crate::{Answer, Backend, ByteStream, Content, Error, List, Object, Page, random::Random};
use futures_util::{StreamExt, future::FutureExt, stream};
use std::{
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// Which faults, how often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultConfig {
    /// Where the draws start.
    pub seed: u64,
    /// Calls in a thousand that fail as unavailable.
    pub call_per_mille: u32,
    /// Parts of streams in a thousand before which the stream breaks off.
    pub chunk_per_mille: u32,
}

/// A store that fails as told.
pub struct Faulty {
    inner: Arc<dyn Backend>,
    faults: Arc<Faults>,
}

struct Faults {
    config: FaultConfig,
    random: Mutex<Random>,
    down: AtomicBool,
    refused: AtomicU64,
}

impl Faulty {
    /// Adds faults to `inner`.
    pub fn new(inner: Arc<dyn Backend>, config: FaultConfig) -> Self {
        let faults = Faults {
            config,
            random: Mutex::new(Random::new(config.seed)),
            down: AtomicBool::new(false),
            refused: AtomicU64::new(0),
        };
        Self { inner, faults: Arc::new(faults) }
    }

    /// While down, every call fails and every stream breaks off.
    pub fn set_down(&self, down: bool) {
        self.faults.down.store(down, Ordering::SeqCst);
    }

    /// Calls and streams that failed because the store was down.
    pub fn refused(&self) -> u64 {
        self.faults.refused.load(Ordering::SeqCst)
    }
}

impl Faults {
    fn draw(&self, per_mille: u32) -> Result<(), Error> {
        if self.down.load(Ordering::SeqCst) {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Err(Error::Unavailable("injected outage".into()));
        }
        if self.random.lock().unwrap_or_else(PoisonError::into_inner).chance(per_mille) {
            return Err(Error::Unavailable("injected fault".into()));
        }
        Ok(())
    }

    fn call(&self) -> Result<(), Error> {
        self.draw(self.config.call_per_mille)
    }

    /// The stream, breaking off by chance.
    fn chunks(self: &Arc<Self>, bytes: ByteStream) -> ByteStream {
        let faults = self.clone();
        let broken = stream::try_unfold((bytes, faults), |(mut bytes, faults)| async move {
            let Some(part) = bytes.next().await else { return Ok(None) };
            faults.draw(faults.config.chunk_per_mille)?;
            Ok(Some((part?, (bytes, faults))))
        });
        broken.boxed()
    }
}

impl Backend for Faulty {
    fn stat<'a>(&'a self, name: &'a str) -> Answer<'a, u64> {
        async move {
            self.faults.call()?;
            self.inner.stat(name).await
        }
        .boxed()
    }

    fn read<'a>(&'a self, name: &'a str, range: Option<Range<u64>>) -> Answer<'a, Object> {
        async move {
            self.faults.call()?;
            let mut object = self.inner.read(name, range).await?;
            object.bytes = self.faults.chunks(object.bytes);
            Ok(object)
        }
        .boxed()
    }

    fn write<'a>(&'a self, name: &'a str, content: Content) -> Answer<'a, ()> {
        async move {
            self.faults.call()?;
            let size = content.size();
            let bytes = self.faults.chunks(content.into_stream());
            self.inner.write(name, Content::Stream { size, bytes }).await?;
            // Done, and the answer lost.
            self.faults.call()
        }
        .boxed()
    }

    fn list<'a>(&'a self, list: List<'a>) -> Answer<'a, Page> {
        async move {
            self.faults.call()?;
            self.inner.list(list).await
        }
        .boxed()
    }

    fn delete<'a>(&'a self, name: &'a str) -> Answer<'a, ()> {
        async move {
            self.faults.call()?;
            self.inner.delete(name).await?;
            self.faults.call()
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;

    #[tokio::test]
    async fn faults_repeat_with_their_seed() {
        let run = |seed| async move {
            let config = FaultConfig { seed, call_per_mille: 300, chunk_per_mille: 0 };
            let store = Faulty::new(Arc::new(Memory::default()), config);
            let mut failed = Vec::new();
            for _ in 0..100 {
                failed.push(store.stat("x").await.is_err_and(|error| error.is_retryable()));
            }
            failed
        };
        let first = run(7).await;
        assert_eq!(first, run(7).await);
        assert_ne!(first, run(8).await);
        assert!((15..45).contains(&first.iter().filter(|failed| **failed).count()));
    }
}
