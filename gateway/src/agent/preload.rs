//! Kraken's preload: has the host's container runtime pull an image from this agent before anybody runs it.
//!
//! Docker is asked by its own HTTP interface, containerd by the client that comes with it: what it takes to unpack an image is
//! that client's work, not the daemon's.

use crate::{
    config,
    http::{self, BoxError, Error, Request, Response},
    index::TagName,
};
use http_body_util::{BodyExt, Empty};
use hyper::{StatusCode, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::{path::Path, process::Stdio, time::Duration};
use tokio::{net::UnixStream, process::Command, sync::Semaphore, time::timeout};

/// Pulls at a time.
const PULLS_MAX: usize = 4;
/// Longest a pull may take.
const PULL_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// Longest line of a runtime's progress, bytes.
const LINE_LEN_MAX: usize = 64 << 10;
/// Most of what a runtime says that is passed on, bytes.
const TEXT_LEN_MAX: usize = 4 << 10;
/// The namespace of containerd that Kubernetes' images are in.
const NAMESPACE: &str = "k8s.io";

/// The runtimes of this host, and the registry they pull from.
pub struct Preload {
    config: config::Preload,
    /// `host:port` of this agent's registry.
    registry: String,
    tls: bool,
    room: Semaphore,
}

/// A line of Docker's progress.
#[derive(Deserialize)]
struct Progress {
    error: Option<String>,
}

impl Preload {
    /// Pulls from the registry at `registry`, which speaks TLS or not.
    pub fn new(config: config::Preload, registry: String, tls: bool) -> Self {
        Self { config, registry, tls, room: Semaphore::new(PULLS_MAX) }
    }

    /// `GET /preload/tags/{tag}?runtime=docker|containerd&namespace=`: 200 once the runtime has the image; 500 with what it says
    /// where it has not.
    pub(super) async fn answer(&self, request: &Request, tag: &TagName) -> Result<Response, Error> {
        let runtime = http::query(request.uri(), "runtime").filter(|runtime| !runtime.is_empty());
        let namespace = http::query(request.uri(), "namespace").filter(|namespace| !namespace.is_empty());
        let _room = self
            .room
            .try_acquire()
            .map_err(|_| Error::unavailable(format!("busy: {PULLS_MAX} images are being pulled; ask again later")))?;
        let pulled = match runtime.as_deref().unwrap_or("docker") {
            "docker" => timeout(PULL_TIMEOUT, self.by_docker(tag)).await,
            "containerd" => {
                let namespace = namespace.as_deref().unwrap_or(NAMESPACE);
                if !namespace.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
                    return Err(Error::bad_request("namespace is not one of containerd's"));
                }
                timeout(PULL_TIMEOUT, self.by_containerd(tag, namespace)).await
            }
            other => return Err(Error::internal(format!("runtime {other:?} is neither docker nor containerd"))),
        };
        match pulled {
            Ok(Ok(())) => Ok(http::status(StatusCode::OK)),
            Ok(Err(why)) => Err(Error::internal(format!("pull {tag}: {why}"))),
            Err(_) => Err(Error::internal(format!("pull {tag}: not done within {PULL_TIMEOUT:?}"))),
        }
    }

    async fn by_docker(&self, tag: &TagName) -> Result<(), BoxError> {
        let socket = &self.config.docker;
        let at = |error: std::io::Error| format!("{}: {error}", socket.display());
        let stream = UnixStream::connect(socket).await.map_err(at)?;
        let (mut docker, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let image = http::encode_segment(&format!("{}/{}", self.registry, tag.repository()));
        let path = format!("/images/create?fromImage={image}&tag={}", http::encode_segment(tag.tag()));
        let request = hyper::Request::post(path).header(header::HOST, "docker").body(Empty::<Bytes>::new())?;
        let answer = docker.send_request(request).await?;
        let status = answer.status();
        let outcome = match status {
            StatusCode::OK => progress(answer.into_body()).await,
            _ => {
                let said = http::read_body(answer.into_body(), TEXT_LEN_MAX).await.unwrap_or_default();
                Err(format!("docker: {status} {}", String::from_utf8_lossy(&said).trim()).into())
            }
        };
        connection.abort();
        outcome
    }

    async fn by_containerd(&self, tag: &TagName, namespace: &str) -> Result<(), BoxError> {
        let ctr: &Path = &self.config.ctr;
        let output = Command::new(ctr)
            .arg("--address")
            .arg(&self.config.containerd)
            .arg(format!("--namespace={namespace}"))
            .args(["images", "pull", if self.tls { "--skip-verify" } else { "--plain-http" }])
            .arg(format!("{}/{tag}", self.registry))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|error| format!("{}: {error}", ctr.display()))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said: String = said.trim().chars().take(TEXT_LEN_MAX).collect();
        Err(format!("{}: {}: {said}", ctr.display(), output.status).into())
    }
}

/// Reads Docker's progress to its end: what goes wrong in mid-way is in it, not in the status.
async fn progress(mut body: hyper::body::Incoming) -> Result<(), BoxError> {
    let mut line = Vec::new();
    while let Some(frame) = body.frame().await {
        for byte in frame?.into_data().unwrap_or_default() {
            if byte != b'\n' {
                if line.len() >= LINE_LEN_MAX {
                    return Err(format!("docker sent a line of more than {LINE_LEN_MAX} bytes").into());
                }
                line.push(byte);
                continue;
            }
            if let Ok(Progress { error: Some(error) }) = serde_json::from_slice(&line) {
                return Err(format!("docker: {error}").into());
            }
            line.clear();
        }
    }
    match serde_json::from_slice(&line) {
        Ok(Progress { error: Some(error) }) => Err(format!("docker: {error}").into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::fs::PermissionsExt, path::PathBuf};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    fn preload(docker: PathBuf, ctr: PathBuf) -> Preload {
        let config = config::Preload { docker, containerd: "/c.sock".into(), ctr };
        Preload::new(config, "127.0.0.1:16000".into(), false)
    }

    fn tag() -> TagName {
        "lib/app:1".parse().unwrap()
    }

    /// What is asked of a Docker engine that answers this, and what is made of it.
    async fn docker(answer: &'static str) -> (String, Result<(), String>) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("docker.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let engine = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; 4096];
            let len = stream.read(&mut asked).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&asked[..len]).lines().next().unwrap().to_owned()
        });
        let outcome = preload(socket, "ctr".into()).by_docker(&tag()).await.map_err(|error| error.to_string());
        (engine.await.unwrap(), outcome)
    }

    #[tokio::test]
    async fn docker_pulls_from_here_and_its_errors_are_told() {
        let (asked, outcome) =
            docker("HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\n{\"status\":\"a\"}\n{\"status\":\"done\"}\n\n").await;
        assert_eq!(asked, "POST /images/create?fromImage=127.0.0.1:16000%2Flib%2Fapp&tag=1 HTTP/1.1");
        assert_eq!(outcome, Ok(()));
        for (answer, why) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 31\r\n\r\n{\"status\":\"a\"}\n{\"error\":\"full\"}", "docker: full"),
            ("HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "docker: 404 Not Found no"),
        ] {
            assert_eq!(docker(answer).await.1, Err(why.to_owned()));
        }
        let nobody = preload("/nowhere/docker.sock".into(), "ctr".into()).by_docker(&tag()).await;
        assert!(nobody.unwrap_err().to_string().starts_with("/nowhere/docker.sock: "));
    }

    #[tokio::test]
    async fn containerd_pulls_by_its_own_client() {
        let dir = tempfile::tempdir().unwrap();
        let ctr = dir.path().join("ctr");
        let said = dir.path().join("said");
        let script = format!(
            "#!/bin/sh\necho \"$@\" > {}\necho no such image >&2\nexit $(cat {}.code)\n",
            said.display(),
            said.display()
        );
        std::fs::write(&ctr, script).unwrap();
        std::fs::set_permissions(&ctr, std::fs::Permissions::from_mode(0o755)).unwrap();
        let preload = preload("/d.sock".into(), ctr.clone());
        for (code, expected) in [("0", Ok(())), ("1", Err(format!("{}: exit status: 1: no such image", ctr.display())))]
        {
            std::fs::write(dir.path().join("said.code"), code).unwrap();
            let outcome = preload.by_containerd(&tag(), "k8s.io").await.map_err(|error| error.to_string());
            assert_eq!(outcome, expected);
        }
        let said = std::fs::read_to_string(said).unwrap();
        assert_eq!(said, "--address /c.sock --namespace=k8s.io images pull --plain-http 127.0.0.1:16000/lib/app:1\n");
    }
}
