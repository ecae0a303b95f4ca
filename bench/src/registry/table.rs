//! The cases.

use super::{
    Args,
    client::{Connection, load},
    servers::{Blob, Cluster, DockerRegistry, REPLICAS, REPOSITORY, blob_path, digest_of},
};
use crate::{
    rows::Row,
    saturate::{compare::Warm, make_blob, programs::Nginx},
};
use anyhow::{Result, ensure};
use std::{
    fs::{self, File},
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Bytes of the small blob.
const SMALL_LEN: usize = 64 << 10;
/// Connections of the load with small requests.
const CONNECTIONS: usize = 8;
/// How long one run of it lasts.
const LOAD: Duration = Duration::from_secs(1);
/// The same in a quick run.
const LOAD_QUICK: Duration = Duration::from_millis(100);
/// Bytes of a blob of a quick run.
const BLOB_QUICK: u64 = 32 << 20;
/// Most counted pushes: each writes the blob four times, ours and plain.
const PUSHES_MAX: u32 = 3;
/// Ranges of one run, each cold.
const RANGES: u32 = 10;
/// Bytes of a range.
const RANGE_LEN: u64 = 1 << 10;
/// Until what a range brings is counted.
const SETTLE: Duration = Duration::from_millis(20);
/// Servers that are ours, the first of those compared.
const OURS: usize = 2;
/// What the slow agent receives from its peers.
const SLOW: &str = "1Gbit/s";
/// Bytes of one plain write.
const WRITE_LEN: usize = 1 << 20;

/// A case of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Case {
    /// Requests a second for manifests and blobs of 64 KiB.
    Small,
    /// GB/s and CPU for a blob that is here.
    Hot,
    /// A push until it is acknowledged, beside plain writes of its copies.
    Push,
    /// A GET of a blob that the agent does not have.
    Cold,
    /// 1 KiB of a blob that the agent does not have, and that it has.
    Range,
    /// A cold GET at 1 Gbit/s, beside an agent that waits for the whole blob.
    Shaped,
}

/// Runs the cases.
pub(crate) fn measure(args: &Args, dir: &Path) -> Result<Vec<Row>> {
    println!("load average before: {}", fs::read_to_string("/proc/loadavg")?.trim());
    let shoal = Cluster::binary(args.shoal.as_deref())?;
    let cluster = Cluster::start(&shoal, &dir.join("cluster"), SLOW)?;
    let (len, runs, load_for) = match args.quick {
        true => (BLOB_QUICK, 1, LOAD_QUICK),
        false => (args.blob, args.runs, LOAD),
    };
    let root = dir.join("files");
    fs::create_dir(&root)?;
    make_blob(&root.join("large"), len, 1)?;
    make_blob(&root.join("small"), SMALL_LEN as u64, 2)?;
    let blob = Blob::open(&root.join("large"))?;
    let warm = Warm::new(dir.join("warm"), usize::try_from(len)? * REPLICAS);
    let mut table = Table { args, dir, cluster, blob, root, warm, runs, load_for, rows: Vec::new() };
    if table.wants(Case::Push) {
        table.push()?;
    }
    if table.wants(Case::Small) || table.wants(Case::Hot) {
        table.small_and_hot()?;
    }
    if table.wants(Case::Cold) {
        table.cold()?;
    }
    if table.wants(Case::Range) {
        table.range()?;
    }
    if table.wants(Case::Shaped) {
        table.shaped()?;
    }
    println!("load average after: {}", fs::read_to_string("/proc/loadavg")?.trim());
    Ok(table.rows)
}

struct Table<'a> {
    args: &'a Args,
    dir: &'a Path,
    cluster: Cluster,
    blob: Blob,
    root: PathBuf,
    warm: Warm,
    runs: u32,
    load_for: Duration,
    rows: Vec<Row>,
}

/// Whatever serves the same content.
struct Server<'a> {
    name: &'static str,
    addr: SocketAddr,
    /// Of the manifest, the small blob and the large one.
    paths: [String; 3],
    cpu_s: Box<dyn Fn() -> Result<f64> + 'a>,
}

impl<'a> Server<'a> {
    fn new(name: &'static str, addr: SocketAddr, paths: [String; 3], cpu_s: impl Fn() -> Result<f64> + 'a) -> Self {
        Self { name, addr, paths, cpu_s: Box::new(cpu_s) }
    }
}

/// A figure of several runs.
#[derive(Clone, Default)]
struct Figures(Vec<f64>);

impl Figures {
    fn sorted(&self) -> Vec<f64> {
        let mut values = self.0.clone();
        values.sort_by(f64::total_cmp);
        values
    }

    fn median(&self) -> f64 {
        let values = self.sorted();
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn least(&self) -> f64 {
        self.sorted().first().copied().unwrap_or(f64::NAN)
    }

    fn most(&self) -> f64 {
        self.sorted().last().copied().unwrap_or(f64::NAN)
    }
}

impl Table<'_> {
    fn wants(&self, case: Case) -> bool {
        self.args.only.is_empty() || self.args.only.contains(&case)
    }

    fn row(&mut self, case: &str, unit: &'static str, target: &'static str, ours: f64, against: f64, note: String) {
        self.rows.push(row(case, unit, target, ours, against, note));
    }

    /// A figure that has a bound of its own, the least of it being the best.
    fn bounded(
        &mut self,
        case: &str,
        unit: &'static str,
        target: &'static str,
        ours: &Figures,
        bound: f64,
        note: &str,
    ) {
        let note = format!("best {:.3}{}{note}", ours.least(), if note.is_empty() { "" } else { "; " });
        self.row(case, unit, target, ours.median(), bound, note);
    }

    fn gb(&self) -> f64 {
        gb(self.blob.len)
    }

    /// The blob at the cluster, as small cases and cold ones need it.
    fn pushed(&mut self) -> Result<()> {
        if self.cluster.copies(&self.blob.digest)? < REPLICAS {
            self.cluster.proxy.push(&mut self.blob)?;
        }
        Ok(())
    }

    fn push(&mut self) -> Result<()> {
        let (mut ours, mut cpu, mut plain) = (Figures::default(), Figures::default(), Figures::default());
        let copy = vec![7; WRITE_LEN];
        for run in 0..=self.runs.min(PUSHES_MAX) {
            self.blob.change(u64::from(run) + 1)?;
            self.warm.gather()?;
            let before = self.cluster.cpu_s()?;
            self.warm.release()?;
            let begun = Instant::now();
            self.cluster.proxy.push(&mut self.blob)?;
            let push_s = begun.elapsed().as_secs_f64();
            let push_cpu = (self.cluster.cpu_s()? - before) / self.gb();
            let copies = self.cluster.copies(&self.blob.digest)?;
            ensure!(copies == REPLICAS, "a push was acknowledged with {copies} copies of {REPLICAS}");
            self.warm.gather()?;
            let paths: Vec<PathBuf> = (0..REPLICAS).map(|n| self.dir.join(format!("plain{n}"))).collect();
            self.warm.release()?;
            let begun = Instant::now();
            plain_copies(&paths, self.blob.len, &copy)?;
            let plain_s = begun.elapsed().as_secs_f64();
            paths.iter().try_for_each(fs::remove_file)?;
            println!("push, run {run}: {push_s:.2} s, CPU {push_cpu:.2} s/GB; plain {plain_s:.2} s");
            if run > 0 {
                ours.0.push(push_s);
                cpu.0.push(push_cpu);
                plain.0.push(plain_s);
            }
        }
        let ratios = Figures(ours.0.iter().zip(&plain.0).map(|(ours, plain)| ours / plain).collect());
        let note = format!(
            "best {:.2} against {:.2}; best ratio of one run {:.2}; {REPLICAS} copies, written and synced at once",
            ours.least(),
            plain.least(),
            ratios.least()
        );
        self.row("push / plain write", "s", "<= 1.15", ours.median(), plain.median(), note);
        self.bounded("push, CPU / bound", "s/GB", "<= 2.6", &cpu, 2.6, "Kraken 7.9; all processes but the client");
        Ok(())
    }

    fn small_and_hot(&mut self) -> Result<()> {
        self.pushed()?;
        let small = fs::read(self.root.join("small"))?;
        let manifest = self.cluster.proxy.push_image(&small)?;
        let manifest_path = format!("/v2/{REPOSITORY}/manifests/{}", digest_of(manifest.as_bytes()));
        fs::write(self.root.join("manifest"), &manifest)?;
        let paths = [manifest_path, blob_path(&digest_of(&small)), self.blob.path()];
        let docker = DockerRegistry::binary().map(|binary| DockerRegistry::start(&binary, self.dir)).transpose()?;
        let nginx = Nginx::binary().map(|binary| Nginx::start(&binary, &self.root, self.dir)).transpose()?;
        match &docker {
            Some(docker) => {
                docker.registry.push_image(&small)?;
                docker.registry.push(&mut self.blob)?;
            }
            None => println!("docker-registry is not installed (Debian's package docker-registry): left out"),
        }
        if nginx.is_none() {
            println!("nginx is not installed (Debian's package nginx-light): left out");
        }
        let rows = {
            let cluster = &self.cluster;
            let mut servers = vec![
                Server::new("proxy", cluster.proxy.0, paths.clone(), || cluster.cpu_s()),
                Server::new("agent", cluster.agent_registry, paths.clone(), || cluster.agent_cpu_s()),
            ];
            servers.extend(
                docker
                    .as_ref()
                    .map(|docker| Server::new("docker-registry", docker.registry.0, paths, || docker.cpu_s())),
            );
            let files = ["/manifest", "/small", "/large"].map(str::to_owned);
            servers.extend(nginx.as_ref().map(|nginx| Server::new("nginx", nginx.addr(), files, || nginx.cpu_s())));
            let mut rows = Vec::new();
            if self.wants(Case::Small) {
                self.small(&servers, 0, "manifest", manifest.len() as u64, &mut rows)?;
                self.small(&servers, 1, "64 KiB", SMALL_LEN as u64, &mut rows)?;
            }
            if self.wants(Case::Hot) {
                self.hot(&servers, &mut rows)?;
            }
            rows
        };
        self.rows.extend(rows);
        Ok(())
    }

    fn small(&self, servers: &[Server<'_>], path: usize, what: &str, len: u64, rows: &mut Vec<Row>) -> Result<()> {
        let (mut rates, mut cpu) = (vec![Figures::default(); servers.len()], vec![Figures::default(); servers.len()]);
        for run in 0..=self.runs {
            for (at, server) in servers.iter().enumerate() {
                let before = (server.cpu_s)()?;
                let rate = load(server.addr, &server.paths[path], len, CONNECTIONS, self.load_for)?;
                let cpu_us = ((server.cpu_s)()? - before) * 1e6 / (rate * self.load_for.as_secs_f64());
                println!("{what}, run {run}: {} {rate:.0} requests/s, CPU {cpu_us:.0} us each", server.name);
                if run > 0 {
                    rates[at].0.push(rate);
                    cpu[at].0.push(cpu_us);
                }
            }
        }
        for ours in 0..OURS {
            for other in OURS..servers.len() {
                let note = format!(
                    "best {:.0} against {:.0}; CPU {:.0} us against {:.0}",
                    rates[ours].most(),
                    rates[other].most(),
                    cpu[ours].median(),
                    cpu[other].median()
                );
                let case = format!("{what}, {} / {}", servers[ours].name, servers[other].name);
                rows.push(row(case, "1/s", "given", rates[ours].median(), rates[other].median(), note));
            }
        }
        Ok(())
    }

    fn hot(&self, servers: &[Server<'_>], rows: &mut Vec<Row>) -> Result<()> {
        let (mut speed, mut cpu) = (vec![Figures::default(); servers.len()], vec![Figures::default(); servers.len()]);
        for run in 0..=self.runs {
            for (at, server) in servers.iter().enumerate() {
                let before = (server.cpu_s)()?;
                let answer = Connection::open(server.addr)?.get(&server.paths[2], self.blob.len)?;
                let (gb_per_s, cpu_s) = (self.gb() / answer.done_s, ((server.cpu_s)()? - before) / self.gb());
                println!("hot, run {run}: {} {gb_per_s:.2} GB/s, CPU {cpu_s:.2} s/GB", server.name);
                if run > 0 {
                    speed[at].0.push(gb_per_s);
                    cpu[at].0.push(cpu_s);
                }
            }
        }
        for (ours, target) in [(0, "given"), (1, ">= 3.5 GB/s")] {
            for other in OURS..servers.len() {
                let (left, right) = (servers[ours].name, servers[other].name);
                let note = format!("best {:.2} against {:.2}", speed[ours].most(), speed[other].most());
                let case = format!("hot blob, {left} / {right}");
                rows.push(row(case, "GB/s", target, speed[ours].median(), speed[other].median(), note));
                let note = format!("best {:.2} against {:.2}", cpu[ours].least(), cpu[other].least());
                let case = format!("hot blob CPU, {left} / {right}");
                rows.push(row(case, "s/GB", "given", cpu[ours].median(), cpu[other].median(), note));
            }
        }
        Ok(())
    }

    fn cold(&mut self) -> Result<()> {
        self.pushed()?;
        let (mut first, mut last, mut cpu) = (Figures::default(), Figures::default(), Figures::default());
        for run in 0..=self.runs {
            self.cluster.forget(&self.blob.digest)?;
            self.warm.gather()?;
            let mut client = Connection::open(self.cluster.agent_registry)?;
            let before = self.cluster.cpu_s()?;
            self.warm.release()?;
            let answer = client.get(&self.blob.path(), self.blob.len)?;
            let cpu_s = (self.cluster.cpu_s()? - before) / self.gb();
            let (first_s, last_s) = (answer.first_s, answer.done_s / self.gb());
            println!("cold, run {run}: first {:.1} ms, last {last_s:.2} s/GB, CPU {cpu_s:.2} s/GB", first_s * 1e3);
            if run > 0 {
                first.0.push(first_s);
                last.0.push(last_s);
                cpu.0.push(cpu_s);
            }
        }
        self.bounded("cold, first byte / bound", "s", "<= 0.02", &first, 0.02, "Kraken 1.1, Dragonfly 0.09");
        self.bounded("cold, last byte / Dragonfly", "s/GB", "< 0.94", &last, 0.94, "Kraken 2.2");
        self.bounded("cold, CPU / Dragonfly", "s/GB", "< 1.2", &cpu, 1.2, "Kraken 2.7; all processes but the client");
        Ok(())
    }

    fn range(&mut self) -> Result<()> {
        self.pushed()?;
        let (path, digest) = (self.blob.path(), self.blob.digest.clone());
        let (mut cold, mut hot, mut brought) = (Figures::default(), Figures::default(), Figures::default());
        let mut client = Connection::open(self.cluster.agent_registry)?;
        for run in 0..=self.runs {
            for n in 0..RANGES {
                self.cluster.forget(&digest)?;
                let received = self.cluster.agent_received()?;
                let start = self.blob.len / u64::from(RANGES + 1) * u64::from(n + 1);
                let took = client.range(&path, start, RANGE_LEN)?.done_s * 1e3;
                let again = client.range(&path, start, RANGE_LEN)?.done_s * 1e3;
                // Not before the node has had the time to bring more than it was asked for.
                thread::sleep(SETTLE);
                let bytes = (self.cluster.agent_received()? - received) / f64::from(1 << 20);
                if run > 0 {
                    cold.0.push(took);
                    hot.0.push(again);
                    brought.0.push(bytes);
                }
            }
        }
        let most = format!("worst {:.1}, Dragonfly 10.5", cold.most());
        self.bounded("1 KiB of a cold blob / bound", "ms", "<= 5", &cold, 5.0, &most);
        let most = format!("most {:.2}, Dragonfly 4.0", brought.most());
        self.bounded("the same, fetched / one piece", "MiB", "one piece", &brought, 1.0, &most);
        self.bounded("1 KiB of a hot blob / cold", "ms", "given", &hot, cold.median(), "");
        Ok(())
    }

    fn shaped(&mut self) -> Result<()> {
        self.pushed()?;
        let slow = self.cluster.slow_registry;
        self.cluster.forget(&self.blob.digest)?;
        let ours = Connection::open(slow)?.get(&self.blob.path(), self.blob.len)?;
        self.cluster.forget(&self.blob.digest)?;
        // An agent that waits for the whole blob answers once it is there: a first reader is the wait, a second the answer.
        let begun = Instant::now();
        Connection::open(slow)?.get(&self.blob.path(), self.blob.len)?;
        let whole_s = begun.elapsed().as_secs_f64();
        let answer = Connection::open(slow)?.get(&self.blob.path(), self.blob.len)?;
        let note = "against an answer that begins when all is there".to_owned();
        self.row("at 1 Gbit/s, first byte / whole", "s", "less", ours.first_s, whole_s + answer.first_s, note);
        let note = format!("the link alone {:.2}", self.gb() * 8.0);
        self.row("at 1 Gbit/s, last byte / whole", "s", "less", ours.done_s, whole_s + answer.done_s, note);
        Ok(())
    }
}

fn row(
    case: impl Into<String>,
    unit: &'static str,
    target: &'static str,
    ours: f64,
    against: f64,
    note: impl Into<String>,
) -> Row {
    Row { case: case.into(), ours, against, ratio: ours / against, unit, target, note: note.into() }
}

/// Writes files of `len` bytes at once, each synced at its end.
fn plain_copies(paths: &[PathBuf], len: u64, chunk: &[u8]) -> Result<()> {
    thread::scope(|scope| {
        let writers: Vec<_> = paths
            .iter()
            .map(|path| {
                scope.spawn(move || -> Result<()> {
                    let mut file = File::create(path)?;
                    let mut left = usize::try_from(len)?;
                    while left > 0 {
                        let part = left.min(chunk.len());
                        file.write_all(&chunk[..part])?;
                        left -= part;
                    }
                    Ok(file.sync_data()?)
                })
            })
            .collect();
        writers.into_iter().try_for_each(|writer| writer.join().map_err(|_| anyhow::anyhow!("a writer panicked"))?)
    })
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn gb(len: u64) -> f64 {
    len as f64 / 1e9
}
