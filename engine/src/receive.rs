//! The receiving side of one connection: which bytes go where, and how many to wait for.
//!
//! Headers and control bodies pass over a small stage; a piece goes straight into a pooled buffer. While a piece is received
//! the stage stands behind it, so the header that follows comes with the piece's tail, and a stream of pieces costs one receive
//! each.

use crate::{
    buf::{Buf, Pool},
    driver::{Payload, Recv, Stage},
};
use peer_proto::{
    Instant,
    conn::{Conn, Event, Need, PROGRESS_MIN},
    wire::HEADER_LEN,
};
use std::time::Duration;

/// Bytes waited for at once, at most. Enough that waking costs nothing beside the copy; the kernel's buffers hold them.
const WAKE_MAX: usize = 1 << 20;
/// Bytes waited for at once while a connection is slow, lest waiting looks like standing still.
#[expect(clippy::cast_possible_truncation, reason = "64 KiB")]
const WAKE_MIN: usize = PROGRESS_MIN as usize;
/// A receive that took less may wait for twice as much the next time.
const BRISK: Duration = Duration::from_millis(250);
/// A receive that took more waits for half as much the next time.
const SLUGGISH: Duration = Duration::from_secs(1);

/// What [`Intake::pump`] did, or wants done.
#[derive(Debug)]
pub(crate) enum Pumped {
    /// The connection was told something; pump again.
    Fed,
    /// The connection was told of a piece, and here it is; pump again.
    Piece(Buf),
    /// Nothing can be told before this receive completes.
    Receive(Recv),
    /// A piece comes and the pool has no buffer; pump again when it may.
    Starved,
    /// A receive is under way, or the connection is over.
    Nothing,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Intake {
    /// None while a receive is under way.
    stage: Option<Stage>,
    payload: Option<Payload>,
    /// Bytes of a piece to be thrown away that have not come.
    discard: Option<usize>,
    wake: usize,
    asked: Instant,
}

impl Intake {
    pub(crate) fn new() -> Self {
        Self { stage: Some(Stage::default()), payload: None, discard: None, wake: WAKE_MIN, asked: Instant::ZERO }
    }

    /// Header and body of a HELLO that another shard has read.
    pub(crate) fn with(bytes: &[u8]) -> Self {
        let mut stage = Stage::default();
        stage.make_room(bytes.len());
        stage.put(bytes);
        Self { stage: Some(stage), ..Self::new() }
    }

    /// A receive that lasts until `len` bytes lie on the stage, where none is under way.
    pub(crate) fn await_staged(&mut self, now: Instant, len: usize) -> Pumped {
        self.receive(now, len)
    }

    /// Whether no piece is in the middle of arriving.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.stage.is_some() && self.payload.is_none()
    }

    /// What lies on the stage.
    pub(crate) fn staged(&self) -> &[u8] {
        self.stage.as_ref().map_or(&[], Stage::filled)
    }

    /// Tells the connection one thing, if there is one to tell.
    pub(crate) fn pump(&mut self, now: Instant, conn: &mut Conn, pool: &Pool) -> Pumped {
        let Some(stage) = &mut self.stage else { return Pumped::Nothing };
        match conn.need() {
            Need::Nothing => Pumped::Nothing,
            Need::Header => {
                let Some(header) = stage.filled().first_chunk::<HEADER_LEN>() else {
                    return self.receive(now, HEADER_LEN);
                };
                conn.handle(now, Event::Header(header));
                stage.consume(HEADER_LEN);
                Pumped::Fed
            }
            Need::Body(len) => {
                let len = len as usize;
                let Some(body) = stage.filled().get(..len) else { return self.receive(now, len) };
                conn.handle(now, Event::Body(body));
                stage.consume(len);
                Pumped::Fed
            }
            Need::Payload { len, .. } => {
                if self.payload.is_none() {
                    let Some(mut buf) = pool.take(len as usize) else { return Pumped::Starved };
                    let filled = stage.filled().len().min(buf.len());
                    buf[..filled].copy_from_slice(&stage.filled()[..filled]);
                    stage.consume(filled);
                    self.payload = Some(Payload { buf, filled });
                }
                match self.payload.take_if(|payload| payload.filled == payload.buf.len()) {
                    Some(payload) => {
                        conn.handle(now, Event::Payload);
                        Pumped::Piece(payload.buf)
                    }
                    None => self.receive(now, 0),
                }
            }
            Need::Discard(len) => {
                let left = self.discard.get_or_insert(len as usize);
                let there = stage.filled().len().min(*left);
                stage.consume(there);
                *left -= there;
                let left = *left;
                if left > 0 {
                    return self.receive(now, left.min(Stage::LEN));
                }
                self.discard = None;
                conn.handle(now, Event::Payload);
                Pumped::Fed
            }
        }
    }

    /// A receive that lasts until `staged` bytes lie on the stage, or a good part of the payload has come.
    fn receive(&mut self, now: Instant, staged: usize) -> Pumped {
        let Some(mut stage) = self.stage.take() else { return Pumped::Nothing };
        stage.make_room(staged);
        let payload = self.payload.take();
        let want = match &payload {
            Some(payload) => (payload.buf.len() - payload.filled).min(self.wake),
            None => staged - stage.filled().len(),
        };
        self.asked = now;
        Pumped::Receive(Recv { payload, stage, want })
    }

    /// The receive is over, whatever came of it.
    pub(crate) fn received(&mut self, now: Instant, op: Recv) {
        let Recv { payload, stage, .. } = op;
        if payload.is_some() {
            let took = now.since(self.asked);
            if took < BRISK {
                self.wake = (self.wake * 2).min(WAKE_MAX);
            } else if took > SLUGGISH {
                self.wake = (self.wake / 2).max(WAKE_MIN);
            }
        }
        self.payload = payload;
        self.stage = Some(stage);
    }
}
