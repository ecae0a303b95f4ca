//! Preheat of hosts: what a proxy asks trackers for, what trackers hand to agents, what agents say back. All of it is JSON.
//!
//! | who | request at a tracker | body | answer |
//! |---|---|---|---|
//! | proxy | `PUT /preheat/ID` | [`Task`] | 200; the same again changes nothing |
//! | proxy | `GET /preheat/ID` | | [`Progress`], 404 where it is unknown or over |
//! | agent | `POST /preheat/poll` | [`Poll`] | [`Orders`] |

use peer_proto::{Digest, Namespace};
use serde::{Deserialize, Serialize};
use std::{fmt, net::SocketAddr, str::FromStr, time::Duration};
use uuid::Uuid;

/// Most tasks that a tracker, an agent or a proxy has at a time.
pub const TASKS_MAX: usize = 32;
/// Most blobs of a task.
pub const BLOBS_MAX: usize = 1024;
/// Most labels of a host.
pub const LABELS_MAX: usize = 32;
/// Most tasks in one answer to an agent, so that it stays short; the others come with the next.
pub const ORDERS_MAX: usize = 4;
/// Most failed hosts that are told with their reasons.
pub const FAILURES_MAX: usize = 100;
/// Longest reason, bytes.
pub const REASON_LEN_MAX: usize = 200;
/// How long a task stands unless its maker says otherwise.
pub const LIFE: Duration = Duration::from_secs(60 * 60);
/// Longest life of a task.
pub const LIFE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Trackers that have to do with preheats, where there are more.
pub const TRACKERS_MAX: usize = 3;

/// Longest name of an image, bytes: a repository and a tag.
const IMAGE_LEN_MAX: usize = 512;
/// Longest label, bytes.
const LABEL_LEN_MAX: usize = 64;
/// Longest encoded task, bytes.
pub const TASK_LEN_MAX: usize = 256 << 10;
/// Longest encoded poll, bytes: its tasks' states and reasons, every byte of which may be escaped.
pub const POLL_LEN_MAX: usize = 64 << 10;
/// Longest encoded answer to a poll, bytes.
pub const ORDERS_LEN_MAX: usize = ORDERS_MAX * TASK_LEN_MAX + 4096;
/// Longest encoded progress, bytes.
pub const PROGRESS_LEN_MAX: usize = 256 << 10;

/// The name of a task, drawn by the proxy that made it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Id(Uuid);

/// The text is no name of a task.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("is not the id of a preheat")]
pub struct IdError;

impl Id {
    /// A new one, that nobody can guess.
    pub fn draw() -> Self {
        Self(Uuid::new_v4())
    }
}

impl FromStr for Id {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let id = Uuid::try_parse(text).map(Self).map_err(|_| IdError)?;
        if id.to_string() == text { Ok(id) } else { Err(IdError) }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// What hosts are told apart by: 1 to 64 letters, digits and `-_.=/:`, such as `gpu` or `zone=a`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Label(Box<str>);

/// The text is no label.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a label is 1 to 64 letters, digits, '-', '_', '.', '=', '/' or ':'")]
pub struct LabelError;

impl FromStr for Label {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let sound = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.=/:".contains(&byte);
        let fits = (1..=LABEL_LEN_MAX).contains(&text.len());
        if fits && text.bytes().all(sound) { Ok(Self(text.into())) } else { Err(LabelError) }
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Label {
    type Error = LabelError;

    fn try_from(text: String) -> Result<Self, LabelError> {
        text.parse()
    }
}

impl From<Label> for String {
    fn from(label: Label) -> Self {
        label.0.into()
    }
}

/// An image, or anything else made of blobs, that hosts are to hold.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Task {
    /// Its name.
    #[serde(with = "text")]
    pub id: Id,
    /// What people call it.
    pub image: String,
    /// The namespace of its blobs.
    #[serde(with = "text")]
    pub namespace: Namespace,
    /// All that has to be there.
    pub blobs: Vec<Wanted>,
    /// Hosts with this label; all hosts without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Label>,
    /// How long it stands yet, milliseconds: relative, since clocks differ.
    pub left_ms: u64,
    /// A tracker that knows nothing of it is given it anew: hosts may have begun that the tracker has not heard of.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub again: bool,
}

/// One blob of a [`Task`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Wanted {
    /// Its digest.
    #[serde(with = "text")]
    pub digest: Digest,
    /// Its bytes, as the image says.
    pub size: u64,
}

/// A task that is beyond what is taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Invalid {
    /// Nothing to hold, or too much.
    #[error("a preheat has 1 to {BLOBS_MAX} blobs, not {0}")]
    Blobs(usize),
    /// The name of the image.
    #[error("the name of an image has at most {IMAGE_LEN_MAX} bytes, not {0}")]
    Image(usize),
    /// The life.
    #[error("a preheat stands for 1 ms to {max} s, not {0} ms", max = LIFE_MAX.as_secs())]
    Life(u64),
}

impl Task {
    /// The same, if it is within bounds.
    pub fn checked(self) -> Result<Self, Invalid> {
        if !(1..=BLOBS_MAX).contains(&self.blobs.len()) {
            return Err(Invalid::Blobs(self.blobs.len()));
        }
        if self.image.len() > IMAGE_LEN_MAX {
            return Err(Invalid::Image(self.image.len()));
        }
        if self.left_ms == 0 || self.left() > LIFE_MAX {
            return Err(Invalid::Life(self.left_ms));
        }
        Ok(self)
    }

    /// How long it stands yet.
    pub fn left(&self) -> Duration {
        Duration::from_millis(self.left_ms)
    }

    /// Bytes that a host holds in the end.
    pub fn bytes(&self) -> u64 {
        self.blobs.iter().fold(0, |sum, blob| sum.saturating_add(blob.size))
    }

    /// Whether a host with these labels is meant.
    pub fn is_for(&self, labels: &[Label]) -> bool {
        self.label.as_ref().is_none_or(|label| labels.contains(label))
    }
}

/// What an agent tells a tracker: who it is, and how far it has come.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Poll {
    /// The host, by the address that peers reach it at: it stays the same when the agent starts again.
    pub host: SocketAddr,
    /// Its labels.
    #[serde(default)]
    pub labels: Vec<Label>,
    /// The tasks it knows.
    #[serde(default)]
    pub reports: Vec<Report>,
}

/// How far a host has come with one task.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The task.
    #[serde(with = "text")]
    pub id: Id,
    /// In a word.
    #[serde(flatten)]
    pub state: State,
    /// Bytes of it that are there and proven.
    pub bytes: u64,
}

/// How a host stands with a task.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum State {
    /// Every blob is in its store, whole and proven, as looked up for this report.
    Holding,
    /// On its way.
    Working,
    /// It does not hold all of it, and has stopped trying.
    Failed {
        /// Why.
        why: String,
    },
}

/// What a tracker tells an agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Orders {
    /// When to ask again.
    pub interval_ms: u64,
    /// Tasks that the agent did not name.
    pub tasks: Vec<Task>,
}

/// How far a task has come, as one tracker knows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// The task.
    #[serde(with = "text")]
    pub id: Id,
    /// What people call what is brought.
    pub image: String,
    /// Whom it is for; all hosts without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Label>,
    /// Blobs that each host is to hold.
    pub blobs: usize,
    /// Bytes that each host is to hold.
    pub bytes: u64,
    /// Hosts it is for: those that are known now, and those that have reported and are silent since.
    pub hosts: usize,
    /// Hosts that hold all of it, by what they found in their stores for their last report.
    pub holding: usize,
    /// Hosts that download.
    pub working: usize,
    /// Hosts that have not reported yet.
    pub waiting: usize,
    /// Hosts that have stopped trying, or fell silent.
    pub failed: usize,
    /// Bytes on all hosts.
    pub bytes_held: u64,
    /// Some of the hosts that failed.
    pub failures: Vec<Failure>,
    /// Whether the tracker has been there for long enough to know all hosts.
    pub settled: bool,
    /// How old the oldest report is that is counted here, milliseconds.
    pub oldest_report_ms: u64,
    /// How long the task stands yet, milliseconds.
    pub left_ms: u64,
}

/// A host that does not hold what it should.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// The host.
    pub host: SocketAddr,
    /// Why.
    pub why: String,
}

impl Progress {
    /// Whether every host has said its last word.
    pub fn is_over(&self) -> bool {
        self.settled && self.waiting == 0 && self.working == 0
    }

    /// Whether it is certain that every host, and at least one, holds all of it.
    pub fn is_proven(&self) -> bool {
        self.is_over() && self.hosts > 0 && self.holding == self.hosts
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} hosts hold all layers", self.holding, self.hosts)
    }
}

/// A reason within bounds.
pub fn reason(text: &str) -> String {
    let mut text: String = text.chars().filter(|c| !c.is_control()).take(REASON_LEN_MAX).collect();
    text.truncate(text.floor_char_boundary(REASON_LEN_MAX));
    text
}

/// A field as its text.
mod text {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use std::{fmt::Display, str::FromStr};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_words_have_their_json() {
        let id = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f0";
        let digest = format!("sha256:{}", "07".repeat(32));
        let task = json!({
            "id": id, "image": "lib/app:1", "namespace": "lib/app", "blobs": [{"digest": digest, "size": 5}],
            "label": "zone=a", "left_ms": 1000,
        });
        let read: Task = serde_json::from_value(task.clone()).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), task);
        let poll = json!({
            "host": "10.0.0.1:16001", "labels": ["gpu", "zone=a"],
            "reports": [{"id": id, "state": "failed", "why": "no space", "bytes": 3}, {"id": id, "state": "holding", "bytes": 5}],
        });
        let read: Poll = serde_json::from_value(poll.clone()).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), poll);
        for (field, wrong) in
            [("id", json!("7")), ("id", json!(id.to_uppercase())), ("label", json!("a b")), ("namespace", json!(""))]
        {
            let mut task = task.clone();
            task[field] = wrong.clone();
            assert!(serde_json::from_value::<Task>(task).is_err(), "{field} {wrong}");
        }
    }

    #[test]
    fn tasks_have_bounds() {
        let blob = Wanted { digest: Digest::sha256([7; 32]), size: u64::MAX };
        let task = Task {
            id: Id::draw(),
            image: "i".repeat(IMAGE_LEN_MAX),
            namespace: "lib/app".parse().unwrap(),
            blobs: vec![blob.clone(); BLOBS_MAX],
            label: Some("l".repeat(LABEL_LEN_MAX).parse().unwrap()),
            left_ms: 24 * 60 * 60 * 1000,
            again: false,
        };
        assert_eq!(task.clone().checked(), Ok(task.clone()));
        assert_eq!(task.bytes(), u64::MAX);
        let long = Wanted { digest: format!("sha512:{}", "0".repeat(128)).parse().unwrap(), size: u64::MAX };
        let longest = Task { blobs: vec![long; BLOBS_MAX], ..task.clone() };
        assert!(serde_json::to_vec(&longest).unwrap().len() < TASK_LEN_MAX);
        let refused = |task: Task| task.checked().unwrap_err();
        assert_eq!(refused(Task { blobs: vec![], ..task.clone() }), Invalid::Blobs(0));
        assert_eq!(refused(Task { blobs: vec![blob; BLOBS_MAX + 1], ..task.clone() }), Invalid::Blobs(BLOBS_MAX + 1));
        assert_eq!(refused(Task { image: "i".repeat(513), ..task.clone() }), Invalid::Image(513));
        assert_eq!(refused(Task { left_ms: 0, ..task.clone() }), Invalid::Life(0));
        assert_eq!(refused(Task { left_ms: u64::MAX, ..task }), Invalid::Life(u64::MAX));
        assert!("l".repeat(LABEL_LEN_MAX + 1).parse::<Label>().is_err() && "".parse::<Label>().is_err());
    }

    #[test]
    fn the_longest_reports_fit() {
        let why = reason(&"\u{10ffff}\n".repeat(1000));
        assert!(why.len() <= REASON_LEN_MAX);
        let report = Report { id: Id::draw(), state: State::Failed { why }, bytes: u64::MAX };
        let poll = Poll {
            host: "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap(),
            labels: vec!["l".repeat(LABEL_LEN_MAX).parse().unwrap(); LABELS_MAX],
            reports: vec![report; TASKS_MAX],
        };
        assert!(serde_json::to_vec(&poll).unwrap().len() < POLL_LEN_MAX);
    }
}
