//! What a shard counts. Written by the shard alone, read by whoever asks for metrics.

use crate::handle::{Metric, MetricValue};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

/// A number that only grows, of one writer: an addition without a locked instruction.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[cfg(test)]
    pub(crate) fn value(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }
}

/// A number that goes up and down, of one writer.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicI64);

impl Gauge {
    pub(crate) fn set(&self, n: usize) {
        self.0.store(i64::try_from(n).unwrap_or(i64::MAX), Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn value(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

macro_rules! stats {
    ($($field:ident: $kind:ident, $name:literal, $label:expr, $help:literal;)*) => {
        /// See the module's text.
        #[derive(Debug, Default)]
        pub(crate) struct Stats {
            $(pub(crate) $field: $kind,)*
        }

        /// The sums over shards.
        pub(crate) fn metrics(shards: &[std::sync::Arc<Stats>]) -> Vec<Metric> {
            vec![$(Metric {
                name: $name,
                help: $help,
                label: $label,
                value: stats!(@sum $kind, shards, $field),
            },)*]
        }
    };
    (@sum Counter, $shards:ident, $field:ident) => {
        MetricValue::Counter($shards.iter().map(|stats| stats.$field.0.load(Relaxed)).sum())
    };
    (@sum Gauge, $shards:ident, $field:ident) => {
        MetricValue::Gauge($shards.iter().map(|stats| stats.$field.0.load(Relaxed)).sum())
    };
}

stats! {
    connections: Gauge, "peer_connections", None, "Peer connections that are up.";
    dials: Counter, "peer_dials_total", None, "Connections this node tried to open.";
    dial_failures: Counter, "peer_dial_failures_total", None, "Dials that came to nothing.";
    accepts: Counter, "peer_accepts_total", None, "Connections accepted.";
    refused_node: Counter, "peer_refused_total", Some(("limit", "node")), "Connections refused by a limit.";
    refused_address: Counter, "peer_refused_total", Some(("limit", "address")), "Connections refused by a limit.";
    refused_banned: Counter, "peer_refused_total", Some(("limit", "banned")), "Connections refused by a limit.";
    ends_peer: Counter, "peer_ends_total", Some(("fault", "peer")), "Connections ended, by whose fault.";
    ends_network: Counter, "peer_ends_total", Some(("fault", "network")), "Connections ended, by whose fault.";
    ends_nobody: Counter, "peer_ends_total", Some(("fault", "nobody")), "Connections ended, by whose fault.";
    bans: Counter, "peer_bans_total", None, "Peers banned for wrong pieces or broken frames.";
    bytes_in: Counter, "peer_received_bytes_total", None, "Bytes received from peers, frames included.";
    bytes_out: Counter, "peer_sent_bytes_total", None, "Bytes sent to peers, frames included.";
    pieces_in: Counter, "pieces_received_total", Some(("proof", "good")), "Pieces received.";
    pieces_wrong: Counter, "pieces_received_total", Some(("proof", "wrong")), "Pieces received.";
    pieces_unstored: Counter, "pieces_received_total", Some(("proof", "unstored")), "Pieces received.";
    pieces_hot: Counter, "pieces_served_total", Some(("from", "memory")), "Pieces served.";
    pieces_cold: Counter, "pieces_served_total", Some(("from", "disk")), "Pieces served.";
    rejects: Counter, "pieces_rejected_total", None, "Requests of peers that could not be answered.";
    starved: Counter, "receive_starved_total", None, "Times a piece waited for a buffer or a worker.";
    downloads: Gauge, "downloads_active", None, "Downloads under way.";
    downloads_done: Counter, "downloads_total", Some(("result", "done")), "Downloads ended.";
    downloads_failed: Counter, "downloads_total", Some(("result", "failed")), "Downloads ended.";
    suspect_layouts: Counter, "layouts_suspected_total", None, "Pieces that two independent peers failed.";
    recv_syscalls: Counter, "receives_total", None, "Receives completed.";
    send_syscalls: Counter, "sends_total", None, "Sends completed.";
}
