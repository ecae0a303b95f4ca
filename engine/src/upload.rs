//! The way in for bytes from clients and backends: gathered to 1 MiB, hashed and written on a worker while the next are
//! received.
//!
//! The steps of an upload stand in a line of its own and are done in order by one worker at a time. So a writer that is cancelled
//! in mid-step leaves nothing in between: what it queued is done, and then the upload is parked.

use crate::{
    buf::{Buf, Pool},
    handle::Error,
    store::{Incoming, Store},
    workers::{Lane, Workers},
};
use bytes::Bytes;
use peer_proto::{Digest, Layout};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{Notify, oneshot};
use uuid::Uuid;

/// Bytes hashed and written at once.
pub(crate) const CHUNK_LEN: usize = 1 << 20;
/// Bytes written before the disk is told to begin with them.
const SYNC_STEP: u64 = 8 << 20;
/// Chunks of one upload that wait or are worked on, before its writer has to wait.
const CHUNKS_AHEAD: usize = 2;

/// What all uploads of an engine share.
pub(crate) struct Uploads {
    pub(crate) workers: Arc<Workers>,
    pub(crate) store: Arc<Store>,
    /// Buffers to gather in. Where there is none, bytes are written as they come.
    pub(crate) pool: Pool,
    /// An upload was parked.
    pub(crate) parked: Notify,
}

/// The writing end of one upload. Dropping it parks the upload with all that was written.
pub(crate) struct Writer {
    line: Arc<Line>,
    id: Uuid,
    /// Bytes taken.
    len: u64,
    /// Bytes gathered and not queued yet.
    gathered: Option<Gathered>,
    closed: bool,
}

struct Gathered {
    buf: Buf,
    len: usize,
}

struct Line {
    uploads: Arc<Uploads>,
    state: Mutex<State>,
    moved: Notify,
}

struct State {
    steps: VecDeque<Step>,
    /// Whether a worker is at it or will be.
    running: bool,
    /// None while a worker has it, and once it is closed.
    incoming: Option<Incoming>,
    /// The first failure; nothing is written after it.
    failed: Option<Error>,
    /// Bytes that the disk was told to begin with.
    begun: u64,
    /// Whether a worker is telling it.
    beginning: bool,
}

enum Step {
    Write(Bytes),
    Park,
    Commit(Digest, oneshot::Sender<Result<Arc<Layout>, Error>>),
    Abort(oneshot::Sender<Result<(), Error>>),
}

impl Step {
    fn lane(&self) -> Lane {
        match self {
            Self::Write(_) => Lane::Hash,
            Self::Park | Self::Commit(..) | Self::Abort(_) => Lane::Disk,
        }
    }
}

impl Writer {
    pub(crate) fn new(uploads: Arc<Uploads>, incoming: Incoming) -> Self {
        let (id, len) = (incoming.id(), incoming.len());
        let state = State {
            steps: VecDeque::new(),
            running: false,
            incoming: Some(incoming),
            failed: None,
            begun: len,
            beginning: false,
        };
        let line = Arc::new(Line { uploads, state: Mutex::new(state), moved: Notify::new() });
        Self { line, id, len, gathered: None, closed: false }
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) async fn write(&mut self, mut bytes: Bytes) -> Result<(), Error> {
        while !bytes.is_empty() {
            self.line.ready().await?;
            let gathered = match &mut self.gathered {
                Some(gathered) => gathered,
                None if bytes.len() >= CHUNK_LEN => {
                    let chunk = bytes.split_to(CHUNK_LEN);
                    self.len += CHUNK_LEN as u64;
                    self.line.push([Step::Write(chunk)]);
                    continue;
                }
                None => match self.line.uploads.pool.take(CHUNK_LEN) {
                    Some(buf) => self.gathered.insert(Gathered { buf, len: 0 }),
                    None => {
                        self.len += bytes.len() as u64;
                        self.line.push([Step::Write(bytes)]);
                        return Ok(());
                    }
                },
            };
            let take = bytes.len().min(CHUNK_LEN - gathered.len);
            gathered.buf[gathered.len..gathered.len + take].copy_from_slice(&bytes.split_to(take));
            gathered.len += take;
            self.len += take as u64;
            if gathered.len == CHUNK_LEN {
                let chunk = self.gather();
                self.line.push(chunk);
            }
        }
        Ok(())
    }

    fn gather(&mut self) -> Option<Step> {
        self.gathered.take().map(|Gathered { mut buf, len }| {
            buf.truncate(len);
            Step::Write(buf.freeze())
        })
    }

    pub(crate) async fn commit(mut self, expected: &Digest) -> Result<Arc<Layout>, Error> {
        let (sender, result) = oneshot::channel();
        let commit = Step::Commit(*expected, sender);
        self.close(commit);
        result.await.unwrap_or(Err(Error::Closed))
    }

    pub(crate) async fn abort(mut self) -> Result<(), Error> {
        let (sender, result) = oneshot::channel();
        self.gathered = None;
        self.close(Step::Abort(sender));
        result.await.unwrap_or(Err(Error::Closed))
    }

    fn close(&mut self, last: Step) {
        self.closed = true;
        let chunk = self.gather();
        self.line.push(chunk.into_iter().chain([last]));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.closed {
            self.line.uploads.store.leave_upload(self.id);
            self.close(Step::Park);
        }
    }
}

impl Line {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until there is room for a chunk.
    async fn ready(&self) -> Result<(), Error> {
        loop {
            let moved = self.moved.notified();
            {
                let mut state = self.state();
                if let Some(error) = state.failed.take() {
                    // The first to ask gets the cause; the line stays broken.
                    state.failed = Some(Error::UploadBroken);
                    return Err(error);
                }
                if state.steps.len() < CHUNKS_AHEAD {
                    return Ok(());
                }
            }
            moved.await;
        }
    }

    fn push(self: &Arc<Self>, steps: impl IntoIterator<Item = Step>) {
        let mut state = self.state();
        state.steps.extend(steps);
        let Some(lane) = state.steps.front().map(Step::lane).filter(|_| !state.running) else { return };
        state.running = true;
        drop(state);
        self.run_on(lane);
    }

    /// Has the threads of a lane go on with it.
    fn run_on(self: &Arc<Self>, lane: Lane) {
        let line = Arc::clone(self);
        // One task an upload at most, and uploads are bounded.
        if !self.uploads.workers.post(lane, move |store| line.turn(lane, store)) {
            let mut state = self.state();
            state.steps.clear();
            state.failed = Some(Error::Closed);
        }
    }

    /// Has the disk take what was written while the next bytes come, so that the sync at the commit is short. Nobody waits for it,
    /// and one at a time is told: a disk that does not keep up is not told more.
    fn begin_sync(self: &Arc<Self>, state: &mut State, incoming: &Incoming) {
        let (line, begin) = (Arc::clone(self), incoming.begin_sync(state.begun));
        let told = self.uploads.workers.start_call(Lane::Disk, move |_| {
            begin();
            line.state().beginning = false;
        });
        if told.is_ok() {
            state.begun = incoming.len();
            state.beginning = true;
        }
    }

    fn turn(self: &Arc<Self>, lane: Lane, store: &Store) {
        let _unwinding = Unwinding(self);
        loop {
            let mut state = self.state();
            let Some(step) = state.steps.pop_front_if(|step| step.lane() == lane) else {
                match state.steps.front().map(Step::lane) {
                    Some(other) => {
                        drop(state);
                        self.run_on(other);
                    }
                    None => state.running = false,
                }
                return;
            };
            let Some(mut incoming) = state.incoming.take() else {
                // Closed by an earlier step; there is none after it.
                state.running = false;
                return;
            };
            let failed = if matches!(step, Step::Commit(..)) { state.failed.take() } else { None };
            let broken = state.failed.is_some();
            drop(state);
            match step {
                Step::Write(bytes) => {
                    let written = if broken { Ok(()) } else { store.append_upload(&mut incoming, &bytes) };
                    let mut state = self.state();
                    if let Err(e) = written {
                        state.failed = Some(e.into());
                    } else if !state.beginning && incoming.len() - state.begun >= SYNC_STEP {
                        self.begin_sync(&mut state, &incoming);
                    }
                    state.incoming = Some(incoming);
                }
                Step::Park => {
                    store.park_upload(incoming);
                    self.uploads.parked.notify_waiters();
                }
                Step::Commit(expected, reply) => {
                    let result = match failed {
                        None => store.commit_upload(incoming, &expected).map_err(Error::from),
                        Some(cause) => store.drop_upload(incoming).map_err(Error::from).and(Err(cause)),
                    };
                    // Nobody may be waiting any more.
                    drop(reply.send(result));
                }
                Step::Abort(reply) => drop(reply.send(store.drop_upload(incoming).map_err(Error::from))),
            }
            self.moved.notify_waiters();
        }
    }
}

/// Ends the line of an upload whose step panicked, so that nobody waits for it.
struct Unwinding<'a>(&'a Line);

impl Drop for Unwinding<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut state = self.0.state();
            state.steps.clear();
            state.running = false;
            state.failed = Some(Error::UploadBroken);
            drop(state);
            self.0.moved.notify_waiters();
        }
    }
}
