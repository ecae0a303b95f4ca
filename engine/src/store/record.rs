//! The small files beside a blob's bytes. Little endian, version 1 each, closed by a CRC-32; a file that does not hold is as
//! good as missing. A change of any field's meaning takes a new version.
//!
//! `layout`, the sidecar:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `SSCR` |
//! | 4..8 | version 1, zero, zero, zero |
//! | 8..12 | length *l* of the layout |
//! | 12..16 | length *n* of the namespace, at most 255, 0 for none |
//! | then *l* | the layout, see `peer_proto::layout` |
//! | then *n* | the namespace |
//! | last 4 | CRC-32 of everything before |
//!
//! `pieces`, the piece map of a partial blob. A byte a piece, so that threads note pieces without a lock:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `SPCS` |
//! | 4..8 | version 1, zero, zero, zero |
//! | 8..24 | boot id of the machine when it was made |
//! | 24..28 | number of pieces *p* |
//! | 28..32 | CRC-32 of the 28 bytes before |
//! | then *p* | 1 where the piece was written |
//!
//! `state`, of an upload:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `SUPL` |
//! | 4..8 | version 1, algorithm (0 sha256, 1 sha512), zero, zero |
//! | 8..24 | boot id of the machine when it was made |
//! | 24..28 | CRC-32 of the 24 bytes before |

use peer_proto::{Algorithm, Layout, Namespace, PieceIndex};

/// The kernel's boot id: the same for as long as written pages cannot have been lost.
pub type BootId = [u8; 16];

/// Longest sidecar that is read: a layout of the most pieces with sha512, and change.
pub(super) const SIDECAR_LEN_MAX: u64 = 8 << 20;

const PIECES_HEADER: usize = 32;
const UPLOAD_LEN: usize = 28;

pub(super) fn encode_sidecar(layout: &Layout, namespace: Option<&Namespace>) -> Vec<u8> {
    let layout = layout.encode();
    let namespace = namespace.map_or("", Namespace::as_str).as_bytes();
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(16 + layout.len() + namespace.len() + 4);
    out.extend(*b"SSCR\x01\0\0\0");
    out.extend(len(&layout).to_le_bytes());
    out.extend(len(namespace).to_le_bytes());
    out.extend(layout);
    out.extend(namespace);
    seal(out)
}

pub(super) fn decode_sidecar(bytes: &[u8]) -> Option<(Layout, Option<Namespace>)> {
    let body = unseal(bytes)?.strip_prefix(b"SSCR\x01\0\0\0")?;
    let (layout_len, body) = body.split_first_chunk()?;
    let (namespace_len, body) = body.split_first_chunk()?;
    let layout_len = usize::try_from(u32::from_le_bytes(*layout_len)).ok()?;
    let (layout, namespace) = body.split_at_checked(layout_len)?;
    if namespace.len() != usize::try_from(u32::from_le_bytes(*namespace_len)).ok()? {
        return None;
    }
    let namespace = match std::str::from_utf8(namespace).ok()? {
        "" => None,
        text => Some(text.parse().ok()?),
    };
    Some((Layout::decode(layout).ok()?, namespace))
}

/// A piece map's file with those pieces noted that `has` says.
pub(super) fn encode_pieces(boot: BootId, pieces: u32, has: impl Fn(u32) -> bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(PIECES_HEADER + pieces as usize);
    out.extend(*b"SPCS\x01\0\0\0");
    out.extend(boot);
    out.extend(pieces.to_le_bytes());
    let mut out = seal(out);
    out.extend((0..pieces).map(|piece| u8::from(has(piece))));
    out
}

/// The boot id and a byte for each piece.
pub(super) fn decode_pieces(bytes: &[u8], pieces: u32) -> Option<(BootId, &[u8])> {
    let (header, noted) = bytes.split_at_checked(PIECES_HEADER)?;
    let (boot, count) = unseal(header)?.strip_prefix(b"SPCS\x01\0\0\0")?.split_first_chunk()?;
    let sound = *count == pieces.to_le_bytes() && noted.len() == pieces as usize;
    sound.then_some((*boot, noted))
}

/// Where in the piece map's file a piece is noted.
pub(super) fn piece_offset(piece: PieceIndex) -> u64 {
    PIECES_HEADER as u64 + u64::from(piece.get())
}

pub(super) fn encode_upload(boot: BootId, algorithm: Algorithm) -> Vec<u8> {
    let mut out = Vec::with_capacity(UPLOAD_LEN);
    out.extend(*b"SUPL\x01");
    out.extend([u8::from(algorithm == Algorithm::Sha512), 0, 0]);
    out.extend(boot);
    seal(out)
}

pub(super) fn decode_upload(bytes: &[u8]) -> Option<(BootId, Algorithm)> {
    let (algorithm, rest) = unseal(bytes)?.strip_prefix(b"SUPL\x01")?.split_first()?;
    let algorithm = match algorithm {
        0 => Algorithm::Sha256,
        1 => Algorithm::Sha512,
        _ => return None,
    };
    Some((rest.strip_prefix(b"\0\0")?.try_into().ok()?, algorithm))
}

pub(super) fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32fast::hash(&bytes);
    bytes.extend(crc.to_le_bytes());
    bytes
}

pub(super) fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (body, crc) = bytes.split_last_chunk()?;
    (crc32fast::hash(body) == u32::from_le_bytes(*crc)).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use peer_proto::LayoutBuilder;

    /// Every record round-trips, and no single damaged byte of what is sealed goes unnoticed.
    #[test]
    fn records_hold_or_are_missing() {
        let mut builder = LayoutBuilder::new(Algorithm::Sha512);
        builder.update(&vec![7; 3 << 20]).unwrap();
        let layout = builder.finish();
        for namespace in [None, Some("lib/app".parse().unwrap())] {
            let bytes = encode_sidecar(&layout, namespace.as_ref());
            assert_eq!(decode_sidecar(&bytes), Some((layout.clone(), namespace)));
            assert!((0..bytes.len()).all(|at| decode_sidecar(&damaged(&bytes, at)).is_none()));
        }
        let bytes = encode_pieces([9; 16], 3, |piece| piece == 1);
        assert_eq!(decode_pieces(&bytes, 3), Some(([9; 16], &[0, 1, 0][..])));
        assert_eq!(decode_pieces(&bytes, 4), None);
        assert_eq!(piece_offset(layout.geometry().piece(1).unwrap()), 33);
        assert!((0..PIECES_HEADER).all(|at| decode_pieces(&damaged(&bytes, at), 3).is_none()));
        let bytes = encode_upload([8; 16], Algorithm::Sha512);
        assert_eq!((bytes.len(), decode_upload(&bytes)), (UPLOAD_LEN, Some(([8; 16], Algorithm::Sha512))));
        assert!((0..bytes.len()).all(|at| decode_upload(&damaged(&bytes, at)).is_none()));
    }

    fn damaged(bytes: &[u8], at: usize) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 0x20;
        bytes
    }
}
