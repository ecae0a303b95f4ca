//! SHA-256 of several messages at once (FIPS 180-4, section 6.2.2): each vector holds one word of all of them, so that a round takes
//! as long for eight as for one. Processors' own SHA instructions do one message at a time, and each waits for the one before.
//!
//! A message is a chain and cannot be cut; pieces can, since a layout has the state at every edge.

use super::{LANES, SHA256_BLOCK_LEN};
use core::{
    arch::x86_64::{
        __m256i, _mm256_add_epi32, _mm256_extract_epi32, _mm256_permute2x128_si256, _mm256_ror_epi32,
        _mm256_set1_epi32, _mm256_setr_epi8, _mm256_setr_epi32, _mm256_setr_epi64x, _mm256_shuffle_epi8,
        _mm256_srli_epi32, _mm256_ternarylogic_epi32, _mm256_unpackhi_epi32, _mm256_unpackhi_epi64,
        _mm256_unpacklo_epi32, _mm256_unpacklo_epi64,
    },
    array,
};

/// FIPS 180-4, section 4.2.2.
const ROUND: [u32; 64] = [
    0x428a_2f98,
    0x7137_4491,
    0xb5c0_fbcf,
    0xe9b5_dba5,
    0x3956_c25b,
    0x59f1_11f1,
    0x923f_82a4,
    0xab1c_5ed5,
    0xd807_aa98,
    0x1283_5b01,
    0x2431_85be,
    0x550c_7dc3,
    0x72be_5d74,
    0x80de_b1fe,
    0x9bdc_06a7,
    0xc19b_f174,
    0xe49b_69c1,
    0xefbe_4786,
    0x0fc1_9dc6,
    0x240c_a1cc,
    0x2de9_2c6f,
    0x4a74_84aa,
    0x5cb0_a9dc,
    0x76f9_88da,
    0x983e_5152,
    0xa831_c66d,
    0xb003_27c8,
    0xbf59_7fc7,
    0xc6e0_0bf3,
    0xd5a7_9147,
    0x06ca_6351,
    0x1429_2967,
    0x27b7_0a85,
    0x2e1b_2138,
    0x4d2c_6dfc,
    0x5338_0d13,
    0x650a_7354,
    0x766a_0abb,
    0x81c2_c92e,
    0x9272_2c85,
    0xa2bf_e8a1,
    0xa81a_664b,
    0xc24b_8b70,
    0xc76c_51a3,
    0xd192_e819,
    0xd699_0624,
    0xf40e_3585,
    0x106a_a070,
    0x19a4_c116,
    0x1e37_6c08,
    0x2748_774c,
    0x34b0_bcb5,
    0x391c_0cb3,
    0x4ed8_aa4a,
    0x5b9c_ca4f,
    0x682e_6ff3,
    0x748f_82ee,
    0x78a5_636f,
    0x84c8_7814,
    0x8cc7_0208,
    0x90be_fffa,
    0xa450_6ceb,
    0xbef9_a3f7,
    0xc671_78f2,
];

/// One word of each message.
type Words = __m256i;

/// A loop whose turns are written out, so that what it indexes by its number stays in registers.
macro_rules! unrolled {
    ($number:ident in $($value:literal)* $body:block) => {
        $({
            const $number: usize = $value;
            $body
        })*
    };
}

/// Compresses the blocks of each message into its state, as many as the message with the fewest has.
///
/// # Safety
///
/// The processor must have AVX2, AVX-512F and AVX-512VL.
#[target_feature(enable = "avx2,avx512f,avx512vl")]
pub fn compress(states: &mut [[u32; 8]; LANES], blocks: &[&[[u8; SHA256_BLOCK_LEN]]; LANES]) {
    let len = blocks.iter().map(|blocks| blocks.len()).min().unwrap_or(0);
    // So that the loop needs no look at the lengths.
    let blocks: [_; LANES] = array::from_fn(|lane| &blocks[lane][..len]);
    let mut sums = transpose(states.map(|state| row(state.map(u32::cast_signed))));
    #[expect(clippy::needless_range_loop, reason = "a place in each of eight")]
    for at in 0..len {
        let halves = [0, 1].map(|half| transpose(array::from_fn(|lane| message(&blocks[lane][at], half))));
        let mut schedule: [Words; 16] = array::from_fn(|word| halves[word / 8][word % 8]);
        let mut state = sums;
        for (turn, constants) in ROUND.as_chunks::<16>().0.iter().enumerate() {
            unrolled!(WORD in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 {
                round(&mut state, schedule[WORD], constants[WORD]);
                if turn < 3 {
                    schedule[WORD] = extended(&schedule, WORD);
                }
            });
        }
        sums = array::from_fn(|word| add(sums[word], state[word]));
    }
    *states = transpose(sums).map(|row| words(row));
}

#[target_feature(enable = "avx2")]
#[inline]
fn row(words: [i32; 8]) -> Words {
    let [a, b, c, d, e, f, g, h] = words;
    _mm256_setr_epi32(a, b, c, d, e, f, g, h)
}

#[target_feature(enable = "avx2")]
#[inline]
fn words(row: Words) -> [u32; 8] {
    [
        _mm256_extract_epi32::<0>(row),
        _mm256_extract_epi32::<1>(row),
        _mm256_extract_epi32::<2>(row),
        _mm256_extract_epi32::<3>(row),
        _mm256_extract_epi32::<4>(row),
        _mm256_extract_epi32::<5>(row),
        _mm256_extract_epi32::<6>(row),
        _mm256_extract_epi32::<7>(row),
    ]
    .map(i32::cast_unsigned)
}

/// Half of a block as words, which are big endian.
#[target_feature(enable = "avx2")]
#[inline]
fn message(block: &[u8; SHA256_BLOCK_LEN], half: usize) -> Words {
    let quads = &block.as_chunks::<8>().0[4 * half..4 * half + 4];
    let quad = |at: usize| i64::from_le_bytes(quads[at]);
    let turned = _mm256_setr_epi8(
        3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12,
    );
    _mm256_shuffle_epi8(_mm256_setr_epi64x(quad(0), quad(1), quad(2), quad(3)), turned)
}

/// Of eight rows of eight words the eight columns.
#[target_feature(enable = "avx2")]
#[inline]
fn transpose(rows: [Words; 8]) -> [Words; 8] {
    let pair = |a: usize, b: usize| (_mm256_unpacklo_epi32(rows[a], rows[b]), _mm256_unpackhi_epi32(rows[a], rows[b]));
    let four = |from: usize| {
        let ((a, b), (c, d)) = (pair(from, from + 1), pair(from + 2, from + 3));
        [
            _mm256_unpacklo_epi64(a, c),
            _mm256_unpackhi_epi64(a, c),
            _mm256_unpacklo_epi64(b, d),
            _mm256_unpackhi_epi64(b, d),
        ]
    };
    // Each has a column of its four rows in its lower half, and the fourth column after that in its upper.
    let (upper, lower) = (four(0), four(4));
    array::from_fn(|column| {
        let (a, b) = (upper[column % 4], lower[column % 4]);
        if column < 4 { _mm256_permute2x128_si256::<0x20>(a, b) } else { _mm256_permute2x128_si256::<0x31>(a, b) }
    })
}

#[target_feature(enable = "avx2")]
#[inline]
fn add(a: Words, b: Words) -> Words {
    _mm256_add_epi32(a, b)
}

#[target_feature(enable = "avx512f,avx512vl")]
#[inline]
fn xor(a: Words, b: Words, c: Words) -> Words {
    _mm256_ternarylogic_epi32::<0b1001_0110>(a, b, c)
}

#[target_feature(enable = "avx2,avx512f,avx512vl")]
#[inline]
fn round(state: &mut [Words; 8], word: Words, constant: u32) {
    let [a, b, c, d, e, f, g, h] = *state;
    let choice = _mm256_ternarylogic_epi32::<0b1100_1010>(e, f, g);
    let majority = _mm256_ternarylogic_epi32::<0b1110_1000>(a, b, c);
    let sum1 = xor(_mm256_ror_epi32::<6>(e), _mm256_ror_epi32::<11>(e), _mm256_ror_epi32::<25>(e));
    let sum0 = xor(_mm256_ror_epi32::<2>(a), _mm256_ror_epi32::<13>(a), _mm256_ror_epi32::<22>(a));
    let constant = _mm256_set1_epi32(constant.cast_signed());
    let first = add(add(add(h, sum1), add(choice, constant)), word);
    *state = [add(add(sum0, majority), first), a, b, c, add(d, first), e, f, g];
}

/// The word sixteen after one, in whose place it goes.
#[target_feature(enable = "avx2,avx512f,avx512vl")]
#[inline]
fn extended(schedule: &[Words; 16], at: usize) -> Words {
    let [x, y] = [schedule[(at + 1) % 16], schedule[(at + 14) % 16]];
    let sigma0 = xor(_mm256_ror_epi32::<7>(x), _mm256_ror_epi32::<18>(x), _mm256_srli_epi32::<3>(x));
    let sigma1 = xor(_mm256_ror_epi32::<17>(y), _mm256_ror_epi32::<19>(y), _mm256_srli_epi32::<10>(y));
    add(add(schedule[at], sigma0), add(sigma1, schedule[(at + 9) % 16]))
}
