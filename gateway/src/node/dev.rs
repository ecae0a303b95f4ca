//! `shoal dev`: every role in one process on loopback, for a first look and for tests.

use super::{Node, runtime};
use crate::{
    admin,
    cli::{LogOptions, say},
    config::{Engine, HostPort, Listen, Log, Peer, Raw, Span},
};
use anyhow::{Context as _, ensure};
use backends::{FsConfig, RouteConfig, StoreConfig};
use clap::Args;
use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    thread,
};

/// Origins of a dev cluster.
const ORIGINS: u16 = 2;
/// Distance between the ports of two origins.
const ORIGIN_STEP: u16 = 10;
/// Distance between the ports of two agents.
const AGENT_STEP: u16 = 1000;
/// Most agents: each has an engine of its own.
const AGENTS_MAX: u16 = 50;

/// How a dev cluster is run.
#[derive(Debug, Args)]
pub struct Options {
    /// Where everything is kept; a second start serves what was pushed before
    #[arg(long, value_name = "DIR", default_value = ".shoal")]
    data_dir: PathBuf,
    /// Number of agents
    #[arg(long, value_name = "N", default_value_t = 3)]
    agents: u16,
    /// The address everything listens on
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// The proxy's port, from which all others follow: origins +2 and +12 (peers +1 and +11), tracker +3, index +4,
    /// agent k +1000k (peers +1, blobs +2)
    #[arg(long, value_name = "PORT", default_value_t = 15000)]
    base_port: u16,
    /// The tracker's port
    #[arg(long, value_name = "PORT")]
    tracker_port: Option<u16>,
    /// The index's port
    #[arg(long, value_name = "PORT")]
    index_port: Option<u16>,
    /// The first origin's API port (peers one below); the second's is 10 above
    #[arg(long, value_name = "PORT")]
    origin_port: Option<u16>,
    /// The first agent's registry port (peers +1, blobs +2); the next are 1000 apart
    #[arg(long, value_name = "PORT")]
    agent_port: Option<u16>,
    #[command(flatten)]
    log: LogOptions,
}

/// Which port is whose.
#[derive(Clone, PartialEq, Debug)]
struct Ports {
    proxy: u16,
    tracker: u16,
    index: u16,
    /// API and peers.
    origins: Vec<(u16, u16)>,
    /// Registry, API and peers.
    agents: Vec<(u16, u16, u16)>,
}

impl Options {
    /// Runs the cluster until it is told to stop.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        // The table is what there is to see; what comes after it should need attention.
        let log = Log { filter: "warn".into(), ..Log::default() };
        let mut raw = Raw { drain: Span::secs(10), log, ..Raw::default() };
        self.log.apply(&mut raw);
        admin::log::start(&raw.log)?;
        let ports = self.ports()?;
        runtime()?.block_on(async {
            let mut node = Node::new();
            self.start(&mut node, &raw, &ports).await.context(
                "the dev cluster did not start; where a port is taken, is another one running? see --base-port",
            )?;
            say(&self.table(&ports))?;
            node.until_told(raw.drain.get()).await
        })
    }

    fn ports(&self) -> anyhow::Result<Ports> {
        ensure!((1..=AGENTS_MAX).contains(&self.agents), "--agents must be 1 to {AGENTS_MAX}, not {}", self.agents);
        let at = |base: u16, offset: u32| {
            let port = u16::try_from(u32::from(base) + offset).ok().filter(|port| *port != 0);
            port.context("the ports do not all fit; see --base-port")
        };
        let base = self.base_port;
        let given_or = |given: Option<u16>, offset| given.map_or_else(|| at(base, offset), Ok);
        let step = u32::from(AGENT_STEP);
        let first_origin = given_or(self.origin_port, 2)?;
        let first_agent = given_or(self.agent_port, step)?;
        let origins = (0..ORIGINS).map(|k| {
            let api = at(first_origin, u32::from(k * ORIGIN_STEP))?;
            Ok((api, api.checked_sub(1).filter(|port| *port != 0).context("--origin-port must be 2 or more")?))
        });
        let agents = (0..u32::from(self.agents)).map(|k| {
            let registry = at(first_agent, k * step)?;
            Ok((registry, at(registry, 2)?, at(registry, 1)?))
        });
        Ok(Ports {
            proxy: at(base, 0)?,
            tracker: given_or(self.tracker_port, 3)?,
            index: given_or(self.index_port, 4)?,
            origins: origins.collect::<anyhow::Result<_>>()?,
            agents: agents.collect::<anyhow::Result<_>>()?,
        })
    }

    async fn start(&self, node: &mut Node, raw: &Raw, ports: &Ports) -> anyhow::Result<()> {
        let addr = |port| SocketAddr::new(self.host, port);
        let host = |port| HostPort::from(addr(port));
        let mut raw = raw.clone();
        let root = self.data_dir.join("backend");
        raw.backends = vec![RouteConfig::all(StoreConfig::Fs(FsConfig { root }))];
        raw.cluster.origins = ports.origins.iter().map(|(api, _)| host(*api)).collect();
        raw.cluster.trackers = vec![host(ports.tracker)];
        raw.cluster.indexes = vec![host(ports.index)];
        raw.cluster.replicas = usize::from(ORIGINS);
        // Many engines share the machine.
        let workers = if thread::available_parallelism().map_or(1, usize::from) > 4 { 2 } else { 1 };
        raw.engine = Engine { shards: Some(1), workers: Some(workers), ..Engine::default() };
        let of = |name: String, registry: Option<u16>, api: Option<u16>, peer: Option<u16>| Raw {
            data_dir: self.data_dir.join(name),
            listen: Listen { registry: registry.map(addr), api: api.map(addr) },
            peer: Peer { listen: peer.map(addr), ..Peer::default() },
            ..raw.clone()
        };
        for (k, (api, peer)) in ports.origins.iter().enumerate() {
            let mut raw = of(format!("origin-{}", k + 1), None, Some(*api), Some(*peer));
            raw.cluster.this = Some(host(*api));
            node.origin(raw.origin()?).await?;
        }
        node.tracker(of("tracker".into(), None, Some(ports.tracker), None).tracker()?).await?;
        node.index(of("index".into(), None, Some(ports.index), None).index()?).await?;
        node.proxy(of("proxy".into(), Some(ports.proxy), None, None).proxy()?).await?;
        for (k, (registry, api, peer)) in ports.agents.iter().enumerate() {
            let mut raw = of(format!("agent-{}", k + 1), Some(*registry), Some(*api), Some(*peer));
            raw.agent.labels = vec![format!("agent={}", k + 1).parse()?];
            node.agent(raw.agent()?).await?;
        }
        Ok(())
    }

    /// What listens where, and what to try.
    fn table(&self, ports: &Ports) -> String {
        let at = |port| SocketAddr::new(self.host, port).to_string();
        let none = String::new;
        let mut rows = vec![["proxy".into(), at(ports.proxy), none(), none()]];
        for (k, (registry, api, peer)) in ports.agents.iter().enumerate() {
            rows.push([format!("agent {}", k + 1), at(*registry), at(*api), at(*peer)]);
        }
        for (k, (api, peer)) in ports.origins.iter().enumerate() {
            rows.push([format!("origin {}", k + 1), none(), at(*api), at(*peer)]);
        }
        rows.push(["tracker".into(), none(), at(ports.tracker), none()]);
        rows.push(["index".into(), none(), at(ports.index), none()]);
        let mut text = format!("Shoal runs, its data under {}; Ctrl-C stops it.\n\n", self.data_dir.display());
        let mut line = |[role, registry, blobs, peers]: [&str; 4]| {
            let row = format!("  {role:<10} {registry:<18} {blobs:<18} {peers}");
            let _ = writeln!(text, "{}", row.trim_end());
        };
        line(["", "registry", "API", "peers"]);
        for row in &rows {
            line(row.each_ref().map(String::as_str));
        }
        let image = format!("{}/lib/app:1", at(ports.proxy));
        let (registry, api) = ports.agents.first().map(|(registry, api, _)| (*registry, *api)).unwrap_or_default();
        let shoal = std::env::args().next().unwrap_or_else(|| "shoal".into());
        let origin = ports.origins.first().map(|(api, _)| *api).unwrap_or_default();
        let _ = write!(
            text,
            "\nTry:\n  docker tag IMAGE {image} && docker push {image}\n  docker pull {}/lib/app:1\n  {shoal} blob put FILE --origin {} && {shoal} blob get DIGEST -o COPY --agent {}\n",
            at(registry),
            at(origin),
            at(api),
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn ports(args: &str) -> anyhow::Result<Ports> {
        Line::try_parse_from(std::iter::once("dev").chain(args.split_whitespace())).unwrap().options.ports()
    }

    #[test]
    fn ports_follow_from_the_base_or_are_given() {
        let expected = Ports {
            proxy: 15000,
            tracker: 15003,
            index: 15004,
            origins: vec![(15002, 15001), (15012, 15011)],
            agents: vec![(16000, 16002, 16001), (17000, 17002, 17001), (18000, 18002, 18001)],
        };
        assert_eq!(ports("").unwrap(), expected);
        let moved = ports("--base-port 20000 --agents 1 --tracker-port 9 --origin-port 300 --agent-port 700").unwrap();
        let expected = Ports {
            proxy: 20000,
            tracker: 9,
            index: 20004,
            origins: vec![(300, 299), (310, 309)],
            agents: vec![(700, 702, 701)],
        };
        assert_eq!(moved, expected);
        for bad in ["--agents 0", "--agents 51", "--base-port 65000", "--origin-port 1", "--base-port 0"] {
            assert!(ports(bad).is_err(), "{bad}");
        }
    }
}
