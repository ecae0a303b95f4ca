//! All shards of an engine, as its handle uses them: started together, told what they are asked, stopped together.

use crate::{
    buf::Pool,
    driver::monoio::{self, Clock, Kind},
    handle::{Class, Config, DriverChoice, Error, Metric, MetricValue, Notice, Peer},
    inbox::{self, Refused},
    limit::Meters,
    net, raw,
    shard::{
        Core, Outbox, Setup,
        command::{Command, Extent, Reply},
        home,
        notices::Notices,
        read::Reading,
        stats::{self, Stats},
    },
    workers::Workers,
};
use bytes::Bytes;
use peer_proto::{Digest, Layout, Namespace, PeerId, PieceIndex, swarm::ReaderId};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::{
    io,
    net::SocketAddr,
    num::NonZeroU16,
    ops::Range,
    sync::{Arc, Mutex, PoisonError, Weak, atomic::AtomicUsize, mpsc},
    thread,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// How long a shard's turn on its core is to be, where workers and others want it as well: the shortest there is, so that it gets the
/// core when something comes and not when a worker has hashed and copied for its whole turn.
const SLICE_NANOS: u64 = 100_000;

/// The shards of one engine.
pub(crate) struct Shards {
    outboxes: Arc<[Arc<Outbox>]>,
    stats: Vec<Arc<Stats>>,
    notices: Arc<Notices>,
    addr: SocketAddr,
    kind: Kind,
    /// One for each shard that runs, resolved when it ends.
    ends: Mutex<Vec<oneshot::Receiver<()>>>,
}

impl Shards {
    /// Binds the address and starts a thread for each shard.
    pub(crate) fn start(
        config: &Config,
        id: PeerId,
        seed: u64,
        pool: &Pool,
        workers: &Arc<Workers>,
    ) -> Result<Self, Error> {
        let kind = choose(config.driver)?;
        let (addr, count) = (config.listen, config.shards.get());
        let listeners = net::listeners(addr, count, net::IN_USE_MAX).map_err(|error| Error::Listen { addr, error })?;
        let addr = listeners.first().map_or(Ok(config.listen), std::net::TcpListener::local_addr)?;
        let (mut outboxes, mut inboxes) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let (outbox, inbox) = inbox::inbox()?;
            outboxes.push(Arc::new(outbox));
            inboxes.push(inbox);
        }
        let mut shards = Self {
            outboxes: outboxes.into(),
            stats: Vec::new(),
            notices: Arc::default(),
            addr,
            kind,
            ends: Mutex::default(),
        };
        let setup = Setup {
            id,
            origin: config.origin,
            zone: config.zone,
            port: NonZeroU16::new(config.advertise.unwrap_or(addr).port()),
            peer_idle: config.peer_idle,
            index: 0,
            shards: count,
            seed,
            pool: pool.clone(),
            meters: Arc::new(Meters::new(config.limits)),
            notices: shards.notices.clone(),
            stats: Arc::default(),
            active: Arc::new(AtomicUsize::new(0)),
        };
        let (clock, cores) = (Clock::start(), cores(count));
        for (index, (inbox, listener)) in inboxes.into_iter().zip(listeners).enumerate() {
            let stats = Arc::new(Stats::default());
            shards.stats.push(stats.clone());
            let core = Core::new(Setup { index, seed: seed.wrapping_add(index as u64), stats, ..setup.clone() });
            let shard = monoio::Shard {
                core,
                inbox,
                listener,
                kind,
                clock,
                workers: workers.clone(),
                shards: shards.outboxes.clone(),
                index,
            };
            shards.spawn(shard, cores.get(index).copied())?;
        }
        tracing::info!(driver = shards.driver(), shards = count, %addr, "listening for peers");
        Ok(shards)
    }

    fn spawn(&self, shard: monoio::Shard, core: Option<usize>) -> io::Result<()> {
        let (started, has_started) = mpsc::channel();
        let (ended, end) = oneshot::channel();
        thread::Builder::new().name(format!("shoal-shard-{}", shard.index)).spawn(move || {
            if let Some(core) = core {
                pin(core);
            }
            if let Err(error) = raw::sched::set_slice(SLICE_NANOS) {
                tracing::warn!(%error, "shard has turns on its core as long as anybody's");
            }
            monoio::run(shard, |result| drop(started.send(result)));
            // Nobody may be waiting.
            let _ = ended.send(());
        })?;
        has_started.recv().map_err(io::Error::other)??;
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).push(end);
        Ok(())
    }

    /// The address that is listened on.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    fn driver(&self) -> &'static str {
        match self.kind {
            Kind::IoUring => "io_uring",
            Kind::Epoll => "epoll",
        }
    }

    fn home(&self, digest: &Digest) -> &Outbox {
        &self.outboxes[home(digest, self.outboxes.len())]
    }

    pub(crate) async fn download(
        &self,
        namespace: Namespace,
        layout: Arc<Layout>,
        class: Class,
        extent: Extent,
    ) -> Result<(), Error> {
        let outbox = self.home(layout.digest());
        ask(outbox, |reply| Command::Download { namespace, layout, class, extent, reply }).await
    }

    /// A piece is here that no peer sent.
    pub(crate) async fn supplied(&self, digest: Digest, piece: PieceIndex, bytes: Bytes) -> Result<(), Error> {
        let sent = self.home(&digest).send(Command::Supplied { digest, piece, bytes }).await;
        sent.map_err(|_| Error::Closed)
    }

    /// Until the download ends; [`Error::NotFound`] where there is none.
    pub(crate) async fn wait(&self, digest: Digest) -> Result<(), Error> {
        ask(self.home(&digest), |reply| Command::Wait { digest, reply }).await
    }

    /// Has every shard let go of a blob; whether it was being downloaded.
    pub(crate) async fn forget(&self, digest: Digest) -> Result<bool, Error> {
        let mut downloading = false;
        for outbox in self.outboxes.iter() {
            downloading |= ask(outbox, |reply| Command::Forget { digest, reply }).await?;
        }
        Ok(downloading)
    }

    pub(crate) fn peers(&self, digest: Digest, peers: Vec<Peer>) {
        if self.home(&digest).try_send(Command::Peers { digest, peers }) == Err(Refused::Full) {
            // The next announce names them again.
            tracing::warn!(%digest, "shard is too busy to hear of peers");
        }
    }

    pub(crate) async fn read(&self, digest: Digest, range: Range<u64>, alive: Weak<()>) -> Result<Reading, Error> {
        ask(self.home(&digest), |reply| Command::Read { digest, range, alive, reply }).await
    }

    pub(crate) async fn await_piece(
        &self,
        digest: Digest,
        reader: ReaderId,
        piece: u32,
        all: bool,
        patience: Duration,
    ) -> Result<Option<Bytes>, Error> {
        let command = |reply| Command::Await { digest, reader, piece, all, patience, reply };
        ask(self.home(&digest), command).await
    }

    pub(crate) fn notices(&self) -> &Notices {
        &self.notices
    }

    /// Tells of a blob what no shard knows.
    pub(crate) fn notify(&self, notice: Notice) {
        self.notices.put(notice);
    }

    pub(crate) fn metrics(&self) -> Vec<Metric> {
        let mut metrics = stats::metrics(&self.stats);
        metrics.extend(["io_uring", "epoll"].map(|name| Metric {
            name: "driver",
            help: "The I/O driver that shards run on.",
            label: Some(("kind", name)),
            value: MetricValue::Gauge(i64::from(name == self.driver())),
        }));
        metrics
    }

    /// Whether every shard answers within `timeout`. Waits on a thread of its own, for a caller's runtime may be what is stuck.
    pub(crate) async fn probe(&self, timeout: Duration) -> Result<(), Error> {
        let outboxes = self.outboxes.clone();
        let (sender, result) = oneshot::channel();
        thread::Builder::new().name("shoal-probe".to_owned()).spawn(move || {
            let until = Instant::now() + timeout;
            let answers: Option<Vec<_>> = outboxes
                .iter()
                .map(|outbox| {
                    let (reply, answer) = oneshot::channel();
                    outbox.try_send(Command::Probe { reply }).ok().map(|()| answer)
                })
                .collect();
            let alive = answers.is_some_and(|answers| answers.into_iter().all(|answer| answered(answer, until)));
            // The asker may be gone.
            let _ = sender.send(alive);
        })?;
        match result.await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::Busy("shard")),
            Err(_) => Err(Error::Closed),
        }
    }

    /// Stops every shard and waits until its thread has ended.
    pub(crate) async fn stop(&self, drain: Duration) {
        for outbox in self.outboxes.iter() {
            // One that is gone has stopped.
            let _ = outbox.send(Command::Stop { drain }).await;
        }
        let ends = std::mem::take(&mut *self.ends.lock().unwrap_or_else(PoisonError::into_inner));
        for end in ends {
            // Resolved with an error where the thread panicked, which ends it too.
            let _ = end.await;
        }
        self.notices.close();
    }
}

impl Drop for Shards {
    fn drop(&mut self) {
        for outbox in self.outboxes.iter() {
            // Full or gone, nothing better is to be had without waiting.
            let _ = outbox.try_send(Command::Stop { drain: Duration::ZERO });
        }
        self.notices.close();
    }
}

async fn ask<T>(outbox: &Outbox, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
    let (reply, answer) = oneshot::channel();
    outbox.send(command(reply)).await.map_err(|_| Error::Closed)?;
    answer.await.map_err(|_| Error::Closed)?
}

/// Whether the answer comes in time.
fn answered(mut answer: oneshot::Receiver<()>, until: Instant) -> bool {
    const STEP: Duration = Duration::from_millis(1);
    loop {
        match answer.try_recv() {
            Ok(()) => return true,
            Err(oneshot::error::TryRecvError::Empty) if Instant::now() < until => thread::sleep(STEP),
            Err(_) => return false,
        }
    }
}

fn choose(choice: DriverChoice) -> io::Result<Kind> {
    let (available, reason) = Kind::available();
    match choice {
        DriverChoice::Auto if available == Kind::Epoll => {
            tracing::warn!(reason, "no io_uring here: epoll it is");
            Ok(available)
        }
        DriverChoice::Auto => Ok(available),
        DriverChoice::Epoll => Ok(Kind::Epoll),
        DriverChoice::IoUring if available == Kind::IoUring => Ok(available),
        DriverChoice::IoUring => Err(io::Error::new(io::ErrorKind::Unsupported, reason)),
    }
}

/// The cores that shards are pinned to: one each, where there is one for each and no more. With fewer shards than cores the
/// kernel places them better, among the workers and other nodes of this machine.
fn cores(shards: usize) -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else { return Vec::new() };
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect();
    if shards > 1 && cores.len() == shards { cores } else { Vec::new() }
}

fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    if let Err(error) = sched_setaffinity(None, &set) {
        tracing::warn!(core, %error, "shard is not pinned to its core");
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        handle::{self, Class, Config, DriverChoice, Limits, Peer, Proof},
        raw::ring::tests::refuse,
        start,
    };
    use peer_proto::Algorithm;
    use std::{num::NonZeroUsize, time::Duration};
    use tempfile::TempDir;

    fn config(dir: &TempDir, driver: DriverChoice) -> Config {
        Config {
            data_dir: dir.path().to_owned(),
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise: None,
            id: None,
            origin: false,
            zone: peer_proto::wire::Zone::NONE,
            shards: NonZeroUsize::MIN,
            workers: NonZeroUsize::MIN,
            driver,
            quota: None,
            proof: Proof::Full,
            mmap: true,
            send: handle::SendPath::default(),
            limits: Limits::default(),
            peer_idle: peer_proto::conn::IDLE_MAX,
        }
    }

    #[test]
    fn under_a_filter_that_denies_io_uring_nodes_run_on_epoll() {
        // Threads inherit the filter from the one that starts them, and no other test's have it.
        let filtered = std::thread::spawn(|| {
            refuse(libc::SYS_io_uring_setup);
            assert!(!handle::driver_here().io_uring);
            let dirs = [(); 3].map(|()| TempDir::new().unwrap());
            assert!(
                start(config(&dirs[2], DriverChoice::IoUring)).is_err(),
                "io_uring was asked for, and nothing else"
            );
            let nodes = [0, 1].map(|n| start(config(&dirs[n], DriverChoice::Auto)).unwrap());
            a_blob_goes_between(&nodes, |node| {
                let drivers = node.metrics().into_iter().filter(|metric| metric.name == "driver");
                let epoll = drivers.filter(|driver| driver.label == Some(("kind", "epoll")));
                assert!(epoll.into_iter().all(|driver| matches!(driver.value, handle::MetricValue::Gauge(1))));
            });
        });
        filtered.join().unwrap();
    }

    #[test]
    fn under_a_filter_that_denies_sendfile_pieces_go_by_their_mappings() {
        let filtered = std::thread::spawn(|| {
            refuse(libc::SYS_sendfile);
            let dirs = [(); 2].map(|()| TempDir::new().unwrap());
            let nodes = dirs.each_ref().map(|dir| start(config(dir, DriverChoice::Auto)).unwrap());
            a_blob_goes_between(&nodes, |_| {});
        });
        filtered.join().unwrap();
    }

    fn a_blob_goes_between(nodes: &[handle::Handle; 2], check: impl Fn(&handle::Handle)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let blob: bytes::Bytes = (0..3_000_000_u32).map(|n| (n >> 8) as u8).collect();
            let mut hash = peer_proto::LayoutBuilder::new(Algorithm::Sha256);
            hash.update(&blob).unwrap();
            let mut upload = nodes[0].upload(Algorithm::Sha256, None).await.unwrap();
            upload.write(0, blob.clone()).await.unwrap();
            let layout = upload.commit(hash.finish().digest()).await.unwrap();
            let seeder = Peer { id: nodes[0].id(), addr: nodes[0].peer_addr(), origin: false };
            nodes[1].download("a".parse().unwrap(), layout.clone(), Class::Foreground).await.unwrap();
            nodes[1].peers(layout.digest(), vec![seeder]);
            tokio::time::timeout(Duration::from_secs(60), nodes[1].wait(layout.digest())).await.unwrap().unwrap();
            for node in nodes {
                check(node);
                node.shutdown(Duration::ZERO).await;
            }
        });
    }
}
