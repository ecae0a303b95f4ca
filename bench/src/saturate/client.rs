//! A client that speaks the peer protocol and throws away what it is sent: what is left of a measurement is the node.
//!
//! The protocol is the shipped one (`peer_proto::conn`); around it is one thread, poll and plain reads of the same length as
//! those of the client that the raw limit is measured with.

use super::child::{self, Latency, Moved};
use anyhow::{Context, Result, bail, ensure};
use peer_proto::{
    Instant, Layout, PeerId, PieceIndex,
    conn::{CommandError, Conn, Effect, Event, Need},
    layout::Geometry,
    pieces::PieceSet,
    wire::{Channel, HEADER_LEN, Hello, Open},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    collections::{BTreeMap, VecDeque},
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

/// One read, bytes: larger gains nothing.
const CHUNK: usize = 1 << 20;
/// Longest wait for anything to happen on any connection.
const PATIENCE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };
/// Longest time between two looks at the connections' own deadlines.
const TICK: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Niceness of a client that goes before the others, beside that of this program.
const AHEAD: i32 = -10;

/// What is asked of the node, and by how many.
#[derive(Clone, clap::Args)]
pub(crate) struct Load {
    server: SocketAddr,
    layout: PathBuf,
    /// Connections.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Pieces that each connection asks for, over and over the blob's.
    #[arg(long, default_value_t = 1024)]
    pieces: u32,
    /// Requests that each connection has outstanding.
    #[arg(long, default_value_t = 16)]
    window: usize,
    /// Stop after so many milliseconds instead.
    #[arg(long)]
    for_ms: Option<u64>,
    /// Go before the others on this side's cores, so that what is timed is the node. Needs the right to.
    #[arg(long)]
    ahead: bool,
    /// Let each connection begin at another piece.
    #[arg(long)]
    spread: bool,
}

/// Connects and opens the blob on every connection; then, on `run`, pulls.
pub(crate) fn peer_client(load: &Load) -> Result<()> {
    if load.ahead
        && let Err(error) = rustix::process::nice(AHEAD)
    {
        eprintln!("this client does not go before the others: {error}");
    }
    let layout = Layout::decode(&std::fs::read(&load.layout)?)?;
    let mut clients = Clients { started: std::time::Instant::now(), links: Vec::new(), buffer: vec![0; CHUNK] };
    for i in 0..load.connections {
        let now = clients.now();
        clients.links.push(Link::dial(now, load, &layout, i)?);
    }
    clients.turn_until(|links| links.iter().all(|link| link.channel.is_some()))?;
    let mut clients = Some(clients);
    let run = || {
        let mut clients = clients.take().context("a client runs once")?;
        clients.pull(load)
    };
    child::answer("", run, Moved::default)
}

struct Clients {
    started: std::time::Instant,
    links: Vec<Link>,
    buffer: Vec<u8>,
}

impl Clients {
    fn now(&self) -> Instant {
        Instant::from_nanos(self.started.elapsed().as_nanos().try_into().unwrap_or(u64::MAX))
    }

    fn pull(&mut self, load: &Load) -> Result<Moved> {
        let until = load.for_ms.map(|ms| std::time::Instant::now() + Duration::from_millis(ms));
        for link in &mut self.links {
            link.left = if until.is_some() { u32::MAX } else { load.pieces };
            let now = Instant::from_nanos(self.started.elapsed().as_nanos().try_into().unwrap_or(u64::MAX));
            link.converse(now)?;
        }
        self.turn_until(|links| {
            links.iter().all(|link| link.left == 0 && link.asked.is_empty())
                || until.is_some_and(|until| std::time::Instant::now() >= until)
        })?;
        let samples = self.links.iter_mut().flat_map(|link| std::mem::take(&mut link.samples)).collect();
        Ok(Moved {
            bytes: self.links.iter().map(|link| link.bytes).sum(),
            calls: self.links.iter().map(|link| link.calls).sum(),
            latency: Latency::of(samples),
        })
    }

    /// Reads whatever comes until the condition holds.
    fn turn_until(&mut self, over: impl Fn(&[Link]) -> bool) -> Result<()> {
        while !over(&self.links) {
            let waiting: Vec<usize> = (0..self.links.len()).filter(|i| !self.links[*i].is_done()).collect();
            let mut fds: Vec<_> = waiting.iter().map(|i| PollFd::new(&self.links[*i].socket, PollFlags::IN)).collect();
            let mut turned = poll(&mut fds, Some(&TICK))?;
            if turned == 0 {
                turned = poll(&mut fds, Some(&PATIENCE))?;
            }
            ensure!(turned > 0, "nothing came for {} s", TICK.tv_sec + PATIENCE.tv_sec);
            let ready: Vec<usize> =
                waiting.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty()).map(|(i, _)| *i).collect();
            let now = self.now();
            for i in ready {
                self.links[i].readable(now, &mut self.buffer)?;
            }
        }
        Ok(())
    }
}

struct Link {
    socket: TcpStream,
    conn: Conn,
    geometry: Geometry,
    channel: Option<Channel>,
    /// Bytes of a header or a control body that have come.
    staged: Vec<u8>,
    /// Bytes of a piece that have not.
    payload: Option<usize>,
    window: usize,
    /// Pieces yet to be asked for, not counting those to be asked for again.
    left: u32,
    next: u32,
    again: VecDeque<PieceIndex>,
    asked: BTreeMap<u32, Instant>,
    samples: Vec<Duration>,
    bytes: u64,
    calls: u64,
}

impl Link {
    fn dial(now: Instant, load: &Load, layout: &Layout, i: usize) -> Result<Self> {
        let socket = TcpStream::connect(load.server).with_context(|| format!("connect to {}", load.server))?;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        let mut id = [0x5c; 20];
        id[..8].copy_from_slice(&(i as u64).to_le_bytes());
        id[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        let geometry = layout.geometry();
        let start = u32::try_from(i * geometry.pieces() as usize / load.connections)?;
        let mut link = Self {
            socket,
            conn: Conn::dialled(now, Hello::new(PeerId::new(id)), None),
            geometry,
            channel: None,
            staged: Vec::new(),
            payload: None,
            window: load.window,
            left: 0,
            next: if load.spread { start } else { 0 },
            again: VecDeque::new(),
            asked: BTreeMap::new(),
            samples: Vec::new(),
            bytes: 0,
            calls: 0,
        };
        let open =
            Open { digest: *layout.digest(), namespace: "bench".parse()?, geometry, has: PieceSet::new(&geometry) };
        link.converse_opening(now, Some(&open))?;
        while link.conn.peer().is_none() {
            poll(&mut [PollFd::new(&link.socket, PollFlags::IN)], Some(&PATIENCE))?;
            let mut buffer = [0; 4096];
            link.readable(now, &mut buffer)?;
        }
        link.converse_opening(now, Some(&open))?;
        Ok(link)
    }

    fn is_done(&self) -> bool {
        self.channel.is_some() && self.left == 0 && self.asked.is_empty()
    }

    fn readable(&mut self, now: Instant, buffer: &mut [u8]) -> Result<()> {
        let got = match (&self.socket).read(buffer) {
            Ok(0) => bail!("the node hung up"),
            Ok(got) => got,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        self.calls += 1;
        self.conn.handle(now, Event::Read(got as u64));
        self.taken(now, &buffer[..got])?;
        self.converse(now)
    }

    /// Feeds the connection with what came.
    fn taken(&mut self, now: Instant, mut bytes: &[u8]) -> Result<()> {
        loop {
            let staged = match self.conn.need() {
                Need::Header => HEADER_LEN,
                Need::Body(len) => len as usize,
                Need::Payload { len, .. } | Need::Discard(len) => {
                    let left = self.payload.get_or_insert(len as usize);
                    let take = bytes.len().min(*left);
                    *left -= take;
                    bytes = &bytes[take..];
                    if *left > 0 {
                        return Ok(());
                    }
                    self.payload = None;
                    self.bytes += u64::from(len);
                    self.conn.handle(now, Event::Payload);
                    self.converse(now)?;
                    continue;
                }
                Need::Nothing => bail!("the node ended the connection"),
            };
            let take = bytes.len().min(staged - self.staged.len());
            self.staged.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.staged.len() < staged {
                return Ok(());
            }
            match self.staged.first_chunk() {
                Some(header) if staged == HEADER_LEN && matches!(self.conn.need(), Need::Header) => {
                    self.conn.handle(now, Event::Header(header));
                }
                _ => self.conn.handle(now, Event::Body(&self.staged)),
            }
            self.staged.clear();
            self.converse(now)?;
        }
    }

    fn converse(&mut self, now: Instant) -> Result<()> {
        self.converse_opening(now, None)
    }

    fn converse_opening(&mut self, now: Instant, open: Option<&Open>) -> Result<()> {
        if let Some(open) = open.filter(|_| self.conn.peer().is_some()) {
            self.conn.open(now, open)?;
        }
        loop {
            self.ask(now)?;
            let Some(effect) = self.conn.poll() else { return Ok(()) };
            match effect {
                Effect::Send { head, piece: None } => {
                    self.write(&head)?;
                    self.conn.handle(now, Event::Sent(head));
                }
                Effect::Opened { channel, has } => {
                    ensure!(has.is_full(), "the node has {} pieces of the blob", has.count());
                    self.channel = Some(channel);
                }
                Effect::Arrived { piece, .. } => {
                    if let Some(asked) = self.asked.remove(&piece.get()) {
                        self.samples.push(now.since(asked));
                    }
                }
                Effect::Rejected { piece, .. } => {
                    self.asked.remove(&piece.get());
                    self.again.push_back(piece);
                }
                Effect::Refused { reason, .. } => bail!("the node refuses the blob: {reason:?}"),
                Effect::Closed(closed) => bail!("the connection ended: {closed}"),
                Effect::Handshaken(_) | Effect::Released { .. } => {}
                other => bail!("a node that only serves said {other:?}"),
            }
        }
    }

    /// Keeps the window full.
    fn ask(&mut self, now: Instant) -> Result<()> {
        let Some(channel) = self.channel else { return Ok(()) };
        while self.asked.len() < self.window && (self.left > 0 || !self.again.is_empty()) {
            let again = self.again.pop_front();
            let piece = again.or_else(|| self.geometry.piece(self.next)).context("the blob has no pieces")?;
            match self.conn.request(now, channel, piece) {
                Ok(()) => {
                    self.asked.insert(piece.get(), now);
                    if again.is_none() {
                        self.left -= 1;
                        self.next = (self.next + 1) % self.geometry.pieces();
                    }
                }
                Err(CommandError::Full | CommandError::Twice) => {
                    self.again.extend(again);
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Requests are some tens of bytes, for which a socket has room.
    fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            match (&self.socket).write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&PATIENCE))?;
                }
                Err(error) => return Err(error.into()),
            }
            self.calls += 1;
        }
        Ok(())
    }
}
