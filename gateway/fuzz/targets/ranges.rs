//! Range and Content-Range: what is answered lies within the blob.
#![no_main]

use gateway::registry::{content_range, range};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, &str)| {
    let (total, header) = input;
    if let Ok(Some(specs)) = range::parse(header) {
        for range in range::resolve(&specs, total) {
            assert!(range.start < range.end && range.end <= total);
        }
    }
    if let Ok(range) = content_range::parse(header, None) {
        assert!(range.start < range.end);
        assert_eq!(content_range::parse(header, Some(range.end - range.start)), Ok(range));
    }
});
