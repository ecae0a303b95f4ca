//! `shoal` as a service manager sees it: it says when it is ready and when it stops, logs as it is told to, and ends cleanly.

use std::{
    io::{BufRead, BufReader},
    os::unix::net::UnixDatagram,
    process::{Command, Stdio},
    time::Duration,
};

/// Longest wait for a word from the process.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_service_manager_is_told_and_logs_are_json() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let word = || {
        let mut said = [0; 256];
        let len = manager.recv(&mut said).expect("a word from the process");
        String::from_utf8_lossy(&said[..len]).into_owned()
    };
    let mut shoal = Command::new(env!("CARGO_BIN_EXE_shoal"))
        .args(["tracker", "--api-listen", "127.0.0.1:0", "--origin", "127.0.0.1:1", "--log-format", "json"])
        .env("NOTIFY_SOCKET", &path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(word().contains("READY=1"));
    let killed = Command::new("kill").args(["-TERM", &shoal.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert!(word().contains("STOPPING=1"));
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
