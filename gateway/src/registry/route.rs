//! From a path to what it names. Read from the right: a repository's name may itself contain `blobs`, `manifests` or `tags`.

use super::{
    error::{Code, Error},
    name::{Reference, ReferenceError, Repository},
};
use crate::http;
use hyper::Method;
use peer_proto::{Digest, DigestError};

/// What a path under `/v2` names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Route {
    /// `/v2/`: whether this is a registry.
    Base,
    /// `/v2/_catalog`: repositories.
    Catalog,
    /// `<name>/tags/list`.
    Tags(Repository),
    /// `<name>/blobs/<digest>`.
    Blob(Repository, Digest),
    /// `<name>/manifests/<tag or digest>`.
    Manifest(Repository, Reference),
    /// `<name>/referrers/<digest>`.
    Referrers(Repository, Digest),
    /// `<name>/blobs/uploads/`: where uploads begin.
    Uploads(Repository),
    /// `<name>/blobs/uploads/<session>`.
    Upload(Repository, String),
}

impl Route {
    /// The repository it is about.
    pub fn repository(&self) -> Option<&Repository> {
        match self {
            Self::Base | Self::Catalog => None,
            Self::Tags(repository)
            | Self::Blob(repository, _)
            | Self::Manifest(repository, _)
            | Self::Referrers(repository, _)
            | Self::Uploads(repository)
            | Self::Upload(repository, _) => Some(repository),
        }
    }
}

/// What a path names; `method` decides only between "is not here" and "cannot be" for digests of an algorithm we do not know.
/// A path outside of `/v2`, or of no endpoint, is a 404.
pub fn parse(method: &Method, path: &str) -> Result<Route, Error> {
    let no_endpoint = || Error::new(Code::Unsupported, "no such endpoint").status(hyper::StatusCode::NOT_FOUND);
    let segments = http::segments(path).map_err(|error| Error::new(Code::NameInvalid, error.message))?;
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let ["v2", rest @ ..] = &*segments else { return Err(no_endpoint()) };
    Ok(match rest {
        [] | [""] => Route::Base,
        ["_catalog"] => Route::Catalog,
        [name @ .., "tags", "list"] => Route::Tags(repository(name)?),
        [name @ .., "blobs", "uploads"] | [name @ .., "blobs", "uploads", ""] => Route::Uploads(repository(name)?),
        [name @ .., "blobs", digest] => {
            let name = repository(name)?;
            Route::Blob(name, digest.parse().map_err(|error| digest_error(method, error, Code::BlobUnknown))?)
        }
        [name @ .., "manifests", reference] => {
            let name = repository(name)?;
            let reference = reference.parse().map_err(|error| match error {
                ReferenceError::Digest(error) => digest_error(method, error, Code::ManifestUnknown),
                ReferenceError::Tag(error) if is_read(method) => Error::new(Code::ManifestUnknown, error.to_string()),
                ReferenceError::Tag(error) => error.into(),
            })?;
            Route::Manifest(name, reference)
        }
        [name @ .., "referrers", digest] => Route::Referrers(repository(name)?, digest.parse::<Digest>()?),
        [name @ .., "blobs", "uploads", session] => Route::Upload(repository(name)?, (*session).to_owned()),
        _ => return Err(no_endpoint()),
    })
}

fn repository(components: &[&str]) -> Result<Repository, Error> {
    let name = components.join("/");
    name.parse::<Repository>().map_err(|error| Error::from(error).about(serde_json::json!({ "name": name })))
}

fn is_read(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

/// A reader may name content by an algorithm that we do not hold: then it is simply not here, and a mirror's client goes on to
/// the next.
fn digest_error(method: &Method, error: DigestError, unknown: Code) -> Error {
    if error == DigestError::Algorithm && is_read(method) {
        Error::new(unknown, error.to_string())
    } else {
        error.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> Repository {
        name.parse().unwrap()
    }

    #[test]
    fn paths_are_read_from_the_right() {
        let text = format!("sha256:{}", "ab".repeat(32));
        let digest: Digest = text.parse().unwrap();
        let by_tag = |repository, tag: &str| Route::Manifest(name(repository), tag.parse().unwrap());
        for (path, route) in [
            ("/v2", Route::Base),
            ("/v2/", Route::Base),
            ("/v2/_catalog", Route::Catalog),
            ("/v2/a/tags/list", Route::Tags(name("a"))),
            ("/v2/a%2Fb/tags/list", Route::Tags(name("a/b"))),
            ("/v2/tags/list/tags/list", Route::Tags(name("tags/list"))),
            ("/v2/a/blobs/uploads", Route::Uploads(name("a"))),
            ("/v2/a/blobs/uploads/", Route::Uploads(name("a"))),
            ("/v2/blobs/uploads/blobs/uploads/", Route::Uploads(name("blobs/uploads"))),
            ("/v2/a/blobs/uploads/x~127.0.0.1:1", Route::Upload(name("a"), "x~127.0.0.1:1".into())),
            ("/v2/a/blobs/uploads/manifests/1", by_tag("a/blobs/uploads", "1")),
            ("/v2/a/manifests/manifests/list", by_tag("a/manifests", "list")),
            ("/v2/lib/app/manifests/latest", by_tag("lib/app", "latest")),
            (&format!("/v2/a/blobs/{text}"), Route::Blob(name("a"), digest)),
            (&format!("/v2/a/blobs/{}", text.replace(':', "%3A")), Route::Blob(name("a"), digest)),
            (&format!("/v2/a/blobs/blobs/{text}"), Route::Blob(name("a/blobs"), digest)),
            (&format!("/v2/a/manifests/{text}"), Route::Manifest(name("a"), Reference::Digest(digest))),
            (&format!("/v2/a/referrers/{text}"), Route::Referrers(name("a"), digest)),
        ] {
            assert_eq!(parse(&Method::GET, path).unwrap(), route, "{path}");
        }
    }

    #[test]
    fn what_is_no_path_has_its_code() {
        let (get, put) = (Method::GET, Method::PUT);
        for (method, path, code, status) in [
            (&get, "/", Code::Unsupported, 404),
            (&get, "/v1/", Code::Unsupported, 404),
            (&get, "/v2/a", Code::Unsupported, 404),
            (&get, "/v2/a/tags/all", Code::Unsupported, 404),
            (&get, "/v2/a/manifests/latest/", Code::Unsupported, 404),
            (&get, "/v2/tags/list", Code::NameInvalid, 400),
            (&get, "/v2//tags/list", Code::NameInvalid, 400),
            (&get, "/v2/A/tags/list", Code::NameInvalid, 400),
            (&get, "/v2/../tags/list", Code::NameInvalid, 400),
            (&get, "/v2/a/../b/tags/list", Code::NameInvalid, 400),
            (&get, "/v2/a/%2e%2e/b/tags/list", Code::NameInvalid, 400),
            (&get, "/v2/a/%ff/tags/list", Code::NameInvalid, 400),
            (&get, "/v2/a/blobs/sha256:12", Code::DigestInvalid, 400),
            (&get, "/v2/a/blobs/latest", Code::DigestInvalid, 400),
            (&get, "/v2/a/blobs/blake3:12", Code::BlobUnknown, 404),
            (&get, "/v2/a/manifests/blake3:12", Code::ManifestUnknown, 404),
            (&get, "/v2/a/manifests/.x", Code::ManifestUnknown, 404),
            (&put, "/v2/a/manifests/.x", Code::ManifestInvalid, 400),
            (&put, "/v2/a/manifests/blake3:12", Code::DigestInvalid, 400),
            (&put, "/v2/a/manifests/sha256:bad", Code::DigestInvalid, 400),
            (&get, "/v2/a/referrers/sha256:bad", Code::DigestInvalid, 400),
        ] {
            let error = parse(method, path).expect_err(path);
            assert_eq!((error.entries[0].code, error.status.as_u16()), (code, status), "{path}");
        }
    }
}
