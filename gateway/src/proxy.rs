//! The proxy: the registry that images are pushed to, and the ways to have them brought nearer before they are pulled.

#[cfg(test)]
mod concurrent;
#[cfg(test)]
mod deletes;
#[cfg(test)]
mod mirror;
pub mod preheat;
pub mod store;

pub use preheat::{Limits, Preheat};
pub use store::Store;

use crate::{
    http::{self, Request, Response},
    registry::{self, Content},
};
use hyper::{Method, StatusCode};
use std::sync::Arc;

/// What a proxy answers: `/v2/` as a registry, and Kraken's preheat and prefetch.
pub struct Proxy<C> {
    registry: Arc<registry::Service<C>>,
    preheat: Preheat<C>,
}

impl<C: Content> Proxy<C> {
    /// A proxy in front of a registry.
    pub fn new(registry: Arc<registry::Service<C>>, limits: Limits) -> Arc<Self> {
        let preheat = Preheat::new(registry.clone(), limits);
        Arc::new(Self { registry, preheat })
    }
}

impl<C: Content> http::Service for Proxy<C> {
    async fn answer(self: Arc<Self>, request: Request) -> Response {
        let post = request.method() == Method::POST;
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

/// The endpoint that a path belongs to: what requests are counted by.
pub fn class(path: &str) -> &'static str {
    match path {
        "/registry/notifications" => "notifications",
        "/proxy/v1/registry/prefetch" | "/proxy/v2/registry/prefetch" => "prefetch",
        _ => registry::class(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{
        Rules, Service,
        harness::{NOWHERE, Server, image},
        manifest::Kind,
        memory::Memory,
    };
    use serde_json::json;
    use std::collections::BTreeSet;

    #[tokio::test]
    async fn images_are_brought_nearer() {
        let registry = Service::new(Memory::default(), Rules::default());
        let limits = Limits { sizes: 1..=1000 };
        let proxy = Server::start(Proxy::new(registry.clone(), limits)).await;
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
        }
        registry.content().lose(layer);
        for (version, status) in [("v1", 200), ("v2", 500)] {
            let path = format!("/proxy/{version}/registry/prefetch");
            assert_eq!(proxy.send("POST", &path, &[], r#"{"tag":"h/a/b:1"}"#).await.status, status, "{version}");
        }
    }

    #[tokio::test]
    async fn notifications_bring_images_nearer() {
        let registry = Service::new(Memory::default(), Rules::default());
        let proxy = Server::start(Proxy::new(registry.clone(), Limits::default())).await;
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
