//! The two ends of a measurement as processes of their own, so that each one's CPU and memory are its own.
//!
//! The parent starts this binary again with a role. The child prints `ready WORDS` once it can be used, then answers one word
//! a line: `mark` starts its clock, `report` prints what it used since, `quit` or the end of its input ends it. A child that
//! does its work at once answers `run` with a report when done.

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

/// What a process used between two moments.
#[derive(Clone, Copy, Default, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Usage {
    /// Seconds on the clock.
    pub(crate) wall_s: f64,
    /// CPU seconds in user mode.
    pub(crate) user_s: f64,
    /// CPU seconds in the kernel.
    pub(crate) system_s: f64,
    /// Memory resident at the end, file pages aside, bytes.
    pub(crate) anon: u64,
    /// Times it was taken off a core, willing or not.
    pub(crate) switches: u64,
    /// Payload that it counted, bytes.
    pub(crate) bytes: u64,
    /// Sends and receives that it counted.
    pub(crate) calls: u64,
    /// From each request to its answer, where it counted them.
    pub(crate) latency: Option<Latency>,
}

/// Milliseconds from a request to the last byte of its answer.
#[derive(Clone, Copy, Default, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
}

impl Latency {
    /// Of samples in any order; none where there are none.
    pub(crate) fn of(mut samples: Vec<Duration>) -> Option<Self> {
        samples.sort_unstable();
        let at = |per_mille: usize| {
            let index = samples.len().checked_sub(1)? * per_mille / 1000;
            samples.get(index).map(|sample| sample.as_secs_f64() * 1e3)
        };
        Some(Self { p50: at(500)?, p99: at(990)?, p999: at(999)? })
    }
}

/// What a child moved so far.
#[derive(Clone, Default)]
pub(crate) struct Moved {
    pub(crate) bytes: u64,
    pub(crate) calls: u64,
    pub(crate) latency: Option<Latency>,
}

impl Moved {
    /// Payload and nothing else worth counting.
    pub(crate) fn bytes(bytes: u64) -> Self {
        Self { bytes, ..Self::default() }
    }
}

impl Usage {
    /// CPU seconds, user and kernel.
    pub(crate) fn cpu_s(&self) -> f64 {
        self.user_s + self.system_s
    }
}

/// The child's clock: started by `mark`, read by `report`.
struct Clock {
    started: Instant,
    user: Duration,
    system: Duration,
    switches: u64,
}

impl Clock {
    fn mark() -> Result<Self> {
        let (user, system, switches) = used()?;
        Ok(Self { started: Instant::now(), user, system, switches })
    }

    /// What was used since, while that much was moved.
    fn report(&self, moved: Moved) -> Result<Usage> {
        let wall_s = self.started.elapsed().as_secs_f64();
        let (user, system, switches) = used()?;
        Ok(Usage {
            wall_s,
            user_s: (user - self.user).as_secs_f64(),
            system_s: (system - self.system).as_secs_f64(),
            anon: resident_anon().unwrap_or(0),
            switches: switches - self.switches,
            bytes: moved.bytes,
            calls: moved.calls,
            latency: moved.latency,
        })
    }
}

fn used() -> Result<(Duration, Duration, u64)> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let duration = |t: nix::sys::time::TimeVal| -> Result<Duration> {
        Ok(Duration::new(u64::try_from(t.tv_sec())?, u32::try_from(t.tv_usec())? * 1000))
    };
    let switches = usage.voluntary_context_switches() + usage.involuntary_context_switches();
    Ok((duration(usage.user_time())?, duration(usage.system_time())?, u64::try_from(switches)?))
}

/// Memory of this process that no file stands behind, bytes.
fn resident_anon() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// As many descriptors as the machine lets this process have.
pub(crate) fn raise_descriptors() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// In the child: says it is ready and answers the parent until it hangs up. `run` does the work of a child that has one job and
/// says what it moved; `moved` tells what a server has moved so far.
pub(crate) fn answer(ready: &str, mut run: impl FnMut() -> Result<Moved>, moved: impl Fn() -> Moved) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready {ready}")?;
    out.flush()?;
    let mut clock = Clock::mark()?;
    let mut before = moved();
    let since = |before: &Moved| {
        let now = moved();
        Moved { bytes: now.bytes - before.bytes, calls: now.calls - before.calls, latency: None }
    };
    for line in std::io::stdin().lock().lines() {
        match line?.as_str() {
            "mark" => {
                clock = Clock::mark()?;
                before = moved();
                writeln!(out, "ok")?;
            }
            "run" => {
                clock = Clock::mark()?;
                before = moved();
                let ran = run()?;
                let calls = ran.calls.max(since(&before).calls);
                writeln!(out, "{}", serde_json::to_string(&clock.report(Moved { calls, ..ran })?)?)?;
            }
            "report" => writeln!(out, "{}", serde_json::to_string(&clock.report(since(&before))?)?)?,
            "quit" => break,
            other => bail!("unknown word from the parent: {other}"),
        }
        out.flush()?;
    }
    Ok(())
}

/// In the parent: a child, pinned to the cores it was started for.
pub(crate) struct Role {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// What the child said when it was ready: an address, mostly.
    pub(crate) ready: String,
}

impl Role {
    /// Starts `shoal-bench role NAME ARGS` on the cores given and waits until it is ready.
    pub(crate) fn start(cores: &[usize], name: &str, args: &[String]) -> Result<Self> {
        let cores: Vec<_> = cores.iter().map(ToString::to_string).collect();
        let mut child = Command::new(std::env::current_exe()?)
            .arg("role")
            .args(["--cores", &cores.join(",")])
            .arg(name)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start role {name}"))?;
        let input = child.stdin.take().context("child has no stdin")?;
        let mut output = BufReader::new(child.stdout.take().context("child has no stdout")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        let ready = line.trim().strip_prefix("ready").with_context(|| format!("role {name} said {line:?}"))?;
        Ok(Self { child, input, output, ready: ready.trim().to_owned() })
    }

    /// The child's process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts the child's clock.
    pub(crate) fn mark(&mut self) -> Result<()> {
        self.tell("mark")?;
        self.hear().map(drop)
    }

    /// What the child used since its clock was started.
    pub(crate) fn report(&mut self) -> Result<Usage> {
        self.tell("report")?;
        self.ran()
    }

    /// Has the child do its work; what it used.
    pub(crate) fn run(&mut self) -> Result<Usage> {
        self.begin()?;
        self.ran()
    }

    /// Has the child begin its work; [`Self::ran`] waits for its end.
    pub(crate) fn begin(&mut self) -> Result<()> {
        self.tell("run")
    }

    /// What the work used that was begun.
    pub(crate) fn ran(&mut self) -> Result<Usage> {
        Ok(serde_json::from_str(&self.hear()?)?)
    }

    fn tell(&mut self, word: &str) -> Result<()> {
        Ok(writeln!(self.input, "{word}")?)
    }

    fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("role ended: {}", self.child.wait()?);
        }
        Ok(line)
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = writeln!(self.input, "quit");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let latency = Latency::of((0..=1000).rev().map(Duration::from_millis).collect()).unwrap();
        assert_eq!((latency.p50, latency.p99, latency.p999), (500.0, 990.0, 999.0));
        assert!(Latency::of(Vec::new()).is_none());
    }
}
