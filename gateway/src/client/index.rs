//! The indexes as one service: any of them answers, the next one where one does not.

use crate::{
    config::HostPort,
    http::{self, Client, encode_segment},
    index::{ListAnswer, TagName},
    registry::{
        Tag,
        paging::{Listing, Page},
    },
};
use bytes::Bytes;
use hyper::{Method, StatusCode};
use peer_proto::{Digest, Namespace};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Longest wait for one index's answer to a question.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for one index to check and store a tag.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for any index to be back, unless told otherwise: a restart, not an outage.
const PATIENCE: Duration = Duration::from_secs(5);
/// First wait before all indexes are asked again; doubles up to [`ROUND_PAUSE_MAX`].
const ROUND_PAUSE: Duration = Duration::from_millis(100);
/// Longest such wait.
const ROUND_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Longest list taken, bytes.
const LIST_LEN_MAX: usize = 64 << 20;
/// Longest other answer taken, bytes.
const TEXT_LEN_MAX: usize = 16 << 10;

/// Why the indexes, all of them, did not do as asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is certain that there is no such thing.
    #[error("no such tag")]
    NotFound,
    /// No index could be reached, or none could reach its backend.
    #[error("index is unavailable: {0}")]
    Unavailable(String),
    /// An upstream's limit is reached.
    #[error("{message}")]
    Limited {
        /// What the index said.
        message: String,
        /// When it may be asked again.
        after: Duration,
    },
    /// An index said no: a tag whose content is missing, for one.
    #[error("{index}: {message}")]
    Refused {
        /// Which one.
        index: String,
        /// How.
        status: StatusCode,
        /// Why.
        message: String,
    },
    /// An answer that is not what the route promises.
    #[error("{index}: bad answer: {message}")]
    Answer {
        /// Whose.
        index: String,
        /// What is wrong with it.
        message: String,
    },
}

/// A client of all indexes of a cluster. Cheap to clone; clones share connections and know which index answered last.
#[derive(Clone)]
pub struct Index {
    inner: Arc<Inner>,
    /// Longest wait while none of them answers.
    patience: Duration,
}

struct Inner {
    indexes: Vec<HostPort>,
    http: Client,
    /// The one that answered last and is asked first.
    first: AtomicUsize,
}

impl Index {
    /// A client of these indexes, in order of preference.
    pub fn new(indexes: Vec<HostPort>, http: Client) -> Self {
        Self { inner: Arc::new(Inner { indexes, http, first: AtomicUsize::new(0) }), patience: PATIENCE }
    }

    /// The same client, waiting at most `patience` while no index answers.
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// What a tag stands for.
    pub async fn get(&self, tag: &TagName) -> Result<Digest, Error> {
        let (index, body) = self.ask(Method::GET, &tag_path(tag), READ_TIMEOUT, TEXT_LEN_MAX).await?;
        let text = std::str::from_utf8(&body).map(str::trim).unwrap_or_default();
        text.parse().map_err(|error| odd(&index, error))
    }

    /// Whether there is such a tag.
    pub async fn head(&self, tag: &TagName) -> Result<bool, Error> {
        match self.ask(Method::HEAD, &tag_path(tag), READ_TIMEOUT, TEXT_LEN_MAX).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Lets a tag stand for a digest; afterwards that is durable and every later [`Index::get`] sees it.
    pub async fn put(&self, tag: &TagName, digest: &Digest) -> Result<(), Error> {
        let path = format!("{}/digest/{digest}", tag_path(tag));
        self.change(tag.repository(), Method::PUT, &path).await
    }

    /// Removes a tag; [`Error::NotFound`] where there is none.
    pub async fn delete(&self, tag: &TagName) -> Result<(), Error> {
        self.change(tag.repository(), Method::DELETE, &tag_path(tag)).await
    }

    /// A repository's tags, sorted. One that has none has an empty list.
    pub async fn tags(&self, repository: &Namespace, page: &Page) -> Result<Listing, Error> {
        self.page(&format!("/repositories/{}/tags", encode_segment(repository.as_str())), page).await
    }

    /// The repositories that have tags, sorted.
    pub async fn repositories(&self, page: &Page) -> Result<Listing, Error> {
        self.page("/repositories", page).await
    }

    /// Every `repo:tag` that begins with `prefix`, in the order of the backend's tree.
    pub async fn list(&self, prefix: &str, page: &Page) -> Result<Listing, Error> {
        self.page(&format!("/list/{}", encode_segment(prefix)), page).await
    }

    /// Notes a manifest that the origins have as the repository's, and as one about `subject`, and lets `tags` stand for it;
    /// afterwards that is durable.
    pub async fn put_manifest(
        &self,
        repository: &Namespace,
        digest: &Digest,
        subject: Option<&Digest>,
        tags: &[Tag],
    ) -> Result<(), Error> {
        let mut path = format!("/repositories/{}/manifests/{digest}?", encode_segment(repository.as_str()));
        for tag in tags {
            path += &format!("tag={tag}&");
        }
        path += &about(subject);
        self.change(repository, Method::PUT, &path).await
    }

    /// Notes that content is the repository's, also where it was deleted before.
    pub async fn keep(&self, repository: &Namespace, digest: &Digest) -> Result<(), Error> {
        self.change(repository, Method::PUT, &content_path(repository, digest)).await
    }

    /// [`Error::NotFound`] where content was deleted from a repository.
    /// Where it has to be `recorded`, also for content that was not put there by a push.
    pub async fn kept(&self, repository: &Namespace, digest: &Digest, recorded: bool) -> Result<(), Error> {
        let path = format!("{}{}", content_path(repository, digest), if recorded { "?recorded=true" } else { "" });
        self.ask(Method::GET, &path, READ_TIMEOUT, TEXT_LEN_MAX).await.map(drop)
    }

    /// The same for content that is looked for by a push, which then need not bring it: it is not collected for a while.
    pub async fn renew(&self, repository: &Namespace, digest: &Digest, recorded: bool) -> Result<(), Error> {
        let recorded = if recorded { "&recorded=true" } else { "" };
        let path = format!("{}?renew=true{recorded}", content_path(repository, digest));
        self.ask(Method::GET, &path, READ_TIMEOUT, TEXT_LEN_MAX).await.map(drop)
    }

    /// Takes content from a repository, with the tags that stand for it and the note that it is about `subject`;
    /// [`Error::NotFound`] where that was done before.
    pub async fn remove(&self, repository: &Namespace, digest: &Digest, subject: Option<&Digest>) -> Result<(), Error> {
        let path = format!("{}?{}", content_path(repository, digest), about(subject));
        self.change(repository, Method::DELETE, &path).await
    }

    /// Notes that the manifest `referrer` is about `subject`.
    pub async fn refer(&self, repository: &Namespace, subject: &Digest, referrer: &Digest) -> Result<(), Error> {
        let path = format!("{}/{referrer}", referrers_path(repository, subject));
        self.change(repository, Method::PUT, &path).await
    }

    /// Takes that note back; [`Error::NotFound`] where there is none.
    pub async fn unrefer(&self, repository: &Namespace, subject: &Digest, referrer: &Digest) -> Result<(), Error> {
        let path = format!("{}/{referrer}", referrers_path(repository, subject));
        self.change(repository, Method::DELETE, &path).await
    }

    /// The manifests of a repository that are about `subject`, sorted.
    pub async fn referrers(
        &self,
        repository: &Namespace,
        subject: &Digest,
        page: &Page,
    ) -> Result<Listing<Digest>, Error> {
        let Listing { items, more } = self.page(&referrers_path(repository, subject), page).await?;
        let digests = items.iter().map(|text| text.parse().map_err(|error| odd("index", error)));
        Ok(Listing { items: digests.collect::<Result<_, _>>()?, more })
    }

    /// Whether any index can do its work.
    pub async fn readiness(&self) -> Result<(), Error> {
        let asking = self.clone().with_patience(Duration::ZERO);
        asking.ask(Method::GET, "/readiness", READ_TIMEOUT, TEXT_LEN_MAX).await.map(drop)
    }

    /// A change of a repository. All of them begin with the index that the repository's name chooses, as long as it answers, so
    /// that they meet there and are done one after the other.
    async fn change(&self, repository: &Namespace, method: Method, path: &str) -> Result<(), Error> {
        let sum = repository.as_str().bytes().fold(0usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let home = sum % self.inner.indexes.len().max(1);
        self.ask_from(Some(home), method, path, WRITE_TIMEOUT, TEXT_LEN_MAX).await.map(drop)
    }

    async fn page(&self, path: &str, page: &Page) -> Result<Listing, Error> {
        let last = page.last.as_ref().map(|last| format!("&last={}", encode_segment(last))).unwrap_or_default();
        let path = format!("{path}?n={}{last}", page.n);
        let (index, body) = self.ask(Method::GET, &path, READ_TIMEOUT, LIST_LEN_MAX).await?;
        let answer: ListAnswer = serde_json::from_slice(&body).map_err(|error| odd(&index, error))?;
        Ok(Listing { items: answer.result, more: !answer.links.next.is_empty() })
    }

    /// Asks one after the other, beginning with the one that answered last, until one answers; and all again, after a pause, while
    /// patience lasts. Every request may be repeated: what an index did and could not tell any more, the next does again. Only a
    /// removal that was done and not told is then said to be of nothing.
    async fn ask(
        &self,
        method: Method,
        path: &str,
        timeout: Duration,
        len_max: usize,
    ) -> Result<(String, Bytes), Error> {
        self.ask_from(None, method, path, timeout, len_max).await
    }

    async fn ask_from(
        &self,
        home: Option<usize>,
        method: Method,
        path: &str,
        timeout: Duration,
        len_max: usize,
    ) -> Result<(String, Bytes), Error> {
        let until = Instant::now() + self.patience;
        let mut pause = ROUND_PAUSE;
        loop {
            match self.ask_all(home, &method, path, timeout, len_max).await {
                Err(Error::Unavailable(_)) if Instant::now() + pause < until => {}
                answer => return answer,
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(ROUND_PAUSE_MAX);
        }
    }

    async fn ask_all(
        &self,
        home: Option<usize>,
        method: &Method,
        path: &str,
        timeout: Duration,
        len_max: usize,
    ) -> Result<(String, Bytes), Error> {
        let count = self.inner.indexes.len();
        let first = home.unwrap_or_else(|| self.inner.first.load(Ordering::Relaxed));
        let mut failures = Vec::new();
        for number in (0..count).map(|i| (first + i) % count) {
            match self.ask_one(&self.inner.indexes[number], method, path, timeout, len_max).await {
                Err(Error::Unavailable(failure)) => failures.push(failure),
                answer => {
                    if home.is_none() {
                        self.inner.first.store(number, Ordering::Relaxed);
                    }
                    return answer.map(|body| (self.inner.indexes[number].to_string(), body));
                }
            }
        }
        let failures = if count == 0 { "none is known".to_owned() } else { failures.join("; ") };
        Err(Error::Unavailable(failures))
    }

    async fn ask_one(
        &self,
        index: &HostPort,
        method: &Method,
        path: &str,
        timeout: Duration,
        len_max: usize,
    ) -> Result<Bytes, Error> {
        let unavailable = |error: &dyn std::fmt::Display| Error::Unavailable(format!("{index}: {error}"));
        let uri = format!("http://{index}{path}").parse().map_err(|error| odd(index.as_str(), error))?;
        let request = Client::request(method.clone(), uri).body(http::empty());
        let request = request.map_err(|error| odd(index.as_str(), error))?;
        let exchange = async {
            let answer = self.inner.http.send(request, timeout).await.map_err(|error| unavailable(&error))?;
            let (status, after) = (answer.status(), http::retried_after(answer.headers()));
            let body = http::read_body(answer.into_body(), len_max).await.map_err(|error| unavailable(&error))?;
            Ok((status, after, body))
        };
        let (status, after, body) = match tokio::time::timeout(timeout, exchange).await {
            Ok(exchanged) => exchanged?,
            Err(_) => return Err(unavailable(&format_args!("no whole answer within {timeout:?}"))),
        };
        let message = || String::from_utf8_lossy(&body).trim().to_owned();
        match status {
            StatusCode::OK => Ok(body),
            StatusCode::NOT_FOUND => Err(Error::NotFound),
            StatusCode::TOO_MANY_REQUESTS if let Some(after) = after => {
                Err(Error::Limited { message: message(), after })
            }
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => Err(unavailable(&message())),
            status => Err(Error::Refused { index: index.to_string(), status, message: message() }),
        }
    }
}

fn odd(index: &str, error: impl std::fmt::Display) -> Error {
    Error::Answer { index: index.to_owned(), message: error.to_string() }
}

fn tag_path(tag: &TagName) -> String {
    format!("/tags/{}", encode_segment(&tag.to_string()))
}

fn content_path(repository: &Namespace, digest: &Digest) -> String {
    format!("/repositories/{}/content/{digest}", encode_segment(repository.as_str()))
}

fn about(subject: Option<&Digest>) -> String {
    subject.map(|subject| format!("subject={subject}")).unwrap_or_default()
}

fn referrers_path(repository: &Namespace, subject: &Digest) -> String {
    format!("/repositories/{}/referrers/{subject}", encode_segment(repository.as_str()))
}
