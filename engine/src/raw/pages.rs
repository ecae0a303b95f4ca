//! Memory for buffers, in huge pages where the kernel has them: a piece then takes one fault instead of 256, and one entry of the
//! processor's table of pages instead of 256.

use memmap2::{Advice, MmapMut, MmapOptions, MmapRaw, UncheckedAdvice};
use std::{
    io,
    ops::{Deref, DerefMut, Range},
    sync::Arc,
};

/// Bytes of a huge page, where there are any (x86-64; arm64 with pages of 4 KiB).
pub(crate) const HUGE: usize = 2 << 20;

/// A part of an anonymous mapping, zeroes at first. No other part overlaps it. Its memory is given back when it is dropped, the mapping
/// goes with the last part.
#[derive(Debug)]
pub(crate) struct Pages {
    region: Arc<MmapRaw>,
    part: Range<usize>,
}

impl Pages {
    /// Maps memory for `count` parts of `len` bytes, in huge pages if it is as long as one. Touches none of it.
    pub(crate) fn map(len: usize, count: usize) -> io::Result<Vec<Self>> {
        let total = len * count;
        // Kernels before 6.7 put a mapping anywhere; then there is an aligned stretch within a longer one.
        let slack = if total >= HUGE { HUGE } else { 0 };
        let region: MmapMut = MmapOptions::new().len(total + slack).map_anon()?;
        let start = region.as_ptr().align_offset(if slack > 0 { HUGE } else { 1 });
        if slack > 0
            && let Err(error) = region.advise_range(Advice::HugePage, start, total)
        {
            // Of a kernel without them: ordinary pages do.
            tracing::debug!(%error, "no huge pages");
        }
        let region = Arc::new(MmapRaw::from(region));
        let parts = (0..count).map(|n| start + n * len..start + (n + 1) * len);
        Ok(parts.map(|part| Self { region: Arc::clone(&region), part }).collect())
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let start = self.region.as_mut_ptr().wrapping_add(self.part.start);
        // SAFETY: `map` made the part within the region, which is mapped as long as `self.region` lives and readable; the memory is
        // initialised, being zeroes until written; only this value refers to it, and it is borrowed.
        unsafe { std::slice::from_raw_parts(start, self.part.len()) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = self.region.as_mut_ptr().wrapping_add(self.part.start);
        // SAFETY: as above, the mapping is writable, and the only value that refers to this part of it is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(start, self.part.len()) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if Arc::strong_count(&self.region) > 1 {
            let (start, len) = (self.part.start, self.part.len());
            // SAFETY: the part becomes zeroes, and nobody refers to it: this was its only value.
            let given = unsafe { self.region.unchecked_advise_range(UncheckedAdvice::DontNeed, start, len) };
            if let Err(error) = given {
                tracing::debug!(%error, "memory is given back with its mapping only");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_apart() {
        let mut parts = Pages::map(HUGE / 2, 2).unwrap();
        assert_eq!(parts[0].as_ptr().addr() % HUGE, 0, "as huge pages are");
        parts[0].fill(1);
        parts[1].fill(2);
        assert!(parts[0].len() == HUGE / 2 && parts[0].iter().all(|byte| *byte == 1));
        assert_eq!(parts[1].as_ptr().addr() - parts[0].as_ptr().addr(), HUGE / 2);
        drop(parts.remove(0));
        assert!(parts[0].len() == HUGE / 2 && parts[0].iter().all(|byte| *byte == 2));
        assert!(Pages::map(5000, 1).unwrap()[0].iter().all(|byte| *byte == 0));
    }
}
