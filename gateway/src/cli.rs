//! The command line.

pub mod blob;
mod doctor;
pub mod preheat;
mod setup;
mod token_key;

use crate::{
    admin,
    config::{HostPort, LogFormat, Rate, Raw, Role, Size},
    http::{self, Client},
    node,
};
use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use std::{
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
};

/// Container images, and any content-addressed blob, to every host of a cluster, peer to peer.
#[derive(Debug, Parser)]
#[command(name = "shoal", version, max_term_width = 120, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a whole cluster in one process on loopback: a proxy, an index, a tracker, two origins, agents
    Dev(node::dev::Options),
    /// Run an agent: serves images and blobs to its host, from the swarm
    Agent(Options),
    /// Run an origin: keeps blobs, seeds them, writes them to the backend
    Origin(Options),
    /// Run a tracker: tells nodes whom to download from
    Tracker(Options),
    /// Run a proxy: the registry that images are pushed to
    Proxy(Options),
    /// Run an index: which digest a tag stands for
    Index(Options),
    /// Check a configuration file without running anything
    CheckConfig {
        /// The role it is for
        role: Role,
        /// The file
        file: PathBuf,
    },
    /// Look at this machine: which I/O driver, which limits, what to change
    Doctor(doctor::Doctor),
    /// Make keys that sign the registry's tokens, and print their public halves
    #[command(subcommand)]
    TokenKey(token_key::Command),
    /// Put and get single blobs
    #[command(subcommand)]
    Blob(blob::Command),
    /// Bring an image to the origins, or to hosts, before it is pulled
    Preheat(preheat::Preheat),
    /// Have a container runtime ask this host's agent first: shows what changes, asks, writes; --undo takes it back
    #[command(subcommand)]
    Setup(setup::Command),
}

/// How a role is run. What stands here stands over the file.
#[derive(Debug, Args)]
struct Options {
    /// The configuration file (TOML); defaults apply to what it leaves out
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the role keeps what must survive a restart
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where the registry listens (agent, proxy)
    #[arg(long, value_name = "ADDR:PORT")]
    registry_listen: Option<SocketAddr>,
    /// Where the role's own API listens (agent, origin, tracker, index)
    #[arg(long, value_name = "ADDR:PORT")]
    api_listen: Option<SocketAddr>,
    /// Where peers are served (agent, origin)
    #[arg(long, value_name = "ADDR:PORT")]
    peer_listen: Option<SocketAddr>,
    /// The peer address told to other nodes (agent, origin)
    #[arg(long, value_name = "ADDR:PORT")]
    peer_advertise: Option<SocketAddr>,
    /// The node's zone
    #[arg(long, value_name = "NAME")]
    zone: Option<String>,
    /// An origin's API; repeat for each
    #[arg(long = "origin", value_name = "HOST:PORT")]
    origins: Vec<HostPort>,
    /// A tracker; repeat for each
    #[arg(long = "tracker", value_name = "HOST:PORT")]
    trackers: Vec<HostPort>,
    /// An index; repeat for each
    #[arg(long = "index", value_name = "HOST:PORT")]
    indexes: Vec<HostPort>,
    /// This node's own entry among the origins (origin)
    #[arg(long, value_name = "HOST:PORT")]
    this: Option<HostPort>,
    /// Most bytes of blobs kept on disk, such as 100GiB (agent, origin)
    #[arg(long, value_name = "BYTES")]
    quota: Option<Size>,
    /// Most received from peers, such as 300MB/s (agent, origin)
    #[arg(long, value_name = "RATE")]
    peer_in_max: Option<Rate>,
    /// Most sent to peers, such as 10Gbit/s (agent, origin)
    #[arg(long, value_name = "RATE")]
    peer_out_max: Option<Rate>,
    #[command(flatten)]
    log: LogOptions,
    /// Any other key of the file, such as engine.mmap=false; repeat for each
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Print the configuration that would be in force, and stop
    #[arg(long)]
    print_config: bool,
}

/// How logs are written.
#[derive(Clone, Debug, Args)]
pub struct LogOptions {
    /// Lines for people, or JSON
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// What is logged: a level, or directives such as info,engine=debug
    #[arg(long, value_name = "FILTER")]
    log_filter: Option<String>,
}

impl LogOptions {
    /// Writes what was given into a configuration.
    pub fn apply(&self, raw: &mut Raw) {
        put(&mut raw.log.format, self.log_format);
        put(&mut raw.log.filter, self.log_filter.clone());
    }
}

fn put<T>(place: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *place = given;
    }
}

impl Options {
    /// The file with the flags over it.
    fn raw(&self) -> anyhow::Result<Raw> {
        let mut raw = match &self.config {
            Some(path) => Raw::read(path)?,
            None => Raw::default(),
        };
        for assignment in &self.set {
            raw.set(assignment)?;
        }
        put(&mut raw.data_dir, self.data_dir.clone());
        raw.listen.registry = self.registry_listen.or(raw.listen.registry);
        raw.listen.api = self.api_listen.or(raw.listen.api);
        raw.peer.listen = self.peer_listen.or(raw.peer.listen);
        raw.peer.advertise = self.peer_advertise.or(raw.peer.advertise);
        put(&mut raw.peer.zone, self.zone.clone());
        let hosts = [
            (&mut raw.cluster.origins, &self.origins),
            (&mut raw.cluster.trackers, &self.trackers),
            (&mut raw.cluster.indexes, &self.indexes),
        ];
        for (place, given) in hosts {
            if !given.is_empty() {
                place.clone_from(given);
            }
        }
        raw.cluster.this = self.this.clone().or(raw.cluster.this);
        raw.engine.quota = self.quota.or(raw.engine.quota);
        raw.limits.peer_in = self.peer_in_max.or(raw.limits.peer_in);
        raw.limits.peer_out = self.peer_out_max.or(raw.limits.peer_out);
        self.log.apply(&mut raw);
        Ok(raw)
    }
}

/// How a role is spoken to.
#[derive(Debug, Default, Args)]
pub(crate) struct Trust {
    /// Speak TLS, and trust the authorities in this file (PEM) and no others
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
}

impl Trust {
    /// A client that does.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        Ok(match &self.ca {
            Some(ca) => Client::secure(http::tls::trusting(ca).context("--ca")?),
            None => Client::default(),
        })
    }
}

/// Does what the command line says.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Dev(options) => options.run(),
        Command::Agent(options) => role(Role::Agent, &options),
        Command::Origin(options) => role(Role::Origin, &options),
        Command::Tracker(options) => role(Role::Tracker, &options),
        Command::Proxy(options) => role(Role::Proxy, &options),
        Command::Index(options) => role(Role::Index, &options),
        Command::CheckConfig { role, file } => {
            Raw::read(&file)?.check(role).with_context(|| format!("{} as {role}", file.display()))?;
            say(&format!("{} is sound for role {role}\n", file.display()))
        }
        Command::Doctor(doctor) => doctor.run(),
        Command::TokenKey(command) => command.run(),
        Command::Blob(command) => command.run(),
        Command::Preheat(preheat) => preheat.run(),
        Command::Setup(command) => command.run(),
    }
}

fn role(role: Role, options: &Options) -> anyhow::Result<()> {
    let mut raw = options.raw()?;
    if options.print_config {
        raw.fill(role);
        return say(&raw.print());
    }
    raw.check(role)?;
    admin::log::start(&raw.log)?;
    node::run(role, &raw)
}

/// Writes to standard output; a reader that has gone away is no fault of ours.
pub(crate) fn say(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("write to standard output"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_stand_over_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "data_dir = \"/a\"\n[cluster]\ntrackers = [\"t:1\"]\nindexes = [\"i:1\"]\n[engine]\nquota = 1\n";
        std::fs::write(file.path(), text).unwrap();
        let file = file.path().to_str().unwrap();
        let args = "--data-dir /b --tracker u:1 --tracker v:1 --peer-in-max 1MB/s --set engine.mmap=false";
        let cli = ["shoal", "agent", "--config", file].into_iter().chain(args.split(' '));
        let Command::Agent(options) = Cli::try_parse_from(cli).unwrap().command else { panic!("another command") };
        let raw = options.raw().unwrap();
        let hosts = |hosts: &[HostPort]| hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        assert_eq!(raw.data_dir.to_str(), Some("/b"));
        assert_eq!((hosts(&raw.cluster.trackers), hosts(&raw.cluster.indexes)), ("u:1 v:1".into(), "i:1".into()));
        assert_eq!((raw.engine.quota, raw.engine.mmap), (Some(Size::bytes(1)), false));
        assert_eq!(raw.limits.peer_in.map(Rate::bytes_per_s), Some(1_000_000));
        raw.check(Role::Agent).unwrap();
    }
}
