//! The paths of an origin's API, each parsed once into what it names.

use super::{Service, uploads::By};
use crate::{
    client::origin::Reach,
    http::{self, Request, Response},
};
use hyper::{Method, StatusCode};
use peer_proto::{Digest, Namespace};

/// What a path names.
#[derive(PartialEq, Eq, Debug)]
enum Route {
    Health,
    Readiness,
    Locations(Digest),
    Uploads(Namespace),
    Upload(Namespace, String),
    Blob(Namespace, Digest),
    Link(Namespace, Digest),
    Prefetch(Namespace, Digest),
    Remote,
    KrakenUploads(Namespace, Digest),
    KrakenUpload(Namespace, Digest, String),
    Transfers(Digest),
    Transfer(Digest, String),
    Duplicate(Namespace, Digest, String),
    Twins,
    Twin(String),
    Held(Digest),
    Mark(Digest),
    RemakeMetainfo(Digest),
    Size(Namespace, Digest),
    Metainfo(Namespace, Digest),
    Layout(Namespace, Digest),
    PeerContext,
    ForceCleanup,
    ForceCleanup2,
}

/// The few classes of paths that requests are counted by.
pub fn class(path: &str) -> &'static str {
    let Ok(parts) = http::segments(path) else { return "other" };
    match parse(&parts) {
        Ok(Some(route)) => route.class(),
        _ => "other",
    }
}

impl Route {
    fn class(&self) -> &'static str {
        match self {
            Self::Health | Self::Readiness => "admin",
            Self::Locations(_) | Self::PeerContext => "locations",
            Self::Uploads(_) | Self::Upload(..) | Self::KrakenUploads(..) | Self::KrakenUpload(..) => "upload",
            Self::Transfers(_) | Self::Transfer(..) | Self::Duplicate(..) | Self::Twins | Self::Twin(_) => "transfer",
            Self::Blob(..) => "blob",
            Self::Link(..) | Self::Prefetch(..) | Self::Remote => "prefetch",
            Self::Held(_) | Self::Size(..) => "stat",
            Self::RemakeMetainfo(_) | Self::Metainfo(..) | Self::Layout(..) => "layout",
            Self::ForceCleanup | Self::ForceCleanup2 | Self::Mark(_) => "cleanup",
        }
    }
}

fn parse(parts: &[String]) -> Result<Option<Route>, http::Error> {
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    Ok(Some(match parts[..] {
        ["health"] => Route::Health,
        ["readiness"] => Route::Readiness,
        ["forcecleanup"] => Route::ForceCleanup,
        ["forcecleanup", "v2"] => Route::ForceCleanup2,
        ["blobs", d, "locations"] => Route::Locations(digest(d)?),
        ["namespace", ns, "uploads"] => Route::Uploads(namespace(ns)?),
        ["namespace", ns, "uploads", id] => Route::Upload(namespace(ns)?, id.to_owned()),
        ["namespace", ns, "blobs", d] => Route::Blob(namespace(ns)?, digest(d)?),
        ["namespace", ns, "blobs", d, "link"] => Route::Link(namespace(ns)?, digest(d)?),
        ["namespace", ns, "blobs", d, "prefetch"] => Route::Prefetch(namespace(ns)?, digest(d)?),
        ["namespace", ns, "blobs", d, "remote", _] => {
            namespace(ns)?;
            digest(d)?;
            Route::Remote
        }
        ["namespace", ns, "blobs", d, "uploads"] => Route::KrakenUploads(namespace(ns)?, digest(d)?),
        ["namespace", ns, "blobs", d, "uploads", id] => Route::KrakenUpload(namespace(ns)?, digest(d)?, id.to_owned()),
        ["internal", "peercontext"] => Route::PeerContext,
        ["internal", "uploads"] => Route::Twins,
        ["internal", "uploads", id] => Route::Twin(id.to_owned()),
        ["internal", "blobs", d] => Route::Held(digest(d)?),
        ["internal", "blobs", d, "mark"] => Route::Mark(digest(d)?),
        ["internal", "blobs", d, "metainfo"] => Route::RemakeMetainfo(digest(d)?),
        ["internal", "blobs", d, "uploads"] => Route::Transfers(digest(d)?),
        ["internal", "blobs", d, "uploads", id] => Route::Transfer(digest(d)?, id.to_owned()),
        ["internal", "duplicate", "namespace", ns, "blobs", d, "uploads", id] => {
            Route::Duplicate(namespace(ns)?, digest(d)?, id.to_owned())
        }
        ["internal", "namespace", ns, "blobs", d] => Route::Size(namespace(ns)?, digest(d)?),
        ["internal", "namespace", ns, "blobs", d, "metainfo"] => Route::Metainfo(namespace(ns)?, digest(d)?),
        ["internal", "namespace", ns, "blobs", d, "layout"] => Route::Layout(namespace(ns)?, digest(d)?),
        _ => return Ok(None),
    }))
}

fn digest(text: &str) -> Result<Digest, http::Error> {
    decoded(text).parse().map_err(|error| http::Error::bad_request(format!("digest: {error}")))
}

fn namespace(text: &str) -> Result<Namespace, http::Error> {
    decoded(text).parse().map_err(|error| http::Error::bad_request(format!("namespace: {error}")))
}

/// Kraken's clients escape some names twice, and its servers undo both.
fn decoded(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// Answers one request.
pub(super) async fn answer(service: &Service, request: Request) -> Response {
    let route = http::segments(request.uri().path()).and_then(|parts| parse(&parts));
    let outcome = match route {
        Ok(Some(route)) => dispatch(service, route, request).await,
        Ok(None) => Err(http::Error::not_found("no such path")),
        Err(error) => Err(error),
    };
    outcome.unwrap_or_else(Response::from)
}

async fn dispatch(service: &Service, route: Route, request: Request) -> Result<Response, http::Error> {
    let shared = &service.shared;
    let method = request.method().clone();
    match (method, route) {
        (Method::GET | Method::HEAD, Route::Health) => Ok(http::text(StatusCode::OK, "OK\n")),
        (Method::GET | Method::HEAD, Route::Readiness) => match service.readiness().await {
            Ok(()) => Ok(http::text(StatusCode::OK, "OK\n")),
            Err(why) => Err(http::Error::unavailable(format!("origin not ready: {why}\n"))),
        },
        (Method::GET, Route::Locations(digest)) => Ok(shared.locations(&digest)),
        (Method::GET, Route::PeerContext) => Ok(shared.peer_context()),

        (Method::POST, Route::Uploads(ns)) => shared.start(&request, &ns).await,
        (Method::GET, Route::Upload(_, id)) => shared.status(&id).await,
        (Method::PATCH, Route::Upload(_, id)) => Ok(shared.patch(request, &id, By::Us).await),
        (Method::PUT, Route::Upload(ns, id)) => shared.commit(&request, &ns, &id).await,
        (Method::DELETE, Route::Upload(_, id)) => shared.cancel(&id).await,

        (Method::POST, Route::KrakenUploads(ns, digest)) => shared.start_kraken(&request, Some(&ns), &digest).await,
        (Method::PATCH, Route::KrakenUpload(_, _, id) | Route::Transfer(_, id)) => {
            Ok(shared.patch(request, &id, By::Kraken).await)
        }
        (Method::PUT, Route::KrakenUpload(ns, digest, id)) => shared.commit_kraken(Some(&ns), &digest, &id).await,
        (Method::POST, Route::Transfers(digest)) => shared.start_kraken(&request, None, &digest).await,
        (Method::PUT, Route::Transfer(digest, id)) => shared.commit_kraken(None, &digest, &id).await,
        (Method::POST, Route::Twins) => shared.start_twin(&request).await,
        (Method::PATCH, Route::Twin(id)) => Ok(shared.patch(request, &id, By::Twin).await),
        (Method::PUT, Route::Duplicate(ns, digest, id)) => shared.duplicate(request, &ns, &digest, &id).await,

        (Method::GET | Method::HEAD, Route::Blob(ns, digest)) => shared.blob(&request, &ns, &digest).await,
        (Method::POST, Route::Link(ns, digest)) => shared.link(&ns, &digest).await,
        (Method::POST, Route::Prefetch(ns, digest)) => shared.prefetch(&ns, &digest).await,
        (Method::POST, Route::Remote) => Err(http::Error::new(
            StatusCode::NOT_IMPLEMENTED,
            "origins copy nothing to other clusters; let the other cluster mirror this one's registry, or share its backend",
        )),
        (Method::HEAD, Route::Size(ns, digest)) => {
            let local = http::query(request.uri(), "local").is_some_and(|value| matches!(value.as_str(), "true" | "1"));
            let reach = if local { Reach::Local } else { Reach::Everywhere };
            shared.size(&ns, &digest, reach).await
        }
        (Method::HEAD, Route::Held(digest)) => shared.held(&digest).await,
        (Method::DELETE, Route::Held(digest)) => shared.delete(&digest).await,
        (Method::PUT, Route::Mark(digest)) => shared.mark(&digest).await,
        (Method::DELETE, Route::Mark(digest)) => Ok(shared.unmark(&digest)),
        (Method::DELETE, Route::Size(ns, digest)) => shared.discard(&ns, &digest).await,
        (Method::GET, Route::Metainfo(ns, digest)) => shared.metainfo(&ns, &digest).await,
        (Method::GET, Route::Layout(ns, digest)) => shared.layout(&ns, &digest).await,
        (Method::POST, Route::RemakeMetainfo(digest)) => shared.remake_metainfo(&request, &digest).await,
        (Method::POST, Route::ForceCleanup) => shared.force_cleanup(&request).await,
        (Method::POST, Route::ForceCleanup2) => {
            Err(http::Error::new(StatusCode::NOT_IMPLEMENTED, "cleanup by disk use is the engine's quota's work"))
        }
        _ => Err(http::Error::new(StatusCode::METHOD_NOT_ALLOWED, "method is not allowed on this path")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(path: &str) -> Result<Option<Route>, StatusCode> {
        parse(&http::segments(path).unwrap()).map_err(|error| error.status)
    }

    #[test]
    fn paths() {
        let hex = "ab".repeat(32);
        let digest: Digest = format!("sha256:{hex}").parse().unwrap();
        let ns: Namespace = "lib/app".parse().unwrap();
        for escaped in ["lib%2Fapp", "lib%252Fapp"] {
            let path = format!("/namespace/{escaped}/blobs/sha256:{hex}");
            assert_eq!(route(&path), Ok(Some(Route::Blob(ns.clone(), digest))));
            assert_eq!(class(&path), "blob");
        }
        assert_eq!(
            route(&format!("/internal/duplicate/namespace/lib%2Fapp/blobs/sha256%3A{hex}/uploads/1")),
            Ok(Some(Route::Duplicate(ns, digest, "1".into())))
        );
        assert_eq!(route("/namespace/a/blobs/sha256:ff"), Err(StatusCode::BAD_REQUEST));
        assert_eq!(route(&format!("/namespace/..%2Fa/blobs/sha256:{hex}")), Err(StatusCode::BAD_REQUEST));
        for nothing in ["/", "/x", "/namespace", "/namespace/a/blobs", "/health/"] {
            assert_eq!(route(nothing), Ok(None), "{nothing}");
            assert_eq!(class(nothing), "other");
        }
    }
}
