//! Sockets as peers need them: made, tuned, listened on.

use rustix::net as rx;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

/// Connections that may wait to be accepted, per shard.
const BACKLOG: i32 = 1024;

/// Longest wait for an address that is in use. The kernel takes down the rings of a process that was killed when that has long been
/// reaped, and with them its last hold on its sockets: who starts it again at once would find its own address taken.
pub(crate) const IN_USE_MAX: Duration = Duration::from_secs(2);
/// Between two attempts.
const IN_USE_PAUSE: Duration = Duration::from_millis(20);

/// A listener per shard on one address; the kernel spreads connections between them. Port 0 takes any, the same for all. An address
/// that is in use is waited for, at most `patience`.
pub(crate) fn listeners(addr: SocketAddr, shards: usize, patience: Duration) -> io::Result<Vec<TcpListener>> {
    let until = Instant::now() + patience;
    loop {
        match listen(addr, shards) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until => {
                thread::sleep(IN_USE_PAUSE);
            }
            listeners => return listeners,
        }
    }
}

fn listen(addr: SocketAddr, shards: usize) -> io::Result<Vec<TcpListener>> {
    // Sockets that share a port share it with anybody of the same user who asks to, so a second node on this port would
    // start unnoticed and take half the connections. One that does not share finds that out.
    let sole = socket(addr)?;
    sole.set_reuse_address(true)?;
    sole.bind(&addr.into())?;
    drop(sole);
    let mut addr = addr;
    let mut listeners = Vec::with_capacity(shards);
    for _ in 0..shards {
        let socket = socket(addr)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&addr.into())?;
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from(socket);
        addr = listener.local_addr()?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// A socket that is connecting: writable once it is, or has failed.
pub(crate) fn dial(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = socket(to)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(e) if e.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => Err(e),
        Ok(()) | Err(_) => tuned(socket.into()),
    }
}

/// An accepted or connecting socket, set up for frames.
pub(crate) fn tuned(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Ends both directions: operations under way complete.
pub(crate) fn shut(socket: impl AsFd) {
    // Fails where the connection is gone already, which is what was wanted.
    let _ = rx::shutdown(socket, rx::Shutdown::Both);
}

fn socket(addr: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_share_a_port_and_strangers_do_not() {
        let mine = listeners("127.0.0.1:0".parse().unwrap(), 3, Duration::ZERO).unwrap();
        let addr = mine[0].local_addr().unwrap();
        assert!(mine.iter().all(|l| l.local_addr().unwrap() == addr));
        assert_eq!(listeners(addr, 1, Duration::ZERO).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn an_address_that_becomes_free_is_waited_for() {
        let theirs = listeners("127.0.0.1:0".parse().unwrap(), 2, Duration::ZERO).unwrap();
        let addr = theirs[0].local_addr().unwrap();
        let waiting = thread::spawn(move || listeners(addr, 2, Duration::from_secs(60)));
        drop(theirs);
        assert_eq!(waiting.join().unwrap().unwrap().len(), 2);
    }
}
