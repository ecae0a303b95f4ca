//! What the host is to hold before anybody pulls it: asks the trackers for preheats, downloads them in the background, and says
//! what it found in its store. Nothing of this is kept on disk: after a restart the trackers tell again, and what was downloaded
//! is there.

use super::downloads::{self, Downloads};
use crate::{
    client,
    preheat::{Id, Label, Poll, Report, State, TASKS_MAX, Task, Wanted, reason},
};
use engine::handle::{Class, Stat};
use futures_util::{StreamExt, stream};
use peer_proto::{Digest, Namespace};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinSet},
};

/// Blobs that are downloaded at a time for all preheats together.
const BLOBS_AT_ONCE: usize = 4;
/// Tries for a blob.
const TRIES: u32 = 4;
/// The pause before the second try; doubles.
const PAUSE: Duration = Duration::from_secs(1);
/// When the trackers are asked again where none has answered.
const INTERVAL: Duration = Duration::from_secs(10);
/// Bounds of what a tracker may ask for instead.
const INTERVAL_MIN: Duration = Duration::from_millis(50);
/// See [`INTERVAL_MIN`].
const INTERVAL_MAX: Duration = Duration::from_secs(300);

/// The preheats of one host.
pub struct Preheat {
    downloads: Downloads,
    trackers: client::Tracker,
    host: SocketAddr,
    labels: Vec<Label>,
    figures: Figures,
}

/// The figures of the loop.
#[derive(Clone, Default)]
struct Figures {
    ended: Family<ResultLabel, Counter>,
    polls: Family<ResultLabel, Counter>,
    known: Gauge,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

/// A task of this host.
struct Doing {
    task: Arc<Task>,
    until: Instant,
    job: AbortHandle,
    /// How its downloads ended, once they have.
    ended: Option<Result<(), String>>,
}

type Ended = (Id, Result<(), String>);

impl Preheat {
    /// Preheats of the host that peers reach at `host`, by these downloads.
    pub fn new(downloads: Downloads, trackers: client::Tracker, host: SocketAddr, labels: Vec<Label>) -> Self {
        Self { downloads, trackers, host, labels, figures: Figures::default() }
    }

    /// Adds its figures to a role's.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("agent_preheats", "Preheats whose downloads ended, by how", self.figures.ended.clone());
        registry.register("agent_preheat_polls", "Questions to trackers for preheats", self.figures.polls.clone());
        registry.register("agent_preheats_known", "Preheats that stand", self.figures.known.clone());
    }

    /// Does what trackers ask for until `stop` is true.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let room = Arc::new(Semaphore::new(BLOBS_AT_ONCE));
        let mut doing: BTreeMap<Id, Doing> = BTreeMap::new();
        let mut jobs: JoinSet<Ended> = JoinSet::new();
        loop {
            let interval = tokio::select! {
                interval = self.round(&mut doing, &mut jobs, &room) => interval,
                _ = stop.wait_for(|stop| *stop) => return,
            };
            tokio::select! {
                () = tokio::time::sleep(spread(interval)) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// Says how far everything is, and begins what is new; when to do so again.
    async fn round(
        &self,
        doing: &mut BTreeMap<Id, Doing>,
        jobs: &mut JoinSet<Ended>,
        room: &Arc<Semaphore>,
    ) -> Duration {
        while let Some(joined) = jobs.try_join_next() {
            // One that was aborted belongs to a task that is over.
            let Ok((id, ended)) = joined else { continue };
            let result = if ended.is_ok() { "done" } else { "failed" };
            self.figures.ended.get_or_create(&ResultLabel { result }).inc();
            if let Some(one) = doing.get_mut(&id) {
                match &ended {
                    Ok(()) => tracing::info!(%id, image = one.task.image, "preheat is here"),
                    Err(why) => tracing::warn!(%id, image = one.task.image, why, "preheat failed"),
                }
                one.ended = Some(ended);
            }
        }
        doing.retain(|_, one| {
            let stands = Instant::now() < one.until;
            if !stands {
                one.job.abort();
            }
            stands
        });
        let mut reports = Vec::new();
        for one in doing.values() {
            reports.push(self.report(one).await);
        }
        self.figures.known.set(i64::try_from(doing.len()).unwrap_or(i64::MAX));

        let poll = Poll { host: self.host, labels: self.labels.clone(), reports };
        let trackers = self.trackers.preheaters();
        let asked = trackers.into_iter().map(|tracker| self.trackers.poll(tracker, &poll));
        let mut next: Option<Duration> = None;
        for answer in futures_util::future::join_all(asked).await {
            let result = if answer.is_ok() { "ok" } else { "failed" };
            self.figures.polls.get_or_create(&ResultLabel { result }).inc();
            let orders = match answer {
                Ok(orders) => orders,
                Err(error) => {
                    tracing::debug!(%error, "ask for preheats");
                    continue;
                }
            };
            let interval = Duration::from_millis(orders.interval_ms).clamp(INTERVAL_MIN, INTERVAL_MAX);
            next = Some(next.map_or(interval, |next| next.min(interval)));
            for task in orders.tasks {
                self.begin(task, doing, jobs, room);
            }
        }
        next.unwrap_or(INTERVAL)
    }

    fn begin(&self, task: Task, doing: &mut BTreeMap<Id, Doing>, jobs: &mut JoinSet<Ended>, room: &Arc<Semaphore>) {
        let task = match task.checked() {
            Ok(task) => task,
            Err(error) => return tracing::warn!(%error, "a tracker gave a preheat that cannot be"),
        };
        if doing.contains_key(&task.id) || doing.len() >= TASKS_MAX {
            return;
        }
        tracing::info!(id = %task.id, image = task.image, blobs = task.blobs.len(), bytes = task.bytes(), "preheating");
        let (id, until, task) = (task.id, Instant::now() + task.left(), Arc::new(task));
        let (downloads, wanted, room) = (self.downloads.clone(), task.clone(), room.clone());
        let job = jobs.spawn(async move { (id, fetch_all(&downloads, &wanted, &room).await) });
        doing.insert(id, Doing { task, until, job, ended: None });
    }

    /// What is in the store of a task now, whatever was there before.
    async fn report(&self, one: &Doing) -> Report {
        let (mut bytes, mut missing, mut unread) = (0, 0, None);
        for Wanted { digest, .. } in &one.task.blobs {
            let have = match self.downloads.engine().stat(digest).await {
                Ok(Stat::Whole { layout }) => layout.length(),
                Ok(Stat::Partial { have, .. }) => {
                    missing += 1;
                    have
                }
                Ok(Stat::Absent) => {
                    missing += 1;
                    0
                }
                Err(error) => {
                    unread = Some(error.to_string());
                    0
                }
            };
            bytes += have;
        }
        let all = one.task.blobs.len();
        let state = match (&one.ended, unread, missing) {
            (_, None, 0) => State::Holding,
            (None, ..) => State::Working,
            (Some(Err(why)), ..) => State::Failed { why: reason(why) },
            (Some(Ok(())), Some(why), _) => State::Failed { why: reason(&format!("look up blobs: {why}")) },
            (Some(Ok(())), None, missing) => {
                State::Failed { why: format!("{missing} of {all} blobs were evicted after they had come") }
            }
        };
        Report { id: one.task.id, state, bytes }
    }
}

/// Brings all blobs of a task; the first reason where some did not come.
async fn fetch_all(downloads: &Downloads, task: &Task, room: &Semaphore) -> Result<(), String> {
    let fetched = stream::iter(task.blobs.clone()).map(async |Wanted { digest, .. }| {
        let _place = room.acquire().await.map_err(|error| error.to_string())?;
        fetch(downloads, &task.namespace, &digest).await.map_err(|error| format!("{digest}: {error}"))
    });
    let ended: Vec<Result<(), String>> = fetched.buffer_unordered(BLOBS_AT_ONCE).collect().await;
    ended.into_iter().collect()
}

async fn fetch(downloads: &Downloads, namespace: &Namespace, digest: &Digest) -> Result<(), downloads::Error> {
    let mut tries = 1;
    loop {
        let fetched = async {
            downloads.ensure(namespace, digest, Class::Background).await?;
            Ok(downloads.engine().wait(digest).await?)
        };
        let error: downloads::Error = match fetched.await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let full = matches!(&error, downloads::Error::Engine(error) if matches!(**error, engine::Error::NoSpace(_)));
        if full || tries == TRIES {
            return Err(error);
        }
        tracing::debug!(%digest, %error, "preheat a blob; again soon");
        tokio::time::sleep(PAUSE * 2u32.pow(tries - 1)).await;
        tries += 1;
    }
}

/// An interval between seven eighths and the whole, so that hosts that started together do not stay together.
fn spread(interval: Duration) -> Duration {
    let eighth = interval / 8;
    let random = RandomState::new().hash_one(interval) % 1024;
    interval - eighth * u32::try_from(random).unwrap_or(0) / 1024
}

#[cfg(test)]
mod tests {
    use super::{
        super::harness::{Node, PATIENCE, namespace},
        *,
    };
    use crate::tracker::harness;
    use bytes::Bytes;

    fn task(blobs: &[(Digest, u64)], label: Option<&str>) -> Task {
        Task {
            id: Id::draw(),
            image: "lib/app:1".into(),
            namespace: namespace(),
            blobs: blobs.iter().map(|(digest, size)| Wanted { digest: *digest, size: *size }).collect(),
            label: label.map(|label| label.parse().unwrap()),
            left_ms: 60_000,
            again: false,
        }
    }

    #[tokio::test]
    async fn a_host_tells_what_is_in_its_store_and_not_what_was() {
        let (tracker, client) = harness::start().await;
        let addr = tracker.addr.to_string();
        let node = Node::start(false);
        let content = Bytes::from_static(b"layer");
        let digest = *node.put(&content).await.digest();
        let wanted = task(&[(digest, 5)], Some("gpu"));
        let others = task(&[(digest, 5)], Some("tpu"));
        for task in [&wanted, &others] {
            client.preheat(&addr, task).await.unwrap();
        }

        let labels = vec!["gpu".parse().unwrap(), "zone=a".parse().unwrap()];
        let downloads = node.downloads(&[], PATIENCE, PATIENCE);
        let preheat = Preheat::new(downloads, client.clone(), node.engine.peer_addr(), labels);
        let (mut doing, mut jobs, room) = (BTreeMap::new(), JoinSet::new(), Arc::new(Semaphore::new(BLOBS_AT_ONCE)));
        preheat.round(&mut doing, &mut jobs, &room).await;
        assert_eq!(doing.keys().collect::<Vec<_>>(), [&wanted.id], "only what its labels ask for");
        let ends = async {
            while doing[&wanted.id].ended.is_none() {
                preheat.round(&mut doing, &mut jobs, &room).await;
            }
        };
        tokio::time::timeout(PATIENCE, ends).await.unwrap();
        let told = client.preheated(&addr, &wanted.id).await.unwrap();
        assert_eq!((told.holding, told.hosts, told.bytes_held), (1, 1, 5), "{told:?}");

        assert!(node.engine.evict(&digest).await.unwrap());
        preheat.round(&mut doing, &mut jobs, &room).await;
        let told = client.preheated(&addr, &wanted.id).await.unwrap();
        assert_eq!((told.failed, told.hosts, told.bytes_held), (1, 1, 0), "{told:?}");
        assert_eq!(told.failures[0].why, "1 of 1 blobs were evicted after they had come");

        // It is over for a host that hears nothing more, too.
        drop(tracker);
        doing.get_mut(&wanted.id).unwrap().until = Instant::now();
        preheat.round(&mut doing, &mut jobs, &room).await;
        assert!(doing.is_empty());
    }

    #[tokio::test]
    async fn what_a_tracker_makes_up_has_bounds() {
        let node = Node::start(false);
        let digest = *node.put(&Bytes::from_static(b"layer")).await.digest();
        let (_tracker, client) = harness::start().await;
        let downloads = node.downloads(&[], PATIENCE, PATIENCE);
        let preheat = Preheat::new(downloads, client, node.engine.peer_addr(), Vec::new());
        let (mut doing, mut jobs, room) = (BTreeMap::new(), JoinSet::new(), Arc::new(Semaphore::new(BLOBS_AT_ONCE)));
        preheat.begin(task(&[], None), &mut doing, &mut jobs, &room);
        assert!(doing.is_empty(), "one that cannot be");
        let again = task(&[(digest, 5)], None);
        for task in [again.clone(), again] {
            preheat.begin(task, &mut doing, &mut jobs, &room);
        }
        assert_eq!((doing.len(), jobs.len()), (1, 1));
        for _ in 0..TASKS_MAX {
            preheat.begin(task(&[(digest, 5)], None), &mut doing, &mut jobs, &room);
        }
        assert_eq!((doing.len(), jobs.len()), (TASKS_MAX, TASKS_MAX));
    }
}
