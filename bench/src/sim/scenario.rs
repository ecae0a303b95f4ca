//! The scenarios by name: hosts, blobs, who pulls what when, and what goes wrong.

use super::{
    Rng,
    world::{Group, HostPlan, Network, Plan, Pull, SECOND, Tuning},
};
use clap::ValueEnum;

/// What is simulated. Sizes are defaults; flags change them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Scenario {
    /// Kraken's published run: 2,600 hosts, 2 blobs of 1.5 GB, 300 MB/s, 5 origins.
    KrakenPaper,
    /// 8,000 hosts, one blob of 1.5 GB.
    #[value(name = "cold-8000")]
    Cold8000,
    /// 15,000 hosts, one blob of 1.5 GB.
    #[value(name = "cold-15000")]
    Cold15000,
    /// 100 GB to 10,000 hosts.
    HugeBlob,
    /// 20,000 downloads of 100 MB to 1 GB over 8,000 hosts, begun within 10 s; 100 blobs, 20 origins.
    PeakHour,
    /// A small image to everyone at once.
    Flash,
    /// A tenth of the hosts joins when the others are half done; their times count.
    LateJoiners,
    /// Four zones, origins in one, ten hosts' rate into each.
    Zones,
    /// One host with a twentieth of the rate; the others' times count.
    OneSlowHost,
    /// 5 % of the hosts die on the way, without a word.
    Churn,
    /// 1 % of the hosts send wrong pieces.
    Liars,
    /// One of the origins dies at 30 %, without a word.
    OriginDies,
    /// Hosts join in twenty waves, two seconds apart.
    RollingUpdate,
    /// Every host has a reader that consumes the blob in order at the link rate.
    Streaming,
}

/// Sizes, where they differ from the scenario's own.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sizes {
    pub(crate) hosts: Option<u32>,
    pub(crate) blob: Option<u64>,
    pub(crate) blobs: Option<u16>,
    pub(crate) rate: Option<u64>,
    pub(crate) origins: Option<u32>,
    pub(crate) piece: Option<u32>,
}

const MB: u64 = 1_000_000;

impl Scenario {
    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::KrakenPaper => "kraken-paper",
            Self::Cold8000 => "cold-8000",
            Self::Cold15000 => "cold-15000",
            Self::HugeBlob => "huge-blob",
            Self::PeakHour => "peak-hour",
            Self::Flash => "flash",
            Self::LateJoiners => "late-joiners",
            Self::Zones => "zones",
            Self::OneSlowHost => "one-slow-host",
            Self::Churn => "churn",
            Self::Liars => "liars",
            Self::OriginDies => "origin-dies",
            Self::RollingUpdate => "rolling-update",
            Self::Streaming => "streaming",
        }
    }

    fn hosts(self) -> u32 {
        match self {
            Self::Cold8000 | Self::PeakHour | Self::Flash => 8_000,
            Self::Cold15000 => 15_000,
            Self::HugeBlob => 10_000,
            _ => 2_600,
        }
    }

    fn blob(self) -> u64 {
        match self {
            Self::HugeBlob => 100_000 * MB,
            Self::Flash => 30 * MB,
            Self::PeakHour => 550 * MB,
            _ => 1_500 * MB,
        }
    }

    fn blobs(self) -> u16 {
        match self {
            Self::KrakenPaper => 2,
            Self::PeakHour => 100,
            _ => 1,
        }
    }

    fn origins(self) -> u32 {
        if self == Self::PeakHour { 20 } else { 5 }
    }

    /// Everything the run depends on.
    pub(crate) fn plan(self, sizes: Sizes, seed: u64, network: Network, tuning: Tuning) -> Plan {
        let mut rng = Rng::new(seed);
        let hosts = sizes.hosts.unwrap_or_else(|| self.hosts());
        let blob = sizes.blob.unwrap_or_else(|| self.blob());
        let blobs = sizes.blobs.unwrap_or_else(|| self.blobs()).max(1);
        let rate = sizes.rate.unwrap_or(300 * MB);
        let origins = sizes.origins.unwrap_or_else(|| self.origins()).max(1);

        let host = |origin| HostPlan { up: rate, down: rate, zone: 0, origin, liar: false, dies_at: None };
        let mut all: Vec<HostPlan> = (0..origins).map(|_| host(true)).collect();
        all.extend((0..hosts).map(|_| host(false)));

        let lengths: Vec<u64> = match self {
            // Evenly from 100 MB to 1 GB where the mean is 550 MB.
            Self::PeakHour => (0..u64::from(blobs)).map(|_| blob * 2 / 11 + rng.below(blob * 18 / 11)).collect(),
            _ => vec![blob; usize::from(blobs)],
        };
        let ideal_of = |blobs: &[u16]| {
            let bytes: u64 = blobs.iter().map(|blob| lengths[usize::from(*blob)]).sum();
            u64::try_from(u128::from(bytes) * u128::from(SECOND) / u128::from(rate)).unwrap_or(u64::MAX)
        };
        let whole: Vec<u16> = (0..blobs).collect();
        let ideal = ideal_of(&whole);
        let pull = |host: u32, at: u64, blobs: Vec<u16>| {
            let ideal = ideal_of(&blobs);
            Pull { host: origins + host, at, blobs, reader: None, ideal, group: Group::Counted }
        };

        // Everybody joins within 0.1 s, unless the scenario says otherwise.
        let mut pulls: Vec<Pull> = match self {
            Self::PeakHour => {
                let number = hosts * 5 / 2;
                let mut taken = std::collections::BTreeSet::new();
                let mut pulls = Vec::new();
                while pulls.len() < number as usize && taken.len() < hosts as usize * usize::from(blobs) {
                    let (host, blob) = (rng.below_u32(hosts), rng.below_u16(blobs));
                    if taken.insert((host, blob)) {
                        pulls.push(pull(host, rng.below(10 * SECOND), vec![blob]));
                    }
                }
                pulls
            }
            Self::RollingUpdate => (0..hosts)
                .map(|n| pull(n, u64::from(n % 20) * 2 * SECOND + rng.below(SECOND / 10), whole.clone()))
                .collect(),
            _ => (0..hosts).map(|n| pull(n, rng.below(SECOND / 10), whole.clone())).collect(),
        };
        let mut zone_rate = None;
        match self {
            Self::LateJoiners => {
                for pull in &mut pulls {
                    if rng.below(10) == 0 {
                        pull.at = ideal / 2 + rng.below(SECOND / 10);
                    } else {
                        pull.group = Group::Apart;
                    }
                }
            }
            Self::Zones => {
                zone_rate = Some(10 * rate);
                (0u16..).zip(all.iter_mut().skip(origins as usize)).for_each(|(n, host)| host.zone = n % 4);
            }
            Self::OneSlowHost => {
                let slow = &mut all[origins as usize + hosts as usize / 2];
                (slow.up, slow.down) = (rate / 20, rate / 20);
                pulls[hosts as usize / 2].group = Group::Apart;
            }
            Self::Churn => {
                for host in all.iter_mut().skip(origins as usize) {
                    if rng.below(20) == 0 {
                        host.dies_at = Some(ideal / 5 + rng.below(ideal * 3 / 5));
                    }
                }
            }
            Self::Liars => {
                for host in all.iter_mut().skip(origins as usize) {
                    host.liar = rng.below(100) == 0;
                }
            }
            Self::OriginDies => all[0].dies_at = Some(ideal * 3 / 10),
            Self::Streaming => pulls.iter_mut().for_each(|pull| pull.reader = Some(rate)),
            _ => {}
        }
        let last = pulls.iter().map(|pull| pull.at + 20 * pull.ideal.max(ideal)).max().unwrap_or(0);
        Plan {
            seed,
            hosts: all,
            blobs: lengths,
            piece: sizes.piece,
            pulls,
            network,
            zone_rate,
            replicas: if self == Self::PeakHour { 3 } else { origins as usize },
            tuning,
            end: last + 60 * SECOND,
        }
    }
}
