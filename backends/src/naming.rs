//! How callers' names become paths in a store: Kraken's three ways, which are the registry's own tree, so that the bucket of
//! an existing registry can be mounted.
//!
//! | naming | name | path |
//! |---|---|---|
//! | `identity` | anything | the name |
//! | `sharded_docker_blob` | `sha256:<hex>`, or `<hex>` | `docker/registry/v2/blobs/sha256/<first two>/<hex>/data` |
//! | `docker_tag` | `<repo>:<tag>` | `docker/registry/v2/repositories/<repo>/_manifests/tags/<tag>/current/link` |

use crate::{Answer, Backend, Content, Error, List, Object, Page, name};
use futures_util::future::{FutureExt, ready};
use serde::{Deserialize, Serialize};
use std::{fmt, ops::Range, sync::Arc};

const BLOBS: &str = "docker/registry/v2/blobs/";
const BLOB_END: &str = "/data";
const REPOSITORIES: &str = "docker/registry/v2/repositories/";
const TAGS: &str = "/_manifests/tags/";
const TAG_END: &str = "/current/link";
/// The algorithm of a blob's name that names none, as Kraken's do not.
const ALGORITHM_DEFAULT: &str = "sha256";

/// A way to name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Naming {
    /// Names are paths.
    Identity,
    /// Blobs by their hash, as registries keep them.
    ShardedDockerBlob,
    /// Tags `repo:tag`, as registries keep them.
    DockerTag,
}

impl Naming {
    /// The path of a name; [`Error::Invalid`] where it is none of this naming's.
    pub fn path(self, name: &str) -> Result<String, Error> {
        let path = match self {
            Self::Identity => Some(name.to_owned()),
            Self::ShardedDockerBlob => {
                let (algorithm, hex) = name.split_once(':').unwrap_or((ALGORITHM_DEFAULT, name));
                blob_is_sound(algorithm, hex).then(|| format!("{BLOBS}{algorithm}/{}/{hex}{BLOB_END}", &hex[..2]))
            }
            Self::DockerTag => name
                .split_once(':')
                .filter(|(repo, tag)| tag_is_sound(repo, tag))
                .map(|(repo, tag)| format!("{REPOSITORIES}{repo}{TAGS}{tag}{TAG_END}")),
        };
        let path = path.ok_or_else(|| Error::Invalid(format!("{name:?} is no name for {self}")))?;
        name::check(&path)?;
        Ok(path)
    }

    /// The name of a path, where it is one of this naming's.
    pub fn name(self, path: &str) -> Option<String> {
        match self {
            Self::Identity => Some(path.to_owned()),
            Self::ShardedDockerBlob => {
                let path = path.strip_prefix(BLOBS)?.strip_suffix(BLOB_END)?;
                let (algorithm, rest) = path.split_once('/')?;
                let (shard, hex) = rest.split_once('/')?;
                (blob_is_sound(algorithm, hex) && hex.starts_with(shard)).then(|| format!("{algorithm}:{hex}"))
            }
            Self::DockerTag => {
                let path = path.strip_prefix(REPOSITORIES)?.strip_suffix(TAG_END)?;
                let (repo, tag) = path.rsplit_once(TAGS)?;
                tag_is_sound(repo, tag).then(|| format!("{repo}:{tag}"))
            }
        }
    }

    /// The path before all names of this naming; ends with a slash where it is not empty.
    pub fn base(self) -> &'static str {
        match self {
            Self::Identity => "",
            Self::ShardedDockerBlob => BLOBS,
            Self::DockerTag => REPOSITORIES,
        }
    }

    /// The path before all tags of a repository, for [`Naming::DockerTag`] trees.
    pub fn tags_of(repo: &str) -> String {
        format!("{REPOSITORIES}{repo}{TAGS}")
    }
}

impl fmt::Display for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Identity => "identity",
            Self::ShardedDockerBlob => "sharded_docker_blob",
            Self::DockerTag => "docker_tag",
        })
    }
}

fn blob_is_sound(algorithm: &str, hex: &str) -> bool {
    let lower = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let nibble = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    !algorithm.is_empty() && algorithm.bytes().all(lower) && hex.len() > 2 && hex.bytes().all(nibble)
}

/// A repository component that begins with `_` would be taken for the tree's own.
fn tag_is_sound(repo: &str, tag: &str) -> bool {
    !tag.contains([':', '/']) && !repo.contains(':') && repo.split('/').all(|part| !part.starts_with('_'))
}

/// A store whose names are mapped. Listing: `prefix` is a part of a *path* below [`Naming::base`]; what comes back are names,
/// in the order of their paths; paths that are not of the naming are left out, so that a page may be empty and still not the
/// last; `after` is a name.
pub struct Named {
    naming: Naming,
    inner: Arc<dyn Backend>,
}

impl Named {
    /// Maps the names of `inner`.
    pub fn new(naming: Naming, inner: Arc<dyn Backend>) -> Self {
        Self { naming, inner }
    }

    async fn page(&self, list: List<'_>) -> Result<Page, Error> {
        let prefix = format!("{}{}", self.naming.base(), list.prefix);
        let mut after = match (self.naming, list.after) {
            // Any text is a place among paths, a name or not.
            (Naming::Identity, after) => after.map(str::to_owned),
            (naming, after) => after.map(|name| naming.path(name)).transpose()?,
        };
        loop {
            let page = self.inner.list(List { prefix: &prefix, after: after.as_deref(), limit: list.limit }).await?;
            let names: Vec<_> = page.names.iter().filter_map(|path| self.naming.name(path)).collect();
            // The caller goes on after a name: a page without any would leave it nowhere.
            if !names.is_empty() || !page.more {
                return Ok(Page { names, more: page.more });
            }
            after = page.names.last().cloned();
        }
    }
}

impl Backend for Named {
    fn stat<'a>(&'a self, name: &'a str) -> Answer<'a, u64> {
        match self.naming.path(name) {
            Ok(path) => async move { self.inner.stat(&path).await }.boxed(),
            Err(error) => ready(Err(error)).boxed(),
        }
    }

    fn read<'a>(&'a self, name: &'a str, range: Option<Range<u64>>) -> Answer<'a, Object> {
        match self.naming.path(name) {
            Ok(path) => async move { self.inner.read(&path, range).await }.boxed(),
            Err(error) => ready(Err(error)).boxed(),
        }
    }

    fn write<'a>(&'a self, name: &'a str, content: Content) -> Answer<'a, ()> {
        match self.naming.path(name) {
            Ok(path) => async move { self.inner.write(&path, content).await }.boxed(),
            Err(error) => ready(Err(error)).boxed(),
        }
    }

    fn list<'a>(&'a self, list: List<'a>) -> Answer<'a, Page> {
        self.page(list).boxed()
    }

    fn delete<'a>(&'a self, name: &'a str) -> Answer<'a, ()> {
        match self.naming.path(name) {
            Ok(path) => async move { self.inner.delete(&path).await }.boxed(),
            Err(error) => ready(Err(error)).boxed(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Memory, conformance};

    #[test]
    fn the_registrys_tree() {
        let hex = "ab".repeat(32);
        let blob = format!("docker/registry/v2/blobs/sha256/ab/{hex}/data");
        assert_eq!(Naming::ShardedDockerBlob.path(&format!("sha256:{hex}")).unwrap(), blob);
        assert_eq!(Naming::ShardedDockerBlob.path(&hex).unwrap(), blob);
        assert_eq!(Naming::ShardedDockerBlob.name(&blob).unwrap(), format!("sha256:{hex}"));
        let tag = "docker/registry/v2/repositories/lib/app/_manifests/tags/1.0/current/link";
        assert_eq!(Naming::DockerTag.path("lib/app:1.0").unwrap(), tag);
        assert_eq!(Naming::DockerTag.name(tag).unwrap(), "lib/app:1.0");
        assert!(tag.starts_with(&Naming::tags_of("lib/app")));
        assert_eq!(Naming::Identity.path("a/b").unwrap(), "a/b");
    }

    #[test]
    fn names_that_walk_or_confuse_are_refused() {
        for bad in ["", "ab", "sha256:", "sha256:ABCD", "sha256:../..", "Sha:abcd", "sha/x:abcd"] {
            assert!(Naming::ShardedDockerBlob.path(bad).is_err(), "{bad}");
        }
        for bad in
            ["", "a", ":t", "a:", "a:b:c", "../a:t", "a/../b:t", "a:..", "a:b/c", "a/_manifests/tags/x:t", "a//b:t"]
        {
            assert!(Naming::DockerTag.path(bad).is_err(), "{bad}");
        }
        for other in [
            "docker/registry/v2/repositories/a/_layers/sha256/x/link",
            "x",
            "docker/registry/v2/blobs/sha256/aa/bbb/data",
        ] {
            assert_eq!(Naming::DockerTag.name(other), None, "{other}");
            assert_eq!(Naming::ShardedDockerBlob.name(other), None, "{other}");
        }
    }

    #[tokio::test]
    async fn identity_conforms() {
        conformance::all(Arc::new(Named::new(Naming::Identity, Arc::new(Memory::default())))).await;
    }

    #[tokio::test]
    async fn listing_gives_names() {
        let raw = Arc::new(Memory::default());
        let tags = Named::new(Naming::DockerTag, raw.clone());
        for name in ["a:1", "a:2", "a/b:1", "c:1"] {
            tags.write(name, "x".into()).await.unwrap();
        }
        for i in 0..5 {
            raw.write(&format!("{REPOSITORIES}a/_layers/{i}"), "not a tag".into()).await.unwrap();
        }
        let page = tags.list(List { prefix: "a/", ..List::default() }).await.unwrap();
        assert_eq!(page.names, ["a:1", "a:2", "a/b:1"]);
        let page = tags.list(List { prefix: "a", after: None, limit: 1 }).await.unwrap();
        assert_eq!((page.names, page.more), (vec!["a:1".to_owned()], true));
        let page = tags.list(List { prefix: "", after: Some("a/b:1"), limit: 1 }).await.unwrap();
        assert_eq!((page.names, page.more), (vec!["c:1".to_owned()], false));
    }
}
