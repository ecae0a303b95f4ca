//! The agent that a runtime is pointed at.

use crate::config::{HostPort, Raw, Role};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

/// Where an agent's registry is reached, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Agent {
    pub(super) addr: HostPort,
    pub(super) tls: bool,
    /// The authorities it is known by, a PEM file as the runtime sees it; those of the system without.
    pub(super) ca: Option<PathBuf>,
}

impl Agent {
    /// The agent of a configuration, or the one that is named; over TLS where the configuration has a certificate or
    /// authorities are given.
    pub(super) fn new(addr: Option<HostPort>, ca: Option<PathBuf>, raw: Option<&Raw>) -> Self {
        let addr = addr.unwrap_or_else(|| {
            let mut raw = raw.cloned().unwrap_or_default();
            raw.fill(Role::Agent);
            let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
            let listen = raw.listen.registry.unwrap_or_else(|| SocketAddr::new(loopback, 0));
            let host = if listen.ip().is_unspecified() { loopback } else { listen.ip() };
            SocketAddr::new(host, listen.port()).into()
        });
        let tls = ca.is_some() || raw.is_some_and(|raw| raw.tls.is_some());
        Self { addr, tls, ca }
    }

    /// Its registry's URL.
    pub(super) fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.addr)
    }

    /// Whether it is on this host by its address, where runtimes take plain HTTP.
    pub(super) fn is_loopback(&self) -> bool {
        let host = self.addr.host().trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

#[cfg(test)]
pub(super) fn plain(addr: &str) -> Agent {
    Agent { addr: addr.parse().unwrap(), tls: false, ca: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_found_from_its_configuration() {
        let agent = |text: &str| Agent::new(None, None, Some(&toml::from_str(text).unwrap()));
        assert_eq!(Agent::new(None, None, None).url(), "http://127.0.0.1:16000");
        assert_eq!(agent("[listen]\nregistry = \"0.0.0.0:5000\"").url(), "http://127.0.0.1:5000");
        assert_eq!(agent("[listen]\nregistry = \"[::1]:5000\"").url(), "http://[::1]:5000");
        assert_eq!(agent("[tls]\ncertificate = \"c\"\nkey = \"k\"").url(), "https://127.0.0.1:16000");
        let named = Agent::new(Some("mirror.example:443".parse().unwrap()), Some("/ca.pem".into()), None);
        assert_eq!(named.url(), "https://mirror.example:443");
        for (addr, loopback) in [("127.0.0.9:1", true), ("[::1]:1", true), ("localhost:1", true), ("10.0.0.1:1", false)]
        {
            assert_eq!(plain(addr).is_loopback(), loopback, "{addr}");
        }
    }
}
