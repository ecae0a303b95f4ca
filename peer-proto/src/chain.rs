//! A digest as a chain: SHA-2 compresses block after block, so the hash of a blob passes through a known state at every
//! piece edge. Whoever knows the state at both ends of a piece can prove the piece alone, in any order.

/// A loop whose turns are written out, so that what is indexed by its number stays in registers.
#[cfg(target_arch = "x86_64")]
macro_rules! unrolled {
    ($number:ident in $($value:literal)* $body:block) => {
        $({
            const $number: usize = $value;
            $body
        })*
    };
}

#[cfg(target_arch = "x86_64")]
pub mod lanes;
#[cfg(target_arch = "x86_64")]
pub mod pairs;

use crate::id::{Algorithm, Digest};
use sha2::block_api::{compress256, compress512};

const SHA256_INITIAL: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
const SHA512_INITIAL: [u64; 8] = [
    0x6a09_e667_f3bc_c908,
    0xbb67_ae85_84ca_a73b,
    0x3c6e_f372_fe94_f82b,
    0xa54f_f53a_5f1d_36f1,
    0x510e_527f_ade6_82d1,
    0x9b05_688c_2b3e_6c1f,
    0x1f83_d9ab_fb41_bd6b,
    0x5be0_cd19_137e_2179,
];

/// Longest block of a hash we know, in bytes. Piece lengths are multiples of it.
pub const BLOCK_LEN_MAX: usize = 128;

const SHA256_BLOCK_LEN: usize = 64;

/// SHA-256's, one for each round (FIPS 180-4, section 4.2.2).
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ROUND_CONSTANTS: [u32; 64] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
];

/// Most messages that a [`Compress`] does at once.
pub const LANES: usize = 8;

/// Compresses blocks of several messages, at most [`LANES`], into the SHA-256 state of each; as many as the message with the fewest has.
pub type Compress = fn(states: &mut [[u32; 8]], blocks: &[&[[u8; SHA256_BLOCK_LEN]]]);

/// A processor's way to do several messages at once.
#[derive(Clone, Copy, Debug)]
pub struct Lanes {
    /// How.
    pub compress: Compress,
    /// Fewer messages are done sooner one after the other; at least 1, at most [`LANES`].
    pub fewest: usize,
}

#[derive(Clone, Copy)]
enum State {
    Sha256([u32; 8]),
    Sha512([u64; 8]),
}

impl State {
    fn initial(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(SHA256_INITIAL),
            Algorithm::Sha512 => Self::Sha512(SHA512_INITIAL),
        }
    }

    const fn block_len(&self) -> usize {
        match self {
            Self::Sha256(_) => SHA256_BLOCK_LEN,
            Self::Sha512(_) => 128,
        }
    }

    /// Compresses whole blocks; what is left over is the caller's.
    fn compress(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(words) => compress256(words, bytes.as_chunks().0),
            Self::Sha512(words) => compress512(words, bytes.as_chunks().0),
        }
    }

    fn value(&self) -> Digest {
        match self {
            Self::Sha256(words) => {
                let mut out = [0; 32];
                for (word, o) in words.iter().zip(out.as_chunks_mut().0) {
                    *o = word.to_be_bytes();
                }
                Digest::sha256(out)
            }
            Self::Sha512(words) => {
                let mut out = [0; 64];
                for (word, o) in words.iter().zip(out.as_chunks_mut().0) {
                    *o = word.to_be_bytes();
                }
                Digest::sha512(out)
            }
        }
    }

    fn from_value(algorithm: Algorithm, value: &[u8]) -> Self {
        match algorithm {
            Algorithm::Sha256 => {
                let mut words = [0; 8];
                for (word, bytes) in words.iter_mut().zip(value.as_chunks().0) {
                    *word = u32::from_be_bytes(*bytes);
                }
                Self::Sha256(words)
            }
            Algorithm::Sha512 => {
                let mut words = [0; 8];
                for (word, bytes) in words.iter_mut().zip(value.as_chunks().0) {
                    *word = u64::from_be_bytes(*bytes);
                }
                Self::Sha512(words)
            }
        }
    }
}

/// A SHA-2 hash that can start and stop at any block edge.
#[derive(Clone)]
pub struct Hasher {
    state: State,
    /// Bytes hashed since the blob's start, `pending` included.
    len: u64,
    /// What has not filled a block yet; `0 <= pending_len < block_len`.
    pending: [u8; BLOCK_LEN_MAX],
    pending_len: usize,
}

impl Hasher {
    /// Starts at the beginning of a blob.
    pub fn new(algorithm: Algorithm) -> Self {
        Self { state: State::initial(algorithm), len: 0, pending: [0; BLOCK_LEN_MAX], pending_len: 0 }
    }

    /// Continues at byte `offset`, a multiple of [`BLOCK_LEN_MAX`], from the chaining value there.
    pub(crate) fn resume(algorithm: Algorithm, value: &[u8], offset: u64) -> Self {
        debug_assert_eq!(value.len(), algorithm.digest_len());
        debug_assert_eq!(offset % BLOCK_LEN_MAX as u64, 0);
        Self { state: State::from_value(algorithm, value), len: offset, pending: [0; BLOCK_LEN_MAX], pending_len: 0 }
    }

    /// Bytes hashed since the blob's start.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing has been hashed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Hashes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.len += bytes.len() as u64;
        let block_len = self.state.block_len();
        if self.pending_len > 0 {
            let take = bytes.len().min(block_len - self.pending_len);
            self.pending[self.pending_len..self.pending_len + take].copy_from_slice(&bytes[..take]);
            self.pending_len += take;
            bytes = &bytes[take..];
            if self.pending_len < block_len {
                return;
            }
            self.state.compress(&self.pending[..block_len]);
            self.pending_len = 0;
        }
        let rest = bytes.len() % block_len;
        let (blocks, tail) = bytes.split_at(bytes.len() - rest);
        self.state.compress(blocks);
        self.pending[..rest].copy_from_slice(tail);
        self.pending_len = rest;
    }

    /// Hashes the next bytes of each of several hashes, up to [`LANES`]; those of SHA-256 at once, as far as they all go.
    pub(crate) fn update_together(hashes: &mut [(&mut Self, &[u8])], lanes: Lanes) {
        let mut filled = [const { None }; LANES];
        let fitting = hashes.iter_mut().filter_map(|(hasher, bytes)| match &mut hasher.state {
            State::Sha256(words) if hasher.pending_len == 0 && bytes.len() >= SHA256_BLOCK_LEN => {
                Some((words, &mut hasher.len, bytes))
            }
            _ => None,
        });
        let mut count = 0;
        for (lane, fits) in filled.iter_mut().zip(fitting) {
            *lane = Some(fits);
            count += 1;
        }
        let shortest = filled.iter().flatten().map(|(_, _, bytes)| bytes.len() / SHA256_BLOCK_LEN).min().unwrap_or(0);
        if shortest > 0 && count >= lanes.fewest {
            let mut states = [[0; 8]; LANES];
            let mut blocks = [&[][..]; LANES];
            for (lane, (words, _, bytes)) in filled.iter().flatten().enumerate() {
                states[lane] = **words;
                blocks[lane] = &bytes.as_chunks().0[..shortest];
            }
            (lanes.compress)(&mut states[..count], &blocks[..count]);
            let done = shortest * SHA256_BLOCK_LEN;
            for ((words, len, bytes), state) in filled.into_iter().flatten().zip(states) {
                *words = state;
                *len += done as u64;
                *bytes = &bytes[done..];
            }
        }
        hashes.iter_mut().for_each(|(hasher, bytes)| hasher.update(bytes));
    }

    /// The chaining value here, where the length so far is a multiple of the hash's block.
    pub(crate) fn edge(&self) -> Option<Digest> {
        (self.pending_len == 0).then(|| self.state.value())
    }

    /// Pads and closes the hash.
    pub fn finish(mut self) -> Digest {
        let block_len = self.state.block_len();
        let length_len = block_len / 8;
        let bits = u128::from(self.len) * 8;
        let mut tail = [0; 2 * BLOCK_LEN_MAX];
        tail[..self.pending_len].copy_from_slice(&self.pending[..self.pending_len]);
        tail[self.pending_len] = 0x80;
        let blocks = if self.pending_len + 1 + length_len <= block_len { 1 } else { 2 };
        let end = blocks * block_len;
        tail[end - length_len..end].copy_from_slice(&bits.to_be_bytes()[16 - length_len..]);
        self.state.compress(&tail[..end]);
        self.state.value()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;
    use sha2::Digest as _;

    /// Lanes one after the other.
    pub(crate) fn plain(fewest: usize) -> Lanes {
        fn compress(states: &mut [[u32; 8]], blocks: &[&[[u8; SHA256_BLOCK_LEN]]]) {
            let shortest = blocks.iter().map(|blocks| blocks.len()).min().unwrap();
            states.iter_mut().zip(blocks).for_each(|(state, blocks)| compress256(state, &blocks[..shortest]));
        }
        Lanes { compress, fewest }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever their lengths, kinds and cuts, several hashes come to what each comes to by itself.
        #[test]
        fn hashes_together_are_the_same_as_each_alone(
            messages in proptest::collection::vec((0usize..2000, any::<bool>(), any::<u8>()), 0..=LANES),
            step in 1usize..700,
            fewest in 1..=LANES,
        ) {
            let algorithms = messages.iter().map(|(_, long, _)| if *long { Algorithm::Sha512 } else { Algorithm::Sha256 });
            let mut together: Vec<_> = algorithms.clone().map(Hasher::new).collect();
            let bytes: Vec<Vec<u8>> =
                messages.iter().map(|(len, _, salt)| (0..*len).map(|i| (i * 31 % 251) as u8 ^ salt).collect()).collect();
            for from in (0..2000).step_by(step) {
                let part = |bytes: &'_ [u8]| from.min(bytes.len())..(from + step).min(bytes.len());
                let mut parts: Vec<_> =
                    together.iter_mut().zip(&bytes).map(|(hasher, bytes)| (hasher, &bytes[part(bytes)])).collect();
                Hasher::update_together(&mut parts, plain(fewest));
            }
            for ((together, bytes), algorithm) in together.into_iter().zip(&bytes).zip(algorithms) {
                let mut alone = Hasher::new(algorithm);
                alone.update(bytes);
                prop_assert_eq!(together.len(), alone.len());
                prop_assert_eq!(together.finish(), alone.finish());
            }
        }
    }

    #[test]
    fn agrees_with_the_plain_hash_whatever_the_cuts() {
        for len in [0usize, 1, 55, 56, 63, 64, 65, 111, 112, 119, 120, 127, 128, 129, 1000, 4096] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
            for cut in [1, 7, 64, 100, 5000] {
                for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                    let mut ours = Hasher::new(algorithm);
                    bytes.chunks(cut).for_each(|chunk| ours.update(chunk));
                    let theirs: Vec<u8> = match algorithm {
                        Algorithm::Sha256 => sha2::Sha256::digest(&bytes).to_vec(),
                        Algorithm::Sha512 => sha2::Sha512::digest(&bytes).to_vec(),
                    };
                    assert_eq!(ours.finish().as_bytes(), theirs, "{len} bytes cut by {cut}");
                }
            }
        }
    }

    #[test]
    fn resumes_from_the_value_at_any_edge_and_has_none_elsewhere() {
        let bytes: Vec<u8> = (0..1000u32).map(|i| (i % 253) as u8).collect();
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let mut whole = Hasher::new(algorithm);
            whole.update(&bytes);
            let digest = whole.finish();
            for at in 0..bytes.len() {
                let mut first = Hasher::new(algorithm);
                first.update(&bytes[..at]);
                assert_eq!(first.edge().is_some(), at.is_multiple_of(first.state.block_len()), "{at}");
                let Some(edge) = first.edge().filter(|_| at.is_multiple_of(BLOCK_LEN_MAX)) else { continue };
                let mut second = Hasher::resume(algorithm, edge.as_bytes(), at as u64);
                assert_eq!(second.edge(), Some(edge));
                second.update(&bytes[at..]);
                assert_eq!(second.len(), bytes.len() as u64);
                assert_eq!(second.finish(), digest, "resumed at {at}");
            }
        }
    }
}
