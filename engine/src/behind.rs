//! Which file is behind a piece of memory: bytes that a reader got from a mapping ([`crate::handle::Reader::unseen`]) go to a socket by
//! `sendfile`, without the copy that a write of the same memory costs. Whoever writes to a socket sees nothing but memory, so
//! the addresses of all mappings are kept in a book.

use std::{
    collections::BTreeMap,
    fs::File,
    sync::{Arc, PoisonError, RwLock, Weak},
};

/// Mappings by their first address. As many as there are open blobs.
static MAPPINGS: RwLock<BTreeMap<usize, Mapping>> = RwLock::new(BTreeMap::new());

struct Mapping {
    len: usize,
    file: Weak<File>,
}

/// Bytes of a file.
#[derive(Clone, Debug)]
pub struct Behind {
    /// The file.
    pub file: Arc<File>,
    /// Where in it they begin.
    pub offset: u64,
}

/// The file that these bytes are mapped from; none of memory of any other kind. While the bytes are borrowed, the file has the same
/// there.
pub fn behind(bytes: &[u8]) -> Option<Behind> {
    let at = bytes.as_ptr().addr();
    let mappings = MAPPINGS.read().unwrap_or_else(PoisonError::into_inner);
    let (start, mapping) = mappings.range(..=at).next_back()?;
    let offset = at - start;
    if bytes.is_empty() || offset >= mapping.len || bytes.len() > mapping.len - offset {
        return None;
    }
    Some(Behind { file: mapping.file.upgrade()?, offset: offset as u64 })
}

/// Notes a mapping of `len` bytes at an address, until it is forgotten.
pub(crate) fn note(start: usize, len: usize, file: &Arc<File>) {
    let mapping = Mapping { len, file: Arc::downgrade(file) };
    MAPPINGS.write().unwrap_or_else(PoisonError::into_inner).insert(start, mapping);
}

/// Forgets the mapping at an address.
pub(crate) fn forget(start: usize) {
    MAPPINGS.write().unwrap_or_else(PoisonError::into_inner).remove(&start);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{closer::Closer, raw::Map};
    use std::io::Write;

    #[test]
    fn memory_is_known_by_its_file_as_long_as_it_is_mapped() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        let file = Arc::new(file);
        let closer = Closer::start().unwrap();
        let map = |note| Arc::new(Map::new(&file, 10_000, note, &closer).unwrap());
        let [noted, other] = [map(true), map(false)].map(|map| map.bytes(5_000..10_000));
        let found = behind(&noted[10..]).unwrap();
        assert!(found.offset == 5_010 && Arc::ptr_eq(&found.file, &file));
        assert_eq!(behind(&noted[4_999..]).unwrap().offset, 9_999);
        assert!(behind(&noted[..0]).is_none() && behind(&other).is_none() && behind(&[7; 100]).is_none());
        drop(noted);
        let mappings = MAPPINGS.read().unwrap();
        assert!(mappings.values().all(|mapping| !mapping.file.ptr_eq(&Arc::downgrade(&file))), "forgotten");
    }
}
