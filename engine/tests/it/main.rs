//! Whole engines on real sockets and real files.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "tests")]

mod connections;
mod faults;
mod kit;
mod swarm;
