//! Answers of the origins, passed on: asked for once however many want them, and kept for a while.

use crate::{client::origin, http};
use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use hyper::StatusCode;
use peer_proto::{Digest, Namespace};
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long an answer is passed on again. It is of content under its digest; only that the blob exists may change.
const FOUND_TTL: Duration = Duration::from_secs(300);
/// The same for a 404: a push may be under way.
const UNKNOWN_TTL: Duration = Duration::from_secs(1);
/// Most bytes kept.
const BYTES_MAX: usize = 128 << 20;
/// Most answers kept and questions under way.
const ENTRIES_MAX: usize = 64 << 10;

type Key = (Namespace, Digest);
type Answer = Result<Bytes, origin::Error>;
type Ask = Box<dyn Fn(Namespace, Digest) -> BoxFuture<'static, Answer> + Send + Sync>;

/// Questions to the origins about blobs, all of one kind.
pub(super) struct Relay {
    ask: Ask,
    memory: Mutex<Memory>,
    asked: Counter,
    remembered: Counter,
}

#[derive(Default)]
struct Memory {
    entries: HashMap<Key, Entry>,
    /// Keys of kept answers, the oldest first; may name entries that are gone.
    order: VecDeque<Key>,
    bytes: usize,
}

enum Entry {
    Asked(Shared<BoxFuture<'static, Answer>>),
    Kept { until: Instant, answer: Answer },
}

impl Entry {
    fn bytes(&self) -> usize {
        match self {
            Self::Kept { answer: Ok(bytes), .. } => bytes.len(),
            _ => 0,
        }
    }
}

impl Memory {
    fn put(&mut self, key: Key, entry: Entry) {
        self.bytes += entry.bytes();
        if let Some(before) = self.entries.insert(key.clone(), entry) {
            self.bytes -= before.bytes();
        }
        self.order.push_back(key);
        while self.bytes > BYTES_MAX || self.order.len() > ENTRIES_MAX {
            let Some(oldest) = self.order.pop_front() else { return };
            self.remove(&oldest);
        }
    }

    fn remove(&mut self, key: &Key) {
        if let Some(gone) = self.entries.remove(key) {
            self.bytes -= gone.bytes();
        }
    }
}

impl Relay {
    pub(super) fn new<F>(ask: impl Fn(Namespace, Digest) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        Self {
            ask: Box::new(move |namespace, digest| ask(namespace, digest).boxed()),
            memory: Mutex::default(),
            asked: Counter::default(),
            remembered: Counter::default(),
        }
    }

    pub(super) fn register(&self, registry: &mut Registry, what: &str) {
        registry.register(format!("tracker_{what}_asked"), "Questions passed on to origins", self.asked.clone());
        let help = "Questions answered from memory, or together with another";
        registry.register(format!("tracker_{what}_remembered"), help, self.remembered.clone());
    }

    /// The origins' answer.
    pub(super) async fn get(&self, namespace: Namespace, digest: Digest) -> Result<Bytes, http::Error> {
        let key = (namespace, digest);
        let asked = {
            let mut memory = self.memory();
            match memory.entries.get(&key) {
                Some(Entry::Kept { until, answer }) if Instant::now() < *until => {
                    self.remembered.inc();
                    return answer.clone().map_err(relayed);
                }
                Some(Entry::Asked(asked)) => {
                    self.remembered.inc();
                    asked.clone()
                }
                _ => {
                    self.asked.inc();
                    let asked = (self.ask)(key.0.clone(), key.1).shared();
                    memory.put(key.clone(), Entry::Asked(asked.clone()));
                    asked
                }
            }
        };
        let answer = asked.clone().await;
        let mut memory = self.memory();
        // Whoever is first among those who waited for the same writes down what came of it.
        if let Some(Entry::Asked(current)) = memory.entries.get(&key)
            && current.ptr_eq(&asked)
        {
            let ttl = match &answer {
                Ok(_) => Some(FOUND_TTL),
                Err(origin::Error::NotFound) => Some(UNKNOWN_TTL),
                Err(_) => None,
            };
            match ttl {
                Some(ttl) => {
                    let until = Instant::now() + ttl;
                    memory.put(key, Entry::Kept { until, answer: answer.clone() });
                }
                None => memory.remove(&key),
            }
        }
        answer.map_err(relayed)
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An origin's refusal as our own.
fn relayed(error: origin::Error) -> http::Error {
    match error.status() {
        // A text would be taken for an answer.
        StatusCode::ACCEPTED => http::Error::new(StatusCode::ACCEPTED, ""),
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    };
    use tokio::sync::Semaphore;

    fn key(n: u8) -> Key {
        ("ns".parse().unwrap(), Digest::sha256([n; 32]))
    }

    #[tokio::test]
    async fn many_ask_and_the_origins_are_asked_once() {
        let (calls, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let relay = Arc::new(Relay::new({
            let (calls, gate) = (calls.clone(), gate.clone());
            move |_, digest: Digest| {
                let (calls, gate) = (calls.clone(), gate.clone());
                async move {
                    calls.fetch_add(1, SeqCst);
                    let _passed = gate.acquire().await;
                    match digest.as_bytes()[0] {
                        0 => Ok(Bytes::from_static(b"layout")),
                        1 => Err(origin::Error::NotFound),
                        _ => Err(origin::Error::Pending),
                    }
                }
            }
        }));
        let get = |n| {
            let relay = relay.clone();
            async move {
                let (namespace, digest) = key(n);
                relay.get(namespace, digest).await.map_err(|error| error.status.as_u16())
            }
        };
        let asking: Vec<_> = (0..30u8).map(|i| tokio::spawn(get(i % 3))).collect();
        while calls.load(SeqCst) < 3 {
            tokio::task::yield_now().await;
        }
        gate.add_permits(1);
        let expected = [Ok(Bytes::from_static(b"layout")), Err(404), Err(202)];
        for (i, asked) in asking.into_iter().enumerate() {
            assert_eq!(asked.await.unwrap(), expected[i % 3]);
        }
        let first = calls.load(SeqCst);
        assert_eq!((get(0).await, calls.load(SeqCst)), (expected[0].clone(), first), "an answer is kept");
        assert_eq!((get(2).await, calls.load(SeqCst)), (expected[2].clone(), first + 1), "a blob under way is not");
    }

    #[test]
    fn memory_is_bounded() {
        let mut memory = Memory::default();
        let big = Bytes::from(vec![0; 1 << 20]);
        for n in 0..200 {
            let until = Instant::now() + FOUND_TTL;
            memory.put(key(n), Entry::Kept { until, answer: Ok(big.clone()) });
            memory.put(key(n), Entry::Kept { until, answer: Ok(big.clone()) });
        }
        assert_eq!((memory.bytes, memory.entries.len()), (BYTES_MAX, 128));
        assert!(memory.entries.contains_key(&key(199)));
    }
}
