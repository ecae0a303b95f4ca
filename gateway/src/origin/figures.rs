//! What an origin counts.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// The counters of an origin. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Figures {
    pub(super) uploads: Family<Outcome, Counter>,
    pub(super) upload_bytes: Counter,
    pub(super) refreshes: Family<Refreshed, Counter>,
    pub(super) refresh_bytes: Counter,
    pub(super) replications: Family<Outcome, Counter>,
    pub(super) replication_bytes: Counter,
    pub(super) twins: Family<Outcome, Counter>,
    pub(super) repairs: Counter,
    pub(super) write_backs: Family<Outcome, Counter>,
    pub(super) write_back_bytes: Counter,
    pub(super) lost: Counter,
}

/// How it ended: one of the constants below.
#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct Refreshed {
    pub(super) source: &'static str,
    pub(super) outcome: &'static str,
}

pub(super) const DONE: &str = "done";
/// It was there already.
pub(super) const KNOWN: &str = "known";
/// The bytes were not what they were said to be.
pub(super) const MISMATCH: &str = "mismatch";
pub(super) const FAILED: &str = "failed";

impl Figures {
    pub(super) fn count(family: &Family<Outcome, Counter>, outcome: &'static str) {
        family.get_or_create(&Outcome { outcome }).inc();
    }

    pub(super) fn refreshed(&self, source: &'static str, outcome: &'static str) {
        self.refreshes.get_or_create(&Refreshed { source, outcome }).inc();
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("origin");
        registry.register("uploads", "Uploads closed, by outcome", self.uploads.clone());
        registry.register("upload_bytes", "Bytes taken from uploading clients and origins", self.upload_bytes.clone());
        registry.register("refreshes", "Blobs fetched because they were not here", self.refreshes.clone());
        registry.register("refresh_bytes", "Bytes of those blobs", self.refresh_bytes.clone());
        registry.register("replications", "Blobs sent to other origins, by outcome", self.replications.clone());
        registry.register("replication_bytes", "Bytes sent to other origins", self.replication_bytes.clone());
        registry.register("twins", "Copies written while an upload arrived, by outcome", self.twins.clone());
        registry.register("repairs", "Missing replicas found and restored", self.repairs.clone());
        registry.register("write_backs", "Blobs taken to their backend, by outcome", self.write_backs.clone());
        registry.register("write_back_bytes", "Bytes written to backends", self.write_back_bytes.clone());
        registry.register("blobs_lost", "Acknowledged blobs found nowhere", self.lost.clone());
    }
}
