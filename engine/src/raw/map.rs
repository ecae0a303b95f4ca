//! A read-only, shared mapping of a file that only grows complete.

use crate::{
    behind,
    closer::{self, Closer, Closing},
};
use bytes::Bytes;
use memmap2::{MmapOptions, MmapRaw};
use std::{fs::File, io, ops::Range, sync::Arc};

/// Pages that one look at residency covers at most: a piece of 16 MiB in pages of 4 KiB.
const PAGES_MAX: usize = 4096;

/// The first bytes of a file, mapped. Nothing is ever written through it. The file is not truncated by us while it lives, and
/// a range is only made visible once its bytes will not be written again; so the bytes behind a [`Bytes`] from here do not
/// change. If somebody else truncates the file, or the disk fails, a load by our own code is a SIGBUS, while the kernel
/// answers EFAULT or EIO: hence only the kernel may be given these bytes.
#[derive(Debug)]
pub(crate) struct Map {
    raw: Closing<MmapRaw>,
    /// Whether it stands in the book of who is behind which memory.
    noted: bool,
}

impl Map {
    /// Maps the first `len` bytes of `file`, more than none. With `note`, whoever has a part of it can find the file, see
    /// [`crate::behind`].
    pub(crate) fn new(file: &Arc<File>, len: u64, note: bool, closer: &Closer) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if file.metadata()?.len() < len as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let raw = MmapOptions::new().len(len).map_raw_read_only(&**file)?;
        if note {
            behind::note(raw.as_ptr().addr(), len, file);
        }
        let raw = closer.watch(raw, |raw| raw.len() as u64 >= closer::SHORT);
        Ok(Self { raw, noted: note })
    }

    /// The bytes of a range within the mapping, keeping it alive.
    pub(crate) fn bytes(self: Arc<Self>, range: Range<u64>) -> Bytes {
        let range = self.checked(range);
        Bytes::from_owner(Part { map: self, range })
    }

    /// Whether every page of a range is in memory. False also where the range is longer than a piece can be.
    pub(crate) fn resident(&self, range: Range<u64>) -> bool {
        let range = self.checked(range);
        let page = rustix::param::page_size();
        let start = range.start / page * page;
        let pages = (range.end - start).div_ceil(page);
        if pages == 0 || pages > PAGES_MAX {
            return pages == 0;
        }
        let mut states = [0u8; PAGES_MAX];
        let at = self.raw.as_ptr().wrapping_add(start).cast_mut().cast();
        // SAFETY: mincore wants a page-aligned address (the mapping's start is aligned, `start` is a multiple of the page) and
        // a byte for each page of the length, of which there are at most `PAGES_MAX`. It only looks.
        let result = unsafe { libc::mincore(at, range.end - start, states.as_mut_ptr()) };
        result == 0 && states[..pages].iter().all(|state| state & 1 == 1)
    }

    fn checked(&self, range: Range<u64>) -> Range<usize> {
        assert!(range.start <= range.end && range.end <= self.raw.len() as u64, "range is within the mapping");
        // Within `raw.len()`, a usize.
        #[expect(clippy::cast_possible_truncation, reason = "just compared with a usize")]
        let range = range.start as usize..range.end as usize;
        range
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // Before the memory is unmapped, and may be another's.
        if self.noted {
            behind::forget(self.raw.as_ptr().addr());
        }
    }
}

struct Part {
    map: Arc<Map>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        let start = self.map.raw.as_ptr().wrapping_add(self.range.start);
        // SAFETY: the range was checked to be within the mapping, which lives as long as `self.map`; the bytes are
        // initialised by the file and, by the type's contract, not written while the slice is alive.
        unsafe { std::slice::from_raw_parts(start, self.range.len()) }
    }
}
