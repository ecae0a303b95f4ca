//! What the store has done since it was opened.

use crate::handle::Metric;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[derive(Default, Debug)]
pub(super) struct Counters {
    pub(super) commits: Counter,
    pub(super) upload_mismatches: Counter,
    pub(super) pieces_stored: Counter,
    pub(super) bytes_stored: Counter,
    pub(super) pieces_refused: Counter,
    pub(super) bytes_read: Counter,
    pub(super) evictions: Counter,
    pub(super) bytes_evicted: Counter,
    pub(super) quarantines: Counter,
    pub(super) no_space: Counter,
    pub(super) disk_errors: Counter,
}

/// A number that only grows.
#[derive(Default, Debug)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }
}

impl Counters {
    pub(super) fn metrics(&self) -> Vec<Metric> {
        let all = [
            ("store_commits_total", "Blobs made durable under their name.", &self.commits),
            ("store_upload_mismatches_total", "Uploads that had another digest than said.", &self.upload_mismatches),
            ("store_pieces_total", "Received pieces proven and written.", &self.pieces_stored),
            ("store_piece_bytes_total", "Bytes of received pieces proven and written.", &self.bytes_stored),
            ("store_pieces_refused_total", "Received pieces that failed their proof.", &self.pieces_refused),
            ("store_read_bytes_total", "Bytes read from disk into buffers.", &self.bytes_read),
            ("store_evictions_total", "Blobs deleted.", &self.evictions),
            ("store_evicted_bytes_total", "Bytes of deleted blobs.", &self.bytes_evicted),
            ("store_quarantines_total", "Blobs in which damage was found.", &self.quarantines),
            ("store_no_space_total", "Requests refused for want of space.", &self.no_space),
            ("store_disk_errors_total", "Reads, writes and syncs that the disk failed.", &self.disk_errors),
        ];
        all.into_iter().map(|(name, help, counter)| Metric::counter(name, help, counter.0.load(Relaxed))).collect()
    }
}
