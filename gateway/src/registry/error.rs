//! The registry's errors: a code of the distribution specification, its status, and the JSON that carries it.

use super::{
    content_range,
    name::{ReferenceError, RepositoryError, TagError},
    range,
};
use crate::http::{self, Response};
use hyper::{
    StatusCode,
    header::{HeaderName, HeaderValue},
};
use peer_proto::DigestError;
use serde::{Serialize, Serializer};
use std::borrow::Cow;

/// An error code. The last four are of the older Docker registry: clients know them, the specification has none for the case.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[expect(missing_docs, reason = "the specification's names, as Code::name writes them")]
pub enum Code {
    BlobUnknown,
    BlobUploadInvalid,
    BlobUploadUnknown,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    SizeInvalid,
    Unauthorized,
    Denied,
    Unsupported,
    TooManyRequests,
    RangeInvalid,
    PaginationNumberInvalid,
    Unavailable,
    Unknown,
}

impl Code {
    /// As it stands in an answer.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BlobUnknown => "BLOB_UNKNOWN",
            Self::BlobUploadInvalid => "BLOB_UPLOAD_INVALID",
            Self::BlobUploadUnknown => "BLOB_UPLOAD_UNKNOWN",
            Self::DigestInvalid => "DIGEST_INVALID",
            Self::ManifestBlobUnknown => "MANIFEST_BLOB_UNKNOWN",
            Self::ManifestInvalid => "MANIFEST_INVALID",
            Self::ManifestUnknown => "MANIFEST_UNKNOWN",
            Self::NameInvalid => "NAME_INVALID",
            Self::NameUnknown => "NAME_UNKNOWN",
            Self::SizeInvalid => "SIZE_INVALID",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::Denied => "DENIED",
            Self::Unsupported => "UNSUPPORTED",
            Self::TooManyRequests => "TOOMANYREQUESTS",
            Self::RangeInvalid => "RANGE_INVALID",
            Self::PaginationNumberInvalid => "PAGINATION_NUMBER_INVALID",
            Self::Unavailable => "UNAVAILABLE",
            Self::Unknown => "UNKNOWN",
        }
    }

    /// The status an answer with this code has, where nothing else is said.
    pub const fn status(self) -> StatusCode {
        match self {
            Self::BlobUnknown | Self::BlobUploadUnknown | Self::ManifestUnknown | Self::NameUnknown => {
                StatusCode::NOT_FOUND
            }
            Self::BlobUploadInvalid
            | Self::DigestInvalid
            | Self::ManifestBlobUnknown
            | Self::ManifestInvalid
            | Self::NameInvalid
            | Self::SizeInvalid
            | Self::PaginationNumberInvalid => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Denied => StatusCode::FORBIDDEN,
            Self::Unsupported => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooManyRequests => StatusCode::TOO_MANY_REQUESTS,
            Self::RangeInvalid => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unknown => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.name())
    }
}

/// One line of an answer's list of errors.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// What kind of error.
    pub code: Code,
    /// What is wrong, for a person.
    pub message: Cow<'static, str>,
    /// What it is about, for a program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<serde_json::Value>,
}

/// A failed request: its status and the list of errors the client sees.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{status}: {}", self.entries.iter().map(|entry| &*entry.message).collect::<Vec<_>>().join("; "))]
pub struct Error {
    /// The answer's status.
    pub status: StatusCode,
    /// At least one.
    pub entries: Vec<Entry>,
    /// Headers beside the usual.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl Error {
    /// An error with one entry and its code's status.
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        let entry = Entry { code, message: message.into(), detail: None };
        Self { status: code.status(), entries: vec![entry], headers: Vec::new() }
    }

    /// An error with an entry for each thing that is wrong. At least one.
    pub fn of_all(entries: Vec<Entry>) -> Self {
        let status = entries.first().map_or(StatusCode::INTERNAL_SERVER_ERROR, |entry| entry.code.status());
        Self { status, entries, headers: Vec::new() }
    }

    /// The same with another status.
    #[must_use]
    pub fn status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// The same, said about something.
    #[must_use]
    pub fn about(mut self, detail: impl Serialize) -> Self {
        let detail = serde_json::to_value(detail).ok();
        self.entries.iter_mut().for_each(|entry| entry.detail.clone_from(&detail));
        self
    }

    /// The same with a header more.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}

impl From<Error> for Response {
    fn from(error: Error) -> Self {
        #[derive(Serialize)]
        struct Errors {
            errors: Vec<Entry>,
        }
        let mut response = http::json(error.status, &Errors { errors: error.entries });
        response.headers_mut().extend(error.headers);
        response
    }
}

impl From<RepositoryError> for Error {
    fn from(error: RepositoryError) -> Self {
        Self::new(Code::NameInvalid, error.to_string())
    }
}

impl From<TagError> for Error {
    fn from(error: TagError) -> Self {
        Self::new(Code::ManifestInvalid, error.to_string())
    }
}

impl From<DigestError> for Error {
    fn from(error: DigestError) -> Self {
        Self::new(Code::DigestInvalid, error.to_string())
    }
}

impl From<ReferenceError> for Error {
    fn from(error: ReferenceError) -> Self {
        match error {
            ReferenceError::Tag(error) => error.into(),
            ReferenceError::Digest(error) => error.into(),
        }
    }
}

impl From<range::TooMany> for Error {
    fn from(error: range::TooMany) -> Self {
        // 400, not 416: lazy pullers step down to fewer ranges on it.
        Self::new(Code::RangeInvalid, error.to_string()).status(StatusCode::BAD_REQUEST)
    }
}

impl From<content_range::Error> for Error {
    fn from(error: content_range::Error) -> Self {
        let code = match error {
            content_range::Error::Form => Code::BlobUploadInvalid,
            content_range::Error::Length { .. } => Code::SizeInvalid,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn answers_are_the_specifications_json() {
        for (code, name, status) in [
            (Code::BlobUnknown, "BLOB_UNKNOWN", 404),
            (Code::BlobUploadInvalid, "BLOB_UPLOAD_INVALID", 400),
            (Code::BlobUploadUnknown, "BLOB_UPLOAD_UNKNOWN", 404),
            (Code::DigestInvalid, "DIGEST_INVALID", 400),
            (Code::ManifestBlobUnknown, "MANIFEST_BLOB_UNKNOWN", 400),
            (Code::ManifestInvalid, "MANIFEST_INVALID", 400),
            (Code::ManifestUnknown, "MANIFEST_UNKNOWN", 404),
            (Code::NameInvalid, "NAME_INVALID", 400),
            (Code::NameUnknown, "NAME_UNKNOWN", 404),
            (Code::SizeInvalid, "SIZE_INVALID", 400),
            (Code::Unauthorized, "UNAUTHORIZED", 401),
            (Code::Denied, "DENIED", 403),
            (Code::Unsupported, "UNSUPPORTED", 405),
            (Code::TooManyRequests, "TOOMANYREQUESTS", 429),
            (Code::RangeInvalid, "RANGE_INVALID", 416),
            (Code::PaginationNumberInvalid, "PAGINATION_NUMBER_INVALID", 400),
            (Code::Unavailable, "UNAVAILABLE", 503),
            (Code::Unknown, "UNKNOWN", 500),
        ] {
            let response = Response::from(Error::new(code, "why"));
            assert_eq!(response.status(), status, "{name}");
            assert_eq!(response.headers()["content-type"], "application/json");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, format!(r#"{{"errors":[{{"code":"{name}","message":"why"}}]}}"#));
        }
    }

    #[tokio::test]
    async fn details_and_headers_are_kept() {
        let error = Error::new(Code::RangeInvalid, "late")
            .about(serde_json::json!({"have": 5}))
            .header(hyper::header::RANGE, HeaderValue::from_static("0-4"));
        let response = Response::from(error);
        assert_eq!(
            (response.status(), response.headers()["range"].as_bytes()),
            (StatusCode::from_u16(416).unwrap(), &b"0-4"[..])
        );
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, r#"{"errors":[{"code":"RANGE_INVALID","message":"late","detail":{"have":5}}]}"#);
    }
}
