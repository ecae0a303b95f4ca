//! The network: a bridge in the namespace we are in, and hosts behind shaped links.

use anyhow::{Context, Result, bail, ensure};
use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
};

/// The hosts' network, 10.77.0.0/16, which only these namespaces know.
const NETWORK: [u8; 2] = [10, 77];

/// A link's queue, milliseconds at its rate: enough for a full rate of many connections, little enough for a short round trip.
const QUEUE_MS: u64 = 20;
/// The least in bytes, about what a switch leaves to a busy port out of its shared buffer. The segmentation offload's packets are as large
/// on a slow link as on a card's: with a queue of few of them every loss is a burst, and connections wait for timeouts.
const QUEUE_MIN: u64 = 1 << 20;

/// The same in bytes.
pub(crate) fn queue(rate: u64) -> u64 {
    (rate * QUEUE_MS / 1000).max(QUEUE_MIN)
}

/// What a host's process does in its namespace until it is told to go. A connection that rests for longer than its retransmission timeout,
/// 0.2 s at least, would have to find its rate anew; at the rates of these links pieces are that far apart, at a card's they are not.
const START: &str =
    "echo 0 >/proc/sys/net/ipv4/tcp_slow_start_after_idle && echo && read _ && exec \"$@\" >&2 </dev/null";

/// The bridge and the numbers given out so far.
pub(crate) struct Fabric {
    rate: u64,
    hosts: u16,
}

/// A namespace with one process in it that waits to become what it is told.
pub(crate) struct Host {
    process: Child,
    start: Option<ChildStdin>,
    log: PathBuf,
    pub(crate) addr: Ipv4Addr,
}

impl Fabric {
    /// A bridge; each link carries `rate` bytes a second each way.
    pub(crate) fn new(rate: u64) -> Result<Self> {
        run("ip", "link set lo up")?;
        run("ip", "link add switch type bridge")?;
        run("ip", &format!("addr add {}/16 dev switch", address(1)))?;
        run("ip", "link set switch up")?;
        Ok(Self { rate, hosts: 0 })
    }

    /// A host that will run `command` once [`Host::go`] says so, with stdout and stderr in `log`.
    pub(crate) fn host(&mut self, command: &[&str], log: &Path) -> Result<Host> {
        self.hosts += 1;
        let addr = address(self.hosts + 1);
        let out = std::fs::File::create(log).with_context(|| format!("create {}", log.display()))?;
        // The process dies with us, and its namespace and link with it.
        let mut process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", START, "sh"])
            .args(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(out)
            .spawn()
            .context("start setpriv")?;
        let start = process.stdin.take();
        // Its word says that it is in its own namespace.
        let mut word = [0];
        std::io::Read::read_exact(&mut process.stdout.take().context("no stdout")?, &mut word)
            .context("a host's process ended at its start")?;
        let host = Host { process, start, log: log.to_owned(), addr };
        let (pid, link) = (host.pid(), format!("host{}", self.hosts));
        run("ip", &format!("link add {link} type veth peer name eth0 netns {pid}"))?;
        run("ip", &format!("link set {link} master switch up"))?;
        host.run_inside("ip", "link set lo up")?;
        host.run_inside("ip", &format!("addr add {addr}/16 dev eth0"))?;
        host.run_inside("ip", "link set eth0 up")?;
        let shape = |device: &str| {
            // A burst of 2 ms, and of one segmentation offload's packet at least.
            let burst = (self.rate / 500).max(128 << 10);
            let limit = queue(self.rate);
            format!("qdisc add dev {device} root tbf rate {}bit burst {burst} limit {limit}", self.rate * 8)
        };
        run("tc", &shape(&link))?;
        host.run_inside("tc", &shape("eth0"))?;
        Ok(host)
    }
}

impl Host {
    /// Of the process, which keeps it when it becomes the command.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Runs the command it was made for.
    pub(crate) fn go(&mut self) -> Result<()> {
        let mut start = self.start.take().context("started already")?;
        std::io::Write::write_all(&mut start, b"\n").context("the host's process ended")
    }

    /// An error where the process has ended, with its last words.
    pub(crate) fn alive(&mut self) -> Result<()> {
        let Some(status) = self.process.try_wait()? else { return Ok(()) };
        let said = std::fs::read_to_string(&self.log)?;
        bail!("a process ended with {status}: {}", said.lines().last().unwrap_or("no word in its log"))
    }

    /// A command in the host's namespace.
    pub(crate) fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nsenter", "--net", "--target", &self.pid().to_string(), program]);
        command
    }

    fn run_inside(&self, program: &str, words: &str) -> Result<()> {
        finish(self.inside(program).args(words.split(' ')), &format!("{program} {words}"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Already ended is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn address(n: u16) -> Ipv4Addr {
    let [high, low] = n.to_be_bytes();
    Ipv4Addr::new(NETWORK[0], NETWORK[1], high, low)
}

fn run(program: &str, words: &str) -> Result<()> {
    finish(Command::new(program).args(words.split(' ')), &format!("{program} {words}"))
}

fn finish(command: &mut Command, what: &str) -> Result<()> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("run {what}"))?;
    ensure!(out.status.success(), "{what}: {}", String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}
