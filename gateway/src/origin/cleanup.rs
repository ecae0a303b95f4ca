//! Dropping blobs at an operator's word: Kraken's `forcecleanup`.

use super::{Shared, refusal};
use crate::http::{self, Request, Response};
use engine::handle::Entry;
use hyper::StatusCode;
use serde::Serialize;
use std::time::Duration;

/// Blobs of one step.
const PAGE: usize = 500;
/// Most blobs dropped by one request; the next request goes on.
const DROPPED_MAX: usize = 100_000;

#[derive(Default, Serialize)]
struct Report {
    deleted: Vec<String>,
    errors: Vec<String>,
}

impl Shared {
    /// `POST /forcecleanup?ttl_hr=`: drops blobs that nobody read for so many hours or that belong to other origins, unless work
    /// still needs them.
    pub(super) async fn force_cleanup(&self, request: &Request) -> Result<Response, http::Error> {
        let hours = http::query(request.uri(), "ttl_hr").and_then(|text| text.parse::<u32>().ok());
        let hours = hours.ok_or_else(|| http::Error::bad_request("ttl_hr is not a number of hours"))?;
        let ttl = Duration::from_secs(u64::from(hours) * 3600);
        let mut report = Report::default();
        let mut after = None;
        loop {
            let page = self.engine.list(after, PAGE).await.map_err(refusal)?;
            let Some(last) = page.last() else { break };
            after = Some(last.digest);
            for entry in page.iter().filter(|entry| entry.idle >= ttl || !self.is_owner(entry)) {
                match self.engine.evict(&entry.digest).await {
                    Ok(_) => report.deleted.push(entry.digest.hex()),
                    Err(error) => report.errors.push(error.to_string()),
                }
            }
            if report.deleted.len() + report.errors.len() >= DROPPED_MAX {
                break;
            }
        }
        Ok(http::json(StatusCode::OK, &report))
    }

    fn is_owner(&self, entry: &Entry) -> bool {
        self.cluster.order(&entry.digest).into_iter().take(self.cluster.replicas()).any(|member| member == self.me)
    }
}
