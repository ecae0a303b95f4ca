//! The raw limits: the same bytes moved with nothing around them.

use super::child::{self, Moved};
use anyhow::{Context, Result, ensure};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{FallocateFlags, OFlags, fallocate, sendfile},
    net::{RecvFlags, recv},
};
use sha2::{Digest as _, Sha256};
use std::{
    fs::File,
    hint::black_box,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// One send or receive, bytes: larger gains nothing.
const CHUNK: usize = 1 << 20;
/// Where direct reads want their buffer to begin, bytes.
const ALIGN: usize = 4096;

/// A server that answers each connection with as many bytes of `file`, from its start and over again, as the client asks for by
/// sending their number; one thread, sendfile.
pub(crate) fn sendfile_server(file: &Path) -> Result<()> {
    let file = File::open(file)?;
    let len = file.metadata()?.len();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let moved = Arc::new(AtomicU64::new(0));
    let counter = moved.clone();
    std::thread::spawn(move || serve(&listener, &file, len, &counter));
    child::answer(&addr.to_string(), || Ok(Moved::default()), || Moved::bytes(moved.load(Ordering::Relaxed)))
}

struct Served {
    socket: TcpStream,
    /// Bytes sent and asked for; none while the client has not asked.
    at: Option<(u64, u64)>,
}

/// The server's loop: round-robin over the connections that can take bytes.
fn serve(listener: &TcpListener, file: &File, len: u64, moved: &AtomicU64) -> Result<()> {
    listener.set_nonblocking(true)?;
    let mut connections: Vec<Served> = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(listener, PollFlags::IN)];
        fds.extend(connections.iter().map(|served| {
            PollFd::new(&served.socket, if served.at.is_some() { PollFlags::OUT } else { PollFlags::IN })
        }));
        poll(&mut fds, None)?;
        let turned: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        for i in (0..connections.len()).rev().filter(|i| turned[i + 1]) {
            if !turn(&mut connections[i], file, len, moved)? {
                connections.swap_remove(i);
            }
        }
        if turned[0] {
            let (socket, _) = listener.accept()?;
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            connections.push(Served { socket, at: None });
        }
    }
}

/// One connection's turn; false once the client is gone.
fn turn(served: &mut Served, file: &File, len: u64, moved: &AtomicU64) -> Result<bool> {
    let Some((at, end)) = served.at else {
        let mut asked = [0; 8];
        return match served.socket.read(&mut asked) {
            Ok(8) => {
                served.at = Some((0, u64::from_le_bytes(asked)));
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
            Ok(_) | Err(_) => Ok(false),
        };
    };
    let mut offset = at % len;
    let want = usize::try_from((end - at).min(len - offset))?.min(CHUNK);
    match sendfile(&served.socket, file, Some(&mut offset), want) {
        Ok(sent) => {
            moved.fetch_add(sent as u64, Ordering::Relaxed);
            let at = at + sent as u64;
            served.at = (at < end).then_some((at, end));
            Ok(true)
        }
        Err(rustix::io::Errno::AGAIN) => Ok(true),
        Err(_) => Ok(false),
    }
}

/// A client that asks for `len` bytes on each of its connections and discards them; one thread.
pub(crate) fn discard_client(server: SocketAddr, connections: usize, len: u64) -> Result<()> {
    let sockets = (0..connections).map(|_| connect(server)).collect::<Result<Vec<_>>>()?;
    let mut buffer = vec![0; CHUNK];
    let run = || -> Result<Moved> {
        for mut socket in &sockets {
            socket.write_all(&len.to_le_bytes())?;
        }
        let mut left = vec![len; connections];
        while left.iter().any(|left| *left > 0) {
            let waiting: Vec<usize> = (0..connections).filter(|i| left[*i] > 0).collect();
            let mut fds: Vec<_> =
                waiting.iter().map(|i| PollFd::from_borrowed_fd(sockets[*i].as_fd(), PollFlags::IN)).collect();
            poll(&mut fds, None)?;
            for (i, fd) in waiting.iter().zip(&fds) {
                if !fd.revents().is_empty() {
                    let mut socket = &sockets[*i];
                    match socket.read(&mut buffer) {
                        Ok(got) => {
                            ensure!(got > 0, "server hung up with {} bytes to go", left[*i]);
                            left[*i] -= got as u64;
                        }
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            }
        }
        Ok(Moved::bytes(len * connections as u64))
    };
    child::answer("", run, Moved::default)
}

/// A client that asks for `len` bytes and writes them to a file set aside for them: a full receive, a write, and again.
pub(crate) fn receive_file(server: SocketAddr, len: u64, path: &Path) -> Result<()> {
    let mut socket = TcpStream::connect(server).with_context(|| format!("connect to {server}"))?;
    let file = File::create(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, len)?;
    let mut buffer = vec![1; CHUNK];
    let run = || -> Result<Moved> {
        socket.write_all(&len.to_le_bytes())?;
        let mut at = 0;
        while at < len {
            let want = usize::try_from(len - at)?.min(CHUNK);
            let (got, _) = recv(&socket, &mut buffer[..want], RecvFlags::WAITALL)?;
            ensure!(got > 0, "server hung up with {} bytes to go", len - at);
            file.write_all_at(&buffer[..got], at)?;
            at += got as u64;
        }
        Ok(Moved::bytes(len))
    };
    child::answer("", run, Moved::default)
}

/// SHA-256 over `len` bytes of memory.
pub(crate) fn hash(len: u64) -> Result<()> {
    let buffer: Vec<u8> = (0..=250).cycle().take(CHUNK).collect();
    let run = || {
        let mut hash = Sha256::new();
        for _ in 0..len.div_ceil(CHUNK as u64) {
            hash.update(black_box(&buffer));
        }
        black_box(hash.finalize());
        Ok(Moved::bytes(len))
    };
    child::answer("", run, Moved::default)
}

/// A file from the disk, one direct read after the other.
pub(crate) fn direct_read(path: &Path) -> Result<()> {
    let flags = i32::try_from(OFlags::DIRECT.bits())?;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let len = file.metadata()?.len();
    let mut memory = vec![1; CHUNK + ALIGN];
    let aligned = memory.as_ptr().align_offset(ALIGN);
    let run = || {
        let mut at = 0;
        while at < len {
            let got = file.read_at(&mut memory[aligned..aligned + CHUNK], at)?;
            ensure!(got > 0, "file shrank");
            at += got as u64;
        }
        Ok(Moved::bytes(len))
    };
    child::answer("", run, Moved::default)
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let socket = TcpStream::connect(server).with_context(|| format!("connect to {server}"))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
