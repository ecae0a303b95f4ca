//! Whatever a client sends is parsed or refused, and what is parsed keeps its type's promises.

use super::{
    content_range,
    manifest::Manifest,
    name::{Reference, Repository},
    paging::{PAGE_MAX, Page},
    range, route,
    session::Session,
};
use crate::http;
use hyper::{Method, Uri};
use proptest::prelude::*;

/// Text of the characters that parsers look for, and some others.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        proptest::string::string_regex("[a-z0-9/._:~%=,&?-]{0,80}").expect("a pattern"),
        proptest::string::string_regex(r#"[\[\]{}",:a-z0-9\\ ]{0,80}"#).expect("a pattern"),
        any::<String>(),
    ]
}

/// Paths that are nearly endpoints.
fn path() -> impl Strategy<Value = String> {
    let words = [
        "v2",
        "blobs",
        "uploads",
        "manifests",
        "tags",
        "list",
        "referrers",
        "_catalog",
        "a",
        "..",
        "",
        "sha256:00",
        "A",
    ];
    proptest::collection::vec(proptest::sample::select(words.to_vec()), 0..9)
        .prop_map(|parts| format!("/{}", parts.join("/")))
}

proptest! {
    #[test]
    fn paths(path in prop_oneof![path(), text()]) {
        for method in [Method::GET, Method::PUT] {
            if let Ok(route) = route::parse(&method, &path) {
                let text = format!("{route:?}");
                prop_assert!(!text.contains(".."), "{text}");
            }
        }
        super::class(&path);
    }

    #[test]
    fn names(text in text()) {
        if let Ok(name) = text.parse::<Repository>() {
            prop_assert_eq!(name.as_str(), &text);
            prop_assert!(text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"/._-".contains(&b)));
            prop_assert!(!text.contains("..") && !text.starts_with('/') && !text.ends_with('/'));
        }
        match text.parse::<Reference>() {
            Ok(Reference::Tag(tag)) => prop_assert_eq!(tag.as_str(), &text),
            Ok(Reference::Digest(digest)) => prop_assert_eq!(digest.to_string(), text),
            Err(_) => {}
        }
    }

    #[test]
    fn ranges(text in text(), numbers in proptest::collection::vec((any::<u16>(), any::<u16>()), 1..20), total in 0..70_000u64) {
        let listed: Vec<String> = numbers.iter().map(|(a, b)| format!("{a}-{b}")).collect();
        for header in [text.clone(), format!("bytes={text}"), format!("bytes={}", listed.join(","))] {
            let Ok(Some(specs)) = range::parse(&header) else { continue };
            let mut ranges = range::resolve(&specs, total);
            prop_assert!(ranges.len() <= specs.len());
            ranges.sort_by_key(|range| range.start);
            prop_assert!(ranges.iter().all(|range| range.start < range.end && range.end <= total));
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "nothing is sent twice");
            let in_some = |at| ranges.iter().any(|range| range.contains(&at));
            for asked in specs.iter().filter_map(|spec| spec.resolve(total)) {
                prop_assert!(in_some(asked.start) && in_some(asked.end - 1));
            }
        }
    }

    #[test]
    fn chunks(text in text(), body in any::<Option<u64>>()) {
        if let Ok(range) = content_range::parse(&text, body) {
            prop_assert!(range.start < range.end);
            prop_assert!(body.is_none_or(|body| body == range.end - range.start));
        }
    }

    #[test]
    fn manifests(text in text(), bytes in any::<Vec<u8>>()) {
        // Parsed or refused.
        let _ = (Manifest::parse(text.as_bytes()), Manifest::parse_typed(&bytes, Some(&text)));
    }

    #[test]
    fn pages(text in text()) {
        if let Ok(uri) = format!("/v2/a/tags/list?n=1&last={}", http::encode_segment(&text)).parse::<Uri>() {
            prop_assert_eq!(Page::parse(&uri).unwrap().last.unwrap_or_default(), text.clone());
        }
        if let Ok(uri) = format!("/?{text}").parse::<Uri>()
            && let Ok(page) = Page::parse(&uri)
        {
            prop_assert!(page.n <= PAGE_MAX);
            let link = page.link("/v2/_catalog", &text, &[("artifactType", &text)]);
            prop_assert!(link.is_some(), "whatever the name, it can be linked to");
        }
    }

    #[test]
    fn sessions(text in text()) {
        if let Ok(session) = text.parse::<Session>() {
            let again = http::segments(&format!("/{}", session.segment())).unwrap()[0].parse::<Session>().unwrap();
            prop_assert_eq!(again, session);
        }
    }
}
