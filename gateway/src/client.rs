//! Typed clients of our own services.

pub mod cluster;
pub mod health;
pub mod index;
pub mod origin;
pub mod origins;
pub mod tracker;
pub mod transfer;

pub use index::Index;
pub use origins::Origins;
pub use tracker::Tracker;
