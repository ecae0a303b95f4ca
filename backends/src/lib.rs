//! Where origins keep blobs and indexes keep tags: one trait in the verbs of an object store, the stores, and what wraps them.
//!
//! A [`Backend`] maps names to bytes. It knows no digests, no tags and no peers: a [`Naming`] turns a caller's name into the
//! path a store sees, a [`Router`] picks the store by namespace, and [`Limited`], [`Retrying`] and [`Faulty`] wrap any store.
//! Every store passes the same suite, the module `conformance` (feature of that name).

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "made-up test data"))]

mod backend;
mod error;
mod fault;
mod fs;
mod limit;
mod memory;
mod name;
mod naming;
mod random;
mod retry;
mod route;

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;

pub use backend::{Answer, Backend, ByteStream, Content, List, Object, Page};
pub use error::{BoxError, Error};
pub use fault::{FaultConfig, Faulty};
pub use fs::{Fs, FsConfig};
pub use limit::{Limited, LimitsConfig};
pub use memory::{Memory, MemoryConfig};
pub use name::{NAME_LEN_MAX, check as check_name};
pub use naming::{Named, Naming};
pub use retry::{RetriesConfig, Retrying};
pub use route::{Route, RouteConfig, Router, StoreConfig};
