//! The whole public interface of the engine: what the gateway may ask, and what the engine tells it.
//!
//! A [`Handle`] is cheap to clone and may be used from any thread and any async runtime. Commands cross to a shard or a
//! worker through bounded queues; bytes travel as owned buffers.

use bytes::Bytes;
use peer_proto::{Algorithm, Digest, Layout, Namespace, PeerId};
use std::{
    net::SocketAddr,
    num::{NonZeroU64, NonZeroUsize},
    ops::Range,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

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
    /// Peer traffic limits.
    pub limits: Limits,
}

/// Peer traffic limits of the process, bytes a second. None: as the network allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Pieces received.
    pub bytes_in_per_s: Option<NonZeroU64>,
    /// Pieces sent.
    pub bytes_out_per_s: Option<NonZeroU64>,
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
    /// A queue or table is full; try again.
    #[error("busy: {0} is full")]
    Busy(&'static str),
    /// The range is not within the blob.
    #[error("range is not within the blob's {0} bytes")]
    Range(u64),
    /// The disk failed.
    #[error("disk: {0}")]
    Disk(#[from] std::io::Error),
    /// The engine is shutting down.
    #[error("shutting down")]
    Closed,
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
    _private: (),
}

impl Handle {
    /// The node's name among peers.
    pub fn id(&self) -> PeerId {
        unimplemented!()
    }

    /// Where peers reach this node: the advertised address, or the one bound.
    pub fn peer_addr(&self) -> SocketAddr {
        unimplemented!()
    }

    /// What is here of a blob.
    pub async fn stat(&self, digest: &Digest) -> Result<Stat, Error> {
        let _ = digest;
        unimplemented!()
    }

    /// Starts a download, or joins the one that runs and raises its class. Returns once space is reserved; the bytes are read
    /// by [`Self::read`], their end awaited by [`Self::wait`]. A no-op where the blob is whole.
    pub async fn download(&self, namespace: Namespace, layout: Arc<Layout>, class: Class) -> Result<(), Error> {
        let _ = (namespace, layout, class);
        unimplemented!()
    }

    /// Until the blob is whole, proven and durable under its name.
    pub async fn wait(&self, digest: &Digest) -> Result<(), Error> {
        let _ = digest;
        unimplemented!()
    }

    /// Stops a download and forgets its pieces.
    pub async fn stop(&self, digest: &Digest) -> Result<(), Error> {
        let _ = digest;
        unimplemented!()
    }

    /// Peers a tracker named for a blob being downloaded.
    pub fn peers(&self, digest: &Digest, peers: Vec<Peer>) {
        let _ = (digest, peers);
        unimplemented!()
    }

    /// Reads bytes of a blob that is whole or being downloaded; in the latter case its pieces are wanted first, in order.
    /// Dropping the reader ends that wish. A reader of the whole blob gets its last piece only once every link of the digest's
    /// chain holds, so that no wrong blob ever ends cleanly.
    pub async fn read(&self, digest: &Digest, range: Range<u64>) -> Result<Reader, Error> {
        let _ = (digest, range);
        unimplemented!()
    }

    /// Opens an upload. `size` reserves space, so that a full disk is refused here.
    pub async fn upload(&self, algorithm: Algorithm, size: Option<u64>) -> Result<Upload, Error> {
        let _ = (algorithm, size);
        unimplemented!()
    }

    /// Takes up an upload by its id, also after a restart: what was written and survived is kept.
    pub async fn resume(&self, id: &str) -> Result<Upload, Error> {
        let _ = id;
        unimplemented!()
    }

    /// Keeps a blob from eviction until [`Self::unpin`]; survives a restart.
    pub async fn pin(&self, digest: &Digest) -> Result<(), Error> {
        let _ = digest;
        unimplemented!()
    }

    /// Lets a blob be evicted again.
    pub async fn unpin(&self, digest: &Digest) -> Result<(), Error> {
        let _ = digest;
        unimplemented!()
    }

    /// Deletes a blob or stops its download. False where nothing was here.
    pub async fn evict(&self, digest: &Digest) -> Result<bool, Error> {
        let _ = digest;
        unimplemented!()
    }

    /// Whole blobs, `after` a digest in digest order, at most `limit`.
    pub async fn list(&self, after: Option<Digest>, limit: usize) -> Result<Vec<Entry>, Error> {
        let _ = (after, limit);
        unimplemented!()
    }

    /// The next notice; none once the engine is closed. For one reader.
    pub async fn notice(&self) -> Option<Notice> {
        unimplemented!()
    }

    /// Counters and gauges, by name, summed over shards.
    pub fn metrics(&self) -> Vec<Metric> {
        unimplemented!()
    }

    /// Whether every shard and worker still turns: each answers within `timeout`.
    pub async fn probe(&self, timeout: Duration) -> Result<(), Error> {
        let _ = timeout;
        unimplemented!()
    }

    /// Stops taking requests, lets sends in flight end for at most `drain`, then stops the threads.
    pub async fn shutdown(&self, drain: Duration) {
        let _ = drain;
        unimplemented!()
    }
}

/// Starts an engine: its shards, its workers, its listener.
pub fn start(config: Config) -> Result<Handle, Error> {
    let _ = config;
    unimplemented!()
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
    _private: (),
}

impl Reader {
    /// The next bytes, at most a piece; none at the end of the range. Waits for pieces that have not arrived, at most as long
    /// as [`Self::patience`] allows between two.
    pub async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        unimplemented!()
    }

    /// The longest wait for one piece; 5 minutes unless set.
    pub fn patience(&mut self, wait: Duration) {
        let _ = wait;
        unimplemented!()
    }
}

/// Bytes on their way in: from a client or a backend. Dropping it keeps what was written, for [`Handle::resume`].
pub struct Upload {
    _private: (),
}

impl Upload {
    /// Its name, for [`Handle::resume`]: a UUID.
    pub fn id(&self) -> &str {
        unimplemented!()
    }

    /// Bytes taken so far.
    pub fn len(&self) -> u64 {
        unimplemented!()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes the next bytes, at `offset`, which must be [`Self::len`]. Hashed as they go by.
    pub async fn write(&mut self, offset: u64, bytes: Bytes) -> Result<(), Error> {
        let _ = (offset, bytes);
        unimplemented!()
    }

    /// Closes it under its digest: checked, synced, renamed, its directory synced; then the blob is whole. A mismatch drops
    /// the upload. Where the blob is here already, that one is kept.
    pub async fn commit(self, expected: &Digest) -> Result<Arc<Layout>, Error> {
        let _ = expected;
        unimplemented!()
    }

    /// Drops what was written.
    pub async fn abort(self) -> Result<(), Error> {
        unimplemented!()
    }
}
