//! One node driven to its limit, beside the raw limits for the same bytes in the same run.
//!
//! Both ends are processes of their own, pinned apart where there are two cores. Runs alternate between ours and the raw one, so
//! that a machine whose speed drifts drifts for both; the table shows medians and the ratio of medians.

mod child;
mod node;
mod raw;

use anyhow::{Context, Result};
use child::{Role, Usage};
use peer_proto::PeerId;
use std::{
    fs::File,
    io::{BufWriter, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// `shoal-bench saturate`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Bytes of the blob, MiB.
    #[arg(long, default_value_t = 1024)]
    blob_mib: u64,
    /// Counted runs of each side; one more warms up.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Where blobs are put; a folder below it is made and removed.
    #[arg(long, default_value = "/tmp")]
    dir: PathBuf,
    /// io-uring, epoll, or auto.
    #[arg(long, default_value = "auto")]
    driver: String,
    /// Write rows of `case`, `ours`, `against`, `ratio` here.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// `shoal-bench role`: one end of a measurement; started by `saturate`, not by hand.
#[derive(clap::Args)]
pub(crate) struct RoleArgs {
    /// Cores to run on.
    #[arg(long, value_delimiter = ',')]
    cores: Vec<usize>,
    #[command(subcommand)]
    role: RoleName,
}

#[derive(clap::Subcommand)]
enum RoleName {
    SendfileServer {
        file: PathBuf,
    },
    DiscardClient {
        server: SocketAddr,
        connections: usize,
        len: u64,
    },
    Seed {
        #[command(flatten)]
        node: node::Node,
        file: PathBuf,
    },
    Leech {
        #[command(flatten)]
        node: node::Node,
        layout: PathBuf,
        peer: SocketAddr,
        id: PeerId,
    },
}

/// Runs one end.
pub(crate) fn role(args: &RoleArgs) -> Result<()> {
    let mut set = nix::sched::CpuSet::new();
    args.cores.iter().try_for_each(|core| set.set(*core))?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
    match &args.role {
        RoleName::SendfileServer { file } => raw::sendfile_server(file),
        RoleName::DiscardClient { server, connections, len } => raw::discard_client(*server, *connections, *len),
        RoleName::Seed { node, file } => node::seed(node, file),
        RoleName::Leech { node, layout, peer, id } => node::leech(node, layout, *peer, *id),
    }
}

/// Both ends of one run.
#[derive(Clone, Copy, serde::Serialize)]
struct Run {
    sender: Usage,
    receiver: Usage,
}

impl Run {
    fn gb(&self) -> f64 {
        giga(self.receiver.bytes)
    }

    fn gb_per_s(&self) -> f64 {
        self.gb() / self.receiver.wall_s
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn giga(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

#[derive(serde::Serialize)]
struct Row {
    case: &'static str,
    ours: f64,
    against: f64,
    ratio: f64,
}

/// Runs the cases and prints their table.
pub(crate) fn run(args: &Args) -> Result<()> {
    let dir = args.dir.join(format!("shoal-saturate-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let rows = cases(args, &dir);
    std::fs::remove_dir_all(&dir)?;
    let rows = rows?;
    println!("\n{:<28} {:>9} {:>9} {:>7}", "case", "ours", "raw", "ratio");
    for row in &rows {
        println!("{:<28} {:>9.3} {:>9.3} {:>7.3}", row.case, row.ours, row.against, row.ratio);
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&rows)?).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn cases(args: &Args, dir: &Path) -> Result<Vec<Row>> {
    let (sender, receiver) = cores();
    let file = dir.join("blob");
    let len = args.blob_mib << 20;
    make_blob(&file, len)?;
    let file = file.display().to_string();
    let mut seeder = Role::start(&sender, "seed", &seed_args(dir, &args.driver, &file))?;
    let told = node::Seeder::parse(&seeder.ready)?;
    let mut raw_server = Role::start(&sender, "sendfile-server", std::slice::from_ref(&file))?;
    let (mut ours, mut raw) = (Vec::new(), Vec::new());
    for i in 0..=args.runs {
        let data = dir.join("leecher");
        let words = [&told.layout, &told.addr, &told.id].map(Clone::clone);
        let node = ["--driver", &args.driver, "--data-dir", &data.display().to_string()].map(ToOwned::to_owned);
        let mut leecher = Role::start(&receiver, "leech", &[&node[..], &words].concat())?;
        let run = together(&mut seeder, &mut leecher)?;
        drop(leecher);
        std::fs::remove_dir_all(&data)?;
        let client = [raw_server.ready.clone(), "1".to_owned(), len.to_string()];
        let mut client = Role::start(&receiver, "discard-client", &client)?;
        let against = together(&mut raw_server, &mut client)?;
        let count = if i == 0 { "warm-up".to_owned() } else { format!("run {i}") };
        println!("{count:<8} ours {}   raw {}", line(&run), line(&against));
        if i > 0 {
            ours.push(run);
            raw.push(against);
        }
    }
    let row = |case, figure: fn(&Run) -> f64| {
        let (ours, against) = (median(&ours, figure), median(&raw, figure));
        Row { case, ours, against, ratio: ours / against }
    };
    Ok(vec![
        row("pull GB/s", Run::gb_per_s),
        row("pull sender CPU s/GB", |run| run.sender.cpu_s() / run.gb()),
        row("pull receiver CPU s/GB", |run| run.receiver.cpu_s() / run.gb()),
        row("pull both ends CPU s/GB", |run| (run.sender.cpu_s() + run.receiver.cpu_s()) / run.gb()),
    ])
}

fn seed_args(dir: &Path, driver: &str, file: &str) -> [String; 5] {
    let data = dir.join("seeder").display().to_string();
    ["--driver", driver, "--data-dir", &data, file].map(ToOwned::to_owned)
}

fn together(sender: &mut Role, receiver: &mut Role) -> Result<Run> {
    sender.mark()?;
    let receiver = receiver.run()?;
    Ok(Run { sender: sender.report()?, receiver })
}

fn line(run: &Run) -> String {
    format!(
        "{:.2} GB/s, CPU s/GB {:.2} + {:.2}, RSS {} + {} MiB",
        run.gb_per_s(),
        run.sender.cpu_s() / run.gb(),
        run.receiver.cpu_s() / run.gb(),
        run.sender.rss_max >> 20,
        run.receiver.rss_max >> 20
    )
}

fn median(runs: &[Run], figure: fn(&Run) -> f64) -> f64 {
    let mut values: Vec<f64> = runs.iter().map(figure).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One half of the machine for each end; both share the core where there is one.
fn cores() -> (Vec<usize>, Vec<usize>) {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let all: Vec<usize> = (0..count).collect();
    if count < 2 { (all.clone(), all) } else { (all[..count / 2].to_vec(), all[count / 2..].to_vec()) }
}

/// A file of `len` bytes that do not compress, written so that its pages are in memory.
pub(crate) fn make_blob(path: &Path, len: u64) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut chunk = vec![0; 1 << 20];
    let mut left = len;
    while left > 0 {
        for word in chunk.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_le_bytes();
        }
        let part = chunk.len().min(usize::try_from(left)?);
        out.write_all(&chunk[..part])?;
        left -= part as u64;
    }
    out.into_inner()?.sync_all()?;
    Ok(())
}
