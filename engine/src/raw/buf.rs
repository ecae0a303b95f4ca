//! Pool buffers as monoio wants them.

use crate::buf::Buf;
use monoio::buf::{IoBuf, IoBufMut};

// SAFETY: the pages stay where they are until the last owner is gone, whether the `Buf` moves or not, and all of them were
// zeroed when the pool mapped them, so `len` bytes are always initialised.
unsafe impl IoBuf for Buf {
    fn read_ptr(&self) -> *const u8 {
        self.as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.len()
    }
}

// SAFETY: as above, and a `Buf` is its pages' only owner until it is frozen, which consumes it.
unsafe impl IoBufMut for Buf {
    fn write_ptr(&mut self) -> *mut u8 {
        self.as_mut_ptr()
    }

    fn bytes_total(&mut self) -> usize {
        self.len()
    }

    unsafe fn set_init(&mut self, _pos: usize) {
        // Always initialised; the length is what was taken from the pool.
    }
}
