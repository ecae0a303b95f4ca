//! `multipart/byteranges`: several ranges of one blob in one answer.

use std::ops::Range;

/// The frame around the parts of one answer.
#[derive(Clone, Debug)]
pub struct Frame {
    boundary: String,
    media_type: String,
    total: u64,
}

impl Frame {
    /// A frame for parts of a blob of `total` bytes. The boundary must not occur in them: a random name.
    pub fn new(boundary: String, media_type: &str, total: u64) -> Self {
        Self { boundary, media_type: media_type.to_owned(), total }
    }

    /// The `Content-Type` of the answer.
    pub fn content_type(&self) -> String {
        format!("multipart/byteranges; boundary={}", self.boundary)
    }

    /// What stands before a part's bytes.
    pub fn head(&self, range: &Range<u64>) -> String {
        let (boundary, media_type, content_range) =
            (&self.boundary, &self.media_type, content_range(range, self.total));
        format!("\r\n--{boundary}\r\nContent-Type: {media_type}\r\nContent-Range: {content_range}\r\n\r\n")
    }

    /// What stands after the last part.
    pub fn tail(&self) -> String {
        format!("\r\n--{}--\r\n", self.boundary)
    }

    /// Bytes of the whole body.
    pub fn body_len(&self, ranges: &[Range<u64>]) -> u64 {
        let part = |range: &Range<u64>| self.head(range).len() as u64 + (range.end - range.start);
        ranges.iter().map(part).sum::<u64>() + self.tail().len() as u64
    }
}

/// The `Content-Range` of an answer: `bytes first-last/total`. The range is not empty.
pub fn content_range(range: &Range<u64>, total: u64) -> String {
    format!("bytes {}-{}/{total}", range.start, range.end - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_as_long_as_they_say() {
        let frame = Frame::new("x".into(), "text/plain", 100);
        let ranges = [0..2, 90..100];
        let mut body = String::new();
        for range in &ranges {
            body += &frame.head(range);
            body += &"b".repeat((range.end - range.start) as usize);
        }
        body += &frame.tail();
        assert_eq!(
            body,
            "\r\n--x\r\nContent-Type: text/plain\r\nContent-Range: bytes 0-1/100\r\n\r\nbb\
             \r\n--x\r\nContent-Type: text/plain\r\nContent-Range: bytes 90-99/100\r\n\r\nbbbbbbbbbb\
             \r\n--x--\r\n"
        );
        assert_eq!(body.len() as u64, frame.body_len(&ranges));
        assert_eq!(frame.content_type(), "multipart/byteranges; boundary=x");
    }
}
