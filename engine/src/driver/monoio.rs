//! Shards on real sockets: one thread each, on io_uring, or on epoll where io_uring is refused.
//!
//! The ring (or epoll) tells when a socket is ready, and the bytes are moved by one plain call then. A socket that waits for a
//! piece wakes only once all of it is there (`SO_RCVLOWAT`), so that a piece of 1 MiB costs one wake-up and one receive, whichever
//! driver runs; measured, that beats both the ring's own receives, which complete with every segment, and its sends.
//! Nothing here is ever cancelled: the poll is the only operation that the kernel holds, and shutting the socket down
//! completes it. monoio's cross-thread wakers are not used; other threads write to a socket that is polled like the rest.

use super::{Body, Carried, Effect, Event, Recv, SEND_MAX, Send, SocketId};
use crate::{
    disk::Stretch,
    inbox::{self, Inbox},
    net, raw,
    shard::{Core, Done, Outbox, command::Command},
    workers::{Reply, Work, Workers},
};
use monoio::time::{Sleep, sleep, sleep_until};
use peer_proto::Instant;
use rustix::{
    io::Errno,
    net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg},
};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    io::{self, IoSlice, IoSliceMut},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::BorrowedFd,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

/// Messages taken from the inbox in one turn at most, so that sockets get theirs.
const MESSAGES_PER_TURN: usize = 256;
/// Sends up to this many bytes overtake those that are longer: control messages and small pieces.
const SMALL_SEND: usize = 128 << 10;
/// Times that a task gives way until the runtime has looked at its ring (or epoll): it does when twice as many tasks have run as there
/// were, and one more.
const ROUNDS: u32 = 3;
/// Wait after an accept that failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(20);

/// Which kernel interface shards wait on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    IoUring,
    Epoll,
}

impl Kind {
    /// io_uring where this kernel and its policies allow what we need of it, and in words why it is that or epoll.
    pub(crate) fn available() -> (Self, String) {
        // The runtime's own look is taken once per process: a filter that this thread got since would be missed.
        match raw::ring::refused() {
            Some(error) => (Self::Epoll, format!("the kernel or a seccomp profile refuses io_uring_setup: {error}")),
            None if monoio::utils::detect_uring() => (Self::IoUring, "the kernel grants a ring".to_owned()),
            None => (Self::Epoll, "the kernel's io_uring lacks operations that are needed".to_owned()),
        }
    }
}

/// The engine's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(std::time::Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(std::time::Instant::now())
    }

    pub(crate) fn now(self) -> Instant {
        Instant::from_nanos(self.0.elapsed().as_nanos().try_into().unwrap_or(u64::MAX))
    }

    fn at(self, instant: Instant) -> std::time::Instant {
        self.0 + Duration::from_nanos(instant.as_nanos())
    }
}

/// What a shard's thread is started with.
pub(crate) struct Shard {
    pub(crate) core: Core,
    pub(crate) inbox: Inbox<Command, Done>,
    pub(crate) listener: TcpListener,
    pub(crate) kind: Kind,
    pub(crate) clock: Clock,
    pub(crate) workers: Arc<Workers>,
    /// Every shard's inbox, this one's too, in order.
    pub(crate) shards: Arc<[Arc<Outbox>]>,
    /// This shard's number.
    pub(crate) index: usize,
}

/// Runs a shard until it is told to stop and all its operations are over. `started` is told whether it began.
pub(crate) fn run(shard: Shard, started: impl FnOnce(io::Result<()>)) {
    let built = match shard.kind {
        Kind::IoUring => {
            monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().enable_timer().build().map(Runtime::IoUring)
        }
        Kind::Epoll => monoio::RuntimeBuilder::<monoio::LegacyDriver>::new().enable_timer().build().map(Runtime::Epoll),
    };
    match built {
        Err(e) => started(Err(e)),
        Ok(Runtime::IoUring(mut runtime)) => runtime.block_on(serve(shard, started)),
        Ok(Runtime::Epoll(mut runtime)) => runtime.block_on(serve(shard, started)),
    }
}

enum Runtime {
    IoUring(monoio::Runtime<monoio::time::TimeDriver<monoio::IoUringDriver>>),
    Epoll(monoio::Runtime<monoio::time::TimeDriver<monoio::LegacyDriver>>),
}

async fn serve(shard: Shard, started: impl FnOnce(io::Result<()>)) {
    let begun = Shell::new(shard);
    let (shell, acceptor, watched) = match begun {
        Ok(begun) => begun,
        Err(e) => return started(Err(e)),
    };
    started(Ok(()));
    monoio::spawn(accept(shell.clone(), acceptor));
    monoio::spawn(watch_inbox(shell.clone(), watched));
    monoio::spawn(watch_clock(shell.clone()));
    shell.over().await;
}

/// A shard's core, and what is around it.
struct Shell {
    core: RefCell<Core>,
    inbox: RefCell<Inbox<Command, Done>>,
    /// Completions since the last turn.
    events: RefCell<VecDeque<Event>>,
    /// Whether a turn is on its way.
    turning: Cell<bool>,
    sockets: RefCell<BTreeMap<SocketId, Rc<Socket>>>,
    /// Long sends, one of which goes each turn: a connection that has a little to say, or to be told, waits for one of them and not
    /// for all.
    long_sends: RefCell<VecDeque<(SocketId, Send)>>,
    /// Tasks with a socket or the clock in their hands.
    tasks: Cell<usize>,
    clock: Clock,
    /// The core's deadline, for the clock's task.
    deadline: Cell<Option<Instant>>,
    clock_waker: RefCell<Option<Waker>>,
    over_waker: RefCell<Option<Waker>>,
    stopping: Cell<bool>,
    listener: TcpListener,
    workers: Arc<Workers>,
    shards: Arc<[Arc<Outbox>]>,
    /// This shard's own inbox, for its jobs.
    sink: Arc<Outbox>,
}

struct Socket {
    stream: monoio::net::TcpStream,
    /// What SO_RCVLOWAT is set to.
    wakes_at: Cell<usize>,
}

impl Socket {
    fn new(stream: TcpStream) -> io::Result<Rc<Self>> {
        let stream = monoio::net::TcpStream::from_std(stream)?;
        Ok(Rc::new(Self { stream, wakes_at: Cell::new(1) }))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        raw::net::borrowed(&self.stream)
    }
}

/// Counts a task for [`Shell::over`], however it ends.
struct Running(Rc<Shell>);

impl Running {
    fn new(shell: &Rc<Shell>) -> Self {
        shell.tasks.set(shell.tasks.get() + 1);
        Self(shell.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.tasks.set(self.0.tasks.get() - 1);
        self.0.wake_over();
    }
}

impl Shell {
    fn new(shard: Shard) -> io::Result<(Rc<Self>, monoio::net::TcpListener, monoio::net::UnixStream)> {
        let Shard { core, inbox, listener, clock, workers, shards, index, kind: _ } = shard;
        let acceptor = monoio::net::TcpListener::from_std(listener.try_clone()?)?;
        let watched = monoio::net::UnixStream::from_std(inbox.watched().try_clone()?)?;
        let shell = Self {
            core: RefCell::new(core),
            inbox: RefCell::new(inbox),
            events: RefCell::default(),
            turning: Cell::new(false),
            sockets: RefCell::default(),
            long_sends: RefCell::default(),
            tasks: Cell::new(0),
            clock,
            deadline: Cell::new(None),
            clock_waker: RefCell::default(),
            over_waker: RefCell::default(),
            stopping: Cell::new(false),
            listener,
            workers,
            sink: shards[index].clone(),
            shards,
        };
        Ok((Rc::new(shell), acceptor, watched))
    }

    /// Queues an event for the next turn. The turn is a task of its own, behind those whose operations completed with this one: so it
    /// finds all their events, and answers them with one submission.
    fn happened(self: &Rc<Self>, event: Event) {
        self.events.borrow_mut().push_back(event);
        self.turn_soon();
    }

    fn turn_soon(self: &Rc<Self>) {
        if !self.turning.replace(true) {
            let shell = self.clone();
            monoio::spawn(async move {
                if !shell.long_sends.borrow().is_empty() {
                    look_around().await;
                }
                shell.turn();
            });
        }
    }

    fn turn(self: &Rc<Self>) {
        self.turning.set(false);
        let now = self.clock.now();
        let mut core = self.core.borrow_mut();
        let count = self.events.borrow().len();
        for event in self.events.borrow_mut().drain(..count) {
            core.handle(now, event);
        }
        let mut left = MESSAGES_PER_TURN;
        while left > 0
            && let Some(message) = self.inbox.borrow_mut().take()
        {
            left -= 1;
            let event = match message {
                inbox::Message::Done(done) => Some(Event::Done { token: done.token, outcome: done.outcome }),
                inbox::Message::Command(command) => self.unpack(&mut core, command),
            };
            if let Some(event) = event {
                core.handle(now, event);
            }
        }
        core.tick(now);
        while let Some(effect) = core.poll() {
            self.carry_out(&mut core, effect);
        }
        let long = self.long_sends.borrow_mut().pop_front();
        if let Some((socket, op)) = long {
            self.send(socket, op);
        }
        if core.stopped() {
            self.stop();
        }
        self.set_deadline(core.deadline());
        if left == 0 || !self.events.borrow().is_empty() || !self.long_sends.borrow().is_empty() {
            self.turn_soon();
        }
    }

    /// Commands that need a hand of the driver's before the core sees them.
    fn unpack(self: &Rc<Self>, core: &mut Core, command: Command) -> Option<Event> {
        let Command::Adopt { carried: Carried::Socket(fd), from, hello } = command else {
            return Some(Event::Command(command));
        };
        match Socket::new(TcpStream::from(fd)) {
            Ok(socket) => {
                let id = core.next_socket();
                self.sockets.borrow_mut().insert(id, socket);
                Some(Event::Adopted { socket: id, from, hello })
            }
            Err(error) => {
                tracing::warn!(%error, peer = %from, "cannot take over a connection");
                None
            }
        }
    }

    fn carry_out(self: &Rc<Self>, core: &mut Core, effect: Effect) {
        match effect {
            Effect::Dial { socket, to } => match net::dial(to).and_then(Socket::new) {
                Ok(dialled) => {
                    self.sockets.borrow_mut().insert(socket, dialled.clone());
                    self.spawn(async move |shell| {
                        let result = connected(&dialled).await;
                        shell.happened(Event::Dialed { socket, result });
                    });
                }
                Err(error) => self.happened(Event::Dialed { socket, result: Err(error) }),
            },
            Effect::Recv { socket, mut op } => match self.socket(socket) {
                Some(held) => self.spawn(async move |shell| {
                    let result = receive(&held, &mut op).await;
                    drop(held);
                    shell.happened(Event::Received { socket, result, op });
                }),
                None => self.happened(Event::Received { socket, result: Err(io::ErrorKind::NotConnected.into()), op }),
            },
            Effect::Send { socket, op } => self.send_in_turn(socket, op),
            Effect::Close { socket } => {
                if let Some(held) = self.sockets.borrow_mut().remove(&socket) {
                    net::shut(held.fd());
                }
            }
            Effect::HandOver { socket, to, from, hello } => self.hand_over(socket, to, from, hello),
            Effect::Job { token, job } => {
                let reply = Reply::Sink { sink: self.sink.clone(), token: token.0 };
                if let Err(refused) = self.workers.submit(Work { job, reply }) {
                    core.refused(token, refused.work.job);
                }
            }
            Effect::Answer(answer) => answer.give(),
            Effect::Tell { to, message } => {
                // Messages only hasten what would happen anyway.
                let _ = self.shards[to].try_send(Command::Told(message));
            }
        }
    }

    /// Sends at once what is short; the rest waits for its turn.
    fn send_in_turn(self: &Rc<Self>, socket: SocketId, op: Send) {
        if op.len() <= SMALL_SEND {
            self.send(socket, op);
        } else {
            self.long_sends.borrow_mut().push_back((socket, op));
            self.turn_soon();
        }
    }

    fn send(self: &Rc<Self>, socket: SocketId, mut op: Send) {
        let Some(held) = self.socket(socket) else {
            return self.happened(Event::Sent { socket, result: Err(io::ErrorKind::NotConnected.into()), op });
        };
        match try_send(&held, &mut op) {
            Err(Errno::AGAIN) => self.spawn(async move |shell| match held.stream.writable(false).await {
                Ok(()) => shell.send_in_turn(socket, op),
                Err(error) => shell.happened(Event::Sent { socket, result: Err(error), op }),
            }),
            result => self.happened(Event::Sent { socket, result: result.map_err(io::Error::from), op }),
        }
    }

    fn hand_over(&self, socket: SocketId, to: usize, from: SocketAddr, hello: Box<[u8]>) {
        let Some(held) = self.sockets.borrow_mut().remove(&socket) else { return };
        // Another holder would be an operation under way, of which there is none by the contract of this effect.
        let Ok(held) = Rc::try_unwrap(held) else { return };
        let carried = Carried::Socket(raw::net::owned(held.stream));
        if self.shards[to].try_send(Command::Adopt { carried, from, hello }).is_err() {
            tracing::warn!(shard = to, peer = %from, "shard takes no more connections");
        }
    }

    fn socket(&self, id: SocketId) -> Option<Rc<Socket>> {
        self.sockets.borrow().get(&id).cloned()
    }

    fn spawn<F: Future<Output = ()> + 'static>(self: &Rc<Self>, task: impl FnOnce(Rc<Self>) -> F) {
        let running = Running::new(self);
        let task = task(self.clone());
        monoio::spawn(async move {
            task.await;
            drop(running);
        });
    }

    fn set_deadline(&self, deadline: Option<Instant>) {
        if self.deadline.replace(deadline) != deadline
            && let Some(waker) = self.clock_waker.borrow_mut().take()
        {
            waker.wake();
        }
    }

    fn stop(&self) {
        if self.stopping.replace(true) {
            return;
        }
        net::shut(&self.listener);
        for socket in std::mem::take(&mut *self.sockets.borrow_mut()).into_values() {
            net::shut(socket.fd());
        }
        self.sink.ring();
        if let Some(waker) = self.clock_waker.borrow_mut().take() {
            waker.wake();
        }
        self.wake_over();
    }

    fn wake_over(&self) {
        if let Some(waker) = self.over_waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Until the shard has stopped and nothing of it is left with the kernel: what a runtime drops then is only memory.
    async fn over(&self) {
        std::future::poll_fn(|cx| {
            if self.stopping.get() && self.tasks.get() == 0 {
                return Poll::Ready(());
            }
            *self.over_waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

async fn accept(shell: Rc<Shell>, acceptor: monoio::net::TcpListener) {
    let _running = Running::new(&shell);
    while !shell.stopping.get() {
        if let Err(error) = acceptor.readable(false).await {
            tracing::error!(%error, "cannot wait for connections");
            sleep(ACCEPT_RETRY).await;
        }
        loop {
            match shell.listener.accept().and_then(|(stream, from)| Ok((Socket::new(net::tuned(stream)?)?, from))) {
                Ok((socket, from)) => {
                    let id = shell.core.borrow_mut().next_socket();
                    shell.sockets.borrow_mut().insert(id, socket);
                    shell.happened(Event::Accepted { socket: id, from });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) if shell.stopping.get() => break,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_RETRY).await;
                    break;
                }
            }
        }
    }
}

async fn watch_inbox(shell: Rc<Shell>, watched: monoio::net::UnixStream) {
    let _running = Running::new(&shell);
    while !shell.stopping.get() {
        if let Err(error) = watched.readable(false).await {
            tracing::error!(%error, "cannot wait for the inbox");
            sleep(ACCEPT_RETRY).await;
        }
        shell.inbox.borrow().hush();
        shell.turn_soon();
    }
}

async fn watch_clock(shell: Rc<Shell>) {
    let _running = Running::new(&shell);
    let mut timer = Timer { deadline: None, sleep: Box::pin(sleep(Duration::ZERO)) };
    loop {
        std::future::poll_fn(|cx| timer.poll(&shell, cx)).await;
        if shell.stopping.get() {
            return;
        }
        shell.turn_soon();
    }
}

struct Timer {
    deadline: Option<Instant>,
    sleep: Pin<Box<Sleep>>,
}

impl Timer {
    fn poll(&mut self, shell: &Shell, cx: &mut Context<'_>) -> Poll<()> {
        if shell.stopping.get() {
            return Poll::Ready(());
        }
        *shell.clock_waker.borrow_mut() = Some(cx.waker().clone());
        let deadline = shell.deadline.get();
        let Some(at) = deadline else {
            self.deadline = None;
            return Poll::Pending;
        };
        if self.deadline != deadline {
            self.deadline = deadline;
            self.sleep = Box::pin(sleep_until(shell.clock.at(at).into()));
        }
        let poll = self.sleep.as_mut().poll(cx);
        if poll.is_ready() {
            // Asked again only once the turn has set the next one.
            shell.deadline.set(None);
            self.deadline = None;
        }
        poll
    }
}

async fn connected(socket: &Socket) -> io::Result<()> {
    socket.stream.writable(false).await?;
    match rustix::net::sockopt::socket_error(socket.fd())? {
        Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

async fn receive(socket: &Socket, op: &mut Recv) -> io::Result<usize> {
    if socket.wakes_at.replace(op.want) != op.want {
        raw::net::wake_at(socket.fd(), op.want)?;
    }
    loop {
        socket.stream.readable(false).await?;
        let [payload, stage] = op.targets();
        let mut parts = [IoSliceMut::new(payload), IoSliceMut::new(stage)];
        match recvmsg(socket.fd(), &mut parts, &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT) {
            Ok(message) => {
                op.arrived(message.bytes);
                return Ok(message.bytes);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends what the socket takes: all in one call where it is in memory, a file's pages by a second one.
fn try_send(socket: &Socket, op: &mut Send) -> Result<usize, Errno> {
    let mut sent = 0;
    if matches!(op.body, Body::Memory(_)) || op.control_left() > 0 {
        sent = send_memory(socket, op)?;
    }
    if op.control_left() > 0 {
        return Ok(sent);
    }
    let Body::File(stretch) = &op.body else { return Ok(sent) };
    match send_file(socket, stretch) {
        // The file is shorter than its blob: somebody else has cut it.
        Ok(0) => Err(Errno::IO),
        Ok(n) => {
            op.left(n);
            Ok(sent + n)
        }
        // No such call for this file system's files, or under this process's filter.
        Err(Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
            stretch.file.undescribe();
            op.body = Body::Memory(stretch.mapped());
            if sent > 0 { Ok(sent) } else { send_memory(socket, op) }
        }
        // The next call has the same to say.
        Err(_) if sent > 0 => Ok(sent),
        Err(error) => Err(error),
    }
}

fn send_memory(socket: &Socket, op: &mut Send) -> Result<usize, Errno> {
    let parts = op.parts().map(IoSlice::new);
    let mut flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    // A header leaves in one packet with the file's first bytes.
    flags.set(SendFlags::MORE, matches!(op.body, Body::File(_)));
    let sent = rustix::io::retry_on_intr(|| sendmsg(socket.fd(), &parts, &mut SendAncillaryBuffer::default(), flags))?;
    op.left(sent);
    Ok(sent)
}

/// A peer that has gone is an error and no signal: Rust's runtime has SIGPIPE ignored.
fn send_file(socket: &Socket, stretch: &Stretch) -> Result<usize, Errno> {
    let Some(file) = stretch.file.descriptor() else { return Err(Errno::INVAL) };
    let len = stretch.len().min(SEND_MAX);
    rustix::io::retry_on_intr(|| rustix::fs::sendfile(socket.fd(), file, Some(&mut stretch.range.start.clone()), len))
}

/// Lets the runtime look at what has become ready.
async fn look_around() {
    let mut left = ROUNDS;
    std::future::poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(());
        }
        left -= 1;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
