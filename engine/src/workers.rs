//! The threads that hash and wait for the disk, and the bounded queue in front of them.

use crate::{
    handle::{self, Metric},
    job::{Job, Outcome},
    store::Store,
};
use std::{
    collections::VecDeque,
    fmt, io,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};
use tokio::sync::oneshot;

/// Jobs that wait at once. Those with a piece are bounded by the buffer pool before that.
pub const QUEUE_MAX: usize = 4096;

/// Where outcomes go to that nobody awaits: a shard's inbox. Called on a worker thread, so it must not block.
pub trait Sink: Send + Sync {
    /// The job submitted with `token` is done.
    fn done(&self, token: u64, outcome: Outcome);
}

/// Where a job's outcome goes.
pub enum Reply {
    /// To whoever awaits it.
    Oneshot(oneshot::Sender<Outcome>),
    /// To a shard.
    Sink {
        /// Its inbox.
        sink: Arc<dyn Sink>,
        /// What the shard knows the job by.
        token: u64,
    },
}

/// A job and where its outcome goes.
pub struct Work {
    /// What to do.
    pub job: Job,
    /// Who wants to know.
    pub reply: Reply,
}

/// Worker threads. Dropping the last owner lets the queue run dry and ends them.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    store: Arc<Store>,
    queue: Mutex<Queue>,
    ready: Condvar,
    done: AtomicU64,
    refused: AtomicU64,
    panicked: AtomicU64,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    closed: bool,
}

enum Task {
    Work(Work),
    Call(Box<dyn FnOnce(&Store) + Send>),
}

/// Work that was not taken.
pub struct Refused {
    /// The work, to be tried again.
    pub work: Work,
    /// Whether it will never be: the workers are stopping.
    pub closed: bool,
}

impl Workers {
    /// Starts `count` threads.
    pub fn start(count: NonZeroUsize, store: Arc<Store>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            store,
            queue: Mutex::default(),
            ready: Condvar::new(),
            done: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            panicked: AtomicU64::new(0),
        });
        let workers = Self { shared, threads: Mutex::default() };
        for i in 0..count.get() {
            let shared = Arc::clone(&workers.shared);
            let thread = thread::Builder::new().name(format!("shoal-work-{i}")).spawn(move || shared.run())?;
            workers.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(workers)
    }

    /// Queues a job; gives it back where the queue is full.
    pub fn submit(&self, work: Work) -> Result<(), Box<Refused>> {
        let mut queue = self.shared.queue();
        let closed = queue.closed;
        if closed || queue.tasks.len() >= QUEUE_MAX {
            drop(queue);
            self.shared.refused.fetch_add(1, Relaxed);
            return Err(Box::new(Refused { work, closed }));
        }
        queue.tasks.push_back(Task::Work(work));
        self.shared.ready.notify_one();
        Ok(())
    }

    /// Runs something on a worker and awaits its result. It runs to its end whether or not that is still awaited.
    pub async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Result<T, handle::Error> {
        self.start_call(call)?.await.map_err(|_| handle::Error::Closed)
    }

    /// Queues something to run on a worker; its result can be awaited later.
    pub(crate) fn start_call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Result<oneshot::Receiver<T>, handle::Error> {
        let (sender, result) = oneshot::channel();
        let call = Box::new(move |store: &Store| {
            // Nobody may be waiting any more.
            drop(sender.send(call(store)));
        });
        let mut queue = self.shared.queue();
        if queue.closed {
            return Err(handle::Error::Closed);
        }
        if queue.tasks.len() >= QUEUE_MAX {
            self.shared.refused.fetch_add(1, Relaxed);
            return Err(handle::Error::Busy("worker queue"));
        }
        queue.tasks.push_back(Task::Call(call));
        self.shared.ready.notify_one();
        Ok(result)
    }

    /// Queues something beyond the bound: for callers that have a bound of their own. False where the workers are stopping.
    pub(crate) fn post(&self, call: impl FnOnce(&Store) + Send + 'static) -> bool {
        let mut queue = self.shared.queue();
        if queue.closed {
            return false;
        }
        queue.tasks.push_back(Task::Call(Box::new(call)));
        self.shared.ready.notify_one();
        true
    }

    /// Jobs that wait.
    pub fn queued(&self) -> usize {
        self.shared.queue().tasks.len()
    }

    /// Their figures.
    pub fn metrics(&self) -> Vec<Metric> {
        let Shared { done, refused, panicked, .. } = &*self.shared;
        vec![
            Metric::counter("worker_jobs_total", "Jobs done by workers.", done.load(Relaxed)),
            Metric::counter("worker_refused_total", "Jobs refused because the queue was full.", refused.load(Relaxed)),
            Metric::counter("worker_panics_total", "Jobs that ended in a panic.", panicked.load(Relaxed)),
            Metric::gauge("worker_queue", "Jobs that wait for a worker.", self.queued() as u64),
        ]
    }

    /// Takes nothing more, and returns when all that was taken is done. Blocks.
    pub fn stop(&self) {
        self.shared.queue().closed = true;
        self.shared.ready.notify_all();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A worker catches what its jobs panic with. One that drops the last owner of its own pool cannot wait for itself.
            if thread.thread().id() != thread::current().id() {
                drop(thread.join());
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Workers({} queued)", self.queued())
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        while let Some(task) = self.next() {
            match task {
                Task::Work(Work { job, reply }) => {
                    let outcome = self.caught(|| job.run(&self.store)).unwrap_or(Outcome::Panicked);
                    match reply {
                        // Nobody may be waiting any more.
                        Reply::Oneshot(sender) => drop(sender.send(outcome)),
                        Reply::Sink { sink, token } => sink.done(token, outcome),
                    }
                }
                Task::Call(call) => {
                    self.caught(|| call(&self.store));
                }
            }
            self.done.fetch_add(1, Relaxed);
        }
    }

    fn next(&self) -> Option<Task> {
        let mut queue = self.queue();
        loop {
            if let Some(task) = queue.tasks.pop_front() {
                return Some(task);
            }
            if queue.closed {
                return None;
            }
            queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A panic ends the job it happened in and not the thread: that one blob is in doubt is no reason to stop the node. The
    /// store's locks are never held across code that a job brings along.
    fn caught<T>(&self, job: impl FnOnce() -> T) -> Option<T> {
        let result = catch_unwind(AssertUnwindSafe(job)).ok();
        if result.is_none() {
            self.panicked.fetch_add(1, Relaxed);
            tracing::error!("a worker's job panicked");
        }
        result
    }
}
