//! `shoal-bench sim`: whole swarms in virtual time, over the cores that ship.

mod report;
mod scenario;
mod world;

use anyhow::{Context as _, bail};
use report::Report;
use scenario::{Scenario, Sizes};
use std::{path::PathBuf, time::Instant};
use world::{Network, Tuning, World};

/// Simulates a swarm and prints how close to the network's limit it came. Same flags, same result, bit for bit.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// What to simulate.
    scenario: Scenario,
    /// Downloading hosts.
    #[arg(long)]
    hosts: Option<u32>,
    /// Length of each blob, such as 1500MB or 1GiB; of the mean blob in peak-hour.
    #[arg(long, value_parser = size)]
    blob: Option<u64>,
    /// Number of blobs.
    #[arg(long)]
    blobs: Option<u16>,
    /// Rate of each host's uplink and downlink, such as 300MB/s or 10Gbit.
    #[arg(long, value_parser = rate)]
    rate: Option<u64>,
    /// Origins, of the same rate.
    #[arg(long)]
    origins: Option<u32>,
    /// Piece length, such as 4MiB; as the layout chooses unless given.
    #[arg(long, value_parser = piece)]
    piece: Option<u32>,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Latency one way, microseconds.
    #[arg(long, default_value_t = 500)]
    latency_us: u64,
    /// Time to prove and store a piece, microseconds.
    #[arg(long, default_value_t = 500)]
    proof_us: u64,
    /// Have connections share links, as TCP's do, each link with a queue of so many bytes, such as 256KiB, that is full while it is
    /// busy; unless given, a link takes one piece at a time.
    #[arg(long, value_parser = size)]
    queue: Option<u64>,
    /// Try another number of peers aimed at.
    #[arg(long)]
    degree: Option<u16>,
    /// Try another number of requests at one peer.
    #[arg(long)]
    per_peer: Option<u16>,
    /// Try another number of requests in all.
    #[arg(long)]
    in_flight: Option<u16>,
    /// Try another shortest window of requests with readers, pieces.
    #[arg(long)]
    window_min: Option<u32>,
    /// Try another exponent towards short windows.
    #[arg(long)]
    window_exponent: Option<u8>,
    /// The same for requests to origins.
    #[arg(long)]
    origin_exponent: Option<u8>,
    /// Try another percentage of requests for a reader's next piece.
    #[arg(long)]
    head_percent: Option<u8>,
    /// The same of requests to origins.
    #[arg(long)]
    origin_head_percent: Option<u8>,
    /// Write the figures as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write every download's times as CSV.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Draw the completion curve as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
}

/// Runs a scenario; an error where a download did not end or a wrong piece was taken.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let sizes = Sizes {
        hosts: args.hosts,
        blob: args.blob,
        blobs: args.blobs,
        rate: args.rate,
        origins: args.origins,
        piece: args.piece,
    };
    let tuning = Tuning {
        degree: args.degree,
        per_peer: args.per_peer,
        in_flight: args.in_flight,
        window_min: args.window_min,
        window_exponent: args.window_exponent,
        origin_exponent: args.origin_exponent,
        head_percent: args.head_percent,
        origin_head_percent: args.origin_head_percent,
    };
    let network = Network { latency: args.latency_us * 1000, proof: args.proof_us * 1000, queue: args.queue };
    let plan = args.scenario.plan(sizes, args.seed, network, tuning);
    if plan.zone_rate.is_some() && network.queue.is_some() {
        bail!("the link into a zone is not modelled as one that connections share: leave out --queue");
    }
    let begun = Instant::now();
    let outcome = World::new(plan.clone())?.run();
    let report = Report::new(args.scenario, &plan, &outcome);
    print!("{}", report.text());
    println!("{:<18} {:.1} s, {} MiB at most", "simulated in", begun.elapsed().as_secs_f64(), peak_mib());
    let files =
        [(&args.json, report.json()), (&args.csv, report::csv(&outcome)), (&args.plot, report::svg(&report, &outcome))];
    for (path, text) in files {
        if let Some(path) = path {
            std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        }
    }
    if report.unfinished > 0 || report.wrong_pieces_accepted > 0 {
        let command: Vec<String> = std::env::args().skip(1).collect();
        bail!(
            "{} downloads unfinished, {} wrong pieces accepted; replay: shoal-bench {} --seed {}",
            report.unfinished,
            report.wrong_pieces_accepted,
            command.join(" "),
            args.seed
        );
    }
    Ok(())
}

/// The process's largest resident size, where the kernel tells.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn number_and_unit(text: &str) -> Result<(f64, &str), String> {
    let unit = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number = text[..unit].parse().map_err(|_| format!("{text:?} does not begin with a number"))?;
    Ok((number, text[unit..].trim()))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be within bounds")]
fn whole(value: f64) -> Result<u64, String> {
    if (1.0..1e18).contains(&value) { Ok(value.round() as u64) } else { Err(format!("{value} is out of bounds")) }
}

/// A number of bytes with its unit.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = number_and_unit(text)?;
    let factor = match unit {
        "" | "B" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KiB" => 1024.0,
        "MiB" => 1048576.0,
        "GiB" => 1073741824.0,
        _ => return Err(format!("{unit:?} is no unit of size")),
    };
    whole(number * factor)
}

fn piece(text: &str) -> Result<u32, String> {
    u32::try_from(size(text)?).map_err(|error| error.to_string())
}

/// Bytes a second, with their unit.
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    if let Some(bytes) = text.strip_suffix("/s") {
        return size(bytes);
    }
    let (number, unit) = number_and_unit(text)?;
    match unit {
        "Mbit" => whole(number * 1e6 / 8.0),
        "Gbit" => whole(number * 1e9 / 8.0),
        _ => Err(format!("{unit:?} is no unit of rate")),
    }
}

/// SplitMix64's output function.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The scenario's own chance, apart from the hosts'.
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        Self(mix(seed ^ 0x5ca1_ab1e))
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        u64::try_from((u128::from(mix(self.0)) * u128::from(n)) >> 64).unwrap_or(0)
    }

    fn below_u32(&mut self, n: u32) -> u32 {
        u32::try_from(self.below(u64::from(n))).unwrap_or(0)
    }

    fn below_u16(&mut self, n: u16) -> u16 {
        u16::try_from(self.below(u64::from(n))).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
