//! Whether this processor hashes several pieces at once.

use peer_proto::chain::Lanes;

/// How it does; none where it cannot.
#[cfg(target_arch = "x86_64")]
pub(crate) fn lanes() -> Option<Lanes> {
    /// Pieces that are proven sooner at once than one by one: by processors with instructions for SHA-256 (2.0 times as fast with eight
    /// of them, by `shoal-bench saturate`), and by those without.
    const FEWEST: [usize; 2] = [5, 2];

    fn compress(states: &mut [[u32; 8]; chain::LANES], blocks: &[&[[u8; 64]]; chain::LANES]) {
        // SAFETY: whoever has this function has it from below, where the processor was found to have what that one is compiled for.
        unsafe { chain::lanes::compress(states, blocks) }
    }

    use peer_proto::chain;
    use std::arch::is_x86_feature_detected as has;
    let able = has!("avx2") && has!("avx512f") && has!("avx512vl");
    able.then(|| Lanes { compress, fewest: FEWEST[usize::from(!has!("sha"))] })
}

/// How it does; none where it cannot.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn lanes() -> Option<Lanes> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use peer_proto::{
        Algorithm, Layout, LayoutBuilder, ProofError,
        layout::{self, Candidate},
    };
    use std::ops::Range;

    /// As many pieces as there are lanes and fewer, of uneven lengths: each is judged as it is by itself.
    #[test]
    fn lanes_judge_as_one_by_one() {
        let Some(lanes) = lanes() else {
            println!("this processor has no lanes");
            return;
        };
        let lanes = Lanes { fewest: 1, ..lanes };
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
        let judge = |blob: &Layout, pieces: Range<u32>| {
            let pieces: Vec<_> = pieces.map(|index| geometry.piece(index).unwrap()).collect();
            let candidates = pieces.iter().map(|piece| {
                let range = geometry.range(*piece);
                Candidate { layout: blob, piece: *piece, bytes: &bytes[range.start as usize..range.end as usize] }
            });
            layout::prove_together(&candidates.collect::<Vec<_>>(), lanes)
        };
        for pieces in [0..1, 0..5, 1..9, 2..10, 0..10] {
            assert!(judge(&blob, pieces.clone()).iter().all(Result::is_ok), "{pieces:?}");
        }
        // A state that is no longer the one between two pieces: neither the one that ends in it nor the one that begins there is proven.
        for edge in 0..9 {
            let mut encoded = blob.encode();
            let (n, seal) = (geometry.pieces() as usize, encoded.len() - 4);
            encoded[24 + 32 + 4 * n + 32 * edge] ^= 1;
            let sum = crc32fast::hash(&encoded[..seal]);
            encoded[seal..].copy_from_slice(&sum.to_le_bytes());
            let forged = Layout::decode(&encoded).unwrap();
            for (at, judged) in judge(&forged, 0..10).into_iter().enumerate() {
                let piece = geometry.piece(at as u32).unwrap();
                let wrong = at == edge || at == edge + 1;
                assert_eq!(judged, if wrong { Err(ProofError::Chain(piece)) } else { Ok(()) }, "{edge}");
            }
        }
    }
}
