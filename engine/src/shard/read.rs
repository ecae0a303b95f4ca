//! What a reader of a blob that still arrives holds.

use crate::{kept::Kept, store::Blob};
use peer_proto::swarm::ReaderId;
use std::sync::Arc;

/// A place among the readers of a download.
#[derive(Debug)]
pub(crate) struct Reading {
    pub(crate) id: ReaderId,
    pub(crate) blob: Arc<Blob>,
    /// Pieces that came before they were asked for.
    pub(crate) kept: Arc<Kept>,
}
