//! A storage node: a shard per core, blobs on disk, pieces between peers. [`handle`] is all that others see.
pub mod handle;

pub use handle::{Config, Error, Handle, start};
