//! How this processor hashes several pieces at once, and from how many on that is cheaper than one after the other: measured, since
//! processors that have the same instructions differ by a factor of two in how many of them they do at a time.

use peer_proto::{
    Algorithm,
    chain::{Compress, Hasher, LANES, Lanes},
};
use std::{
    array,
    sync::OnceLock,
    time::{Duration, Instant},
};

/// Bytes of a message that is measured: some ten microseconds.
const SAMPLE_LEN: usize = 16 << 10;
/// Measurements, of which the shortest counts: in others the thread did not have its core.
const TRIES: usize = 5;
/// What is to be saved, as a part of the time for one after the other.
const SAVED: u32 = 10;

/// How it does; none where it cannot, or gains nothing. Takes milliseconds the first time.
pub(crate) fn lanes() -> Option<Lanes> {
    static MEASURED: OnceLock<Option<Lanes>> = OnceLock::new();
    *MEASURED.get_or_init(|| {
        let best = ways().into_iter().filter_map(measured).min_by_key(|(_, full)| *full);
        let lanes = best.map(|(lanes, _)| lanes);
        tracing::debug!(fewest = lanes.map(|lanes| lanes.fewest), "several pieces are proven at once");
        lanes
    })
}

/// One way, and how long it takes for as many messages as it can do. None where it is not cheaper.
fn measured(compress: Compress) -> Option<(Lanes, Duration)> {
    let sample = vec![0; SAMPLE_LEN];
    let one = shortest(|| Hasher::new(Algorithm::Sha256).update(&sample));
    let several = |count: usize| {
        let blocks: [_; LANES] = array::from_fn(|_| sample.as_chunks().0);
        let mut states = [[0; 8]; LANES];
        shortest(|| compress(&mut states[..count], &blocks[..count]))
    };
    let fewest = (2_u32..).zip(2..=LANES).find(|(n, count)| several(*count) * SAVED <= one * *n * (SAVED - 1));
    fewest.map(|(_, fewest)| (Lanes { compress, fewest }, several(LANES)))
}

fn shortest(mut run: impl FnMut()) -> Duration {
    let time = |_| {
        let began = Instant::now();
        run();
        began.elapsed()
    };
    (0..TRIES).map(time).min().unwrap_or_default()
}

/// The ways that it has instructions for.
#[cfg(target_arch = "x86_64")]
fn ways() -> Vec<Compress> {
    use peer_proto::chain;
    use std::arch::is_x86_feature_detected as has;

    fn lanes(states: &mut [[u32; 8]], blocks: &[&[[u8; 64]]]) {
        // SAFETY: whoever has this function has it from below, where the processor was found to have what that one is compiled for.
        unsafe { chain::lanes::compress(states, blocks) }
    }

    fn pairs(states: &mut [[u32; 8]], blocks: &[&[[u8; 64]]]) {
        // SAFETY: as above.
        unsafe { chain::pairs::compress(states, blocks) }
    }

    let mut ways: Vec<Compress> = Vec::new();
    if has!("avx2") && has!("avx512f") && has!("avx512vl") {
        ways.push(lanes);
    }
    if has!("sha") && has!("ssse3") && has!("sse4.1") {
        ways.push(pairs);
    }
    ways
}

/// The ways that it has instructions for.
#[cfg(not(target_arch = "x86_64"))]
fn ways() -> Vec<Compress> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use peer_proto::{
        Layout, LayoutBuilder, ProofError,
        layout::{self, Candidate},
    };
    use std::ops::Range;

    /// By every way, as many pieces as it does at once and fewer, of uneven lengths: each is judged as it is by itself.
    #[test]
    fn pieces_are_judged_as_one_by_one() {
        let mut seed = 7_u64;
        let mut bytes = vec![0; (9 << 20) + 1000];
        for byte in &mut bytes {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (seed >> 56) as u8;
        }
        let mut builder = LayoutBuilder::new(Algorithm::Sha256);
        builder.update(&bytes).unwrap();
        let blob = builder.finish();
        let geometry = blob.geometry();
        let ways = ways();
        println!("{} ways, measured: {:?}", ways.len(), lanes());
        let judge = |compress, blob: &Layout, pieces: Range<u32>| {
            let pieces: Vec<_> = pieces.map(|index| geometry.piece(index).unwrap()).collect();
            let candidates = pieces.iter().map(|piece| {
                let range = geometry.range(*piece);
                Candidate { layout: blob, piece: *piece, bytes: &bytes[range.start as usize..range.end as usize] }
            });
            layout::prove_together(&candidates.collect::<Vec<_>>(), Lanes { compress, fewest: 1 })
        };
        for way in ways {
            for pieces in [0..1, 0..5, 1..9, 2..10, 0..10] {
                assert!(judge(way, &blob, pieces.clone()).iter().all(Result::is_ok), "{pieces:?}");
            }
            // A state that is no longer the one between two pieces: neither the one that ends in it nor the one that begins there is proven.
            for edge in 0..9 {
                let mut encoded = blob.encode();
                let (n, seal) = (geometry.pieces() as usize, encoded.len() - 4);
                encoded[24 + 32 + 4 * n + 32 * edge] ^= 1;
                let sum = crc32fast::hash(&encoded[..seal]);
                encoded[seal..].copy_from_slice(&sum.to_le_bytes());
                let forged = Layout::decode(&encoded).unwrap();
                for (at, judged) in judge(way, &forged, 0..10).into_iter().enumerate() {
                    let piece = geometry.piece(at as u32).unwrap();
                    let wrong = at == edge || at == edge + 1;
                    assert_eq!(judged, if wrong { Err(ProofError::Chain(piece)) } else { Ok(()) }, "{edge}");
                }
            }
        }
    }
}
