//! Names of repositories and tags, in the distribution specification's grammar.

use peer_proto::{Digest, DigestError, Namespace};
use std::{fmt, str::FromStr};

/// A repository's name: components of lower-case letters and digits, joined by `/`; within a component `.`, `_`, `__` or any
/// number of `-` may stand between letters. At most 255 bytes. It is the namespace of the repository's blobs.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Repository(Namespace);

/// The text is no repository name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("repository name must be lower-case components joined by '/', at most 255 bytes")]
pub struct RepositoryError;

impl Repository {
    /// The name.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// The namespace its blobs belong to.
    pub fn namespace(&self) -> &Namespace {
        &self.0
    }
}

impl FromStr for Repository {
    type Err = RepositoryError;

    fn from_str(s: &str) -> Result<Self, RepositoryError> {
        if !s.split('/').all(is_component) {
            return Err(RepositoryError);
        }
        s.parse().map(Self).map_err(|_| RepositoryError)
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

fn is_component(text: &str) -> bool {
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let ends = text.starts_with(letter) && text.ends_with(letter);
    let mut joints = text.split(letter).filter(|joint| !joint.is_empty());
    ends && joints.all(|joint| matches!(joint, "." | "_" | "__") || joint.bytes().all(|b| b == b'-'))
}

/// A tag: 1 to 128 of letters, digits, `_`, `.` and `-`, not starting with the last two.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Tag(Box<str>);

/// The text is no tag.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("tag must be 1 to 128 letters, digits, '_', '.' or '-', and start with a letter, digit or '_'")]
pub struct TagError;

impl Tag {
    /// Longest tag, bytes.
    pub const LEN_MAX: usize = 128;

    /// The tag under which clients without the referrers API keep the list of a manifest's referrers.
    pub fn referrers_fallback(subject: &Digest) -> Self {
        let (algorithm, hex) = (subject.algorithm().name(), subject.hex());
        Self(format!("{algorithm}-{}", &hex[..hex.len().min(64)]).into())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Tag {
    type Err = TagError;

    fn from_str(s: &str) -> Result<Self, TagError> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let sound = (1..=Self::LEN_MAX).contains(&s.len())
            && word(s.as_bytes()[0])
            && s.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'));
        sound.then(|| Self(s.into())).ok_or(TagError)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a manifest is asked for by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reference {
    /// A name that may move.
    Tag(Tag),
    /// The content itself.
    Digest(Digest),
}

/// Why a text is no reference. Only a digest has a colon.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReferenceError {
    /// It has no colon and is no tag.
    #[error(transparent)]
    Tag(#[from] TagError),
    /// It has a colon and is no digest.
    #[error(transparent)]
    Digest(#[from] DigestError),
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(s: &str) -> Result<Self, ReferenceError> {
        if s.contains(':') { Ok(Self::Digest(s.parse()?)) } else { Ok(Self::Tag(s.parse()?)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_follow_the_grammar() {
        for good in [
            "a",
            "0",
            "lib/app",
            "a.b_c__d-e--f/x---y",
            "blobs/uploads",
            "tags/list",
            "1/2/3/4/5/6/7/8",
            &"a".repeat(255),
        ] {
            assert!(good.parse::<Repository>().is_ok(), "{good}");
        }
        for bad in [
            "", "/", "A", "Lib/app", "a/", "/a", "a//b", "..", "a/../b", ".a", "a.", "a..b", "a___b", "a._b", "-a",
            "a-", "a_", "a b", "a\0b", "ä", "a:b", "a%2fb", "a\\b", "_catalog",
        ] {
            assert!(bad.parse::<Repository>().is_err(), "{bad:?}");
        }
        assert!("a".repeat(256).parse::<Repository>().is_err());
    }

    #[test]
    fn references_are_tags_or_digests() {
        for good in ["latest", "_x", "1.0-rc_2", "V1", &"t".repeat(128)] {
            assert!(matches!(good.parse(), Ok(Reference::Tag(_))), "{good}");
        }
        for bad in ["", ".", "-x", ".x", "a b", "a/b", "ü", "a+b", &"t".repeat(129)] {
            assert_eq!(bad.parse::<Reference>(), Err(ReferenceError::Tag(TagError)), "{bad:?}");
        }
        let digest = format!("sha256:{}", "ab".repeat(32));
        assert_eq!(digest.parse(), Ok(Reference::Digest(digest.parse().unwrap())));
        for (bad, why) in
            [("sha256:bad", DigestError::Value), ("md5:aa", DigestError::Algorithm), (":", DigestError::Algorithm)]
        {
            assert_eq!(bad.parse::<Reference>(), Err(ReferenceError::Digest(why)), "{bad}");
        }
    }

    #[test]
    fn fallback_tags_are_tags() {
        for digest in [format!("sha256:{}", "0a".repeat(32)), format!("sha512:{}", "0a".repeat(64))] {
            let tag = Tag::referrers_fallback(&digest.parse().unwrap());
            assert_eq!(tag.as_str(), format!("{}-{}", &digest[..6], "0a".repeat(32)));
            assert!(tag.as_str().parse::<Tag>().is_ok());
        }
    }
}
