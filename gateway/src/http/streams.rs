//! What is done about a client of HTTP/2 that stops taking one of its answers. Its connection is not full, since the client's window for
//! that stream is; so nothing is written that could take too long, and the answer is not asked for its next part. The connection
//! therefore knows of each answer since when its client has had a part to take.

use super::{BoxError, stall::Notice};
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::Instant;

/// The answers of one connection under way that its client has a part of to take, and since when. Bounded by the streams that a
/// connection may have.
#[derive(Default)]
pub(super) struct Streams {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    waiting: BTreeMap<u64, Instant>,
}

impl Streams {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until a client has taken nothing of an answer for so long.
    pub(super) async fn stalled(&self, wait: Duration, notice: &Notice) {
        loop {
            let first = self.state().waiting.values().min().copied();
            let due = first.unwrap_or_else(Instant::now) + wait;
            if first.is_some() && due <= Instant::now() {
                return notice();
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// The body of an answer, watched.
pub(super) struct Offered<B> {
    body: B,
    streams: Arc<Streams>,
    id: u64,
}

impl<B> Offered<B> {
    pub(super) fn new(body: B, streams: Arc<Streams>) -> Self {
        let id = {
            let mut state = streams.state();
            state.next += 1;
            state.next
        };
        Self { body, streams, id }
    }
}

impl<B: Body<Data = Bytes, Error = BoxError> + Unpin> Body for Offered<B> {
    type Data = Bytes;
    type Error = BoxError;

    /// Asked for a part: the client has taken the last. Given one: it is the client's turn.
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        let mut state = self.streams.state();
        match &frame {
            Poll::Ready(Some(Ok(_))) => drop(state.waiting.insert(self.id, Instant::now())),
            _ => drop(state.waiting.remove(&self.id)),
        }
        drop(state);
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B> Drop for Offered<B> {
    fn drop(&mut self) {
        self.streams.state().waiting.remove(&self.id);
    }
}
