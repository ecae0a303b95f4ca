//! containerd's `hosts.toml`: which hosts are asked for one registry's images, and in which order.
//!
//! The agent is put before all other hosts. `server` is left as it is, and where there is none containerd goes on to the registry
//! itself: so an agent that is gone costs a refused connection, not a pull.

use super::{
    agent::Agent,
    document::{self, Error},
};
use toml_edit::{Array, Item, Key, Table, TableLike};

/// What the agent is asked for. containerd 1 and early 2 take a file for broken that names any other, such as `referrers`.
const CAPABILITIES: [&str; 2] = ["pull", "resolve"];
/// Longest wait for a connection to the agent, as Go writes durations; containerd's own limit is 30 seconds.
const DIAL_TIMEOUT: &str = "1s";

/// What a new file begins with.
const HEAD: &str = "# Written by shoal setup; shoal setup containerd --undo takes it away.\n\n";

/// The file with the agent as its first host.
pub(super) fn edit(text: Option<&str>, agent: &Agent) -> Result<String, Error> {
    let mut document = document::parse(text)?;
    if let Some(host) = entry(document.as_table_mut(), &agent.url()) {
        let host = host.as_table_like_mut().ok_or_else(|| Error::Shape(agent.url()))?;
        complete(host, agent);
        return Ok(document.to_string());
    }
    let fresh = text.is_none_or(|text| text.trim().is_empty());
    let mut host = Table::new();
    complete(&mut host, agent);
    // Before every other table, as hosts are asked in the order of the file.
    host.set_position(Some(-1));
    if fresh {
        host.decor_mut().set_prefix(HEAD);
    }
    let hosts = document.entry("host").or_insert_with(|| {
        let mut hosts = Table::new();
        hosts.set_implicit(true);
        Item::Table(hosts)
    });
    let hosts = hosts.as_table_mut().ok_or_else(|| Error::Shape("host".into()))?;
    hosts.insert_formatted(&Key::new(agent.url()), Item::Table(host));
    Ok(document.to_string())
}

/// The entry of a host that is there already.
fn entry<'a>(document: &'a mut Table, url: &str) -> Option<&'a mut Item> {
    let hosts = document.get_mut("host")?.as_table_like_mut()?;
    let name = hosts.iter().map(|(name, _)| name).find(|name| name.trim_end_matches('/') == url)?.to_owned();
    hosts.get_mut(&name)
}

/// Puts what is missing into a host's entry.
fn complete(host: &mut dyn TableLike, agent: &Agent) {
    let has = |host: &dyn TableLike, capability: &str| {
        let list = host.get("capabilities").and_then(Item::as_array);
        list.is_some_and(|list| list.iter().any(|one| one.as_str() == Some(capability)))
    };
    if !CAPABILITIES.iter().all(|capability| has(host, capability)) {
        document::set(host, "capabilities", Array::from_iter(CAPABILITIES));
    }
    if let Some(ca) = &agent.ca
        && !host.contains_key("ca")
    {
        document::set(host, "ca", ca.display().to_string());
    }
    if !host.contains_key("dial_timeout") {
        document::set(host, "dial_timeout", DIAL_TIMEOUT);
    }
}

/// The folders that containerd looks for a registry's file in, the first before the second.
pub(super) fn folders(registry: &str) -> Vec<String> {
    match registry.rsplit_once(':') {
        Some((host, port)) => vec![format!("{host}_{port}_"), registry.to_owned()],
        None => vec![registry.to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::{super::agent::plain, *};

    const OURS: &str =
        "[host.\"http://127.0.0.1:16000\"]\ncapabilities = [\"pull\", \"resolve\"]\ndial_timeout = \"1s\"\n";

    fn edited(text: &str) -> String {
        let once = edit(Some(text), &plain("127.0.0.1:16000")).unwrap();
        assert_eq!(edit(Some(&once), &plain("127.0.0.1:16000")).unwrap(), once, "{text}");
        once
    }

    #[test]
    fn the_agent_comes_first_and_the_rest_stays() {
        assert_eq!(edited(""), format!("{HEAD}{OURS}"));
        assert_eq!(edit(None, &plain("127.0.0.1:16000")).unwrap(), format!("{HEAD}{OURS}"));
        assert_eq!(
            edited("# the company's\nserver = \"https://registry-1.docker.io\" # hub\n"),
            format!("# the company's\nserver = \"https://registry-1.docker.io\" # hub\n\n{OURS}")
        );
        let others = "\n# a cache\n[host.\"https://cache.example\"]\n  capabilities = [\"pull\"] # not resolve\n\n  \
                      [host.\"https://cache.example\".header]\n    x = \"y\"\n";
        assert_eq!(
            edited(&format!("server = \"https://up.example\"\n{others}")),
            format!("server = \"https://up.example\"\n\n{OURS}{others}")
        );
    }

    #[test]
    fn an_entry_that_is_there_is_completed() {
        for (before, after) in [
            (
                "[host.\"http://127.0.0.1:16000/\"]\n  capabilities = [\"pull\"]\n",
                "[host.\"http://127.0.0.1:16000/\"]\n  capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = \"1s\"\n",
            ),
            (
                "[host.\"http://127.0.0.1:16000\"]\ncapabilities = [\"push\", \"resolve\", \"pull\"]\ndial_timeout = \"2s\"\n",
                "[host.\"http://127.0.0.1:16000\"]\ncapabilities = [\"push\", \"resolve\", \"pull\"]\ndial_timeout = \"2s\"\n",
            ),
        ] {
            assert_eq!(edited(before), after);
        }
    }

    #[test]
    fn an_agent_with_tls_is_known_by_its_authority() {
        let agent = Agent { addr: "agent.example:5".parse().unwrap(), tls: true, ca: Some("/etc/shoal/ca.pem".into()) };
        let wanted = "[host.\"https://agent.example:5\"]\ncapabilities = [\"pull\", \"resolve\"]\n\
                      ca = \"/etc/shoal/ca.pem\"\ndial_timeout = \"1s\"\n";
        assert_eq!(edit(None, &agent).unwrap(), format!("{HEAD}{wanted}"));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let refused = |text: &str| edit(Some(text), &plain("127.0.0.1:16000")).unwrap_err().to_string();
        assert!(refused("server = ").starts_with("is not TOML: line 1"), "{}", refused("server = "));
        assert_eq!(refused("host = 1\n"), "host is not a table: repair it first");
        assert_eq!(
            refused("[host]\n\"http://127.0.0.1:16000\" = 1\n"),
            "http://127.0.0.1:16000 is not a table: repair it first"
        );
    }

    #[test]
    fn folders_are_looked_for_as_containerd_does() {
        assert_eq!(folders("docker.io"), ["docker.io"]);
        assert_eq!(folders("r.example:5000"), ["r.example_5000_", "r.example:5000"]);
    }
}
