//! Ports that a test may give to processes it starts: given to nobody else in this run, and outside the range from which the
//! kernel takes the ports of outgoing connections, one of which could otherwise sit on a port before its process binds it.

use anyhow::{Context, Result};
use std::{
    collections::BTreeSet,
    net::TcpListener,
    sync::{Mutex, PoisonError},
};

/// All that this run has given out.
static CLAIMED: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
/// The lowest one given out.
const FIRST: u16 = 10_000;
/// The kernel's lowest port for outgoing connections, where it does not say.
const EPHEMERAL: u16 = 32_768;

/// A base port that is free together with its neighbours at `offsets`.
pub(crate) fn free(offsets: &[u16]) -> Result<u16> {
    let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
    let width = offsets.iter().max().copied().unwrap_or(0);
    let end = ephemeral().max(FIRST + 2 * width + 1_000) - width;
    // Runs side by side start looking in different places.
    let begin = FIRST + u16::try_from(std::process::id() % u32::from(end - FIRST))?;
    let base = (begin..end)
        .chain(FIRST..begin)
        .find(|base| {
            let free = |port| !claimed.contains(&port) && TcpListener::bind(("127.0.0.1", port)).is_ok();
            offsets.iter().all(|offset| free(base + offset))
        })
        .context("no free ports")?;
    claimed.extend(offsets.iter().map(|offset| base + offset));
    Ok(base)
}

fn ephemeral() -> u16 {
    let told = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok();
    told.and_then(|range| range.split_whitespace().next()?.parse().ok()).unwrap_or(EPHEMERAL)
}
