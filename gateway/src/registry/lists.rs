//! Lists: tags, repositories, referrers.

use super::{
    content::{Content, Failure},
    error::{Code, Error},
    manifest::{Descriptor, Kind},
    name::{Repository, Tag},
    paging::{Listing, Page},
    service::Service,
};
use crate::http::{self, Response};
use hyper::{
    StatusCode,
    header::{self, HeaderName, HeaderValue},
    http::request::Parts,
};
use peer_proto::Digest;
use serde::Serialize;

/// Says which filters a list of referrers has gone through.
const FILTERS: HeaderName = HeaderName::from_static("oci-filters-applied");
/// Most bytes of manifests described in one list of referrers; the rest is linked.
const REFERRERS_BYTES_MAX: usize = 4 << 20;

#[derive(Serialize)]
struct Tags<'a> {
    name: &'a str,
    tags: &'a [String],
}

#[derive(Serialize)]
struct Catalog<'a> {
    repositories: &'a [String],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    media_type: &'static str,
    manifests: Vec<Descriptor>,
}

impl<C: Content> Service<C> {
    pub(super) async fn tags(&self, parts: &Parts, repository: &Repository) -> Result<Response, Error> {
        let page = Page::parse(&parts.uri)?;
        let listing = self.content.tags(repository, &page).await.map_err(|failure| {
            failure.answer(Code::NameUnknown).about(serde_json::json!({ "name": repository.as_str() }))
        })?;
        let body = Tags { name: repository.as_str(), tags: &listing.items };
        linked(parts, &page, &listing, http::json(StatusCode::OK, &body))
    }

    pub(super) async fn catalog(&self, parts: &Parts) -> Result<Response, Error> {
        let page = Page::parse(&parts.uri)?;
        if page.n == 0 {
            return Err(Error::new(Code::PaginationNumberInvalid, "n is 0"));
        }
        let listing = self.content.repositories(&page).await.map_err(|failure| failure.answer(Code::NameUnknown))?;
        let body = Catalog { repositories: &listing.items };
        linked(parts, &page, &listing, http::json(StatusCode::OK, &body))
    }

    pub(super) async fn referrers(
        &self,
        parts: &Parts,
        repository: &Repository,
        subject: &Digest,
    ) -> Result<Response, Error> {
        let failed = |failure: Failure| failure.answer(Code::NameUnknown);
        let page = Page::parse(&parts.uri)?;
        let listing = self.content.referrers(repository, subject, &page).await.map_err(failed)?;
        let described = self.describe(repository, listing.items, REFERRERS_BYTES_MAX).await.map_err(failed)?;
        let more = listing.more || described.more;
        let mut manifests = described.items;
        if page.last.is_none() {
            let listed: Vec<Descriptor> = self.fallback(repository, subject).await.map_err(failed)?;
            manifests.extend(
                listed.into_iter().filter(|one| !manifests.iter().any(|m| m.digest == one.digest)).collect::<Vec<_>>(),
            );
        }
        let filter = http::query(&parts.uri, "artifactType").filter(|filter| !filter.is_empty());
        if let Some(filter) = &filter {
            manifests.retain(|one| one.artifact_type.as_ref() == Some(filter));
        }
        let media_type = Kind::OciIndex.media_type();
        let mut response = http::json(StatusCode::OK, &Index { schema_version: 2, media_type, manifests });
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
        if filter.is_some() {
            headers.insert(FILTERS, HeaderValue::from_static("artifactType"));
        }
        if let Some(last) = described.last.filter(|_| more) {
            let also: Vec<_> = filter.as_deref().map(|filter| ("artifactType", filter)).into_iter().collect();
            headers.extend(page.link(parts.uri.path(), &last.to_string(), &also).map(|link| (header::LINK, link)));
        }
        Ok(response)
    }

    /// What clients that know no referrers API have listed under the subject's fallback tag.
    async fn fallback(&self, repository: &Repository, subject: &Digest) -> Result<Vec<Descriptor>, Failure> {
        let listed = async {
            let digest = self.content.resolve(repository, &Tag::referrers_fallback(subject)).await?;
            self.load(repository, &digest).await
        };
        match listed.await {
            Ok((_, manifest)) => Ok(manifest.manifests),
            Err(Failure::Unknown) => Ok(Vec::new()),
            Err(failure) => Err(failure),
        }
    }
}

/// Adds the `Link` to the next page, where there is one.
fn linked(parts: &Parts, page: &Page, listing: &Listing, mut response: Response) -> Result<Response, Error> {
    if let Some(last) = listing.items.last().filter(|_| listing.more) {
        let link = page.link(parts.uri.path(), last, &[]);
        response
            .headers_mut()
            .insert(header::LINK, link.ok_or_else(|| Error::new(Code::Unknown, "link to the next page"))?);
    }
    Ok(response)
}
