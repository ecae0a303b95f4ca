//! A request's body on loan: whoever reads it may drop it early; what is left is then read away, within bounds, so that a
//! client still sending gets to read its answer instead of a reset connection.

use crate::http::{Arriving, Body, BoxError};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{sync::oneshot, time::timeout};

/// Most bytes read away; a client with more left gets its connection closed.
const DRAIN_MAX: usize = 16 << 20;
/// Longest time for it.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The lender's end.
pub(super) struct Lent {
    back: oneshot::Receiver<Arriving>,
}

impl Lent {
    /// Lends a body. One that waits for our consent to be sent (`Expect`) is given back only once it was asked for.
    pub(super) fn new(body: Arriving, waits: bool) -> (Body, Self) {
        let (to, back) = oneshot::channel();
        let loan = Loan { body: Some(body), back: Some(to), begun: !waits };
        (loan.boxed(), Self { back })
    }

    /// Waits for the body to come back, and reads away what is left of it.
    pub(super) async fn drain(self) {
        let drained = timeout(DRAIN_TIMEOUT, async {
            let Ok(mut body) = self.back.await else { return };
            let mut left = DRAIN_MAX;
            while let Some(Ok(frame)) = body.frame().await {
                let len = frame.data_ref().map_or(0, Bytes::len);
                match left.checked_sub(len) {
                    Some(rest) => left = rest,
                    None => return,
                }
            }
        });
        if drained.await.is_err() {
            tracing::debug!("client went on sending slowly after a refusal");
        }
    }
}

struct Loan {
    body: Option<Arriving>,
    back: Option<oneshot::Sender<Arriving>>,
    begun: bool,
}

impl hyper::body::Body for Loan {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.begun = true;
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(hyper::body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, hyper::body::Body::size_hint)
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let (true, Some(body), Some(back)) = (self.begun, self.body.take(), self.back.take()) {
            // Nobody wants it back once the request was answered.
            let _ = back.send(body);
        }
    }
}
