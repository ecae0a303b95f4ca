//! The threads that hash, those that wait for the disk, and a bounded queue in front of each kind.
//!
//! They are apart because a wait says nothing of how busy the machine is: a blob that is made durable takes a disk seconds, in which
//! pieces of others are to be proven, and pieces that are read while one is hashed cost it nothing.

use crate::{
    handle::{self, Metric},
    job::{Job, Outcome, Piece},
    store::Store,
};
use peer_proto::chain::{LANES, Lanes};
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
    /// Pieces that were proven several at once.
    together: AtomicU64,
}

/// What a thread does next.
enum Turn {
    Task(Task),
    /// Pieces that are proven at once.
    Pieces(Vec<(Piece, Reply)>),
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
    /// Threads that wait for one.
    idle: usize,
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
            together: AtomicU64::new(0),
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
        let Shared { done, refused, panicked, together, .. } = &*self.shared;
        vec![
            Metric::counter("worker_jobs_total", "Jobs done by workers.", done.load(Relaxed)),
            Metric::counter("worker_refused_total", "Jobs refused because the queue was full.", refused.load(Relaxed)),
            Metric::counter("worker_panics_total", "Jobs that ended in a panic.", panicked.load(Relaxed)),
            Metric::counter(
                "worker_pieces_together_total",
                "Pieces that workers proved several at once.",
                together.load(Relaxed),
            ),
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

    /// The next turn of a thread; `lanes` is how it can prove several pieces at once.
    fn next(&self, lanes: Option<Lanes>) -> Option<Turn> {
        let mut queue = self.queue();
        loop {
            if let Some(pieces) = lanes.and_then(|lanes| queue.pieces(lanes)) {
                return Some(Turn::Pieces(pieces));
            }
            if let Some(task) = queue.tasks.pop_front() {
                return Some(Turn::Task(task));
            }
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}

impl Queue {
    /// A thread's share of the pieces in front, once that is enough for several to be proven at once: threads have fallen behind, or
    /// so many came together.
    fn pieces(&mut self, lanes: Lanes) -> Option<Vec<(Piece, Reply)>> {
        let threads = self.idle + 1;
        let fits = |task: &&Task| matches!(task, Task::Work(Work { job: Job::Piece(piece), .. }) if piece.fits_lanes());
        let front = self.tasks.iter().take(threads * LANES).take_while(fits).count();
        let share = front / threads;
        (share >= lanes.fewest).then(|| {
            let taken = self.tasks.drain(..share).filter_map(|task| match task {
                Task::Work(Work { job: Job::Piece(piece), reply }) => Some((piece, reply)),
                Task::Work(_) | Task::Call(_) => None,
            });
            taken.collect()
        })
    }
}

impl Reply {
    fn send(self, outcome: Outcome) {
        match self {
            // Nobody may be waiting any more.
            Self::Oneshot(sender) => drop(sender.send(outcome)),
            Self::Sink { sink, token } => sink.done(token, outcome),
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
        let lanes = if lane == Lane::Hash { self.store.lanes() } else { None };
        while let Some(turn) = self.lane(lane).next(lanes) {
            match turn {
                Turn::Task(Task::Work(Work { job, reply })) => {
                    reply.send(self.caught(|| job.run(&self.store)).unwrap_or(Outcome::Panicked));
                }
                Turn::Task(Task::Call(call)) => {
                    self.caught(|| call(&self.store));
                }
                Turn::Pieces(pieces) => {
                    self.prove(pieces);
                    continue;
                }
            }
            self.done.fetch_add(1, Relaxed);
        }
    }

    /// Proves pieces at once, and tells of each as soon as it is in its place.
    fn prove(&self, pieces: Vec<(Piece, Reply)>) {
        let candidates: Vec<_> = pieces.iter().map(|(piece, _)| piece.candidate()).collect();
        let proven = self.caught(|| self.store.prove_together(&candidates));
        let mut proven = proven.into_iter().flatten();
        for (piece, reply) in pieces {
            let placed = proven.next().and_then(|proven| self.caught(|| piece.place(proven, &self.store)));
            reply.send(placed.unwrap_or(Outcome::Panicked));
            self.done.fetch_add(1, Relaxed);
            self.together.fetch_add(1, Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        buf::Pool,
        disk::sim::Sim,
        handle::Proof,
        store::{Options, PieceError},
    };
    use peer_proto::{Algorithm, LayoutBuilder, PieceIndex, ProofError};
    use std::sync::mpsc;

    const MIB: usize = 1 << 20;

    /// Behind a thread that is held up, so that they are all there when it turns to them.
    #[test]
    fn pieces_that_wait_are_proven_together_and_each_has_its_own_answer() {
        let options = Options { quota: None, proof: Proof::Full, boot: [1; 16] };
        let disk = Sim::new(1, 1 << 30);
        let store = Arc::new(Store::open(Arc::new(disk), options, Pool::new(64 * MIB), 0).unwrap());
        let workers = Workers::start(NonZeroUsize::MIN, Arc::clone(&store)).unwrap();
        let bytes: Vec<u8> = (0..12 * MIB + 5).map(|i| (i % 251) as u8).collect();
        let mut builder = LayoutBuilder::new(Algorithm::Sha256);
        builder.update(&bytes).unwrap();
        let layout = Arc::new(builder.finish());
        let blob = store.begin(&layout, None).unwrap();
        let wrong = layout.geometry().piece(3).unwrap();

        let (go, held) = mpsc::channel::<()>();
        let holding = workers.start_call(Lane::Hash, move |_| held.recv()).unwrap();
        let send = |piece: PieceIndex, damaged: bool| {
            let range = layout.geometry().range(piece);
            let part = &bytes[range.start as usize..range.end as usize];
            let mut buf = store.pool().take(part.len()).unwrap();
            buf.copy_from_slice(part);
            buf[0] ^= u8::from(damaged);
            let (sender, outcome) = oneshot::channel();
            let job = Job::Piece(Piece { blob: Arc::clone(&blob), piece, buf });
            workers.submit(Work { job, reply: Reply::Oneshot(sender) }).ok().unwrap();
            (piece, outcome)
        };
        let mut sent: Vec<_> = layout.geometry().all().map(|piece| send(piece, piece == wrong)).collect();
        let call = workers.start_call(Lane::Hash, |_| 7).unwrap();
        sent.push(send(wrong, false));
        go.send(()).unwrap();
        holding.blocking_recv().unwrap().unwrap();

        let mut refused = 0;
        for (piece, outcome) in sent {
            let Outcome::Piece { piece: told, result } = outcome.blocking_recv().unwrap() else { panic!("of a piece") };
            assert_eq!(told, piece);
            match result {
                Ok(stored) => assert!(stored.fresh && stored.bytes.len() as u32 == layout.geometry().piece_len(piece)),
                Err(PieceError::Proof(ProofError::Checksum(damaged))) => {
                    refused += 1;
                    assert_eq!(damaged, wrong);
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!((refused, call.blocking_recv().unwrap()), (1, 7));
        assert!(store.finish(&blob).unwrap().is_whole());
        workers.stop();
        // Thirteen in front of the call: eight at once, and five where that is enough; the one behind it alone.
        let together = workers.shared.together.load(Relaxed);
        let fewest = store.lanes().map(|lanes| lanes.fewest);
        assert_eq!(together, fewest.map_or(0, |fewest| if fewest <= 5 { 13 } else { 8 }), "{fewest:?}");
        assert_eq!(workers.shared.done.load(Relaxed), 16);
    }
}
