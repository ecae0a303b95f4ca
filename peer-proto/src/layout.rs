//! A blob cut into pieces, with what it takes to prove each piece alone.
//!
//! Piece *i* goes from byte `i * piece_length` to the next edge or the end. For each piece the layout holds a CRC-32 (IEEE),
//! the free first check, and the digest's chaining value at its end (see [`crate::chain`]); the last piece ends in the digest
//! itself. When every link holds, the blob is the digest, whoever supplied the layout.
//!
//! Encoded, little endian, version 1; a change of any field's meaning takes a new version:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `SLYT` |
//! | 4 | version, 1 |
//! | 5 | algorithm: 0 sha256, 1 sha512 |
//! | 6..8 | zero |
//! | 8..16 | length of the blob, bytes |
//! | 16..20 | piece length, bytes |
//! | 20..24 | number of pieces *n* |
//! | then 32 or 64 | digest |
//! | then 4 *n* | CRC-32 of each piece |
//! | then (*n* - 1) × 32 or 64 | chaining value at the end of each piece but the last |
//! | last 4 | CRC-32 of everything before |

use crate::{
    chain::{self, BLOCK_LEN_MAX, LANES, Lanes},
    id::{Algorithm, Digest},
};
use alloc::{boxed::Box, vec::Vec};
use core::{fmt, ops::Range};

const MIB: u32 = 1 << 20;
/// Shortest piece length, bytes; blobs up to [`PIECES_AIM`] MiB have it.
pub const PIECE_LEN_MIN: u32 = MIB;
/// Longest piece length, bytes.
pub const PIECE_LEN_MAX: u32 = 16 * MIB;
/// Number of pieces beyond which the piece length is doubled, up to [`PIECE_LEN_MAX`].
pub const PIECES_AIM: u64 = 8192;
/// Most pieces of a blob; bounds a bitfield to 8 KiB.
pub const PIECES_MAX: u32 = 1 << 16;
/// Longest blob, bytes: 1 TiB.
pub const LEN_MAX: u64 = PIECES_MAX as u64 * PIECE_LEN_MAX as u64;

const MAGIC: [u8; 4] = *b"SLYT";
const HEADER_LEN: usize = 24;
/// Bytes of a piece that both sums have passed before either turns to the next: a core's own cache keeps as many of [`LANES`] pieces.
const STEP_LEN: usize = 16 << 10;

/// The number of a piece that its layout has. Made by [`Geometry::piece`] and its kin only.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PieceIndex(pub(crate) u32);

impl PieceIndex {
    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number, to index with.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for PieceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

impl fmt::Display for PieceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where the edges are: a blob's length and piece length. 16 bytes, all that choosing pieces needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    length: u64,
    piece_length: u32,
}

impl Geometry {
    /// The geometry we give a blob of `length` bytes; nothing beyond [`LEN_MAX`].
    pub fn of(length: u64) -> Option<Self> {
        Self::new(length, Self::piece_length_for(length))
    }

    /// A geometry from its parts, where they are within bounds: a power of two from [`PIECE_LEN_MIN`] to [`PIECE_LEN_MAX`] and
    /// at most [`PIECES_MAX`] pieces.
    pub fn new(length: u64, piece_length: u32) -> Option<Self> {
        let sound = (PIECE_LEN_MIN..=PIECE_LEN_MAX).contains(&piece_length)
            && piece_length.is_power_of_two()
            && length.div_ceil(u64::from(piece_length)) <= u64::from(PIECES_MAX);
        sound.then_some(Self { length, piece_length })
    }

    fn piece_length_for(length: u64) -> u32 {
        let mut piece_length = PIECE_LEN_MIN;
        while length.div_ceil(u64::from(piece_length)) > PIECES_AIM && piece_length < PIECE_LEN_MAX {
            piece_length *= 2;
        }
        piece_length
    }

    /// Bytes of the blob.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of every piece but perhaps the last.
    pub const fn piece_length(&self) -> u32 {
        self.piece_length
    }

    /// Number of pieces; none for the empty blob.
    #[expect(clippy::cast_possible_truncation, reason = "checked against PIECES_MAX when made")]
    pub const fn pieces(&self) -> u32 {
        self.length.div_ceil(self.piece_length as u64) as u32
    }

    /// Piece number `index`, where there is one.
    pub fn piece(&self, index: u32) -> Option<PieceIndex> {
        (index < self.pieces()).then_some(PieceIndex(index))
    }

    /// Every piece, in order.
    pub fn all(&self) -> impl DoubleEndedIterator<Item = PieceIndex> + ExactSizeIterator + use<> {
        (0..self.pieces()).map(PieceIndex)
    }

    /// The piece that holds byte `offset`.
    pub fn piece_at(&self, offset: u64) -> Option<PieceIndex> {
        (offset < self.length)
            .then(|| PieceIndex(u32::try_from(offset / u64::from(self.piece_length)).unwrap_or(u32::MAX)))
    }

    /// The bytes of a piece.
    pub fn range(&self, piece: PieceIndex) -> Range<u64> {
        let start = u64::from(piece.0) * u64::from(self.piece_length);
        start..self.length.min(start + u64::from(self.piece_length))
    }

    /// Bytes of a piece.
    #[expect(clippy::cast_possible_truncation, reason = "no longer than piece_length")]
    pub fn piece_len(&self, piece: PieceIndex) -> u32 {
        let range = self.range(piece);
        (range.end - range.start) as u32
    }

    /// The pieces that hold `bytes`; empty where the range is.
    pub fn covering(&self, bytes: Range<u64>) -> Range<u32> {
        let (Some(first), Some(last)) = (self.piece_at(bytes.start), self.piece_at(bytes.end.saturating_sub(1))) else {
            return 0..0;
        };
        if bytes.is_empty() { 0..0 } else { first.0..last.0 + 1 }
    }
}

/// A blob's pieces and their proofs. See the module's text.
#[derive(Clone, PartialEq, Eq)]
pub struct Layout {
    digest: Digest,
    geometry: Geometry,
    crcs: Box<[u32]>,
    /// Chaining values at the end of each piece but the last, one behind the other.
    links: Box<[u8]>,
}

/// Bytes that are not a layout we take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LayoutError {
    /// Shorter or longer than its own header says.
    #[error("layout has {has} bytes, its header says {says}")]
    Length {
        /// Bytes given.
        has: usize,
        /// Bytes the header asks for.
        says: usize,
    },
    /// Not a layout, or of another version.
    #[error("layout has an unknown magic, version or algorithm")]
    Kind,
    /// Lengths out of bounds or at odds with each other.
    #[error("layout has a geometry out of bounds")]
    Geometry,
    /// Damaged on the way.
    #[error("layout fails its checksum")]
    Checksum,
}

/// A piece that is not what the layout says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProofError {
    /// Not the piece's length.
    #[error("piece {piece} has {has} bytes, layout says {says}")]
    Length {
        /// Which piece.
        piece: PieceIndex,
        /// Bytes given.
        has: u64,
        /// Bytes of the piece.
        says: u64,
    },
    /// Fails the CRC-32: damaged.
    #[error("piece {0} fails its checksum")]
    Checksum(PieceIndex),
    /// Passes the CRC-32 and fails its hash link: forged, or the layout is.
    #[error("piece {0} does not continue the digest's chain")]
    Chain(PieceIndex),
}

impl Layout {
    /// The blob's digest.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Where the edges are.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Bytes of the blob.
    pub fn length(&self) -> u64 {
        self.geometry.length
    }

    /// CRC-32 of a piece.
    pub fn crc(&self, piece: PieceIndex) -> u32 {
        self.crcs[piece.index()]
    }

    /// Proves one piece from all its bytes.
    pub fn prove(&self, piece: PieceIndex, bytes: &[u8]) -> Result<(), ProofError> {
        let mut prover = self.prover(piece);
        prover.update(bytes);
        prover.finish()
    }

    /// Proves one piece from its bytes as they come, in order.
    pub fn prover(&self, piece: PieceIndex) -> Prover<'_> {
        let algorithm = self.digest.algorithm();
        let hasher = match piece.index().checked_sub(1) {
            None => chain::Hasher::new(algorithm),
            Some(before) => chain::Hasher::resume(algorithm, self.link(before), self.geometry.range(piece).start),
        };
        Prover { layout: self, piece, crc: crc32fast::Hasher::new(), hasher }
    }

    /// Checks the CRC-32 alone, for networks where that is trusted and for scrubs.
    pub fn check_crc(&self, piece: PieceIndex, bytes: &[u8]) -> Result<(), ProofError> {
        self.check_len(piece, bytes.len() as u64)?;
        if crc32fast::hash(bytes) == self.crc(piece) { Ok(()) } else { Err(ProofError::Checksum(piece)) }
    }

    fn check_len(&self, piece: PieceIndex, has: u64) -> Result<(), ProofError> {
        let says = u64::from(self.geometry.piece_len(piece));
        if has == says { Ok(()) } else { Err(ProofError::Length { piece, has, says }) }
    }

    fn link(&self, piece: usize) -> &[u8] {
        let len = self.digest.algorithm().digest_len();
        &self.links[piece * len..(piece + 1) * len]
    }

    /// The bytes of the module's table.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(encoded_len(self.digest.algorithm(), self.geometry.pieces()));
        out.extend(MAGIC);
        out.extend([1, u8::from(self.digest.algorithm() == Algorithm::Sha512), 0, 0]);
        out.extend(self.geometry.length.to_le_bytes());
        out.extend(self.geometry.piece_length.to_le_bytes());
        out.extend(self.geometry.pieces().to_le_bytes());
        out.extend(self.digest.as_bytes());
        out.extend(self.crcs.iter().flat_map(|crc| crc.to_le_bytes()));
        out.extend(&self.links);
        let crc = crc32fast::hash(&out);
        out.extend(crc.to_le_bytes());
        out
    }

    /// Reads what [`Self::encode`] wrote. Allocates no more than the bytes given.
    pub fn decode(bytes: &[u8]) -> Result<Self, LayoutError> {
        let short = LayoutError::Length { has: bytes.len(), says: HEADER_LEN };
        let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>().ok_or(short)?;
        let algorithm = match header[..8] {
            [b'S', b'L', b'Y', b'T', 1, 0, 0, 0] => Algorithm::Sha256,
            [b'S', b'L', b'Y', b'T', 1, 1, 0, 0] => Algorithm::Sha512,
            _ => return Err(LayoutError::Kind),
        };
        let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let length = u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32;
        let geometry = Geometry::new(length, u32_at(16)).ok_or(LayoutError::Geometry)?;
        if geometry.pieces() != u32_at(20) {
            return Err(LayoutError::Geometry);
        }
        let says = encoded_len(algorithm, geometry.pieces());
        if bytes.len() != says {
            return Err(LayoutError::Length { has: bytes.len(), says });
        }
        let (sealed, seal) = bytes.split_at(says - 4);
        if crc32fast::hash(sealed).to_le_bytes() != seal {
            return Err(LayoutError::Checksum);
        }
        let (digest, rest) = rest[..rest.len() - 4].split_at(algorithm.digest_len());
        let (crcs, links) = rest.split_at(4 * geometry.pieces() as usize);
        Ok(Self {
            digest: Digest::from_bytes(algorithm, digest).ok_or(LayoutError::Kind)?,
            geometry,
            crcs: crcs.as_chunks().0.iter().map(|crc| u32::from_le_bytes(*crc)).collect(),
            links: links.into(),
        })
    }
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Layout({:?}, {:?})", self.digest, self.geometry)
    }
}

fn encoded_len(algorithm: Algorithm, pieces: u32) -> usize {
    let pieces = pieces as usize;
    HEADER_LEN + algorithm.digest_len() + 4 * pieces + pieces.saturating_sub(1) * algorithm.digest_len() + 4
}

/// Bytes that are said to be a piece of a blob.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The blob's.
    pub layout: &'a Layout,
    /// Which piece.
    pub piece: PieceIndex,
    /// All its bytes.
    pub bytes: &'a [u8],
}

/// Proves several pieces, of one blob or of several, each as [`Layout::prove`] does. Those of SHA-256 are hashed [`LANES`] at a time.
pub fn prove_together(candidates: &[Candidate<'_>], lanes: Lanes) -> Vec<Result<(), ProofError>> {
    candidates.chunks(LANES).flat_map(|candidates| prove_lanes(candidates, lanes)).collect()
}

fn prove_lanes(candidates: &[Candidate<'_>], lanes: Lanes) -> Vec<Result<(), ProofError>> {
    let mut provers: Vec<_> =
        candidates.iter().map(|candidate| (candidate.layout.prover(candidate.piece), candidate.bytes)).collect();
    while provers.iter().any(|(_, bytes)| !bytes.is_empty()) {
        let mut crcs = Vec::with_capacity(LANES);
        let mut hashes = Vec::with_capacity(LANES);
        for (Prover { crc, hasher, .. }, bytes) in &mut provers {
            let step = bytes.split_off(..bytes.len().min(STEP_LEN)).unwrap_or_default();
            crcs.push((crc, step));
            hashes.push((hasher, step));
        }
        chain::Hasher::update_together(&mut hashes, lanes);
        crcs.into_iter().for_each(|(crc, step)| crc.update(step));
    }
    provers.into_iter().map(|(prover, _)| prover.finish()).collect()
}

/// Passes bytes through both sums. The slow one first, to which it is nothing to wait for bytes from another core; the fast one then has
/// them near.
fn sum(crc: &mut crc32fast::Hasher, hasher: &mut chain::Hasher, bytes: &[u8]) {
    for step in bytes.chunks(STEP_LEN) {
        hasher.update(step);
        crc.update(step);
    }
}

/// The proof of one piece under way. See [`Layout::prover`].
pub struct Prover<'a> {
    layout: &'a Layout,
    piece: PieceIndex,
    crc: crc32fast::Hasher,
    hasher: chain::Hasher,
}

impl Prover<'_> {
    /// The piece's next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        sum(&mut self.crc, &mut self.hasher, bytes);
    }

    /// Whether the bytes were the piece.
    pub fn finish(self) -> Result<(), ProofError> {
        let Self { layout, piece, crc, hasher } = self;
        let range = layout.geometry.range(piece);
        layout.check_len(piece, hasher.len() - range.start)?;
        if crc.finalize() != layout.crc(piece) {
            return Err(ProofError::Checksum(piece));
        }
        let holds = if range.end == layout.length() {
            hasher.finish() == layout.digest
        } else {
            hasher.edge().is_some_and(|edge| edge.as_bytes() == layout.link(piece.index()))
        };
        if holds { Ok(()) } else { Err(ProofError::Chain(piece)) }
    }
}

/// Makes a layout from a blob's bytes as they stream by, in one pass, without knowing the length beforehand: it notes every
/// edge of [`PIECE_LEN_MIN`] (36 or 68 bytes a MiB) and keeps those that the final length asks for.
#[derive(Clone)]
pub struct LayoutBuilder {
    algorithm: Algorithm,
    /// Bytes between the edges that are noted: [`PIECE_LEN_MIN`], or less in tests.
    unit: u32,
    hasher: chain::Hasher,
    crc: crc32fast::Hasher,
    /// Bytes since the last edge, `< unit`.
    since_edge: u32,
    crcs: Vec<u32>,
    links: Vec<u8>,
}

/// A blob longer than [`LEN_MAX`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("blob is longer than {LEN_MAX} bytes")]
pub struct TooLong;

impl LayoutBuilder {
    /// Starts at byte 0.
    pub fn new(algorithm: Algorithm) -> Self {
        Self::with_unit(algorithm, PIECE_LEN_MIN)
    }

    fn with_unit(algorithm: Algorithm, unit: u32) -> Self {
        Self {
            algorithm,
            unit,
            hasher: chain::Hasher::new(algorithm),
            crc: crc32fast::Hasher::new(),
            since_edge: 0,
            crcs: Vec::new(),
            links: Vec::new(),
        }
    }

    /// Bytes seen.
    pub fn len(&self) -> u64 {
        self.hasher.len()
    }

    /// Whether no byte was seen.
    pub fn is_empty(&self) -> bool {
        self.hasher.is_empty()
    }

    /// The next bytes. Refuses, and takes nothing, where the blob would pass [`LEN_MAX`].
    pub fn update(&mut self, mut bytes: &[u8]) -> Result<(), TooLong> {
        if self.len() + bytes.len() as u64 > LEN_MAX {
            return Err(TooLong);
        }
        while !bytes.is_empty() {
            let take = bytes.len().min((self.unit - self.since_edge) as usize);
            let (now, later) = bytes.split_at(take);
            sum(&mut self.crc, &mut self.hasher, now);
            self.since_edge += u32::try_from(take).unwrap_or(u32::MAX);
            if self.since_edge == self.unit {
                self.edge();
            }
            bytes = later;
        }
        Ok(())
    }

    fn edge(&mut self) {
        if let Some(link) = self.hasher.edge() {
            self.links.extend(link.as_bytes());
        }
        self.crcs.push(core::mem::take(&mut self.crc).finalize());
        self.since_edge = 0;
    }

    /// Closes the blob: its layout, digest included.
    #[expect(clippy::unwrap_used, reason = "update refuses a length without a geometry")]
    pub fn finish(self) -> Layout {
        let geometry = Geometry::of(self.len()).unwrap();
        self.cut(geometry)
    }

    /// As [`Self::finish`], with pieces of another length than a blob of this one has: a multiple of [`PIECE_LEN_MIN`] that a geometry
    /// may have. None where it may not.
    pub fn finish_in_pieces_of(self, piece_length: u32) -> Option<Layout> {
        let geometry = Geometry::new(self.len(), piece_length).filter(|_| piece_length.is_multiple_of(self.unit))?;
        Some(self.cut(geometry))
    }

    /// Keeps the edges that a geometry asks for, whose piece length is a multiple of the unit.
    fn cut(mut self, geometry: Geometry) -> Layout {
        let tail = u64::from(self.since_edge);
        if tail > 0 {
            self.crcs.push(core::mem::take(&mut self.crc).finalize());
        }
        let step = (geometry.piece_length / self.unit) as usize;
        let crcs = merge_crcs(&self.crcs, u64::from(self.unit), tail, step);
        let stride = self.algorithm.digest_len();
        let inner_edges = (geometry.pieces() as usize).saturating_sub(1);
        let links = (1..=inner_edges).flat_map(|edge| {
            let at = (edge * step - 1) * stride;
            &self.links[at..at + stride]
        });
        let links = links.copied().collect();
        Layout { digest: self.hasher.finish(), geometry, crcs, links }
    }
}

/// The CRC-32 of every `step` units in a row from those of the units, each of `unit` bytes but the last, which has `tail` where that
/// is not 0.
fn merge_crcs(crcs: &[u32], unit: u64, tail: u64, step: usize) -> Box<[u32]> {
    let last = crcs.len().saturating_sub(1);
    let hasher = |i: usize| {
        let len = if i == last && tail > 0 { tail } else { unit };
        crc32fast::Hasher::new_with_initial_len(crcs[i], len)
    };
    let starts = (0..crcs.len()).step_by(step);
    let merged = starts.map(|start| {
        let mut crc = hasher(start);
        (start + 1..crcs.len().min(start + step)).for_each(|i| crc.combine(&hasher(i)));
        crc.finalize()
    });
    merged.collect()
}

const _: () = assert!((PIECE_LEN_MIN as usize).is_multiple_of(BLOCK_LEN_MAX));

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;
    use sha2::Digest as _;

    fn blob(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 4096) as u8).collect()
    }

    fn layout(bytes: &[u8], algorithm: Algorithm) -> Layout {
        let mut builder = LayoutBuilder::new(algorithm);
        bytes.chunks(700_001).for_each(|chunk| builder.update(chunk).unwrap());
        builder.finish()
    }

    #[test]
    fn every_piece_is_proven_alone_and_in_any_order() {
        let bytes = blob(3 * MIB as usize + 12_345);
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let layout = layout(&bytes, algorithm);
            assert_eq!(layout.geometry().pieces(), 4);
            for piece in layout.geometry().all().rev() {
                let range = layout.geometry().range(piece);
                let mut own = bytes[range.start as usize..range.end as usize].to_vec();
                assert_eq!(layout.prove(piece, &own), Ok(()));
                own[17] ^= 1;
                assert_eq!(layout.prove(piece, &own), Err(ProofError::Checksum(piece)));
                own.pop();
                assert!(matches!(layout.prove(piece, &own), Err(ProofError::Length { .. })));
            }
        }
    }

    #[test]
    fn a_forged_piece_with_the_right_crc_breaks_the_chain() {
        let bytes = blob(2 * MIB as usize);
        let mut forged = layout(&bytes, Algorithm::Sha256);
        let wrong = vec![0; MIB as usize];
        forged.crcs[1] = crc32fast::hash(&wrong);
        let piece = forged.geometry().piece(1).unwrap();
        assert_eq!(forged.prove(piece, &wrong), Err(ProofError::Chain(piece)));
    }

    #[test]
    fn pieces_proven_together_are_judged_one_by_one() {
        let mib = MIB as usize;
        let (short, long) = (blob(2 * mib + 77), blob(9 * mib + 1));
        let layouts =
            [layout(&short, Algorithm::Sha256), layout(&long, Algorithm::Sha256), layout(&short, Algorithm::Sha512)];
        let piece = |blob: usize, index: u32| {
            let (layout, bytes) = (&layouts[blob], if blob == 1 { &long } else { &short });
            let piece = layout.geometry().piece(index).unwrap();
            let range = layout.geometry().range(piece);
            Candidate { layout, piece, bytes: &bytes[range.start as usize..range.end as usize] }
        };
        let mut candidates: Vec<_> = (0..10).map(|index| piece(1, index)).collect();
        candidates.extend([piece(0, 2), piece(2, 1), piece(0, 0), piece(2, 2), piece(0, 1)]);
        let count = candidates.len();
        let lanes = chain::tests::plain(1);
        assert_eq!(prove_together(&candidates, lanes), vec![Ok(()); count]);
        assert_eq!(prove_together(&[], lanes), []);

        let mut damaged = candidates[3].bytes.to_vec();
        damaged[mib - 1] ^= 1;
        let (mut forged, wrong) = (layouts[1].clone(), vec![0; mib]);
        forged.crcs[4] = crc32fast::hash(&wrong);
        let (third, fourth) = (candidates[3].piece, candidates[4].piece);
        candidates[3].bytes = &damaged;
        candidates[4] = Candidate { layout: &forged, piece: fourth, bytes: &wrong };
        candidates[6].bytes = &candidates[6].bytes[1..];
        candidates[12].bytes = &[];
        for (at, proven) in prove_together(&candidates, lanes).into_iter().enumerate() {
            match at {
                3 => assert_eq!(proven, Err(ProofError::Checksum(third))),
                4 => assert_eq!(proven, Err(ProofError::Chain(fourth))),
                6 | 12 => assert!(matches!(proven, Err(ProofError::Length { .. }))),
                _ => assert_eq!(proven, Ok(()), "{at}"),
            }
        }
    }

    #[test]
    fn encoding_round_trips_and_notices_damage() {
        for len in [0, 1, MIB as usize, 3 * MIB as usize + 1] {
            for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                let layout = layout(&blob(len), algorithm);
                let bytes = layout.encode();
                assert_eq!(Layout::decode(&bytes), Ok(layout));
                for at in 0..bytes.len() {
                    let mut damaged = bytes.clone();
                    damaged[at] ^= 0x40;
                    assert!(Layout::decode(&damaged).is_err(), "byte {at}");
                }
                assert!(Layout::decode(&bytes[..bytes.len() - 1]).is_err());
            }
        }
    }

    #[test]
    fn the_empty_blob_has_no_pieces() {
        let layout = LayoutBuilder::new(Algorithm::Sha256).finish();
        assert_eq!(layout.geometry().pieces(), 0);
        assert_eq!(
            alloc::format!("{}", layout.digest()),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn pieces_grow_with_the_blob() {
        for (gib, piece_mib) in [(1, 1), (8, 1), (9, 2), (17, 4), (100, 16), (1024, 16)] {
            let geometry = Geometry::of(gib << 30).unwrap();
            assert_eq!(geometry.piece_length(), piece_mib * MIB, "{gib} GiB");
        }
        assert_eq!(Geometry::of(LEN_MAX).unwrap().pieces(), PIECES_MAX);
        assert_eq!(Geometry::of(LEN_MAX + 1), None);
    }

    #[test]
    fn geometries_out_of_bounds_are_refused() {
        let mib = u64::from(MIB);
        for piece_length in [0, 1, MIB - 1, MIB + 1, 3 * MIB, 32 * MIB, u32::MAX] {
            assert_eq!(Geometry::new(mib, piece_length), None, "{piece_length}");
        }
        assert!(Geometry::new(u64::from(PIECES_MAX) * mib, MIB).is_some());
        assert_eq!(Geometry::new(u64::from(PIECES_MAX) * mib + 1, MIB), None);
        assert_eq!(Geometry::new(u64::MAX, PIECE_LEN_MAX), None);
    }

    #[test]
    fn ranges_are_covered_by_the_pieces_they_touch() {
        let mib = u64::from(MIB);
        let g = Geometry::of(5 * mib + 1).unwrap();
        assert_eq!(g.covering(0..0), 0..0);
        assert_eq!(g.covering(7..7), 0..0);
        assert_eq!(g.covering(0..1), 0..1);
        assert_eq!(g.covering(mib - 1..mib + 1), 0..2);
        assert_eq!(g.covering(5 * mib..5 * mib + 1), 5..6);
        assert_eq!(g.covering(5 * mib..5 * mib + 2), 0..0, "beyond the end");
        assert_eq!((g.piece(5).map(|piece| g.piece_len(piece)), g.piece(6)), (Some(1), None));
        assert_eq!((g.piece_at(5 * mib).map(PieceIndex::get), g.piece_at(5 * mib + 1)), (Some(5), None));
    }

    fn algorithm() -> impl Strategy<Value = Algorithm> {
        prop_oneof![Just(Algorithm::Sha256), Just(Algorithm::Sha512)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Long pieces in small: a builder that notes an edge every 128 or 256 bytes, and a geometry that asks for every nth of them.
        #[test]
        fn long_pieces_keep_every_nth_edge(
            len in 0usize..6000,
            unit in prop_oneof![Just(128u32), Just(256)],
            doublings in 0u32..5,
            chunk in 1usize..1500,
            cut in 1usize..700,
            algorithm in algorithm(),
        ) {
            let bytes = blob(len);
            let mut builder = LayoutBuilder::with_unit(algorithm, unit);
            bytes.chunks(chunk).for_each(|chunk| builder.update(chunk).unwrap());
            let geometry = Geometry { length: len as u64, piece_length: unit << doublings };
            let layout = builder.cut(geometry);
            let whole: Vec<u8> = match algorithm {
                Algorithm::Sha256 => sha2::Sha256::digest(&bytes).to_vec(),
                Algorithm::Sha512 => sha2::Sha512::digest(&bytes).to_vec(),
            };
            prop_assert_eq!(layout.digest().as_bytes(), whole);
            prop_assert_eq!(layout.crcs.len(), geometry.pieces() as usize);
            prop_assert_eq!(layout.links.len(), layout.crcs.len().saturating_sub(1) * algorithm.digest_len());
            for piece in geometry.all().rev() {
                let range = geometry.range(piece);
                let mut own = bytes[range.start as usize..range.end as usize].to_vec();
                prop_assert_eq!(layout.crc(piece), crc32fast::hash(&own));
                let mut prover = layout.prover(piece);
                own.chunks(cut).for_each(|chunk| prover.update(chunk));
                prop_assert_eq!(prover.finish(), Ok(()));
                own.push(0);
                let has = own.len() as u64;
                prop_assert_eq!(layout.prove(piece, &own), Err(ProofError::Length { piece, has, says: has - 1 }));
            }
        }

        #[test]
        fn arbitrary_bytes_are_no_layout_and_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Layout::decode(&bytes).is_err());
        }

        /// Damage under a checksum that was made good again: decoded to something else or refused, never a panic.
        #[test]
        fn a_forged_layout_never_panics(at in 4usize..60, with in any::<[u8; 4]>(), cut in 0usize..3) {
            let geometry = Geometry::of(2 * u64::from(MIB) + 9).unwrap();
            let digest = Digest::sha256([7; 32]);
            let mut bytes = Layout { digest, geometry, crcs: [1, 2, 3].into(), links: [5; 64].into() }.encode();
            bytes[at..at + 4].copy_from_slice(&with);
            bytes.truncate(bytes.len() - cut);
            let end = bytes.len() - 4;
            let seal = crc32fast::hash(&bytes[..end]);
            bytes[end..].copy_from_slice(&seal.to_le_bytes());
            if let Ok(layout) = Layout::decode(&bytes) {
                prop_assert_eq!(layout.encode(), bytes);
            }
        }
    }
}
