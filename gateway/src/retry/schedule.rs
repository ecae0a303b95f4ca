//! When what is tried: no clock, no database. Times are milliseconds since 1970; tasks are the database's ids.

use super::Config;
use std::collections::{BTreeMap, BTreeSet};

/// The pause after `failures` failures, milliseconds: between a half and the whole of the doubled one, by `random`, so that what
/// failed together does not come back together.
pub(super) fn pause(config: &Config, failures: u32, random: u64) -> u64 {
    let millis = |span: std::time::Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    let doubled = millis(config.pause.get()).saturating_mul(1 << failures.saturating_sub(1).min(40));
    let whole = doubled.min(millis(config.pause_max.get()));
    whole - random % (whole / 2 + 1)
}

/// The kinds that have a runner, and what of them runs.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    lanes: BTreeMap<&'static str, Lane>,
}

#[derive(Debug)]
struct Lane {
    places: usize,
    running: BTreeSet<i64>,
    /// No task that is not running is due before; None: there is none.
    next: Option<u64>,
}

impl Schedule {
    /// A kind has a runner with this many places.
    pub(super) fn open(&mut self, kind: &'static str, places: usize) {
        let lane = self.lanes.entry(kind).or_insert(Lane { places, running: BTreeSet::new(), next: Some(0) });
        lane.places = places;
    }

    /// A task of a kind waits for a moment.
    pub(super) fn waits(&mut self, kind: &str, due: u64) {
        if let Some(lane) = self.lanes.get_mut(kind) {
            lane.next = Some(lane.next.map_or(due, |next| next.min(due)));
        }
    }

    /// A try came to its end; its task may have been renewed meanwhile, so the database is to be looked at.
    pub(super) fn ended(&mut self, kind: &str, id: i64, now: u64) {
        if let Some(lane) = self.lanes.get_mut(kind) {
            lane.running.remove(&id);
            lane.next = Some(lane.next.map_or(now, |next| next.min(now)));
        }
    }

    /// The kinds to look at, and how many of each kind's earliest tasks are enough to choose from.
    pub(super) fn wanted(&self, now: u64) -> Vec<(&'static str, usize)> {
        let ready = self.lanes.iter().filter(|(_, lane)| lane.free() > 0 && lane.next.is_some_and(|next| next <= now));
        // Running ones are among the earliest; one more tells when to look next.
        ready.map(|(kind, lane)| (*kind, lane.places + 1)).collect()
    }

    /// Chooses what to start of a kind's earliest tasks, given as (id, due) in order of time.
    pub(super) fn start(&mut self, kind: &str, now: u64, tasks: impl Iterator<Item = (i64, u64)>) -> BTreeSet<i64> {
        let mut started = BTreeSet::new();
        let Some(lane) = self.lanes.get_mut(kind) else { return started };
        lane.next = None;
        for (id, due) in tasks {
            if lane.running.contains(&id) {
                continue;
            }
            if due > now || lane.free() == 0 {
                lane.next = Some(due);
                break;
            }
            lane.running.insert(id);
            started.insert(id);
        }
        started
    }

    /// When something is due that has a place.
    pub(super) fn deadline(&self) -> Option<u64> {
        self.lanes.values().filter(|lane| lane.free() > 0).filter_map(|lane| lane.next).min()
    }

    /// Whether a task is being tried.
    pub(super) fn is_running(&self, id: i64) -> bool {
        self.lanes.values().any(|lane| lane.running.contains(&id))
    }

    /// How many tasks of each kind are being tried.
    pub(super) fn running(&self) -> impl Iterator<Item = (&'static str, usize)> {
        self.lanes.iter().map(|(kind, lane)| (*kind, lane.running.len()))
    }
}

impl Lane {
    fn free(&self) -> usize {
        self.places.saturating_sub(self.running.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Span;

    #[test]
    fn pauses_double_to_their_bound() {
        let config = Config { pause: Span::secs(1), pause_max: Span::secs(10), tasks_max: 1 };
        assert_eq!(
            [1, 2, 3, 4, 5, 99, u32::MAX].map(|n| pause(&config, n, 0)),
            [1000, 2000, 4000, 8000, 10000, 10000, 10000]
        );
        for random in 0..5000 {
            assert!((2000..=4000).contains(&pause(&config, 3, random)));
        }
    }

    /// Starts what is due of `tasks`, and checks that asking for so many was enough.
    fn start(schedule: &mut Schedule, now: u64, tasks: &[(i64, u64)]) -> Vec<i64> {
        let wanted: usize = schedule.wanted(now).iter().map(|(_, wanted)| wanted).sum();
        schedule.start("k", now, tasks.iter().copied().take(wanted)).into_iter().collect()
    }

    #[test]
    fn places_and_times_are_kept() {
        let mut schedule = Schedule::default();
        schedule.open("k", 2);
        assert_eq!(schedule.deadline(), Some(0), "what an earlier process left is looked for");
        let tasks = [(1, 10), (2, 10), (3, 10), (4, 50)];
        assert_eq!(start(&mut schedule, 10, &tasks), [1, 2]);
        assert_eq!(schedule.deadline(), None, "no place");
        assert!(schedule.wanted(100).is_empty());
        schedule.ended("k", 1, 20);
        assert_eq!(start(&mut schedule, 20, &tasks[1..]), [3]);
        schedule.ended("k", 2, 30);
        assert_eq!(start(&mut schedule, 30, &tasks[2..]), Vec::<i64>::new());
        assert_eq!(schedule.deadline(), Some(50));
        assert!(schedule.wanted(49).is_empty());
        schedule.waits("k", 40);
        schedule.waits("k", 45);
        schedule.waits("other", 1);
        assert_eq!(schedule.deadline(), Some(40));
        assert_eq!(start(&mut schedule, 60, &[(3, 10), (5, 40), (4, 50)]), [5]);
        assert_eq!(schedule.running().collect::<Vec<_>>(), [("k", 2)]);
        assert!(schedule.is_running(3) && schedule.is_running(5) && !schedule.is_running(4));
    }

    #[test]
    fn an_empty_kind_sleeps_until_something_comes() {
        let mut schedule = Schedule::default();
        schedule.open("k", 1);
        assert!(start(&mut schedule, 5, &[]).is_empty());
        assert_eq!(schedule.deadline(), None);
        schedule.waits("k", 7);
        assert_eq!(schedule.deadline(), Some(7));
    }
}
