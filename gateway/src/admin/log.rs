//! Logs: lines on a terminal, JSON where asked for; panics among them.

use super::metrics::PANICS;
use crate::config::{Log, LogFormat};
use std::{
    backtrace::Backtrace,
    io::{self, IsTerminal},
    panic,
    sync::atomic::Ordering,
};
use tracing_subscriber::EnvFilter;

/// Sends logs to standard error, and panics to the logs. Once per process.
pub fn start(log: &Log) -> anyhow::Result<()> {
    let filter: EnvFilter = log.filter.parse()?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match log.format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("start logs: {error}"))?;
    panic::set_hook(Box::new(|info| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        let message = info.payload_as_str().unwrap_or("no text");
        let at = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(at, backtrace = %Backtrace::capture(), "panic: {message}");
    }));
    Ok(())
}
