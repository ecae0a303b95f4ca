//! The whole public interface of the engine: what the gateway may ask, and what the engine tells it.
//!
//! A [`Handle`] is cheap to clone and may be used from any thread and any async runtime. Commands cross to a shard or a
//! worker through bounded queues; bytes travel as owned buffers.

use crate::{
    arriving::Arriving,
    buf::Pool,
    disk::real::Real,
    housekeeper::{Housekeeper, unix_now},
    read,
    shard::command::Extent,
    shards::Shards,
    store::{self, PieceError, Store},
    upload::{Uploads, Writer},
    workers::{Lane, Workers},
};
use bytes::Bytes;
use peer_proto::{Algorithm, Digest, Layout, Namespace, PeerId, PieceIndex, wire::Zone};
use std::{
    io,
    net::SocketAddr,
    num::{NonZeroU64, NonZeroUsize},
    ops::Range,
    path::PathBuf,
    sync::Arc,
    thread,
    time::Duration,
};
use tokio::sync::{Notify, oneshot};
use uuid::Uuid;

/// Bytes of buffers for pieces under way, between shards, workers and readers.
const PIECE_BUFFERS: usize = 256 << 20;
/// Bytes of buffers in which uploads are gathered.
const UPLOAD_BUFFERS: usize = 64 << 20;

/// What an engine is started with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where blobs, partial downloads and uploads live. One file system.
    pub data_dir: PathBuf,
    /// Where peers reach this node; port 0 takes any.
    pub listen: SocketAddr,
    /// The address told to others, where it is not the one listened on.
    pub advertise: Option<SocketAddr>,
    /// The node's name; drawn at the first start and kept in `data_dir` where none is given.
    pub id: Option<PeerId>,
    /// Origins seed and do not download from agents.
    pub origin: bool,
    /// The network zone it is in, told to peers.
    pub zone: Zone,
    /// Shards, a thread each.
    pub shards: NonZeroUsize,
    /// Threads that hash and do file I/O for the shards.
    pub workers: NonZeroUsize,
    /// The I/O driver of the shards.
    pub driver: DriverChoice,
    /// Most bytes of blobs kept on disk; the least recently used unpinned go first. None: as the disk allows.
    pub quota: Option<NonZeroU64>,
    /// How received pieces are proven.
    pub proof: Proof,
    /// Serve from memory-mapped files. Off for file systems where mapping is unsafe.
    pub mmap: bool,
    /// How pieces that are in memory are sent.
    pub send: SendPath,
    /// Peer traffic limits.
    pub limits: Limits,
    /// How long a peer may be silent before its connection ends; [`conn::IDLE_MAX`](peer_proto::conn::IDLE_MAX) unless there is a
    /// reason. Sound peers may be silent for [`conn::PING_AFTER`](peer_proto::conn::PING_AFTER).
    pub peer_idle: Duration,
}

/// Peer traffic limits, bytes of pieces a second. None: as the network allows. Control messages are never held up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Received by the process.
    pub bytes_in_per_s: Option<NonZeroU64>,
    /// Sent by the process.
    pub bytes_out_per_s: Option<NonZeroU64>,
    /// Received from one peer.
    pub peer_in_per_s: Option<NonZeroU64>,
    /// Sent to one peer.
    pub peer_out_per_s: Option<NonZeroU64>,
    /// Received for downloads that a client waits for.
    pub foreground_in_per_s: Option<NonZeroU64>,
    /// Received for downloads that nobody waits for. Where the process's limit is met, they get what the others leave.
    pub background_in_per_s: Option<NonZeroU64>,
    /// Sent to peers for whose downloads a client waits, as they say themselves.
    pub foreground_out_per_s: Option<NonZeroU64>,
    /// Sent to peers for whose downloads nobody waits.
    pub background_out_per_s: Option<NonZeroU64>,
}

/// Which I/O driver shards run on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DriverChoice {
    /// io_uring, and epoll where the kernel or a seccomp profile refuses it.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// epoll.
    Epoll,
}

/// How the bytes of pieces that are in memory get to a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SendPath {
    /// As they lie in the page cache, without a copy (sendfile); by the mapping on a file system that cannot.
    #[default]
    Sendfile,
    /// From the file's mapping, with the kernel's one copy.
    Mapped,
}

/// What [`DriverChoice::Auto`] comes to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DriverHere {
    /// Whether it is io_uring; epoll otherwise.
    pub io_uring: bool,
    /// Why, in words.
    pub reason: String,
}

/// Which I/O driver an engine started by this thread would run on unless told.
pub fn driver_here() -> DriverHere {
    let (kind, reason) = crate::driver::monoio::Kind::available();
    DriverHere { io_uring: kind == crate::driver::monoio::Kind::IoUring, reason }
}

/// How a received piece is proven before it is shared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Proof {
    /// CRC-32 and the SHA-2 link: the default.
    #[default]
    Full,
    /// CRC-32 only, for trusted networks: the digest is left to the client.
    Crc,
}

/// A node to download from, as a tracker names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its name.
    pub id: PeerId,
    /// Where to dial.
    pub addr: SocketAddr,
    /// Whether it is an origin.
    pub origin: bool,
}

/// What the node has of a blob.
#[derive(Clone, Debug)]
pub enum Stat {
    /// Nothing.
    Absent,
    /// Some pieces, whether or not a download runs.
    Partial {
        /// Its layout.
        layout: Arc<Layout>,
        /// Proven bytes on disk.
        have: u64,
    },
    /// All of it, proven.
    Whole {
        /// Its layout.
        layout: Arc<Layout>,
    },
}

/// How urgent a download is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Class {
    /// Nobody waits: preheat, repair.
    Background,
    /// A client waits.
    Foreground,
}

/// Why the engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such blob here, whole or partial, and none being downloaded.
    #[error("blob {0} is not here")]
    NotFound(Digest),
    /// No upload with that id, or it was closed.
    #[error("upload is unknown")]
    UploadUnknown,
    /// The bytes are not the digest they were said to be.
    #[error("content has digest {actual}, expected {expected}")]
    Mismatch {
        /// What was asked for.
        expected: Digest,
        /// What arrived.
        actual: Box<Digest>,
    },
    /// The upload has another writer.
    #[error("upload has another writer")]
    UploadInUse,
    /// The upload failed at an earlier write; how, was said then. What it has can be learnt by resuming it.
    #[error("upload failed earlier")]
    UploadBroken,
    /// Longer than a blob may be.
    #[error("upload is longer than {} bytes", peer_proto::layout::LEN_MAX)]
    TooLong,
    /// A write that does not start where the upload ends.
    #[error("write at byte {got}, the upload has {expected}")]
    Offset {
        /// Bytes the upload has.
        expected: u64,
        /// Where the write wanted to start.
        got: u64,
    },
    /// The disk or the quota has no room for it.
    #[error("no space for {0} bytes")]
    NoSpace(u64),
    /// The download was stopped: evicted, or given up by its owner.
    #[error("download of {0} was stopped")]
    Stopped(Digest),
    /// No proven piece arrived for the time that the reader allows.
    #[error("no piece of {digest} arrived for {waited:?}")]
    Stalled {
        /// The blob.
        digest: Digest,
        /// How long.
        waited: Duration,
    },
    /// The blob is pinned.
    #[error("blob {0} is pinned")]
    Pinned(Digest),
    /// The blob is being downloaded by another layout.
    #[error("blob {0} is being downloaded by another layout")]
    LayoutDiffers(Digest),
    /// A wrong byte was found on disk. The blob is in quarantine, so that from now on it is absent.
    #[error("blob {digest} was damaged on disk: {reason}")]
    Damaged {
        /// The blob.
        digest: Digest,
        /// What was found.
        reason: String,
    },
    /// Bytes that are not the piece they were said to be.
    #[error("piece {piece} of {digest} is wrong")]
    WrongPiece {
        /// The blob.
        digest: Digest,
        /// The piece.
        piece: PieceIndex,
    },
    /// A queue or table is full; try again.
    #[error("busy: {0} is full")]
    Busy(&'static str),
    /// Two independent peers sent the same bytes for a piece that the layout calls wrong: compare it with another origin's,
    /// then ask for the download again, or stop it and start with the right one.
    #[error("layout of {0} is in doubt")]
    Suspect(Digest),
    /// The range is not within the blob.
    #[error("range is not within the blob's {0} bytes")]
    Range(u64),
    /// The address for peers cannot be listened on.
    #[error("listen on {addr} for peers: {error}; does another node run here, or should peers have another address?")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why not.
        error: io::Error,
    },
    /// The disk failed.
    #[error("disk: {0}")]
    Disk(#[from] io::Error),
    /// The engine is shutting down.
    #[error("shutting down")]
    Closed,
}

impl From<store::Error> for Error {
    fn from(e: store::Error) -> Self {
        use store::Error as Store;
        match e {
            Store::NoSpace(bytes) => Self::NoSpace(bytes),
            Store::Busy(what) => Self::Busy(what),
            Store::Pinned(digest) => Self::Pinned(digest),
            Store::LayoutDiffers(digest) => Self::LayoutDiffers(digest),
            Store::Incomplete(digest) => Self::NotFound(digest),
            Store::Gone(digest) => Self::Stopped(digest),
            Store::Damaged { digest, reason } => Self::Damaged { digest, reason },
            Store::UploadUnknown => Self::UploadUnknown,
            Store::UploadInUse | Store::UploadLeaving => Self::UploadInUse,
            Store::TooLong => Self::TooLong,
            Store::Mismatch { expected, actual } => Self::Mismatch { expected, actual },
            Store::Disk(e) => Self::Disk(e),
        }
    }
}

/// Something the gateway has to act on. Notices about one blob are merged while nobody reads them, so the queue is bounded by
/// the number of active blobs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notice {
    /// The blob.
    pub digest: Digest,
    /// The namespace it was asked under.
    pub namespace: Namespace,
    /// Pieces here and proven.
    pub have: u32,
    /// Pieces in all.
    pub pieces: u32,
    /// What is wanted.
    pub state: Active,
}

/// What a blob on this node wants of its swarm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Active {
    /// Being downloaded; could use this many more peers.
    Leeching {
        /// Open slots.
        want: u16,
    },
    /// Whole and worth announcing.
    Seeding,
    /// Neither: evicted, or the download stopped.
    Gone,
}

/// The engine, as everybody else sees it.
#[derive(Clone)]
pub struct Handle {
    inner: Arc<Inner>,
}

struct Inner {
    id: PeerId,
    peer_addr: SocketAddr,
    store: Arc<Store>,
    workers: Arc<Workers>,
    uploads: Arc<Uploads>,
    housekeeper: Housekeeper,
    shards: Arc<Shards>,
}

impl Handle {
    /// The node's name among peers.
    pub fn id(&self) -> PeerId {
        self.inner.id
    }

    /// Where peers reach this node: the advertised address, or the one bound.
    pub fn peer_addr(&self) -> SocketAddr {
        self.inner.peer_addr
    }

    /// What is here of a blob.
    pub async fn stat(&self, digest: &Digest) -> Result<Stat, Error> {
        if let Some(blob) = self.inner.store.opened(digest) {
            return Ok(blob.stat());
        }
        if self.knows_absent(digest) {
            return Ok(Stat::Absent);
        }
        let digest = *digest;
        Ok(self.inner.workers.call(move |store| store.stat(&digest)).await??)
    }

    /// Starts a download, or joins the one that runs and raises its class. Returns once space is reserved; the bytes are read
    /// by [`Self::read`], their end awaited by [`Self::wait`]. A no-op where the blob is whole.
    pub async fn download(&self, namespace: Namespace, layout: Arc<Layout>, class: Class) -> Result<(), Error> {
        self.inner.shards.download(namespace, layout, class, Extent::Whole).await
    }

    /// Opens a range of a blob, whether or not it is here: as [`Self::read`], with what is missing of the range downloaded, and
    /// no more than that unless a download of the whole blob runs, or more than a [`WHOLE_SHARE`](peer_proto::swarm::WHOLE_SHARE)th of it is here or was asked for.
    pub async fn open(&self, namespace: Namespace, layout: Arc<Layout>, range: Range<u64>) -> Result<Reader, Error> {
        let digest = *layout.digest();
        let length = layout.length();
        if range.start > range.end || range.end > length {
            return Err(Error::Range(length));
        }
        if let Some(blob) = self.blob(&digest).await? {
            // All of a blob is not here before its name is.
            let here = range != (0..length) && blob.pieces().covers(range.clone());
            if blob.is_whole() || here {
                return Ok(self.read_whole(blob, range));
            }
        }
        self.inner.shards.download(namespace, layout, Class::Foreground, Extent::Ranges).await?;
        self.read(&digest, range).await
    }

    /// Whether bytes of a blob are here, without asking the disk: false of a blob that nobody has opened.
    pub fn has(&self, digest: &Digest, range: Range<u64>) -> bool {
        self.inner.store.opened(digest).is_some_and(|blob| blob.is_whole() || blob.pieces().covers(range))
    }

    /// Takes a piece of a blob being downloaded that came by another way than from a peer. Proven and stored like any other;
    /// readers have it when this returns. False where it was here already.
    pub async fn supply(&self, digest: &Digest, piece: PieceIndex, bytes: Bytes) -> Result<bool, Error> {
        let blob = self.blob(digest).await?.ok_or(Error::NotFound(*digest))?;
        if blob.is_whole() || blob.pieces().has(piece) {
            return Ok(false);
        }
        let (own, content) = (Arc::clone(&blob), bytes.clone());
        let put = self.inner.workers.start_call(Lane::Hash, move |store| store.put(&own, piece, &content))?;
        let put = put.await.map_err(|_| Error::Closed)?;
        let fresh = put.map_err(|e| match e {
            PieceError::Proof(_) => Error::WrongPiece { digest: *digest, piece },
            PieceError::Gone => Error::Stopped(*digest),
            PieceError::Disk(e) => Error::Disk(e),
        })?;
        // The twin of one that is on its way to the disk is told of when it is there.
        if fresh {
            self.inner.shards.supplied(*digest, piece, bytes).await?;
        }
        Ok(fresh)
    }

    /// Until the blob is whole, proven and durable under its name.
    pub async fn wait(&self, digest: &Digest) -> Result<(), Error> {
        match self.inner.shards.wait(*digest).await {
            // Not under way: done before, or never begun.
            Err(Error::NotFound(_)) if matches!(self.stat(digest).await?, Stat::Whole { .. }) => Ok(()),
            result => result,
        }
    }

    /// Stops a download and forgets its pieces.
    pub async fn stop(&self, digest: &Digest) -> Result<(), Error> {
        let downloading = self.inner.shards.forget(*digest).await?;
        if downloading || matches!(self.stat(digest).await?, Stat::Partial { .. }) {
            let digest = *digest;
            self.inner.workers.call(move |store| store.evict(&digest)).await??;
        }
        Ok(())
    }

    /// Peers a tracker named for a blob being downloaded.
    pub fn peers(&self, digest: &Digest, peers: Vec<Peer>) {
        self.inner.shards.peers(*digest, peers);
    }

    /// Reads bytes of a blob that is whole or being downloaded; in the latter case its pieces are wanted first, in order.
    /// Dropping the reader ends that wish. A reader of the whole blob gets its last piece only once every link of the digest's
    /// chain holds, so that no wrong blob ever ends cleanly.
    pub async fn read(&self, digest: &Digest, range: Range<u64>) -> Result<Reader, Error> {
        let blob = self.blob(digest).await?.ok_or(Error::NotFound(*digest))?;
        let length = blob.layout().length();
        if range.start > range.end || range.end > length {
            return Err(Error::Range(length));
        }
        if blob.is_whole() {
            return Ok(self.read_whole(blob, range));
        }
        let alive = Arc::new(());
        match self.inner.shards.read(*digest, range.clone(), Arc::downgrade(&alive)).await {
            Ok(reading) => {
                let (shards, workers) = (Arc::clone(&self.inner.shards), Arc::clone(&self.inner.workers));
                Ok(Reader { source: Source::Arriving(Arriving::new(shards, workers, reading, alive, range)) })
            }
            // It may have become whole since we looked.
            Err(Error::NotFound(_)) => match self.inner.store.opened(digest).filter(|blob| blob.is_whole()) {
                Some(blob) => Ok(self.read_whole(blob, range)),
                None => Err(Error::NotFound(*digest)),
            },
            Err(e) => Err(e),
        }
    }

    /// What is here of a blob.
    async fn blob(&self, digest: &Digest) -> Result<Option<Arc<store::Blob>>, Error> {
        match self.inner.store.opened(digest) {
            Some(blob) => Ok(Some(blob)),
            None if self.knows_absent(digest) => Ok(None),
            None => {
                let digest = *digest;
                Ok(self.inner.workers.call(move |store| store.blob(&digest)).await??)
            }
        }
    }

    fn knows_absent(&self, digest: &Digest) -> bool {
        !self.inner.workers.is_stopped() && self.inner.store.knows_absent(digest)
    }

    fn read_whole(&self, blob: Arc<store::Blob>, range: Range<u64>) -> Reader {
        Reader { source: Source::Whole(read::Whole::new(Arc::clone(&self.inner.workers), blob, range)) }
    }

    /// Opens an upload. `size` reserves space, so that a full disk is refused here.
    pub async fn upload(&self, algorithm: Algorithm, size: Option<u64>) -> Result<Upload, Error> {
        let id = Uuid::new_v4();
        let incoming = self.inner.workers.call(move |store| store.create_upload(id, algorithm, size)).await??;
        Ok(Upload::new(&self.inner.uploads, incoming))
    }

    /// Takes up an upload by its id, also after a restart: what was written and survived is kept.
    pub async fn resume(&self, id: &str) -> Result<Upload, Error> {
        let id: Uuid = id.parse().map_err(|_| Error::UploadUnknown)?;
        loop {
            let parked = self.inner.uploads.parked.notified();
            match self.inner.workers.call(move |store| store.resume_upload(id)).await? {
                Ok(incoming) => return Ok(Upload::new(&self.inner.uploads, incoming)),
                // Its last writer has just gone; what it wrote last is on its way to the disk.
                Err(store::Error::UploadLeaving) => parked.await,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Keeps a blob from eviction until [`Self::unpin`]; survives a restart. The blob need not be here yet.
    pub async fn pin(&self, digest: &Digest) -> Result<(), Error> {
        let digest = *digest;
        Ok(self.inner.workers.call(move |store| store.pin(&digest)).await??)
    }

    /// Lets a blob be evicted again.
    pub async fn unpin(&self, digest: &Digest) -> Result<(), Error> {
        let digest = *digest;
        Ok(self.inner.workers.call(move |store| store.unpin(&digest)).await??)
    }

    /// Deletes a blob or stops its download; a pinned one is refused. False where nothing was here.
    pub async fn evict(&self, digest: &Digest) -> Result<bool, Error> {
        let digest = *digest;
        let namespace = self.inner.store.opened(&digest).and_then(|blob| blob.namespace().cloned());
        let evicted = self.inner.workers.call(move |store| store.evict(&digest)).await??;
        let stopped = self.inner.shards.forget(digest).await?;
        if let Some(namespace) = namespace {
            self.inner.shards.notify(Notice { digest, namespace, have: 0, pieces: 0, state: Active::Gone });
        }
        Ok(evicted || stopped)
    }

    /// Whole blobs, `after` a digest in digest order, at most `limit`.
    pub async fn list(&self, after: Option<Digest>, limit: usize) -> Result<Vec<Entry>, Error> {
        Ok(self.inner.workers.call(move |store| store.list(after.as_ref(), limit)).await??)
    }

    /// The next notice; none once the engine is closed. For one reader.
    pub async fn notice(&self) -> Option<Notice> {
        self.inner.shards.notices().next().await
    }

    /// Counters and gauges, by name, summed over shards.
    pub fn metrics(&self) -> Vec<Metric> {
        let mut metrics = self.inner.store.metrics();
        metrics.extend(self.inner.workers.metrics());
        metrics.extend(self.inner.shards.metrics());
        metrics
    }

    /// Whether every shard and worker still turns: each answers within `timeout`.
    pub async fn probe(&self, timeout: Duration) -> Result<(), Error> {
        self.inner.shards.probe(timeout).await
    }

    /// Stops taking requests, lets sends in flight end for at most `drain`, then stops the threads.
    pub async fn shutdown(&self, drain: Duration) {
        self.inner.shards.stop(drain).await;
        let (stopped, done) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        // Waiting for threads blocks, and this may be an async runtime's only one.
        let waiter = thread::Builder::new().name("shoal-stop".to_owned()).spawn(move || {
            inner.workers.stop();
            inner.housekeeper.stop();
            // Before the caller goes on: it may want to open the directory again.
            drop(inner);
            // Nobody may be waiting any more.
            stopped.send(()).unwrap_or(());
        });
        match waiter {
            Ok(_) => drop(done.await),
            Err(error) => tracing::error!(%error, "no thread to stop the workers with; they end with the process"),
        }
    }
}

/// Starts an engine: its shards, its workers, its listener.
pub fn start(config: Config) -> Result<Handle, Error> {
    let disk = Arc::new(Real::open(&config.data_dir, config.mmap, config.send)?);
    let options = store::Options { quota: config.quota.map(NonZeroU64::get), proof: config.proof, boot: boot_id() };
    let store = Arc::new(Store::open(disk, options, Pool::new(PIECE_BUFFERS), unix_now())?);
    let id = match config.id {
        Some(id) => id,
        None => store.identity(draw_id)?,
    };
    let workers = Arc::new(Workers::start(config.workers, Arc::clone(&store))?);
    let uploads = Arc::new(Uploads {
        workers: Arc::clone(&workers),
        store: Arc::clone(&store),
        pool: Pool::new(UPLOAD_BUFFERS),
        parked: Notify::new(),
    });
    let housekeeper = Housekeeper::start(Arc::clone(&store))?;
    let seed = u64::from_le_bytes(*Uuid::new_v4().as_bytes().first_chunk().unwrap_or(&[0; 8]));
    let shards = Arc::new(Shards::start(&config, id, seed, store.pool(), &workers)?);
    let peer_addr = config.advertise.unwrap_or_else(|| shards.addr());
    Ok(Handle { inner: Arc::new(Inner { id, peer_addr, store, workers, uploads, housekeeper, shards }) })
}

/// The kernel's boot id. Where it is not told, an id that no other run has: nothing written before is trusted then.
fn boot_id() -> store::BootId {
    let told = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    told.ok().and_then(|text| text.trim().parse::<Uuid>().ok()).unwrap_or_else(Uuid::new_v4).into_bytes()
}

fn draw_id() -> PeerId {
    let mut bytes = [0; 20];
    let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
    bytes[..16].copy_from_slice(first.as_bytes());
    bytes[16..].copy_from_slice(&second.as_bytes()[..4]);
    PeerId::new(bytes)
}

/// A whole blob in the store.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub length: u64,
    /// Seconds since it was last read or written, at the time of the listing.
    pub idle: Duration,
    /// Whether it is pinned.
    pub pinned: bool,
}

/// One figure for `/metrics`.
#[derive(Clone, Debug)]
pub struct Metric {
    /// Name in Prometheus style, unit last, without the `shoal_` prefix.
    pub name: &'static str,
    /// What it counts.
    pub help: &'static str,
    /// A fixed label, where the name has several series.
    pub label: Option<(&'static str, &'static str)>,
    /// The figure.
    pub value: MetricValue,
}

impl Metric {
    pub(crate) fn counter(name: &'static str, help: &'static str, value: u64) -> Self {
        Self { name, help, label: None, value: MetricValue::Counter(value) }
    }

    pub(crate) fn gauge(name: &'static str, help: &'static str, value: u64) -> Self {
        let value = MetricValue::Gauge(i64::try_from(value).unwrap_or(i64::MAX));
        Self { name, help, label: None, value }
    }
}

/// A figure and its kind.
#[derive(Clone, Copy, Debug)]
pub enum MetricValue {
    /// Only grows.
    Counter(u64),
    /// Goes up and down.
    Gauge(i64),
}

/// Bytes of a blob as they are asked for, in order.
pub struct Reader {
    source: Source,
}

enum Source {
    Whole(read::Whole),
    Arriving(Arriving),
}

impl Reader {
    /// The next bytes, at most a piece; none at the end of the range. Waits for pieces that have not arrived, at most as long
    /// as [`Self::patience`] allows between two.
    pub async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        match &mut self.source {
            Source::Whole(whole) => whole.next().await,
            Source::Arriving(arriving) => arriving.next().await,
        }
    }

    /// Says that nobody but the kernel will look at the bytes: they go to a socket as they are, not even encrypted on the way. What is
    /// in memory then comes from the file's mapping, which saves a copy; a load by our own code would end the process where the
    /// disk fails under it.
    pub fn unseen(&mut self) {
        match &mut self.source {
            Source::Whole(whole) => whole.unseen(),
            Source::Arriving(arriving) => arriving.unseen(),
        }
    }

    /// The longest wait for one piece; 5 minutes unless set.
    pub fn patience(&mut self, wait: Duration) {
        if let Source::Arriving(arriving) = &mut self.source {
            arriving.patience(wait);
        }
    }
}

/// Bytes on their way in: from a client or a backend. Dropping it keeps what was written, for [`Handle::resume`].
pub struct Upload {
    id: String,
    algorithm: Algorithm,
    writer: Writer,
}

impl Upload {
    fn new(uploads: &Arc<Uploads>, incoming: store::Incoming) -> Self {
        let (id, algorithm) = (incoming.id().as_hyphenated().to_string(), incoming.algorithm());
        Self { id, algorithm, writer: Writer::new(Arc::clone(uploads), incoming) }
    }

    /// Its name, for [`Handle::resume`]: a UUID.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it is hashed by as it comes.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Bytes taken so far.
    pub fn len(&self) -> u64 {
        self.writer.len()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes the next bytes, at `offset`, which must be [`Self::len`]. Hashed as they go by. An error may be that of an
    /// earlier write, as the disk is not waited for.
    pub async fn write(&mut self, offset: u64, bytes: Bytes) -> Result<(), Error> {
        if offset != self.len() {
            return Err(Error::Offset { expected: self.len(), got: offset });
        }
        self.writer.write(bytes).await
    }

    /// Closes it under its digest: checked, synced, renamed, its directory synced; then the blob is whole. Any failure drops
    /// the upload. Where the blob is here already, that one is kept.
    pub async fn commit(self, expected: &Digest) -> Result<Arc<Layout>, Error> {
        self.writer.commit(expected).await
    }

    /// Drops what was written.
    pub async fn abort(self) -> Result<(), Error> {
        self.writer.abort().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peer_proto::LayoutBuilder;
    use std::path::Path;

    fn config(dir: &Path) -> Config {
        Config {
            data_dir: dir.to_owned(),
            listen: ([127, 0, 0, 1], 0).into(),
            advertise: None,
            id: None,
            origin: true,
            zone: Zone::NONE,
            shards: NonZeroUsize::MIN,
            workers: NonZeroUsize::new(2).unwrap(),
            driver: DriverChoice::Auto,
            quota: None,
            proof: Proof::Full,
            mmap: true,
            send: SendPath::default(),
            limits: Limits::default(),
            peer_idle: peer_proto::conn::IDLE_MAX,
        }
    }

    fn content(seed: u32, len: usize) -> Bytes {
        let mut x = seed | 1;
        let bytes = (0..len).map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        });
        bytes.collect()
    }

    fn digest(bytes: &[u8], algorithm: Algorithm) -> Digest {
        let mut builder = LayoutBuilder::new(algorithm);
        builder.update(bytes).unwrap();
        *builder.finish().digest()
    }

    async fn put(engine: &Handle, bytes: &Bytes, algorithm: Algorithm) -> Digest {
        let mut upload = engine.upload(algorithm, Some(bytes.len() as u64)).await.unwrap();
        for chunk in 0..bytes.len().div_ceil(70_000) {
            let part = bytes.slice(chunk * 70_000..bytes.len().min((chunk + 1) * 70_000));
            upload.write(upload.len(), part).await.unwrap();
        }
        let digest = digest(bytes, algorithm);
        assert_eq!(upload.commit(&digest).await.unwrap().digest(), &digest);
        digest
    }

    async fn get(engine: &Handle, digest: &Digest, range: Range<u64>) -> Result<Vec<u8>, Error> {
        let mut reader = engine.read(digest, range).await?;
        let mut out = Vec::new();
        while let Some(bytes) = reader.next().await {
            out.extend_from_slice(&bytes?);
        }
        Ok(out)
    }

    #[tokio::test]
    async fn what_was_committed_is_read_listed_pinned_evicted_and_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let engine = start(config(dir.path())).unwrap();
        let (big, small) = (content(1, (5 << 20) + 77), content(2, 100));
        let big_digest = put(&engine, &big, Algorithm::Sha256).await;
        let small_digest = put(&engine, &small, Algorithm::Sha512).await;
        let empty_digest = put(&engine, &Bytes::new(), Algorithm::Sha256).await;
        assert_eq!(put(&engine, &big, Algorithm::Sha256).await, big_digest, "again: the first is kept");
        let id = engine.id();
        engine.pin(&small_digest).await.unwrap();
        engine.shutdown(Duration::ZERO).await;
        assert!(matches!(engine.stat(&Digest::sha256([0; 32])).await, Err(Error::Closed)));
        drop(engine);

        let engine = start(config(dir.path())).unwrap();
        assert_eq!(engine.id(), id);
        assert!(matches!(engine.stat(&big_digest).await.unwrap(), Stat::Whole { .. }));
        assert!(matches!(engine.stat(&digest(b"?", Algorithm::Sha256)).await.unwrap(), Stat::Absent));
        assert_eq!(get(&engine, &big_digest, 0..big.len() as u64).await.unwrap(), big);
        assert_eq!(get(&engine, &big_digest, 1_048_570..2_097_160).await.unwrap(), big[1_048_570..2_097_160]);
        let mut reader = engine.read(&big_digest, 5..2_097_160).await.unwrap();
        reader.unseen();
        let mut out = Vec::new();
        while let Some(bytes) = reader.next().await {
            out.extend_from_slice(&bytes.unwrap());
        }
        assert!(out == big[5..2_097_160], "checked by an earlier read or not");
        assert_eq!(get(&engine, &empty_digest, 0..0).await.unwrap(), b"");
        assert!(matches!(get(&engine, &small_digest, 0..101).await, Err(Error::Range(100))));
        let reader = engine.read(&big_digest, 0..big.len() as u64).await.unwrap();
        assert!(matches!(engine.evict(&small_digest).await, Err(Error::Pinned(_))));
        engine.unpin(&small_digest).await.unwrap();
        assert!(engine.evict(&small_digest).await.unwrap());
        assert!(!engine.evict(&small_digest).await.unwrap());
        assert!(engine.evict(&big_digest).await.unwrap());
        let mut reader = reader;
        let mut left = 0;
        while let Some(bytes) = reader.next().await {
            left += bytes.unwrap().len();
        }
        assert_eq!(left, big.len(), "a reader outlives the deletion");
        assert!(matches!(get(&engine, &big_digest, 0..1).await, Err(Error::NotFound(_))));
        let listed = engine.list(None, 10).await.unwrap();
        assert_eq!(listed.iter().map(|entry| entry.digest).collect::<Vec<_>>(), [empty_digest]);
    }

    /// Whoever has asked for a blob and takes nothing more holds what was read for it; peers need the same buffers.
    #[tokio::test]
    async fn readers_that_stop_leave_buffers_to_others_and_hold_little() {
        let dir = tempfile::tempdir().unwrap();
        let engine = start(config(dir.path())).unwrap();
        let bytes = content(4, 3 << 20);
        let digest = put(&engine, &bytes, Algorithm::Sha256).await;
        let mut readers = Vec::new();
        let mut held = Vec::new();
        for _ in 0..300 {
            let mut reader = engine.read(&digest, 0..bytes.len() as u64).await.unwrap();
            held.push(reader.next().await.unwrap().unwrap());
            readers.push(reader);
        }
        assert_eq!(held[0].len(), 1 << 20, "a piece while there is room");
        assert!(held[299].len() <= 128 << 10, "{}", held[299].len());
        let lent = engine.metrics().into_iter().find(|metric| metric.name == "buffers_lent_bytes").unwrap();
        let MetricValue::Gauge(lent) = lent.value else { panic!("{lent:?}") };
        assert!(usize::try_from(lent).unwrap() <= PIECE_BUFFERS / 2 + (4 << 20), "{lent}");
        for (mut reader, first) in readers.into_iter().zip(held).step_by(99) {
            let mut got = first.to_vec();
            while let Some(part) = reader.next().await {
                got.extend_from_slice(&part.unwrap());
            }
            assert!(got == bytes);
        }
    }

    #[tokio::test]
    async fn an_upload_goes_on_after_its_writer_left_and_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let engine = start(config(dir.path())).unwrap();
        let bytes = content(3, (3 << 20) + 5);
        let mut upload = engine.upload(Algorithm::Sha256, None).await.unwrap();
        let id = upload.id().to_owned();
        upload.write(0, bytes.slice(..1_500_000)).await.unwrap();
        assert!(matches!(
            upload.write(0, Bytes::from_static(b"x")).await,
            Err(Error::Offset { expected: 1_500_000, got: 0 })
        ));
        assert!(matches!(engine.resume(&id).await, Err(Error::UploadInUse)), "two writers");
        drop(upload);
        let mut upload = engine.resume(&id).await.unwrap();
        assert_eq!(upload.len(), 1_500_000);
        upload.write(1_500_000, bytes.slice(1_500_000..2_000_000)).await.unwrap();
        drop(upload);
        engine.shutdown(Duration::ZERO).await;
        drop(engine);

        let engine = start(config(dir.path())).unwrap();
        let mut upload = engine.resume(&id).await.unwrap();
        assert_eq!(upload.len(), 2_000_000);
        upload.write(2_000_000, bytes.slice(2_000_000..)).await.unwrap();
        let digest = digest(&bytes, Algorithm::Sha512);
        upload.commit(&digest).await.unwrap();
        assert_eq!(get(&engine, &digest, 0..bytes.len() as u64).await.unwrap(), bytes);
        assert!(matches!(engine.resume(&id).await, Err(Error::UploadUnknown)));

        let mut upload = engine.upload(Algorithm::Sha256, Some(10)).await.unwrap();
        let id = upload.id().to_owned();
        upload.write(0, Bytes::from_static(b"no")).await.unwrap();
        assert!(matches!(upload.commit(&digest).await, Err(Error::Mismatch { .. })));
        assert!(matches!(engine.resume(&id).await, Err(Error::UploadUnknown)), "a mismatch drops it");
        let upload = engine.upload(Algorithm::Sha256, Some(10)).await.unwrap();
        let id = upload.id().to_owned();
        upload.abort().await.unwrap();
        assert!(matches!(engine.resume(&id).await, Err(Error::UploadUnknown)));
        assert!(matches!(engine.resume("../../etc").await, Err(Error::UploadUnknown)));
        assert_eq!(std::fs::read_dir(dir.path().join("upload")).unwrap().count(), 0);
    }
}
