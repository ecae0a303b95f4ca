//! Which members of a cluster answer: a pure core that is told how calls and probes went and says whom to probe next.
//!
//! A member starts up. Failures in a row take it down; a probe that passes brings it back. Whoever only calls now and then and
//! does not probe (a command line, an agent) uses [`Mode::Passive`]: a member is let in again after a pause that doubles
//! while it keeps failing.

use peer_proto::{Instant, ring};
use std::{collections::VecDeque, time::Duration};

/// How a member that is down comes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// By a probe that passes. Members are probed all the time.
    Active,
    /// By the passing of time.
    Passive,
}

/// When a member is up, and how often it is asked.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// How it comes back.
    pub mode: Mode,
    /// Failures in a row that take a member down; at least 1.
    pub fails: u8,
    /// Between two probes of a member that is up.
    pub interval: Duration,
    /// Between two probes of a member that is down at first, or its first pause; doubles up to `pause_max`.
    pub pause: Duration,
    /// The longest of those.
    pub pause_max: Duration,
}

/// What happened to a member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// It answered a call or a probe.
    Passed(usize),
    /// It did not.
    Failed(usize),
    /// Time went by.
    Tick,
}

/// What to do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Ask this member, and report how it went.
    Probe(usize),
    /// It is up again.
    Up(usize),
    /// It is down.
    Down(usize),
}

/// The health of a cluster's members, by number.
#[derive(Debug)]
pub struct Health {
    rules: Rules,
    me: Option<usize>,
    members: Vec<Member>,
    effects: VecDeque<Effect>,
}

#[derive(Debug)]
struct Member {
    opinion: ring::Health,
    /// When it is probed or, if down in passive mode, let in again. None while a probe is under way, or for ourselves.
    due: Option<Instant>,
    pause: Duration,
}

impl Health {
    /// A cluster of `members`, all up, all due for a probe. Member `me`, if any, is never probed and always up.
    pub fn new(rules: Rules, members: usize, me: Option<usize>) -> Self {
        let member = |index| Member {
            // One answer is enough to be let in again: the next failure only costs another try.
            opinion: ring::Health::new(rules.fails, 1),
            due: (rules.mode == Mode::Active && me != Some(index)).then_some(Instant::ZERO),
            pause: rules.pause,
        };
        Self { rules, me, members: (0..members).map(member).collect(), effects: VecDeque::new() }
    }

    /// Whether a member is up.
    pub fn is_up(&self, member: usize) -> bool {
        self.members.get(member).is_some_and(|member| member.opinion.is_up())
    }

    /// Takes what happened.
    pub fn handle(&mut self, now: Instant, event: Event) {
        match event {
            Event::Passed(index) | Event::Failed(index) if self.me == Some(index) => {}
            Event::Passed(index) => self.passed(now, index),
            Event::Failed(index) => self.failed(now, index),
            Event::Tick => self.tick(now),
        }
    }

    /// What to do next.
    pub fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to tick at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.members.iter().filter_map(|member| member.due).min()
    }

    fn passed(&mut self, now: Instant, index: usize) {
        let Some(member) = self.members.get_mut(index) else { return };
        member.pause = self.rules.pause;
        member.due = match self.rules.mode {
            Mode::Active => Some(now + self.rules.interval),
            Mode::Passive => None,
        };
        if member.opinion.saw(true).is_some() {
            self.effects.push_back(Effect::Up(index));
        }
    }

    fn failed(&mut self, now: Instant, index: usize) {
        let Some(member) = self.members.get_mut(index) else { return };
        if member.opinion.saw(false).is_some() {
            self.effects.push_back(Effect::Down(index));
        }
        if member.opinion.is_up() {
            // One call failed: a probe soon tells an accident from an outage.
            member.due = (self.rules.mode == Mode::Active).then_some(now + self.rules.pause);
        } else {
            member.due = Some(now + member.pause);
            member.pause = (member.pause * 2).min(self.rules.pause_max);
        }
    }

    fn tick(&mut self, now: Instant) {
        for (index, member) in self.members.iter_mut().enumerate() {
            if member.due.is_none_or(|due| due > now) {
                continue;
            }
            member.due = None;
            match self.rules.mode {
                Mode::Active => self.effects.push_back(Effect::Probe(index)),
                Mode::Passive => {
                    if member.opinion.saw(true).is_some() {
                        self.effects.push_back(Effect::Up(index));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        mode: Mode::Active,
        fails: 2,
        interval: Duration::from_secs(5),
        pause: Duration::from_secs(1),
        pause_max: Duration::from_secs(4),
    };

    fn at(secs: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(secs)
    }

    fn drain(health: &mut Health) -> Vec<Effect> {
        std::iter::from_fn(|| health.poll()).collect()
    }

    #[test]
    fn failures_in_a_row_take_a_member_down_and_a_probe_brings_it_back() {
        let mut health = Health::new(RULES, 3, Some(2));
        health.handle(at(0), Event::Tick);
        assert_eq!(drain(&mut health), [Effect::Probe(0), Effect::Probe(1)], "never ourselves");
        health.handle(at(0), Event::Passed(0));
        health.handle(at(0), Event::Failed(1));
        assert!(health.is_up(1), "one failure is an accident");
        assert_eq!(health.deadline(), Some(at(1)));
        health.handle(at(1), Event::Tick);
        assert_eq!(drain(&mut health), [Effect::Probe(1)]);
        health.handle(at(1), Event::Failed(1));
        assert_eq!(drain(&mut health), [Effect::Down(1)]);
        assert!(!health.is_up(1) && health.is_up(0) && health.is_up(2));
        health.handle(at(2), Event::Tick);
        assert_eq!(drain(&mut health), [Effect::Probe(1)]);
        health.handle(at(2), Event::Passed(1));
        assert_eq!(drain(&mut health), [Effect::Up(1)]);
        assert_eq!(health.deadline(), Some(at(5)), "member 0 is next");
    }

    #[test]
    fn without_probes_a_member_is_let_in_after_a_growing_pause() {
        let mut health = Health::new(Rules { mode: Mode::Passive, fails: 1, ..RULES }, 1, None);
        assert_eq!(health.deadline(), None);
        health.handle(at(0), Event::Failed(0));
        assert_eq!(drain(&mut health), [Effect::Down(0)]);
        let mut pauses = Vec::new();
        let mut now = at(0);
        for _ in 0..4 {
            let due = health.deadline().unwrap();
            pauses.push(due.since(now).as_secs());
            now = due;
            health.handle(now, Event::Tick);
            assert_eq!(drain(&mut health), [Effect::Up(0)]);
            health.handle(now, Event::Failed(0));
            assert_eq!(drain(&mut health), [Effect::Down(0)]);
        }
        assert_eq!(pauses, [1, 2, 4, 4]);
        health.handle(now, Event::Passed(0));
        assert!(health.is_up(0) && health.deadline().is_none());
    }

    #[test]
    fn a_member_that_is_not_there_changes_nothing() {
        let mut health = Health::new(RULES, 1, None);
        health.handle(at(0), Event::Failed(7));
        health.handle(at(0), Event::Passed(7));
        assert!(!health.is_up(7));
        assert_eq!(health.poll(), None);
    }
}
