//! What nodes read from each other and from trackers: what decodes says the same when it is encoded again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer_proto::{
    Layout,
    announce::{Request, Response},
    wire::{Header, Hello},
};

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 5 {
        0 => {
            let Some(&header) = data.first_chunk::<32>() else { return };
            // The checksum is not what is to be found out.
            let crc = crc32fast::hash(&header[..28]);
            let mut header = header;
            header[28..].copy_from_slice(&crc.to_le_bytes());
            if let Ok(decoded) = Header::decode(&header) {
                assert_eq!(decoded.encode(), header);
            }
        }
        1 => drop(Hello::decode(data)),
        2 => {
            if let Ok(request) = Request::decode(data) {
                assert_eq!(Request::decode(&request.encode()).as_ref(), Ok(&request));
            }
        }
        3 => {
            if let Ok(response) = Response::decode(data) {
                assert_eq!(Response::decode(&response.encode()).as_ref(), Ok(&response));
            }
        }
        _ => {
            if let Ok(layout) = Layout::decode(data) {
                assert_eq!(layout.encode(), data);
            }
        }
    }
});
