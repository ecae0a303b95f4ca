//! The threads that hash, those that wait for the disk, and a bounded queue in front of each kind.
//!
//! They are apart because a wait says nothing of how busy the machine is: a blob that is made durable takes a disk seconds, in which
//! pieces of others are to be proven, and pieces that are read while one is hashed cost it nothing.

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

/// Jobs of one lane that wait at once. Those with a piece are bounded by the buffer pool before that.
pub const QUEUE_MAX: usize = 4096;

/// Threads of [`Lane::Disk`] and of [`Lane::Fetch`], each. As many reads keep a disk busy that has a queue of its own.
const WAITING_THREADS: NonZeroUsize = NonZeroUsize::new(4).expect("not zero");

/// Niceness of threads that fetch, beside that of the process: of a core that both want, a shard has nine tenths. Between two waits they
/// copy a piece, and a shard that had to wait for that would keep all its connections waiting. Peers whose pieces are cold have the
/// time.
const FETCH_NICE: i32 = 10;

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

/// Which threads do it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    /// Those that there are about as many of as cores: for what hashes.
    Hash,
    /// Those that wait: for what makes, syncs, reads and removes files.
    Disk,
    /// Those that wait and step back: for pieces that are read for peers.
    Fetch,
}

impl Lane {
    const ALL: [Self; 3] = [Self::Hash, Self::Disk, Self::Fetch];
}

/// Worker threads. Dropping the last owner lets the queue run dry and ends them.
pub struct Workers {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<Store>,
    hash: Waiting,
    disk: Waiting,
    fetch: Waiting,
    done: AtomicU64,
    refused: AtomicU64,
    panicked: AtomicU64,
}

/// One lane's queue and its threads.
#[derive(Default)]
struct Waiting {
    queue: Mutex<Queue>,
    ready: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
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
    /// Starts `count` threads that hash, and those that wait for the disk.
    pub fn start(count: NonZeroUsize, store: Arc<Store>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            store,
            hash: Waiting::default(),
            disk: Waiting::default(),
            fetch: Waiting::default(),
            done: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            panicked: AtomicU64::new(0),
        });
        let workers = Self { shared };
        for lane in Lane::ALL {
            let (name, count) = match lane {
                Lane::Hash => ("work", count),
                Lane::Disk => ("disk", WAITING_THREADS),
                Lane::Fetch => ("fetch", WAITING_THREADS),
            };
            for i in 0..count.get() {
                let shared = Arc::clone(&workers.shared);
                let thread =
                    thread::Builder::new().name(format!("shoal-{name}-{i}")).spawn(move || shared.run(lane))?;
                workers.shared.lane(lane).threads().push(thread);
            }
        }
        Ok(workers)
    }

    /// Queues a job; gives it back where the queue is full.
    pub fn submit(&self, work: Work) -> Result<(), Box<Refused>> {
        let waiting = self.shared.lane(work.job.lane());
        let mut queue = waiting.queue();
        let closed = queue.closed;
        if closed || queue.tasks.len() >= QUEUE_MAX {
            drop(queue);
            self.shared.refused.fetch_add(1, Relaxed);
            return Err(Box::new(Refused { work, closed }));
        }
        queue.tasks.push_back(Task::Work(work));
        waiting.ready.notify_one();
        Ok(())
    }

    /// Runs something that waits for the disk and awaits its result. It runs to its end whether or not that is still awaited.
    pub async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Result<T, handle::Error> {
        self.start_call(Lane::Disk, call)?.await.map_err(|_| handle::Error::Closed)
    }

    /// Whether the store has few buffers left.
    pub(crate) fn is_scarce(&self) -> bool {
        self.shared.store.pool().is_scarce()
    }

    /// Queues something to run on a worker; its result can be awaited later.
    pub(crate) fn start_call<T: Send + 'static>(
        &self,
        lane: Lane,
        call: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Result<oneshot::Receiver<T>, handle::Error> {
        let (sender, result) = oneshot::channel();
        let call = Box::new(move |store: &Store| {
            // Nobody may be waiting any more.
            drop(sender.send(call(store)));
        });
        let waiting = self.shared.lane(lane);
        let mut queue = waiting.queue();
        if queue.closed {
            return Err(handle::Error::Closed);
        }
        if queue.tasks.len() >= QUEUE_MAX {
            self.shared.refused.fetch_add(1, Relaxed);
            return Err(handle::Error::Busy("worker queue"));
        }
        queue.tasks.push_back(Task::Call(call));
        waiting.ready.notify_one();
        Ok(result)
    }

    /// Queues something beyond the bound: for callers that have a bound of their own. False where the workers are stopping.
    pub(crate) fn post(&self, lane: Lane, call: impl FnOnce(&Store) + Send + 'static) -> bool {
        let waiting = self.shared.lane(lane);
        let mut queue = waiting.queue();
        if queue.closed {
            return false;
        }
        queue.tasks.push_back(Task::Call(Box::new(call)));
        waiting.ready.notify_one();
        true
    }

    /// Whether calls are refused.
    pub(crate) fn is_stopped(&self) -> bool {
        self.shared.lane(Lane::Disk).queue().closed
    }

    /// Jobs that wait.
    pub fn queued(&self) -> usize {
        Lane::ALL.map(|lane| self.shared.lane(lane).queue().tasks.len()).iter().sum()
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
        // What hashes may end in what waits, and not the other way round.
        for lane in Lane::ALL {
            let waiting = self.shared.lane(lane);
            waiting.queue().closed = true;
            waiting.ready.notify_all();
            let threads = std::mem::take(&mut *waiting.threads());
            for thread in threads {
                // A worker catches what its jobs panic with. One that drops the last owner of its own pool cannot wait for itself.
                if thread.thread().id() != thread::current().id() {
                    drop(thread.join());
                }
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

/// Lets shards go before the calling thread.
fn step_back() {
    // Of this thread alone, as Linux has it.
    if let Err(error) = rustix::process::nice(FETCH_NICE) {
        tracing::warn!(%error, "a thread that fetches has as large a share of its core as shards");
    }
}

impl Waiting {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
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
}

impl Shared {
    fn lane(&self, lane: Lane) -> &Waiting {
        match lane {
            Lane::Hash => &self.hash,
            Lane::Disk => &self.disk,
            Lane::Fetch => &self.fetch,
        }
    }

    fn run(&self, lane: Lane) {
        if lane == Lane::Fetch {
            step_back();
        }
        while let Some(task) = self.lane(lane).next() {
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
