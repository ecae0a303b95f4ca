//! Shoal's harness: saturation, real swarms with shaped links, simulated swarms.

#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "made-up test data"))]

mod sim;

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
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Sim(args) => sim::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shoal-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
