//! A directory of the machine's file system.

use super::{DIRECT_ALIGN, Disk, File, Listed, Mapping, Meta, Space};
use crate::{
    closer::{self, Closer, Closing},
    handle::SendPath,
    raw::{self, Map},
};
use bytes::Bytes;
use rustix::{
    fd::OwnedFd,
    fs::{self, AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags},
    io::{Errno, ReadWriteFlags},
};
use std::{
    fs::File as StdFile,
    io::{self, IoSliceMut},
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::FileExt,
    },
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

const FILE_MODE: Mode = Mode::from_raw_mode(0o640);
const DIR_MODE: Mode = Mode::from_raw_mode(0o750);

/// A directory that this process holds alone. Names are resolved from its descriptor, so moving it meanwhile is harmless.
#[derive(Debug)]
pub struct Real {
    root: OwnedFd,
    mmap: bool,
    /// Whether the kernel may be told to send straight from files; false for good once it cannot.
    sendfile: Arc<AtomicBool>,
    /// Whether the kernel counts the pages that are in memory; false for good once it does not.
    counts: Arc<AtomicBool>,
    closer: Closer,
    /// Held for its lock: two processes on one directory would delete each other's files.
    _lock: OwnedFd,
}

impl Real {
    /// Opens `root`, made where missing. [`io::ErrorKind::WouldBlock`] where another process has it.
    pub fn open(root: &Path, mmap: bool, send: SendPath) -> io::Result<Self> {
        std::fs::create_dir_all(root)?;
        let root = fs::open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let lock = fs::openat(&root, "lock", OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC, FILE_MODE)?;
        fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        let sendfile = Arc::new(AtomicBool::new(send == SendPath::Sendfile));
        let closer = Closer::start()?;
        Ok(Self { root, mmap, sendfile, counts: Arc::new(AtomicBool::new(true)), closer, _lock: lock })
    }

    fn opened(&self, fd: OwnedFd) -> Arc<dyn File> {
        let handles = Handles { file: Arc::new(fd.into()), direct: OnceLock::new() };
        Arc::new(Open {
            handles: self.closer.watch(handles, Handles::are_long),
            closer: self.closer.clone(),
            mmap: self.mmap,
            sendfile: Arc::clone(&self.sendfile),
            counts: Arc::clone(&self.counts),
        })
    }

    fn dir(&self, path: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(fs::openat(&self.root, if path.is_empty() { "." } else { path }, flags, Mode::empty())?)
    }
}

impl Disk for Real {
    fn create(&self, path: &str, space: Space) -> io::Result<Arc<dyn File>> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(&self.root, path, flags, FILE_MODE)?;
        let set_aside = match space {
            Space::None | Space::Length(0) | Space::Ahead(0) => Ok(()),
            Space::Length(len) => fs::fallocate(&fd, FallocateFlags::empty(), 0, len),
            Space::Ahead(len) => fs::fallocate(&fd, FallocateFlags::KEEP_SIZE, 0, len),
        };
        match (set_aside, space) {
            (Ok(()), _) => {}
            // A file system that cannot set space aside: a full one is then found out later.
            (Err(Errno::OPNOTSUPP), Space::Length(len)) => fs::ftruncate(&fd, len)?,
            (Err(Errno::OPNOTSUPP), _) => {}
            (Err(e), _) => {
                fs::unlinkat(&self.root, path, AtFlags::empty())?;
                return Err(e.into());
            }
        }
        Ok(self.opened(fd))
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(self.opened(fs::openat(&self.root, path, flags, Mode::empty())?))
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        Ok(fs::mkdirat(&self.root, path, DIR_MODE)?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        match fs::renameat_with(&self.root, from, &self.root, to, RenameFlags::NOREPLACE) {
            // EINVAL: a file system that knows no flags. A plain rename refuses to replace a directory that is
            // not empty, and the store moves nothing else onto a name that may be taken.
            Err(Errno::INVAL) => Ok(fs::renameat(&self.root, from, &self.root, to)?),
            Err(Errno::NOTEMPTY) => Err(Errno::EXIST.into()),
            other => Ok(other?),
        }
    }

    fn replace(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(fs::renameat(&self.root, from, &self.root, to)?)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        Ok(fs::fsync(self.dir(path)?)?)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        Ok(fs::unlinkat(&self.root, path, AtFlags::empty())?)
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        Ok(fs::unlinkat(&self.root, path, AtFlags::REMOVEDIR)?)
    }

    fn list(&self, path: &str) -> io::Result<Vec<Listed>> {
        let fd = self.dir(path)?;
        let mut listed = Vec::new();
        for entry in fs::Dir::new(fd)? {
            let entry = entry?;
            // A name that is not UTF-8 is not ours.
            let Ok(name) = entry.file_name().to_str() else { continue };
            if matches!(name, "." | "..") {
                continue;
            }
            let dir = match entry.file_type() {
                FileType::Directory => true,
                FileType::Unknown => {
                    let stat = fs::statat(&self.root, format!("{path}/{name}"), AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
                }
                _ => false,
            };
            listed.push(Listed { name: name.to_owned(), dir });
        }
        Ok(listed)
    }

    fn stat(&self, path: &str) -> io::Result<Option<Meta>> {
        match fs::statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(Meta {
                len: u64::try_from(stat.st_size).unwrap_or(0),
                modified: Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0)),
            })),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn settle(&self) {
        self.closer.settle();
    }

    fn free(&self) -> io::Result<u64> {
        let stat = fs::fstatvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

#[derive(Debug)]
struct Open {
    handles: Closing<Handles>,
    closer: Closer,
    mmap: bool,
    sendfile: Arc<AtomicBool>,
    counts: Arc<AtomicBool>,
}

/// A file's descriptors.
#[derive(Debug)]
struct Handles {
    file: Arc<StdFile>,
    /// The same file for direct reads, once one was wanted; none where the file system has no such.
    direct: OnceLock<Option<OwnedFd>>,
}

impl Handles {
    fn are_long(&self) -> bool {
        self.file.metadata().is_ok_and(|meta| meta.len() >= closer::SHORT)
    }

    /// By the name that this process has for its own descriptor: the file may have been moved since it was opened.
    fn reopen_direct(&self) -> Option<OwnedFd> {
        let name = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        fs::open(name, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()).ok()
    }
}

impl Open {
    /// Whether a page has all its bytes: one that the page cache has may still be waiting for them.
    fn is_read(&self, offset: u64) -> io::Result<bool> {
        let mut byte = [0];
        let parts = &mut [IoSliceMut::new(&mut byte)];
        match rustix::io::preadv2(&self.handles.file, parts, offset, ReadWriteFlags::NOWAIT) {
            Ok(got) => Ok(got == 1),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl File for Open {
    fn len(&self) -> io::Result<u64> {
        Ok(self.handles.file.metadata()?.len())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.handles.file.write_all_at(bytes, offset)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.handles.file.read_exact_at(buf, offset)
    }

    fn read_direct(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<usize>> {
        let file = self.handles.direct.get_or_init(|| self.handles.reopen_direct()).as_ref()?;
        let mut got = 0;
        while got < buf.len() {
            match rustix::io::pread(file, &mut buf[got..], offset + got as u64) {
                Ok(0) => break,
                // What follows a part of a block is the file's end.
                Ok(n) if !n.is_multiple_of(DIRECT_ALIGN) => return Some(Ok(got + n)),
                Ok(n) => got += n,
                Err(Errno::INTR) => {}
                // Opened, and then not able to after all: as if it had said so at once.
                Err(Errno::INVAL) => return None,
                Err(error) => return Some(Err(error.into())),
            }
        }
        Some(Ok(got))
    }

    fn trim(&self, len: u64) -> io::Result<()> {
        self.handles.file.set_len(len)
    }

    fn begin_sync(&self, range: Range<u64>) {
        // Where it fails, the sync that follows has all of it to do, and to tell.
        if let Err(error) = raw::file::begin_writeback(self.handles.file.as_fd(), range) {
            tracing::trace!(%error, "begin to write a file back");
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.handles.file.sync_data()
    }

    fn map(&self, len: u64) -> io::Result<Option<Arc<dyn Mapping>>> {
        if !self.mmap || len == 0 {
            return Ok(None);
        }
        let map = Map::new(&self.handles.file, len, self.sendfile.load(Relaxed), &self.closer)?;
        Ok(Some(Arc::new(map)))
    }

    /// Counts pages, which costs a small part of what looking at each of them through a mapping does, then makes sure of the first and
    /// the last: while a read is under way they are there and empty, and what reads ahead fills them in this order.
    fn resident(&self, range: Range<u64>) -> Option<bool> {
        if !self.counts.load(Relaxed) {
            return None;
        }
        let page = rustix::param::page_size() as u64;
        let pages = range.end.div_ceil(page) - range.start / page;
        let resident = || -> io::Result<bool> {
            Ok(raw::file::cached_pages(self.handles.file.as_fd(), range.clone())? == pages
                && self.is_read(range.start)?
                && self.is_read(range.end - 1)?)
        };
        match resident() {
            Ok(resident) => Some(resident),
            Err(error) => {
                if self.counts.swap(false, Relaxed) {
                    tracing::info!(%error, "the kernel does not count cached pages: each is looked at");
                }
                None
            }
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.sendfile.load(Relaxed).then(|| self.handles.file.as_fd())
    }

    fn undescribe(&self) {
        if self.sendfile.swap(false, Relaxed) {
            tracing::warn!("this file system does not let the kernel send from files: pieces go by their mappings");
        }
    }
}

impl Mapping for Map {
    fn bytes(self: Arc<Self>, range: Range<u64>) -> Bytes {
        Self::bytes(self, range)
    }

    fn resident(&self, range: Range<u64>) -> bool {
        Self::resident(self, range)
    }
}
