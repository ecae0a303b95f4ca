//! What a client asks a token for: `repository:a/b:pull,push`, `registry:catalog:*`.

use super::super::name::Repository;
use std::collections::BTreeSet;

/// Most scopes of one token.
pub const SCOPES_MAX: usize = 50;
/// The type of what the catalog is asked for by.
pub(super) const REGISTRY: &str = "registry";
/// Its name.
pub(super) const CATALOG: &str = "catalog";
/// The type of repositories.
pub(super) const REPOSITORY: &str = "repository";

/// What rights are about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Resource {
    /// A repository.
    Repository(Repository),
    /// The list of repositories.
    Catalog,
}

/// A scope.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scope {
    /// What it is about.
    pub resource: Resource,
    /// What is to be done with it, in the protocol's words; at most as many as there are.
    pub actions: BTreeSet<&'static str>,
}

/// The words for what may be done.
const ACTIONS: [&str; 5] = ["pull", "push", "create", "delete", "*"];

impl Scope {
    /// Reads a scope. None for one of a type, or with a name, that is none of ours: nothing can be granted for it, which is no
    /// error. The name stands between the first colon and the last, as names of other registries have ports.
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once(':')?;
        let (name, actions) = rest.rsplit_once(':')?;
        // A class may follow the type: `repository(plugin)`.
        let kind = kind.split_once('(').map_or(kind, |(kind, _)| kind);
        let resource = match kind {
            REPOSITORY => Resource::Repository(name.parse().ok()?),
            REGISTRY if name == CATALOG => Resource::Catalog,
            _ => return None,
        };
        let actions = actions.split(',').filter_map(|action| ACTIONS.into_iter().find(|known| *known == action));
        Some(Self { resource, actions: actions.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_read_from_both_ends() {
        let of = |name: &str, actions: &[&'static str]| {
            let resource = match name {
                CATALOG => Resource::Catalog,
                name => Resource::Repository(name.parse().unwrap()),
            };
            Some(Scope { resource, actions: actions.iter().copied().collect() })
        };
        for (text, expected) in [
            ("repository:a/b:pull", of("a/b", &["pull"])),
            ("repository:a:push,pull", of("a", &["pull", "push"])),
            ("repository(plugin):a:pull", of("a", &["pull"])),
            ("repository:a:*", of("a", &["*"])),
            ("repository:a:pull,fly,pull", of("a", &["pull"])),
            ("repository:a:", of("a", &[])),
            ("registry:catalog:*", of(CATALOG, &["*"])),
            ("repository:host:5000/a:pull", None),
            ("repository:A:pull", None),
            ("repository::pull", None),
            ("repository:a", None),
            ("registry:other:*", None),
            ("user:a:pull", None),
            ("", None),
            (":::", None),
        ] {
            assert_eq!(Scope::parse(text), expected, "{text}");
        }
    }
}
