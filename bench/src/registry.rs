//! The registries of a cluster, as their clients see them: a push until it is durable, pulls that are hot and cold, ranges, small
//! requests; beside Debian's docker-registry, nginx, plain writes of the same bytes, and figures measured of Kraken and Dragonfly.
//!
//! The cluster is real: each role a process of its own, on loopback. Runs alternate between all that are compared, so that a machine
//! whose speed drifts drifts for all; the table shows medians, their ratio, and the best run in the note.

mod client;
mod servers;
mod table;

use anyhow::{Context, Result};
use std::path::PathBuf;

/// `shoal-bench registry`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Bytes of the large blob.
    #[arg(long, default_value = "1GB", value_parser = crate::sim::size)]
    blob: u64,
    /// Counted runs of each side; one more warms up. Pushes are run three times at most.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Only these cases.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<table::Case>,
    /// A blob of 32 MiB and one run of each: whether everything works, in seconds. The figures mean nothing.
    #[arg(long, conflicts_with_all = ["blob", "runs"])]
    quick: bool,
    /// The `shoal` to start; the one beside this program unless given.
    #[arg(long)]
    shoal: Option<PathBuf>,
    /// Where blobs are put, some 15 times the large one's bytes; a folder below it is made and removed.
    #[arg(long, default_value = "/tmp")]
    dir: PathBuf,
    /// Leave the folder with logs for a look at them.
    #[arg(long)]
    keep: bool,
    /// Write rows of `case`, `ours`, `against`, `ratio` here.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Runs the cases and prints their table.
pub(crate) fn run(args: &Args) -> Result<()> {
    let dir = args.dir.join(format!("shoal-registry-{}", std::process::id()));
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let measured = table::measure(args, &dir);
    if args.keep {
        println!("logs are in {}", dir.display());
    } else {
        std::fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    crate::rows::show(&measured?, args.json.as_deref())
}
