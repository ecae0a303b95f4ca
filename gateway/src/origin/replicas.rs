//! Copies on the other owners: at commit, through the retry queue where one was missed, and by repair when the cluster's health
//! changes.
//!
//! A copy is pushed: the sender streams the blob into an upload at the receiver, which hashes it all and takes it only as the
//! digest it is said to be. The ring says who should have it; one that cannot be reached or refuses is stood in for by the next in
//! order until it can.

use super::{
    Shared,
    figures::{self, Figures},
    holds::{self, Hold, KEEP, REPLICATE, WRITE_BACK},
    refusal,
    write_back::HELD,
};
use crate::{
    client::{
        cluster::Member,
        origin::{Error, Origin},
    },
    http, retry,
};
use bytes::Bytes;
use engine::handle::{Entry, Stat};
use futures_util::future::join_all;
use peer_proto::{Digest, Namespace};
use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// Receivers beyond the replicas that are tried for one commit when others fail.
const STAND_INS_MAX: usize = 2;
/// Blobs of one step of a repair.
const REPAIR_PAGE: usize = 500;
/// Blobs that a repair looks at in a second.
const REPAIR_BLOBS_PER_S: u32 = 500;
/// Longest wait for an origin to say whether it holds a blob.
pub(super) const HOLDS_TIMEOUT: Duration = Duration::from_secs(3);

impl Shared {
    /// Makes sure that a blob which is here stays: its owners that can be reached have it, and what is missing, the backend
    /// included, is in the retry queue. Only then may the blob be acknowledged.
    pub(super) async fn secure(&self, namespace: &Namespace, digest: &Digest) -> Result<(), http::Error> {
        let write_back = self.write_back_hold(namespace, HELD, Duration::ZERO);
        let (held, holders) = tokio::join!(self.hold(digest, &write_back), self.spread(namespace, digest));
        held?;
        let missing = self.cluster.order(digest).into_iter().take(self.cluster.replicas());
        let missing: Vec<_> = missing.filter(|owner| !holders.contains(owner)).collect();
        let addrs: Vec<_> = missing.iter().map(|owner| self.cluster.origin(*owner).addr().as_str()).collect();
        let payload = Bytes::copy_from_slice(namespace.as_str().as_bytes());
        let holds: Vec<_> = addrs
            .iter()
            .map(|addr| Hold { kind: REPLICATE, rest: addr, payload: payload.clone(), delay: Duration::ZERO })
            .collect();
        if holds.is_empty() {
            // With nothing to wait for, a pin would stay for good: the write-back may be done by now.
            return Ok(());
        }
        self.hold(digest, &holds).await
    }

    /// What keeps a blob here until its namespace's backend has it; nothing where no namespace has any backend, since then
    /// nothing is ever unpinned.
    pub(super) fn write_back_hold<'a>(
        &self,
        namespace: &'a Namespace,
        payload: &'static [u8],
        delay: Duration,
    ) -> Vec<Hold<'a>> {
        if self.backends.routes().is_empty() {
            return Vec::new();
        }
        let kind = if self.backends.find(namespace.as_str()).is_some() { WRITE_BACK } else { KEEP };
        vec![Hold { kind, rest: namespace.as_str(), payload: Bytes::from_static(payload), delay }]
    }

    pub(super) async fn hold(&self, digest: &Digest, holds: &[Hold<'_>]) -> Result<(), http::Error> {
        self.holds.take(digest, holds).await.map_err(|error| {
            tracing::error!(?digest, %error, "hold a blob");
            match error {
                holds::Error::Engine(error) => refusal(error),
                holds::Error::Queue(error) => http::Error::unavailable(error.to_string()),
            }
        })
    }

    /// Pushes a blob to its owners, all at once, and to the next in order where one fails. Who holds it then, ourselves included.
    async fn spread(&self, namespace: &Namespace, digest: &Digest) -> BTreeSet<Member> {
        let me = self.me;
        let mut holders = BTreeSet::from([me]);
        let mut failed = BTreeSet::new();
        let pushes_max = self.cluster.replicas() + STAND_INS_MAX;
        loop {
            let order = self.cluster.order(digest).into_iter();
            let able = order.filter(|member| self.cluster.is_up(*member) && !failed.contains(member));
            let owners: Vec<_> = able.take(self.cluster.replicas()).collect();
            let room = pushes_max.saturating_sub(holders.len() + failed.len());
            let lacking = owners.iter().enumerate().filter(|(_, owner)| !holders.contains(owner)).take(room);
            let pushes = lacking.map(|(rank, owner)| async move {
                // A backup for the case that we never come back: each one later, and the first that wakes does it for all.
                let delay = self.replica_delay(rank);
                (*owner, self.push(digest, *owner, Some((namespace.clone(), delay))).await)
            });
            let pushed = join_all(pushes).await;
            if pushed.is_empty() {
                return holders;
            }
            for (owner, outcome) in pushed {
                match outcome {
                    Ok(()) => {
                        holders.insert(owner);
                    }
                    Err(error) => {
                        tracing::warn!(?digest, to = %self.cluster.origin(owner).addr(), %error, "replicate");
                        failed.insert(owner);
                    }
                }
            }
        }
    }

    /// How long the owner of a rank waits before it writes a blob back by itself.
    pub(super) fn replica_delay(&self, rank: usize) -> Duration {
        let turn = u32::try_from(rank + 1).unwrap_or(u32::MAX);
        self.config.write_back.replica_delay.get().saturating_mul(turn).min(retry::DELAY_MAX)
    }

    /// Sends a blob to another origin, unless that has it. Pushes of one blob to one origin are one.
    pub(super) async fn push(
        &self,
        digest: &Digest,
        to: Member,
        write_back: Option<(Namespace, Duration)>,
    ) -> Result<(), Error> {
        let push = Push {
            engine: self.engine.clone(),
            origin: self.cluster.origin(to).clone(),
            figures: self.figures.clone(),
            digest: *digest,
            write_back,
        };
        let (transfers, cluster) = (self.transfers.clone(), self.cluster.clone());
        let flight = self.pushes.join((*digest, to), || async move {
            let _place = transfers.acquire_owned().await;
            let outcome = push.run().await;
            match &outcome {
                Err(Error::Unreachable(_)) => cluster.failed(to),
                Err(Error::Body) => {}
                _ => cluster.passed(to),
            }
            outcome
        });
        flight.await.unwrap_or_else(|| Err(Error::Unreachable("replication ended early".into())))
    }

    /// A task of the retry queue: an owner lacks a blob.
    pub(super) async fn replicate(&self, task: retry::Task) -> Result<(), retry::Failure> {
        let Some((digest, addr)) = holds::parse_key(&task.key) else {
            return Err(retry::Failure::never("key is not a digest and an origin"));
        };
        let namespace = std::str::from_utf8(&task.payload).ok().and_then(|text| text.parse::<Namespace>().ok());
        let namespace = namespace.ok_or_else(|| retry::Failure::never("payload is not a namespace"))?;
        let owners: Vec<_> = self.cluster.order(&digest).into_iter().take(self.cluster.replicas()).collect();
        // Whoever has left the cluster, or owns it no more, need not have it.
        if let Some(owner) = self.cluster.find(addr).filter(|member| owners.contains(member)) {
            self.holds.renew(&digest).await.map_err(retry::Failure::later)?;
            match self.engine.stat(&digest).await {
                Ok(Stat::Whole { .. }) => {
                    let delay = self.config.write_back.replica_delay.get().min(retry::DELAY_MAX);
                    self.push(&digest, owner, Some((namespace, delay))).await.map_err(retry::Failure::later)?;
                }
                // Dropped by an operator, or damaged: repair is for whoever still holds it.
                Ok(_) => tracing::warn!(?digest, to = addr, "blob to replicate is not here any more"),
                Err(error) => return Err(retry::Failure::later(error)),
            }
        }
        self.holds.release(&digest, REPLICATE, addr).await.map_err(retry::Failure::later)
    }

    /// Restores missing replicas until `stop` is true: at the start, after each change of health once it has settled, and from
    /// time to time.
    pub(super) async fn repair(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut changes = self.cluster.changes();
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.config.replication.settle.get()) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            // What changes from here on is for the next round.
            changes.mark_unchanged();
            tokio::select! {
                scanned = self.repair_all() => if let Err(error) = scanned {
                    tracing::warn!(%error, "repair");
                },
                _ = stop.wait_for(|stop| *stop) => return,
            }
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep(self.config.replication.repair_interval.get()) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    async fn repair_all(&self) -> Result<(), engine::handle::Error> {
        if self.cluster.members().len() == 1 {
            return Ok(());
        }
        let mut after = None;
        loop {
            let page = self.engine.list(after, REPAIR_PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = Some(last.digest);
            let began = Instant::now();
            for entry in &page {
                self.repair_one(entry).await;
            }
            let pace = Duration::from_secs(1) / REPAIR_BLOBS_PER_S * u32::try_from(page.len()).unwrap_or(u32::MAX);
            tokio::time::sleep(pace.saturating_sub(began.elapsed())).await;
        }
    }

    async fn repair_one(&self, entry: &Entry) {
        let digest = &entry.digest;
        for owner in self.cluster.owners(digest) {
            if owner == self.me || !matches!(self.holds_it(owner, digest).await, Some(false)) {
                continue;
            }
            // Of those that hold it, the first in order restores it.
            let mut before = self.cluster.order(digest);
            before.truncate(before.iter().position(|member| *member == self.me).unwrap_or(before.len()));
            let others = before.into_iter().filter(|member| *member != owner && self.cluster.is_up(*member));
            let others = others.map(|member| self.holds_it(member, digest));
            if join_all(others).await.contains(&Some(true)) {
                continue;
            }
            let began = Instant::now();
            match self.push(digest, owner, None).await {
                Ok(()) => {
                    self.figures.repairs.inc();
                    tracing::info!(?digest, to = %self.cluster.origin(owner).addr(), "missing replica restored");
                    if let Some(rate) = self.config.replication.repair_rate {
                        let least = entry.length as f64 / rate.bytes_per_s().max(1) as f64;
                        let least = Duration::try_from_secs_f64(least).unwrap_or(Duration::MAX);
                        tokio::time::sleep(least.saturating_sub(began.elapsed())).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(?digest, to = %self.cluster.origin(owner).addr(), %error, "restore a replica");
                }
            }
        }
    }

    /// Whether a member holds a blob, where it says so.
    pub(super) async fn holds_it(&self, member: Member, digest: &Digest) -> Option<bool> {
        match self.cluster.origin(member).holds(digest, HOLDS_TIMEOUT).await {
            Ok(holds) => Some(holds),
            Err(error) => {
                if matches!(error, Error::Unreachable(_)) {
                    self.cluster.failed(member);
                }
                tracing::debug!(?digest, %error, "ask whether an origin holds a blob");
                None
            }
        }
    }
}

/// One blob on its way to one origin.
struct Push {
    engine: engine::Handle,
    origin: Origin,
    figures: Figures,
    digest: Digest,
    write_back: Option<(Namespace, Duration)>,
}

impl Push {
    async fn run(self) -> Result<(), Error> {
        let Self { figures, .. } = &self;
        match self.send().await {
            Ok(Some(length)) => {
                Figures::count(&figures.replications, figures::DONE);
                figures.replication_bytes.inc_by(length);
                Ok(())
            }
            Ok(None) => {
                Figures::count(&figures.replications, figures::KNOWN);
                Ok(())
            }
            Err(error) => {
                Figures::count(&figures.replications, figures::FAILED);
                Err(error)
            }
        }
    }

    /// The bytes sent; none where the other had them.
    async fn send(&self) -> Result<Option<u64>, Error> {
        let digest = &self.digest;
        let own = |error: engine::handle::Error| {
            tracing::warn!(?digest, %error, "read a blob to replicate");
            Error::Body
        };
        let Stat::Whole { layout } = self.engine.stat(digest).await.map_err(own)? else { return Err(Error::NotFound) };
        let length = layout.length();
        let Some(id) = self.origin.offer(digest, length).await? else { return Ok(None) };
        let reader = self.engine.read(digest, 0..length).await.map_err(own)?;
        self.origin.transfer(digest, &id, length, http::stream(super::blobs::bytes_of(reader))).await?;
        let write_back = self.write_back.as_ref().map(|(namespace, delay)| (namespace, *delay));
        self.origin.settle(digest, &id, write_back).await?;
        Ok(Some(length))
    }
}
