//! Preheats of hosts, as a proxy asks trackers for them. Trackers keep them in memory alone; so the proxy that made a task gives
//! it again to trackers that have forgotten it, or were away, for as long as the task stands.

use crate::{
    client::{Tracker, tracker},
    preheat::{Id, Progress, TASKS_MAX, Task},
};
use futures_util::future::join_all;
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// How often trackers are asked whether they still know the tasks.
const REPEAT: Duration = Duration::from_secs(5);

/// Why hosts are not preheated.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// There is nobody to ask.
    #[error("hosts cannot be preheated: cluster.trackers of this proxy's configuration names none")]
    NoTrackers,
    /// As many as there may be are under way.
    #[error("{TASKS_MAX} preheats are under way; one has to end first")]
    Full,
    /// No tracker has such a task.
    #[error("preheat {0} is unknown or over")]
    Unknown(Id),
    /// No tracker took it, or could say.
    #[error("{0}")]
    Tracker(#[from] tracker::Error),
}

/// The tasks that one proxy made; by default with no trackers to give them to.
#[derive(Default)]
pub struct Hosts {
    trackers: Option<Tracker>,
    made: Mutex<BTreeMap<Id, Made>>,
}

#[derive(Clone)]
struct Made {
    task: Task,
    until: Instant,
}

impl Made {
    /// The task, if it stands yet, with the time it has left.
    fn task(&self) -> Option<Task> {
        let left = self.until.checked_duration_since(Instant::now())?;
        let left_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        (left_ms > 0).then(|| Task { left_ms, ..self.task.clone() })
    }
}

impl Hosts {
    /// Preheats by these trackers.
    pub fn new(trackers: Tracker) -> Self {
        Self { trackers: Some(trackers), made: Mutex::default() }
    }

    /// Gives a task to the trackers; at least one has taken it then.
    pub(super) async fn preheat(&self, task: Task) -> Result<(), Error> {
        let trackers = self.trackers()?;
        let (id, made) = (task.id, Made { until: Instant::now() + task.left(), task });
        {
            let mut all = self.made();
            all.retain(|_, made| made.task().is_some());
            if all.len() >= TASKS_MAX {
                return Err(Error::Full);
            }
            all.insert(id, made.clone());
        }
        let given = trackers.preheaters().into_iter().map(|tracker| trackers.preheat(tracker, &made.task));
        let mut last = Error::NoTrackers;
        for given in join_all(given).await {
            match given {
                Ok(()) => return Ok(()),
                Err(error) => last = error.into(),
            }
        }
        self.made().remove(&id);
        Err(last)
    }

    /// How far a task has come, as the tracker knows it that knows the most hosts.
    pub(super) async fn progress(&self, id: &Id) -> Result<Progress, Error> {
        let trackers = self.trackers()?;
        let made = self.made().get(id).and_then(Made::task);
        let told = trackers.preheaters().into_iter().map(|tracker| progress(trackers, tracker, id, made.as_ref()));
        let (mut best, mut last) = (None::<Progress>, Error::Unknown(*id));
        for told in join_all(told).await {
            match told {
                Ok(progress) => {
                    let worth = |one: &Progress| (one.settled, one.hosts, one.holding);
                    best = Some(best.filter(|best| worth(best) >= worth(&progress)).unwrap_or(progress));
                }
                Err(tracker::Error::NotFound) => {}
                Err(error) => last = error.into(),
            }
        }
        best.ok_or(last)
    }

    /// Gives tasks again where they were forgotten, until `stop` is true.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        let Some(trackers) = &self.trackers else { return };
        loop {
            tokio::select! {
                () = tokio::time::sleep(REPEAT) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            let tasks: Vec<Task> = {
                let mut all = self.made();
                all.retain(|_, made| made.task().is_some());
                all.values().filter_map(Made::task).collect()
            };
            for task in &tasks {
                let names = trackers.preheaters();
                let again = names.into_iter().map(|tracker| progress(trackers, tracker, &task.id, Some(task)));
                for again in join_all(again).await {
                    if let Err(error) = again {
                        tracing::debug!(id = %task.id, %error, "look after a preheat");
                    }
                }
            }
        }
    }

    fn trackers(&self) -> Result<&Tracker, Error> {
        self.trackers.as_ref().ok_or(Error::NoTrackers)
    }

    fn made(&self) -> MutexGuard<'_, BTreeMap<Id, Made>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far a task has come, as one tracker knows it. Where it has forgotten the task, it is given again.
async fn progress(trackers: &Tracker, tracker: &str, id: &Id, task: Option<&Task>) -> Result<Progress, tracker::Error> {
    match (trackers.preheated(tracker, id).await, task) {
        (Err(tracker::Error::NotFound), Some(task)) => {
            tracing::info!(%id, tracker, "a tracker has forgotten a preheat; giving it again");
            trackers.preheat(tracker, &Task { again: true, ..task.clone() }).await?;
            trackers.preheated(tracker, id).await
        }
        (told, _) => told,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{http::Client, preheat::Wanted, tracker::harness};
    use peer_proto::Digest;

    fn task() -> Task {
        Task {
            id: Id::draw(),
            image: "lib/app:1".into(),
            namespace: "lib/app".parse().unwrap(),
            blobs: vec![Wanted { digest: Digest::sha256([7; 32]), size: 5 }],
            label: None,
            left_ms: 60_000,
            again: false,
        }
    }

    #[tokio::test]
    async fn what_trackers_forget_they_are_told_again_by_whoever_made_it() {
        let (tracker, client) = harness::start().await;
        let (maker, other) = (Hosts::new(client.clone()), Hosts::new(client));
        let task = task();
        assert_eq!(maker.progress(&task.id).await, Err(Error::Unknown(task.id)));
        maker.preheat(task.clone()).await.unwrap();
        assert_eq!(other.progress(&task.id).await.unwrap().image, "lib/app:1");

        tracker.forget_preheats();
        assert_eq!(other.progress(&task.id).await, Err(Error::Unknown(task.id)));
        let told = maker.progress(&task.id).await.unwrap();
        assert!((1..=60_000).contains(&told.left_ms), "{told:?}");
        assert_eq!(other.progress(&task.id).await.unwrap().id, task.id);
    }

    #[tokio::test]
    async fn preheats_that_nobody_took_are_none() {
        assert_eq!(Hosts::default().preheat(task()).await, Err(Error::NoTrackers));
        // Nobody listens on the port once this is dropped.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let nobody = listener.local_addr().unwrap();
        drop(listener);
        let hosts = Hosts::new(Tracker::new(&[nobody.into()], Client::default()).unwrap());
        let task = task();
        let refused = hosts.preheat(task.clone()).await;
        assert!(matches!(refused, Err(Error::Tracker(tracker::Error::Unreachable(_)))), "{refused:?}");
        assert!(hosts.made().is_empty());
    }

    #[tokio::test]
    async fn only_so_many_stand_at_a_time() {
        let (_tracker, client) = harness::start().await;
        let hosts = Hosts::new(client);
        for _ in 0..TASKS_MAX {
            hosts.preheat(task()).await.unwrap();
        }
        assert_eq!(hosts.preheat(task()).await, Err(Error::Full));
        let until = Instant::now();
        hosts.made().values_mut().next().unwrap().until = until;
        assert!(hosts.preheat(task()).await != Err(Error::Full), "one is over");
        assert_eq!(hosts.made().len(), TASKS_MAX - 1, "the tracker's own has time left");
    }
}
