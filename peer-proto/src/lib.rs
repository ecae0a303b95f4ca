//! What two Shoal nodes must agree on, and what one node decides.
//!
//! Nothing here reads a clock, a socket, a file or a source of randomness: time, bytes and seeds are arguments. A core is a
//! struct with three verbs, `handle(now, Event)`, `poll() -> Option<Effect>` and `deadline() -> Option<Instant>`; the same
//! code runs in the engine, in tests and in the simulator.

#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "made-up test data"))]

extern crate alloc;

pub mod announce;
pub mod chain;
pub mod conn;
mod fixed;
pub mod handout;
pub mod id;
pub mod layout;
pub mod pieces;
pub mod ring;
mod rng;
pub mod swarm;
pub mod time;
pub mod wire;

pub use id::{Algorithm, Digest, DigestError, Namespace, NamespaceError, PeerId, PeerIdError};
pub use layout::{Layout, LayoutBuilder, LayoutError, PieceIndex, ProofError};
pub use pieces::PieceSet;
pub use time::Instant;
