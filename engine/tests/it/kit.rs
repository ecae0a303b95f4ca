//! Nodes to test with, and the words tests use of them.

use bytes::Bytes;
use engine::{
    Handle,
    handle::{Class, Config, DriverChoice, Limits, MetricValue, Peer, Proof, SendPath},
};
use peer_proto::{Algorithm, Layout, Namespace};
use std::{
    num::NonZeroUsize,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};
use tempfile::TempDir;

pub(crate) const MIB: usize = 1 << 20;
/// Longer than anything takes that is going to happen at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Tests that count the process's descriptors write, all others read.
static ALONE: RwLock<()> = RwLock::new(());

pub(crate) struct Node {
    pub(crate) handle: Handle,
    /// Removed with the node.
    _dir: Arc<TempDir>,
    pub(crate) origin: bool,
}

pub(crate) fn config(dir: &TempDir, driver: DriverChoice) -> Config {
    Config {
        data_dir: dir.path().to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        advertise: None,
        id: None,
        origin: false,
        zone: peer_proto::wire::Zone::NONE,
        shards: NonZeroUsize::new(2).unwrap(),
        workers: NonZeroUsize::new(2).unwrap(),
        driver,
        quota: None,
        proof: Proof::Full,
        mmap: true,
        send: SendPath::default(),
        limits: Limits::default(),
        peer_idle: peer_proto::conn::IDLE_MAX,
    }
}

impl Node {
    pub(crate) fn start(driver: DriverChoice, change: impl FnOnce(&mut Config)) -> Self {
        Self::start_in(Arc::new(TempDir::new().unwrap()), driver, change)
    }

    pub(crate) fn start_in(dir: Arc<TempDir>, driver: DriverChoice, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = config(&dir, driver);
        change(&mut config);
        let origin = config.origin;
        Self { handle: engine::start(config).unwrap(), _dir: dir, origin }
    }

    pub(crate) fn origin(driver: DriverChoice) -> Self {
        Self::start(driver, |config| config.origin = true)
    }

    pub(crate) fn agent(driver: DriverChoice) -> Self {
        Self::start(driver, |_| {})
    }

    pub(crate) fn peer(&self) -> Peer {
        Peer { id: self.handle.id(), addr: self.handle.peer_addr(), origin: self.origin }
    }

    /// Takes a blob in as a client's upload would.
    pub(crate) async fn put(&self, blob: &Bytes) -> Arc<Layout> {
        let mut upload = self.handle.upload(Algorithm::Sha256, Some(blob.len() as u64)).await.unwrap();
        let mut builder = peer_proto::LayoutBuilder::new(Algorithm::Sha256);
        for (at, chunk) in blob.chunks(MIB).enumerate() {
            builder.update(chunk).unwrap();
            upload.write((at * MIB) as u64, blob.slice_ref(chunk)).await.unwrap();
        }
        upload.commit(builder.finish().digest()).await.unwrap()
    }

    pub(crate) async fn download(&self, layout: &Arc<Layout>, from: &[&Self]) {
        self.handle.download(namespace(), layout.clone(), Class::Foreground).await.unwrap();
        self.handle.peers(layout.digest(), from.iter().map(|node| node.peer()).collect());
    }

    /// All bytes of a blob, by a reader.
    pub(crate) async fn read(&self, layout: &Layout) -> Vec<u8> {
        let mut reader = self.handle.read(layout.digest(), 0..layout.length()).await.unwrap();
        let mut bytes = Vec::new();
        while let Some(part) = timely(reader.next()).await {
            bytes.extend_from_slice(&part.unwrap());
        }
        bytes
    }

    /// The sum of all series of a metric.
    pub(crate) fn metric(&self, name: &str) -> i64 {
        let values = self.handle.metrics().into_iter().filter(|metric| metric.name == name);
        values
            .map(|metric| match metric.value {
                MetricValue::Counter(n) => i64::try_from(n).unwrap(),
                MetricValue::Gauge(n) => n,
            })
            .sum()
    }
}

pub(crate) fn namespace() -> Namespace {
    "lib/app".parse().unwrap()
}

/// Bytes without a pattern that a shifted or repeated piece would keep: a kibibyte of noise, numbered.
pub(crate) fn blob(len: usize, seed: u64) -> Bytes {
    let mut state = seed | 1;
    let noise: Vec<u8> = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(1016)
    .collect();
    let mut bytes = Vec::with_capacity(len + 1024);
    for number in 0..(len as u64).div_ceil(1024) {
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&noise);
    }
    bytes.truncate(len);
    bytes.into()
}

pub(crate) async fn timely<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("it never happened")
}

/// Comes back when the condition holds.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never came to be: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Runs a test in a runtime of its own: beside others, or alone where it counts what the whole process holds. The lock comes before
/// the runtime, whose own descriptors would be counted by a test that runs alone.
pub(crate) fn run(alone: bool, test: impl Future<Output = ()>) {
    let (_alone, _some);
    if alone {
        _alone = ALONE.write().unwrap_or_else(PoisonError::into_inner);
    } else {
        _some = ALONE.read().unwrap_or_else(PoisonError::into_inner);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(test);
}

/// Runs tests on both drivers.
macro_rules! on_both_drivers {
    (together { $($together:ident)* } alone { $($alone:ident)* }) => {
        on_both_drivers!(@ io_uring IoUring $(false $together)* $(true $alone)*);
        on_both_drivers!(@ epoll Epoll $(false $together)* $(true $alone)*);
    };
    (@ $module:ident $driver:ident $($only:literal $name:ident)*) => {
        mod $module {
            $(#[test]
            fn $name() {
                crate::kit::run($only, super::$name(engine::handle::DriverChoice::$driver));
            })*
        }
    };
}
pub(crate) use on_both_drivers;
