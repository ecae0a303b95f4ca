//! The outside asks us to stop; the service manager wants to know.

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that end the process.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From here on the signals are ours.
    pub fn take() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("take SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("take SIGINT")?,
        })
    }

    /// Until SIGTERM or SIGINT comes; its name.
    pub async fn stop(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Tells the service manager, where there is one, that we serve.
pub fn ready() {
    tell(NotifyState::Ready);
}

/// Tells the service manager that we stop.
pub fn stopping() {
    tell(NotifyState::Stopping);
}

fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "notify the service manager");
    }
}
