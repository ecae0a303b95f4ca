//! The thread that tells the store the time and has it look after itself.

use crate::store::{Error, Store};
use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

/// How often the store is looked after.
const TURN: Duration = Duration::from_secs(1);
/// How often the inventory is written to disk, where it changed.
const INDEX_EVERY: Duration = Duration::from_secs(300);
/// Seconds after which an upload that nobody writes to is dropped.
const UPLOAD_IDLE_S: u64 = 24 * 3600;

/// Runs until it is stopped or dropped.
pub(crate) struct Housekeeper {
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Housekeeper {
    pub(crate) fn start(store: Arc<Store>) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name("shoal-house".to_owned()).spawn(move || run(&store, &stopped))?;
        Ok(Self { stop, thread: Mutex::new(Some(thread)) })
    }

    /// Has it end its work and waits for that. Blocks.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Relaxed);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the housekeeper panicked");
            }
        }
    }
}

impl Drop for Housekeeper {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(store: &Store, stop: &AtomicBool) {
    let mut index_due = Instant::now() + INDEX_EVERY;
    while !stop.load(Relaxed) {
        store.tick(unix_now());
        log("idle uploads", store.expire_uploads(UPLOAD_IDLE_S).map(drop));
        // Where nothing is known of what is here, at once; to check what is known, by the way.
        let scanned = match store.scan() {
            Ok(true) if !store.is_inventoried() => continue,
            other => other,
        };
        log("scan", scanned.map(drop));
        store.enforce_quota();
        if Instant::now() >= index_due {
            index_due = Instant::now() + INDEX_EVERY;
            save_index(store);
        }
        thread::park_timeout(TURN);
    }
    save_index(store);
}

fn save_index(store: &Store) {
    if store.index_is_stale() {
        log("index", store.save_index().map_err(Error::from));
    }
}

fn log(what: &str, result: Result<(), Error>) {
    if let Err(error) = result {
        tracing::warn!(%error, what, "housekeeping failed, and will be tried again");
    }
}

pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
