//! What the gateway is told of blobs: the last word on each, until somebody reads it.

use crate::handle::Notice;
use peer_proto::Digest;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Notify;

/// Notices not yet read, one for each blob. Written when a blob's standing changes, not for each piece.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    waiting: Mutex<Waiting>,
    come: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    notices: BTreeMap<Digest, Notice>,
    order: VecDeque<Digest>,
    closed: bool,
}

impl Notices {
    /// Replaces what is still unread about the blob.
    pub(crate) fn put(&self, notice: Notice) {
        let mut waiting = self.waiting();
        let digest = notice.digest;
        if waiting.notices.insert(digest, notice).is_none() {
            waiting.order.push_back(digest);
        }
        drop(waiting);
        self.come.notify_one();
    }

    /// No more will come.
    pub(crate) fn close(&self) {
        self.waiting().closed = true;
        self.come.notify_one();
    }

    /// The next one, the longest waiting blob first; none after the end.
    pub(crate) async fn next(&self) -> Option<Notice> {
        loop {
            let come = self.come.notified();
            {
                let mut waiting = self.waiting();
                if let Some(digest) = waiting.order.pop_front() {
                    return waiting.notices.remove(&digest);
                }
                if waiting.closed {
                    // For the next who asks.
                    self.come.notify_one();
                    return None;
                }
            }
            come.await;
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::Active;

    fn notice(blob: u8, have: u32) -> Notice {
        let digest = Digest::sha256([blob; 32]);
        let namespace = "lib/app".parse().unwrap();
        Notice { digest, namespace, have, pieces: 9, state: Active::Leeching { want: 3 } }
    }

    #[tokio::test]
    async fn the_last_word_on_each_blob_in_the_order_of_the_first() {
        let notices = Notices::default();
        [notice(1, 0), notice(2, 0), notice(1, 5)].into_iter().for_each(|n| notices.put(n));
        notices.close();
        assert_eq!(notices.next().await, Some(notice(1, 5)));
        assert_eq!(notices.next().await, Some(notice(2, 0)));
        assert_eq!(notices.next().await, None);
        assert_eq!(notices.next().await, None);
    }
}
