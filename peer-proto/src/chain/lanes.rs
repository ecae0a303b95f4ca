//! SHA-256 of several messages at once (FIPS 180-4, section 6.2.2): each vector holds one word of all of them, so that a round takes
//! as long for eight as for one. Processors' own SHA instructions do one message at a time, and each waits for the one before.
//!
//! A message is a chain and cannot be cut; pieces can, since a layout has the state at every edge.

use super::{LANES, ROUND_CONSTANTS, SHA256_BLOCK_LEN};
use core::{
    arch::x86_64::{
        __m256i, _mm256_add_epi32, _mm256_extract_epi32, _mm256_permute2x128_si256, _mm256_ror_epi32,
        _mm256_set1_epi32, _mm256_setr_epi8, _mm256_setr_epi32, _mm256_setr_epi64x, _mm256_setzero_si256,
        _mm256_shuffle_epi8, _mm256_srli_epi32, _mm256_ternarylogic_epi32, _mm256_unpackhi_epi32,
        _mm256_unpackhi_epi64, _mm256_unpacklo_epi32, _mm256_unpacklo_epi64,
    },
    array,
};

/// One word of each message.
type Words = __m256i;

/// Compresses the blocks of each message, of which there are at most [`LANES`], into its state; as many as the message with the fewest
/// has.
///
/// # Safety
///
/// The processor must have AVX2, AVX-512F and AVX-512VL.
#[target_feature(enable = "avx2,avx512f,avx512vl")]
pub fn compress(messages: &mut [[u32; 8]], blocks: &[&[[u8; SHA256_BLOCK_LEN]]]) {
    let Some(first) = blocks.first() else { return };
    let len = blocks.iter().map(|blocks| blocks.len()).min().unwrap_or(0);
    // So that the loop needs no look at the lengths. Lanes without a message do the first one's again, for nobody.
    let blocks: [_; LANES] = array::from_fn(|lane| &blocks.get(lane).unwrap_or(first)[..len]);
    let mut states = [[0; 8]; LANES];
    states.iter_mut().zip(&*messages).for_each(|(state, message)| *state = *message);
    let mut sums = transpose(states.map(|state| row(state.map(u32::cast_signed))));
    #[expect(clippy::needless_range_loop, reason = "a place in each message")]
    for at in 0..len {
        let mut schedule = [_mm256_setzero_si256(); 16];
        let (first, second) = schedule.split_at_mut(8);
        for lane in 0..LANES {
            (first[lane], second[lane]) = message(&blocks[lane][at]);
        }
        for half in schedule.as_chunks_mut().0 {
            *half = transpose(*half);
        }
        let mut state = sums;
        for (turn, constants) in ROUND_CONSTANTS.as_chunks::<16>().0.iter().enumerate() {
            unrolled!(WORD in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 {
                round(&mut state, schedule[WORD], constants[WORD]);
                if turn < 3 {
                    schedule[WORD] = extended(&schedule, WORD);
                }
            });
        }
        for word in 0..8 {
            sums[word] = add(sums[word], state[word]);
        }
    }
    messages.iter_mut().zip(transpose(sums)).for_each(|(message, row)| *message = words(row));
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

/// A block's halves as words, which are big endian.
#[target_feature(enable = "avx2")]
#[inline]
fn message(block: &[u8; SHA256_BLOCK_LEN]) -> (Words, Words) {
    let [a, b, c, d, e, f, g, h] = *block.as_chunks::<8>().0 else { unreachable!() };
    let turned = _mm256_setr_epi8(
        3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12,
    );
    let quad = i64::from_le_bytes;
    (
        _mm256_shuffle_epi8(_mm256_setr_epi64x(quad(a), quad(b), quad(c), quad(d)), turned),
        _mm256_shuffle_epi8(_mm256_setr_epi64x(quad(e), quad(f), quad(g), quad(h)), turned),
    )
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
