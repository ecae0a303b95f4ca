//! The agent: downloads what its host asks for, tells the trackers, serves blobs.

pub mod announcer;
pub mod api;
pub mod downloads;
pub mod fallback;
pub mod preheat;
pub mod preload;
pub mod registry;

#[cfg(test)]
mod harness;

pub use api::Api;
pub use downloads::Downloads;
pub use fallback::Fallback;
pub use preheat::Preheat;
pub use preload::Preload;
