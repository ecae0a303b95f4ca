//! Lists in pages, in Kraken's form: `limit` and an `offset` that is the last answer's; and in the registry's: `n` and `last`.

use crate::{
    http::{self, Response},
    registry::paging::Listing,
};
use hyper::{StatusCode, Uri};
use serde::{Deserialize, Serialize};

/// Which part of a list is asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Window {
    /// At most so many; all where there is none.
    pub(super) limit: Option<usize>,
    /// Those after this one.
    pub(super) after: Option<String>,
    /// How the client asked, and is told to go on.
    style: Style,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Style {
    /// `limit`, `offset`.
    #[default]
    Kraken,
    /// `n`, `last`.
    Registry,
}

impl Window {
    /// 400 for parameters that are unknown, wrong, given twice or of both styles.
    pub(super) fn parse(uri: &Uri) -> Result<Self, http::Error> {
        let invalid = |what: &str| http::Error::bad_request(format!("invalid query: {what}"));
        let mut window = Self::default();
        let mut styles = Vec::new();
        for pair in uri.query().unwrap_or("").split('&').filter(|pair| !pair.is_empty()) {
            let key = pair.split('=').next().unwrap_or("");
            let mut values = http::query_all(uri, key);
            let value = values.pop().filter(|_| values.is_empty()).ok_or_else(|| invalid(pair))?;
            let (style, bound) = match key {
                "limit" | "offset" => (Style::Kraken, key == "limit"),
                "n" | "last" => (Style::Registry, key == "n"),
                _ => return Err(invalid(pair)),
            };
            styles.push(style);
            if bound {
                let limit: usize = value.parse().map_err(|_| invalid(pair))?;
                if limit == 0 && style == Style::Kraken {
                    return Err(invalid(pair));
                }
                window.limit = Some(limit);
            } else {
                window.after = Some(value).filter(|value| !value.is_empty());
            }
        }
        window.style = styles.first().copied().unwrap_or_default();
        if styles.iter().any(|style| *style != window.style) {
            return Err(invalid("limit and offset, or n and last"));
        }
        Ok(window)
    }

    /// Its part of a sorted list.
    pub(super) fn of(&self, sorted: &[String]) -> Listing {
        let start = self.after.as_ref().map_or(0, |after| sorted.partition_point(|item| item <= after));
        let rest = sorted.get(start..).unwrap_or_default();
        let len = self.limit.map_or(rest.len(), |limit| limit.min(rest.len()));
        Listing { items: rest[..len].to_vec(), more: len < rest.len() }
    }

    /// The path and query of the part after one that ends with `last`.
    fn next(&self, path: &str, last: &str) -> String {
        let last = http::encode_segment(last);
        match (self.style, self.limit) {
            (Style::Kraken, Some(limit)) => format!("{path}?limit={limit}&offset={last}"),
            (Style::Kraken, None) => format!("{path}?offset={last}"),
            (Style::Registry, Some(n)) => format!("{path}?n={n}&last={last}"),
            (Style::Registry, None) => format!("{path}?last={last}"),
        }
    }
}

/// The JSON of a list.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ListAnswer {
    /// This part and the next.
    pub links: Links,
    /// How many are in this part.
    pub size: usize,
    /// They.
    pub result: Vec<String>,
}

/// Where to ask.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Links {
    /// For the next part; empty after the last.
    pub next: String,
    /// For this part.
    #[serde(rename = "self")]
    pub this: String,
}

pub(super) fn answer(uri: &Uri, window: &Window, listing: Listing) -> Response {
    let next = match listing.items.last() {
        Some(last) if listing.more => window.next(uri.path(), last),
        _ => String::new(),
    };
    let this = uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    let answer = ListAnswer { links: Links { next, this }, size: listing.items.len(), result: listing.items };
    http::json(StatusCode::OK, &answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(query: &str) -> Option<(Option<usize>, Option<String>)> {
        let window = Window::parse(&format!("/list/{query}").parse().unwrap()).ok()?;
        Some((window.limit, window.after))
    }

    #[test]
    fn both_ways_to_ask() {
        assert_eq!(window(""), Some((None, None)));
        assert_eq!(window("?limit=5&offset=a%2Fb"), Some((Some(5), Some("a/b".into()))));
        assert_eq!(window("?n=0&last="), Some((Some(0), None)));
        assert_eq!(window("?last=x"), Some((None, Some("x".into()))));
        for bad in ["?limit=0", "?limit=-1", "?limit=x", "?n=", "?limit=1&limit=1", "?x=1", "?limit=1&last=a", "?limit"]
        {
            assert_eq!(window(bad), None, "{bad}");
        }
    }

    #[test]
    fn parts_of_a_list() {
        let list = ["a", "b", "c"].map(String::from);
        let part = |limit, after: Option<&str>| {
            let window = Window { limit, after: after.map(Into::into), style: Style::Kraken };
            let listing = window.of(&list);
            (listing.items.concat(), listing.more)
        };
        assert_eq!(part(None, None), ("abc".into(), false));
        assert_eq!(part(Some(2), None), ("ab".into(), true));
        assert_eq!(part(Some(2), Some("a")), ("bc".into(), false));
        assert_eq!(part(Some(1), Some("aa")), ("b".into(), true));
        assert_eq!(part(Some(0), None), (String::new(), true));
        assert_eq!(part(None, Some("z")), (String::new(), false));
    }
}
