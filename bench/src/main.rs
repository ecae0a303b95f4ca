//! Shoal's harness: saturation, real swarms with shaped links, simulated swarms.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "made-up test data"))]

mod process;
mod registry;
mod rows;
mod saturate;
mod sim;
mod swarm;
mod tracker;

use clap::Parser as _;
use std::process::ExitCode;

/// Measures Shoal, and models it.
#[derive(clap::Parser)]
#[command(name = "shoal-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Simulate a swarm in virtual time.
    Sim(sim::Args),
    /// Drive one node to its limit, beside the raw limits for the same bytes.
    Saturate(saturate::Args),
    /// Run a real swarm behind shaped links, beside the same in the simulator.
    Swarm(swarm::Args),
    /// Push to and pull from a cluster, beside docker-registry, nginx and plain writes.
    Registry(registry::Args),
    /// Load a tracker with the announces of many hosts.
    Tracker(tracker::Args),
    #[command(hide = true)]
    Role(saturate::RoleArgs),
    #[command(hide = true)]
    Inside(swarm::InsideArgs),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Sim(args) => sim::run(&args),
        Command::Saturate(args) => saturate::run(&args),
        Command::Swarm(args) => swarm::run(&args),
        Command::Registry(args) => registry::run(&args),
        Command::Tracker(args) => tracker::run(&args),
        Command::Role(args) => saturate::role(&args),
        Command::Inside(args) => swarm::inside(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shoal-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
