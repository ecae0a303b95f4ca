//! The figures, beside the simulator's for the same swarm.

use super::{Args, fabric, hosts::Swarm};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::{fmt::Write as _, path::Path, process::Command};

/// Multiples of the ideal.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Spread {
    p50: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let n = values.len();
        // The smallest value that at least this share of all does not pass.
        let at = |per_mille: usize| values.get((n * per_mille).div_ceil(1000).max(1) - 1).copied().unwrap_or(f64::NAN);
        Self { p50: at(500), p99: at(990), p999: at(999), max: at(1000) }
    }
}

/// What the simulator says of the same swarm: the fields of its JSON that have a counterpart here.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Simulated {
    multiples: Spread,
    reader_first: Spread,
    origin_copies: f64,
    tracker_requests: u64,
}

/// A run's figures.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    scenario: &'static str,
    hosts: u16,
    origins: u16,
    blob: u64,
    /// Bytes a second that a link carries for bare connections.
    payload_rate: f64,
    ideal_s: f64,
    /// To the last byte at the client on the host, which takes bytes as fast as they come.
    multiples: Spread,
    /// To the first.
    reader_first: Spread,
    origin_copies: f64,
    tracker_requests: f64,
    /// CPU seconds of agents and origins for each GB that was delivered.
    cpu_s_per_gb: f64,
    /// Share of the machine's cores that agents and origins had.
    busy: f64,
    agent_anon: u64,
    simulated: Simulated,
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn f(n: u64) -> f64 {
    n as f64
}

pub(crate) fn mega(bytes: f64) -> f64 {
    bytes / 1e6
}

/// Runs the same swarm in the simulator, over links of the rate that bare connections got out of these.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate, positive and far below 2^53")]
pub(crate) fn simulate(args: &Args, payload: f64, work: &Path) -> Result<Simulated> {
    let json = work.join("simulated.json");
    let out = Command::new(std::env::current_exe()?)
        .args(["sim", "streaming", "--latency-us", "50"])
        .args(["--hosts", &args.hosts.to_string(), "--origins", &args.origins.to_string()])
        .args(["--queue", &fabric::queue(args.rate).to_string()])
        .args(["--rate", &format!("{}B/s", payload as u64), "--blob", &args.blob.to_string()])
        .args(["--seed", &args.seed.to_string(), "--json"])
        .arg(&json)
        .output()?;
    ensure!(out.status.success(), "simulator: {}", String::from_utf8_lossy(&out.stderr).trim());
    serde_json::from_slice(&std::fs::read(json)?).context("the simulator's figures")
}

impl Report {
    pub(crate) fn new(args: &Args, payload: f64, swarm: &Swarm, simulated: Simulated) -> Self {
        let ideal_s = f(args.blob) / payload;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            scenario: "swarm",
            hosts: args.hosts,
            origins: args.origins,
            blob: args.blob,
            payload_rate: payload,
            ideal_s,
            multiples: Spread::of(swarm.pulls.iter().map(|pull| pull.done_s / ideal_s).collect()),
            reader_first: Spread::of(swarm.pulls.iter().map(|pull| pull.first_s / ideal_s).collect()),
            origin_copies: swarm.origin_bytes / f(args.blob),
            tracker_requests: swarm.tracker_requests,
            cpu_s_per_gb: swarm.cpu_s / (f(args.blob) * f64::from(args.hosts) / 1e9),
            busy: swarm.cpu_s / swarm.wall_s / f(cores as u64),
            agent_anon: swarm.agent_anon,
            simulated,
        }
    }

    pub(crate) fn text(&self) -> String {
        let mut out = format!(
            "{} hosts, {} origins, {} MB, links that carry {:.2} MB/s: ideal {:.2} s\n\n{:<28} {:>8} {:>8} {:>8} {:>8}\n",
            self.hosts,
            self.origins,
            self.blob / 1_000_000,
            mega(self.payload_rate),
            self.ideal_s,
            "multiples of the ideal",
            "p50",
            "p99",
            "p99.9",
            "max"
        );
        let (real, sim) =
            ((&self.multiples, &self.reader_first), (&self.simulated.multiples, &self.simulated.reader_first));
        let ratio = Spread {
            p50: real.0.p50 / sim.0.p50,
            p99: real.0.p99 / sim.0.p99,
            p999: real.0.p999 / sim.0.p999,
            max: real.0.max / sim.0.max,
        };
        for (name, s) in [
            ("whole at the client", real.0),
            ("  simulated, on the disk", sim.0),
            ("  real ÷ simulated", &ratio),
            ("first byte at the client", real.1),
            ("  simulated (first piece)", sim.1),
        ] {
            let _ = writeln!(out, "{name:<28} {:>8.3} {:>8.3} {:>8.3} {:>8.3}", s.p50, s.p99, s.p999, s.max);
        }
        let _ = writeln!(
            out,
            "\norigin copies {:.2} (simulated {:.2}); announces {} (simulated {}); CPU {:.2} s per GB delivered, {:.0} % of the \
             cores; an agent's anonymous memory {} MiB at most",
            self.origin_copies,
            self.simulated.origin_copies,
            self.tracker_requests,
            self.simulated.tracker_requests,
            self.cpu_s_per_gb,
            100.0 * self.busy,
            self.agent_anon >> 20
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let s = Spread::of((1..=100).map(f64::from).collect());
        assert_eq!((s.p50, s.p99, s.p999, s.max), (50.0, 99.0, 100.0, 100.0));
    }
}
