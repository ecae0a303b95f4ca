//! `shoal doctor`: what this machine is like for a storage node, and what to change.

use super::say;
use crate::config::Raw;
use clap::Args;
use std::{
    fmt::Write as _,
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
};

/// Descriptors that a node with a thousand peers and as many open blobs is at ease with.
const FILES_MIN: u64 = 16_384;
/// Locked memory that rings took before Linux 5.12, bytes.
const MEMLOCK_MIN: u64 = 8 << 20;
/// The oldest kernel that the data path was measured on.
const KERNEL_MIN: (u32, u32) = (5, 15);
/// Receive buffer that lets a socket gather a piece of 1 MiB before it wakes anybody, bytes.
const RECEIVE_MIN: u64 = 4 << 20;

/// `shoal doctor`
#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// The configuration file whose data directory is looked at
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the node keeps its blobs; stands over the file
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl Doctor {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let raw = match &self.config {
            Some(path) => Raw::read(path)?,
            None => Raw::default(),
        };
        let data_dir = self.data_dir.unwrap_or(raw.data_dir);
        let mut text = String::new();
        for Finding { what, is, advice } in judge(&Facts::gather(&data_dir), raw.engine.mmap) {
            let mark = if advice.is_some() { "warn" } else { "ok" };
            writeln!(text, "{mark:<5} {what:<20} {is}")?;
            if let Some(advice) = advice {
                writeln!(text, "{:<26} {advice}", "")?;
            }
        }
        say(&text)
    }
}

/// What was found out; none of what the machine does not tell.
#[derive(Debug, Default)]
struct Facts {
    driver: Option<engine::handle::DriverHere>,
    kernel: Option<String>,
    cores: Option<usize>,
    files_max: Option<Limit>,
    memlock_max: Option<Limit>,
    congestion: Option<String>,
    receive_max: Option<u64>,
    data_dir: PathBuf,
    /// Whether the directory, or the nearest above it that is there, can be written to.
    writable: Option<bool>,
    file_system: Option<String>,
}

/// A limit of the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Limit {
    Of(u64),
    Unlimited,
}

impl Limit {
    fn below(self, least: u64) -> bool {
        matches!(self, Self::Of(limit) if limit < least)
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Of(limit) => write!(f, "{limit}"),
            Self::Unlimited => f.write_str("unlimited"),
        }
    }
}

/// One thing looked at.
#[derive(PartialEq, Eq, Debug)]
struct Finding {
    what: &'static str,
    is: String,
    /// What to change, where something should be.
    advice: Option<&'static str>,
}

impl Facts {
    fn gather(data_dir: &Path) -> Self {
        let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let limits = read("/proc/self/limits").unwrap_or_default();
        let there = existing(data_dir);
        Self {
            driver: Some(engine::handle::driver_here()),
            kernel: read("/proc/sys/kernel/osrelease"),
            cores: thread::available_parallelism().ok().map(usize::from),
            files_max: limit(&limits, "Max open files"),
            memlock_max: limit(&limits, "Max locked memory"),
            congestion: read("/proc/sys/net/ipv4/tcp_congestion_control"),
            receive_max: read("/proc/sys/net/ipv4/tcp_rmem")
                .and_then(|text| text.split_whitespace().nth(2)?.parse().ok()),
            data_dir: data_dir.to_owned(),
            writable: there.as_deref().map(is_writable),
            file_system: there.zip(read("/proc/self/mountinfo")).and_then(|(dir, mounts)| file_system(&mounts, &dir)),
        }
    }
}

/// The directory, or the nearest one above it that is there.
fn existing(dir: &Path) -> Option<PathBuf> {
    std::path::absolute(dir).ok()?.ancestors().find_map(|dir| dir.canonicalize().ok())
}

fn is_writable(dir: &Path) -> bool {
    let probe = dir.join(format!(".shoal-doctor-{}", std::process::id()));
    let made = File::create_new(&probe).is_ok();
    // Nothing to be done where what was just made cannot be removed.
    made && fs::remove_file(&probe).is_ok()
}

/// The soft limit of a line of `/proc/self/limits`.
fn limit(limits: &str, name: &str) -> Option<Limit> {
    let soft = limits.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?;
    if soft == "unlimited" { Some(Limit::Unlimited) } else { soft.parse().ok().map(Limit::Of) }
}

/// The type of the file system that a path is on: the longest mount point above it.
fn file_system(mountinfo: &str, path: &Path) -> Option<String> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?.replace("\\040", " ");
        path.starts_with(&point).then(|| (point.len(), after.split(' ').next().unwrap_or_default().to_owned()))
    });
    // Of two on one point the later hides the earlier.
    mounts.max_by_key(|(len, _)| *len).map(|(_, kind)| kind)
}

/// Major and minor of `6.18.44-generic`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn judge(facts: &Facts, mmap: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut found = |what, is: Option<String>, advice: Option<&'static str>| {
        findings.push(Finding { what, is: is.unwrap_or_else(|| "unknown".to_owned()), advice });
    };
    let ring = facts.driver.as_ref().is_none_or(|driver| driver.io_uring);
    let driver = facts.driver.as_ref();
    found(
        "driver",
        driver.map(|here| format!("{}: {}", if here.io_uring { "io_uring" } else { "epoll" }, here.reason)),
        (!ring).then_some("works as well; to have io_uring: kernel.io_uring_disabled=0, and allow io_uring_setup, _enter and _register in the container's seccomp profile"),
    );
    let old = facts.kernel.as_deref().and_then(version).is_some_and(|version| version < KERNEL_MIN);
    found("kernel", facts.kernel.clone(), old.then_some("5.15 or later is what the data path was measured on"));
    found("cores", facts.cores.map(|cores| format!("{cores}, by affinity and cgroup quota")), None);
    found(
        "open files",
        facts.files_max.map(|limit| limit.to_string()),
        facts.files_max.is_some_and(|limit| limit.below(FILES_MIN)).then_some(
            "LimitNOFILE=65536 in the unit, or ulimit -n 65536: a descriptor for each peer and each open blob",
        ),
    );
    let rings_lock = facts.kernel.as_deref().and_then(version).is_some_and(|version| version < (5, 12));
    found(
        "locked memory",
        facts.memlock_max.map(|limit| format!("{limit} bytes")),
        facts
            .memlock_max
            .is_some_and(|limit| ring && rings_lock && limit.below(MEMLOCK_MIN))
            .then_some("LimitMEMLOCK=8M in the unit: before Linux 5.12 rings are counted against it"),
    );
    found(
        "congestion control",
        facts.congestion.clone(),
        facts.congestion.as_deref().is_some_and(|name| name == "bbr").then_some(
            "net.ipv4.tcp_congestion_control=cubic, or dctcp where switches mark: bbr halves what a loopback or a short fast path carries",
        ),
    );
    found(
        "receive buffer",
        facts.receive_max.map(|bytes| format!("{bytes} bytes at most")),
        facts.receive_max.is_some_and(|bytes| bytes < RECEIVE_MIN).then_some(
            "net.ipv4.tcp_rmem=\"4096 131072 33554432\": a socket is to hold a piece before it wakes the node",
        ),
    );
    found(
        "data directory",
        Some(facts.data_dir.display().to_string()),
        facts.writable.is_none_or(|writable| !writable).then_some("cannot be written to by this user"),
    );
    let kind = facts.file_system.as_deref().unwrap_or_default();
    let unsafe_to_map =
        kind.starts_with("fuse") || matches!(kind, "cifs" | "smb3" | "zfs" | "btrfs" | "9p" | "virtiofs");
    found(
        "file system",
        facts.file_system.clone(),
        match kind {
            "tmpfs" | "ramfs" => Some("is memory: blobs compete with processes, and are gone after a reboot"),
            "overlay" => Some("is a container's layer: mount a volume for the data directory"),
            "nfs" | "nfs4" => Some("is remote: use a local disk, or at least engine.mmap = false"),
            _ if unsafe_to_map && mmap => {
                Some("set engine.mmap = false: its mappings and writes are not always coherent")
            }
            _ => None,
        },
    );
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advice(facts: &Facts, what: &str) -> Option<&'static str> {
        judge(facts, true).into_iter().find(|finding| finding.what == what).unwrap().advice
    }

    #[test]
    fn a_sound_machine_gets_no_advice_and_a_poor_one_all_of_it() {
        let here = |io_uring| Some(engine::handle::DriverHere { io_uring, reason: "tried".to_owned() });
        let sound = Facts {
            driver: here(true),
            kernel: Some("6.18.44".to_owned()),
            cores: Some(2),
            files_max: Some(Limit::Of(1 << 20)),
            memlock_max: Some(Limit::Of(65_536)),
            congestion: Some("cubic".to_owned()),
            receive_max: Some(32 << 20),
            data_dir: "/var/lib/shoal".into(),
            writable: Some(true),
            file_system: Some("xfs".to_owned()),
        };
        assert!(judge(&sound, true).iter().all(|finding| finding.advice.is_none()));
        let poor = Facts {
            driver: here(true),
            kernel: Some("5.4.0-150-generic".to_owned()),
            files_max: Some(Limit::Of(1024)),
            congestion: Some("bbr".to_owned()),
            receive_max: Some(212_992),
            writable: Some(false),
            file_system: Some("fuse.mergerfs".to_owned()),
            ..sound
        };
        let without: Vec<_> = judge(&poor, true).into_iter().filter(|f| f.advice.is_none()).map(|f| f.what).collect();
        assert_eq!(without, ["driver", "cores"]);
        assert!(advice(&Facts { driver: here(false), ..poor }, "driver").is_some());
    }

    #[test]
    fn proc_files_are_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1024                 524288               files     \n\
                      Max locked memory         unlimited            unlimited            bytes     \n";
        assert_eq!(limit(limits, "Max open files"), Some(Limit::Of(1024)));
        assert_eq!(limit(limits, "Max locked memory"), Some(Limit::Unlimited));
        assert_eq!(limit(limits, "Max nothing"), None);
        let mounts = "22 1 8:1 / / rw - ext4 /dev/root rw\n30 22 0:2 / /var/lib rw shared:1 - xfs /dev/sdb rw\n";
        assert_eq!(file_system(mounts, Path::new("/var/lib/shoal")).as_deref(), Some("xfs"));
        assert_eq!(file_system(mounts, Path::new("/var/library")).as_deref(), Some("ext4"));
        assert_eq!(version("6.18.44-generic"), Some((6, 18)));
    }

    #[test]
    fn this_machine_is_looked_at_without_harm() {
        let dir = tempfile::TempDir::new().unwrap();
        let facts = Facts::gather(&dir.path().join("not/there/yet"));
        assert_eq!(facts.writable, Some(true));
        assert!(facts.file_system.is_some() && facts.files_max.is_some() && facts.kernel.is_some());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(judge(&facts, true).len() >= 9);
    }
}
