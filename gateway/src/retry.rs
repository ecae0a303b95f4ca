//! One durable queue for all work that an answer does not wait for: write-back of blobs, repair of replicas, replication.
//!
//! A task is a kind, a key and a payload. Once [`Queue::add`] returns, it is on the disk and will be tried until it is done:
//! with growing pauses, across restarts, at most so many of a kind at once. A task is never dropped: it is removed when its
//! work succeeds, and kept, visibly and untried, where the work says that it never will. Work may be run again after a crash
//! or after the same task is added while it runs, so it must bear repetition.
//!
//! One thread owns the database. It takes all requests that wait, commits them together, and acknowledges them after the
//! commit: many callers share one sync of the disk. What runs is known in memory only, so that a killed process has nothing
//! to clean up. A queue is also the collector of its figures.

mod figures;
mod schedule;
mod table;

use crate::config::Span;
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use schedule::Schedule;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    future::Future,
    hash::{BuildHasher, RandomState},
    num::NonZeroUsize,
    panic::AssertUnwindSafe,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use table::{Change, Row, Table};
use tokio::{
    runtime,
    sync::{mpsc, oneshot, watch},
    task::AbortHandle,
};

/// Requests that may wait for the thread; further callers wait before they are taken.
const REQUESTS_MAX: usize = 1024;
/// Requests of one commit.
const BATCH_MAX: usize = 64;
/// Longest key in bytes.
pub const KEY_LEN_MAX: usize = 1024;
/// Longest payload in bytes.
pub const PAYLOAD_LEN_MAX: usize = 64 << 10;
/// Longest delay of a task.
pub const DELAY_MAX: Duration = Duration::from_secs(24 * 3600);
/// Most tasks of one answer of [`Queue::tasks`].
pub const TASKS_PAGE_MAX: usize = 1000;
/// Longest error text kept with a task, in bytes.
const ERROR_LEN_MAX: usize = 1000;
/// The pause after the database failed.
const DATABASE_PAUSE: Duration = Duration::from_secs(1);

/// How tasks are tried.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The pause after a first failure; each further one doubles.
    pub pause: Span,
    /// The longest pause.
    pub pause_max: Span,
    /// Most tasks kept. Further ones are refused.
    pub tasks_max: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { pause: Span::secs(1), pause_max: Span::secs(300), tasks_max: 1_000_000 }
    }
}

/// The queue. Cheap to clone; the thread ends with [`Queue::close`] or the last clone.
#[derive(Clone)]
pub struct Queue {
    inner: Arc<Inner>,
}

struct Inner {
    requests: mpsc::Sender<Request>,
    counts: SharedCounts,
    /// Dropped with the last clone, which stops the thread.
    alive: watch::Sender<()>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

/// A piece of work as its runner gets it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Task {
    /// What it is about; one task of a kind for each key.
    pub key: String,
    /// What else the work needs.
    pub payload: Bytes,
    /// How often it has failed before.
    pub failures: u32,
}

/// Why a task is not done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// It is tried again later.
    Later(String),
    /// It can never be done: it is kept for people to see, and not tried until it is added again.
    Never(String),
}

impl Failure {
    /// [`Failure::Later`] with an error's text.
    pub fn later(error: impl fmt::Display) -> Self {
        Self::Later(error.to_string())
    }

    /// [`Failure::Never`] with an error's text.
    pub fn never(error: impl fmt::Display) -> Self {
        Self::Never(error.to_string())
    }
}

/// A task as it is kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Kept {
    /// Its kind.
    pub kind: String,
    /// What it is about.
    pub key: String,
    /// Where it stands.
    pub state: State,
    /// How often it has failed.
    pub failures: u32,
    /// The last failure's text.
    pub last_error: Option<String>,
    /// When it was added, milliseconds since 1970.
    pub added_ms: u64,
    /// When it is tried next, milliseconds since 1970.
    pub due_ms: u64,
}

/// Where a task stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// For its time, or a place.
    Waiting,
    /// Being tried.
    Running,
    /// Can never be done.
    GivenUp,
}

/// What adding a task did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Added {
    /// There is a new task.
    New,
    /// The task was there and will run with this payload, or once more.
    Renewed,
    /// The task was there and waits already.
    Known,
}

/// Numbers of one kind of task: what there is, and what has happened since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Counts {
    /// Tasks that wait, those running included.
    pub waiting: u64,
    /// Tasks being tried.
    pub running: u64,
    /// Tasks that can never be done.
    pub given_up: u64,
    /// Tasks added, renewed ones included.
    pub added_total: u64,
    /// Tasks done.
    pub done_total: u64,
    /// Tries that failed.
    pub failed_total: u64,
}

type SharedCounts = Arc<Mutex<BTreeMap<String, Counts>>>;

/// Why the queue did not do as asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// It holds as many tasks as it may.
    #[error("retry queue is full: {0} tasks")]
    Full(u64),
    /// The kind, key, payload or delay is beyond its bound.
    #[error("task's {what} is beyond {max}")]
    TooLong {
        /// Which.
        what: &'static str,
        /// The bound: bytes, or seconds of the delay.
        max: usize,
    },
    /// It is closed.
    #[error("retry queue is closed")]
    Closed,
    /// The disk or the database in it. Nothing of the call is kept.
    #[error("retry queue: {0}")]
    Database(#[source] Arc<rusqlite::Error>),
    /// The database's directory, or the thread.
    #[error("retry queue: {0}")]
    Io(#[source] Arc<std::io::Error>),
    /// The database is of a later version of this program.
    #[error("retry queue has schema {0}, which this version does not know")]
    Schema(i64),
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(Arc::new(error))
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

enum Request {
    Add { kind: String, key: String, payload: Bytes, delay: Duration, reply: oneshot::Sender<Result<Added, Error>> },
    Find { kind: String, key: String, reply: oneshot::Sender<Result<Option<Kept>, Error>> },
    Tasks { kind: String, after: Option<String>, limit: usize, reply: oneshot::Sender<Result<Vec<Kept>, Error>> },
    Work { kind: &'static str, places: NonZeroUsize, run: Run },
    Ended(Ended),
    Close { reply: oneshot::Sender<()> },
}

/// A try that came to its end.
struct Ended {
    kind: &'static str,
    id: i64,
    version: i64,
    failures: u32,
    outcome: Result<(), Failure>,
}

type Run = Arc<dyn Fn(Task) -> BoxFuture<'static, Result<(), Failure>> + Send + Sync>;

impl Queue {
    /// Opens or makes the queue at `path` and starts its thread. Must be called within a tokio runtime, which runs the work.
    /// Blocks on the file system.
    pub fn open(path: &Path, config: Config) -> Result<Self, Error> {
        let table = Table::open(path, now_ms())?;
        let counts: SharedCounts = Arc::new(Mutex::new(table.counts()?));
        let (requests, receiver) = mpsc::channel(REQUESTS_MAX);
        let (alive, stop) = watch::channel(());
        let worker = Worker {
            table,
            config,
            schedule: Schedule::default(),
            runs: BTreeMap::new(),
            running: HashMap::new(),
            unrecorded: Vec::new(),
            closing: None,
            counts: counts.clone(),
            requests: requests.downgrade(),
            runtime: runtime::Handle::current(),
        };
        let own = runtime::Builder::new_current_thread().enable_time().build()?;
        let thread = thread::Builder::new().name("retry-queue".into());
        let thread = thread.spawn(move || own.block_on(worker.work(receiver, stop)))?;
        let inner = Inner { requests, counts, alive, thread: Mutex::new(Some(thread)) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Adds a task, to be tried after `delay`; on the disk when this returns. One that is there already is left as it waits
    /// if its payload is the same, takes the new payload and time otherwise, and runs once more if it is just running.
    pub async fn add(&self, kind: &str, key: &str, payload: impl Into<Bytes>, delay: Duration) -> Result<Added, Error> {
        let payload = payload.into();
        for (what, len, max) in [
            ("kind", kind.len(), KEY_LEN_MAX),
            ("key", key.len(), KEY_LEN_MAX),
            ("payload", payload.len(), PAYLOAD_LEN_MAX),
        ] {
            if len > max {
                return Err(Error::TooLong { what, max });
            }
        }
        if delay > DELAY_MAX {
            return Err(Error::TooLong {
                what: "delay",
                max: usize::try_from(DELAY_MAX.as_secs()).unwrap_or(usize::MAX),
            });
        }
        let (kind, key) = (kind.to_owned(), key.to_owned());
        self.ask(|reply| Request::Add { kind, key, payload, delay, reply }).await?
    }

    /// Has tasks of a kind tried, at most `places` at once. Each kind has one runner; a later one takes its place. A run has to
    /// end by itself: it holds its place until then.
    pub async fn work<F, Fut>(&self, kind: &'static str, places: NonZeroUsize, run: F) -> Result<(), Error>
    where
        F: Fn(Task) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let run: Run = Arc::new(move |task| run(task).boxed());
        self.inner.requests.send(Request::Work { kind, places, run }).await.map_err(|_| Error::Closed)
    }

    /// The task of a kind and key.
    pub async fn find(&self, kind: &str, key: &str) -> Result<Option<Kept>, Error> {
        let (kind, key) = (kind.to_owned(), key.to_owned());
        self.ask(|reply| Request::Find { kind, key, reply }).await?
    }

    /// Tasks of a kind by key, those after a key; at most [`TASKS_PAGE_MAX`].
    pub async fn tasks(&self, kind: &str, after: Option<&str>, limit: usize) -> Result<Vec<Kept>, Error> {
        let (kind, after, limit) = (kind.to_owned(), after.map(str::to_owned), limit.min(TASKS_PAGE_MAX));
        self.ask(|reply| Request::Tasks { kind, after, limit, reply }).await?
    }

    /// Numbers by kind, for metrics.
    pub fn counts(&self) -> BTreeMap<String, Counts> {
        lock(&self.inner.counts).clone()
    }

    /// Starts nothing more, waits at most `drain` for what runs, records it, and closes the database. What still runs then is
    /// cut off and tried again after the next start. Other clones get [`Error::Closed`] from now on.
    pub async fn close(self, drain: Duration) {
        let drained = tokio::time::timeout(drain, self.ask(|reply| Request::Close { reply })).await;
        if drained.is_err() {
            tracing::warn!("tasks of the retry queue were cut off; they are tried again after the next start");
        }
        // Without the timeout the thread has ended or is about to; with it, the other branch of its loop ends it.
        self.inner.alive.send_replace(());
        let thread = self.inner.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && tokio::task::spawn_blocking(|| thread.join()).await.is_ok_and(|joined| joined.is_err())
        {
            tracing::error!("the retry queue's thread panicked");
        }
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.inner.requests.send(request(reply)).await.map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

fn lock(counts: &SharedCounts) -> MutexGuard<'_, BTreeMap<String, Counts>> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The thread's state.
struct Worker {
    table: Table,
    config: Config,
    schedule: Schedule,
    runs: BTreeMap<&'static str, Run>,
    running: HashMap<i64, AbortHandle>,
    /// Ends that the database could not take yet.
    unrecorded: Vec<Ended>,
    closing: Option<oneshot::Sender<()>>,
    counts: SharedCounts,
    /// Weak, so that the callers' going is seen.
    requests: mpsc::WeakSender<Request>,
    runtime: runtime::Handle,
}

impl Worker {
    async fn work(mut self, mut receiver: mpsc::Receiver<Request>, mut stop: watch::Receiver<()>) {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        loop {
            let pause = self.pause();
            tokio::select! {
                biased;
                _ = stop.changed() => break,
                _ = receiver.recv_many(&mut batch, BATCH_MAX) => {}
                () = tokio::time::sleep(pause) => {}
            }
            self.record(&mut batch);
            if self.closing.is_none() {
                self.dispatch();
            } else if self.running.is_empty() && self.unrecorded.is_empty() {
                break;
            }
        }
        for running in self.running.values() {
            running.abort();
        }
        self.table.close();
        if let Some(reply) = self.closing.take() {
            let _ = reply.send(());
        }
    }

    /// How long nothing has to be done unless someone asks.
    fn pause(&self) -> Duration {
        if !self.unrecorded.is_empty() {
            return DATABASE_PAUSE;
        }
        let due = self.schedule.deadline().filter(|_| self.closing.is_none());
        Duration::from_millis(due.map_or(u64::MAX, |due| due.saturating_sub(now_ms())))
    }

    /// Carries out all requests in one commit, then answers them.
    fn record(&mut self, batch: &mut Vec<Request>) {
        let now = now_ms();
        let mut adds = Vec::new();
        let mut ends = std::mem::take(&mut self.unrecorded);
        for request in batch.drain(..) {
            match request {
                Request::Add { kind, key, payload, delay, reply } => {
                    let due_ms = now.saturating_add(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX));
                    adds.push((Row { kind, key, payload, due_ms }, reply));
                }
                Request::Ended(ended) => {
                    self.running.remove(&ended.id);
                    ends.push(ended);
                }
                Request::Find { kind, key, reply } => {
                    let found = self.table.find(&kind, &key, |id| self.schedule.is_running(id));
                    let _ = reply.send(found.map_err(Error::from));
                }
                Request::Tasks { kind, after, limit, reply } => {
                    let page = self.table.page(&kind, after.as_deref(), limit, |id| self.schedule.is_running(id));
                    let _ = reply.send(page.map_err(Error::from));
                }
                Request::Work { kind, places, run } => {
                    self.schedule.open(kind, places.get());
                    self.runs.insert(kind, run);
                }
                Request::Close { reply } => self.closing = Some(reply),
            }
        }
        if adds.is_empty() && ends.is_empty() {
            return;
        }
        let rows = adds.iter().map(|(row, _)| row);
        match self.commit(rows, &ends, now) {
            Ok(added) => {
                for ((row, reply), added) in adds.into_iter().zip(added) {
                    if let Ok(Added::New | Added::Renewed) = &added {
                        self.schedule.waits(&row.kind, row.due_ms);
                    }
                    let _ = reply.send(added);
                }
                for ended in ends {
                    self.schedule.ended(ended.kind, ended.id, now);
                    self.log(&ended);
                }
            }
            Err(error) => {
                tracing::error!(%error, "retry queue cannot record");
                for (_, reply) in adds {
                    let _ = reply.send(Err(error.clone()));
                }
                self.unrecorded = ends;
            }
        }
        self.count_running();
    }

    /// One transaction. The outer error means that nothing of it happened.
    fn commit<'a>(
        &mut self,
        adds: impl Iterator<Item = &'a Row>,
        ends: &[Ended],
        now: u64,
    ) -> Result<Vec<Result<Added, Error>>, Error> {
        let mut counts = lock(&self.counts).clone();
        let transaction = self.table.begin()?;
        for ended in ends {
            let counts = counts.entry(ended.kind.to_owned()).or_default();
            let random = RandomState::new().hash_one(ended.id);
            let pause = schedule::pause(&self.config, ended.failures.saturating_add(1), random);
            let change = match &ended.outcome {
                Ok(()) => Change::Done,
                Err(Failure::Later(error)) => Change::Failed { error: cut(error), due_ms: now.saturating_add(pause) },
                Err(Failure::Never(error)) => Change::GivenUp { error: cut(error) },
            };
            let last = transaction.change(ended.id, ended.version, &change)?;
            match change {
                Change::Done => counts.done_total += 1,
                Change::Failed { .. } | Change::GivenUp { .. } => counts.failed_total += 1,
            }
            // What was renewed while it ran goes on waiting.
            if last && !matches!(change, Change::Failed { .. }) {
                counts.waiting = counts.waiting.saturating_sub(1);
            }
            if last && matches!(change, Change::GivenUp { .. }) {
                counts.given_up += 1;
            }
        }
        let mut answers = Vec::new();
        for row in adds {
            let kept: u64 = counts.values().map(|counts| counts.waiting + counts.given_up).sum();
            let room = kept < self.config.tasks_max;
            let answer = transaction.add(row, now, room, |id| self.schedule.is_running(id))?;
            let Some((added, revived)) = answer else {
                answers.push(Err(Error::Full(self.config.tasks_max)));
                continue;
            };
            let counts = counts.entry(row.kind.clone()).or_default();
            counts.added_total += u64::from(added != Added::Known);
            counts.waiting += u64::from(added == Added::New || revived);
            counts.given_up -= u64::from(revived).min(counts.given_up);
            answers.push(Ok(added));
        }
        transaction.commit()?;
        *lock(&self.counts) = counts;
        Ok(answers)
    }

    fn log(&self, ended: &Ended) {
        match &ended.outcome {
            Ok(()) => tracing::debug!(kind = ended.kind, id = ended.id, "task done"),
            Err(Failure::Later(error)) => {
                tracing::warn!(kind = ended.kind, id = ended.id, failures = ended.failures + 1, error, "task failed");
            }
            Err(Failure::Never(error)) => tracing::error!(kind = ended.kind, id = ended.id, error, "task given up"),
        }
    }

    /// Starts what is due and has a place.
    fn dispatch(&mut self) {
        let now = now_ms();
        for (kind, wanted) in self.schedule.wanted(now) {
            let due = match self.table.due(kind, wanted) {
                Ok(due) => due,
                Err(error) => {
                    tracing::error!(%error, kind, "retry queue cannot be read");
                    self.schedule.start(kind, now, std::iter::empty());
                    self.schedule.waits(kind, now + u64::try_from(DATABASE_PAUSE.as_millis()).unwrap_or(u64::MAX));
                    continue;
                }
            };
            let start = self.schedule.start(kind, now, due.iter().map(|due| (due.id, due.due_ms)));
            for due in due.into_iter().filter(|due| start.contains(&due.id)) {
                self.start(kind, due);
            }
        }
        self.count_running();
    }

    fn start(&mut self, kind: &'static str, due: table::Due) {
        let Some(run) = self.runs.get(kind) else { return };
        let table::Due { id, version, task, .. } = due;
        let failures = task.failures;
        let (run, requests) = (run.clone(), self.requests.clone());
        let running = self.runtime.spawn(async move {
            // A panic is a failure like any other: logged by its hook, counted here.
            let outcome = AssertUnwindSafe(async move { run(task).await }).catch_unwind().await;
            let outcome = outcome.unwrap_or_else(|_| Err(Failure::Later("the work panicked".into())));
            // Without callers the thread is gone: the task stays on the disk.
            if let Some(requests) = requests.upgrade() {
                let _ = requests.send(Request::Ended(Ended { kind, id, version, failures, outcome })).await;
            }
        });
        self.running.insert(id, running.abort_handle());
    }

    fn count_running(&self) {
        let mut counts = lock(&self.counts);
        for (kind, running) in self.schedule.running() {
            counts.entry(kind.to_owned()).or_default().running = running as u64;
        }
    }
}

/// The beginning of an error's text, cut between characters.
fn cut(error: &str) -> &str {
    let end = (0..=ERROR_LEN_MAX.min(error.len())).rev().find(|end| error.is_char_boundary(*end));
    &error[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{BufRead, BufReader},
        process::{Command, Stdio},
        sync::atomic::{AtomicUsize, Ordering::SeqCst},
        time::Instant,
    };
    use tokio::sync::Semaphore;

    const ONE: NonZeroUsize = NonZeroUsize::MIN;
    const NOW: Duration = Duration::ZERO;

    struct Place {
        dir: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap() }
        }

        fn open(&self) -> Queue {
            let config = Config { pause: "1ms".parse().unwrap(), pause_max: "5ms".parse().unwrap(), tasks_max: 10 };
            Queue::open(&self.dir.path().join("retry.db"), config).unwrap()
        }
    }

    async fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}: not within 20 s");
            tokio::task::yield_now().await;
        }
    }

    fn counts(queue: &Queue) -> Counts {
        queue.counts().get("k").copied().unwrap_or_default()
    }

    /// Lets each run end with the next outcome, and counts the runs under way.
    #[derive(Clone, Default)]
    struct Script {
        outcomes: Arc<Mutex<Vec<Result<(), Failure>>>>,
        seen: Arc<Mutex<Vec<Task>>>,
    }

    impl Script {
        fn new(outcomes: impl IntoIterator<Item = Result<(), Failure>>) -> Self {
            let outcomes: Vec<_> = outcomes.into_iter().collect();
            Self { outcomes: Arc::new(Mutex::new(outcomes)), ..Self::default() }
        }

        async fn attach(&self, queue: &Queue) {
            let script = self.clone();
            let run = move |task| {
                script.seen.lock().unwrap().push(task);
                let mut outcomes = script.outcomes.lock().unwrap();
                let outcome = if outcomes.is_empty() { Ok(()) } else { outcomes.remove(0) };
                async move { outcome }
            };
            queue.work("k", ONE, run).await.unwrap();
        }

        fn seen(&self) -> Vec<Task> {
            self.seen.lock().unwrap().clone()
        }
    }

    #[tokio::test]
    async fn a_task_is_tried_until_it_is_done() {
        let place = Place::new();
        let queue = place.open();
        let script = Script::new([Err(Failure::later("no backend")), Err(Failure::later("still none"))]);
        script.attach(&queue).await;
        assert_eq!(queue.add("k", "a", "payload", NOW).await.unwrap(), Added::New);
        until("done", || counts(&queue).done_total == 1).await;
        let seen = script.seen();
        assert_eq!(seen.iter().map(|task| task.failures).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(seen.iter().all(|task| task.key == "a" && task.payload == "payload"));
        assert_eq!(counts(&queue), Counts { added_total: 1, done_total: 1, failed_total: 2, ..Counts::default() });
        assert_eq!(queue.find("k", "a").await.unwrap(), None);
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(queue));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "retry_tasks_waiting{kind=\"k\"} 0",
            "retry_tasks_done_total{kind=\"k\"} 1",
            "retry_tries_failed_total{kind=\"k\"} 2",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[tokio::test]
    async fn failures_are_seen_and_what_can_never_be_done_is_kept() {
        let place = Place::new();
        let queue = place.open();
        queue.add("k", "a", "", NOW).await.unwrap();
        let script = Script::new([Err(Failure::later("first")), Err(Failure::never("é".repeat(1000)))]);
        script.attach(&queue).await;
        until("given up", || counts(&queue).given_up == 1).await;
        let kept = queue.find("k", "a").await.unwrap().unwrap();
        assert_eq!((kept.state, kept.failures), (State::GivenUp, 2));
        assert_eq!(kept.last_error.unwrap().chars().count(), 500);
        assert_eq!(counts(&queue).waiting, 0);
        assert_eq!(queue.add("k", "a", "", NOW).await.unwrap(), Added::Renewed);
        until("done", || counts(&queue).done_total == 1).await;
        assert_eq!((counts(&queue).given_up, counts(&queue).waiting), (0, 0));
    }

    #[tokio::test]
    async fn adding_again_changes_what_it_must() {
        let place = Place::new();
        let queue = place.open();
        let late = Duration::from_secs(3600);
        assert_eq!(queue.add("k", "a", "1", late).await.unwrap(), Added::New);
        assert_eq!(queue.add("k", "a", "1", NOW).await.unwrap(), Added::Known);
        assert_eq!(queue.add("k", "b", "1", late).await.unwrap(), Added::New);
        assert_eq!(queue.add("other", "a", "1", late).await.unwrap(), Added::New);
        let script = Script::default();
        script.attach(&queue).await;
        assert_eq!(queue.add("k", "a", "2", NOW).await.unwrap(), Added::Renewed);
        until("done", || counts(&queue).done_total == 1).await;
        assert_eq!(script.seen().len(), 1);
        assert_eq!(script.seen()[0].payload, "2");
        let keys: Vec<_> = queue.tasks("k", None, 10).await.unwrap().into_iter().map(|kept| kept.key).collect();
        assert_eq!(keys, ["b"]);
        assert!(queue.tasks("k", Some("b"), 10).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_task_added_while_it_runs_runs_again() {
        let place = Place::new();
        let queue = place.open();
        let gate = Arc::new(Semaphore::new(0));
        let payloads = Arc::new(Mutex::new(Vec::new()));
        let run = {
            let (gate, payloads) = (gate.clone(), payloads.clone());
            move |task: Task| {
                payloads.lock().unwrap().push(task.payload);
                let gate = gate.clone();
                async move {
                    gate.acquire().await.unwrap().forget();
                    Ok(())
                }
            }
        };
        queue.work("k", NonZeroUsize::new(4).unwrap(), run).await.unwrap();
        queue.add("k", "a", "1", NOW).await.unwrap();
        until("runs", || counts(&queue).running == 1).await;
        assert_eq!(queue.find("k", "a").await.unwrap().unwrap().state, State::Running);
        assert_eq!(queue.add("k", "a", "2", NOW).await.unwrap(), Added::Renewed);
        assert_eq!(counts(&queue).running, 1, "one try of a task at a time");
        gate.add_permits(1);
        until("runs again", || payloads.lock().unwrap().len() == 2).await;
        gate.add_permits(1);
        until("all done", || counts(&queue).waiting == 0).await;
        assert_eq!(*payloads.lock().unwrap(), ["1", "2"]);
    }

    #[tokio::test]
    async fn places_bound_what_runs_at_once() {
        let place = Place::new();
        let queue = place.open();
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let run = {
            let (running, most) = (running.clone(), most.clone());
            move |_| {
                let (running, most) = (running.clone(), most.clone());
                async move {
                    most.fetch_max(running.fetch_add(1, SeqCst) + 1, SeqCst);
                    for _ in 0..20 {
                        tokio::task::yield_now().await;
                    }
                    running.fetch_sub(1, SeqCst);
                    Ok(())
                }
            }
        };
        for i in 0..10 {
            queue.add("k", &i.to_string(), "", NOW).await.unwrap();
        }
        let full = queue.add("k", "one too many", "", NOW).await;
        assert!(matches!(full, Err(Error::Full(10))), "{full:?}");
        queue.work("k", NonZeroUsize::new(3).unwrap(), run).await.unwrap();
        until("done", || counts(&queue).done_total == 10).await;
        assert_eq!(most.load(SeqCst), 3);
        queue.add("k", "room again", "", NOW).await.unwrap();
    }

    #[tokio::test]
    async fn bounds_are_told() {
        let place = Place::new();
        let queue = place.open();
        let long = "x".repeat(KEY_LEN_MAX + 1);
        assert!(matches!(queue.add("k", &long, "", NOW).await, Err(Error::TooLong { what: "key", .. })));
        let much = vec![0; PAYLOAD_LEN_MAX + 1];
        assert!(matches!(queue.add("k", "a", much, NOW).await, Err(Error::TooLong { what: "payload", .. })));
        let late = DELAY_MAX + Duration::from_millis(1);
        assert!(matches!(queue.add("k", "a", "", late).await, Err(Error::TooLong { what: "delay", .. })));
    }

    #[tokio::test]
    async fn a_panic_is_a_failure() {
        let place = Place::new();
        let queue = place.open();
        let tries = Arc::new(AtomicUsize::new(0));
        let run = {
            let tries = tries.clone();
            move |_| {
                let first = tries.fetch_add(1, SeqCst) == 0;
                async move {
                    assert!(!first, "made up");
                    Ok(())
                }
            }
        };
        queue.work("k", ONE, run).await.unwrap();
        queue.add("k", "a", "", NOW).await.unwrap();
        until("done", || counts(&queue).done_total == 1).await;
        assert_eq!(counts(&queue).failed_total, 1);
    }

    #[tokio::test]
    async fn closing_waits_for_what_runs_and_starts_nothing() {
        let place = Place::new();
        let queue = place.open();
        let gate = Arc::new(Semaphore::new(0));
        let run = {
            let gate = gate.clone();
            move |_| {
                let gate = gate.clone();
                async move {
                    gate.acquire().await.unwrap().forget();
                    Ok(())
                }
            }
        };
        queue.work("k", ONE, run).await.unwrap();
        queue.add("k", "a", "", NOW).await.unwrap();
        queue.add("k", "b", "", NOW).await.unwrap();
        until("runs", || counts(&queue).running == 1).await;
        let other = queue.clone();
        let closing = tokio::spawn(queue.close(Duration::from_secs(20)));
        gate.add_permits(10);
        closing.await.unwrap();
        assert!(matches!(other.add("k", "c", "", NOW).await, Err(Error::Closed)));
        assert_eq!(counts(&other).done_total, 1);
        let again = place.open();
        assert_eq!(counts(&again).waiting, 1);
        assert!(again.find("k", "b").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn what_is_cut_off_is_due_after_the_next_start() {
        let place = Place::new();
        let queue = place.open();
        queue.work("k", ONE, |_| std::future::pending()).await.unwrap();
        queue.add("k", "a", "", NOW).await.unwrap();
        until("runs", || counts(&queue).running == 1).await;
        queue.close(Duration::from_millis(1)).await;
        let again = place.open();
        let script = Script::default();
        script.attach(&again).await;
        until("done", || counts(&again).done_total == 1).await;
        assert_eq!(script.seen()[0].failures, 0);
    }

    /// Not a test of its own: what the next one kills.
    #[tokio::test]
    async fn victim() {
        let Some(path) = std::env::var_os("SHOAL_TEST_RETRY_VICTIM") else { return };
        let queue = Queue::open(Path::new(&path), Config::default()).unwrap();
        queue.work("k", ONE, |_| std::future::pending()).await.unwrap();
        for i in 0.. {
            queue.add("k", &format!("{i:06}"), "", NOW).await.unwrap();
            println!("acked {i:06}");
        }
    }

    #[tokio::test]
    async fn a_killed_process_loses_nothing_it_acknowledged() {
        let place = Place::new();
        let path = place.dir.path().join("retry.db");
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "retry::tests::victim", "--nocapture"])
            .env("SHOAL_TEST_RETRY_VICTIM", &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut acked = Vec::new();
        for line in lines {
            // The first line also has the harness's own words before ours.
            if let Some((_, key)) = line.split_once("acked ") {
                acked.push(key.to_owned());
            }
            if acked.len() == 100 {
                victim.kill().unwrap();
            }
        }
        victim.wait().unwrap();
        assert!(acked.len() >= 100, "{}", acked.len());
        let queue = Queue::open(&path, Config::default()).unwrap();
        let kept: Vec<_> = queue.tasks("k", None, TASKS_PAGE_MAX).await.unwrap();
        let keys: Vec<_> = kept.iter().map(|kept| kept.key.clone()).collect();
        assert!(keys.len() < TASKS_PAGE_MAX);
        assert!(acked.iter().all(|key| keys.contains(key)), "{} of {}", keys.len(), acked.len());
        assert!(kept.iter().all(|kept| kept.state == State::Waiting));
    }

    #[tokio::test]
    async fn many_callers_share_a_commit() {
        let place = Place::new();
        let queue = Queue::open(&place.dir.path().join("retry.db"), Config::default()).unwrap();
        let start = Instant::now();
        let adds = (0..2000).map(|i| {
            let queue = queue.clone();
            async move { queue.add("k", &i.to_string(), "", NOW).await.unwrap() }
        });
        futures_util::future::join_all(adds).await;
        println!("2000 durable adds in {:?}", start.elapsed());
        assert_eq!(counts(&queue).waiting, 2000);
    }
}
