//! `shoal` as a service manager sees it: it says when it is ready and when it stops, logs as it is told to, and ends cleanly.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

/// Longest wait for a word from the process.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the process tells its state.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn start(dir: &Path) -> Self {
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path).expect("bind a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        Self { socket, path }
    }

    fn word(&self) -> String {
        let mut said = [0; 256];
        let len = self.socket.recv(&mut said).expect("a word from the process");
        String::from_utf8_lossy(&said[..len]).into_owned()
    }

    /// A `shoal` that tells it.
    fn shoal(&self, role: &str) -> Command {
        let mut shoal = Command::new(env!("CARGO_BIN_EXE_shoal"));
        shoal.arg(role).env("NOTIFY_SOCKET", &self.path).stdin(Stdio::null());
        shoal
    }
}

/// The kernel reaps a process before it lets go of what that one's rings hold.
#[test]
fn an_agent_that_was_killed_starts_again_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let manager = Manager::start(dir.path());
    let peers = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for start in 0..8 {
        let mut agent = manager
            .shoal("agent")
            .args(["--registry-listen", "127.0.0.1:0", "--api-listen", "127.0.0.1:0"])
            .args(["--tracker", "127.0.0.1:1", "--index", "127.0.0.1:1"])
            .args(["--peer-listen", &peers.to_string(), "--data-dir"])
            .arg(dir.path().join("data"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        assert!(manager.word().contains("READY=1"), "start {start}");
        // Once a stranger is turned away, the next one is being waited for.
        let mut stranger = TcpStream::connect(peers).unwrap();
        stranger.set_read_timeout(Some(PATIENCE)).unwrap();
        stranger.write_all(&[0; 256]).unwrap();
        let ended = stranger.read_to_end(&mut Vec::new());
        assert!(!ended.is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "start {start}");
        agent.kill().unwrap();
        agent.wait().unwrap();
    }
}

#[test]
fn a_service_manager_is_told_and_logs_are_json() {
    let dir = tempfile::tempdir().unwrap();
    let manager = Manager::start(dir.path());
    let mut shoal = manager
        .shoal("tracker")
        .args(["--api-listen", "127.0.0.1:0", "--origin", "127.0.0.1:1", "--log-format", "json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(manager.word().contains("READY=1"));
    let killed = Command::new("kill").args(["-TERM", &shoal.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert!(manager.word().contains("STOPPING=1"));
    let status = shoal.wait().unwrap();
    assert!(status.success(), "{status}");
    let lines = BufReader::new(shoal.stderr.take().unwrap()).lines().map(Result::unwrap);
    let lines: Vec<String> =
        lines.chain(BufReader::new(shoal.stdout.take().unwrap()).lines().map(Result::unwrap)).collect();
    assert!(!lines.is_empty());
    for line in &lines {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(line["level"].is_string() && line["timestamp"].is_string(), "{line}");
    }
    assert!(lines.iter().any(|line| line.contains("stopping")), "{lines:?}");
}
