//! SHA-256 of two messages in turns by the processor's own instructions for it. Each of a message's rounds waits for the one before;
//! those of another message fill the wait, where the processor can begin a round before the last has ended.

use super::{ROUND_CONSTANTS, SHA256_BLOCK_LEN};
use core::{
    arch::x86_64::{
        __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_extract_epi32, _mm_set_epi32, _mm_set_epi64x, _mm_setr_epi8,
        _mm_setr_epi32, _mm_setzero_si128, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32,
        _mm_shuffle_epi8, _mm_shuffle_epi32,
    },
    array,
};

/// A state as the instructions have it: words a, b, e, f and words c, d, g, h, each from the highest place down.
type State = [__m128i; 2];

/// Compresses the blocks of each message into its state, as many as the message with the fewest has.
///
/// # Safety
///
/// The processor must have SHA, SSSE3 and SSE4.1.
#[target_feature(enable = "sha,ssse3,sse4.1")]
pub fn compress(states: &mut [[u32; 8]], blocks: &[&[[u8; SHA256_BLOCK_LEN]]]) {
    let len = blocks.iter().map(|blocks| blocks.len()).min().unwrap_or(0);
    let (pairs, odd) = states.as_chunks_mut();
    let (blocks, odd_blocks) = blocks.as_chunks();
    for (states, blocks) in pairs.iter_mut().zip(blocks) {
        interleave::<2>(states, blocks, len);
    }
    if let ([state], [blocks]) = (odd, odd_blocks) {
        interleave::<1>(array::from_mut(state), &[blocks], len);
    }
}

#[target_feature(enable = "sha,ssse3,sse4.1")]
fn interleave<const N: usize>(states: &mut [[u32; 8]; N], blocks: &[&[[u8; SHA256_BLOCK_LEN]]; N], len: usize) {
    // So that the loop needs no look at the lengths.
    let blocks: [_; N] = array::from_fn(|n| &blocks[n][..len]);
    let mut sums: [State; N] = array::from_fn(|n| opened(&states[n]));
    #[expect(clippy::needless_range_loop, reason = "a place in each message")]
    for at in 0..len {
        let mut state = sums;
        let mut schedule = [[_mm_setzero_si128(); 4]; N];
        for n in 0..N {
            schedule[n] = words(&blocks[n][at]);
        }
        unrolled!(FOUR in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 {
            let [a, b, c, d] = ROUND_CONSTANTS.as_chunks::<4>().0[FOUR].map(u32::cast_signed);
            let constants = _mm_setr_epi32(a, b, c, d);
            for n in 0..N {
                let words = &mut schedule[n];
                four_rounds(&mut state[n], _mm_add_epi32(words[FOUR % 4], constants));
                if FOUR < 12 {
                    words[FOUR % 4] = extended(words, FOUR);
                }
            }
        });
        for n in 0..N {
            let ([a, b], [c, d]) = (sums[n], state[n]);
            sums[n] = [_mm_add_epi32(a, c), _mm_add_epi32(b, d)];
        }
    }
    for n in 0..N {
        states[n] = closed(sums[n]);
    }
}

#[target_feature(enable = "sha,sse4.1")]
#[inline]
fn opened(state: &[u32; 8]) -> State {
    let [a, b, c, d, e, f, g, h] = state.map(u32::cast_signed);
    [_mm_set_epi32(a, b, e, f), _mm_set_epi32(c, d, g, h)]
}

#[target_feature(enable = "sha,sse4.1")]
#[inline]
fn closed([first, second]: State) -> [u32; 8] {
    [
        _mm_extract_epi32::<3>(first),
        _mm_extract_epi32::<2>(first),
        _mm_extract_epi32::<3>(second),
        _mm_extract_epi32::<2>(second),
        _mm_extract_epi32::<1>(first),
        _mm_extract_epi32::<0>(first),
        _mm_extract_epi32::<1>(second),
        _mm_extract_epi32::<0>(second),
    ]
    .map(i32::cast_unsigned)
}

/// A block as words, which are big endian.
#[target_feature(enable = "ssse3")]
#[inline]
fn words(block: &[u8; SHA256_BLOCK_LEN]) -> [__m128i; 4] {
    let turned = _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12);
    let quads = block.as_chunks::<8>().0;
    let quad = |at: usize| i64::from_le_bytes(quads[at]);
    array::from_fn(|four| _mm_shuffle_epi8(_mm_set_epi64x(quad(2 * four + 1), quad(2 * four)), turned))
}

#[target_feature(enable = "sha,sse4.1")]
#[inline]
fn four_rounds([first, second]: &mut State, words: __m128i) {
    *second = _mm_sha256rnds2_epu32(*second, *first, words);
    *first = _mm_sha256rnds2_epu32(*first, *second, _mm_shuffle_epi32::<0b1110>(words));
}

/// The four words that come sixteen after those at a place, in which they go.
#[target_feature(enable = "sha,ssse3,sse4.1")]
#[inline]
fn extended(schedule: &[__m128i; 4], at: usize) -> __m128i {
    let [a, b, c, d] = array::from_fn(|n| schedule[(at + n) % 4]);
    let partial = _mm_add_epi32(_mm_sha256msg1_epu32(a, b), _mm_alignr_epi8::<4>(d, c));
    _mm_sha256msg2_epu32(partial, d)
}
