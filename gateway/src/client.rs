//! Typed clients of our own services.

pub mod cluster;
pub mod health;
pub mod origin;
pub mod origins;
pub mod transfer;

pub use origins::Origins;
