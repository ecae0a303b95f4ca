//! Two ways of doing the same, run in turns, so that a machine whose speed drifts drifts for both.

use super::child::{Role, Usage};
use anyhow::Result;
use std::{
    fs::{self, File},
    io::Write,
    path::PathBuf,
};

/// One run: what the side that serves used, and the side that is served. Where only one side was measured the other is empty.
#[derive(Clone, Copy, Default)]
pub(crate) struct Run {
    pub(crate) sender: Usage,
    pub(crate) receiver: Usage,
}

impl Run {
    /// Has the receiver do its work while the sender's clock runs.
    pub(crate) fn together(warm: &Warm, sender: &mut Role, receiver: &mut Role) -> Result<Self> {
        warm.release()?;
        sender.mark()?;
        let receiver = receiver.run()?;
        Ok(Self { sender: sender.report()?, receiver })
    }

    /// A run without a sender.
    pub(crate) fn alone(receiver: Usage) -> Self {
        Self { receiver, ..Self::default() }
    }

    pub(crate) fn gb(&self) -> f64 {
        giga(self.receiver.bytes)
    }

    pub(crate) fn gb_per_s(&self) -> f64 {
        self.gb() / self.receiver.wall_s
    }

    pub(crate) fn sender_cpu(&self) -> f64 {
        self.sender.cpu_s() / self.gb()
    }

    pub(crate) fn receiver_cpu(&self) -> f64 {
        self.receiver.cpu_s() / self.gb()
    }

    pub(crate) fn cpu(&self) -> f64 {
        self.sender_cpu() + self.receiver_cpu()
    }

    /// For the log of a measurement.
    pub(crate) fn line(&self) -> String {
        let mib = (self.gb() * 1e9 / f64::from(1 << 20)).max(1.0);
        let per_mib = |n: u64| giga(n) * 1e9 / mib;
        let latency = self.receiver.latency.map_or_else(String::new, |latency| {
            format!(", ms p50 {:.2} p99 {:.2} p99.9 {:.2}", latency.p50, latency.p99, latency.p999)
        });
        format!(
            "{:.2} GB/s, CPU s/GB {:.2} (user {:.2}) + {:.2} (user {:.2}), calls/MiB {:.1} + {:.1}, switches/MiB {:.1} + {:.1}, anon {} + {} MiB{latency}",
            self.gb_per_s(),
            self.sender_cpu(),
            self.sender.user_s / self.gb(),
            self.receiver_cpu(),
            self.receiver.user_s / self.gb(),
            per_mib(self.sender.calls),
            per_mib(self.receiver.calls),
            per_mib(self.sender.switches),
            per_mib(self.receiver.switches),
            self.sender.anon >> 20,
            self.receiver.anon >> 20,
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn giga(n: u64) -> f64 {
    n as f64 / 1e9
}

/// Memory that a run may take without being the first to touch it. A virtual machine's free memory goes back to its host, and whoever
/// touches it next pays many times the copy into it; the kernel hands out first what was freed last. So a file as long as what the
/// run will write is written before it and removed at the moment it begins, for every side alike.
pub(crate) struct Warm {
    path: PathBuf,
    len: usize,
}

impl Warm {
    /// By files of `len` bytes at `path`.
    pub(crate) fn new(path: PathBuf, len: usize) -> Self {
        Self { path, len }
    }

    /// Before the run: takes the memory.
    pub(crate) fn gather(&self) -> Result<()> {
        const STEP: usize = 1 << 20;
        let mut file = File::create(&self.path)?;
        let chunk = vec![1; STEP];
        (0..self.len / STEP).try_for_each(|_| file.write_all(&chunk))?;
        Ok(())
    }

    /// The run begins now.
    pub(crate) fn release(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => Ok(other?),
        }
    }
}

/// How runs are made comparable.
pub(crate) struct Turns {
    /// Counted runs of each side; one more warms up.
    pub(crate) runs: usize,
    /// What is freed for each run.
    pub(crate) warm: Warm,
}

impl Turns {
    /// Runs every side in turn, with memory to write into; the counted runs of each.
    pub(crate) fn take<const N: usize>(
        &self,
        case: &str,
        names: [&str; N],
        mut run: impl FnMut(usize) -> Result<Run>,
    ) -> Result<[Runs; N]> {
        self.take_dry(case, names, |side| {
            self.warm.gather()?;
            run(side)
        })
    }

    /// As [`Self::take`], for what writes nothing.
    pub(crate) fn take_dry<const N: usize>(
        &self,
        case: &str,
        names: [&str; N],
        mut run: impl FnMut(usize) -> Result<Run>,
    ) -> Result<[Runs; N]> {
        let mut all = [(); N].map(|()| Runs(Vec::new()));
        for turn in 0..=self.runs {
            for (side, name) in names.iter().enumerate() {
                let done = run(side)?;
                let count = if turn == 0 { "warm-up".to_owned() } else { format!("run {turn}") };
                println!("{case:<16} {count:<8} {name:<14} {}", done.line());
                if turn > 0 {
                    all[side].0.push(done);
                }
            }
        }
        Ok(all)
    }
}

/// The counted runs of one side.
pub(crate) struct Runs(Vec<Run>);

impl Runs {
    /// The median of a figure.
    pub(crate) fn median(&self, figure: impl Fn(&Run) -> f64) -> f64 {
        let values = self.sorted(figure);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// The smallest and the largest of a figure.
    pub(crate) fn extremes(&self, figure: impl Fn(&Run) -> f64) -> (f64, f64) {
        let values = self.sorted(figure);
        (values.first().copied().unwrap_or(f64::NAN), values.last().copied().unwrap_or(f64::NAN))
    }

    fn sorted(&self, figure: impl Fn(&Run) -> f64) -> Vec<f64> {
        let mut values: Vec<f64> = self.0.iter().map(figure).collect();
        values.sort_by(f64::total_cmp);
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_alternate_and_the_first_does_not_count() {
        let mut order = Vec::new();
        let warm = Warm::new(std::env::temp_dir().join(format!("shoal-bench-{}", std::process::id())), 1 << 20);
        let turns = Turns { runs: 2, warm };
        let [left, right] = turns
            .take("case", ["left", "right"], |side| {
                order.push(side);
                let wall_s = order.len() as f64;
                Ok(Run::alone(Usage { wall_s, ..Usage::default() }))
            })
            .unwrap();
        turns.warm.release().unwrap();
        assert!(!turns.warm.path.exists());
        assert_eq!(order, [0, 1, 0, 1, 0, 1]);
        assert_eq!((left.median(|run| run.receiver.wall_s), right.median(|run| run.receiver.wall_s)), (5.0, 6.0));
    }
}
