//! A storage node: a shard per core, blobs on disk, pieces between peers. [`handle`] is all that the gateway sees; the rest is
//! public for the simulator and the bench harness, which put the same parts together differently.
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "made-up test data"))]

pub mod buf;
pub mod disk;
pub mod handle;
pub mod job;
mod raw;
mod read;
pub mod store;
mod upload;
pub mod workers;

pub use handle::{Config, Error, Handle, start};
