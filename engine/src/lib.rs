//! A storage node: a shard per core, blobs on disk, pieces between peers. [`handle`] is all that the gateway sees; the rest is
//! public for the simulator and the bench harness, which put the same parts together differently.
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "made-up test data"))]

mod arriving;
mod behind;
pub mod buf;
mod closer;
pub mod disk;
mod driver;
pub mod handle;
mod housekeeper;
mod inbox;
pub mod job;
mod kept;
mod limit;
mod net;
mod raw;
mod read;
mod receive;
mod serve;
mod shard;
mod shards;
pub mod store;
mod upload;
pub mod workers;

pub use behind::{Behind, behind};
pub use handle::{Config, Error, Handle, start};
