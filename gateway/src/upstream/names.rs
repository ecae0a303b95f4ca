//! By which names a registry's clients may ask for which repositories.

use super::Config;
use crate::registry::Repository;
use hyper::{Uri, header::HeaderName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The name of a registry that a mirror answered for.
pub const NAMESPACE: HeaderName = HeaderName::from_static("oci-namespace");

/// `[mirror]`: which registries a proxy or an agent answers for.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mirror {
    /// Names of the cluster's own registry: `?ns=` with one of them is as if it were not there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub own_names: Vec<String>,
    /// The upstream, by name, that has what the cluster itself does not know, as dockerd takes it of a mirror.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_upstream: Option<String>,
}

/// The registries that clients may ask for. Whoever names another is told that there is none: this is no open proxy.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Names {
    /// The prefix of each; none for the cluster's own.
    prefixes: BTreeMap<String, Option<String>>,
}

/// What a request's `?ns=` means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Asked {
    /// There is none, or it is ours.
    Own,
    /// An upstream's: its name and its prefix.
    Upstream(String, String),
    /// Nobody's that we know.
    Unknown(String),
}

impl Names {
    /// These upstreams, and the cluster's own names.
    pub fn new(upstreams: &[Config], mirror: &Mirror) -> Self {
        let own = mirror.own_names.iter().map(|name| (name.clone(), None));
        let upstreams = upstreams.iter().map(|upstream| (upstream.name.clone(), Some(upstream.prefix())));
        Self { prefixes: own.chain(upstreams).collect() }
    }

    /// Whom a request is about.
    pub fn asked(&self, uri: &Uri) -> Asked {
        let Some(name) = crate::http::query(uri, "ns") else { return Asked::Own };
        match self.prefixes.get(&name) {
            Some(None) => Asked::Own,
            Some(Some(prefix)) => Asked::Upstream(name, prefix.clone()),
            None => Asked::Unknown(name),
        }
    }

    /// Whether a repository is an upstream's.
    pub fn is_upstream(&self, repository: &Repository) -> bool {
        let first = repository.as_str().split_once('/').map(|(first, _)| first);
        first.is_some_and(|first| self.prefixes.values().flatten().any(|prefix| prefix == first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_upstreams_ours_or_nobodys() {
        let upstreams: Vec<Config> =
            ["docker.io", "r.example:5000"].map(|name| toml::from_str(&format!("name = {name:?}")).unwrap()).into();
        let names = Names::new(&upstreams, &Mirror { own_names: vec!["our.example".into()], default_upstream: None });
        let asked = |query: &str| names.asked(&format!("/v2/x/tags/list{query}").parse().unwrap());
        assert_eq!(asked(""), Asked::Own);
        assert_eq!(asked("?ns=our.example&n=1"), Asked::Own);
        assert_eq!(asked("?ns=docker.io"), Asked::Upstream("docker.io".into(), "docker.io".into()));
        assert_eq!(asked("?ns=r.example%3A5000"), Asked::Upstream("r.example:5000".into(), "r.example-5000".into()));
        for unknown in ["?ns=", "?ns=evil.example", "?ns=docker.io/x", "?ns=DOCKER.io"] {
            assert!(matches!(asked(unknown), Asked::Unknown(_)), "{unknown}");
        }
        for (repository, upstream) in
            [("docker.io/library/x", true), ("r.example-5000/x", true), ("docker.io", false), ("lib/docker.io", false)]
        {
            assert_eq!(names.is_upstream(&repository.parse().unwrap()), upstream, "{repository}");
        }
    }
}
