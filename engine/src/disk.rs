//! The file system as the store sees it: a directory tree with explicit durability. [`real`] is a directory of the machine,
//! [`sim`] lives in memory and can lose power, run out of space and fail.
//!
//! Paths are relative to the disk's root, of components made by the store (hex, UUIDs, fixed names), separated by `/`.
//! Calls block; they are made on worker threads only.
pub mod real;
pub mod sim;

use bytes::Bytes;
use std::{fmt, io, ops::Range, os::fd::BorrowedFd, sync::Arc, time::Duration};

/// What offsets, lengths and memory of direct reads are multiples of, bytes: as much as any disk's logical block.
pub const DIRECT_ALIGN: usize = 4096;

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

    /// Waits until deleted files that nobody holds open any more have given their space back, where that takes time.
    fn settle(&self) {}

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

    /// Fills as much of `buf` as the file has from `offset` on, past the page cache; how much that is. The offset, the buffer's address
    /// and its length have to be multiples of [`DIRECT_ALIGN`]. None where the disk has no such way.
    fn read_direct(&self, _offset: u64, _buf: &mut [u8]) -> Option<io::Result<usize>> {
        None
    }

    /// Gives back what was set aside beyond its first `len` bytes, which must be its length.
    fn trim(&self, len: u64) -> io::Result<()>;

    /// Has the disk begin to take the bytes of a range that was written, so that a sync later finds little left to do. Promises
    /// nothing, and waits for no byte to get there.
    fn begin_sync(&self, _range: Range<u64>) {}

    /// Makes its bytes and length durable. After a failure what is on disk is unknown, and asking again may wrongly succeed:
    /// the file must be given up.
    fn sync(&self) -> io::Result<()>;

    /// Maps its first `len` bytes for reading; none where this disk does not map.
    fn map(&self, len: u64) -> io::Result<Option<Arc<dyn Mapping>>>;

    /// Whether a range, not an empty one, is in memory, as [`Mapping::resident`] tells; none where only that can tell.
    fn resident(&self, _range: Range<u64>) -> Option<bool> {
        None
    }

    /// What the kernel may send its bytes from without passing them through a process; none where it cannot.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The kernel cannot after all: from now on no file of this disk has a descriptor.
    fn undescribe(&self) {}
}

/// A range of a file that is in memory and will not be written again, for the kernel to send.
#[derive(Clone, Debug)]
pub struct Stretch {
    pub(crate) file: Arc<dyn File>,
    pub(crate) mapping: Arc<dyn Mapping>,
    pub(crate) range: Range<u64>,
}

impl Stretch {
    /// Bytes of it.
    pub(crate) fn len(&self) -> usize {
        usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX)
    }

    /// The same bytes by way of the mapping.
    pub(crate) fn mapped(&self) -> Bytes {
        Arc::clone(&self.mapping).bytes(self.range.clone())
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{buf::Pool, handle::SendPath, raw};

    /// What the store relies on, of every disk.
    fn conforms(disk: &dyn Disk) {
        let kind = |result: io::Result<()>| result.unwrap_err().kind();
        disk.create_dir("a").unwrap();
        assert_eq!(kind(disk.create_dir("a")), io::ErrorKind::AlreadyExists);
        assert_eq!(kind(disk.create_dir("b/c")), io::ErrorKind::NotFound);
        let file = disk.create("a/x", Space::Length(10_000)).unwrap();
        assert_eq!(kind(disk.create("a/x", Space::None).map(drop)), io::ErrorKind::AlreadyExists);
        assert_eq!(file.len().unwrap(), 10_000);
        file.write_at(4_000, b"hello").unwrap();
        file.begin_sync(4_000..4_005);
        let mut buf = [9; 7];
        file.read_at(3_999, &mut buf).unwrap();
        assert_eq!(&buf, b"\0hello\0");
        assert_eq!(kind(file.read_at(9_999, &mut buf)), io::ErrorKind::UnexpectedEof);
        let mut room = Pool::new(1 << 20).take(3 * DIRECT_ALIGN).unwrap();
        if let Some(got) = file.read_direct(0, &mut room) {
            assert_eq!(got.unwrap(), 10_000, "as far as the file goes");
            assert_eq!(&room[3_999..4_006], b"\0hello\0");
        }
        let map = file.map(10_000).unwrap().unwrap();
        assert_eq!(Arc::clone(&map).bytes(4_000..4_005), &b"hello"[..]);
        assert!(map.resident(4_000..4_005), "just written");
        assert_ne!(file.resident(4_000..4_005), Some(false), "as the mapping has it");
        assert_eq!(kind(file.map(10_001).map(drop)), io::ErrorKind::UnexpectedEof);

        let ahead = disk.create("a/y", Space::Ahead(100_000)).unwrap();
        assert!(ahead.is_empty().unwrap());
        ahead.write_at(0, b"12345").unwrap();
        ahead.trim(5).unwrap();
        assert_eq!(disk.stat("a/y").unwrap().unwrap().len, 5);
        assert_eq!(disk.stat("a/z").unwrap(), None);
        file.sync().unwrap();
        disk.sync_dir("a").unwrap();
        disk.sync_dir("").unwrap();

        disk.create_dir("b").unwrap();
        assert_eq!(kind(disk.rename("a", "b")), io::ErrorKind::AlreadyExists, "even of an empty directory");
        assert_eq!(kind(disk.rename("z", "y")), io::ErrorKind::NotFound);
        disk.rename("a", "b/a").unwrap();
        let mut listed = disk.list("b/a").unwrap();
        listed.sort();
        let listed: Vec<_> = listed.iter().map(|l| (l.name.as_str(), l.dir)).collect();
        assert_eq!(listed, [("x", false), ("y", false)]);
        assert_eq!(kind(disk.list("a").map(drop)), io::ErrorKind::NotFound);
        disk.replace("b/a/y", "b/a/x").unwrap();
        assert_eq!(disk.open("b/a/x").unwrap().len().unwrap(), 5);
        file.read_at(4_000, &mut buf[..5]).unwrap();
        assert_eq!(&buf[..5], b"hello", "a replaced file stays good for who has it open");
        assert_eq!(kind(disk.remove_dir("b/a")), io::ErrorKind::DirectoryNotEmpty);
        disk.remove("b/a/x").unwrap();
        disk.remove_dir("b/a").unwrap();
        assert_eq!(kind(disk.remove("b/a/x")), io::ErrorKind::NotFound);
        assert_eq!(Arc::clone(&map).bytes(4_000..4_005), &b"hello"[..], "and so does its mapping");
        assert!(disk.free().unwrap() > 0);
    }

    #[test]
    fn both_disks_conform() {
        let dir = tempfile::tempdir().unwrap();
        let disk = real::Real::open(dir.path(), true, SendPath::Sendfile).unwrap();
        conforms(&disk);
        assert_eq!(
            real::Real::open(dir.path(), true, SendPath::Mapped).unwrap_err().kind(),
            io::ErrorKind::WouldBlock,
            "one process"
        );
        conforms(&sim::Sim::new(1, 1 << 20));
    }

    /// Both ways to tell what is in memory say the same, and where the kernel refuses the cheaper one the other is left.
    #[test]
    fn what_is_in_memory_is_known_by_count_or_by_look() {
        let dir = tempfile::tempdir().unwrap();
        let disk = real::Real::open(dir.path(), true, SendPath::Sendfile).unwrap();
        let file = disk.create("x", Space::None).unwrap();
        file.write_at(0, &vec![7; 1 << 20]).unwrap();
        file.sync().unwrap();
        let map = file.map(1 << 20).unwrap().unwrap();
        let ranges = [0..1 << 20, 0..1, 500_000..600_000, 700_000..700_001, (1 << 20) - 1..1 << 20];
        let agree = |cut: &str| {
            for range in ranges.clone() {
                let counted = file.resident(range.clone());
                assert!(counted.is_none_or(|it| it == map.resident(range.clone())), "{cut} {range:?}: {counted:?}");
            }
        };
        agree("written");
        let fd = file.descriptor().unwrap();
        let half = std::num::NonZeroU64::new(1 << 19);
        rustix::fs::fadvise(fd, 1 << 19, half, rustix::fs::Advice::DontNeed).unwrap();
        agree("half of it dropped");
        std::thread::scope(|scope| {
            let refused = scope.spawn(|| {
                raw::ring::tests::refuse(451);
                (file.resident(0..1), map.resident(0..1))
            });
            assert_eq!(refused.join().unwrap(), (None, true));
        });
        assert_eq!(file.resident(0..1), None, "not asked again");
    }

    /// A power cut keeps what was synced, and of the rest each page and each name by itself.
    #[test]
    fn a_simulated_power_cut_loses_what_was_not_synced() {
        let (mut kept_names, mut kept_pages, mut torn) = (0, 0, 0);
        for seed in 0..200 {
            let disk = sim::Sim::new(seed, 1 << 20);
            disk.create_dir("d").unwrap();
            disk.sync_dir("").unwrap();
            let synced = disk.create("d/synced", Space::None).unwrap();
            synced.write_at(0, &[1; 8192]).unwrap();
            synced.sync().unwrap();
            disk.sync_dir("d").unwrap();
            synced.write_at(0, &[2; 8192]).unwrap();
            disk.create("d/unsynced", Space::None).unwrap().sync().unwrap();
            disk.rename("d/unsynced", "moved").unwrap();
            disk.crash();
            assert!(synced.len().is_err(), "handles die, seed {seed}");
            let mut bytes = [0; 8192];
            disk.open("d/synced").unwrap().read_at(0, &mut bytes).unwrap();
            let pages = [bytes[0], bytes[4096]];
            assert!(bytes.chunks(4096).all(|page| page.iter().all(|b| *b == page[0])), "seed {seed}");
            kept_pages += pages.iter().filter(|page| **page == 2).count();
            torn += usize::from(pages[0] != pages[1]);
            let names = [disk.stat("d/unsynced").unwrap(), disk.stat("moved").unwrap()];
            assert!(names.iter().flatten().count() <= 1, "a rename is one change, seed {seed}");
            kept_names += names.iter().flatten().count();
        }
        assert!((150..250).contains(&kept_pages) && (50..150).contains(&torn), "{kept_pages} {torn}");
        assert!((50..150).contains(&kept_names), "{kept_names}");
    }

    #[test]
    fn simulated_faults_hit_the_operation_they_are_planned_for() {
        let disk = sim::Sim::new(1, 10_000);
        assert!(is_full(&disk.create("x", Space::Length(10_001)).unwrap_err()));
        let file = disk.create("x", Space::Ahead(9_000)).unwrap();
        file.write_at(0, &[1; 9_500]).unwrap();
        assert!(is_full(&file.write_at(9_500, &[1; 501]).unwrap_err()));
        assert_eq!(disk.free().unwrap(), 500);
        disk.fail(sim::Fault::Io(disk.ops()));
        assert!(file.sync().is_err());
        file.sync().unwrap();
        disk.sync_dir("").unwrap();
        disk.fail(sim::Fault::Cut(disk.ops() + 1));
        file.write_at(0, &[2; 10]).unwrap();
        assert!(file.write_at(0, &[2; 10]).is_err() && disk.open("x").is_err());
        disk.crash();
        let mut bytes = [0; 1];
        let file = disk.open("x").unwrap();
        file.read_at(9_000, &mut bytes).unwrap();
        assert_eq!(bytes, [0], "the sync that failed left the pages clean and lost");
        disk.remove("x").unwrap();
        assert_eq!(disk.free().unwrap(), 500, "open still");
        drop(file);
        assert_eq!(disk.free().unwrap(), 10_000);
    }
}
