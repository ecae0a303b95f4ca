//! Which bytes of a blob a client asks for: the `Range` header, resolved against a length.

use std::ops::Range;

/// Most ranges of one request.
pub const RANGES_MAX: usize = 256;

/// One range as it was asked for, before the length is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spec {
    /// `a-`: from byte `a` on.
    From(u64),
    /// `a-b`: both included. `b` may be less than `a` or past the end.
    Between(u64, u64),
    /// `-n`: the last `n` bytes.
    Last(u64),
}

/// More than [`RANGES_MAX`] ranges.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("more than {RANGES_MAX} ranges in a request")]
pub struct TooMany;

impl Spec {
    /// The bytes it means in a blob of `total`; none where it is outside.
    pub fn resolve(self, total: u64) -> Option<Range<u64>> {
        let (start, end) = match self {
            Self::From(first) => (first, total),
            Self::Between(first, last) => (first, last.saturating_add(1).min(total)),
            Self::Last(n) => (total.saturating_sub(n), total),
        };
        (start < end).then_some(start..end)
    }

    /// The header that asks for it.
    pub fn header(self) -> String {
        match self {
            Self::From(first) => format!("bytes={first}-"),
            Self::Between(first, last) => format!("bytes={first}-{last}"),
            Self::Last(n) => format!("bytes=-{n}"),
        }
    }
}

/// The ranges of a `Range` header, at least one. None where it has another unit or is malformed: such a header is ignored.
pub fn parse(header: &str) -> Result<Option<Vec<Spec>>, TooMany> {
    let Some((unit, list)) = header.split_once('=') else { return Ok(None) };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Ok(None);
    }
    let mut specs = Vec::new();
    // A list may have empty members.
    for part in list.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let Some(spec) = spec(part) else { return Ok(None) };
        if specs.len() == RANGES_MAX {
            return Err(TooMany);
        }
        specs.push(spec);
    }
    Ok((!specs.is_empty()).then_some(specs))
}

fn spec(text: &str) -> Option<Spec> {
    match text.split_once('-')? {
        ("", n) => Some(Spec::Last(number(n)?)),
        (first, "") => Some(Spec::From(number(first)?)),
        (first, last) => Some(Spec::Between(number(first)?, number(last)?)),
    }
}

/// Digits only; what does not fit is as good as the largest number, since no blob is as long.
pub(super) fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

/// The bytes that `specs` mean in a blob of `total`, in the order asked for; empty where none is within it. Ranges that overlap
/// are sorted and joined, so that nothing is sent twice; those that only touch stay apart, because clients count the parts.
pub fn resolve(specs: &[Spec], total: u64) -> Vec<Range<u64>> {
    let asked: Vec<_> = specs.iter().filter_map(|spec| spec.resolve(total)).collect();
    let mut sorted = asked.clone();
    sorted.sort_by_key(|range| (range.start, range.end));
    if sorted.windows(2).all(|pair| pair[0].end <= pair[1].start) {
        return asked;
    }
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.start < last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_or_ignored() {
        use Spec::{Between, From, Last};
        let cases: [(&str, Option<&[Spec]>); 16] = [
            ("bytes=0-", Some(&[From(0)])),
            ("bytes=500-1499", Some(&[Between(500, 1499)])),
            ("bytes=-500", Some(&[Last(500)])),
            ("Bytes = 1-2 , 4-,-6", Some(&[Between(1, 2), From(4), Last(6)])),
            ("bytes=1-2,,3-4,", Some(&[Between(1, 2), Between(3, 4)])),
            ("bytes=500-0", Some(&[Between(500, 0)])),
            ("bytes=0-99999999999999999999999", Some(&[Between(0, u64::MAX)])),
            ("bytes=", None),
            ("bytes=,", None),
            ("bytes", None),
            ("items=0-1", None),
            ("bytes=a-b", None),
            ("bytes=1-2,x", None),
            ("bytes=+1-2", None),
            ("bytes=--1", None),
            ("bytes=-", None),
        ];
        for (header, specs) in cases {
            assert_eq!(parse(header), Ok(specs.map(<[_]>::to_vec)), "{header}");
        }
        let many = |n| format!("bytes={}", vec!["0-0"; n].join(","));
        assert_eq!(parse(&many(RANGES_MAX)).unwrap().unwrap().len(), RANGES_MAX);
        assert_eq!(parse(&many(RANGES_MAX + 1)), Err(TooMany));
    }

    #[test]
    fn headers_read_as_they_were_written() {
        for spec in [Spec::From(0), Spec::From(u64::MAX), Spec::Between(5, 4), Spec::Last(0)] {
            assert_eq!(parse(&spec.header()), Ok(Some(vec![spec])));
        }
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one")]
    fn ranges_are_clamped_joined_and_kept_in_order() {
        let cases: [(&str, u64, &[Range<u64>]); 17] = [
            ("bytes=500-1499", 2048, &[500..1500]),
            ("bytes=500-", 2048, &[500..2048]),
            ("bytes=-500", 2048, &[1548..2048]),
            ("bytes=2000-5000", 2048, &[2000..2048]),
            ("bytes=0-0", 2048, &[0..1]),
            ("bytes=-5000", 2048, &[0..2048]),
            ("bytes=5000-10000", 2048, &[]),
            ("bytes=500-0", 2048, &[]),
            ("bytes=2048-", 2048, &[]),
            ("bytes=-0", 2048, &[]),
            ("bytes=0-", 0, &[]),
            ("bytes=-1", 0, &[]),
            ("bytes=30-39,10-19", 100, &[30..40, 10..20]),
            ("bytes=0-9,10-19", 100, &[0..10, 10..20]),
            ("bytes=0-9,200-300", 100, &[0..10]),
            ("bytes=50-59,0-9,5-14,55-", 100, &[0..15, 50..100]),
            ("bytes=0-18446744073709551615", 100, &[0..100]),
        ];
        for (header, total, ranges) in cases {
            assert_eq!(resolve(&parse(header).unwrap().unwrap(), total), ranges, "{header} of {total}");
        }
    }
}
