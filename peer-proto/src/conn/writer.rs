//! What waits to be written, and the one write that is under way.

use super::{CONTROL_QUEUE_MAX, Closed, Pace, Slow};
use crate::{
    time::Instant,
    wire::{HEADER_LEN, Header},
};
use alloc::vec::Vec;
use core::mem;

/// A buffer that grew beyond this is not kept, bytes.
const SPARE_MAX: usize = 64 << 10;

pub(super) struct Writer {
    queue: Vec<u8>,
    /// The other buffer, between two writes.
    spare: Vec<u8>,
    under_way: Option<Pace>,
    /// When something was last written.
    last: Instant,
}

impl Writer {
    pub(super) fn new(now: Instant) -> Self {
        Self { queue: Vec::new(), spare: Vec::new(), under_way: None, last: now }
    }

    /// Queues a frame without a body.
    pub(super) fn push(&mut self, header: &Header) -> Result<(), Closed> {
        self.room(0)?;
        self.queue.extend(header.encode());
        Ok(())
    }

    /// Queues frames that `write` appends, in all at most `body` bytes and a header.
    pub(super) fn push_with(&mut self, body: usize, write: impl FnOnce(&mut Vec<u8>)) -> Result<(), Closed> {
        self.room(body)?;
        write(&mut self.queue);
        Ok(())
    }

    fn room(&self, body: usize) -> Result<(), Closed> {
        if self.has_room(body) { Ok(()) } else { Err(Closed::Unread("queue of control frames")) }
    }

    /// Whether a frame with this body fits the queue.
    pub(super) fn has_room(&self, body: usize) -> bool {
        self.queue.len() + HEADER_LEN + body <= CONTROL_QUEUE_MAX
    }

    /// The queue, to put last words into when a write is about to start; not bounded.
    pub(super) fn idle_queue(&mut self) -> Option<&mut Vec<u8>> {
        self.under_way.is_none().then_some(&mut self.queue)
    }

    /// Starts a write of all that is queued.
    pub(super) fn start(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.under_way.is_some() || self.queue.is_empty() {
            return None;
        }
        self.under_way = Some(Pace::new(now));
        self.last = now;
        Some(mem::replace(&mut self.queue, mem::take(&mut self.spare)))
    }

    pub(super) fn progress(&mut self, now: Instant, bytes: u64) {
        if let Some(pace) = &mut self.under_way {
            pace.progress(now, bytes);
        }
    }

    pub(super) fn sent(&mut self, now: Instant, mut head: Vec<u8>) {
        self.under_way = None;
        self.last = now;
        if head.capacity() <= SPARE_MAX {
            head.clear();
            self.spare = head;
        }
    }

    /// Forgets what is queued.
    pub(super) fn clear(&mut self) {
        self.queue.clear();
    }

    pub(super) fn is_idle(&self) -> bool {
        self.under_way.is_none() && self.queue.is_empty()
    }

    /// When to look again: at a write's pace, or when the silence has been long enough for a PING.
    pub(super) fn deadline(&self, ping_after: core::time::Duration) -> Instant {
        self.under_way.as_ref().map_or(self.last + ping_after, Pace::deadline)
    }

    /// Time has passed: a write that does not move is the end; silence asks for a PING.
    pub(super) fn tick(&mut self, now: Instant, ping_after: core::time::Duration) -> Result<(), Closed> {
        match &self.under_way {
            Some(pace) if pace.deadline() <= now => Err(Closed::Slow(Slow::Writing)),
            None if self.last + ping_after <= now => self.push(&Header::Ping),
            _ => Ok(()),
        }
    }
}
