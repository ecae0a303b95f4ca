//! The two ends of a measurement as processes of their own, so that each one's CPU and memory are its own.
//!
//! The parent starts this binary again with a role. The child prints `ready WORDS` once it can be used, then answers one word
//! a line: `mark` starts its clock, `report` prints what it used since, `quit` or the end of its input ends it. A child that
//! does its work at once answers `run` with a report when done.

use anyhow::{Context, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
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
    /// Most memory resident so far, bytes, file pages included.
    pub(crate) rss_max: u64,
    /// Bytes of payload that the child counted.
    pub(crate) bytes: u64,
}

impl Usage {
    /// CPU seconds, user and kernel.
    pub(crate) fn cpu_s(&self) -> f64 {
        self.user_s + self.system_s
    }
}

/// The child's clock: started by `mark`, read by `report`.
pub(crate) struct Clock {
    started: Instant,
    user: Duration,
    system: Duration,
}

impl Clock {
    /// Starts now.
    pub(crate) fn mark() -> Result<Self> {
        let (user, system, _) = used()?;
        Ok(Self { started: Instant::now(), user, system })
    }

    /// What was used since, `bytes` of payload moved meanwhile.
    pub(crate) fn report(&self, bytes: u64) -> Result<Usage> {
        let (user, system, rss_max) = used()?;
        Ok(Usage {
            wall_s: self.started.elapsed().as_secs_f64(),
            user_s: (user - self.user).as_secs_f64(),
            system_s: (system - self.system).as_secs_f64(),
            rss_max,
            bytes,
        })
    }
}

fn used() -> Result<(Duration, Duration, u64)> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let duration = |t: nix::sys::time::TimeVal| -> Result<Duration> {
        Ok(Duration::new(u64::try_from(t.tv_sec())?, u32::try_from(t.tv_usec())? * 1000))
    };
    Ok((duration(usage.user_time())?, duration(usage.system_time())?, u64::try_from(usage.max_rss())? * 1024))
}

/// In the child: says it is ready and answers the parent until it hangs up. `run` does the work of a child that has one job and
/// says how many bytes it moved; `moved` tells the bytes a server has moved so far.
pub(crate) fn answer(ready: &str, mut run: impl FnMut() -> Result<u64>, moved: impl Fn() -> u64) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready {ready}")?;
    out.flush()?;
    let mut clock = Clock::mark()?;
    let mut before = moved();
    for line in std::io::stdin().lock().lines() {
        match line?.as_str() {
            "mark" => {
                clock = Clock::mark()?;
                before = moved();
                writeln!(out, "ok")?;
            }
            "run" => {
                clock = Clock::mark()?;
                let bytes = run()?;
                writeln!(out, "{}", serde_json::to_string(&clock.report(bytes)?)?)?;
            }
            "report" => writeln!(out, "{}", serde_json::to_string(&clock.report(moved() - before)?)?)?,
            "quit" => break,
            other => bail!("unknown word from the parent: {other}"),
        }
        out.flush()?;
    }
    Ok(())
}

/// In the parent: a child, pinned to a core where more than one is to be had.
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

    /// Starts the child's clock.
    pub(crate) fn mark(&mut self) -> Result<()> {
        self.ask("mark").map(drop)
    }

    /// What the child used since its clock was started.
    pub(crate) fn report(&mut self) -> Result<Usage> {
        Ok(serde_json::from_str(&self.ask("report")?)?)
    }

    /// Has the child do its work; what it used.
    pub(crate) fn run(&mut self) -> Result<Usage> {
        Ok(serde_json::from_str(&self.ask("run")?)?)
    }

    fn ask(&mut self, word: &str) -> Result<String> {
        writeln!(self.input, "{word}")?;
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
        let _ = writeln!(self.input, "quit");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
