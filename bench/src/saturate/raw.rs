//! The raw limits: the same bytes moved with nothing around them.

use super::child;
use anyhow::{Context, Result, ensure};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::sendfile,
};
use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// One send or receive, bytes: larger gains nothing.
const CHUNK: usize = 1 << 20;

/// A server that answers each connection with `file`, as often as the client asks by sending a byte; one thread, sendfile.
pub(crate) fn sendfile_server(file: &Path) -> Result<()> {
    let file = File::open(file)?;
    let len = file.metadata()?.len();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let moved = Arc::new(AtomicU64::new(0));
    let counter = moved.clone();
    std::thread::spawn(move || serve(&listener, &file, len, &counter));
    child::answer(&addr.to_string(), || Ok(0), || moved.load(Ordering::Relaxed))
}

struct Served {
    socket: TcpStream,
    /// Where the file stands for this connection; none while the client has not asked.
    at: Option<u64>,
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
    let Some(at) = served.at else {
        let mut byte = [0];
        return match served.socket.read(&mut byte) {
            Ok(1) => {
                served.at = Some(0);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
            Ok(_) | Err(_) => Ok(false),
        };
    };
    let mut offset = at;
    let want = usize::try_from(len - at)?.min(CHUNK);
    match sendfile(&served.socket, file, Some(&mut offset), want) {
        Ok(sent) => {
            moved.fetch_add(sent as u64, Ordering::Relaxed);
            served.at = (offset < len).then_some(offset);
            Ok(true)
        }
        Err(rustix::io::Errno::AGAIN) => Ok(true),
        Err(_) => Ok(false),
    }
}

/// A client that asks `connections` times for the file and discards `len` bytes from each; one thread.
pub(crate) fn discard_client(server: SocketAddr, connections: usize, len: u64) -> Result<()> {
    let sockets = (0..connections).map(|_| connect(server)).collect::<Result<Vec<_>>>()?;
    let mut buffer = vec![0; CHUNK];
    let run = || -> Result<u64> {
        for mut socket in &sockets {
            socket.write_all(&[1])?;
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
        Ok(len * connections as u64)
    };
    child::answer("", run, || 0)
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let socket = TcpStream::connect(server).with_context(|| format!("connect to {server}"))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
