//! Reads that many wait for and few make.
//!
//! A caller never joins a read that is already under way, for that may have seen what was there before a write which the caller
//! knows of. All who come while one is under way share the next. So there are at most two reads of a key for any number of
//! callers, and each sees every write that was acknowledged before it asked.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::oneshot;

/// Reads under way, by key.
pub(super) struct Reads<T> {
    /// Who waits for the next read of a key that is being read.
    waiting: Arc<Waiting<T>>,
}

struct Waiting<T>(Mutex<HashMap<String, Vec<oneshot::Sender<T>>>>);

impl<T> Default for Reads<T> {
    fn default() -> Self {
        Self { waiting: Arc::new(Waiting(Mutex::default())) }
    }
}

impl<T> Waiting<T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<oneshot::Sender<T>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those who wait for the next read of the key; with none it is not being read any more.
    fn next(&self, key: &str) -> Option<Vec<oneshot::Sender<T>>> {
        let mut waiting = self.lock();
        let callers = waiting.get_mut(key).map(std::mem::take).filter(|callers| !callers.is_empty());
        if callers.is_none() {
            waiting.remove(key);
        }
        callers
    }
}

impl<T: Clone + Send + 'static> Reads<T> {
    /// What a read of `key` that begins after this call answers; `read` makes it. None where the reading panicked.
    pub(super) async fn get<F, Fut>(&self, key: &str, read: F) -> Option<T>
    where
        F: Fn() -> Fut + Send + 'static,
        Fut: Future<Output = T> + Send + 'static,
    {
        let (caller, answer) = oneshot::channel();
        let first = {
            let mut waiting = self.waiting.lock();
            match waiting.get_mut(key) {
                Some(callers) => {
                    callers.push(caller);
                    None
                }
                None => {
                    waiting.insert(key.to_owned(), Vec::new());
                    Some(caller)
                }
            }
        };
        if let Some(first) = first {
            // A task of its own: others wait for it, whatever becomes of the first caller.
            let reading = Reading { waiting: self.waiting.clone(), key: key.to_owned(), done: false };
            tokio::spawn(reading.run(first, read));
        }
        answer.await.ok()
    }
}

/// A key being read.
struct Reading<T> {
    waiting: Arc<Waiting<T>>,
    key: String,
    done: bool,
}

impl<T: Clone> Reading<T> {
    async fn run<F, Fut>(mut self, first: oneshot::Sender<T>, read: F)
    where
        F: Fn() -> Fut,
        Fut: Future<Output = T>,
    {
        let mut callers = vec![first];
        loop {
            let answer = read().await;
            for caller in callers {
                // Gone meanwhile: nobody to tell.
                let _ = caller.send(answer.clone());
            }
            match self.waiting.next(&self.key) {
                Some(next) => callers = next,
                None => break,
            }
        }
        self.done = true;
    }
}

impl<T> Drop for Reading<T> {
    fn drop(&mut self) {
        if !self.done {
            // A panic, or the runtime's end: who waits is let go, and the next caller begins anew.
            self.waiting.lock().remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{FutureExt, future::join_all};
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
    use tokio::sync::Semaphore;

    #[tokio::test]
    async fn many_callers_share_the_next_read() {
        let reads = Reads::default();
        let (gate, begun) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicU64::new(0)));
        let read = {
            let (gate, begun) = (gate.clone(), begun.clone());
            move || {
                let (gate, number) = (gate.clone(), begun.fetch_add(1, SeqCst) + 1);
                async move {
                    gate.acquire().await.unwrap().forget();
                    number
                }
            }
        };
        let first = reads.get("k", read.clone());
        let mut first = std::pin::pin!(first);
        assert!(first.as_mut().now_or_never().is_none());
        while begun.load(SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let later = join_all((0..100).map(|_| reads.get("k", read.clone())));
        let mut later = std::pin::pin!(later);
        assert!(later.as_mut().now_or_never().is_none());
        gate.add_permits(2);
        assert_eq!(first.await, Some(1));
        assert_eq!(later.await, vec![Some(2); 100], "none of them joined the read under way");
        while !reads.waiting.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        gate.add_permits(1);
        assert_eq!(reads.get("k", read).await, Some(3));
    }

    #[tokio::test]
    async fn a_panic_lets_everyone_go() {
        let reads: Reads<()> = Reads::default();
        assert_eq!(reads.get("k", || async { panic!("made up") }).await, None);
        assert_eq!(reads.get("k", || async {}).await, Some(()));
    }
}
