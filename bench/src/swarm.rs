//! `shoal-bench swarm`: real agents, origins and a tracker, each in a network namespace of its own behind shaped links, pull one
//! blob at once; and the same swarm in the simulator beside it.
//!
//! The outer process starts this program again in a network namespace of its own (`unshare --net`), which is the switch: a bridge,
//! and a shaped link to each host. Hosts are namespaces of single processes, without names: when the processes end, by whatever
//! end, the kernel takes links, bridge and namespaces away. The outer process removes the folder with the data.

mod client;
mod fabric;
mod hosts;
mod report;

use anyhow::{Context, Result, bail, ensure};
use fabric::Fabric;
use hosts::Cluster;
use report::Report;
use std::{
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::Duration,
};
use tokio::signal::unix::{SignalKind, signal};

/// The programs that are needed beside our own.
const TOOLS: [(&str, &str); 5] = [
    ("unshare", "util-linux"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
];

/// Runs a swarm of real processes behind shaped links on this machine, and the same swarm in the simulator. Needs root, iproute2 and
/// util-linux; leaves nothing behind.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Downloading hosts.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    hosts: u16,
    /// Origins, behind the same links.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=100))]
    origins: u16,
    /// Rate of each host's uplink and downlink on the wire, such as 1Gbit or 25MB/s. All hosts together must stay below what this
    /// machine's cores can carry, about 1 GB/s on two of them: the table shows how busy they were.
    #[arg(long, default_value = "200Mbit", value_parser = crate::sim::rate)]
    rate: u64,
    /// Length of the blob, such as 256MiB.
    #[arg(long, default_value = "256MiB", value_parser = crate::sim::size)]
    blob: u64,
    /// Seed of the simulated swarm.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The program under test; the one beside this one unless given.
    #[arg(long)]
    shoal: Option<PathBuf>,
    /// Where blobs and logs are put; a folder below it is made and removed.
    #[arg(long, default_value = "/tmp")]
    dir: PathBuf,
    /// Leave the folder with logs and configurations for a look at them.
    #[arg(long)]
    keep: bool,
    /// Write the figures as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// `shoal-bench inside`: parts of a swarm that run in a namespace; started by `swarm`, not by hand.
#[derive(clap::Args)]
pub(crate) struct InsideArgs {
    #[command(subcommand)]
    part: Part,
}

#[derive(clap::Subcommand)]
enum Part {
    /// The switch, and everything behind it.
    Switch {
        /// The folder for data.
        #[arg(long)]
        work: PathBuf,
        #[command(flatten)]
        args: Args,
    },
    /// A client of an agent, on the agent's host.
    Pull {
        /// The agent's blob API, `host:port`.
        server: String,
        /// Path and query.
        path: String,
        /// Length that must come.
        len: u64,
    },
    /// Sends to and receives from other hosts: what a link carries with nothing around it.
    Exchange {
        /// Whom to dial; others dial us.
        peers: Vec<std::net::Ipv4Addr>,
    },
}

/// Runs one part.
pub(crate) fn inside(args: &InsideArgs) -> Result<()> {
    match &args.part {
        Part::Switch { work, args } => {
            // A switch without its starter would run for nobody.
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)?;
            measure(args, work)
        }
        Part::Pull { server, path, len } => client::pull(server, path, *len),
        Part::Exchange { peers } => client::exchange(peers),
    }
}

/// Runs the swarm and prints its figures.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "network namespaces and shaped links need root: run it with sudo");
    for (tool, package) in TOOLS {
        ensure!(on_path(tool), "{tool} is not on the PATH: install {package}");
    }
    let shoal = program(args)?;
    let work = args.dir.join(format!("shoal-swarm-{}", std::process::id()));
    std::fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let ended = switch(args, &shoal, &work);
    if args.keep {
        println!("logs and configurations are in {}", work.display());
    } else {
        std::fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))?;
    }
    let status = ended?;
    if !status.success() {
        bail!("the swarm ended with {status}");
    }
    Ok(())
}

/// Starts the switch and outlives it, signals or not, so that the folder can be removed.
fn switch(args: &Args, shoal: &Path, work: &Path) -> Result<ExitStatus> {
    let mut command = Command::new("unshare");
    command.arg("--net").arg(std::env::current_exe()?).args(["inside", "switch", "--work"]).arg(work);
    for (flag, value) in [
        ("--hosts", args.hosts.to_string()),
        ("--origins", args.origins.to_string()),
        ("--rate", format!("{}B/s", args.rate)),
        ("--blob", args.blob.to_string()),
        ("--seed", args.seed.to_string()),
    ] {
        command.args([flag, &value]);
    }
    command.arg("--shoal").arg(shoal);
    if let Some(json) = &args.json {
        command.arg("--json").arg(json);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // A terminal's Ctrl-C reaches the switch, too, and SIGTERM is passed on by the end of this process's wait.
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let mut child = command.spawn().context("start unshare")?;
        let pid = nix::unistd::Pid::from_raw(child.id().try_into()?);
        let mut wait = tokio::task::spawn_blocking(move || child.wait());
        loop {
            tokio::select! {
                status = &mut wait => return Ok(status??),
                _ = interrupt.recv() => {}
                _ = terminate.recv() => nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?,
            }
        }
    })
}

fn on_path(tool: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()))
}

fn program(args: &Args) -> Result<PathBuf> {
    let path = match &args.shoal {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("shoal"),
    };
    path.canonicalize().with_context(|| {
        format!("{} is not there: build it (cargo build --release) or name it by --shoal", path.display())
    })
}

/// In the switch: starts everything, measures, prints.
fn measure(args: &Args, work: &Path) -> Result<()> {
    let mut fabric = Fabric::new(args.rate)?;
    eprintln!("starting a tracker, {} origins and {} agents", args.origins, args.hosts);
    let shoal = program(args)?;
    let mut cluster = Cluster::start(&mut fabric, &shoal, work, args.origins, args.hosts)?;
    let payload = cluster.link_payload_rate()?;
    eprintln!("links carry {:.2} MB/s of payload; storing the blob at the origins", report::mega(payload));
    let digest = cluster.seed(&shoal, work, args.blob)?;
    eprintln!("pulling {} MB on all hosts at once", args.blob / 1_000_000);
    let pulled = cluster.pull(&digest, args.blob)?;
    drop(cluster);
    let simulated = report::simulate(args, payload, work)?;
    let report = Report::new(args, payload, &pulled, simulated);
    print!("{}", report.text());
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Longest wait for anything that is not the measured pull itself.
const PATIENCE: Duration = Duration::from_secs(60);
