//! The proxy: the registry that images are pushed to, and the ways to have them brought nearer before they are pulled.

#[cfg(test)]
mod concurrent;
#[cfg(test)]
mod deletes;
pub mod hosts;
#[cfg(test)]
mod mirror;
pub mod preheat;
pub mod store;

pub use hosts::Hosts;
pub use preheat::{Limits, Preheat};
pub use store::Store;

use crate::{
    http::{self, Request, Response},
    registry::{self, Content},
};
use hyper::{Method, StatusCode};
use prometheus_client::registry::Registry;
use std::sync::Arc;

/// What a proxy answers: `/v2/` as a registry, and Kraken's preheat and prefetch.
pub struct Proxy<C> {
    registry: Arc<registry::Service<C>>,
    preheat: Preheat<C>,
}

impl<C: Content> Proxy<C> {
    /// A proxy in front of a registry.
    pub fn new(registry: Arc<registry::Service<C>>, limits: Limits, hosts: Arc<Hosts>) -> Arc<Self> {
        let preheat = Preheat::new(registry.clone(), limits, hosts);
        Arc::new(Self { registry, preheat })
    }

    /// Adds its figures to a role's.
    pub fn register(&self, registry: &mut Registry) {
        self.preheat.register(registry);
    }
}

impl<C: Content> http::Service for Proxy<C> {
    async fn answer(self: Arc<Self>, request: Request) -> Response {
        let post = request.method() == Method::POST;
        if let Some(id) = progress(request.uri().path()) {
            return match *request.method() {
                Method::GET => self.preheat.progress(id).await,
                _ => http::text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n"),
            };
        }
        match request.uri().path() {
            "/registry/notifications" if post => self.preheat.notify(request).await,
            "/proxy/v1/registry/prefetch" if post => self.preheat.prefetch(request, preheat::Version::V1).await,
            "/proxy/v2/registry/prefetch" if post => self.preheat.prefetch(request, preheat::Version::V2).await,
            "/registry/notifications" | "/proxy/v1/registry/prefetch" | "/proxy/v2/registry/prefetch" => {
                http::text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n")
            }
            _ => self.registry.clone().answer(request).await,
        }
    }
}

/// The preheat whose progress a path is of.
fn progress(path: &str) -> Option<&str> {
    let rest = path.strip_prefix("/proxy/v1/registry/prefetch/");
    rest.or_else(|| path.strip_prefix("/proxy/v2/registry/prefetch/"))
}

/// The endpoint that a path belongs to: what requests are counted by.
pub fn class(path: &str) -> &'static str {
    match path {
        "/registry/notifications" => "notifications",
        "/proxy/v1/registry/prefetch" | "/proxy/v2/registry/prefetch" => "prefetch",
        _ if progress(path).is_some() => "prefetch",
        _ => registry::class(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{
        Access, Rules, Service,
        access::{Action, Config, Rule},
        harness::{NOWHERE, Server, image},
        manifest::Kind,
        memory::Memory,
    };
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde_json::json;
    use std::collections::BTreeSet;

    #[tokio::test]
    async fn images_are_brought_nearer() {
        let registry = Service::new(Memory::default(), Rules::default());
        let limits = Limits { sizes: 1..=1000 };
        let proxy = Server::start(Proxy::new(registry.clone(), limits, Arc::default())).await;
        let (config, layer) = (proxy.push("a/b", "{}").await, proxy.push("a/b", "layer").await);
        let pushed = proxy.put_manifest("/v2/a/b/manifests/1", &image(&config, &[layer])).await;
        let digest = pushed.header("docker-content-digest").to_owned();
        let index = json!({"schemaVersion": 2, "manifests": [
            {"mediaType": Kind::OciManifest.media_type(), "digest": digest, "size": 5000},
        ]});
        assert_eq!(proxy.put_manifest("/v2/a/b/manifests/all", &index).await.status, 201);

        for version in ["v1", "v2"] {
            let path = format!("/proxy/{version}/registry/prefetch");
            let asked = json!({"tag": "host:1/a/b:all", "trace_id": "t-1"});
            let answer = proxy.send("POST", &path, &[], asked.to_string()).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let expected = json!({
                "tag": "b:all", "prefetched": true, "status": "success",
                "message": "prefetching initiated successfully", "trace_id": "t-1",
            });
            assert_eq!(answer.json(), expected);
            assert_eq!(registry.content().warmed(), BTreeSet::from([config, layer]));

            for (body, status, error, message) in [
                ("{", 400, "Bad Request", "failed to decode request body"),
                (r#"{"tag":"x"}"#, 400, "Bad Request", "tag: x, invalid tag format"),
                (r#"{"tag":"h/a/b:none"}"#, 500, "Internal Server Error", "failed to get tag"),
                (r#"{"tag":"h/a/b:1","to":"moon"}"#, 400, "Bad Request", "unknown variant `moon`"),
                (r#"{"tag":"h/a/b:1","label":"a b"}"#, 400, "Bad Request", "a label is 1 to 64"),
                (r#"{"tag":"h/a/b:1","to":"origins","label":"a"}"#, 400, "Bad Request", "origins have none"),
                (r#"{"tag":"h/a/b:1","label":"a"}"#, 501, "Not Implemented", "cluster.trackers"),
                (r#"{"tag":"h/a/b:1","to":"agents","ttl_s":0}"#, 400, "Bad Request", "stands for 1 ms to 86400 s"),
            ] {
                let answer = proxy.send("POST", &path, &[], body).await;
                assert_eq!((answer.status, answer.json()["error"].as_str()), (status, Some(error)), "{body}");
                assert_eq!(
                    (answer.json()["prefetched"].as_bool(), answer.json()["status"].as_str()),
                    (Some(false), Some("failure"))
                );
                assert!(answer.json()["message"].as_str().unwrap().contains(message), "{answer:?}");
            }
            assert_eq!(proxy.get(&path).await.status, 405);
            assert_eq!(proxy.get(&format!("{path}/x")).await.status, 400);
            assert_eq!(proxy.get(&format!("{path}/0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f0")).await.status, 501);
            assert_eq!(proxy.send("POST", &format!("{path}/x"), &[], "").await.status, 405);
        }
        registry.content().lose(layer);
        for (version, status) in [("v1", 200), ("v2", 500)] {
            let path = format!("/proxy/{version}/registry/prefetch");
            assert_eq!(proxy.send("POST", &path, &[], r#"{"tag":"h/a/b:1"}"#).await.status, status, "{version}");
        }
    }

    #[tokio::test]
    async fn images_are_brought_nearer_for_those_who_may_read_or_write_them() {
        let dir = tempfile::tempdir().unwrap();
        let htpasswd = dir.path().join("htpasswd");
        let names = ["ann", "bob", "eve"].map(|name| format!("{name}:{}\n", bcrypt::hash(name, 4).unwrap()));
        std::fs::write(&htpasswd, names.concat()).unwrap();
        let rule = |user: &str, action| Rule {
            repository: "team/.*".into(),
            users: BTreeSet::from([user.to_owned()]),
            actions: BTreeSet::from([action]),
        };
        let rules = vec![rule("ann", Action::Pull), rule("bob", Action::Create), rule("eve", Action::Delete)];
        let access = Config { htpasswd: Some(htpasswd), unrecorded: false, rules, tokens: None };
        let access = Access::open(access).unwrap();
        let registry = Service::guarded(Memory::default(), Rules::default(), Some(access));
        let proxy = Server::start(Proxy::new(registry, Limits::default(), Arc::default())).await;
        for (name, password, status) in
            [("ann", "ann", 500), ("bob", "bob", 500), ("eve", "eve", 403), ("ann", "eve", 401), ("", "", 401)]
        {
            let basic = format!("Basic {}", STANDARD.encode(format!("{name}:{password}")));
            let headers: &[(&str, &str)] = if name.is_empty() { &[] } else { &[("authorization", &basic)] };
            for path in ["/proxy/v1/registry/prefetch", "/proxy/v2/registry/prefetch"] {
                let answer = proxy.send("POST", path, headers, r#"{"tag":"h/team/a:1","to":"agents"}"#).await;
                assert_eq!(answer.status, status, "{name}:{password} {answer:?}");
                // Only those who are let in learn that there is no such tag.
                assert_eq!(String::from_utf8_lossy(&answer.body).contains("failed to get tag"), status == 500);
                assert_eq!(answer.headers.contains_key("www-authenticate"), status == 401, "{answer:?}");
            }
        }
    }

    #[tokio::test]
    async fn notifications_bring_images_nearer() {
        let registry = Service::new(Memory::default(), Rules::default());
        let proxy = Server::start(Proxy::new(registry.clone(), Limits::default(), Arc::default())).await;
        let config = proxy.push("a", "{}").await;
        let pushed = proxy.put_manifest("/v2/a/manifests/1", &image(&config, &[])).await;
        let digest = pushed.header("docker-content-digest").to_owned();
        let event = |action: &str, media_type: &str, digest: &str| json!({"action": action, "target": {"mediaType": media_type, "repository": "a", "digest": digest, "tag": "1"}});
        let docker = Kind::DockerManifest.media_type();
        let notify = async |events: serde_json::Value| {
            proxy.send("POST", "/registry/notifications", &[], json!({ "events": events }).to_string()).await.status
        };
        assert_eq!(notify(json!([event("pull", docker, &digest), event("push", "x/y", &digest)])).await, 200);
        assert!(registry.content().warmed().is_empty());
        assert_eq!(
            notify(json!([event("push", docker, NOWHERE), event("push", docker, "x"), event("push", docker, &digest)]))
                .await,
            200
        );
        assert_eq!(registry.content().warmed(), BTreeSet::from([config]), "what fails stops nothing");
        assert_eq!(proxy.send("POST", "/registry/notifications", &[], "{").await.status, 500);
        assert_eq!(proxy.get("/registry/notifications").await.status, 405);
    }
}
