//! One configuration tree for all roles: the file as it is written ([`Raw`]), checked into what each role needs.
//!
//! A file is TOML. A role reads the sections it needs and ignores the others, so that one file may serve a whole host;
//! a key that nobody knows is an error. Flags stand over the file, the file over the defaults.

pub mod quantity;

pub use quantity::{HostPort, Rate, Size, Span};

use crate::{
    http::{self, Tls, tls::Files},
    index, origin, preheat,
    registry::access,
    retry, tracker, upstream,
};
use backends::RouteConfig;
use peer_proto::{handout, wire::Zone};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// What a process does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, clap::ValueEnum)]
pub enum Role {
    /// On every host: serves images and blobs to it, from the swarm.
    Agent,
    /// Keeps blobs, seeds them, and has them written to the storage backend.
    Origin,
    /// Tells nodes whom to download from.
    Tracker,
    /// The registry that images are pushed to.
    Proxy,
    /// Which digest a tag stands for.
    Index,
}

impl Role {
    /// Every role, in the order of the data: pushed, kept, found, pulled.
    pub const ALL: [Self; 5] = [Self::Proxy, Self::Index, Self::Tracker, Self::Origin, Self::Agent];

    /// Its name on the command line, in logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Origin => "origin",
            Self::Tracker => "tracker",
            Self::Proxy => "proxy",
            Self::Index => "index",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The file, with its defaults.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Raw {
    /// Where the role keeps what must survive a restart. One file system.
    pub data_dir: PathBuf,
    /// Longest wait for requests under way when the process is asked to stop.
    pub drain: Span,
    /// Logs.
    pub log: Log,
    /// Addresses that HTTP is served on.
    pub listen: Listen,
    /// The certificate of its listeners, which then speak TLS; plain HTTP without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Files>,
    /// Who may do what at a registry; everybody everything without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<access::Config>,
    /// The peer protocol: agents and origins.
    pub peer: Peer,
    /// The storage engine: agents and origins.
    pub engine: Engine,
    /// Bandwidth: agents and origins.
    pub limits: Limits,
    /// The services of the cluster.
    pub cluster: Cluster,
    /// How long an agent waits for what is not there yet.
    pub download: Download,
    /// The container runtimes of an agent's host.
    pub preload: Preload,
    /// What an agent is besides.
    pub agent: AgentSection,
    /// What a tracker tells its nodes.
    pub tracker: Tracker,
    /// What an origin does in the background.
    pub origin: origin::Config,
    /// What an index takes.
    pub index: Index,
    /// How an origin's background work is tried again.
    pub retry: retry::Config,
    /// Which registries proxies and agents answer for.
    pub mirror: upstream::Mirror,
    /// Registries that are mirrored.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub upstreams: Vec<upstream::Config>,
    /// Where origins keep blobs and indexes keep tags: the first entry whose namespace matches.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backends: Vec<RouteConfig>,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/shoal"),
            drain: Span::secs(30),
            log: Log::default(),
            listen: Listen::default(),
            tls: None,
            access: None,
            peer: Peer::default(),
            engine: Engine::default(),
            limits: Limits::default(),
            cluster: Cluster::default(),
            download: Download::default(),
            preload: Preload::default(),
            agent: AgentSection::default(),
            tracker: Tracker::default(),
            origin: origin::Config::default(),
            index: Index::default(),
            retry: retry::Config::default(),
            mirror: upstream::Mirror::default(),
            upstreams: Vec::new(),
            backends: Vec::new(),
        }
    }
}

/// `[log]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Lines for people, or JSON for machines.
    pub format: LogFormat,
    /// What is logged: a level, or directives such as `info,engine=debug`.
    pub filter: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".into() }
    }
}

/// The form of log lines.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `[listen]`: port 0 takes any free port.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// The registry: agents (127.0.0.1:16000) and proxies (0.0.0.0:15000).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry: Option<SocketAddr>,
    /// The role's own API: agents (16002), origins (15002), trackers (15003), indexes (15004).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api: Option<SocketAddr>,
}

/// `[peer]`
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Peer {
    /// Where peers are served: agents 0.0.0.0:16001, origins 0.0.0.0:15001.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// The address told to other nodes; found from the host's routes where none is given and `listen` names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<SocketAddr>,
    /// The node's failure or network zone.
    pub zone: String,
}

/// `[engine]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Engine {
    /// Threads that do network I/O; unless given as many as cores at an origin, and few at an agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<usize>,
    /// Threads that prove and write what arrives; unless given as many as cores at an origin, and some at an agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workers: Option<usize>,
    /// How the kernel is spoken to.
    pub driver: Driver,
    /// Most bytes of blobs kept on disk, the least recently used going first; as the disk allows unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota: Option<Size>,
    /// How received pieces are proven.
    pub proof: Proof,
    /// Serve from memory-mapped files; off for file systems that are unsafe to map.
    pub mmap: bool,
    /// How pieces that are in memory are sent to peers.
    pub send: SendPath,
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            shards: None,
            workers: None,
            driver: Driver::Auto,
            quota: None,
            proof: Proof::Full,
            mmap: true,
            send: SendPath::Sendfile,
        }
    }
}

/// How the bytes of pieces that are in memory get to a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SendPath {
    /// As they lie in the page cache, without a copy.
    Sendfile,
    /// From the file's mapping, with one copy by the kernel.
    Mapped,
}

/// How shards speak to the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// io_uring, or epoll where it is refused.
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// epoll.
    Epoll,
}

/// How received pieces are proven.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// Against the digest.
    Full,
    /// By checksum only: the digest is left to the client.
    Crc,
}

/// `[limits]`
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Most bytes a second received from peers; as the network allows unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_in: Option<Rate>,
    /// Most bytes a second sent to peers; as the network allows unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_out: Option<Rate>,
    /// Most bytes a second received from any one peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub each_peer_in: Option<Rate>,
    /// Most bytes a second sent to any one peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub each_peer_out: Option<Rate>,
    /// Most bytes a second received for pulls that a client waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub foreground_in: Option<Rate>,
    /// Most bytes a second received for preheats and repairs, which nobody waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub background_in: Option<Rate>,
    /// Most bytes a second sent to peers for pulls that a client waits for, as the peers say themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub foreground_out: Option<Rate>,
    /// Most bytes a second sent to peers for preheats and repairs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub background_out: Option<Rate>,
}

/// `[cluster]`: the same on every node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// The origins' API addresses.
    pub origins: Vec<HostPort>,
    /// The trackers' addresses.
    pub trackers: Vec<HostPort>,
    /// The indexes' addresses.
    pub indexes: Vec<HostPort>,
    /// The proxy that agents' registries pass writes on to; without it they refuse them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<HostPort>,
    /// The certificates, in PEM, that the roles above are known by: with it all of them are called over TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// Origins that keep each blob.
    pub replicas: usize,
    /// An origin's own entry in `origins`; the entry of the host's name and port unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub this: Option<HostPort>,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            origins: Vec::new(),
            trackers: Vec::new(),
            indexes: Vec::new(),
            proxy: None,
            ca: None,
            replicas: 2,
            this: None,
        }
    }
}

/// `[download]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Download {
    /// Longest wait while no tracker or origin can be reached.
    pub unreachable_wait: Span,
    /// Longest wait while an origin fetches the blob from its backend.
    pub refresh_wait: Span,
    /// Longest wait of a client for the next piece.
    pub piece_wait: Span,
    /// Wait for the swarm to bring the next piece, after which it is fetched from the origins, where `cluster.origins` names them.
    pub fallback_wait: Span,
}

impl Default for Download {
    fn default() -> Self {
        Self {
            unreachable_wait: Span::secs(30),
            refresh_wait: Span::secs(900),
            piece_wait: Span::secs(300),
            fallback_wait: Span::secs(2),
        }
    }
}

/// `[preload]`
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Preload {
    /// Docker's socket.
    pub docker: PathBuf,
    /// containerd's socket.
    pub containerd: PathBuf,
    /// The client that comes with containerd.
    pub ctr: PathBuf,
}

impl Default for Preload {
    fn default() -> Self {
        Self {
            docker: "/var/run/docker.sock".into(),
            containerd: "/run/containerd/containerd.sock".into(),
            ctr: "ctr".into(),
        }
    }
}

/// `[agent]`
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentSection {
    /// What preheats may choose the host by, such as "gpu" or "zone=a".
    pub labels: Vec<preheat::Label>,
}

/// `[tracker]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tracker {
    /// How often nodes announce that want more peers.
    pub interval_wanting: Span,
    /// How often nodes announce that download and have peers enough.
    pub interval_leeching: Span,
    /// How often nodes announce that only seed.
    pub interval_seeding: Span,
    /// How often agents ask for preheats.
    pub interval_preheat: Span,
    /// Silence after which a node is forgotten.
    pub silence_max: Span,
    /// Downloading nodes that an origin is given to at a time, for each blob.
    pub origin_links: usize,
    /// Links beyond which a node is not handed out for a blob.
    pub links_max: u16,
    /// Announces a second; the intervals are stretched for it in a large cluster.
    pub announces_per_s_max: u32,
    /// Most nodes.
    pub hosts_max: usize,
    /// Most blobs.
    pub blobs_max: usize,
}

impl Default for Tracker {
    fn default() -> Self {
        let handout = handout::Config::default();
        Self {
            interval_wanting: Span::of(handout.interval_wanting),
            interval_leeching: Span::of(handout.interval_leeching),
            interval_seeding: Span::of(handout.interval_seeding),
            interval_preheat: Span::secs(10),
            silence_max: Span::of(handout.ttl),
            origin_links: handout.origin_links,
            links_max: handout.links_max,
            announces_per_s_max: handout.rate_max,
            hosts_max: handout.hosts_max,
            blobs_max: handout.swarms_max,
        }
    }
}

/// `[index]`: for indexes, and proxies where said.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Index {
    /// Take a tag only if the origins have all it needs.
    pub check_dependencies: bool,
    /// Take an image index although some of its manifests are not there; proxies as well.
    pub sparse_indexes: bool,
    /// How old the list of repositories may be as far as other indexes change it.
    pub catalog_age: Span,
    /// Delete what nothing reaches; not unless given. The same at all indexes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collect: Option<index::Collect>,
}

impl Default for Index {
    fn default() -> Self {
        let index::Config { check_dependencies, sparse_indexes, catalog_age, collect, .. } = index::Config::default();
        Self { check_dependencies, sparse_indexes, catalog_age, collect }
    }
}

/// A value of the file that cannot be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// The key, as `section.key`.
    pub key: &'static str,
    /// What is wrong with it.
    pub message: String,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("{path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
    /// The text is not TOML, or has a key or a value that nobody knows.
    #[error("{path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where, and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// `--set` with something else than `key=value`, or a key or a value that nobody knows.
    #[error("--set {assignment}: {message}")]
    Set {
        /// As it was given.
        assignment: String,
        /// What is wrong with it.
        message: String,
    },
    /// Values that cannot be, or not together.
    #[error("{}", lines(.0))]
    Problems(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(|p| format!("{}: {}", p.key, p.message)).collect();
    lines.join("\n")
}

impl Raw {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
        toml::from_str(&text).map_err(|source| Error::Parse { path: path.to_path_buf(), source: source.into() })
    }

    /// Sets one key: `section.key=value`, the value as in the file, or a bare text.
    pub fn set(&mut self, assignment: &str) -> Result<(), Error> {
        let error = |message: String| Error::Set { assignment: assignment.into(), message };
        let (key, text) = assignment.split_once('=').ok_or_else(|| error("expected section.key=value".into()))?;
        let value = toml::from_str::<toml::Table>(&format!("value = {text}"))
            .ok()
            .and_then(|mut table| table.remove("value"))
            .unwrap_or_else(|| toml::Value::String(text.into()));
        let mut tree = toml::Table::try_from(&*self).map_err(|e| error(e.to_string()))?;
        let mut at = &mut tree;
        let mut path = key.trim().split('.').peekable();
        while let Some(part) = path.next() {
            if path.peek().is_none() {
                at.insert(part.into(), value);
                break;
            }
            let next = at.entry(part).or_insert_with(|| toml::Table::new().into());
            at = next.as_table_mut().ok_or_else(|| error(format!("{part} is not a section")))?;
        }
        *self = tree.try_into().map_err(|e| error(e.message().into()))?;
        Ok(())
    }

    /// Fills in what depends on the role.
    pub fn fill(&mut self, role: Role) {
        let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let (registry, api, peer) = match role {
            Role::Agent => (Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 16000))), Some(any(16002)), Some(any(16001))),
            Role::Origin => (None, Some(any(15002)), Some(any(15001))),
            Role::Tracker => (None, Some(any(15003)), None),
            Role::Proxy => (Some(any(15000)), None, None),
            Role::Index => (None, Some(any(15004)), None),
        };
        self.listen.registry = self.listen.registry.or(registry);
        self.listen.api = self.listen.api.or(api);
        self.peer.listen = self.peer.listen.or(peer);
    }

    /// The file as it would have to be written to say everything that is in force.
    pub fn print(&self) -> String {
        toml::to_string(self).unwrap_or_else(|error| format!("# not representable: {error}\n"))
    }

    /// Checks what an agent needs.
    pub fn agent(&self) -> Result<Agent, Error> {
        let mut check = Check::new(self, Role::Agent);
        let agent = Agent {
            common: check.common(),
            registry: check.raw.listen.registry.unwrap_or(ANY),
            api: check.raw.listen.api.unwrap_or(ANY),
            engine: check.engine(false),
            zone: self.peer.zone.clone(),
            trackers: check.hosts("cluster.trackers", &self.cluster.trackers),
            origins: self.cluster.origins.clone(),
            replicas: check.replicas(),
            indexes: check.hosts("cluster.indexes", &self.cluster.indexes),
            proxy: self.cluster.proxy.clone(),
            labels: check.labels(),
            download: DownloadWaits {
                unreachable: self.download.unreachable_wait.get(),
                refresh: self.download.refresh_wait.get(),
                piece: self.download.piece_wait.get(),
                fallback: self.download.fallback_wait.get(),
            },
            preload: self.preload.clone(),
        };
        check.positive("download.piece_wait", self.download.piece_wait);
        check.positive("download.fallback_wait", self.download.fallback_wait);
        check.done(agent)
    }

    /// Checks what an origin needs.
    pub fn origin(&self) -> Result<Origin, Error> {
        let mut check = Check::new(self, Role::Origin);
        let api = check.raw.listen.api.unwrap_or(ANY);
        let origins = check.hosts("cluster.origins", &self.cluster.origins);
        let origin = Origin {
            common: check.common(),
            api,
            engine: check.engine(true),
            zone: self.peer.zone.clone(),
            this: check.this(&origins, api),
            origins,
            replicas: check.replicas(),
            backends: check.backends(),
            origin: self.origin.clone(),
            retry: self.retry.clone(),
        };
        check.done(origin)
    }

    /// Checks what a tracker needs.
    pub fn tracker(&self) -> Result<TrackerRole, Error> {
        let mut check = Check::new(self, Role::Tracker);
        let replicas = check.replicas();
        let tracker = TrackerRole {
            common: check.common(),
            api: check.raw.listen.api.unwrap_or(ANY),
            origins: check.hosts("cluster.origins", &self.cluster.origins),
            replicas,
            handout: check.handout(replicas),
            preheat: tracker::preheat::Config {
                interval: self.tracker.interval_preheat.get(),
                silence: self.tracker.silence_max.get(),
                hosts_max: self.tracker.hosts_max,
            },
        };
        check.done(tracker)
    }

    /// Checks what a proxy needs.
    pub fn proxy(&self) -> Result<Proxy, Error> {
        let mut check = Check::new(self, Role::Proxy);
        let proxy = Proxy {
            common: check.common(),
            registry: check.raw.listen.registry.unwrap_or(ANY),
            origins: check.hosts("cluster.origins", &self.cluster.origins),
            replicas: check.replicas(),
            indexes: check.hosts("cluster.indexes", &self.cluster.indexes),
            trackers: self.cluster.trackers.clone(),
            sparse_indexes: self.index.sparse_indexes,
        };
        check.done(proxy)
    }

    /// Checks what an index needs.
    pub fn index(&self) -> Result<IndexRole, Error> {
        let mut check = Check::new(self, Role::Index);
        let Index { check_dependencies, sparse_indexes, catalog_age, collect } = self.index.clone();
        if collect.is_some() && !check_dependencies {
            check.problem("index.collect", "nothing can be collected safely without check_dependencies");
        }
        let backends = check.backends();
        let index = IndexRole {
            common: check.common(),
            api: check.raw.listen.api.unwrap_or(ANY),
            origins: check.hosts("cluster.origins", &self.cluster.origins),
            replicas: check.replicas(),
            index: index::Config { backends, check_dependencies, sparse_indexes, catalog_age, collect },
        };
        check.done(index)
    }

    /// Checks what a role needs, for its errors alone.
    pub fn check(&self, role: Role) -> Result<(), Error> {
        match role {
            Role::Agent => self.agent().map(drop),
            Role::Origin => self.origin().map(drop),
            Role::Tracker => self.tracker().map(drop),
            Role::Proxy => self.proxy().map(drop),
            Role::Index => self.index().map(drop),
        }
    }
}

/// What every role has.
#[derive(Clone, Debug)]
pub struct Common {
    /// Where the role keeps what must survive a restart.
    pub data_dir: PathBuf,
    /// Longest wait for requests under way at the end.
    pub drain: Duration,
    /// The certificate of its listeners, where they speak TLS.
    pub tls: Option<Files>,
    /// Who may do what at its registry.
    pub access: Option<access::Config>,
    /// Whom it trusts when it calls others over TLS, where it does.
    pub ca: Option<PathBuf>,
    /// Registries that are mirrored.
    pub upstreams: Vec<upstream::Config>,
    /// How they are asked for.
    pub mirror: upstream::Mirror,
}

/// A checked agent.
#[derive(Clone, Debug)]
pub struct Agent {
    /// What every role has.
    pub common: Common,
    /// Where its registry listens.
    pub registry: SocketAddr,
    /// Where its blob API listens.
    pub api: SocketAddr,
    /// Its engine.
    pub engine: engine::Config,
    /// Its zone; may be empty.
    pub zone: String,
    /// At least one.
    pub trackers: Vec<HostPort>,
    /// What the swarm does not bring is had from them; none where that is not wanted.
    pub origins: Vec<HostPort>,
    /// Origins that keep each blob.
    pub replicas: NonZeroUsize,
    /// At least one.
    pub indexes: Vec<HostPort>,
    /// Takes what is written at the registry; none where that is refused.
    pub proxy: Option<HostPort>,
    /// What preheats choose it by.
    pub labels: Vec<preheat::Label>,
    /// How long it waits.
    pub download: DownloadWaits,
    /// Who pulls images for the host.
    pub preload: Preload,
}

/// How long an agent waits for what is not there yet.
#[derive(Clone, Copy, Debug)]
pub struct DownloadWaits {
    /// While no tracker or origin can be reached.
    pub unreachable: Duration,
    /// While an origin fetches the blob from its backend.
    pub refresh: Duration,
    /// A client, for the next piece.
    pub piece: Duration,
    /// The swarm's time for the next piece, before it is fetched from elsewhere.
    pub fallback: Duration,
}

/// A checked origin.
#[derive(Clone, Debug)]
pub struct Origin {
    /// What every role has.
    pub common: Common,
    /// Where its blob API listens.
    pub api: SocketAddr,
    /// Its engine.
    pub engine: engine::Config,
    /// Its zone; may be empty.
    pub zone: String,
    /// Its own entry among `origins`.
    pub this: HostPort,
    /// All origins, itself included.
    pub origins: Vec<HostPort>,
    /// Origins that keep each blob, at most all of them.
    pub replicas: NonZeroUsize,
    /// Where blobs are kept for good; at least one.
    pub backends: Vec<RouteConfig>,
    /// What it does in the background.
    pub origin: origin::Config,
    /// How that is tried again.
    pub retry: retry::Config,
}

/// A checked tracker.
#[derive(Clone, Debug)]
pub struct TrackerRole {
    /// What every role has.
    pub common: Common,
    /// Where it listens.
    pub api: SocketAddr,
    /// At least one.
    pub origins: Vec<HostPort>,
    /// Origins that keep each blob, at most all of them.
    pub replicas: NonZeroUsize,
    /// Its policy; the seed is drawn at the start.
    pub handout: handout::Config,
    /// How it preheats hosts.
    pub preheat: tracker::preheat::Config,
}

/// A checked proxy.
#[derive(Clone, Debug)]
pub struct Proxy {
    /// What every role has.
    pub common: Common,
    /// Where its registry listens.
    pub registry: SocketAddr,
    /// At least one.
    pub origins: Vec<HostPort>,
    /// Origins that keep each blob, at most all of them.
    pub replicas: NonZeroUsize,
    /// At least one.
    pub indexes: Vec<HostPort>,
    /// Whom agents ask for preheats; none where only origins are preheated.
    pub trackers: Vec<HostPort>,
    /// Take an image index although some of its manifests are not there.
    pub sparse_indexes: bool,
}

/// A checked index.
#[derive(Clone, Debug)]
pub struct IndexRole {
    /// What every role has.
    pub common: Common,
    /// Where it listens.
    pub api: SocketAddr,
    /// At least one.
    pub origins: Vec<HostPort>,
    /// Origins that keep each blob, at most all of them.
    pub replicas: NonZeroUsize,
    /// What it takes, and where it keeps tags.
    pub index: index::Config,
}

/// Most services of one kind.
const HOSTS_MAX: usize = 1024;
/// Most registries that are mirrored.
const UPSTREAMS_MAX: usize = 256;
/// Most threads of one kind.
const THREADS_MAX: usize = 256;
/// Stands where a problem was noted, or the role has a default.
const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// A check under way: the filled-in file, and the problems so far.
struct Check {
    role: Role,
    raw: Raw,
    problems: Vec<Problem>,
}

impl Check {
    fn new(raw: &Raw, role: Role) -> Self {
        let mut raw = raw.clone();
        raw.fill(role);
        Self { role, raw, problems: Vec::new() }
    }

    fn done<T>(self, checked: T) -> Result<T, Error> {
        if self.problems.is_empty() { Ok(checked) } else { Err(Error::Problems(self.problems)) }
    }

    fn problem(&mut self, key: &'static str, message: impl Into<String>) {
        self.problems.push(Problem { key, message: message.into() });
    }

    fn positive(&mut self, key: &'static str, span: Span) {
        if span.get().is_zero() {
            self.problem(key, "must be more than 0s");
        }
    }

    fn common(&mut self) -> Common {
        if self.raw.data_dir.as_os_str().is_empty() {
            self.problem("data_dir", "must name a directory");
        }
        if let Err(error) = self.raw.log.filter.parse::<tracing_subscriber::EnvFilter>() {
            self.problem("log.filter", error.to_string());
        }
        self.upstreams();
        self.files();
        Common {
            data_dir: self.raw.data_dir.clone(),
            drain: self.raw.drain.get(),
            tls: self.raw.tls.clone(),
            access: self.raw.access.clone(),
            ca: self.raw.cluster.ca.clone(),
            upstreams: self.raw.upstreams.clone(),
            mirror: self.raw.mirror.clone(),
        }
    }

    /// Reads the files of certificates, names and keys: a start would fail of them.
    fn files(&mut self) {
        let Raw { tls, access, cluster, .. } = self.raw.clone();
        if let Some(Err(error)) = tls.map(Tls::open) {
            self.problem("tls", error.to_string());
        }
        if let Some(Err(error)) = cluster.ca.as_deref().map(http::tls::trusting) {
            self.problem("cluster.ca", error.to_string());
        }
        let tokens = access.as_ref().and_then(|access| access.tokens.as_ref());
        let passed_on = self.role == Role::Agent && cluster.proxy.is_some();
        if tokens.is_some_and(|tokens| tokens.realm.is_none() && tokens.signing_keys.is_none()) && !passed_on {
            let why = "must say where clients get tokens, as there are no signing_keys to issue any here";
            self.problem("access.tokens.realm", why);
        }
        if let Some(Err(error)) = access.map(access::Access::open) {
            self.problem("access", error.to_string());
        }
    }

    fn upstreams(&mut self) {
        let (upstreams, mirror) = (self.raw.upstreams.clone(), self.raw.mirror.clone());
        if upstreams.len() > UPSTREAMS_MAX {
            self.problem("upstreams", format!("at most {UPSTREAMS_MAX}, not {}", upstreams.len()));
        }
        let (mut names, mut prefixes) = (BTreeSet::new(), BTreeSet::new());
        names.extend(mirror.own_names);
        for upstream in &upstreams {
            for (key, message) in upstream.problems() {
                self.problem(key, message);
            }
            if !names.insert(upstream.name.clone()) {
                self.problem("upstreams.name", format!("{} is there twice, or one of mirror.own_names", upstream.name));
            }
            if !prefixes.insert(upstream.prefix()) {
                self.problem("upstreams.prefix", format!("{} is there twice: give one another", upstream.prefix()));
            }
        }
        if let Some(name) = mirror.default_upstream.filter(|name| !upstreams.iter().any(|one| one.name == *name)) {
            let why = format!("{name} is no name of an [[upstreams]] entry: add one, or leave this out");
            self.problem("mirror.default_upstream", why);
        }
    }

    fn engine(&mut self, origin: bool) -> engine::Config {
        let cores = thread::available_parallelism().map_or(2, NonZeroUsize::get);
        let raw = self.raw.engine.clone();
        let listen = self.raw.peer.listen.unwrap_or(ANY);
        if let Some(advertise) = self.raw.peer.advertise
            && (advertise.ip().is_unspecified() || advertise.port() == 0)
        {
            self.problem("peer.advertise", format!("{advertise} is not an address that others can dial"));
        }
        let (shards, workers) = default_threads(origin, cores);
        engine::Config {
            data_dir: self.raw.data_dir.clone(),
            listen,
            advertise: self.raw.peer.advertise,
            id: None,
            origin,
            zone: Zone::of(&self.raw.peer.zone),
            shards: self.threads("engine.shards", raw.shards, shards),
            workers: self.threads("engine.workers", raw.workers, workers),
            driver: match raw.driver {
                Driver::Auto => engine::handle::DriverChoice::Auto,
                Driver::IoUring => engine::handle::DriverChoice::IoUring,
                Driver::Epoll => engine::handle::DriverChoice::Epoll,
            },
            quota: self.nonzero("engine.quota", raw.quota.map(Size::get)),
            proof: match raw.proof {
                Proof::Full => engine::handle::Proof::Full,
                Proof::Crc => engine::handle::Proof::Crc,
            },
            mmap: raw.mmap,
            send: match raw.send {
                SendPath::Sendfile => engine::handle::SendPath::Sendfile,
                SendPath::Mapped => engine::handle::SendPath::Mapped,
            },
            limits: self.limits(),
            peer_idle: peer_proto::conn::IDLE_MAX,
        }
    }

    fn limits(&mut self) -> engine::handle::Limits {
        let raw = self.raw.limits.clone();
        let mut rate = |key, rate: Option<Rate>| self.nonzero(key, rate.map(Rate::bytes_per_s));
        engine::handle::Limits {
            bytes_in_per_s: rate("limits.peer_in", raw.peer_in),
            bytes_out_per_s: rate("limits.peer_out", raw.peer_out),
            peer_in_per_s: rate("limits.each_peer_in", raw.each_peer_in),
            peer_out_per_s: rate("limits.each_peer_out", raw.each_peer_out),
            foreground_in_per_s: rate("limits.foreground_in", raw.foreground_in),
            background_in_per_s: rate("limits.background_in", raw.background_in),
            foreground_out_per_s: rate("limits.foreground_out", raw.foreground_out),
            background_out_per_s: rate("limits.background_out", raw.background_out),
        }
    }

    fn threads(&mut self, key: &'static str, given: Option<usize>, default: usize) -> NonZeroUsize {
        let count = given.unwrap_or_else(|| default.clamp(1, THREADS_MAX));
        if count > THREADS_MAX {
            self.problem(key, format!("must be 1 to {THREADS_MAX}, not {count}"));
        }
        NonZeroUsize::new(count).unwrap_or_else(|| {
            self.problem(key, format!("must be 1 to {THREADS_MAX}, not 0"));
            NonZeroUsize::MIN
        })
    }

    fn labels(&mut self) -> Vec<preheat::Label> {
        let labels = self.raw.agent.labels.clone();
        if labels.len() > preheat::LABELS_MAX {
            self.problem("agent.labels", format!("at most {}, not {}", preheat::LABELS_MAX, labels.len()));
        }
        labels
    }

    fn nonzero(&mut self, key: &'static str, given: Option<u64>) -> Option<NonZeroU64> {
        if given == Some(0) {
            self.problem(key, "must be more than 0; leave it out for no limit");
        }
        given.and_then(NonZeroU64::new)
    }

    fn hosts(&mut self, key: &'static str, hosts: &[HostPort]) -> Vec<HostPort> {
        if hosts.is_empty() {
            self.problem(key, "must name at least one host:port");
        }
        if hosts.len() > HOSTS_MAX {
            self.problem(key, format!("must name at most {HOSTS_MAX} hosts, not {}", hosts.len()));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = hosts.iter().find(|host| !seen.insert(*host)) {
            self.problem(key, format!("names {twice} twice"));
        }
        hosts.to_vec()
    }

    fn replicas(&mut self) -> NonZeroUsize {
        let all = self.raw.cluster.origins.len().max(1);
        NonZeroUsize::new(self.raw.cluster.replicas.min(all)).unwrap_or_else(|| {
            self.problem("cluster.replicas", "must be at least 1");
            NonZeroUsize::MIN
        })
    }

    fn handout(&mut self, replicas: NonZeroUsize) -> handout::Config {
        let raw = self.raw.tracker.clone();
        for (key, span) in [
            ("tracker.interval_wanting", raw.interval_wanting),
            ("tracker.interval_leeching", raw.interval_leeching),
            ("tracker.interval_seeding", raw.interval_seeding),
            ("tracker.interval_preheat", raw.interval_preheat),
        ] {
            self.positive(key, span);
        }
        let silence = raw.silence_max.get();
        let intervals = [raw.interval_seeding, raw.interval_leeching, raw.interval_preheat];
        if intervals.iter().any(|interval| silence < 2 * interval.get()) {
            self.problem(
                "tracker.silence_max",
                "must be at least twice the intervals, or nodes are forgotten between two",
            );
        }
        for (key, count) in [
            ("tracker.origin_links", raw.origin_links),
            ("tracker.links_max", usize::from(raw.links_max)),
            ("tracker.announces_per_s_max", usize::try_from(raw.announces_per_s_max).unwrap_or(usize::MAX)),
            ("tracker.hosts_max", raw.hosts_max),
            ("tracker.blobs_max", raw.blobs_max),
        ] {
            if count == 0 {
                self.problem(key, "must be at least 1");
            }
        }
        handout::Config {
            replicas: replicas.get(),
            links_max: raw.links_max,
            origin_links: raw.origin_links,
            ttl: silence,
            interval_wanting: raw.interval_wanting.get(),
            interval_leeching: raw.interval_leeching.get(),
            interval_seeding: raw.interval_seeding.get(),
            rate_max: raw.announces_per_s_max,
            hosts_max: raw.hosts_max,
            swarms_max: raw.blobs_max,
            ..handout::Config::default()
        }
    }

    fn backends(&mut self) -> Vec<RouteConfig> {
        let backends = self.raw.backends.clone();
        if backends.is_empty() {
            self.problem("backends", "must have at least one [[backends]] entry");
        }
        for backend in &backends {
            if let Err(error) = regex::Regex::new(&backend.namespace) {
                self.problem("backends.namespace", error.to_string());
            }
        }
        backends
    }

    /// The origin's own entry among all: as given, or the one that has its port and its name or address.
    fn this(&mut self, hosts: &[HostPort], listen: SocketAddr) -> HostPort {
        let anything = || HostPort::from(listen);
        if hosts.is_empty() {
            return anything();
        }
        if let Some(this) = self.raw.cluster.this.clone() {
            if !hosts.contains(&this) {
                self.problem("cluster.this", format!("{this} is not in cluster.origins"));
            }
            return this;
        }
        if let [only] = hosts {
            return only.clone();
        }
        let name = host_name();
        let mine = |host: &&HostPort| {
            host.as_str() == listen.to_string()
                || host.as_str().strip_prefix(host.host()) == Some(&format!(":{}", listen.port()))
                    && !name.is_empty()
                    && (host.host() == name || host.host().split('.').next() == Some(&name))
        };
        match hosts.iter().find(mine) {
            Some(this) => this.clone(),
            None => {
                self.problem(
                    "cluster.this",
                    format!("must say which entry of cluster.origins this is: neither {listen} nor {name:?} is in it"),
                );
                anything()
            }
        }
    }
}

/// The host's name; empty where the kernel does not tell.
/// Threads of an engine unless given: shards, and those that prove and write. An origin has the machine to itself. An agent has not:
/// a shard takes in some 2.5 GB/s, a thread proves and writes some 0.8 GB/s, which makes this enough for a card of 50 Gbit/s.
fn default_threads(origin: bool, cores: usize) -> (usize, usize) {
    if origin { (cores, cores) } else { ((cores / 8).clamp(1, 4), (cores / 2).clamp(2, 8)) }
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(result: Result<(), Error>) -> String {
        match result {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    fn raw(text: &str) -> Raw {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn the_files_beside_the_source_are_sound() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
        for role in Role::ALL {
            let raw = Raw::read(&dir.join(format!("{role}.toml"))).unwrap();
            raw.check(role).unwrap();
        }
    }

    #[test]
    fn what_is_printed_reads_back() {
        for role in Role::ALL {
            let mut filled =
                raw("[cluster]\norigins = [\"o:1\"]\n[engine]\nquota = \"1GiB\"\n[limits]\npeer_in = \"1GB/s\"");
            filled.fill(role);
            assert_eq!(raw(&filled.print()), filled);
        }
    }

    #[test]
    fn problems_name_their_keys() {
        let text = r#"
            data_dir = ""
            [log]
            filter = "a=b=c"
            [peer]
            advertise = "0.0.0.0:1"
            [engine]
            shards = 0
            workers = 1000
            quota = 0
            [cluster]
            trackers = ["t:1", "t:1"]
            [download]
            piece_wait = "0s"
        "#;
        let said = problems(raw(text).check(Role::Agent));
        let keys: Vec<&str> = said.lines().map(|line| line.split(':').next().unwrap()).collect();
        let expected = [
            "data_dir",
            "log.filter",
            "peer.advertise",
            "engine.shards",
            "engine.workers",
            "engine.quota",
            "cluster.trackers",
            "cluster.indexes",
            "download.piece_wait",
        ];
        assert_eq!(keys, expected, "{said}");
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused() {
        for (text, said) in [
            ("[engin]", "unknown field `engin`"),
            ("[engine]\nquotta = 1", "unknown field `quotta`"),
            ("[engine]\nquota = \"1 furlong\"", "is not a number of bytes such as"),
            ("drain = 30", "\"30\" is not a duration such as"),
            ("[cluster]\norigins = [\"origin\"]", "is not host:port"),
            ("[agent]\nlabels = [\"a b\"]", "a label is 1 to 64 letters"),
        ] {
            let error = toml::from_str::<Raw>(text).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn single_keys_can_be_set() {
        let mut raw = Raw::default();
        raw.set("engine.quota=10GiB").unwrap();
        raw.set("engine.mmap=false").unwrap();
        raw.set("cluster.trackers=[\"t:1\"]").unwrap();
        raw.set("data_dir=/srv").unwrap();
        assert_eq!(raw.engine.quota, Some(Size::bytes(10 << 30)));
        assert!(!raw.engine.mmap);
        assert_eq!(raw.cluster.trackers, ["t:1".parse().unwrap()]);
        assert_eq!(raw.data_dir, Path::new("/srv"));
        for bad in ["engine", "engine.nothing=1", "data_dir.x=1", "engine.mmap=perhaps"] {
            assert!(raw.set(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn agents_have_few_threads_and_origins_all_cores() {
        for (cores, agent) in [(1, (1, 2)), (2, (1, 2)), (8, (1, 4)), (64, (4, 8))] {
            assert_eq!(default_threads(false, cores), agent);
            assert_eq!(default_threads(true, cores), (cores, cores));
        }
    }

    #[test]
    fn an_origin_finds_itself() {
        let store = "[[backends]]\nstore = { kind = \"memory\" }\n";
        let raw = |text: &str| raw(&format!("{text}{store}"));
        let origins = "[cluster]\norigins = [\"10.0.0.1:15002\", \"10.0.0.2:15002\"]\n";
        let listen = "[listen]\napi = \"10.0.0.2:15002\"\n";
        assert_eq!(raw(&format!("{origins}{listen}")).origin().unwrap().this.as_str(), "10.0.0.2:15002");
        assert!(problems(raw(origins).check(Role::Origin)).starts_with("cluster.this: must say which entry"));
        let wrong = format!("{origins}this = \"10.0.0.3:15002\"\n");
        assert_eq!(problems(raw(&wrong).check(Role::Origin)), "cluster.this: 10.0.0.3:15002 is not in cluster.origins");
        let alone = raw("[cluster]\norigins = [\"o:15002\"]\n").origin().unwrap();
        assert_eq!((alone.this.as_str(), alone.replicas.get()), ("o:15002", 1));
    }
}
