//! The Registry v2 protocol (OCI distribution) over any [`Content`]: what `docker push` and `docker pull` speak.
//!
//! The modules without HTTP in them come first: names, digests, ranges, manifests, pages, each a function from text to a type.
//! [`Service`] puts them together; [`Content`] is what it asks for bytes and tags.

pub mod access;
mod blobs;
pub mod content;
pub mod content_range;
pub mod error;
#[cfg(test)]
mod framing;
#[cfg(test)]
pub(crate) mod harness;
#[cfg(test)]
mod hostile;
mod image;
mod lent;
mod lists;
pub mod manifest;
pub(crate) mod manifests;
#[cfg(test)]
pub(crate) mod memory;
pub mod multipart;
pub mod name;
pub mod paging;
pub mod range;
pub mod relay;
pub mod route;
pub mod service;
pub mod session;
pub mod tags;
#[cfg(test)]
mod tests;
mod uploads;

pub use access::Access;
pub use content::{Chunk, Content, Failure, Part, Push};
pub use error::{Code, Error};
pub(crate) use image::Image;
pub use name::{Reference, Repository, Tag};
pub use paging::{Listing, Page};
pub use range::Spec;
pub use relay::Relay;
pub use service::{Rules, Service, class};
pub use session::Session;
pub use tags::Tags;
