//! Shoal's ends: an engine that seeds a file, an engine that pulls it.

use super::child::{self, Moved};
use anyhow::{Context, Result, ensure};
use engine::{
    Handle,
    handle::{Class, Config, DriverChoice, Limits, Peer, Proof, SendPath, Stat},
};
use peer_proto::{Algorithm, Layout, LayoutBuilder, PeerId, wire::Zone};
use std::{
    fs,
    io::Read,
    net::SocketAddr,
    num::NonZeroUsize,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::runtime::{Builder, Runtime};

/// Longest stop of an engine.
const DRAIN: Duration = Duration::from_secs(5);
/// Bytes of a file hashed at once.
const CHUNK: usize = 1 << 20;

/// What one engine of a measurement is set to.
#[derive(Clone, clap::Args)]
pub(crate) struct Node {
    /// Where the engine keeps its blobs.
    #[arg(long)]
    data_dir: PathBuf,
    /// Shards of the engine.
    #[arg(long, default_value = "1")]
    shards: NonZeroUsize,
    /// Worker threads of the engine.
    #[arg(long, default_value = "2")]
    workers: NonZeroUsize,
    /// io-uring, epoll, or auto.
    #[arg(long, default_value = "auto", value_parser = driver)]
    driver: DriverChoice,
    /// Send pieces from their mappings, not by sendfile.
    #[arg(long)]
    send_mapped: bool,
    /// Prove pieces by CRC-32 only.
    #[arg(long)]
    proof_crc: bool,
}

/// How files are seeded.
#[derive(Clone, clap::Args)]
pub(crate) struct Seeding {
    #[command(flatten)]
    node: Node,
    /// Length of pieces, MiB.
    #[arg(long, default_value_t = 1)]
    piece_mib: u32,
    files: Vec<PathBuf>,
}

fn driver(text: &str) -> Result<DriverChoice, String> {
    match text {
        "auto" => Ok(DriverChoice::Auto),
        "io-uring" => Ok(DriverChoice::IoUring),
        "epoll" => Ok(DriverChoice::Epoll),
        _ => Err("one of auto, io-uring, epoll".to_owned()),
    }
}

impl Node {
    fn start(&self, origin: bool) -> Result<(Runtime, Handle)> {
        let handle = engine::start(Config {
            data_dir: self.data_dir.clone(),
            listen: "127.0.0.1:0".parse()?,
            advertise: None,
            id: None,
            origin,
            zone: Zone::NONE,
            shards: self.shards,
            workers: self.workers,
            driver: self.driver,
            quota: None,
            proof: if self.proof_crc { Proof::Crc } else { Proof::Full },
            mmap: true,
            send: if self.send_mapped { SendPath::Mapped } else { SendPath::Sendfile },
            limits: Limits::default(),
            peer_idle: peer_proto::conn::IDLE_MAX,
        })?;
        Ok((Builder::new_current_thread().enable_time().build()?, handle))
    }
}

/// Seeds files, taking in those that are not here from an earlier start; ready with `ADDR ID LAYOUT-FILE...`.
pub(crate) fn seed(Seeding { node, piece_mib, files }: &Seeding) -> Result<()> {
    let (runtime, handle) = node.start(false)?;
    let mut ready = format!("{} {}", handle.peer_addr(), handle.id());
    for (i, file) in files.iter().enumerate() {
        let beside = node.data_dir.with_extension(format!("layout-{i}"));
        let known = fs::read(&beside).ok().and_then(|bytes| Layout::decode(&bytes).ok());
        let here = match &known {
            Some(layout) => matches!(runtime.block_on(handle.stat(layout.digest()))?, Stat::Whole { .. }),
            None => false,
        };
        if !here {
            fs::write(&beside, runtime.block_on(take_in(&handle, file, piece_mib << 20))?.encode())?;
        }
        ready.push(' ');
        ready.push_str(&beside.display().to_string());
    }
    child::answer(&ready, || Ok(Moved::default()), || sent(&handle))?;
    runtime.block_on(handle.shutdown(DRAIN));
    Ok(())
}

/// Takes the pages of every file below `dir` out of memory, as far as nobody has them mapped.
pub(crate) fn forget_pages(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            forget_pages(&entry.path())?;
        } else if entry.file_type()?.is_file() {
            let file = fs::File::open(entry.path())?;
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}

/// As a download whose pieces come from a file: an upload's are as long as a blob of that length has them.
async fn take_in(handle: &Handle, path: &Path, piece_len: u32) -> Result<Arc<Layout>> {
    let mut hash = LayoutBuilder::new(Algorithm::Sha256);
    let mut file = fs::File::open(path)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            got => hash.update(&chunk[..got])?,
        }
    }
    let layout = Arc::new(hash.finish_in_pieces_of(piece_len).context("pieces of that length")?);
    handle.download("bench".parse()?, layout.clone(), Class::Background).await?;
    for piece in layout.geometry().all() {
        let mut bytes = vec![0; layout.geometry().piece_len(piece) as usize];
        file.read_exact_at(&mut bytes, layout.geometry().range(piece).start)?;
        handle.supply(layout.digest(), piece, bytes.into()).await?;
    }
    handle.wait(layout.digest()).await?;
    Ok(layout)
}

/// Pulls the blob of a layout from one peer, each `run` once; reads it like a client that discards it.
pub(crate) fn leech(node: &Node, layout: &Path, peer: SocketAddr, id: PeerId) -> Result<()> {
    let layout = Arc::new(Layout::decode(&fs::read(layout)?)?);
    let (runtime, handle) = node.start(false)?;
    let namespace: peer_proto::Namespace = "bench".parse()?;
    let run = || {
        runtime.block_on(async {
            handle.download(namespace.clone(), layout.clone(), Class::Foreground).await?;
            handle.peers(layout.digest(), vec![Peer { id, addr: peer, origin: false }]);
            let mut reader = handle.read(layout.digest(), 0..layout.length()).await?;
            let mut got = 0;
            while let Some(bytes) = reader.next().await {
                got += bytes?.len() as u64;
            }
            ensure!(got == layout.length(), "read {got} bytes of {}", layout.length());
            Ok(Moved::bytes(got))
        })
    };
    child::answer("", run, || received(&handle))?;
    runtime.block_on(handle.shutdown(DRAIN));
    Ok(())
}

fn sent(handle: &Handle) -> Moved {
    let calls = metric(handle, "sends_total") + metric(handle, "receives_total");
    Moved { bytes: metric(handle, "peer_sent_bytes_total"), calls, latency: None }
}

fn received(handle: &Handle) -> Moved {
    Moved { bytes: metric(handle, "peer_received_bytes_total"), ..sent(handle) }
}

fn metric(handle: &Handle, name: &str) -> u64 {
    let figures = handle.metrics().into_iter().filter(|metric| metric.name == name);
    let values = figures.map(|metric| match metric.value {
        engine::handle::MetricValue::Counter(value) => value,
        engine::handle::MetricValue::Gauge(value) => u64::try_from(value).unwrap_or(0),
    });
    values.sum()
}

/// What a seeder said when it was ready.
pub(crate) struct Seeder {
    /// Where it listens.
    pub(crate) addr: String,
    /// Its name.
    pub(crate) id: String,
    /// The layouts' files, in the order of the blobs' files.
    pub(crate) layouts: Vec<String>,
}

impl Seeder {
    /// Reads the ready line.
    pub(crate) fn parse(ready: &str) -> Result<Self> {
        let mut words = ready.split(' ').map(ToOwned::to_owned);
        let mut word = || words.next().with_context(|| format!("a seeder said {ready:?}"));
        Ok(Self { addr: word()?, id: word()?, layouts: words.collect() })
    }
}
