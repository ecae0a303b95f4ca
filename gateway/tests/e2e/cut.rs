//! A wire that breaks: a TCP proxy in front of a registry that closes connections in the middle of an answer.

use crate::image::Image;
use anyhow::{Result, ensure};
use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

/// Bytes copied at once.
const CHUNK: usize = 64 << 10;

/// Passes connections on until it goes out of scope. The first few that carry enough towards the client are closed there and then.
pub(crate) struct Cutter {
    addr: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    to: SocketAddr,
    /// Bytes of one connection after which it is cut.
    after: u64,
    /// Cuts that are still to be made.
    left: Mutex<u32>,
    /// Bytes handed to clients.
    passed: AtomicU64,
    ended: AtomicBool,
}

impl Cutter {
    /// In front of `to` (`host:port`): the first `cuts` connections that carry `after` bytes to the client end with the last of them.
    pub(crate) fn start(to: &str, after: u64, cuts: u32) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let addr = listener.local_addr()?;
        let shared = Shared {
            to: to.parse()?,
            after,
            left: Mutex::new(cuts),
            passed: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        };
        let shared = Arc::new(shared);
        let of_listener = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                if of_listener.ended.load(Ordering::Relaxed) {
                    break;
                }
                let shared = Arc::clone(&of_listener);
                // A connection that fails is one that its client sees fail: it is the client that is tested.
                thread::spawn(move || client.and_then(|client| shared.connect(client)));
            }
        });
        Ok(Self { addr, shared })
    }

    /// `host:port` that clients are told.
    pub(crate) fn addr(&self) -> String {
        self.addr.to_string()
    }

    /// An error unless all cuts were made and a client that has the image now was sent little more than it once.
    pub(crate) fn check(&self, image: &Image) -> Result<()> {
        let left = *self.shared.left.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(left == 0, "{left} cuts were not made: no connection carried enough");
        let (passed, size) = (self.shared.passed.load(Ordering::Relaxed), image.size());
        ensure!(passed <= size + size / 10, "{passed} bytes were sent for an image of {size}: nothing was resumed");
        Ok(())
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.addr);
    }
}

impl Shared {
    fn connect(&self, client: TcpStream) -> io::Result<()> {
        let server = TcpStream::connect(self.to)?;
        let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
        let upwards = thread::spawn(move || {
            let _ = io::copy(&mut from_client, &mut to_server);
            let _ = to_server.shutdown(Shutdown::Write);
        });
        let answered = self.answer(&server, &client);
        // Ends the other direction too.
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
        let _ = upwards.join();
        answered
    }

    /// Carries answers to the client, up to their end or to a cut.
    fn answer(&self, mut server: &TcpStream, mut client: &TcpStream) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK];
        let mut carried = 0;
        loop {
            let read = match server.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let until_cut = usize::try_from(self.after - carried).unwrap_or(usize::MAX);
            let cut = read >= until_cut && self.take_cut();
            let some = if cut { &chunk[..until_cut] } else { &chunk[..read] };
            client.write_all(some)?;
            self.passed.fetch_add(some.len() as u64, Ordering::Relaxed);
            if cut {
                return Ok(());
            }
            // A connection that has had its chance is never cut.
            carried = (carried + some.len() as u64).min(self.after);
        }
    }

    fn take_cut(&self) -> bool {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let some = *left > 0;
        *left = left.saturating_sub(1);
        some
    }
}
