//! The cluster: its processes, and what is done with them.

use super::{
    PATIENCE,
    client::{self, Pulled},
    fabric::{Fabric, Host},
};
use crate::process;
use anyhow::{Context, Result, ensure};
use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

const NAMESPACE: &str = "bench";
const TRACKER_PORT: u16 = 15003;
const ORIGIN_PORT: u16 = 15002;
const AGENT_PORT: u16 = 16002;

/// Between two looks at something that is not there yet.
const PAUSE: Duration = Duration::from_millis(20);

/// Peers of each host while it is measured what links carry: about as many as an agent's.
const MESH: usize = 10;

/// Everything that runs.
pub(crate) struct Cluster {
    tracker: Host,
    origins: Vec<Host>,
    agents: Vec<Host>,
}

/// A measured pull.
pub(crate) struct Swarm {
    pub(crate) pulls: Vec<Pulled>,
    /// Bytes that left the origins to peers, frames included.
    pub(crate) origin_bytes: f64,
    pub(crate) tracker_requests: f64,
    /// CPU seconds of all agents and origins during the pull.
    pub(crate) cpu_s: f64,
    /// Seconds from the start of the first pull to the end of the last.
    pub(crate) wall_s: f64,
    /// Most anonymous memory of an agent at the end, bytes.
    pub(crate) agent_anon: u64,
}

impl Cluster {
    /// Starts the processes and waits until each is ready.
    pub(crate) fn start(fabric: &mut Fabric, shoal: &Path, work: &Path, origins: u16, agents: u16) -> Result<Self> {
        let mut host = |role: &str, name: String| {
            let config = work.join(format!("{name}.toml")).display().to_string();
            let shoal = shoal.display().to_string();
            fabric.host(&[&shoal, role, "--config", &config], &work.join(format!("{name}.log")))
        };
        let tracker = host("tracker", "tracker".to_owned())?;
        let origins = (0..origins).map(|n| host("origin", format!("origin{n}"))).collect::<Result<Vec<_>>>()?;
        let agents = (0..agents).map(|n| host("agent", format!("agent{n}"))).collect::<Result<Vec<_>>>()?;
        let mut this = Self { tracker, origins, agents };
        this.configure(work)?;
        for host in this.all() {
            host.go()?;
        }
        this.ready()?;
        Ok(this)
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Host> {
        std::iter::once(&mut self.tracker).chain(&mut self.origins).chain(&mut self.agents)
    }

    fn configure(&self, work: &Path) -> Result<()> {
        let apis: Vec<String> = self.origins.iter().map(|origin| format!("{}:{ORIGIN_PORT}", origin.addr)).collect();
        let cluster = format!(
            // Nobody asks the index here; agents want one named.
            "[cluster]\norigins = {apis:?}\ntrackers = [\"{0}:{TRACKER_PORT}\"]\nindexes = [\"{0}:15004\"]\nreplicas = {1}\n",
            self.tracker.addr,
            self.origins.len()
        );
        let write = |name: &str, text: String| {
            let path = work.join(format!("{name}.toml"));
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
        };
        write("tracker", format!("[listen]\napi = \"0.0.0.0:{TRACKER_PORT}\"\n{cluster}"))?;
        for (n, host) in self.origins.iter().enumerate() {
            let (data, backend) = (work.join(format!("origin{n}")), work.join("backend"));
            let text = format!(
                "data_dir = {data:?}\n[listen]\napi = \"0.0.0.0:{ORIGIN_PORT}\"\n[peer]\nadvertise = \"{addr}:15001\"\n\
                 {cluster}this = \"{addr}:{ORIGIN_PORT}\"\n[[backends]]\nstore = {{ kind = \"fs\", root = {backend:?} }}\n",
                addr = host.addr
            );
            write(&format!("origin{n}"), text)?;
        }
        for (n, host) in self.agents.iter().enumerate() {
            let data = work.join(format!("agent{n}"));
            let text = format!(
                "data_dir = {data:?}\n[engine]\nshards = 1\nworkers = 1\n[listen]\napi = \"0.0.0.0:{AGENT_PORT}\"\n\
                 [peer]\nadvertise = \"{}:16001\"\n{cluster}",
                host.addr
            );
            write(&format!("agent{n}"), text)?;
        }
        Ok(())
    }

    fn ready(&mut self) -> Result<()> {
        let begun = Instant::now();
        let agents = self.agents.iter_mut().map(|host| (host, AGENT_PORT));
        let origins = self.origins.iter_mut().map(|host| (host, ORIGIN_PORT));
        for (host, port) in std::iter::once((&mut self.tracker, TRACKER_PORT)).chain(origins).chain(agents) {
            let server = format!("{}:{port}", host.addr);
            while let Err(error) = client::get(&server, "/health") {
                host.alive()?;
                ensure!(begun.elapsed() < PATIENCE, "not ready in {PATIENCE:?}: {error:#}");
                std::thread::sleep(PAUSE);
            }
        }
        Ok(())
    }

    /// Bytes a second that a link carries each way, on the mean, while every host exchanges bytes with [`MESH`] others: what TCP leaves
    /// of the links' rate to a swarm, headers, acknowledgements and what it sends twice paid for.
    pub(crate) fn link_payload_rate(&self) -> Result<f64> {
        let exe = std::env::current_exe()?.display().to_string();
        let hosts: Vec<&Host> = self.origins.iter().chain(&self.agents).collect();
        let mut ends = Vec::new();
        for (n, host) in hosts.iter().enumerate() {
            // Each dials the half of its peers that come next in the ring.
            let dials = hosts.iter().cycle().skip(n + 1).take((MESH / 2).min(hosts.len() / 2));
            let mut end = host
                .inside(&exe)
                .args(["inside", "exchange"])
                .args(dials.map(|peer| peer.addr.to_string()))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let start = end.stdin.take().context("no stdin")?;
            let mut said = BufReader::new(end.stdout.take().context("no stdout")?);
            said.read_line(&mut String::new())?;
            ends.push((end, start, said));
        }
        for (_, start, _) in &mut ends {
            start.write_all(b"\n")?;
        }
        let mut rates = Vec::new();
        for (mut end, start, mut said) in ends {
            let mut rate = String::new();
            said.read_line(&mut rate)?;
            rates.push(rate.trim().parse::<f64>().context("the links could not be measured")?);
            drop(start);
            end.wait()?;
        }
        Ok(rates.iter().sum::<f64>() / rates.len() as f64)
    }

    /// Stores a blob at all origins; its digest.
    pub(crate) fn seed(&self, shoal: &Path, work: &Path, len: u64) -> Result<String> {
        let file = work.join("blob");
        crate::saturate::make_blob(&file, len, 0)?;
        let origin = self.origins.first().context("no origin")?;
        let out = origin
            .inside(&shoal.display().to_string())
            .args(["blob", "put", "--namespace", NAMESPACE, "--origin", &format!("{}:{ORIGIN_PORT}", origin.addr)])
            .arg(&file)
            .output()?;
        ensure!(out.status.success(), "blob put: {}", String::from_utf8_lossy(&out.stderr).trim());
        std::fs::remove_file(file)?;
        let digest = String::from_utf8(out.stdout)?.trim().to_owned();
        // The replicas are there before the measured pull begins.
        let begun = Instant::now();
        for origin in &self.origins {
            let server = format!("{}:{ORIGIN_PORT}", origin.addr);
            let path = format!("/internal/namespace/{NAMESPACE}/blobs/{digest}/layout");
            while let Err(error) = client::get(&server, &path) {
                ensure!(begun.elapsed() < PATIENCE, "an origin lacks the blob: {error:#}");
                std::thread::sleep(PAUSE);
            }
        }
        Ok(digest)
    }

    /// All agents pull at once.
    pub(crate) fn pull(&mut self, digest: &str, len: u64) -> Result<Swarm> {
        let exe = std::env::current_exe()?.display().to_string();
        let path = format!("/namespace/{NAMESPACE}/blobs/{digest}");
        let (mut clients, mut starts) = (Vec::new(), Vec::new());
        for agent in &self.agents {
            let mut client = agent
                .inside(&exe)
                .args(["inside", "pull", &format!("127.0.0.1:{AGENT_PORT}"), &path, &len.to_string()])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            starts.push(client.stdin.take().context("no stdin")?);
            clients.push(client);
        }
        let (sent, announces) = (self.origin_bytes()?, self.announces()?);
        let cpu = self.cpu_s()?;
        let begun = Instant::now();
        for start in &mut starts {
            start.write_all(b"\n")?;
        }
        let mut pulls = Vec::new();
        for client in clients {
            let out = client.wait_with_output()?;
            ensure!(out.status.success(), "a pull failed");
            pulls.push(serde_json::from_slice(&out.stdout)?);
        }
        let wall_s = begun.elapsed().as_secs_f64();
        let anon =
            self.agents.iter().map(|agent| process::status(agent.pid(), "RssAnon")).collect::<Result<Vec<_>>>()?;
        Ok(Swarm {
            pulls,
            cpu_s: self.cpu_s()? - cpu,
            wall_s,
            origin_bytes: self.origin_bytes()? - sent,
            tracker_requests: self.announces()? - announces,
            agent_anon: anon.into_iter().max().unwrap_or(0),
        })
    }

    fn origin_bytes(&self) -> Result<f64> {
        let of = |host: &Host| client::metric(&format!("{}:{ORIGIN_PORT}", host.addr), "shoal_peer_sent_bytes_total");
        self.origins.iter().map(of).sum()
    }

    fn announces(&self) -> Result<f64> {
        // A counter by label that nobody has counted yet has no series.
        let server = format!("{}:{TRACKER_PORT}", self.tracker.addr);
        Ok(client::metric(&server, "shoal_tracker_announces_total").unwrap_or(0.0))
    }

    fn cpu_s(&self) -> Result<f64> {
        self.origins.iter().chain(&self.agents).map(|host| process::cpu_s(host.pid())).sum()
    }
}
