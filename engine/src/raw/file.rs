//! What the safe wrappers of file calls leave out.

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Linux's number for cachestat, which is the same on all architectures that Rust's `libc` names it for.
const SYS_CACHESTAT: libc::c_long = 451;

/// What cachestat looks at: `struct cachestat_range` of Linux's `mman.h`.
#[repr(C)]
struct Looked {
    start: u64,
    len: u64,
}

/// What it counts, in pages: `struct cachestat`.
#[repr(C)]
#[derive(Default)]
struct Counted {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    evicted_of_late: u64,
}

/// Pages of a range, not an empty one, that the page cache has; those that are being read in count as well. Since Linux 6.5.
pub(crate) fn cached_pages(file: BorrowedFd<'_>, range: Range<u64>) -> io::Result<u64> {
    let looked = Looked { start: range.start, len: range.end.saturating_sub(range.start) };
    let mut counted = Counted::default();
    let (from, to) = (&raw const looked, &raw mut counted);
    // SAFETY: the call reads one `cachestat_range` and writes one `cachestat`, which these are, and keeps neither pointer; the borrow
    // keeps the descriptor open.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), from, to, 0_u32) };
    if result == 0 { Ok(counted.cached) } else { Err(io::Error::last_os_error()) }
}

/// sync_file_range, its first step alone: has the kernel begin to write a range's changed pages to the disk. Waits only where the
/// disk's queue is full.
pub(crate) fn begin_writeback(file: BorrowedFd<'_>, range: Range<u64>) -> io::Result<()> {
    let offset = i64::try_from(range.start).map_err(|_| io::ErrorKind::InvalidInput)?;
    let len = i64::try_from(range.end.saturating_sub(range.start)).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the call takes numbers alone, and the borrow keeps the descriptor open.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
