//! `[[upstreams]]`: one registry that is mirrored.

use super::credentials;
use crate::{config::Span, registry::Repository};
use serde::{Deserialize, Serialize};
use std::{path::PathBuf, time::Duration};

/// The registry whose API has another host than its name.
const DOCKER_HUB: (&str, &str) = ("docker.io", "https://registry-1.docker.io");

/// One registry that is mirrored. Proxies and agents need its name alone; indexes and origins the rest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What clients call it: the host, and the port where it has one, before the repository's name.
    pub name: String,
    /// The first component of its repositories' names here; the name, with `-` for `:`, unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Where it is asked, the next where one does not answer; `https://` and its name unless given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Who we are to it.
    #[serde(default)]
    pub credentials: credentials::Config,
    /// How old a tag may be.
    #[serde(default)]
    pub freshness: Freshness,
    /// Certificates, in PEM, to be trusted beside those that the system trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
}

impl Config {
    /// A registry of which all but its name is left out.
    pub fn named(name: &str) -> Self {
        Self {
            name: name.into(),
            prefix: None,
            urls: Vec::new(),
            credentials: credentials::Config::default(),
            freshness: Freshness::default(),
            ca: None,
        }
    }

    /// The first component of its repositories' names.
    pub fn prefix(&self) -> String {
        self.prefix.clone().unwrap_or_else(|| self.name.replace(':', "-"))
    }

    /// Where it is asked.
    pub fn urls(&self) -> Vec<String> {
        match &*self.urls {
            [] if self.name == DOCKER_HUB.0 => vec![DOCKER_HUB.1.into()],
            [] => vec![format!("https://{}", self.name)],
            urls => urls.to_vec(),
        }
    }

    /// Whether names of one component are those of `library/`.
    pub fn has_library(&self) -> bool {
        self.name == DOCKER_HUB.0
    }

    /// What is wrong with it, as a key below `upstreams` and a message.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if self.name.is_empty() || !self.name.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b)) {
            problems.push(("upstreams.name", format!("{:?} is not a registry's host, such as docker.io", self.name)));
        }
        let prefix = self.prefix();
        if prefix.contains('/') || prefix.parse::<Repository>().is_err() {
            let why = format!("{prefix:?} cannot begin a repository's name: set one lower-case component");
            problems.push(("upstreams.prefix", why));
        }
        for url in self.urls() {
            if let Err(why) = super::client::base(&url) {
                problems.push(("upstreams.urls", why));
            }
        }
        problems.extend(self.credentials.problem().map(|why| ("upstreams.credentials", why)));
        problems
    }
}

/// How old a tag may be that was asked for before. What cannot be asked for again is answered as it was, however old.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Freshness {
    /// Asked for with every pull.
    #[default]
    Always,
    /// Asked for again after this time.
    Ttl(Duration),
    /// Never asked for again.
    Pinned,
}

impl TryFrom<String> for Freshness {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "always" => Ok(Self::Always),
            "pinned" => Ok(Self::Pinned),
            span => match span.parse::<Span>() {
                Ok(span) => Ok(Self::Ttl(span.get())),
                Err(_) => Err(format!("{text:?} is not \"always\", \"pinned\" or a duration such as \"10m\"")),
            },
        }
    }
}

impl From<Freshness> for String {
    fn from(freshness: Freshness) -> Self {
        match freshness {
            Freshness::Always => "always".into(),
            Freshness::Pinned => "pinned".into(),
            Freshness::Ttl(ttl) => Span::of(ttl).to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn what_is_left_out_follows_from_the_name() {
        let hub = config("name = \"docker.io\"");
        assert_eq!((hub.prefix().as_str(), hub.urls()), ("docker.io", vec![DOCKER_HUB.1.to_owned()]));
        let other = config("name = \"registry.example.com:5000\"\nfreshness = \"10m\"");
        assert_eq!(other.prefix(), "registry.example.com-5000");
        assert_eq!(other.urls(), ["https://registry.example.com:5000"]);
        assert_eq!(other.freshness, Freshness::Ttl(Duration::from_secs(600)));
        assert!(hub.problems().is_empty() && other.problems().is_empty());
        for config in [hub, other] {
            assert_eq!(toml::from_str::<Config>(&toml::to_string(&config).unwrap()).unwrap(), config);
        }
    }

    #[test]
    fn problems_name_their_keys() {
        for (text, key) in [
            ("name = \"a/b\"", "upstreams.name upstreams.prefix"),
            ("name = \"A.io\"", "upstreams.prefix"),
            ("name = \"a\"\nprefix = \"x/y\"", "upstreams.prefix"),
            ("name = \"a\"\nurls = [\"ftp://a\"]", "upstreams.urls"),
            ("name = \"a\"\nurls = [\"http://a/v2\"]", "upstreams.urls"),
            ("name = \"a\"\ncredentials = { kind = \"basic\", username = \"u\" }", "upstreams.credentials"),
        ] {
            let problems = config(text).problems();
            let keys: Vec<&str> = problems
                .iter()
                .map(|(key, _)| *key)
                .filter(|key| text.contains(&key[10..]) || key.ends_with("prefix"))
                .collect();
            assert_eq!(keys.join(" "), key, "{text}: {problems:?}");
        }
        assert!(toml::from_str::<Config>("name = \"a\"\nfreshness = \"often\"").is_err());
    }
}
