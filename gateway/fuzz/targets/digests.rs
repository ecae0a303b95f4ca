//! Digests: what parses is lower-case hex of its algorithm's length and is written as it was read; any bytes of that length are one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer_proto::{Algorithm, Digest};

fuzz_target!(|input: (bool, &[u8], &str)| {
    let (long, bytes, text) = input;
    let algorithm = if long { Algorithm::Sha512 } else { Algorithm::Sha256 };
    let made = Digest::from_bytes(algorithm, bytes);
    assert_eq!(made.is_some(), bytes.len() == algorithm.digest_len());
    if let Some(digest) = made {
        assert_eq!(digest.as_bytes(), bytes);
        assert_eq!(digest.to_string().parse(), Ok(digest));
    }
    // With and without what an input would have to find first.
    for text in [text.to_owned(), format!("{}:{text}", algorithm.name())] {
        if let Ok(digest) = text.parse::<Digest>() {
            assert_eq!(digest.to_string(), text);
            assert_eq!(digest.hex().len(), 2 * digest.algorithm().digest_len());
            assert_eq!(Digest::from_bytes(digest.algorithm(), digest.as_bytes()), Some(digest));
        }
    }
});
