//! The file system as the store sees it: a directory tree with explicit durability. [`real`] is a directory of the machine,
//! [`sim`] lives in memory and can lose power, run out of space and fail.
//!
//! Paths are relative to the disk's root, of components made by the store (hex, UUIDs, fixed names), separated by `/`.
//! Calls block; they are made on worker threads only.
pub mod real;

use bytes::Bytes;
use std::{fmt, io, ops::Range, sync::Arc, time::Duration};

/// A directory tree.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Makes a file that does not exist yet, open for reading and writing.
    fn create(&self, path: &str, space: Space) -> io::Result<Arc<dyn File>>;

    /// Opens a file for reading and writing.
    fn open(&self, path: &str) -> io::Result<Arc<dyn File>>;

    /// Makes a directory; its parent must exist.
    fn create_dir(&self, path: &str) -> io::Result<()>;

    /// Moves a file or directory to a name that must be free: [`io::ErrorKind::AlreadyExists`] where it is not.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Moves a file over another one, at once.
    fn replace(&self, from: &str, to: &str) -> io::Result<()>;

    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &str) -> io::Result<()>;

    /// Removes a file. Handles and mappings of it stay good.
    fn remove(&self, path: &str) -> io::Result<()>;

    /// Removes an empty directory.
    fn remove_dir(&self, path: &str) -> io::Result<()>;

    /// What is in a directory, in no order.
    fn list(&self, path: &str) -> io::Result<Vec<Listed>>;

    /// A file's length and age, or none where there is no such file.
    fn stat(&self, path: &str) -> io::Result<Option<Meta>>;

    /// Bytes that may still be written.
    fn free(&self) -> io::Result<u64>;
}

/// An open file. Dropping the last handle closes it.
pub trait File: fmt::Debug + Send + Sync {
    /// Its length, bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether it has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Writes all of `bytes`.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Fills `buf`; [`io::ErrorKind::UnexpectedEof`] where the file is too short.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Gives back what was set aside beyond its first `len` bytes, which must be its length.
    fn trim(&self, len: u64) -> io::Result<()>;

    /// Makes its bytes and length durable. After a failure what is on disk is unknown, and asking again may wrongly succeed:
    /// the file must be given up.
    fn sync(&self) -> io::Result<()>;

    /// Maps its first `len` bytes for reading; none where this disk does not map.
    fn map(&self, len: u64) -> io::Result<Option<Arc<dyn Mapping>>>;
}

/// Bytes of a file, seen without a copy.
pub trait Mapping: fmt::Debug + Send + Sync {
    /// The bytes of a range that is within the mapping and will not be written again, for handing **to the kernel**: a load by
    /// our own code would end the process where the disk fails under it.
    fn bytes(self: Arc<Self>, range: Range<u64>) -> Bytes;

    /// Whether the range is in memory, so that handing it to the kernel waits for no disk.
    fn resident(&self, range: Range<u64>) -> bool;
}

/// What to set aside when a file is made, so that a full disk is found out before the first byte and not in the middle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Space {
    /// Nothing.
    None,
    /// This many bytes, and the file has that length at once, zeroes.
    Length(u64),
    /// This many bytes, while the length grows with what is written.
    Ahead(u64),
}

/// A name in a directory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Listed {
    /// The last component of its path.
    pub name: String,
    /// Whether it is a directory.
    pub dir: bool,
}

/// What is known of a file without opening it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Meta {
    /// Bytes.
    pub len: u64,
    /// Last change, since 1970.
    pub modified: Duration,
}

/// Whether an error says that the disk is full, for everybody or for us.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
