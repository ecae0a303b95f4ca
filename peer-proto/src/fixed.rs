//! Logarithm and power of two in fixed point: `core` has neither for floats, and whole numbers come out the same on every
//! machine.

/// log₂ of `x` with 32 fractional bits, error below 2⁻³⁰; 0 where `x` is 0.
pub(crate) fn log2(x: u64) -> u64 {
    if x == 0 {
        return 0;
    }
    let whole = 63 - x.leading_zeros();
    // The mantissa in 1..2 with 63 fractional bits; each squaring yields the next bit of the logarithm.
    let mut m = u128::from(x << x.leading_zeros());
    let mut out = u64::from(whole) << 32;
    for bit in (0..32).rev() {
        m = (m * m) >> 63;
        if m >> 64 != 0 {
            m >>= 1;
            out |= 1 << bit;
        }
    }
    out
}

/// 2 to the power of `x`, which has 32 fractional bits; error below 0.4 %, no more than `u32::MAX`. For random windows, where
/// the last per cent does not matter.
pub(crate) fn exp2(x: u64) -> u64 {
    let (whole, f) = (x >> 32, x & 0xffff_ffff);
    // 2^f ≈ 1 + 0.6565 f + 0.3435 f² on 0..1: exact at both ends.
    let f2 = (f * f) >> 32;
    let mantissa = (1 << 32) + ((f * 6565 + f2 * 3435) / 10_000);
    if whole >= 32 { u64::from(u32::MAX) } else { (mantissa << whole.min(30)) >> 32 << whole.saturating_sub(30) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_to_the_real_functions() {
        for x in [1u64, 2, 3, 7, 10, 48, 1000, 65_536, 1 << 40, u64::MAX] {
            let real = (x as f64).log2();
            let ours = log2(x) as f64 / f64::from(2u32).powi(32);
            assert!((real - ours).abs() < 1e-8, "log2({x}): {ours}, not {real}");
        }
        for tenth in 0..300u64 {
            let y = tenth as f64 / 10.0;
            let ours = exp2((y * f64::from(2u32).powi(32)) as u64) as f64;
            assert!((ours - y.exp2()).abs() <= 1.0 + 0.004 * y.exp2(), "2^{y}: {ours}");
        }
    }
}
