//! What the safe wrappers of file calls leave out.

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
};

/// sync_file_range, its first step alone: has the kernel begin to write a range's changed pages to the disk. Waits only where the
/// disk's queue is full.
pub(crate) fn begin_writeback(file: BorrowedFd<'_>, range: Range<u64>) -> io::Result<()> {
    let offset = i64::try_from(range.start).map_err(|_| io::ErrorKind::InvalidInput)?;
    let len = i64::try_from(range.end.saturating_sub(range.start)).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the call takes numbers alone, and the borrow keeps the descriptor open.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
