//! A server on a real socket and a client that reads answers whole: what tests of registries need.

use super::{manifest::Kind, manifests::digest_of};
use crate::http::{self, Client};
use bytes::Bytes;
use hyper::{HeaderMap, Method};
use peer_proto::{Algorithm, Digest};
use serde_json::{Value, json};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::watch};

const PATIENCE: Duration = Duration::from_secs(60);

/// A service that is served until this is dropped.
pub(crate) struct Server<S> {
    pub(crate) addr: SocketAddr,
    pub(crate) service: Arc<S>,
    client: Client,
    _stop: watch::Sender<bool>,
}

/// An answer, read whole.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn code(&self) -> String {
        self.json()["errors"][0]["code"].as_str().unwrap_or_default().to_owned()
    }
}

impl<S: http::Service> Server<S> {
    pub(crate) async fn start(service: Arc<S>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(http::serve(listener, service.clone(), stopped, Duration::ZERO));
        Self { addr, service, client: Client::default(), _stop: stop }
    }

    pub(crate) async fn try_send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: http::Body,
    ) -> Result<Answer, String> {
        let uri = format!("http://{}{path}", self.addr).parse().unwrap();
        let mut request = Client::request(method.parse::<Method>().unwrap(), uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = self.client.send(request.body(body).unwrap(), PATIENCE).await;
        let answer = answer.map_err(|error| error.to_string())?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let version = headers.get("docker-distribution-api-version").is_some_and(|version| version == "registry/2.0");
        assert_eq!(version, path.starts_with("/v2"), "{method} {path}");
        let body = http::read_body(answer.into_body(), 64 << 20).await.map_err(|error| error.to_string())?;
        Ok(Answer { status, headers, body })
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        self.try_send(method, path, headers, http::full(body))
            .await
            .unwrap_or_else(|why| panic!("{method} {path}: {why}"))
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "").await
    }

    pub(crate) async fn push(&self, repository: &str, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = digest_of(Algorithm::Sha256, &bytes);
        let answer = self.send("POST", &format!("/v2/{repository}/blobs/uploads/?digest={digest}"), &[], bytes).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        digest
    }

    pub(crate) async fn open(&self, repository: &str) -> String {
        let answer = self.send("POST", &format!("/v2/{repository}/blobs/uploads/"), &[], "").await;
        assert_eq!((answer.status, answer.header("range"), answer.header("content-length")), (202, "0-0", "0"));
        answer.header("location").to_owned()
    }

    pub(crate) async fn put_manifest(&self, path: &str, body: &Value) -> Answer {
        self.send("PUT", path, &[], serde_json::to_vec(body).unwrap()).await
    }
}

pub(crate) fn bytes(len: usize) -> Bytes {
    (0..len).map(|i| (i % 251) as u8).collect::<Vec<u8>>().into()
}

pub(crate) fn descriptor(media_type: &str, digest: &Digest, size: usize) -> Value {
    json!({"mediaType": media_type, "digest": digest.to_string(), "size": size})
}

pub(crate) fn image(config: &Digest, layers: &[Digest]) -> Value {
    let layer = |digest| descriptor("application/vnd.oci.image.layer.v1.tar", digest, 1);
    json!({
        "schemaVersion": 2,
        "mediaType": Kind::OciManifest.media_type(),
        "config": descriptor("application/vnd.oci.image.config.v1+json", config, 2),
        "layers": layers.iter().map(layer).collect::<Vec<_>>(),
    })
}

/// A digest that nothing has.
pub(crate) const NOWHERE: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";
