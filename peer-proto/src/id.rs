//! Names: of content, of nodes, of the groups that content belongs to.

use alloc::{boxed::Box, string::String};
use core::{fmt, str::FromStr};

/// The hash a digest was made with.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Algorithm {
    /// SHA-256: 32 bytes.
    Sha256,
    /// SHA-512: 64 bytes.
    Sha512,
}

impl Algorithm {
    /// Bytes of a digest, and of the chaining value between two blocks of the hash.
    pub const fn digest_len(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    /// The name as it stands before the colon.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
}

/// The digest of a blob: `sha256:<64 hex>` or `sha512:<128 hex>`, lower case.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    algorithm: Algorithm,
    bytes: [u8; 64],
}

/// Why a text is not a digest we take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DigestError {
    /// No colon between an algorithm and its value.
    #[error("digest is not of the form algorithm:hex")]
    Form,
    /// An algorithm other than sha256 and sha512.
    #[error("digest algorithm is neither sha256 nor sha512")]
    Algorithm,
    /// Wrong length, or something other than lower-case hex.
    #[error("digest value is not lower-case hex of the algorithm's length")]
    Value,
}

impl Digest {
    /// A SHA-256 digest from its bytes.
    pub const fn sha256(value: [u8; 32]) -> Self {
        let mut bytes = [0; 64];
        let mut i = 0;
        while i < 32 {
            bytes[i] = value[i];
            i += 1;
        }
        Self { algorithm: Algorithm::Sha256, bytes }
    }

    /// A SHA-512 digest from its bytes.
    pub const fn sha512(bytes: [u8; 64]) -> Self {
        Self { algorithm: Algorithm::Sha512, bytes }
    }

    /// A digest from raw bytes, or nothing where their number is not the algorithm's.
    pub fn from_bytes(algorithm: Algorithm, value: &[u8]) -> Option<Self> {
        let mut bytes = [0; 64];
        (value.len() == algorithm.digest_len()).then(|| {
            bytes[..value.len()].copy_from_slice(value);
            Self { algorithm, bytes }
        })
    }

    /// The hash it was made with.
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The raw value, 32 or 64 bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.algorithm.digest_len()]
    }

    /// The value in lower-case hex, without the algorithm.
    pub fn hex(&self) -> String {
        let mut s = String::with_capacity(2 * self.algorithm.digest_len());
        push_hex(&mut s, self.as_bytes());
        s
    }
}

fn push_hex(out: &mut String, bytes: &[u8]) {
    for b in bytes {
        for nibble in [b >> 4, b & 15] {
            out.push(char::from_digit(u32::from(nibble), 16).unwrap_or('0'));
        }
    }
}

fn parse_hex(text: &str, out: &mut [u8]) -> Option<()> {
    let nibble = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    if text.len() != 2 * out.len() {
        return None;
    }
    for (pair, o) in text.as_bytes().chunks_exact(2).zip(out) {
        *o = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(())
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(s: &str) -> Result<Self, DigestError> {
        let (algorithm, value) = s.split_once(':').ok_or(DigestError::Form)?;
        let algorithm = match algorithm {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(DigestError::Algorithm),
        };
        let mut bytes = [0; 64];
        parse_hex(value, &mut bytes[..algorithm.digest_len()]).ok_or(DigestError::Value)?;
        Ok(Self { algorithm, bytes })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}..", self.algorithm.name(), &self.hex()[..8])
    }
}

/// A node's name among peers: 20 bytes, drawn at its first start and kept, or given.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId([u8; 20]);

impl PeerId {
    /// The id with these bytes.
    pub const fn new(bytes: [u8; 20]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 20] {
        &self.0
    }
}

/// The text is not 40 digits of lower-case hex.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("peer id is not 40 digits of lower-case hex")]
pub struct PeerIdError;

impl FromStr for PeerId {
    type Err = PeerIdError;

    fn from_str(s: &str) -> Result<Self, PeerIdError> {
        let mut bytes = [0; 20];
        parse_hex(s, &mut bytes).ok_or(PeerIdError)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = String::with_capacity(40);
        push_hex(&mut s, &self.0);
        f.write_str(&s)
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = String::with_capacity(8);
        push_hex(&mut s, &self.0[..4]);
        f.write_str(&s)
    }
}

/// The group a blob belongs to, as Kraken has it: a repository name or any label; chooses the backend. 1 to 255 bytes, no control
/// character, no empty, `.` or `..` path component.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Namespace(Box<str>);

/// The text is empty, too long, or has a component that could walk a tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("namespace must be 1 to 255 bytes without control characters or empty, . and .. components")]
pub struct NamespaceError;

impl Namespace {
    /// Longest namespace, in bytes.
    pub const LEN_MAX: usize = 255;

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Namespace {
    type Err = NamespaceError;

    fn from_str(s: &str) -> Result<Self, NamespaceError> {
        let sound = (1..=Self::LEN_MAX).contains(&s.len())
            && !s.chars().any(char::is_control)
            && s.split('/').all(|part| !matches!(part, "" | "." | ".."));
        sound.then(|| Self(s.into())).ok_or(NamespaceError)
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{format, string::ToString};
    use proptest::prelude::*;

    #[test]
    fn digests_round_trip_and_refuse_the_rest() {
        let text = format!("sha256:{}", "0f".repeat(32));
        let d: Digest = text.parse().unwrap();
        assert_eq!(d.to_string(), text);
        assert_eq!(format!("{d:?}"), "sha256:0f0f0f0f..");
        let long = format!("sha512:{}", "a0".repeat(64));
        assert_eq!(long.parse::<Digest>().unwrap().to_string(), long);
        for (bad, why) in [
            ("", DigestError::Form),
            ("0f0f", DigestError::Form),
            ("md5:00", DigestError::Algorithm),
            ("sha256:00", DigestError::Value),
            (&format!("sha256:{}", "0F".repeat(32)), DigestError::Value),
            (&format!("sha256:{}", "é".repeat(32)), DigestError::Value),
        ] {
            assert_eq!(bad.parse::<Digest>(), Err(why), "{bad}");
        }
    }

    #[test]
    fn namespaces_cannot_walk() {
        for good in ["lib/app", ".hidden", "a:b", "TODO", "a..b"] {
            assert!(good.parse::<Namespace>().is_ok(), "{good}");
        }
        for bad in ["", "/", "a//b", "a/../b", "..", "a/", "a\nb", &"x".repeat(256)] {
            assert!(bad.parse::<Namespace>().is_err(), "{bad}");
        }
    }
    #[test]
    fn peer_ids_round_trip_and_refuse_the_rest() {
        let text = "00ff".repeat(10);
        let id: PeerId = text.parse().unwrap();
        assert_eq!((id.to_string(), format!("{id:?}")), (text.clone(), "00ff00ff".to_string()));
        for bad in ["", &text[1..], &text.to_uppercase(), &format!("{text}0"), &"ü".repeat(20)] {
            assert_eq!(bad.parse::<PeerId>(), Err(PeerIdError), "{bad}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn digests_of_any_bytes_read_back(bytes in proptest::collection::vec(any::<u8>(), 0..70)) {
            for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                let digest = Digest::from_bytes(algorithm, &bytes);
                prop_assert_eq!(digest.is_some(), bytes.len() == algorithm.digest_len());
            }
            let mut value = [0; 64];
            value[..bytes.len().min(64)].copy_from_slice(&bytes[..bytes.len().min(64)]);
            let digest = Digest::sha512(value);
            prop_assert_eq!(digest.to_string().parse(), Ok(digest));
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,100}") {
            if let Ok(digest) = text.parse::<Digest>() {
                prop_assert_eq!(digest.to_string(), &*text);
            }
            let _ = text.parse::<PeerId>();
            if let Ok(namespace) = text.parse::<Namespace>() {
                prop_assert_eq!(namespace.as_str(), &*text);
            }
        }
    }
}
