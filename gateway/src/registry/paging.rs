//! Lists in pages: the `n` and `last` of a request, the `Link` of an answer.

use super::error::{Code, Error};
use crate::http;
use hyper::{Uri, header::HeaderValue};

/// Most names in one page; a client that asks for more gets a `Link` to the rest.
pub const PAGE_MAX: usize = 1000;

/// The page of a sorted list that a client asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    /// Most names.
    pub n: usize,
    /// Names after this one; from the start where there is none.
    pub last: Option<String>,
}

impl Page {
    /// The page that a request asks for.
    pub fn parse(uri: &Uri) -> Result<Self, Error> {
        let n = match http::query(uri, "n") {
            None => PAGE_MAX,
            Some(text) => super::range::number(&text)
                .map(|n| usize::try_from(n).map_or(PAGE_MAX, |n| n.min(PAGE_MAX)))
                .ok_or_else(|| Error::new(Code::PaginationNumberInvalid, "n is not a number").about(text))?,
        };
        Ok(Self { n, last: http::query(uri, "last").filter(|last| !last.is_empty()) })
    }

    /// The `Link` to the page after this one, which ended with `last`. `also` are further parameters, to be kept.
    pub fn link(&self, path: &str, last: &str, also: &[(&str, &str)]) -> Option<HeaderValue> {
        let mut uri = format!("{path}?n={}&last={}", self.n, http::encode_segment(last));
        for (name, value) in also {
            uri += &format!("&{name}={}", http::encode_segment(value));
        }
        HeaderValue::try_from(format!("<{uri}>; rel=\"next\"")).ok()
    }
}

/// Part of a sorted list.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Listing<T = String> {
    /// What is in it, in order.
    pub items: Vec<T>,
    /// Whether there is more after it.
    pub more: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_bounded_and_linked() {
        let page = |n, last: Option<&str>| Page { n, last: last.map(Into::into) };
        for (uri, expected) in [
            ("/x", Some(page(PAGE_MAX, None))),
            ("/x?n=5", Some(page(5, None))),
            ("/x?n=0", Some(page(0, None))),
            ("/x?n=5000", Some(page(PAGE_MAX, None))),
            ("/x?n=99999999999999999999999", Some(page(PAGE_MAX, None))),
            ("/x?last=a%2Fb&n=1", Some(page(1, Some("a/b")))),
            ("/x?last=", Some(page(PAGE_MAX, None))),
            ("/x?n=", None),
            ("/x?n=-1", None),
            ("/x?n=ten", None),
        ] {
            assert_eq!(Page::parse(&uri.parse().unwrap()).ok(), expected, "{uri}");
        }
        let link = page(2, None).link("/v2/_catalog", "lib/app", &[("artifactType", "a/b")]).unwrap();
        assert_eq!(link, r#"</v2/_catalog?n=2&last=lib%2Fapp&artifactType=a%2Fb>; rel="next""#);
    }
}
