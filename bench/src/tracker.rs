//! `shoal-bench tracker`: a tracker alone on one core, under the announces of many hosts.
//!
//! Every host has many blobs under way and tells of all of them in each request, as a host does whose downloads all move. The clients
//! are blocking connections on the machine's other cores. A paced run takes each latency from the moment the request was due, so
//! that a tracker that falls behind is not spared its queue.

use anyhow::{Context, Result, bail, ensure};
use peer_proto::{
    Digest, PeerId,
    announce::{Blob, Node, Request, Response, State},
};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

/// Connections, each with a thread.
const CONNECTIONS: u32 = 16;

/// Pieces of each made-up blob.
const PIECES: u32 = 1024;

/// `shoal-bench tracker`
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Hosts.
    #[arg(long, default_value_t = 8_000)]
    hosts: u32,
    /// Blobs that each host has under way.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=512))]
    blobs: u32,
    /// Different blobs in the cluster.
    #[arg(long, default_value_t = 1_000)]
    distinct: u32,
    /// Seconds between two announces of a host in the paced run; a host with downloads announces every five.
    #[arg(long, default_value_t = 5.0)]
    interval_s: f64,
    /// Seconds of each run.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// The program under test; the one beside this one unless given.
    #[arg(long)]
    shoal: Option<PathBuf>,
    /// Where the configuration is put; removed at the end.
    #[arg(long, default_value = "/tmp")]
    dir: PathBuf,
    /// Write the figures as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One run's figures.
#[derive(Debug, serde::Serialize)]
struct Phase {
    name: &'static str,
    announces: usize,
    per_s: f64,
    p50_ms: f64,
    p99_ms: f64,
    p999_ms: f64,
    /// CPU seconds of the tracker a second.
    cpu: f64,
    rss: u64,
    peers_handed_out: u64,
}

/// Runs the tracker and prints what it carried.
pub(crate) fn run(args: &Args) -> Result<()> {
    let dir = args.dir.join(format!("shoal-tracker-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let done = measure(args, &dir.join("tracker.toml"));
    std::fs::remove_dir_all(&dir)?;
    let (empty, phases) = done?;
    let links = u64::from(args.hosts) * u64::from(args.blobs);
    println!(
        "{} hosts, {} blobs each of {}, one core, {CONNECTIONS} connections\n",
        args.hosts, args.blobs, args.distinct
    );
    println!(
        "{:<12} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>9} {:>14} {:>12}",
        "",
        "announces",
        "a second",
        "p50 ms",
        "p99 ms",
        "p99.9 ms",
        "cores",
        "RSS MiB",
        "bytes per link",
        "peers given"
    );
    for phase in &phases {
        println!(
            "{:<12} {:>9} {:>9.0} {:>9.3} {:>9.3} {:>9.3} {:>8.2} {:>9} {:>14} {:>12}",
            phase.name,
            phase.announces,
            phase.per_s,
            phase.p50_ms,
            phase.p99_ms,
            phase.p999_ms,
            phase.cpu,
            phase.rss >> 20,
            phase.rss.saturating_sub(empty) / links,
            phase.peers_handed_out
        );
    }
    println!("\na link is a host and one of its blobs; the tracker had {} MiB before the first", empty >> 20);
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&phases)?)
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn measure(args: &Args, config: &std::path::Path) -> Result<(u64, Vec<Phase>)> {
    let mut tracker = Tracker::start(args, config)?;
    let empty = tracker.rss()?;
    let hosts: Vec<Host> = (0..args.hosts).map(|n| Host::new(n, args)).collect();
    let mut phases = Vec::new();
    // Everybody comes and wants ten peers for each blob; then all move on as fast as the tracker answers; then at their pace.
    phases.push(phase("arrival", &tracker, &hosts, &Load { full: true, want: 10, number: args.hosts, every: None })?);
    let enough = args.hosts.max(u32::try_from(args.seconds * 2000)?);
    phases.push(phase("saturated", &tracker, &hosts, &Load { full: false, want: 1, number: enough, every: None })?);
    let every = args.interval_s / f64::from(args.hosts);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive, and clamped by the cast")]
    let number = (Duration::from_secs(args.seconds).as_secs_f64() / every) as u32;
    phases.push(phase("paced", &tracker, &hosts, &Load { full: false, want: 1, number, every: Some(every) })?);
    tracker.alive()?;
    Ok((empty, phases))
}

/// What a phase asks of every host.
struct Load {
    full: bool,
    want: u16,
    /// Announces in all.
    number: u32,
    /// Seconds from one announce of anybody to the next; as fast as answers come where none.
    every: Option<f64>,
}

fn phase(name: &'static str, tracker: &Tracker, hosts: &[Host], load: &Load) -> Result<Phase> {
    let next = AtomicU32::new(0);
    let cpu = tracker.cpu_s()?;
    let begun = Instant::now();
    let work = || -> Result<(Vec<Duration>, u64)> {
        let mut client = Client::connect(tracker.addr)?;
        let (mut times, mut peers) = (Vec::new(), 0);
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= load.number {
                return Ok((times, peers));
            }
            let due = match load.every {
                Some(every) => begun + Duration::from_secs_f64(every * f64::from(n)),
                None => Instant::now(),
            };
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let host = &hosts[n as usize % hosts.len()];
            let round = n / u32::try_from(hosts.len())?;
            let answer = client.announce(&host.request(load, round).encode())?;
            times.push(due.elapsed());
            peers += answer.blobs.iter().map(|(_, peers)| peers.len() as u64).sum::<u64>();
        }
    };
    let (mut times, mut peers_handed_out) = (Vec::new(), 0);
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(work)).collect();
        for client in clients {
            let Ok(done) = client.join() else { bail!("a client panicked") };
            let (some, peers) = done?;
            times.extend(some);
            peers_handed_out += peers;
        }
        Ok(())
    })?;
    let wall = begun.elapsed().as_secs_f64();
    times.sort_unstable();
    let at = |per_mille: usize| {
        times
            .get((times.len() * per_mille / 1000).min(times.len().saturating_sub(1)))
            .map_or(0.0, |t| t.as_secs_f64() * 1e3)
    };
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let per_s = times.len() as f64 / wall;
    Ok(Phase {
        name,
        announces: times.len(),
        per_s,
        p50_ms: at(500),
        p99_ms: at(990),
        p999_ms: at(999),
        cpu: (tracker.cpu_s()? - cpu) / wall,
        rss: tracker.rss()?,
        peers_handed_out,
    })
}

/// A made-up host.
struct Host {
    node: Node,
    blobs: Vec<Digest>,
}

impl Host {
    fn new(n: u32, args: &Args) -> Self {
        let mut id = [0; 20];
        id[..4].copy_from_slice(&n.to_be_bytes());
        let [_, a, b, c] = n.to_be_bytes();
        let node = Node {
            id: PeerId::new(id),
            addr: SocketAddr::from((Ipv4Addr::new(10, a, b, c), 16001)),
            zone: "".into(),
            origin: false,
        };
        // Hosts share blobs in every mixture: each takes every blob of a stride from a start of its own.
        let blobs = (0..args.blobs.min(args.distinct)).map(|k| digest((n * 7 + k * (1 + n % 13)) % args.distinct));
        let mut blobs: Vec<Digest> = blobs.collect();
        blobs.sort_unstable();
        blobs.dedup();
        Self { node, blobs }
    }

    fn request(&self, load: &Load, round: u32) -> Request {
        let have = (round + 1) % PIECES;
        let state = State::Leeching { have, pieces: PIECES, peers: 10_u16.saturating_sub(load.want), want: load.want };
        let blobs = self.blobs.iter().map(|digest| Blob { digest: *digest, state }).collect();
        Request { node: self.node.clone(), full: load.full, blobs }
    }
}

fn digest(n: u32) -> Digest {
    let mut bytes = [0; 32];
    // Spread over the whole range, as digests are.
    bytes[..4].copy_from_slice(&n.wrapping_mul(0x9e37_79b9).to_be_bytes());
    Digest::sha256(bytes)
}

/// A kept connection to the tracker.
struct Client {
    socket: BufReader<TcpStream>,
    line: String,
    body: Vec<u8>,
}

impl Client {
    fn connect(addr: SocketAddr) -> Result<Self> {
        let socket = TcpStream::connect(addr)?;
        socket.set_nodelay(true)?;
        Ok(Self { socket: BufReader::new(socket), line: String::new(), body: Vec::new() })
    }

    fn announce(&mut self, body: &[u8]) -> Result<Response> {
        let mut request = format!(
            "POST /announce HTTP/1.1\r\nHost: tracker\r\nContent-Type: application/vnd.shoal.announce\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        self.socket.get_mut().write_all(&request)?;
        let (mut len, mut first) = (None, true);
        loop {
            self.line.clear();
            ensure!(self.socket.read_line(&mut self.line)? > 0, "the tracker hung up");
            let line = self.line.trim_end();
            if std::mem::take(&mut first) {
                ensure!(line.starts_with("HTTP/1.1 200"), "the tracker answered {line}");
            } else if line.is_empty() {
                break;
            } else if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                len = Some(value.trim().parse::<usize>()?);
            }
        }
        self.body.resize(len.context("an answer without a length")?, 0);
        self.socket.read_exact(&mut self.body)?;
        Ok(Response::decode(&self.body)?)
    }
}

/// The tracker's process, on the first core alone.
struct Tracker {
    process: Child,
    addr: SocketAddr,
}

impl Tracker {
    fn start(args: &Args, config: &std::path::Path) -> Result<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let text = format!(
            "[listen]\napi = \"127.0.0.1:{port}\"\n[tracker]\nannounces_per_s_max = 1000000\n\
             [cluster]\norigins = [\"127.0.0.1:1\"]\ntrackers = [\"127.0.0.1:{port}\"]\n[log]\nfilter = \"warn\"\n"
        );
        std::fs::write(config, text)?;
        let shoal = match &args.shoal {
            Some(path) => path.clone(),
            None => std::env::current_exe()?.with_file_name("shoal"),
        };
        let process = Command::new("taskset")
            .args(["-c", "0"])
            .arg(&shoal)
            .args(["tracker", "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("start {} by taskset (util-linux)", shoal.display()))?;
        let mut this = Self { process, addr: SocketAddr::from((Ipv4Addr::LOCALHOST, port)) };
        let begun = Instant::now();
        while TcpStream::connect(this.addr).is_err() {
            this.alive()?;
            ensure!(begun.elapsed() < Duration::from_secs(20), "the tracker is not ready in 20 s");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(this)
    }

    fn alive(&mut self) -> Result<()> {
        match self.process.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the tracker ended with {status}"),
        }
    }

    fn cpu_s(&self) -> Result<f64> {
        crate::process::cpu_s(self.process.id())
    }

    fn rss(&self) -> Result<u64> {
        crate::process::status(self.process.id(), "VmRSS")
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        // Already ended is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
