//! What the kernel tells about another process.

use anyhow::{Context, Result};

/// The unit of proc_pid_stat(5)'s times, on every architecture of Linux that we run on.
const TICKS_PER_S: f64 = 100.0;

/// CPU seconds of a process so far, user and kernel.
pub(crate) fn cpu_s(pid: u32) -> Result<f64> {
    let text =
        std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} is gone"))?;
    let fields = text.rsplit(") ").next().context("odd stat")?.split(' ');
    // utime and stime are the 14th and 15th field; the name, which may hold anything, is the second.
    let ticks = fields.skip(11).take(2).map(|field| Ok(field.parse::<f64>()?)).sum::<Result<f64>>()?;
    Ok(ticks / TICKS_PER_S)
}

/// A size of proc_pid_status(5), bytes.
pub(crate) fn status(pid: u32, name: &str) -> Result<u64> {
    let text =
        std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid} is gone"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value = value.with_context(|| format!("no {name}"))?;
    Ok(value.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_process_is_there() {
        let me = std::process::id();
        assert!(cpu_s(me).unwrap() < 1e6);
        assert!(status(me, "VmRSS").unwrap() > 1 << 16);
        assert!(status(me, "VmNone").is_err());
    }
}
