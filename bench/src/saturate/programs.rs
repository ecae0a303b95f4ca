//! Programs that are not this one: `shoal` as its users start it, nginx and curl.

use super::{child::Usage, compare::Run};
use crate::process;
use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Longest wait for a program to answer.
const READY: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// A program in the background, ended with its owner.
pub(crate) struct Program(Child);

impl Program {
    pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let out = File::create(log)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        Ok(Self(command.spawn().with_context(|| format!("start {:?}", command.get_program()))?))
    }

    /// CPU seconds so far.
    pub(crate) fn cpu_s(&self) -> Result<f64> {
        process::cpu_s(self.0.id())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn free_ports<const N: usize>() -> Result<[SocketAddr; N]> {
    let held: Vec<TcpListener> =
        (0..N).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
    let mut ports = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); N];
    for (port, listener) in ports.iter_mut().zip(&held) {
        *port = listener.local_addr()?;
    }
    Ok(ports)
}

pub(crate) fn await_listener(addr: SocketAddr, log: &Path) -> Result<()> {
    let start = Instant::now();
    while TcpStream::connect(addr).is_err() {
        if start.elapsed() > READY {
            bail!("nothing listens on {addr}: {}", fs::read_to_string(log).unwrap_or_default());
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Until perf counts the calls of a process.
const ATTACH: Duration = Duration::from_millis(300);

/// An origin, a tracker and an agent on loopback.
pub(crate) struct Cluster {
    shoal: PathBuf,
    origin: Program,
    _tracker: Program,
    agent: Program,
    origin_api: SocketAddr,
    agent_api: SocketAddr,
    agent_peer: SocketAddr,
}

impl Cluster {
    /// The binary beside this one, unless another is named; none where there is none.
    pub(crate) fn binary(given: Option<&Path>) -> Option<PathBuf> {
        let beside = std::env::current_exe().ok()?.with_file_name("shoal");
        Some(given.map_or(beside, Path::to_owned)).filter(|path| path.is_file())
    }

    /// Starts all three below `dir`.
    pub(crate) fn start(shoal: &Path, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let config = dir.join("origin.toml");
        // A store that no namespace of ours goes to: nothing is written back while somebody measures.
        fs::write(&config, "[[backends]]\nnamespace = \"^none$\"\nstore = { kind = \"memory\" }\n")?;
        let [origin_api, origin_peer, tracker, agent_registry, agent_api, agent_peer, index] = free_ports()?;
        let start = |role: &str, api: SocketAddr, words: &[(&str, String)]| {
            let log = dir.join(format!("{role}.log"));
            let mut command = Command::new(shoal);
            command.arg(role).arg("--data-dir").arg(dir.join(role)).arg("--api-listen").arg(api.to_string());
            for (flag, value) in words {
                command.arg(flag).arg(value);
            }
            let program = Program::start(&mut command, &log)?;
            await_listener(api, &log)?;
            anyhow::Ok(program)
        };
        let origin = start(
            "origin",
            origin_api,
            &[
                ("--config", config.display().to_string()),
                ("--peer-listen", origin_peer.to_string()),
                ("--origin", origin_api.to_string()),
                ("--this", origin_api.to_string()),
            ],
        )?;
        let tracker_program = start("tracker", tracker, &[("--origin", origin_api.to_string())])?;
        let agent = start(
            "agent",
            agent_api,
            &[
                ("--registry-listen", agent_registry.to_string()),
                ("--peer-listen", agent_peer.to_string()),
                ("--tracker", tracker.to_string()),
                ("--index", index.to_string()),
            ],
        )?;
        Ok(Self {
            shoal: shoal.to_owned(),
            origin,
            _tracker: tracker_program,
            agent,
            origin_api,
            agent_api,
            agent_peer,
        })
    }

    /// Puts a file on the origin; its digest.
    pub(crate) fn put(&self, file: &Path) -> Result<String> {
        let mut command = Command::new(&self.shoal);
        command.args(["blob", "put", "--namespace", "bench", "--origin", &self.origin_api.to_string()]).arg(file);
        let out = command.stderr(Stdio::null()).output()?;
        ensure!(out.status.success(), "shoal blob put ended with {}", out.status);
        Ok(String::from_utf8(out.stdout)?.trim().to_owned())
    }

    /// Gets a blob from the agent and throws it away.
    pub(crate) fn get(&self, digest: &str) -> Result<Run> {
        let before = (self.origin.cpu_s()?, self.agent.cpu_s()?);
        let started = Instant::now();
        let bytes = discard(self.agent_api, &format!("/namespace/bench/blobs/{digest}"))?;
        let wall_s = started.elapsed().as_secs_f64();
        let after = (self.origin.cpu_s()?, self.agent.cpu_s()?);
        let sender = Usage { system_s: after.0 - before.0, ..Usage::default() };
        let receiver = Usage { wall_s, system_s: after.1 - before.1, bytes, ..Usage::default() };
        Ok(Run { sender, receiver })
    }

    /// The agent's process.
    pub(crate) fn agent_pid(&self) -> u32 {
        self.agent.0.id()
    }

    /// Memory of the agent that no file stands behind, bytes.
    pub(crate) fn agent_anon(&self) -> Result<u64> {
        process::status(self.agent_pid(), "RssAnon")
    }

    /// Where the agent's peers reach it.
    pub(crate) fn agent_peer(&self) -> String {
        self.agent_peer.to_string()
    }

    /// A blob's layout, encoded.
    pub(crate) fn layout(&self, digest: &str) -> Result<Vec<u8>> {
        let mut layout = Vec::new();
        fetch(self.origin_api, &format!("/internal/namespace/bench/blobs/{digest}/layout"), |bytes| {
            layout.extend_from_slice(bytes);
        })?;
        Ok(layout)
    }

    /// Has the agent forget a blob.
    pub(crate) fn forget(&self, digest: &str) -> Result<()> {
        let mut socket = TcpStream::connect(self.agent_api)?;
        write!(socket, "DELETE /blobs/{digest} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "the agent answered {answer:?}");
        Ok(())
    }
}

/// A GET whose body is thrown away; its bytes.
fn discard(server: SocketAddr, path: &str) -> Result<u64> {
    let mut bytes = 0;
    fetch(server, path, |part| bytes += part.len() as u64)?;
    Ok(bytes)
}

/// A GET, its body given out as it comes.
fn fetch(server: SocketAddr, path: &str, mut body: impl FnMut(&[u8])) -> Result<()> {
    let mut socket = TcpStream::connect(server)?;
    socket.set_nodelay(true)?;
    write!(socket, "GET {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n")?;
    let mut buffer = vec![0; 1 << 20];
    let got = socket.read(&mut buffer)?;
    let head = buffer[..got].windows(4).position(|four| four == b"\r\n\r\n").context("an answer without a head")? + 4;
    ensure!(buffer.starts_with(b"HTTP/1.1 200"), "GET {path}: {}", String::from_utf8_lossy(&buffer[..head]));
    body(&buffer[head..got]);
    loop {
        match socket.read(&mut buffer)? {
            0 => return Ok(()),
            got => body(&buffer[..got]),
        }
    }
}

/// Looks at a process's anonymous memory over and over.
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    looks: JoinHandle<Result<u64>>,
}

impl Watch {
    pub(crate) fn start(pid: u32) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let looks = thread::spawn(move || {
            let mut most = 0;
            while !ended.load(Ordering::Relaxed) {
                most = most.max(process::status(pid, "RssAnon")?);
                thread::sleep(LOOK);
            }
            Ok(most)
        });
        Self { over, looks }
    }

    /// The most that was seen, bytes.
    pub(crate) fn most(self) -> Result<u64> {
        self.over.store(true, Ordering::Relaxed);
        self.looks.join().map_err(|_| anyhow!("the watch over a process panicked"))?
    }
}

/// Counts a process's system calls, by perf.
pub(crate) struct SystemCalls;

impl SystemCalls {
    const EVENT: &str = "raw_syscalls:sys_enter";

    /// Whether this machine lets us.
    pub(crate) fn countable() -> bool {
        let tried = Command::new("perf").args(["stat", "-e", Self::EVENT, "true"]).output();
        tried.is_ok_and(|out| out.status.success())
    }

    /// Those that a process makes meanwhile.
    pub(crate) fn of<T>(pid: u32, work: impl FnOnce() -> Result<T>) -> Result<u64> {
        let mut perf = Command::new("perf");
        perf.args(["stat", "-x", ",", "-e", Self::EVENT, "-p", &pid.to_string()]);
        let perf =
            perf.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().context("start perf")?;
        // It does not say when it has begun.
        thread::sleep(ATTACH);
        let worked = work();
        let perf_pid = nix::unistd::Pid::from_raw(i32::try_from(perf.id())?);
        nix::sys::signal::kill(perf_pid, nix::sys::signal::Signal::SIGINT)?;
        let told = String::from_utf8(perf.wait_with_output()?.stderr)?;
        worked?;
        let line = told.lines().find(|line| line.contains(Self::EVENT));
        let count = line.and_then(|line| line.split(',').next()?.parse().ok());
        count.with_context(|| format!("perf said {told:?}"))
    }
}

fn installed(dirs: &[&str], name: &str) -> Option<PathBuf> {
    dirs.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
}

/// nginx serving one directory.
pub(crate) struct Nginx {
    program: Program,
    addr: SocketAddr,
}

impl Nginx {
    /// Where Debian puts it; none where it is not installed.
    pub(crate) fn binary() -> Option<PathBuf> {
        installed(&["/usr/sbin", "/usr/bin", "/usr/local/sbin"], "nginx")
    }

    /// The same, none where curl is not installed.
    pub(crate) fn beside_curl() -> Option<PathBuf> {
        installed(&["/usr/bin", "/bin"], "curl")?;
        Self::binary()
    }

    /// Serves `root`, as the distribution's own settings would: one worker, sendfile; but it hangs up on no client for asking often.
    pub(crate) fn start(binary: &Path, root: &Path, dir: &Path) -> Result<Self> {
        let [addr] = free_ports()?;
        let (config, log) = (dir.join("nginx.conf"), dir.join("nginx.log"));
        let (root, dir) = (root.display(), dir.display());
        fs::write(
            &config,
            format!(
                "daemon off; master_process off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/nginx.err;\n\
                 events {{ worker_connections 64; }}\n\
                 http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000; client_body_temp_path {dir}/body; \
                 proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi; uwsgi_temp_path {dir}/uwsgi; \
                 scgi_temp_path {dir}/scgi; server {{ listen {addr}; root {root}; }} }}\n"
            ),
        )?;
        let program = Program::start(Command::new(binary).arg("-c").arg(&config), &log)?;
        await_listener(addr, &log)?;
        Ok(Self { program, addr })
    }

    /// Where it answers.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// CPU seconds so far.
    pub(crate) fn cpu_s(&self) -> Result<f64> {
        self.program.cpu_s()
    }

    /// curl gets a file into another, sha256sum reads it.
    pub(crate) fn fetch(&self, name: &str, into: &Path, len: u64) -> Result<Run> {
        let before = children_cpu_s()?;
        let started = Instant::now();
        let url = format!("http://{}/{name}", self.addr);
        let got = Command::new("curl").args(["-sf", "-o"]).arg(into).arg(url).status()?;
        ensure!(got.success(), "curl ended with {got}");
        let hashed = Command::new("sha256sum").arg(into).stdout(Stdio::null()).status()?;
        ensure!(hashed.success(), "sha256sum ended with {hashed}");
        let wall_s = started.elapsed().as_secs_f64();
        let system_s = children_cpu_s()? - before;
        fs::remove_file(into)?;
        Ok(Run::alone(Usage { wall_s, system_s, bytes: len, ..Usage::default() }))
    }
}

/// CPU seconds of the children that have ended.
fn children_cpu_s() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: nix::sys::time::TimeVal| -> Result<f64> {
        Ok(Duration::new(u64::try_from(time.tv_sec())?, u32::try_from(time.tv_usec())? * 1000).as_secs_f64())
    };
    Ok(seconds(usage.user_time())? + seconds(usage.system_time())?)
}
