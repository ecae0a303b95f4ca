//! What the safe wrappers of socket calls leave out.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd},
};

/// The descriptor of something that owns one and only tells its number.
pub(crate) fn borrowed(owner: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the borrow's lifetime is that of the reference to the owner, which keeps the descriptor open.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}

/// The descriptor taken from something that gives up its ownership.
pub(crate) fn owned(owner: impl IntoRawFd) -> OwnedFd {
    // SAFETY: `into_raw_fd` passes the sole ownership of an open descriptor to its caller.
    unsafe { OwnedFd::from_raw_fd(owner.into_raw_fd()) }
}

/// SO_RCVLOWAT: has the socket turn readable only once `bytes` are there, or what the kernel can hold.
pub(crate) fn wake_at(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let len = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or_default();
    // SAFETY: the pointer and length are those of a live integer, which is what this option takes; nothing is kept.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, (&raw const value).cast(), len)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
