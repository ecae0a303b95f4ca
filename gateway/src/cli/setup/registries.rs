//! The drop-in of `registries.conf` that podman, buildah, skopeo and CRI-O read.
//!
//! Of several entries with one prefix they take the last whole, so an entry that is there already is taken over into the drop-in,
//! with the agent before its other mirrors.

use super::{
    agent::Agent,
    document::{self, Error as DocumentError},
};
use thiserror::Error;
use toml_edit::{ArrayOfTables, Item, Table, value};

/// The drop-in's name.
pub(super) const NAME: &str = "50-shoal.conf";

/// Why files were not understood.
#[derive(Debug, Error)]
pub(super) enum Error {
    #[error(transparent)]
    Document(#[from] DocumentError),
    #[error("has the form of version 1, beside which no drop-in is taken: rewrite it with [[registry]] entries first")]
    Version1,
    #[error("has mirrors of {prefix} that are not [[registry.mirror]] tables: write them so first")]
    Mirrors { prefix: String },
}

/// A registry whose images are asked for at the agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Mirrored {
    /// Its name in images' names.
    pub(super) name: String,
    /// The first component of its repositories' names at the agent; none where they have the same names there.
    pub(super) prefix: Option<String>,
}

/// The entries of a file by their prefixes.
pub(super) fn entries(text: &str) -> Result<Vec<(String, Table)>, Error> {
    let document = document::parse(Some(text))?;
    let old = document.get("registries").and_then(Item::as_table_like);
    if old.is_some_and(|old| ["search", "insecure", "block"].iter().any(|key| old.contains_key(key))) {
        return Err(Error::Version1);
    }
    let Some(registries) = document.get("registry") else { return Ok(Vec::new()) };
    let registries = registries.as_array_of_tables().ok_or_else(|| DocumentError::Shape("registry".into()))?;
    let named = registries.iter().filter_map(|entry| {
        let text = |key: &str| entry.get(key).and_then(Item::as_str).filter(|text| !text.is_empty());
        Some((text("prefix").or_else(|| text("location"))?.to_owned(), entry.clone()))
    });
    Ok(named.collect())
}

/// The drop-in's text, from the entries that are in force without it.
pub(super) fn drop_in(mirrored: &[Mirrored], agent: &Agent, before: &[(String, Table)]) -> Result<String, Error> {
    let mut registries = ArrayOfTables::new();
    for Mirrored { name, prefix } in mirrored {
        let there = before.iter().rev().find(|(prefix, _)| prefix == name).map(|(_, entry)| entry);
        let mut entry = Table::new();
        entry.insert("prefix", value(name));
        entry.insert("location", value(name));
        let mut mirrors = ArrayOfTables::new();
        let mut ours = Table::new();
        let location = match prefix {
            Some(prefix) => format!("{}/{prefix}", agent.addr),
            None => agent.addr.to_string(),
        };
        ours.insert("location", value(&location));
        if !agent.tls {
            ours.insert("insecure", value(true));
        }
        mirrors.push(ours);
        for (key, item) in there.into_iter().flatten() {
            match key {
                "mirror" => {
                    let theirs = item.as_array_of_tables().ok_or_else(|| Error::Mirrors { prefix: name.clone() })?;
                    let same = |one: &&Table| one.get("location").and_then(Item::as_str) == Some(&*location);
                    for mirror in theirs.iter().filter(|one| !same(one)) {
                        mirrors.push(plain(mirror));
                    }
                }
                _ => {
                    entry.insert(key, item.as_value().map_or(Item::None, |kept| value(bare(kept))));
                }
            }
        }
        entry.insert("mirror", Item::ArrayOfTables(mirrors));
        registries.push(entry);
    }
    let mut document = toml_edit::DocumentMut::new();
    document.insert("registry", Item::ArrayOfTables(registries));
    Ok(format!("# Written by shoal setup; shoal setup podman --undo takes it away.\n\n{document}"))
}

/// A table as it would have been written here.
fn plain(table: &Table) -> Table {
    let mut plain = Table::new();
    for (key, item) in table {
        if let Some(kept) = item.as_value() {
            plain.insert(key, value(bare(kept)));
        }
    }
    plain
}

fn bare(value: &toml_edit::Value) -> toml_edit::Value {
    let mut value = value.clone();
    value.decor_mut().clear();
    value
}

#[cfg(test)]
mod tests {
    use super::{super::agent::plain as agent, *};

    const HEAD: &str = "# Written by shoal setup; shoal setup podman --undo takes it away.\n\n";

    fn mirrored(names: &[&str]) -> Vec<Mirrored> {
        names.iter().map(|name| Mirrored { name: (*name).into(), prefix: Some(name.replace(':', "-")) }).collect()
    }

    #[test]
    fn each_registry_has_the_agent_for_its_mirror() {
        let mut mirrored = mirrored(&["docker.io", "r.example:5000"]);
        mirrored.push(Mirrored { name: "our.example".into(), prefix: None });
        let text = drop_in(&mirrored, &agent("127.0.0.1:16000"), &[]).unwrap();
        let wanted = "[[registry]]\nprefix = \"docker.io\"\nlocation = \"docker.io\"\n\n\
                      [[registry.mirror]]\nlocation = \"127.0.0.1:16000/docker.io\"\ninsecure = true\n\n\
                      [[registry]]\nprefix = \"r.example:5000\"\nlocation = \"r.example:5000\"\n\n\
                      [[registry.mirror]]\nlocation = \"127.0.0.1:16000/r.example-5000\"\ninsecure = true\n\n\
                      [[registry]]\nprefix = \"our.example\"\nlocation = \"our.example\"\n\n\
                      [[registry.mirror]]\nlocation = \"127.0.0.1:16000\"\ninsecure = true\n";
        assert_eq!(text, format!("{HEAD}{wanted}"));
    }

    #[test]
    fn an_entry_that_is_there_is_taken_over() {
        let main = "unqualified-search-registries = [\"docker.io\"]\n\
                    [[registry]]\nlocation = \"docker.io\" # hub\ninsecure = true\n\
                    [[registry.mirror]]\n  location = \"cache.example/hub\"\n  pull-from-mirror = \"digest-only\"\n\
                    [[registry]]\nprefix = \"quay.io/x\"\nblocked = true\n";
        let there = entries(main).unwrap();
        assert_eq!(there.iter().map(|(prefix, _)| prefix.as_str()).collect::<Vec<_>>(), ["docker.io", "quay.io/x"]);
        let secure = Agent { tls: true, ..agent("127.0.0.1:16000") };
        let text = drop_in(&mirrored(&["docker.io"]), &secure, &there).unwrap();
        let wanted = "[[registry]]\nprefix = \"docker.io\"\nlocation = \"docker.io\"\ninsecure = true\n\n\
                      [[registry.mirror]]\nlocation = \"127.0.0.1:16000/docker.io\"\n\n\
                      [[registry.mirror]]\nlocation = \"cache.example/hub\"\npull-from-mirror = \"digest-only\"\n";
        assert_eq!(text, format!("{HEAD}{wanted}"));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert!(matches!(entries("[registries.search]\nregistries = []\n"), Err(Error::Version1)));
        assert!(matches!(entries("registry = 1\n"), Err(Error::Document(DocumentError::Shape(_)))));
        assert!(matches!(entries("registry"), Err(Error::Document(DocumentError::Syntax(_)))));
        let odd = entries("[[registry]]\nlocation = \"docker.io\"\nmirror = 1\n").unwrap();
        let error = drop_in(&mirrored(&["docker.io"]), &agent("127.0.0.1:16000"), &odd).unwrap_err();
        assert_eq!(
            error.to_string(),
            "has mirrors of docker.io that are not [[registry.mirror]] tables: write them so first"
        );
    }
}
