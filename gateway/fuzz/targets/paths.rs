//! A client's path and query: a route or an error, never more.
#![no_main]

use gateway::registry::{Page, route};
use hyper::{Method, Uri};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &str| {
    for method in [Method::GET, Method::PUT] {
        let _ = route::parse(&method, data);
        let _ = route::parse(&method, &format!("/v2/{data}"));
    }
    if let Ok(uri) = format!("/v2/_catalog?{data}").parse::<Uri>()
        && let Ok(page) = Page::parse(&uri)
    {
        let _ = page.link("/v2/_catalog", data, &[]);
    }
});
