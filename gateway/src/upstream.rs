//! Other registries that this cluster mirrors: by which names they are known, who we are to them, what they have.
//!
//! An upstream has a *prefix*, the first component of the repositories that stand for its own: `docker.io/library/busybox` here is
//! `library/busybox` there. Proxies and agents know the names alone ([`Names`]) and ask no upstream: indexes ask them for tags and
//! origins for content, so that each blob comes once for the whole cluster, and a limit on requests is kept for all hosts at once.

pub mod client;
pub mod config;
pub mod credentials;
pub mod names;
#[cfg(test)]
pub(crate) mod tests;
mod token;

pub use client::{Error, Kind, Object, Repository, Stat, Upstream};
pub use config::{Config, Freshness};
pub use names::{Mirror, Names};

use peer_proto::Namespace;
use prometheus_client::registry::Registry;
use std::sync::Arc;

/// The upstreams of a role that asks them. Cheap to clone.
#[derive(Clone, Default)]
pub struct Upstreams {
    all: Arc<[Arc<Upstream>]>,
    fallback: Option<Arc<Upstream>>,
    figures: client::Figures,
}

impl Upstreams {
    /// Puts the clients together; nobody is asked yet. Blocks on files.
    pub fn open(configs: &[Config], fallback: Option<&str>) -> Result<Self, client::Invalid> {
        let figures = client::Figures::default();
        let all: Result<Vec<_>, _> = configs.iter().map(|config| Upstream::open(config, figures.clone())).collect();
        let all = all?;
        let fallback = fallback.and_then(|name| all.iter().find(|upstream| upstream.name() == name).cloned());
        Ok(Self { all: all.into(), fallback, figures })
    }

    /// The upstream's repository that a namespace stands for, where it is one with an upstream's prefix.
    pub fn find(&self, namespace: &Namespace) -> Option<Repository> {
        let (prefix, rest) = namespace.as_str().split_once('/')?;
        let upstream = self.all.iter().find(|upstream| upstream.prefix() == prefix)?;
        Some(Repository::new(upstream.clone(), rest))
    }

    /// The repository where content of a namespace is looked for that the cluster itself does not know. None for a namespace with
    /// an upstream's prefix.
    pub fn fallback(&self, namespace: &Namespace) -> Option<Repository> {
        let upstream = self.fallback.as_ref()?;
        let named = self.find(namespace).is_some();
        (!named).then(|| Repository::new(upstream.clone(), namespace.as_str()))
    }

    /// Where content of a namespace can come from beside the cluster's own backends.
    pub fn any(&self, namespace: &Namespace) -> Option<Repository> {
        self.find(namespace).or_else(|| self.fallback(namespace))
    }

    /// Adds their figures to a role's.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Questions to upstreams, by what came of them";
        registry.register("upstream_requests", help, self.figures.clone());
    }
}
