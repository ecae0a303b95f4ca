//! A bounded pool of page-aligned buffers, a piece long each. They are reused: memory touched for the first time costs
//! more than the copy into it.

use crate::raw::{HUGE, Pages};
use bytes::Bytes;
use std::{
    fmt, io,
    ops::{Deref, DerefMut},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use tokio::sync::Notify;

/// Shortest buffer, bytes.
pub const LEN_MIN: usize = 1 << 20;
/// Longest buffer, bytes: the longest piece.
pub const LEN_MAX: usize = peer_proto::layout::PIECE_LEN_MAX as usize;
/// 1, 2, 4, 8 and 16 MiB.
const CLASSES: usize = (LEN_MAX / LEN_MIN).ilog2() as usize + 1;

/// Buffers for pieces under way; clones share one pool. The lock is held for a push or a pop: at a buffer a MiB that is some
/// thousand times a second, which a free list per shard would not improve.
#[derive(Clone)]
pub struct Pool(Arc<Shared>);

struct Shared {
    /// Bytes of buffers, lent and idle together.
    bytes_max: usize,
    lists: Mutex<Lists>,
    returned: Notify,
    refused: AtomicU64,
}

#[derive(Default)]
struct Lists {
    idle: [Vec<Pages>; CLASSES],
    /// Mapped.
    bytes: usize,
    lent: usize,
}

impl Pool {
    /// A pool that maps at most `bytes_max` bytes, and nothing yet.
    pub fn new(bytes_max: usize) -> Self {
        let lists = Mutex::default();
        Self(Arc::new(Shared { bytes_max, lists, returned: Notify::new(), refused: AtomicU64::new(0) }))
    }

    /// A buffer of `len` bytes, at most [`LEN_MAX`]; its content is whatever was in it before. None where all are lent.
    pub fn take(&self, len: usize) -> Option<Buf> {
        let buf = self.lend(len);
        if buf.is_none() {
            self.0.refused.fetch_add(1, Relaxed);
        }
        buf
    }

    /// As [`Self::take`], once there is one.
    pub async fn wait(&self, len: usize) -> Buf {
        loop {
            let returned = self.0.returned.notified();
            if let Some(buf) = self.lend(len) {
                return buf;
            }
            returned.await;
        }
    }

    /// Whether more than half of what it may hold is lent.
    pub fn is_scarce(&self) -> bool {
        self.lent() > self.0.bytes_max / 2
    }

    /// Bytes lent at the moment.
    pub fn lent(&self) -> usize {
        self.lists().lent
    }

    /// Times that [`Self::take`] had nothing to give.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Relaxed)
    }

    fn lists(&self) -> std::sync::MutexGuard<'_, Lists> {
        self.0.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lend(&self, len: usize) -> Option<Buf> {
        assert!(len <= LEN_MAX, "no piece has {len} bytes");
        let class = class_of(len);
        let mut lists = self.lists();
        let pages = match lists.idle[class].pop() {
            Some(pages) => pages,
            None => lists.map(class, self.0.bytes_max).ok()?,
        };
        lists.lent += class_len(class);
        drop(lists);
        Some(Buf { owned: Owned { pages: Some(pages), len, pool: Arc::clone(&self.0) } })
    }
}

impl Lists {
    fn map(&mut self, class: usize, bytes_max: usize) -> io::Result<Pages> {
        let len = class_len(class);
        // As many at once as fill a huge page.
        let count = (HUGE / len).max(1);
        // Make room by giving back idle buffers of other classes.
        while self.bytes + len * count > bytes_max && self.unmap() {}
        let count = if self.bytes + len * count <= bytes_max { count } else { 1 };
        if self.bytes + len * count > bytes_max {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut parts = Pages::map(len, count)?;
        self.bytes += len * count;
        let first = parts.pop().ok_or(io::ErrorKind::OutOfMemory)?;
        self.idle[class].append(&mut parts);
        Ok(first)
    }

    /// Gives back an idle buffer. False where there is none.
    fn unmap(&mut self) -> bool {
        let Some(class) = self.idle.iter().position(|list| !list.is_empty()) else { return false };
        self.idle[class].pop();
        self.bytes -= class_len(class);
        true
    }
}

fn class_of(len: usize) -> usize {
    (len.max(LEN_MIN).next_power_of_two() / LEN_MIN).ilog2() as usize
}

fn class_len(class: usize) -> usize {
    LEN_MIN << class
}

/// A buffer of the pool, to be filled. Goes back when dropped.
pub struct Buf {
    owned: Owned,
}

impl Buf {
    /// Makes it shorter: what was filled of it.
    pub fn truncate(&mut self, len: usize) {
        self.owned.len = self.owned.len.min(len);
    }

    /// Its bytes, to be shared and never changed again; the buffer goes back to the pool when the last share is dropped.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self.owned)
    }
}

impl Deref for Buf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.owned.as_ref()
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.owned.len;
        self.owned.pages.as_deref_mut().map_or(&mut [], |pages| &mut pages[..len])
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len())
    }
}

struct Owned {
    /// None only while being dropped.
    pages: Option<Pages>,
    len: usize,
    pool: Arc<Shared>,
}

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.pages.as_deref().map_or(&[], |pages| &pages[..self.len])
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let Some(pages) = self.pages.take() else { return };
        let mut lists = self.pool.lists.lock().unwrap_or_else(PoisonError::into_inner);
        lists.lent -= pages.len();
        lists.idle[class_of(pages.len())].push(pages);
        drop(lists);
        // Every waiter: they may want different lengths.
        self.pool.returned.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lends_up_to_its_bound_and_takes_back() {
        let pool = Pool::new(4 * LEN_MIN);
        let mut first = pool.take(10).unwrap();
        first.copy_from_slice(b"0123456789");
        assert_eq!(first.as_ptr().addr() % 4096, 0);
        let big = pool.take(2 * LEN_MIN + 1);
        assert!(big.is_none(), "4 MiB are not left");
        let second = pool.take(2 * LEN_MIN).unwrap();
        let third = pool.take(LEN_MIN).unwrap();
        assert!(pool.take(1).is_none());
        assert_eq!(pool.refused(), 2);
        let shared = first.freeze();
        let slice = shared.slice(3..5);
        drop(shared);
        assert!(pool.take(1).is_none(), "a share is alive");
        assert_eq!(slice, &b"34"[..]);
        drop(slice);
        assert!(pool.take(1).is_some());
        drop((second, third));
        assert_eq!(pool.lent(), 0);
        assert!(pool.take(LEN_MAX).is_none(), "longer than the whole pool");
        assert_eq!(pool.take(4 * LEN_MIN).unwrap().len(), 4 * LEN_MIN, "idle buffers of other classes make room");
    }

    #[tokio::test]
    async fn waiters_get_what_comes_back() {
        let pool = Pool::new(LEN_MIN);
        let held = pool.take(1).unwrap();
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.wait(5).await.len() }
        });
        tokio::task::yield_now().await;
        drop(held);
        assert_eq!(waiting.await.unwrap(), 5);
    }
}
