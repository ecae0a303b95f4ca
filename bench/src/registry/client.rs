//! A client that costs little: one connection, requests by hand, bodies thrown away.

use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::File,
    io::{Read, Seek, Write},
    net::{SocketAddr, TcpStream},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

/// One receive, bytes: stays in the core's own cache.
const CHUNK: usize = 256 << 10;
/// Longest head of an answer, bytes.
const HEAD_MAX: usize = 16 << 10;
/// What a client of images takes; docker-registry hides manifests from others.
const ACCEPT: &str = "accept: application/vnd.oci.image.manifest.v1+json, */*\r\n";
/// A server that says nothing for this long is broken.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// One connection.
pub(crate) struct Connection {
    server: SocketAddr,
    socket: TcpStream,
    buffer: Vec<u8>,
}

/// An answer whose body was thrown away.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    /// Bytes of the body.
    pub(crate) len: u64,
    /// Seconds from the request to the first byte of the body.
    pub(crate) first_s: f64,
    /// To the last.
    pub(crate) done_s: f64,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    fields.find_map(|(key, value)| key.eq_ignore_ascii_case(name).then(|| value.trim()))
}

impl Connection {
    pub(crate) fn open(server: SocketAddr) -> Result<Self> {
        let socket = TcpStream::connect(server).with_context(|| format!("connect to {server}"))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(SILENCE_MAX))?;
        Ok(Self { server, socket, buffer: vec![0; CHUNK] })
    }

    /// A request without a body.
    pub(crate) fn send(&mut self, method: &str, path: &str, headers: &str) -> Result<Answer> {
        let begun = Instant::now();
        write!(self.socket, "{method} {path} HTTP/1.1\r\nhost: {}\r\n{headers}\r\n", self.server)?;
        self.answer(method, path, begun, |_| ())
    }

    /// A GET that must be answered with `len` bytes.
    pub(crate) fn get(&mut self, path: &str, len: u64) -> Result<Answer> {
        self.send("GET", path, ACCEPT)?.bytes(len)
    }

    /// A GET of `len` bytes from `start`.
    pub(crate) fn range(&mut self, path: &str, start: u64, len: u64) -> Result<Answer> {
        let range = format!("range: bytes={start}-{}\r\n", start + len - 1);
        self.send("GET", path, &range)?.bytes(len)
    }

    /// A GET's body as text.
    pub(crate) fn text(&mut self, path: &str) -> Result<String> {
        let begun = Instant::now();
        write!(self.socket, "GET {path} HTTP/1.1\r\nhost: {}\r\n\r\n", self.server)?;
        let mut text = Vec::new();
        let answer = self.answer("GET", path, begun, |part| text.extend_from_slice(part))?;
        ensure!(answer.status == 200, "GET {path} answered {}", answer.status);
        Ok(String::from_utf8(text)?)
    }

    /// A request with a body at hand.
    pub(crate) fn put(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) -> Result<Answer> {
        let begun = Instant::now();
        let (server, len) = (self.server, body.len());
        write!(self.socket, "{method} {path} HTTP/1.1\r\nhost: {server}\r\ncontent-length: {len}\r\n{headers}\r\n")?;
        self.socket.write_all(body)?;
        self.answer(method, path, begun, |_| ())
    }

    /// A request whose body is a file's, sent by the kernel.
    pub(crate) fn upload(&mut self, method: &str, path: &str, file: &mut File) -> Result<Answer> {
        let begun = Instant::now();
        file.rewind()?;
        let (server, len) = (self.server, file.metadata()?.len());
        write!(self.socket, "{method} {path} HTTP/1.1\r\nhost: {server}\r\ncontent-length: {len}\r\n\r\n")?;
        let mut sent = 0;
        while sent < len {
            let most = usize::try_from((len - sent).min(1 << 30))?;
            let part = rustix::fs::sendfile(&self.socket, &*file, None, most)?;
            ensure!(part > 0, "file shrank");
            sent += part as u64;
        }
        self.answer(method, path, begun, |_| ())
    }

    fn answer(&mut self, method: &str, path: &str, begun: Instant, mut body: impl FnMut(&[u8])) -> Result<Answer> {
        let mut filled = 0;
        let end = loop {
            let got = self.socket.read(&mut self.buffer[filled..])?;
            ensure!(got > 0, "{method} {path}: hung up without an answer");
            filled += got;
            if let Some(end) = self.buffer[..filled].windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            ensure!(filled < HEAD_MAX, "{method} {path}: a head without an end");
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        let status = head.split(' ').nth(1).and_then(|text| text.parse().ok());
        let status: u16 = status.with_context(|| format!("{method} {path}: {head:?}"))?;
        let len = match header(&head, "content-length") {
            _ if method == "HEAD" || status == 204 => 0,
            Some(text) => text.parse()?,
            None => bail!("{method} {path}: an answer without a length: {head:?}"),
        };
        let mut first_s = (filled > end || len == 0).then(|| begun.elapsed().as_secs_f64());
        body(&self.buffer[end..filled]);
        let mut got = (filled - end) as u64;
        while got < len {
            let part = self.socket.read(&mut self.buffer)?;
            ensure!(part > 0, "{method} {path}: hung up after {got} of {len} bytes");
            first_s.get_or_insert_with(|| begun.elapsed().as_secs_f64());
            body(&self.buffer[..part]);
            got += part as u64;
        }
        ensure!(got == len, "{method} {path}: {got} bytes, the head says {len}");
        let done_s = begun.elapsed().as_secs_f64();
        Ok(Answer { status, head, len, first_s: first_s.unwrap_or(done_s), done_s })
    }
}

impl Answer {
    /// A success with a body of this length.
    fn bytes(self, len: u64) -> Result<Self> {
        ensure!(matches!(self.status, 200 | 206), "answered {}", self.head);
        ensure!(self.len == len, "{} bytes, expected {len}", self.len);
        Ok(self)
    }

    /// An answer with this status.
    pub(crate) fn expect(self, status: u16) -> Result<Self> {
        ensure!(self.status == status, "expected {status}: {}", self.head);
        Ok(self)
    }
}

/// Requests a second of one path over `connections`, each with one request at a time, for `length`.
pub(crate) fn load(server: SocketAddr, path: &str, len: u64, connections: usize, length: Duration) -> Result<f64> {
    let start = Barrier::new(connections + 1);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..connections)
            .map(|_| {
                scope.spawn(|| -> Result<u32> {
                    let opened = Connection::open(server).and_then(|mut connection| {
                        connection.get(path, len)?;
                        Ok(connection)
                    });
                    // Whatever came of it, the others wait here.
                    start.wait();
                    let mut connection = opened?;
                    let (begun, mut count) = (Instant::now(), 0);
                    while begun.elapsed() < length {
                        connection.get(path, len)?;
                        count += 1;
                    }
                    Ok(count)
                })
            })
            .collect();
        start.wait();
        let mut total = 0.0;
        for client in clients {
            total += f64::from(client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??);
        }
        Ok(total / length.as_secs_f64())
    })
}
