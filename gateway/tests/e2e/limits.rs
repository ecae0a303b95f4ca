//! What many clients, or few bytes of disk, cost: memory stays bounded, a full disk is said and harmless.

use crate::{
    clients::push,
    cluster::{Cluster, Member},
    image::Image,
    tools::{run, wait_for},
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    time::Duration,
};

const MIB: u64 = 1 << 20;
/// Clients of one blob at once.
const READERS: usize = 200;
/// What a role may need for all of them beyond what it needs for itself: some buffers of a connection each, and a pool of pieces.
const READERS_MEMORY_MAX: u64 = 256 * MIB;

/// Bytes of a process's memory that are its own: pages of mapped files and the page cache are the kernel's to take back.
fn own_memory(member: &Member) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", member.pid()?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib << 10)
}

/// A client that has asked for a blob and read only the head of the answer and a little more.
fn reader(host: &str, path: &str) -> Result<TcpStream> {
    let mut socket = TcpStream::connect(host)?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut head = [0; 4096];
    socket.read_exact(&mut head)?;
    ensure!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    Ok(socket)
}

/// All of an answer that a client has not read yet.
fn drain(mut socket: TcpStream) -> Result<u64> {
    Ok(std::io::copy(&mut socket, &mut std::io::sink())?)
}

/// 200 clients ask for one blob of 1 GB and stop reading, at every role that serves blobs; then some go on.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn two_hundred_readers_that_stop_cost_little_memory() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[1000 * MIB], 21)?;
    let (digest, size) = image.layers[0];
    let cluster = Cluster::start(dir.path(), 1)?;
    push(&image, &format!("{}/lib/big:1", cluster.proxy.addr))?;
    let registry = format!("/v2/lib/big/blobs/{digest}");
    let blobs = format!("/namespace/lib%2Fbig/blobs/{digest}");
    let agent = &cluster.agents[0];
    let origin = cluster.origins.iter().max_by_key(|origin| own_memory(origin).unwrap_or(0)).context("no origin")?;
    // The agent twice: once while the blob arrives, once from its disk.
    for (name, member, host, path) in [
        ("agent, cold", agent, &agent.addr, &registry),
        ("agent, warm", agent, &agent.addr, &registry),
        ("origin", origin, &origin.api, &blobs),
        ("proxy", &cluster.proxy, &cluster.proxy.addr, &registry),
    ] {
        let before = own_memory(member)?;
        let readers: Vec<TcpStream> = (0..READERS).map(|_| reader(host, path)).collect::<Result<_>>()?;
        // Until it stands still, with all buffers full.
        let mut last = 0;
        let mut most = 0;
        let mut still = 0;
        wait_for("the buffers to fill", Duration::from_secs(60), || {
            let now = own_memory(member).unwrap_or(0);
            most = most.max(now);
            still = if now.abs_diff(last) < MIB { still + 1 } else { 0 };
            last = now;
            still > 50
        })?;
        println!(
            "{name}: {} MiB for {READERS} readers, {} MiB before",
            most.saturating_sub(before) / MIB,
            before / MIB
        );
        ensure!(most < before + READERS_MEMORY_MAX, "{name}: {} MiB", most / MIB);
        let (go_on, leave): (Vec<_>, Vec<_>) = readers.into_iter().enumerate().partition(|(k, _)| k % 50 == 0);
        drop(leave);
        for (_, socket) in go_on {
            let rest = drain(socket)?;
            ensure!(rest > size - 4096 && rest < size, "{name}: {rest} bytes of {size} came after the first");
        }
    }
    Ok(())
}

/// A file system of its own, of few bytes, for a directory.
struct Small(PathBuf);

impl Small {
    fn mount(dir: PathBuf, bytes: u64) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        run("mount", &["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs", &dir.display().to_string()])?;
        Ok(Self(dir))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Lazily: whoever has files open in it is about to end.
        let _ = run("umount", &["-l", &self.0.display().to_string()]);
    }
}

/// Status and body of a request with a file as its body.
fn send(method: &str, url: &str, file: &Path) -> Result<(u16, String)> {
    let data = format!("@{}", file.display());
    let said = run("curl", &["-s", "-m", "120", "-X", method, "-w", "\n%{http_code}", "--data-binary", &data, url])?;
    let (body, status) = said.rsplit_once('\n').context("no status")?;
    Ok((status.parse()?, body.to_owned()))
}

/// Origins and an agent whose disks are full: clients are told, nothing acknowledged is lost, what fits goes on.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn a_full_disk_is_said_and_harmless() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let _disks = [
        Small::mount(dir.path().join("origin0"), 64 * MIB)?,
        Small::mount(dir.path().join("origin1"), 64 * MIB)?,
        Small::mount(dir.path().join("agent0"), 24 * MIB)?,
    ];
    let fits = Image::make(&dir.path().join("fits"), &[20 * MIB], 31)?;
    let large = Image::make(&dir.path().join("large"), &[100 * MIB], 32)?;
    let next = Image::make(&dir.path().join("next"), &[3 * MIB], 33)?;
    let cluster = Cluster::start(dir.path(), 1)?;
    let (proxy, agent) = (&cluster.proxy.addr, &cluster.agents[0].addr);
    push(&fits, &format!("{proxy}/lib/app:1"))?;

    let (digest, _) = large.layers[0];
    let uploads = format!("http://{proxy}/v2/lib/app/blobs/uploads/?digest={digest}");
    for _ in 0..3 {
        let (status, body) = send("POST", &uploads, &large.blob(&digest))?;
        ensure!(status == 507, "a push that does not fit: {status} {body}");
        ensure!(body.contains("\"errors\""), "{body}");
    }
    // The failed pushes hold no bytes, and what was there is there.
    push(&next, &format!("{proxy}/lib/app:2"))?;
    let got = dir.path().join("got");
    for (image, from) in [(&fits, proxy), (&next, proxy), (&next, agent), (&fits, agent), (&next, agent)] {
        let (digest, _) = image.layers[0];
        let url = format!("http://{from}/v2/lib/app/blobs/{digest}");
        run("curl", &["-sf", "-m", "120", "-o", &got.display().to_string(), &url])?;
        ensure!(fs::read(&got)? == fs::read(image.blob(&digest))?, "{url}");
    }
    Ok(())
}
