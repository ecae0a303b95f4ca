//! The origins as a ring: who owns a blob, who answers.

use super::{
    health::{Effect, Event, Health, Mode, Rules},
    origin::Origin,
};
use crate::{config::HostPort, http::Client};
use peer_proto::{
    Digest, Instant,
    ring::{Ring, RingError},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

/// Longest wait for a probe's answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Rules of a role that probes: two failures take an origin down, one answer brings it back.
pub const PROBING: Rules = Rules {
    mode: Mode::Active,
    fails: 2,
    interval: Duration::from_secs(5),
    pause: Duration::from_millis(250),
    pause_max: Duration::from_secs(2),
};

/// Rules of one that only calls: an origin that does not answer is left alone for a while.
pub const CALLING: Rules = Rules { mode: Mode::Passive, fails: 1, pause_max: Duration::from_secs(5), ..PROBING };

/// Why there is no cluster.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// Nobody in it.
    #[error("no origins are given")]
    Empty,
    /// A list that makes no ring.
    #[error("origins: {0}")]
    Ring(#[from] RingError),
    /// We are said to be one of them and are not.
    #[error("origin {0} is not one of the origins")]
    Stranger(HostPort),
}

/// A number of a member: its place in the list of origins.
pub type Member = usize;

/// The origins of one cluster, their ring and their health.
pub struct Cluster {
    members: Vec<Origin>,
    me: Option<Member>,
    replicas: usize,
    /// Where our [`Instant`]s count from.
    epoch: std::time::Instant,
    state: Mutex<State>,
    /// Counts changes of health.
    changes: watch::Sender<u64>,
    /// The deadline may be earlier than the prober believes.
    wake: Notify,
}

struct State {
    ring: Ring,
    health: Health,
    probes: Vec<Member>,
}

impl Cluster {
    /// The cluster of `origins`; each blob belongs to `replicas` of them, or all where there are fewer.
    pub fn new(
        origins: &[HostPort],
        me: Option<&HostPort>,
        replicas: usize,
        rules: Rules,
        http: &Client,
    ) -> Result<Self, Error> {
        if origins.is_empty() {
            return Err(Error::Empty);
        }
        let me = match me {
            None => None,
            Some(me) => Some(origins.iter().position(|o| o == me).ok_or_else(|| Error::Stranger(me.clone()))?),
        };
        let ring = Ring::new(origins.iter().map(HostPort::as_str))?;
        let members: Vec<_> = origins.iter().map(|addr| Origin::new(addr.clone(), http.clone())).collect();
        Ok(Self {
            me,
            replicas: replicas.clamp(1, members.len()),
            epoch: std::time::Instant::now(),
            state: Mutex::new(State { ring, health: Health::new(rules, members.len(), me), probes: Vec::new() }),
            members,
            changes: watch::Sender::new(0),
            wake: Notify::new(),
        })
    }

    /// Ourselves, where we are an origin.
    pub fn me(&self) -> Option<Member> {
        self.me
    }

    /// Origins that keep each blob.
    pub fn replicas(&self) -> usize {
        self.replicas
    }

    /// Every origin.
    pub fn members(&self) -> &[Origin] {
        &self.members
    }

    /// The client of one.
    pub fn origin(&self, member: Member) -> &Origin {
        &self.members[member]
    }

    /// A member by its address.
    pub fn find(&self, addr: &str) -> Option<Member> {
        self.members.iter().position(|origin| origin.addr().as_str() == addr)
    }

    /// Whether a member answers.
    pub fn is_up(&self, member: Member) -> bool {
        self.now_state().health.is_up(member)
    }

    /// Every origin in the ring's order for a blob, whatever their health.
    pub fn order(&self, digest: &Digest) -> Vec<Member> {
        self.numbers(self.state().ring.order(digest))
    }

    /// The owners of a blob: the first origins in its order that are up; where none is, the first of all.
    pub fn owners(&self, digest: &Digest) -> Vec<Member> {
        self.numbers(self.now_state().ring.owners(digest, self.replicas))
    }

    /// Whom to ask about a blob: those that are up first, both halves in the ring's order.
    pub fn candidates(&self, digest: &Digest) -> Vec<Member> {
        let state = self.now_state();
        let mut order = self.numbers(state.ring.order(digest));
        order.sort_by_key(|member| !state.health.is_up(*member));
        order
    }

    fn numbers(&self, labels: Vec<&str>) -> Vec<Member> {
        labels.into_iter().filter_map(|label| self.find(label)).collect()
    }

    /// Whom to ask about nothing in particular, beginning anywhere; those that are up first.
    pub fn anybody(&self, start: usize) -> Vec<Member> {
        let state = self.now_state();
        let count = self.members.len();
        let mut order: Vec<_> = (0..count).map(|i| (start % count + i) % count).collect();
        order.sort_by_key(|member| !state.health.is_up(*member));
        order
    }

    /// A member answered.
    pub fn passed(&self, member: Member) {
        self.report(Event::Passed(member));
    }

    /// A member did not.
    pub fn failed(&self, member: Member) {
        self.report(Event::Failed(member));
    }

    /// Wakes at each change of health.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Probes the members until `stop` is true. Without it health is known from calls alone.
    pub async fn watch(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut probes = JoinSet::new();
        loop {
            let (due, deadline) = {
                let mut state = self.state();
                self.apply(&mut state, Event::Tick);
                (std::mem::take(&mut state.probes), state.health.deadline())
            };
            for member in due {
                let cluster = self.clone();
                probes.spawn(async move {
                    match cluster.origin(member).health(PROBE_TIMEOUT).await {
                        Ok(()) => cluster.passed(member),
                        Err(error) => {
                            tracing::debug!(%error, "probe failed");
                            cluster.failed(member);
                        }
                    }
                });
            }
            let until_due = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep(deadline.since(self.now())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = until_due => {}
                () = self.wake.notified() => {}
                Some(_) = probes.join_next() => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    fn report(&self, event: Event) {
        let mut state = self.state();
        self.apply(&mut state, event);
        drop(state);
        self.wake.notify_one();
    }

    /// Takes an event and carries out what follows, but for the probes.
    fn apply(&self, state: &mut State, event: Event) {
        state.health.handle(self.now(), event);
        while let Some(effect) = state.health.poll() {
            match effect {
                Effect::Probe(member) => state.probes.push(member),
                Effect::Up(member) => {
                    let addr = self.members[member].addr();
                    tracing::info!(origin = %addr, "origin is up");
                    state.ring.set_up(addr.as_str(), true);
                    self.changes.send_modify(|count| *count += 1);
                }
                Effect::Down(member) => {
                    let addr = self.members[member].addr();
                    tracing::warn!(origin = %addr, "origin is down");
                    state.ring.set_up(addr.as_str(), false);
                    self.changes.send_modify(|count| *count += 1);
                }
            }
        }
    }

    /// The state, with what time alone changes brought up to date.
    fn now_state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state();
        if state.health.deadline().is_some_and(|deadline| deadline <= self.now()) {
            self.apply(&mut state, Event::Tick);
            if !state.probes.is_empty() {
                self.wake.notify_one();
            }
        }
        state
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Instant {
        Instant::from_nanos(u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}
