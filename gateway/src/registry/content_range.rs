//! Where a chunk of an upload belongs: the `Content-Range` of a PATCH or a closing PUT, `first-last`, both included, without a
//! unit.

use super::range::number;
use std::ops::Range;

/// Why a chunk's `Content-Range` cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// Not two numbers in order.
    #[error("content range is not of the form first-last")]
    Form,
    /// The body has another length.
    #[error("content range has {range} bytes, the body {body}")]
    Length {
        /// Bytes in the range.
        range: u64,
        /// Bytes in the body.
        body: u64,
    },
}

/// The bytes a chunk covers. `body` is its length where known before it is read.
pub fn parse(header: &str, body: Option<u64>) -> Result<Range<u64>, Error> {
    let (first, last) = header.split_once('-').ok_or(Error::Form)?;
    let (first, last) = (number(first).ok_or(Error::Form)?, number(last).ok_or(Error::Form)?);
    let end = last.checked_add(1).filter(|end| first < *end).ok_or(Error::Form)?;
    match body {
        Some(body) if body != end - first => Err(Error::Length { range: end - first, body }),
        _ => Ok(first..end),
    }
}

/// The `Range` of an answer about an upload of `len` bytes: `0-last`. No bytes and one byte look alike, as everywhere.
pub fn received(len: u64) -> String {
    format!("0-{}", len.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_have_a_place_and_a_length() {
        for (header, body, expected) in [
            ("0-0", Some(1), Ok(0..1)),
            ("10-19", Some(10), Ok(10..20)),
            ("10-19", None, Ok(10..20)),
            ("10-19", Some(9), Err(Error::Length { range: 10, body: 9 })),
            ("10-9", Some(0), Err(Error::Form)),
            ("0-18446744073709551615", None, Err(Error::Form)),
            ("bytes 0-9/10", Some(10), Err(Error::Form)),
            ("bytes=0-9", Some(10), Err(Error::Form)),
            ("0-", Some(10), Err(Error::Form)),
            ("-9", Some(10), Err(Error::Form)),
            ("", Some(10), Err(Error::Form)),
            ("a-b", Some(10), Err(Error::Form)),
        ] {
            assert_eq!(parse(header, body), expected, "{header} {body:?}");
        }
        assert_eq!((received(0), received(1), received(2)), ("0-0".into(), "0-0".into(), "0-1".into()));
    }
}
