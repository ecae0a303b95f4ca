//! Carries out what the announce schedule decides: notices of the engine in, requests to trackers out, peers back to the engine.

use crate::client::{Tracker, tracker};
use engine::handle::{Active, Handle, Notice, Peer};
use peer_proto::{
    Instant, PeerId,
    announce::{Announcer, Blob, Effect, Event, Node, Request, Response, State, TrackerId},
    swarm,
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use std::{pin::pin, time};
use tokio::{sync::watch, task::JoinSet};

/// The figures of the loop.
#[derive(Clone, Default)]
pub struct Figures {
    announces: Family<ResultLabel, Counter>,
    peers: Counter,
    active: Gauge,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

impl Figures {
    /// Adds them to a role's.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("announces", "Requests to trackers", self.announces.clone());
        registry.register("announce_peers", "Peers that trackers named", self.peers.clone());
        registry.register("announce_blobs", "Blobs being announced", self.active.clone());
    }
}

/// Announces until `stop` is true or the engine has closed; then takes leave of the trackers.
pub async fn run(engine: Handle, trackers: Tracker, node: Node, figures: Figures, mut stop: watch::Receiver<bool>) {
    let epoch = time::Instant::now();
    let now = || Instant::from_nanos(u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX));
    let (seed, _) = uuid::Uuid::new_v4().as_u64_pair();
    let mut core = Announcer::new(node.clone(), trackers.ring().clone(), seed);
    let mut requests = JoinSet::new();
    let mut notice = pin!(next_notice(engine.clone()));
    loop {
        while let Some(effect) = core.poll() {
            match effect {
                Effect::Send { tracker, request } => {
                    let Some(label) = core.label(tracker).map(str::to_owned) else { continue };
                    requests.spawn(ask(trackers.clone(), tracker, label, request));
                }
                Effect::Candidates { digest, peers } => {
                    figures.peers.inc_by(peers.len() as u64);
                    let peers =
                        peers.into_iter().map(|peer| Peer { id: peer.id, addr: peer.addr, origin: peer.origin });
                    engine.peers(&digest, peers.collect());
                }
            }
        }
        figures.active.set(i64::try_from(core.active()).unwrap_or(i64::MAX));
        let due = async {
            match core.deadline() {
                Some(deadline) => tokio::time::sleep(deadline.since(now())).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            next = notice.as_mut() => match next {
                Some(next) => {
                    core.handle(now(), Event::Blob(blob(&next)));
                    notice.set(next_notice(engine.clone()));
                }
                None => break,
            },
            Some(answered) = requests.join_next() => match answered {
                Ok((tracker, Ok(response))) => {
                    figures.announces.get_or_create(&ResultLabel { result: "ok" }).inc();
                    core.handle(now(), Event::Answered { tracker, response: &response });
                }
                Ok((tracker, Err(error))) => {
                    figures.announces.get_or_create(&ResultLabel { result: "failed" }).inc();
                    tracing::debug!(%error, "announce failed");
                    core.handle(now(), Event::Failed { tracker });
                }
                Err(error) => tracing::error!(%error, "announce died"),
            },
            () = due => core.handle(now(), Event::Tick),
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    requests.shutdown().await;
    if core.active() > 0 {
        let labels: Vec<String> = core.trackers().map(str::to_owned).collect();
        for (place, label) in labels.into_iter().enumerate() {
            let leave = Request { node: node.clone(), full: true, blobs: Vec::new() };
            let tracker = TrackerId(u16::try_from(place).unwrap_or(u16::MAX));
            requests.spawn(ask(trackers.clone(), tracker, label, leave));
        }
        let left = tokio::time::timeout(LEAVE_TIMEOUT, async { while requests.join_next().await.is_some() {} }).await;
        if left.is_err() {
            tracing::debug!("no tracker took leave in time");
        }
    }
}

/// Longest wait for the trackers to hear that the node goes.
const LEAVE_TIMEOUT: time::Duration = time::Duration::from_secs(1);

async fn next_notice(engine: Handle) -> Option<Notice> {
    engine.notice().await
}

async fn ask(
    trackers: Tracker,
    tracker: TrackerId,
    label: String,
    request: Request,
) -> (TrackerId, Result<Response, tracker::Error>) {
    (tracker, trackers.announce(&label, &request).await)
}

/// Peers that a download aims at. The engine tells how many are missing.
const DEGREE: u16 = swarm::Config::new(PeerId::new([0; 20]), 0).degree;

fn blob(notice: &Notice) -> Blob {
    let state = match notice.state {
        Active::Leeching { want } => {
            let peers = DEGREE.saturating_sub(want);
            State::Leeching { have: notice.have, pieces: notice.pieces, peers, want }
        }
        Active::Seeding => State::Seeding { peers: 0 },
        Active::Gone => State::Gone,
    };
    Blob { digest: notice.digest, state }
}
