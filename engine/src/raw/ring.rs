//! Whether this thread may have an io_uring.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

/// The length of the kernel's `io_uring_params`, in words of 8 bytes.
const PARAMS: usize = 15;

/// Why the kernel, or a seccomp filter on this thread, gives no ring; none where it does.
pub(crate) fn refused() -> Option<io::Error> {
    let mut params = [0_u64; PARAMS];
    // SAFETY: io_uring_setup reads and writes one `io_uring_params`, which `params` has the length of, and keeps no pointer.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 2_u32, params.as_mut_ptr()) };
    let Ok(fd) = RawFd::try_from(result) else { return Some(io::ErrorKind::InvalidData.into()) };
    if fd < 0 {
        return Some(io::Error::last_os_error());
    }
    // SAFETY: the call has just made this descriptor for us, and nobody else knows it. Dropping it closes it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    None
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// From now on this thread, and those it starts, get EPERM for a system call, as under a container's profile.
    pub(crate) fn refuse(call: libc::c_long) {
        rustix::thread::set_no_new_privs(true).unwrap();
        let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
        let number = call as u32;
        let mut filter = [
            // The system call's number is the first word of what a filter sees.
            op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
            op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
            op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: seccomp reads the program, which points at as many instructions as it says, and keeps no pointer.
        let result =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0_u32, &raw const program) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    #[test]
    fn a_filter_is_noticed() {
        std::thread::spawn(|| {
            refuse(libc::SYS_io_uring_setup);
            assert_eq!(refused().unwrap().raw_os_error(), Some(libc::EPERM));
        })
        .join()
        .unwrap();
    }
}
