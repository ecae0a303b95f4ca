//! How soon a thread gets a core.

use std::io;

/// Asks that this thread's turns on a core last `nanos` (the kernel takes 0.1 to 100 ms), its share of the core being what it
/// was. Who asks for short turns gets them soon after waking, ahead of threads in the middle of longer ones. Needs no privilege;
/// kernels before 6.12 take it for nothing.
pub(crate) fn set_slice(nanos: u64) -> io::Result<()> {
    let size = u32::try_from(size_of::<libc::sched_attr>()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut attr = libc::sched_attr {
        size,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: sched_getattr writes at most `size` bytes, the length of `attr`, and keeps no pointer; thread 0 is the caller.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    attr.sched_runtime = nanos;
    // SAFETY: sched_setattr reads `attr.size` bytes, which the kernel has just filled in as no more than its length.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
