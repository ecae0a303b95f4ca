//! What hosts are to hold and who of them does: the tasks that proxies gave, and the last word of each host on each. Takes the
//! time as an argument, so that it can be tested without any.

use crate::preheat::{
    FAILURES_MAX, Failure, Id, LABELS_MAX, Label, ORDERS_MAX, Orders, Poll, Progress, Report, State, TASKS_MAX, Task,
    reason,
};
use peer_proto::Instant;
use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

/// Polls a second; the intervals are stretched for it in a large cluster. A poll is a connection of its own.
const POLLS_PER_S_MAX: u32 = 1000;
/// How often a host asks that has something to do, at most.
const INTERVAL_WORKING: Duration = Duration::from_secs(1);
/// How often what is over or silent is looked for.
const SWEEP: Duration = Duration::from_secs(1);

/// How a table behaves.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How often a host asks that has nothing to do.
    pub interval: Duration,
    /// Silence after which a host counts as failed, or is forgotten where it had nothing to do.
    pub silence: Duration,
    /// Most hosts.
    pub hosts_max: usize,
}

/// Why a task or a host is not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Refused {
    /// No room for a task.
    #[error("{TASKS_MAX} preheats are under way; one has to end first")]
    Tasks,
    /// Another task has that name.
    #[error("preheat {0} is another one")]
    Other(Id),
    /// No room for a host.
    #[error("{0} hosts are known, the most there may be: see tracker.hosts_max")]
    Hosts(usize),
    /// More than a host may say.
    #[error("a host has at most {LABELS_MAX} labels and {TASKS_MAX} reports")]
    Long,
}

/// The tasks and the hosts.
pub(super) struct Table {
    config: Config,
    started: Instant,
    swept: Instant,
    tasks: BTreeMap<Id, Entry>,
    hosts: HashMap<SocketAddr, Host>,
}

struct Entry {
    task: Arc<Task>,
    until: Instant,
    /// The last word of each host, those that are silent since included; at most `hosts_max`.
    words: HashMap<SocketAddr, Word>,
    /// Words that have a reason with them: only so many, as they are long.
    reasons: usize,
}

struct Host {
    labels: Vec<Label>,
    seen: Instant,
}

struct Word {
    kind: Kind,
    why: Option<Box<str>>,
    bytes: u64,
    at: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Holding,
    Working,
    Failed,
}

impl Entry {
    fn hear(&mut self, now: Instant, host: SocketAddr, report: Report, hosts_max: usize) {
        let (kind, why) = match report.state {
            State::Holding => (Kind::Holding, None),
            State::Working => (Kind::Working, None),
            State::Failed { why } => (Kind::Failed, Some(why)),
        };
        self.forget(&host);
        if self.words.len() >= hosts_max {
            return;
        }
        let why = why.filter(|_| self.reasons < FAILURES_MAX).map(|why| reason(&why).into_boxed_str());
        self.reasons += usize::from(why.is_some());
        let bytes = report.bytes.min(self.task.bytes());
        self.words.insert(host, Word { kind, why, bytes, at: now });
    }

    fn forget(&mut self, host: &SocketAddr) {
        if let Some(word) = self.words.remove(host) {
            self.reasons -= usize::from(word.why.is_some());
        }
    }
}

impl Table {
    pub(super) fn new(config: Config, now: Instant) -> Self {
        Self { config, started: now, swept: now, tasks: BTreeMap::new(), hosts: HashMap::new() }
    }

    /// Takes a task; one that is here already is left as it is.
    pub(super) fn put(&mut self, now: Instant, task: Task) -> Result<(), Refused> {
        self.sweep(now);
        if let Some(entry) = self.tasks.get(&task.id) {
            let same = entry.task.blobs == task.blobs && entry.task.label == task.label;
            return if same { Ok(()) } else { Err(Refused::Other(task.id)) };
        }
        if self.tasks.len() >= TASKS_MAX {
            return Err(Refused::Tasks);
        }
        let until = now + task.left();
        self.tasks.insert(task.id, Entry { task: Arc::new(task), until, words: HashMap::new(), reasons: 0 });
        Ok(())
    }

    /// Hears a host, and tells it what it does not know.
    pub(super) fn poll(&mut self, now: Instant, poll: Poll) -> Result<Orders, Refused> {
        self.sweep(now);
        let Poll { host, labels, reports } = poll;
        if labels.len() > LABELS_MAX || reports.len() > TASKS_MAX {
            return Err(Refused::Long);
        }
        let (count, hosts_max) = (self.hosts.len(), self.config.hosts_max);
        if !self.hosts.contains_key(&host) && count >= hosts_max {
            return Err(Refused::Hosts(count));
        }
        let mut busy = false;
        let mut orders: Vec<Task> = Vec::new();
        for (id, entry) in &mut self.tasks {
            if !entry.task.is_for(&labels) {
                // It may have had the label before.
                entry.forget(&host);
                continue;
            }
            match reports.iter().find(|report| report.id == *id) {
                Some(report) => {
                    busy |= report.state == State::Working;
                    entry.hear(now, host, report.clone(), hosts_max);
                }
                None => {
                    busy = true;
                    // Started again: what it said before is no proof any more.
                    entry.forget(&host);
                    if orders.len() < ORDERS_MAX {
                        let left_ms = u64::try_from(entry.until.since(now).as_millis()).unwrap_or(u64::MAX).max(1);
                        orders.push(Task { left_ms, ..Task::clone(&entry.task) });
                    }
                }
            }
        }
        self.hosts.insert(host, Host { labels, seen: now });
        let interval = self.interval(busy);
        Ok(Orders { interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX).max(1), tasks: orders })
    }

    /// How far a task has come; none where it is unknown or over.
    pub(super) fn progress(&mut self, now: Instant, id: &Id) -> Option<Progress> {
        self.sweep(now);
        let entry = self.tasks.get(id).filter(|entry| now < entry.until)?;
        // A host with a part of it may be away just now; once it would be silent, it is missed by nobody.
        let known_after = if entry.task.again { self.silence() } else { 2 * self.interval(false) };
        let mut progress = Progress {
            id: *id,
            image: entry.task.image.clone(),
            label: entry.task.label.clone(),
            blobs: entry.task.blobs.len(),
            bytes: entry.task.bytes(),
            hosts: 0,
            holding: 0,
            working: 0,
            waiting: 0,
            failed: 0,
            bytes_held: 0,
            failures: Vec::new(),
            settled: now.since(self.started) >= known_after,
            oldest_report_ms: 0,
            left_ms: u64::try_from(entry.until.since(now).as_millis()).unwrap_or(u64::MAX),
        };
        let (mut oldest, silence) = (now, self.silence());
        for (host, known) in &self.hosts {
            let silent = now.since(known.seen) > silence;
            if !silent && entry.task.is_for(&known.labels) && !entry.words.contains_key(host) {
                progress.hosts += 1;
                progress.waiting += 1;
            }
        }
        for (host, word) in &entry.words {
            progress.hosts += 1;
            let silent = now.since(word.at);
            let mut fail = |why: String| {
                progress.failed += 1;
                if progress.failures.len() < FAILURES_MAX {
                    progress.failures.push(Failure { host: *host, why });
                }
            };
            if silent > silence {
                fail(format!("not heard of for {} s", silent.as_secs()));
                continue;
            }
            oldest = oldest.min(word.at);
            match word.kind {
                Kind::Holding => progress.holding += 1,
                Kind::Working => progress.working += 1,
                Kind::Failed => fail(word.why.as_deref().unwrap_or("see the host's log").to_owned()),
            }
            progress.bytes_held = progress.bytes_held.saturating_add(word.bytes);
        }
        progress.oldest_report_ms = u64::try_from(now.since(oldest).as_millis()).unwrap_or(u64::MAX);
        progress.failures.sort_unstable_by_key(|failure| failure.host);
        Some(progress)
    }

    /// Tasks and hosts.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.tasks.len(), self.hosts.len())
    }

    fn interval(&self, busy: bool) -> Duration {
        let base = if busy { self.config.interval.min(INTERVAL_WORKING) } else { self.config.interval };
        let hosts = u32::try_from(self.hosts.len()).unwrap_or(u32::MAX);
        base.max(Duration::from_secs(1) * hosts / POLLS_PER_S_MAX)
    }

    /// What counts as silence: longer than the interval is, wherever that is stretched.
    fn silence(&self) -> Duration {
        self.config.silence.max(3 * self.interval(false))
    }

    fn sweep(&mut self, now: Instant) {
        if now.since(self.swept) < SWEEP {
            return;
        }
        self.swept = now;
        self.tasks.retain(|_, entry| now < entry.until);
        let silence = self.silence();
        self.hosts.retain(|_, host| now.since(host.seen) <= silence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preheat::Wanted;
    use peer_proto::Digest;

    const CONFIG: Config =
        Config { interval: Duration::from_secs(10), silence: Duration::from_secs(100), hosts_max: 1000 };

    fn at(secs: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(secs)
    }

    fn table() -> Table {
        Table::new(CONFIG, at(0))
    }

    fn task(label: Option<&str>) -> Task {
        let blobs = [7, 8].map(|n| Wanted { digest: Digest::sha256([n; 32]), size: 50 });
        Task {
            id: Id::draw(),
            image: "lib/app:1".into(),
            namespace: "lib/app".parse().unwrap(),
            blobs: blobs.into(),
            label: label.map(|label| label.parse().unwrap()),
            left_ms: 3_600_000,
            again: false,
        }
    }

    fn host(n: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], n))
    }

    fn poll(n: u16, labels: &[&str], reports: &[(Id, State, u64)]) -> Poll {
        let report = |(id, state, bytes): &(Id, State, u64)| Report { id: *id, state: state.clone(), bytes: *bytes };
        Poll {
            host: host(n),
            labels: labels.iter().map(|label| label.parse().unwrap()).collect(),
            reports: reports.iter().map(report).collect(),
        }
    }

    /// Of whom; who holds, works, waits, failed.
    fn counts(table: &mut Table, now: Instant, id: &Id) -> [usize; 5] {
        let progress = table.progress(now, id).unwrap();
        let Progress { hosts, holding, working, waiting, failed, .. } = progress;
        assert_eq!(hosts, holding + working + waiting + failed);
        [hosts, holding, working, waiting, failed]
    }

    #[test]
    fn hosts_with_the_label_are_told_once_and_counted() {
        let mut table = table();
        assert!(table.poll(at(0), poll(1, &["gpu"], &[])).unwrap().tasks.is_empty());
        let gpu = task(Some("gpu"));
        let id = gpu.id;
        table.put(at(1), gpu.clone()).unwrap();
        table.put(at(2), gpu.clone()).unwrap();
        assert_eq!(counts(&mut table, at(2), &id), [1, 0, 0, 1, 0], "known before it was asked for");
        let orders = table.poll(at(3), poll(1, &["gpu"], &[])).unwrap();
        assert_eq!(orders.tasks, [Task { left_ms: 3_598_000, ..gpu }]);
        assert_eq!(orders.interval_ms, 1000);
        assert_eq!(table.poll(at(3), poll(2, &["zone=a"], &[])).unwrap().tasks, []);
        assert_eq!(table.poll(at(3), poll(3, &["zone=a", "gpu"], &[])).unwrap().tasks.len(), 1);

        let working = table.poll(at(4), poll(1, &["gpu"], &[(id, State::Working, 60)])).unwrap();
        assert_eq!((working.tasks.len(), working.interval_ms), (0, 1000));
        assert_eq!(counts(&mut table, at(4), &id), [2, 0, 1, 1, 0]);
        assert!(!table.progress(at(4), &id).unwrap().settled);
        let holding = table.poll(at(30), poll(1, &["gpu"], &[(id, State::Holding, 100)])).unwrap();
        assert_eq!(holding.interval_ms, 10_000);
        let no = State::Failed { why: "no space".into() };
        table.poll(at(31), poll(3, &["gpu"], &[(id, no, 70)])).unwrap();
        let progress = table.progress(at(32), &id).unwrap();
        assert_eq!(progress.to_string(), "1 of 2 hosts hold all layers");
        assert_eq!((progress.bytes, progress.bytes_held, progress.oldest_report_ms), (100, 170, 2000));
        assert_eq!(progress.failures, [Failure { host: host(3), why: "no space".into() }]);
        assert!(progress.is_over() && !progress.is_proven());
        table.poll(at(33), poll(3, &["gpu"], &[(id, State::Holding, 100)])).unwrap();
        assert!(table.progress(at(33), &id).unwrap().is_proven());
        // A blob has been evicted since.
        table.poll(at(43), poll(3, &["gpu"], &[(id, State::Failed { why: "evicted".into() }, 50)])).unwrap();
        assert_eq!(counts(&mut table, at(43), &id), [2, 1, 0, 0, 1]);
        // A host that has lost the label is not meant any more.
        table.poll(at(44), poll(3, &[], &[(id, State::Holding, 100)])).unwrap();
        assert_eq!(counts(&mut table, at(44), &id), [1, 1, 0, 0, 0]);
    }

    #[test]
    fn silence_is_no_proof() {
        let mut table = table();
        let all = task(None);
        let id = all.id;
        table.put(at(0), all).unwrap();
        assert!(!table.progress(at(50), &id).unwrap().is_proven(), "nobody is there");
        table.poll(at(50), poll(1, &[], &[(id, State::Holding, 100)])).unwrap();
        table.poll(at(50), poll(2, &[], &[])).unwrap();
        table.poll(at(149), poll(3, &[], &[(id, State::Holding, 100)])).unwrap();
        assert_eq!(counts(&mut table, at(149), &id), [3, 2, 0, 1, 0]);
        assert_eq!(counts(&mut table, at(151), &id), [2, 1, 0, 0, 1], "the one that was never told is forgotten");
        let progress = table.progress(at(151), &id).unwrap();
        assert_eq!(progress.failures, [Failure { host: host(1), why: "not heard of for 101 s".into() }]);
        table.poll(at(152), poll(1, &[], &[(id, State::Holding, 100)])).unwrap();
        assert_eq!(counts(&mut table, at(152), &id), [2, 2, 0, 0, 0], "back again");
        assert_eq!(table.poll(at(153), poll(1, &[], &[])).unwrap().tasks.len(), 1);
        assert_eq!(counts(&mut table, at(153), &id), [2, 1, 0, 1, 0], "started again, with nothing found yet");
    }

    #[test]
    fn a_tracker_that_was_away_waits_for_whom_it_does_not_know() {
        let mut table = table();
        let (new, old) = (task(None), Task { again: true, ..task(None) });
        let ids = [new.id, old.id];
        table.put(at(0), new).unwrap();
        table.put(at(0), old).unwrap();
        for secs in [19, 20, 99, 100] {
            let here = ids.map(|id| (id, State::Holding, 100));
            table.poll(at(secs), poll(1, &[], &here)).unwrap();
            let proven = ids.map(|id| table.progress(at(secs), &id).unwrap().is_proven());
            assert_eq!(proven, [secs >= 20, secs >= 100], "after {secs} s");
        }
    }

    #[test]
    fn everything_has_a_bound_and_an_end() {
        let mut table = table();
        let tasks: Vec<Task> = (0..TASKS_MAX).map(|_| task(None)).collect();
        for task in &tasks {
            table.put(at(0), task.clone()).unwrap();
        }
        assert_eq!(table.put(at(0), task(None)), Err(Refused::Tasks));
        let other = Task { label: Some("gpu".parse().unwrap()), ..tasks[0].clone() };
        assert_eq!(table.put(at(0), other), Err(Refused::Other(tasks[0].id)));
        let orders = table.poll(at(0), poll(1, &[], &[])).unwrap();
        assert_eq!(orders.tasks.len(), ORDERS_MAX);
        let long = poll(1, &vec!["l"; LABELS_MAX + 1], &[]);
        assert_eq!(table.poll(at(0), long), Err(Refused::Long));
        let id = tasks[0].id;
        for n in 1..=1000 {
            let no = State::Failed { why: "x".repeat(1000) };
            table.poll(at(1), poll(n, &[], &[(id, no, u64::MAX)])).unwrap();
        }
        assert_eq!(table.poll(at(1), poll(1001, &[], &[])), Err(Refused::Hosts(1000)));
        let progress = table.progress(at(1), &id).unwrap();
        assert_eq!((progress.failed, progress.bytes_held, progress.failures.len()), (1000, 100_000, FAILURES_MAX));
        assert!(serde_json::to_vec(&progress).unwrap().len() < crate::preheat::PROGRESS_LEN_MAX);
        assert_eq!(table.poll(at(2), poll(1, &[], &[])).unwrap().interval_ms, 1000);
        assert!(table.progress(at(3599), &id).is_some());
        assert_eq!(table.progress(at(3600), &id), None);
        assert_eq!(table.size(), (0, 0));
        table.put(at(3600), task(None)).unwrap();
    }

    #[test]
    fn many_hosts_ask_less_often() {
        let mut table = Table::new(Config { hosts_max: 20_000, ..CONFIG }, at(0));
        for n in 0..15_000 {
            table.poll(at(0), poll(n, &[], &[])).unwrap();
        }
        assert_eq!(table.poll(at(0), poll(1, &[], &[])).unwrap().interval_ms, 15_000);
    }
}
