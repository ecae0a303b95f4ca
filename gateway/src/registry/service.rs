//! One registry over HTTP: routes, methods, headers that every answer has.

use super::{
    access::{Access, Action, Need},
    content::Content,
    error::{Code, Error},
    lent::Lent,
    name::{Reference, Repository},
    route::{self, Route},
};
use crate::{
    http::{self, Body, Request, Response},
    upstream::names::{Asked, NAMESPACE, Names},
};
use hyper::{
    Method, StatusCode, Uri,
    header::{self, HeaderMap, HeaderName, HeaderValue},
    http::request::Parts,
};
use peer_proto::Digest;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use std::sync::Arc;

/// Longest path and query of a request, bytes: a manifest's push with all the tags that it may set.
const TARGET_LEN_MAX: usize = 16 << 10;
/// On every answer, since clients tell by it that this is a registry.
pub(super) const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
/// The digest of what an answer is about.
pub(super) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// What a registry takes and what it refuses.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Take manifests although some of what they name is not here.
    pub sparse: bool,
    /// Which registries it answers for beside its own.
    pub names: Names,
}

/// A registry.
pub struct Service<C> {
    pub(super) content: C,
    pub(super) rules: Rules,
    access: Option<Arc<Access>>,
    errors: Family<CodeLabel, Counter>,
}

/// What the client of one request may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Client {
    /// Let a tag stand for something else than before.
    pub(super) moves_tags: bool,
    /// Take a blob from the repository that it names.
    pub(super) mounts: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

impl<C: Content> Service<C> {
    /// A registry of this content.
    pub fn new(content: C, rules: Rules) -> Arc<Self> {
        Self::guarded(content, rules, None)
    }

    /// A registry that asks who its clients are, where there is access control.
    pub fn guarded(content: C, rules: Rules, access: Option<Arc<Access>>) -> Arc<Self> {
        Arc::new(Self { content, rules, access, errors: Family::default() })
    }

    /// Adds its figures to a role's.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("registry_errors", "Errors answered, by the code the client saw", self.errors.clone());
        if let Some(access) = &self.access {
            access.register(registry);
        }
    }

    /// Whether clients get tokens here.
    pub(super) fn issues_tokens(&self) -> bool {
        self.access.as_ref().is_some_and(|access| access.issues_tokens())
    }

    /// What stands behind it.
    pub fn content(&self) -> &C {
        &self.content
    }

    /// Refuses who may neither pull from a repository nor push to it.
    pub(crate) async fn admit(&self, parts: &Parts, repository: &Repository) -> Result<(), Error> {
        let Some(access) = &self.access else { return Ok(()) };
        let need = Need::Any(repository, &[Action::Pull, Action::Push, Action::Create]);
        access.admit(parts, need, None).await.map(drop)
    }

    async fn route(self: &Arc<Self>, parts: &Parts, body: Body) -> Result<Response, Error> {
        if let Some(access) = &self.access
            && let Some(endpoint) = access.endpoint(parts.uri.path())
        {
            return access.answer(endpoint, parts, body).await;
        }
        let method = &parts.method;
        let route = route::parse(method, parts.uri.path())?;
        let methods = self.methods(&route);
        if !methods.contains(method) {
            if let Some(repository) = route.repository().filter(|one| self.rules.names.is_upstream(one)) {
                let why = format!("{repository} is another registry's, which is mirrored here: push to that one");
                return Err(Error::new(Code::Unsupported, why).header(header::ALLOW, text("GET, HEAD")?));
            }
            let allowed: Vec<&str> = methods.iter().map(Method::as_str).collect();
            let error = Error::new(Code::Unsupported, format!("{method} is not supported here"));
            return Err(error.header(header::ALLOW, text(allowed.join(", "))?));
        }
        let client = self.client(parts, &route).await?;
        match route {
            Route::Base => Ok(http::with_type(StatusCode::OK, "application/json", "{}")),
            Route::Catalog => self.catalog(parts).await,
            Route::Tags(repository) => self.tags(parts, &repository).await,
            Route::Referrers(repository, subject) => self.referrers(parts, &repository, &subject).await,
            Route::Blob(repository, digest) => match *method {
                Method::DELETE => self.delete_blob(&repository, &digest).await,
                _ => self.blob(parts, repository, digest).await,
            },
            Route::Manifest(repository, reference) => match (method.clone(), reference) {
                (Method::PUT, reference) => self.put_manifest(parts, body, &repository, &reference, client).await,
                (Method::DELETE, Reference::Tag(tag)) => self.untag(&repository, &tag).await,
                (Method::DELETE, Reference::Digest(digest)) => self.delete_manifest(&repository, &digest).await,
                (_, reference) => self.manifest(parts, &repository, &reference).await,
            },
            Route::Uploads(repository) => self.open_upload(parts, body, &repository, client).await,
            Route::Upload(repository, session) => {
                let session = session.parse()?;
                match *method {
                    Method::PATCH => self.append(parts, body, &repository, &session).await,
                    Method::PUT => self.close_upload(parts, body, &repository, &session).await,
                    Method::DELETE => self.cancel_upload(&repository, &session).await,
                    _ => self.upload(&repository, &session).await,
                }
            }
        }
    }

    /// What a client may do beyond what it is refused here for.
    async fn client(&self, parts: &Parts, route: &Route) -> Result<Client, Error> {
        let Some(access) = &self.access else { return Ok(Client { moves_tags: true, mounts: true }) };
        let from = http::query(&parts.uri, "from").and_then(|from| from.parse::<Repository>().ok());
        let from = from.filter(|_| matches!(route, Route::Uploads(_)));
        let who = access.admit(parts, need(&parts.method, route), from.as_ref()).await?;
        Ok(Client {
            moves_tags: match route {
                Route::Manifest(repository, _) => access.allows(&who, repository, Action::Push),
                _ => false,
            },
            mounts: from.is_some_and(|from| access.allows(&who, &from, Action::Pull)),
        })
    }

    fn methods(&self, route: &Route) -> &'static [Method] {
        const READ: &[Method] = &[Method::GET, Method::HEAD];
        let mirrored = route.repository().is_some_and(|repository| self.rules.names.is_upstream(repository));
        match route {
            Route::Uploads(_) | Route::Upload(..) if mirrored => &[],
            _ if mirrored => READ,
            Route::Manifest(..) if self.content.is_writable() => {
                &[Method::GET, Method::HEAD, Method::PUT, Method::DELETE]
            }
            Route::Blob(..) if self.content.is_writable() => &[Method::GET, Method::HEAD, Method::DELETE],
            Route::Uploads(_) if self.content.is_writable() => &[Method::POST],
            Route::Upload(..) if self.content.is_writable() => {
                &[Method::GET, Method::PATCH, Method::PUT, Method::DELETE]
            }
            Route::Uploads(_) | Route::Upload(..) => &[],
            _ => READ,
        }
    }
}

impl<C: Content> http::Service for Service<C> {
    async fn answer(self: Arc<Self>, request: Request) -> Response {
        let (mut parts, body) = request.into_parts();
        let asked = self.rules.names.asked(&parts.uri);
        let (body, lent) = Lent::new(body, parts.headers.contains_key(header::EXPECT));
        let fits = parts.uri.path_and_query().is_none_or(|target| target.as_str().len() <= TARGET_LEN_MAX);
        let aimed = if fits { aim(&mut parts, &asked) } else { Err(too_long()) };
        let routed = match aimed {
            Ok(()) => self.route(&parts, body).await,
            Err(error) => {
                // Given back, or it would be waited for below.
                drop(body);
                Err(error)
            }
        };
        let mut response = routed.unwrap_or_else(|error| {
            for entry in &error.entries {
                let code = entry.code.name();
                self.errors.get_or_create(&CodeLabel { code }).inc();
            }
            if error.status.is_server_error() {
                tracing::warn!(method = %parts.method, path = parts.uri.path(), %error, "request failed");
            }
            error.into()
        });
        if !response.status().is_success() {
            lent.drain().await;
        }
        if is_registry(parts.uri.path()) {
            response.headers_mut().insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
        }
        if let Asked::Upstream(name, _) = &asked
            && let Ok(name) = HeaderValue::try_from(name)
        {
            response.headers_mut().insert(NAMESPACE, name);
        }
        response
    }
}

fn too_long() -> Error {
    let why = format!("the request's path and query are longer than {TARGET_LEN_MAX} bytes");
    Error::new(Code::NameInvalid, why).status(StatusCode::URI_TOO_LONG)
}

/// What a client has to be allowed.
fn need<'a>(method: &Method, route: &'a Route) -> Need<'a> {
    match route {
        Route::Base => Need::Name,
        Route::Catalog => Need::Catalog,
        Route::Blob(repository, _) | Route::Manifest(repository, _) if method == Method::DELETE => {
            Need::Any(repository, &[Action::Delete])
        }
        // A push looks whether it has to bring something.
        Route::Blob(repository, _) | Route::Manifest(repository, _) if method == Method::HEAD => {
            Need::Any(repository, &[Action::Pull, Action::Push, Action::Create])
        }
        Route::Manifest(repository, _) if method == Method::PUT => {
            Need::Any(repository, &[Action::Push, Action::Create])
        }
        Route::Uploads(repository) | Route::Upload(repository, _) => {
            Need::Any(repository, &[Action::Push, Action::Create])
        }
        Route::Blob(repository, _)
        | Route::Manifest(repository, _)
        | Route::Tags(repository)
        | Route::Referrers(repository, _) => Need::Any(repository, &[Action::Pull]),
    }
}

/// Has a request that names an upstream in `?ns=` name it in its path.
fn aim(parts: &mut Parts, asked: &Asked) -> Result<(), Error> {
    let prefix = match asked {
        Asked::Own => return Ok(()),
        Asked::Upstream(_, prefix) => prefix,
        Asked::Unknown(name) => {
            let why = format!("{name:?} is not mirrored here");
            return Err(Error::new(Code::NameUnknown, why));
        }
    };
    let rest = parts.uri.path().strip_prefix("/v2/").filter(|rest| !matches!(*rest, "" | "_catalog"));
    if let Some(rest) = rest {
        let query = parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let odd = |_| Error::new(Code::NameInvalid, "path is no address");
        let aimed = format!("/v2/{prefix}/{rest}{query}").parse().map_err(odd)?;
        // With the host that was called, which is here in HTTP/2.
        let mut uri = parts.uri.clone().into_parts();
        uri.path_and_query = Some(aimed);
        parts.uri = Uri::from_parts(uri).map_err(|_| Error::new(Code::NameInvalid, "path is no address"))?;
    }
    Ok(())
}

/// The endpoint that a path belongs to: what requests are counted by. From a small fixed set, whatever the path.
pub fn class(path: &str) -> &'static str {
    let mut parts = path.rsplit('/');
    match (parts.next().unwrap_or(""), parts.next().unwrap_or(""), parts.next().unwrap_or("")) {
        ("", "uploads", _) | ("uploads", "blobs", _) | (_, "uploads", "blobs") => "uploads",
        (_, "blobs", _) => "blobs",
        (_, "manifests", _) => "manifests",
        ("list", "tags", _) => "tags",
        (_, "referrers", _) => "referrers",
        ("_catalog", "v2", _) => "catalog",
        ("", "v2", _) | ("v2", ..) => "base",
        ("token", "", _) => "token",
        ("jwks.json", ".well-known", _) => "keys",
        _ => "other",
    }
}

/// Whether a path is one of the protocol's.
pub(super) fn is_registry(path: &str) -> bool {
    path == "/v2" || path.starts_with("/v2/")
}

/// A header's value from text of ours.
pub(super) fn text(text: impl TryInto<HeaderValue, Error: std::fmt::Display>) -> Result<HeaderValue, Error> {
    text.try_into().map_err(|error| Error::new(Code::Unknown, format!("header: {error}")))
}

/// The strong tag of content: its digest.
pub(super) fn etag(digest: &Digest) -> String {
    format!("\"{digest}\"")
}

/// Whether the client has this content already: `If-None-Match`.
pub(super) fn is_unchanged(headers: &HeaderMap, digest: &Digest) -> bool {
    let tag = etag(digest);
    let values = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let mut tags = values.flat_map(|value| value.split(',')).map(|tag| tag.trim().trim_start_matches("W/"));
    tags.any(|one| one == "*" || one == tag)
}

/// The header's text, where it is there and is text.
pub(super) fn header_text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// A response without a body.
pub(super) fn bare(status: StatusCode, headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>) -> Response {
    let mut response = http::status(status);
    response.headers_mut().extend(headers);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_counted_by_endpoint() {
        for (path, expected) in [
            ("/v2", "base"),
            ("/v2/", "base"),
            ("/v2/_catalog", "catalog"),
            ("/v2/a/b/tags/list", "tags"),
            ("/v2/a/blobs/sha256:0", "blobs"),
            ("/v2/a/blobs/uploads", "uploads"),
            ("/v2/a/blobs/uploads/", "uploads"),
            ("/v2/a/blobs/uploads/x", "uploads"),
            ("/v2/a/manifests/1", "manifests"),
            ("/v2/a/referrers/x", "referrers"),
            ("/token", "token"),
            ("/.well-known/jwks.json", "keys"),
            ("/", "other"),
            ("", "other"),
            ("/favicon.ico", "other"),
        ] {
            assert_eq!(class(path), expected, "{path}");
        }
    }
}
