//! Everything of Shoal that speaks HTTP or is an operator's concern: the roles, their wiring, configuration and the command line.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "made-up test data"))]

pub mod admin;
pub mod agent;
pub mod cli;
pub mod client;
pub mod config;
pub mod http;
pub mod index;
pub mod node;
pub mod origin;
pub mod preheat;
pub mod proxy;
pub mod registry;
pub mod retry;
pub mod tracker;
pub mod upstream;
