//! What goes wrong in a store, by what a caller can do about it.

use rustix::io::Errno;
use std::io;

/// Whatever lies beneath.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a store did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such object.
    #[error("not found")]
    NotFound,
    /// The store cannot be reached or is overloaded: the same call may succeed later.
    #[error("unavailable: {0}")]
    Unavailable(#[source] BoxError),
    /// The store refuses us: credentials, permissions, a read-only store.
    #[error("denied: {0}")]
    Denied(#[source] BoxError),
    /// No room.
    #[error("no space: {0}")]
    NoSpace(#[source] BoxError),
    /// The name, the content or the configuration cannot be.
    #[error("invalid: {0}")]
    Invalid(String),
    /// The range starts beyond the object's end.
    #[error("range {start}..{end} of an object of {size} bytes")]
    Range {
        /// The first byte asked for.
        start: u64,
        /// The end asked for, exclusive.
        end: u64,
        /// The object's size.
        size: u64,
    },
    /// The caller's own stream failed while it was written; nothing is stored.
    #[error("content to write: {0}")]
    Source(#[source] BoxError),
    /// The store failed in a way that another try will not mend by itself.
    #[error("store failed: {0}")]
    Failed(#[source] BoxError),
}

impl Error {
    /// The same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }

    /// There is no such object.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::NotFound => Self::NotFound,
            Kind::PermissionDenied | Kind::ReadOnlyFilesystem => Self::Denied(error.into()),
            Kind::StorageFull | Kind::QuotaExceeded | Kind::FileTooLarge => Self::NoSpace(error.into()),
            Kind::NotADirectory | Kind::IsADirectory | Kind::InvalidFilename => Self::Invalid(error.to_string()),
            Kind::Interrupted
            | Kind::TimedOut
            | Kind::WouldBlock
            | Kind::ResourceBusy
            | Kind::StaleNetworkFileHandle
            | Kind::OutOfMemory => Self::Unavailable(error.into()),
            _ => match Errno::from_io_error(&error) {
                // Descriptors come back when others end.
                Some(Errno::MFILE | Errno::NFILE) => Self::Unavailable(error.into()),
                _ => Self::Failed(error.into()),
            },
        }
    }
}
