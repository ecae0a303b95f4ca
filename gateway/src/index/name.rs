//! A tag's full name.

use crate::registry::{Repository, Tag};
use backends::Naming;
use peer_proto::Namespace;
use std::{fmt, str::FromStr};

/// `repo:tag`, both of them whatever a `docker_tag` tree can keep: wider than the registry's grammar, as others than registries
/// use tags too.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TagName {
    repository: Namespace,
    tag: Box<str>,
}

/// The text is no tag's name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("tag must be of the form repo:tag, without empty, '.', '..' or '_' components")]
pub struct TagNameError;

impl TagName {
    /// Longest tag in bytes.
    pub const TAG_LEN_MAX: usize = 255;

    /// The tag of a registry's repository.
    pub fn new(repository: &Repository, tag: &Tag) -> Self {
        Self::of(repository.namespace(), tag)
    }

    /// The tag of the repository that is this namespace.
    pub fn of(repository: &Namespace, tag: &Tag) -> Self {
        Self { repository: repository.clone(), tag: tag.as_str().into() }
    }

    /// The repository, which is the namespace of what the tag stands for.
    pub fn repository(&self) -> &Namespace {
        &self.repository
    }

    /// The tag alone.
    pub fn tag(&self) -> &str {
        &self.tag
    }
}

impl FromStr for TagName {
    type Err = TagNameError;

    fn from_str(s: &str) -> Result<Self, TagNameError> {
        let (repository, tag) = s.split_once(':').ok_or(TagNameError)?;
        let repository = repository.parse().map_err(|_| TagNameError)?;
        let sound = tag.len() <= Self::TAG_LEN_MAX && Naming::DockerTag.path(s).is_ok();
        sound.then(|| Self { repository, tag: tag.into() }).ok_or(TagNameError)
    }
}

impl fmt::Display for TagName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.repository, self.tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_a_repository_and_a_tag() {
        let name: TagName = "lib/app:1.0".parse().unwrap();
        assert_eq!((name.repository().as_str(), name.tag()), ("lib/app", "1.0"));
        assert_eq!(name.to_string(), "lib/app:1.0");
        assert_eq!(TagName::new(&"lib/app".parse().unwrap(), &"1.0".parse().unwrap()), name);
        for bad in ["", "a", ":", "a:", ":t", "a:b:c", "a/../b:t", "_a:t", "a/_b:t", "a:b/c", "a\n:t", "a%2Fb"] {
            assert!(bad.parse::<TagName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn every_registry_name_is_one() {
        let repository: Repository = "a".repeat(255).parse().unwrap();
        let tag: Tag = "t".repeat(128).parse().unwrap();
        let name = TagName::new(&repository, &tag);
        assert_eq!(name.to_string().parse::<TagName>().unwrap(), name);
    }
}
