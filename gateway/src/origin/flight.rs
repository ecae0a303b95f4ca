//! Work that many ask for and that is done once: whoever asks while it runs gets its result too. It goes on when those who
//! asked are gone.

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::oneshot;

/// The result to come; none where the work panicked or its runtime ended.
pub(super) type Flight<V> = Shared<BoxFuture<'static, Option<V>>>;

/// What runs, by key. Bounded by whoever starts work.
pub(super) struct Flights<K, V> {
    running: Mutex<HashMap<K, Flight<V>>>,
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self { running: Mutex::default() }
    }
}

impl<K, V> Flights<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// What runs under a key.
    pub(super) fn find(&self, key: &K) -> Option<Flight<V>> {
        self.running().get(key).cloned()
    }

    /// What runs under a key, started where nothing does. `start` must return at once: it is called under a lock.
    pub(super) fn join<F>(self: &Arc<Self>, key: K, start: impl FnOnce() -> F) -> Flight<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut running = self.running();
        if let Some(flight) = running.get(&key) {
            return flight.clone();
        }
        let (result, awaited) = oneshot::channel();
        let flight = awaited.map(Result::ok).boxed().shared();
        running.insert(key.clone(), flight.clone());
        let landing = Landing { flights: self.clone(), key };
        let work = start();
        drop(running);
        tokio::spawn(async move {
            let value = work.await;
            // Who asks from here on wants it done anew.
            drop(landing);
            // Nobody may be waiting any more.
            drop(result.send(value));
        });
        flight
    }

    fn running(&self) -> MutexGuard<'_, HashMap<K, Flight<V>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the work off the table when it ends, also by a panic.
struct Landing<K: Eq + Hash, V> {
    flights: Arc<Flights<K, V>>,
    key: K,
}

impl<K: Eq + Hash, V> Drop for Landing<K, V> {
    fn drop(&mut self) {
        self.flights.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    use tokio::sync::Semaphore;

    #[tokio::test]
    async fn those_who_ask_together_share_one_run() {
        let flights = Arc::new(Flights::<u8, u32>::default());
        let (runs, gate) = (Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
        let start = || {
            let (runs, gate) = (runs.clone(), gate.clone());
            flights.join(7, move || async move {
                gate.acquire().await.unwrap().forget();
                runs.fetch_add(1, Relaxed) + 1
            })
        };
        let (one, other) = (start(), start());
        drop(flights.find(&7).unwrap());
        assert!(flights.find(&8).is_none());
        gate.add_permits(1);
        assert_eq!((one.await, other.await), (Some(1), Some(1)));
        assert!(flights.find(&7).is_none());
        gate.add_permits(1);
        assert_eq!(start().await, Some(2), "later it is done anew");
    }

    #[tokio::test]
    async fn a_panic_ends_the_flight() {
        let flights = Arc::new(Flights::<u8, u32>::default());
        assert_eq!(flights.join(1, || async { panic!("on purpose") }).await, None);
        assert!(flights.find(&1).is_none());
    }
}
