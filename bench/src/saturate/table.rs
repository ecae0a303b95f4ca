//! The table of the data path: what Shoal does beside what the machine can do, case by case.

use super::{
    child::{Latency, Role},
    compare::{Run, Runs, Turns, Warm},
    make_blob,
    node::{Seeder, forget_pages},
    programs::{Cluster, Nginx, SystemCalls, Watch},
};
use crate::rows::{self, Row};
use anyhow::Result;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Bytes of a blob that is read for its latency.
const SMALL_KIB: u64 = 64;
/// Connections of the `connections` case.
const MANY: usize = 1000;
/// What each of them takes, MiB: more than a connection needs to get going.
const MANY_MIB: u64 = 4;
/// Small blobs pulled in each run of `small`.
const SMALL_BLOBS: usize = 20;
/// How long hot reads are timed beside cold ones, milliseconds.
const BESIDE_MS: u64 = 1000;

/// A case of the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, clap::ValueEnum)]
pub(crate) enum Case {
    /// Serve a hot blob to 1, 8 and 64 connections: GB/s ÷ sendfile's.
    Serve,
    /// CPU of the serving process for each GB ÷ sendfile's.
    ServeCpu,
    /// Receive, CRC-32, write: GB/s ÷ a bare loop's.
    Receive,
    /// The same with the proof: GB/s ÷ the slower of the bare loop and SHA-256.
    ReceiveProof,
    /// From one node to another: GB/s ÷ nginx, curl and sha256sum.
    AgentToAgent,
    /// Cold through an agent's HTTP API: CPU for each GB ÷ the sum of the raw steps.
    Pull,
    /// A cold blob of 64 KiB through an agent, ms.
    Small,
    /// 1,000 connections ÷ 8.
    Connections,
    /// A blob that is on disk only: GB/s ÷ direct reads of the file.
    Cold,
    /// p99.9 of a hot read of 64 KiB while cold blobs are served, ms.
    HotBesideCold,
    /// epoll ÷ `io_uring`.
    Epoll,
    /// System calls of each end for each piece, beside those of the raw loops.
    Calls,
    /// Memory of an agent's own, idle and serving to 1,000 connections.
    Memory,
}

/// What the table is made of.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Bytes of the blob, MiB.
    #[arg(long, default_value_t = 1024)]
    blob_mib: u64,
    /// Lengths of pieces, MiB. What does not depend on them is measured once.
    #[arg(long, default_value = "1,4", value_delimiter = ',')]
    piece_mib: Vec<u32>,
    /// Counted runs of each side; one more warms up.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Where blobs are put; a folder below it is made and removed.
    #[arg(long, default_value = "/tmp")]
    dir: PathBuf,
    /// io-uring, epoll, or auto.
    #[arg(long, default_value = "auto")]
    driver: String,
    /// Only these cases.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Case>,
    /// The `shoal` to start for `pull` and `small`; the one beside this program unless given.
    #[arg(long)]
    shoal: Option<PathBuf>,
    /// Write rows of `case`, `ours`, `against`, `ratio` here.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Runs the cases and prints their table.
pub(crate) fn run(args: &Args) -> Result<()> {
    let dir = args.dir.join(format!("shoal-saturate-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let table = Table::new(args, &dir).and_then(|mut table| {
        let measured = table.measure();
        // What was measured until something went wrong is shown all the same.
        rows::show(&table.rows, args.json.as_deref())?;
        measured
    });
    fs::remove_dir_all(&dir)?;
    table
}

struct Table<'a> {
    args: &'a Args,
    dir: &'a Path,
    file: PathBuf,
    len: u64,
    turns: Turns,
    /// Cores of the side that serves, of the side that is served, and all of them.
    sender: Vec<usize>,
    receiver: Vec<usize>,
    all: Vec<usize>,
    /// Length of pieces in the present cases, MiB.
    piece_mib: u32,
    rows: Vec<Row>,
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(ToOwned::to_owned).into()
}

impl<'a> Table<'a> {
    fn new(args: &'a Args, dir: &'a Path) -> Result<Self> {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let all: Vec<usize> = (0..count).collect();
        let (sender, receiver) =
            if count < 2 { (all.clone(), all.clone()) } else { (all[..count / 2].to_vec(), all[count / 2..].to_vec()) };
        let file = dir.join("blob");
        make_blob(&file, args.blob_mib << 20, 1)?;
        let len = args.blob_mib << 20;
        let warm = Warm::new(dir.join("warm"), usize::try_from(len)?);
        let turns = Turns { runs: args.runs, warm };
        Ok(Self { args, dir, file, len, turns, sender, receiver, all, piece_mib: 1, rows: Vec::new() })
    }

    fn wants(&self, case: Case) -> bool {
        self.args.only.is_empty() || self.args.only.contains(&case)
    }

    fn measure(&mut self) -> Result<()> {
        for piece_mib in self.args.piece_mib.clone() {
            self.piece_mib = piece_mib;
            if self.wants(Case::Serve) || self.wants(Case::ServeCpu) {
                self.serve()?;
            }
            if self.wants(Case::Receive) || self.wants(Case::ReceiveProof) {
                self.receive()?;
            }
            if self.wants(Case::AgentToAgent) {
                self.agent_to_agent()?;
            }
            if self.wants(Case::Connections) {
                self.connections()?;
            }
            if self.wants(Case::Cold) {
                self.cold()?;
            }
            if self.wants(Case::Calls) {
                self.calls()?;
            }
        }
        self.piece_mib = 1;
        if self.wants(Case::HotBesideCold) {
            self.hot_beside_cold()?;
        }
        if self.wants(Case::Epoll) {
            self.epoll()?;
        }
        if self.wants(Case::Pull) || self.wants(Case::Small) || self.wants(Case::Memory) {
            self.cluster()?;
        }
        Ok(())
    }

    fn row(
        &mut self,
        case: &'static str,
        unit: &'static str,
        target: &'static str,
        ours: f64,
        against: f64,
        note: String,
    ) {
        let case = if self.piece_mib == 1 { case.to_owned() } else { format!("{case}, {} MiB", self.piece_mib) };
        self.rows.push(Row { case, ours, against, ratio: ours / against, unit, target, note });
    }

    fn node(&self, name: &str) -> Vec<String> {
        words(["--driver", &self.args.driver, "--data-dir", &self.dir.join(name).display().to_string()])
    }

    /// A node that seeds files, its one shard and one worker on these cores.
    fn seeder(&self, name: &str, cores: &[usize], files: &[&Path]) -> Result<(Role, Seeder)> {
        let mut args = self.node(&format!("{name}-{}", self.piece_mib));
        args.extend(words(["--workers", "1", "--piece-mib", &self.piece_mib.to_string()]));
        args.extend(files.iter().map(|file| file.display().to_string()));
        let role = Role::start(cores, "seed", &args)?;
        let told = Seeder::parse(&role.ready)?;
        Ok((role, told))
    }

    fn sendfile(&self, cores: &[usize]) -> Result<Role> {
        Role::start(cores, "sendfile-server", &words([&self.file.display().to_string()]))
    }

    /// `connections` that get `mib` each from a node, or one piece where that is more, and throw it away.
    fn peers(&self, told: &Seeder, blob: usize, connections: usize, mib: u64, more: &[&str]) -> Result<Role> {
        let pieces = (mib / u64::from(self.piece_mib)).max(1);
        let (connections, pieces) = (connections.to_string(), pieces.to_string());
        let mut args = words([&told.addr, &told.layouts[blob], "--connections", &connections, "--pieces", &pieces]);
        args.extend(more.iter().map(|word| (*word).to_owned()));
        Role::start(&self.receiver, "peer-client", &args)
    }

    fn serve(&mut self) -> Result<()> {
        let (mut seeder, told) = self.seeder("seeder", &self.sender, &[&self.file])?;
        let mut raw = self.sendfile(&self.sender)?;
        let (mut speed, mut cpu) = (Vec::new(), Vec::new());
        let (mut speed_notes, mut cpu_notes) = (Vec::new(), Vec::new());
        for connections in [1, 8, 64] {
            let mib = (2 * self.args.blob_mib / connections as u64).clamp(1, self.args.blob_mib);
            let name = format!("serve {connections}");
            let [ours, against] = self.turns.take_dry(&name, ["ours", "sendfile"], |side| {
                if side == 0 {
                    let mut client = self.peers(&told, 0, connections, mib, &[])?;
                    Run::together(&self.turns.warm, &mut seeder, &mut client)
                } else {
                    let client = words([&raw.ready, &connections.to_string(), &(mib << 20).to_string()]);
                    let mut client = Role::start(&self.receiver, "discard-client", &client)?;
                    Run::together(&self.turns.warm, &mut raw, &mut client)
                }
            })?;
            speed.push((connections, ours.median(Run::gb_per_s), against.median(Run::gb_per_s)));
            cpu.push((connections, ours.median(Run::sender_cpu), against.median(Run::sender_cpu)));
            speed_notes.push(format!("{connections}: {:.2} {}", ours.median(Run::gb_per_s), best(&ours, &against)));
            cpu_notes.push(format!(
                "{connections}: {}, both ends {:.2} against {:.2}",
                least(&ours, &against),
                ours.median(Run::cpu),
                against.median(Run::cpu)
            ));
        }
        // The table's figure is the worst of the three.
        let worst = |figures: &[(usize, f64, f64)], sign: f64| {
            figures.iter().copied().min_by(|a, b| (sign * a.1 / a.2).total_cmp(&(sign * b.1 / b.2))).unwrap_or_default()
        };
        let (_, ours, against) = worst(&speed, 1.0);
        self.row("serve", "GB/s", ">= 0.95", ours, against, speed_notes.join("; "));
        let (_, ours, against) = worst(&cpu, -1.0);
        self.row("serve-cpu", "CPU s/GB", "<= 1.10", ours, against, cpu_notes.join("; "));
        Ok(())
    }

    /// A node that is to pull the blob from a peer and read it as a client would.
    fn leecher(&self, cores: &[usize], told: &Seeder, more: &[&str]) -> Result<Role> {
        let mut args = self.node("leecher");
        args.extend(more.iter().map(|word| (*word).to_owned()));
        args.extend(words([&told.layouts[0], &told.addr, &told.id]));
        Role::start(cores, "leech", &args)
    }

    /// Has one do so.
    fn leech(&self, cores: &[usize], told: &Seeder, seeder: &mut Role, more: &[&str]) -> Result<Run> {
        let mut leecher = self.leecher(cores, told, more)?;
        let run = Run::together(&self.turns.warm, seeder, &mut leecher)?;
        drop(leecher);
        fs::remove_dir_all(self.dir.join("leecher"))?;
        Ok(run)
    }

    /// The bare loop, and the file that it is to write.
    fn receiver(&self, raw: &Role) -> Result<(PathBuf, Role)> {
        let file = self.dir.join("received");
        let args = words([&raw.ready, &self.len.to_string(), &file.display().to_string()]);
        let client = Role::start(&self.receiver, "receive-file", &args)?;
        Ok((file, client))
    }

    fn receive_raw(&self, raw: &mut Role) -> Result<Run> {
        let (file, mut client) = self.receiver(raw)?;
        let run = Run::together(&self.turns.warm, raw, &mut client)?;
        fs::remove_file(file)?;
        Ok(run)
    }

    fn hash(&self) -> Result<Run> {
        Ok(Run::alone(Role::start(&self.receiver, "hash", &words([&self.len.to_string()]))?.run()?))
    }

    fn receive(&mut self) -> Result<()> {
        let (mut seeder, told) = self.seeder("seeder", &self.sender, &[&self.file])?;
        let mut raw = self.sendfile(&self.sender)?;
        let names = ["crc", "proof", "recv-pwrite", "sha256"];
        let [crc, proof, bare, hash] = self.turns.take("receive", names, |side| match side {
            0 => self.leech(&self.receiver, &told, &mut seeder, &["--proof-crc", "--workers", "1"]),
            // The hash is to have a core of its own, and with two there is none left for the sender.
            1 => self.leech(self.proof_cores(), &told, &mut seeder, &[]),
            2 => self.receive_raw(&mut raw),
            _ => self.hash(),
        })?;
        let note = format!(
            "{}, receiver CPU s/GB {:.2} against {:.2}",
            best(&crc, &bare),
            crc.median(Run::receiver_cpu),
            bare.median(Run::receiver_cpu)
        );
        self.row("receive", "GB/s", ">= 0.90", crc.median(Run::gb_per_s), bare.median(Run::gb_per_s), note);
        let slower = if bare.median(Run::gb_per_s) < hash.median(Run::gb_per_s) { &bare } else { &hash };
        let note = format!("{}, receiver CPU s/GB {:.2}", best(&proof, slower), proof.median(Run::receiver_cpu));
        self.row("receive-proof", "GB/s", ">= 0.85", proof.median(Run::gb_per_s), slower.median(Run::gb_per_s), note);
        Ok(())
    }

    fn proof_cores(&self) -> &[usize] {
        if self.receiver.len() < 2 { &self.all } else { &self.receiver }
    }

    fn agent_to_agent(&mut self) -> Result<()> {
        let Some(binary) = Nginx::beside_curl() else {
            println!("agent-to-agent   left out: nginx or curl is not installed");
            return Ok(());
        };
        let nginx = Nginx::start(&binary, self.dir, self.dir)?;
        let (mut seeder, told) = self.seeder("seeder", &self.all, &[&self.file])?;
        let [ours, against] = self.turns.take("agent-to-agent", ["ours", "nginx+curl"], |side| {
            if side == 0 {
                self.leech(&self.all, &told, &mut seeder, &[])
            } else {
                self.turns.warm.release()?;
                nginx.fetch("blob", &self.dir.join("curled"), self.len)
            }
        })?;
        let note = format!("{}, CPU s/GB {:.2} both ends", best(&ours, &against), ours.median(Run::cpu));
        self.row("agent-to-agent", "GB/s", ">= 1.5", ours.median(Run::gb_per_s), against.median(Run::gb_per_s), note);
        Ok(())
    }

    fn connections(&mut self) -> Result<()> {
        let (mut seeder, told) = self.seeder("seeder", &self.sender, &[&self.file])?;
        let mut raw = self.sendfile(&self.sender)?;
        let [many, few, bare] = self.turns.take_dry("connections", ["1000", "8", "sendfile 1000"], |side| {
            if side == 2 {
                let client = words([&raw.ready, &MANY.to_string(), &(MANY_MIB << 20).to_string()]);
                let mut client = Role::start(&self.receiver, "discard-client", &client)?;
                return Run::together(&self.turns.warm, &mut raw, &mut client);
            }
            let all = MANY as u64 * MANY_MIB / 8;
            let (connections, mib) = if side == 0 { (MANY, MANY_MIB) } else { (8, all.min(self.args.blob_mib)) };
            let mut client = self.peers(&told, 0, connections, mib, &[])?;
            Run::together(&self.turns.warm, &mut seeder, &mut client)
        })?;
        let note = format!(
            "{}; CPU of the node {:.2} against {:.2}, its own memory with 1000 {:.0} MiB; sendfile to 1000: {:.2} GB/s",
            best(&many, &few),
            many.median(Run::sender_cpu),
            few.median(Run::sender_cpu),
            many.median(|run| mib(run.sender.anon)),
            bare.median(Run::gb_per_s)
        );
        self.row("connections", "GB/s", ">= 0.90", many.median(Run::gb_per_s), few.median(Run::gb_per_s), note);
        Ok(())
    }

    /// A node whose blobs are on disk only: started anew, for pages that a process has mapped stay.
    fn cold_seeder(&self, files: &[&Path]) -> Result<(Role, Seeder)> {
        drop(self.seeder("cold", &self.sender, files)?);
        let (seeder, told) = self.seeder("cold", &self.sender, files)?;
        forget_pages(&self.dir.join(format!("cold-{}", self.piece_mib)))?;
        Ok((seeder, told))
    }

    fn cold(&mut self) -> Result<()> {
        let [ours, against] = self.turns.take("cold", ["ours", "O_DIRECT"], |side| {
            if side == 0 {
                let (mut seeder, told) = self.cold_seeder(&[&self.file])?;
                let mut client = self.peers(&told, 0, 4, self.args.blob_mib / 4, &["--spread"])?;
                Run::together(&self.turns.warm, &mut seeder, &mut client)
            } else {
                let file = words([&self.file.display().to_string()]);
                Ok(Run::alone(Role::start(&self.sender, "direct-read", &file)?.run()?))
            }
        })?;
        let note = format!("{}, sender CPU s/GB {:.2}", best(&ours, &against), ours.median(Run::sender_cpu));
        self.row("cold", "GB/s", ">= 0.85", ours.median(Run::gb_per_s), against.median(Run::gb_per_s), note);
        Ok(())
    }

    fn calls(&mut self) -> Result<()> {
        if !SystemCalls::countable() {
            println!("calls            left out: perf is not installed, or may not count system calls");
            return Ok(());
        }
        let (mut seeder, told) = self.seeder("seeder", &self.sender, &[&self.file])?;
        let mut raw = self.sendfile(&self.sender)?;
        let pieces = self.len as f64 / f64::from(self.piece_mib << 20);
        let mut client = self.peers(&told, 0, 1, self.args.blob_mib, &[])?;
        let serve = SystemCalls::of(seeder.pid(), || Run::together(&self.turns.warm, &mut seeder, &mut client))?;
        drop(client);
        let sink = words([&raw.ready, "1", &self.len.to_string()]);
        let mut client = Role::start(&self.receiver, "discard-client", &sink)?;
        let sendfile = SystemCalls::of(raw.pid(), || Run::together(&self.turns.warm, &mut raw, &mut client))?;
        let note = "those of the node, against sendfile's".to_owned();
        self.row("calls-serve", "a piece", "given", serve as f64 / pieces, sendfile as f64 / pieces, note);
        let mut leecher = self.leecher(self.proof_cores(), &told, &[])?;
        let receive = SystemCalls::of(leecher.pid(), || Run::together(&self.turns.warm, &mut seeder, &mut leecher))?;
        drop(leecher);
        fs::remove_dir_all(self.dir.join("leecher"))?;
        let (file, mut client) = self.receiver(&raw)?;
        let bare = SystemCalls::of(client.pid(), || Run::together(&self.turns.warm, &mut raw, &mut client))?;
        fs::remove_file(file)?;
        let note = "with the proof, and a reader in the same process; against recv and pwrite of 1 MiB".to_owned();
        self.row("calls-receive", "a piece", "given", receive as f64 / pieces, bare as f64 / pieces, note);
        Ok(())
    }

    fn hot_beside_cold(&mut self) -> Result<()> {
        let small = self.dir.join("small");
        make_blob(&small, SMALL_KIB << 10, 2)?;
        let beside = BESIDE_MS.to_string();
        let hot = |told: &Seeder| self.peers(told, 1, 1, 1, &["--window", "1", "--ahead", "--for-ms", &beside]);
        let [alone, both] = self.turns.take("hot-beside-cold", ["alone", "beside cold"], |side| {
            let (mut seeder, told) = self.cold_seeder(&[&self.file, &small])?;
            // The first read brings it in.
            Run::together(&self.turns.warm, &mut seeder, &mut self.peers(&told, 1, 1, 1, &["--window", "1"])?)?;
            let mut hot = hot(&told)?;
            if side == 0 {
                return Run::together(&self.turns.warm, &mut seeder, &mut hot);
            }
            let mut cold = self.peers(&told, 0, 4, self.args.blob_mib / 4, &["--spread"])?;
            seeder.mark()?;
            cold.begin()?;
            let receiver = hot.run()?;
            let sender = seeder.report()?;
            let cold = Run::alone(cold.ran()?);
            println!("{:<16} cold beside it: {}", "", cold.line());
            Ok(Run { sender, receiver })
        })?;
        let p999 = |run: &Run| run.receiver.latency.unwrap_or_default().p999;
        let Latency { p50, p99, .. } = Latency {
            p50: both.median(|run| run.receiver.latency.unwrap_or_default().p50),
            p99: both.median(|run| run.receiver.latency.unwrap_or_default().p99),
            p999: 0.0,
        };
        let note = format!("ours beside cold, against alone; beside cold p50 {p50:.2}, p99 {p99:.2}");
        self.row("hot-beside-cold", "p99.9 ms", "ours < 5", both.median(p999), alone.median(p999), note);
        Ok(())
    }

    fn epoll(&mut self) -> Result<()> {
        let (mut seeder, told) = self.seeder("seeder", &self.sender, &[&self.file])?;
        let [epoll, ring] = self.turns.take("epoll", ["epoll", "io_uring"], |side| {
            let driver = if side == 0 { "epoll" } else { "io-uring" };
            let mut args = words(["--driver", driver, "--data-dir"]);
            args.push(self.dir.join("leecher").display().to_string());
            args.extend(words([&told.layouts[0], &told.addr, &told.id]));
            let mut leecher = Role::start(&self.all, "leech", &args)?;
            let run = Run::together(&self.turns.warm, &mut seeder, &mut leecher)?;
            drop(leecher);
            fs::remove_dir_all(self.dir.join("leecher"))?;
            Ok(run)
        })?;
        let note = format!(
            "receive with proof; {}, receiver CPU s/GB {:.2} against {:.2}",
            best(&epoll, &ring),
            epoll.median(Run::receiver_cpu),
            ring.median(Run::receiver_cpu)
        );
        self.row("epoll", "GB/s", "explained", epoll.median(Run::gb_per_s), ring.median(Run::gb_per_s), note);
        Ok(())
    }

    fn cluster(&mut self) -> Result<()> {
        let Some(shoal) = Cluster::binary(self.args.shoal.as_deref()) else {
            println!("pull, small      left out: there is no `shoal` beside this program; name one by --shoal");
            return Ok(());
        };
        let cluster = Cluster::start(&shoal, &self.dir.join("cluster"))?;
        if self.wants(Case::Memory) {
            self.memory(&cluster)?;
        }
        if self.wants(Case::Pull) {
            self.pull(&cluster)?;
        }
        if self.wants(Case::Small) {
            self.small(&cluster)?;
        }
        Ok(())
    }

    fn pull(&mut self, cluster: &Cluster) -> Result<()> {
        let digest = cluster.put(&self.file)?;
        let mut raw = self.sendfile(&self.sender)?;
        let names = ["ours", "recv-pwrite", "sha256", "sendfile"];
        let [ours, bare, hash, out] = self.turns.take("pull", names, |side| match side {
            0 => {
                self.turns.warm.release()?;
                let run = cluster.get(&digest)?;
                cluster.forget(&digest)?;
                Ok(run)
            }
            1 => self.receive_raw(&mut raw),
            2 => self.hash(),
            _ => {
                let client = words([&raw.ready, "1", &self.len.to_string()]);
                Run::together(&self.turns.warm, &mut raw, &mut Role::start(&self.receiver, "discard-client", &client)?)
            }
        })?;
        let steps = [
            ("sendfile", bare.median(Run::sender_cpu)),
            ("recv-pwrite", bare.median(Run::receiver_cpu)),
            ("sha256", hash.median(Run::receiver_cpu)),
            ("to the client", out.median(Run::sender_cpu)),
        ];
        let note = format!(
            "{:.2} GB/s, at best {:.2}; CPU s/GB agent {:.2} origin {:.2}; {}",
            ours.median(Run::gb_per_s),
            ours.extremes(Run::gb_per_s).1,
            ours.median(Run::receiver_cpu),
            ours.median(Run::sender_cpu),
            steps.map(|(name, cpu)| format!("{name} {cpu:.2}")).join(" + ")
        );
        let steps = steps.iter().map(|(_, cpu)| cpu).sum();
        self.row("pull", "CPU s/GB", "<= 1.15", ours.median(Run::cpu), steps, note);
        Ok(())
    }

    /// Of an agent that has done nothing yet, and at its most while it pulls the blob and then serves it to many.
    fn memory(&mut self, cluster: &Cluster) -> Result<()> {
        let idle = cluster.agent_anon()?;
        let digest = cluster.put(&self.file)?;
        let watch = Watch::start(cluster.agent_pid());
        cluster.get(&digest)?;
        let pulled = mib(watch.most()?);
        let layout = self.dir.join("layout");
        fs::write(&layout, cluster.layout(&digest)?)?;
        let told =
            Seeder { addr: cluster.agent_peer(), id: String::new(), layouts: vec![layout.display().to_string()] };
        let mut client = self.peers(&told, 0, MANY, 2, &[])?;
        let watch = Watch::start(cluster.agent_pid());
        client.run()?;
        let served = mib(watch.most()?);
        drop(client);
        cluster.forget(&digest)?;
        self.row("memory-idle", "MiB", "<= 24 MiB", mib(idle), 24.0, "anonymous memory of an agent".to_owned());
        let note = format!("pulling {pulled:.0}, serving to {MANY} connections {served:.0}");
        self.row("memory-busy", "MiB", "<= 96 MiB", pulled.max(served), 96.0, note);
        Ok(())
    }

    fn small(&mut self, cluster: &Cluster) -> Result<()> {
        let mut seed = 100;
        let mut put = |dir: &Path| {
            seed += 1;
            let file = dir.join("fresh");
            make_blob(&file, SMALL_KIB << 10, seed)?;
            cluster.put(&file)
        };
        let mut latencies = Vec::new();
        let digests = (0..SMALL_BLOBS * self.args.runs).map(|_| put(self.dir)).collect::<Result<Vec<_>>>()?;
        for digest in &digests {
            latencies.push(cluster.get(digest)?.receiver.wall_s);
        }
        let mut hot =
            digests.iter().map(|digest| Ok(cluster.get(digest)?.receiver.wall_s)).collect::<Result<Vec<_>>>()?;
        let ms = |samples: &mut Vec<f64>| {
            samples.sort_by(f64::total_cmp);
            let at = |percent: usize| samples.get(samples.len() * percent / 100).map_or(f64::NAN, |s| s * 1e3);
            (at(50), at(99))
        };
        let ((p50, p99), (hot, _)) = (ms(&mut latencies), ms(&mut hot));
        let note = format!("p50 cold, against hot; cold p99 {p99:.1}");
        self.row("small", "ms", "ours <= 3", p50, hot, note);
        Ok(())
    }
}

/// The ratio of the best runs of two sides, for a machine that others use as well: their load only ever makes a run slower.
fn best(ours: &Runs, against: &Runs) -> String {
    format!("best runs {:.2}", ours.extremes(Run::gb_per_s).1 / against.extremes(Run::gb_per_s).1)
}

/// As [`best`], of what costs least.
fn least(ours: &Runs, against: &Runs) -> String {
    format!("best runs {:.2}", ours.extremes(Run::sender_cpu).0 / against.extremes(Run::sender_cpu).0)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
