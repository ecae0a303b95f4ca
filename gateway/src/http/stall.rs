//! What is done about clients that stand still: one that brings no more of its body, one that takes no more of its answer. Either
//! would keep its connection's place, and what an answer holds, for as long as it likes.
//!
//! And about those that still send when they have their answer: a connection that is closed on what was not read is reset, and the
//! answer lost with it. So it is read away for a while first.

use super::BoxError;
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// A client that takes fewer bytes than this in the time it has for them stands still.
const STEP: usize = 16 << 10;

/// Longest that what a client still sends is read away.
const LINGER: Duration = Duration::from_secs(10);
/// Bytes read away at once.
const LINGER_LEN: usize = 64 << 10;
/// Reads in a row before others have their turn.
const LINGER_TURN: usize = 16;

/// Told when a client was given up.
pub(super) type Notice = Arc<dyn Fn() + Send + Sync>;
/// Whether a body of a connection was let go before its end.
pub(super) type Unread = Arc<AtomicBool>;

/// Runs while something is waited for.
#[derive(Default)]
struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Whether `wait` is over since it was waited for first.
    fn is_over(&mut self, wait: Duration, cx: &mut Context<'_>) -> bool {
        self.0.get_or_insert_with(|| Box::pin(sleep(wait))).as_mut().poll(cx).is_ready()
    }

    fn is_running(&self) -> bool {
        self.0.is_some()
    }

    fn stop(&mut self) {
        self.0 = None;
    }
}

/// A request's body. It breaks off where its client brings nothing for too long while somebody waits for it.
pub struct Arriving {
    body: Incoming,
    wait: Duration,
    timer: Timer,
    notice: Notice,
    ended: bool,
    unread: Unread,
}

impl Arriving {
    pub(super) fn new(body: Incoming, wait: Duration, notice: Notice, unread: Unread) -> Self {
        Self { body, wait, timer: Timer::default(), notice, ended: false, unread }
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if !self.ended && !self.body.is_end_stream() {
            self.unread.store(true, Relaxed);
        }
    }
}

impl Body for Arriving {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                this.timer.stop();
                this.ended = frame.is_none();
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            Poll::Pending if this.timer.is_over(this.wait, cx) => {
                this.timer.stop();
                (this.notice)();
                Poll::Ready(Some(Err(format!("no bytes for {:?}", this.wait).into())))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection. Writing fails where its client takes next to nothing for too long.
pub(super) struct Taken<S> {
    socket: S,
    wait: Duration,
    timer: Timer,
    /// Bytes taken while the timer runs.
    bytes: usize,
    notice: Notice,
    unread: Unread,
    /// Runs once our side is closed and the client may still send.
    linger: Timer,
}

impl<S> Taken<S> {
    pub(super) fn new(socket: S, wait: Duration, notice: Notice, unread: Unread) -> Self {
        Self { socket, wait, timer: Timer::default(), bytes: 0, notice, unread, linger: Timer::default() }
    }

    /// What a write came to, unless it took too long.
    fn wrote<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        bytes: impl FnOnce(&T) -> usize,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        match &written {
            Poll::Ready(Ok(written)) => {
                self.bytes = self.bytes.saturating_add(bytes(written));
                if self.bytes >= STEP {
                    self.timer.stop();
                    self.bytes = 0;
                }
            }
            Poll::Ready(Err(_)) => self.timer.stop(),
            Poll::Pending if self.timer.is_over(self.wait, cx) => {
                self.timer.stop();
                (self.notice)();
                let why = format!("client took fewer than {STEP} bytes in {:?}", self.wait);
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)));
            }
            Poll::Pending => {}
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Taken<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, into)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Taken<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, bytes);
        self.wrote(written, |bytes| *bytes, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, bytes);
        self.wrote(written, |bytes| *bytes, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    /// All that there was to write has been taken: what is written next is waited for anew.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.socket).poll_flush(cx);
        self.wrote(flushed, |()| STEP, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.linger.is_running() {
            let shut = Pin::new(&mut self.socket).poll_shutdown(cx);
            std::task::ready!(self.wrote(shut, |()| STEP, cx))?;
            if !self.unread.load(Relaxed) {
                return Poll::Ready(Ok(()));
            }
        }
        if self.linger.is_over(LINGER, cx) {
            return Poll::Ready(Ok(()));
        }
        let mut room = [MaybeUninit::uninit(); LINGER_LEN];
        for _ in 0..LINGER_TURN {
            let mut room = ReadBuf::uninit(&mut room);
            // Its end, or its failure: there is nobody left who could be told.
            if std::task::ready!(Pin::new(&mut self.socket).poll_read(cx, &mut room)).is_err()
                || room.filled().is_empty()
            {
                return Poll::Ready(Ok(()));
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
