//! What is measured: a cluster of `shoal` processes, and the servers beside it.

use super::client::{Answer, Connection};
use crate::saturate::programs::{Program, await_listener, free_ports};
use anyhow::{Context, Result, ensure};
use sha2::{Digest as _, Sha256};
use std::{
    fs::{self, File},
    io::{Read, Seek},
    net::SocketAddr,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// The repository of everything.
pub(crate) const REPOSITORY: &str = "bench/app";
/// Copies that an acknowledged push promises.
pub(crate) const REPLICAS: usize = 2;
/// Longest wait for a cluster to be ready.
const READY: Duration = Duration::from_secs(30);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// A file and its digest.
pub(crate) struct Blob {
    pub(crate) file: File,
    pub(crate) digest: String,
    pub(crate) len: u64,
}

impl Blob {
    /// Of a file that is there.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        let mut blob = Self { len: file.metadata()?.len(), file, digest: String::new() };
        blob.hash()?;
        Ok(blob)
    }

    /// Becomes another blob of the same length.
    pub(crate) fn change(&mut self, seed: u64) -> Result<()> {
        self.file.write_all_at(&seed.to_le_bytes(), 0)?;
        self.hash()
    }

    fn hash(&mut self) -> Result<()> {
        self.file.rewind()?;
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
        loop {
            match self.file.read(&mut buffer)? {
                0 => break,
                got => hash.update(&buffer[..got]),
            }
        }
        self.digest = name(hash);
        Ok(())
    }

    pub(crate) fn path(&self) -> String {
        blob_path(&self.digest)
    }
}

fn name(hash: Sha256) -> String {
    hash.finalize().iter().fold("sha256:".to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

pub(crate) fn digest_of(bytes: &[u8]) -> String {
    name(Sha256::new_with_prefix(bytes))
}

pub(crate) fn blob_path(digest: &str) -> String {
    format!("/v2/{REPOSITORY}/blobs/{digest}")
}

/// A registry that is pushed to.
#[derive(Clone, Copy)]
pub(crate) struct Registry(pub(crate) SocketAddr);

impl Registry {
    /// Pushes a file as docker does: a session, the bytes, the digest. The last answer.
    pub(crate) fn push(self, blob: &mut Blob) -> Result<Answer> {
        let digest = blob.digest.clone();
        self.session(&digest, |connection, place| connection.upload("PATCH", place, &mut blob.file))
    }

    /// The same of bytes at hand.
    pub(crate) fn push_bytes(self, bytes: &[u8]) -> Result<String> {
        let digest = digest_of(bytes);
        self.session(&digest, |connection, place| connection.put("PATCH", place, "", bytes))?;
        Ok(digest)
    }

    fn session(self, digest: &str, bytes: impl FnOnce(&mut Connection, &str) -> Result<Answer>) -> Result<Answer> {
        let mut connection = Connection::open(self.0)?;
        let opened = connection.put("POST", &format!("/v2/{REPOSITORY}/blobs/uploads/"), "", b"")?.expect(202)?;
        let sent = bytes(&mut connection, &place(&opened)?)?.expect(202)?;
        let place = place(&sent)?;
        let mark = if place.contains('?') { '&' } else { '?' };
        connection.put("PUT", &format!("{place}{mark}digest={digest}"), "", b"")?.expect(201)
    }

    /// Pushes an image of one layer; its manifest.
    pub(crate) fn push_image(self, layer: &[u8]) -> Result<String> {
        const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
        let (config, len) = (self.push_bytes(b"{}")?, layer.len());
        let layer = self.push_bytes(layer)?;
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":2}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{layer}","size":{len}}}]}}"#
        );
        let path = format!("/v2/{REPOSITORY}/manifests/1");
        let headers = format!("content-type: {MANIFEST}\r\n");
        Connection::open(self.0)?.put("PUT", &path, &headers, manifest.as_bytes())?.expect(201)?;
        Ok(manifest)
    }
}

/// The path of a session that an answer names, with or without its host.
fn place(answer: &Answer) -> Result<String> {
    let place = answer.header("location").context("no location")?;
    let path = place.find("/v2/").context("an odd location")?;
    Ok(place[path..].to_owned())
}

/// A proxy, an index, a tracker, as many origins as there are copies of a blob, and two agents, one of which receives slowly.
pub(crate) struct Cluster {
    programs: Vec<Program>,
    agent: usize,
    pub(crate) proxy: Registry,
    pub(crate) agent_registry: SocketAddr,
    agent_api: SocketAddr,
    pub(crate) slow_registry: SocketAddr,
    slow_api: SocketAddr,
    origins: Vec<SocketAddr>,
}

impl Cluster {
    /// Starts all below `dir`; the slow agent receives at most `slow` from its peers.
    pub(crate) fn start(shoal: &Path, dir: &Path, slow: &str) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let [
            proxy,
            index,
            tracker,
            agent_registry,
            agent_api,
            agent_peer,
            slow_registry,
            slow_api,
            slow_peer,
            others @ ..,
        ] = free_ports::<{ 9 + 2 * REPLICAS }>()?;
        let (apis, peers) = others.split_at(REPLICAS);
        let config = dir.join("cluster.toml");
        let names: Vec<String> = apis.iter().map(SocketAddr::to_string).collect();
        let text = format!(
            "[log]\nfilter = \"warn\"\n[cluster]\norigins = {names:?}\ntrackers = [\"{tracker}\"]\nindexes = [\"{index}\"]\n\
             replicas = {REPLICAS}\n"
        );
        // Tags are kept; blobs go to the origins alone, so that nothing is written back while somebody measures.
        fs::write(&config, format!("{text}[[backends]]\nnamespace = \"^none$\"\nstore = {{ kind = \"memory\" }}\n"))?;
        let (tags, store) = (dir.join("index.toml"), dir.join("tags"));
        fs::write(&tags, format!("{text}[[backends]]\nstore = {{ kind = \"fs\", root = {store:?} }}\n"))?;
        let mut programs = Vec::new();
        let mut start = |name: &str, role: &str, config: &Path, answers: SocketAddr, words: &[(&str, String)]| {
            let log = dir.join(format!("{name}.log"));
            let mut command = Command::new(shoal);
            command.arg(role).arg("--config").arg(config).arg("--data-dir").arg(dir.join(name));
            for (flag, value) in words {
                command.arg(flag).arg(value);
            }
            let program = Program::start(&mut command, &log)?;
            await_listener(answers, &log)?;
            programs.push(program);
            anyhow::Ok(())
        };
        for (n, (api, peer)) in apis.iter().zip(peers).enumerate() {
            let words =
                [("--api-listen", api.to_string()), ("--peer-listen", peer.to_string()), ("--this", api.to_string())];
            start(&format!("origin{n}"), "origin", &config, *api, &words)?;
        }
        start("tracker", "tracker", &config, tracker, &[("--api-listen", tracker.to_string())])?;
        start("index", "index", &tags, index, &[("--api-listen", index.to_string())])?;
        start("proxy", "proxy", &config, proxy, &[("--registry-listen", proxy.to_string())])?;
        let agent = |registry: SocketAddr, api: SocketAddr, peer: SocketAddr| {
            vec![
                ("--registry-listen", registry.to_string()),
                ("--api-listen", api.to_string()),
                ("--peer-listen", peer.to_string()),
            ]
        };
        start("agent", "agent", &config, agent_registry, &agent(agent_registry, agent_api, agent_peer))?;
        let mut words = agent(slow_registry, slow_api, slow_peer);
        words.push(("--peer-in-max", slow.to_owned()));
        start("slow", "agent", &config, slow_registry, &words)?;
        let this = Self {
            agent: programs.len() - 2,
            programs,
            proxy: Registry(proxy),
            agent_registry,
            agent_api,
            slow_registry,
            slow_api,
            origins: apis.to_vec(),
        };
        let begun = Instant::now();
        for server in [proxy, agent_api, slow_api].into_iter().chain(apis.iter().copied()) {
            while Connection::open(server)?.send("GET", "/readiness", "")?.status != 200 {
                ensure!(begun.elapsed() < READY, "{server} is not ready after {READY:?}");
                thread::sleep(LOOK);
            }
        }
        Ok(this)
    }

    /// The binary beside this one, unless another is named.
    pub(crate) fn binary(given: Option<&Path>) -> Result<PathBuf> {
        crate::saturate::programs::Cluster::binary(given).context(
            "there is no `shoal` beside this program: build it (cargo build --release --bins) or name it by --shoal",
        )
    }

    /// CPU seconds of all its processes so far.
    pub(crate) fn cpu_s(&self) -> Result<f64> {
        self.programs.iter().map(Program::cpu_s).sum()
    }

    /// Of the agent alone.
    pub(crate) fn agent_cpu_s(&self) -> Result<f64> {
        self.programs.get(self.agent).context("no agent")?.cpu_s()
    }

    /// Has the agents forget a blob.
    pub(crate) fn forget(&self, digest: &str) -> Result<()> {
        for api in [self.agent_api, self.slow_api] {
            Connection::open(api)?.send("DELETE", &format!("/blobs/{digest}"), "")?.expect(200)?;
        }
        Ok(())
    }

    /// Copies of a blob at the origins.
    pub(crate) fn copies(&self, digest: &str) -> Result<usize> {
        let mut copies = 0;
        for origin in &self.origins {
            let held = Connection::open(*origin)?.send("HEAD", &format!("/internal/blobs/{digest}"), "")?;
            copies += usize::from(held.status == 200);
        }
        Ok(copies)
    }

    /// Bytes that the agent has received from its peers, frames included.
    pub(crate) fn agent_received(&self) -> Result<f64> {
        let text = Connection::open(self.agent_api)?.text("/metrics")?;
        let line = text.lines().find_map(|line| line.strip_prefix("shoal_peer_received_bytes_total{role=\"agent\"} "));
        Ok(line.context("the agent counts no bytes from peers")?.parse()?)
    }
}

/// Debian's docker-registry.
pub(crate) struct DockerRegistry {
    program: Program,
    pub(crate) registry: Registry,
}

impl DockerRegistry {
    /// Where it is installed.
    pub(crate) fn binary() -> Option<PathBuf> {
        Some(PathBuf::from("/usr/bin/docker-registry")).filter(|path| path.is_file())
    }

    /// Starts it below `dir` with the distribution's own settings, its log aside.
    pub(crate) fn start(binary: &Path, dir: &Path) -> Result<Self> {
        let [addr] = free_ports()?;
        let (config, log, store) = (dir.join("docker.yml"), dir.join("docker.log"), dir.join("docker"));
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{ level: error, accesslog: {{ disabled: true }} }}\n\
                 storage: {{ cache: {{ blobdescriptor: inmemory }}, filesystem: {{ rootdirectory: {store:?} }} }}\n\
                 http: {{ addr: \"{addr}\" }}\n"
            ),
        )?;
        let program = Program::start(Command::new(binary).arg("serve").arg(&config), &log)?;
        await_listener(addr, &log)?;
        Ok(Self { program, registry: Registry(addr) })
    }

    pub(crate) fn cpu_s(&self) -> Result<f64> {
        self.program.cpu_s()
    }
}
