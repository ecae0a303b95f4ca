//! Everything of Shoal that speaks HTTP or is an operator's concern: the roles, their wiring, configuration and the command line.

#![forbid(unsafe_code)]

pub mod admin;
pub mod config;
pub mod http;
