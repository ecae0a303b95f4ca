//! The only unsafe code of the system. Each block is one operation whose callee's conditions are named beside it.
mod buf;
pub(crate) mod file;
mod lanes;
mod map;
pub(crate) mod net;
mod pages;
pub(crate) mod ring;
pub(crate) mod sched;

pub(crate) use lanes::lanes;
pub(crate) use map::Map;
pub(crate) use pages::{HUGE, Pages};
