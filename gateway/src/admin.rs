//! What an operator sees of a role: `/health`, `/readiness`, `/metrics`, logs, the service manager.

pub mod log;
pub mod metrics;
pub mod signals;

pub use metrics::Metrics;

use crate::{
    config::Role,
    http::{self, Request, Response, Service},
};
use futures_util::{FutureExt, future::BoxFuture, future::join_all};
use hyper::StatusCode;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Mutex;

/// Longest wait for one check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an answer of `/readiness` stands: checks ask other services, and many may ask us.
const READINESS_TTL: Duration = Duration::from_secs(1);

/// The operator's side of one role, shared by its listeners.
pub struct Admin {
    role: Role,
    metrics: Metrics,
    health: Vec<Check>,
    readiness: Vec<Check>,
    last: Mutex<Option<(Instant, Verdict)>>,
}

type Verdict = Result<(), String>;

/// A question to be asked again and again: is this part well?
pub struct Check {
    name: &'static str,
    ask: Box<dyn Fn() -> BoxFuture<'static, Verdict> + Send + Sync>,
}

impl Check {
    /// A check of the part with this name; it answers why the part is not well.
    pub fn new<F>(name: &'static str, ask: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Verdict> + Send + 'static,
    {
        Self { name, ask: Box::new(move || ask().boxed()) }
    }

    async fn run(&self) -> Verdict {
        match tokio::time::timeout(CHECK_TIMEOUT, (self.ask)()).await {
            Ok(verdict) => verdict.map_err(|why| format!("{}: {why}", self.name)),
            Err(_) => Err(format!("{}: no answer within {CHECK_TIMEOUT:?}", self.name)),
        }
    }
}

async fn run(checks: &[Check]) -> Verdict {
    let verdicts = join_all(checks.iter().map(Check::run)).await;
    let failed: Vec<String> = verdicts.into_iter().filter_map(Verdict::err).collect();
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
}

impl Admin {
    /// The operator's side of a role. `health` says whether the process itself is well, `readiness` whether it can do its
    /// work: what it depends on is reached.
    pub fn new(role: Role, metrics: Metrics, health: Vec<Check>, readiness: Vec<Check>) -> Arc<Self> {
        Arc::new(Self { role, metrics, health, readiness, last: Mutex::default() })
    }

    /// Puts it in front of a listener's service. `class` sorts paths into the few route classes that requests are counted by.
    pub fn front<S: Service>(self: &Arc<Self>, service: Arc<S>, class: fn(&str) -> &'static str) -> Arc<Front<S>> {
        Arc::new(Front { admin: self.clone(), service, class })
    }

    async fn health(&self) -> Response {
        match run(&self.health).await {
            Ok(()) => ok(),
            Err(why) => http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("probe {why}\n")),
        }
    }

    async fn readiness(&self) -> Response {
        let mut last = self.last.lock().await;
        let verdict = match &*last {
            Some((at, verdict)) if at.elapsed() < READINESS_TTL => verdict.clone(),
            _ => {
                let verdict = run(&self.readiness).await;
                *last = Some((Instant::now(), verdict.clone()));
                verdict
            }
        };
        match verdict {
            Ok(()) => ok(),
            Err(why) => http::text(StatusCode::SERVICE_UNAVAILABLE, format!("{} not ready: {why}\n", self.role)),
        }
    }
}

fn ok() -> Response {
    http::text(StatusCode::OK, "OK\n")
}

/// A listener's service behind the operator's: answers the operator's paths itself, counts all requests.
pub struct Front<S> {
    admin: Arc<Admin>,
    service: Arc<S>,
    class: fn(&str) -> &'static str,
}

impl<S: Service> Service for Front<S> {
    async fn answer(self: Arc<Self>, request: Request) -> Response {
        let path = request.uri().path();
        let class = match path {
            "/health" | "/readiness" | "/metrics" => "admin",
            _ => (self.class)(path),
        };
        let counted = self.admin.metrics.http().begin(class, request.method());
        let response = match path {
            "/health" => self.admin.health().await,
            "/readiness" => self.admin.readiness().await,
            "/metrics" => self.admin.metrics.answer(),
            _ => self.service.clone().answer(request).await,
        };
        counted.answered(response)
    }

    fn stalled(&self) {
        self.admin.metrics.http().stalled();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{Client, read_body};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
    use tokio::{net::TcpListener, sync::watch};

    struct Echo;

    impl Service for Echo {
        async fn answer(self: Arc<Self>, request: Request) -> Response {
            http::text(StatusCode::OK, request.uri().path().to_owned())
        }
    }

    async fn get(client: &Client, url: String) -> (u16, String) {
        let answer = client.get(url.parse().unwrap(), Duration::from_secs(5)).await.unwrap();
        let status = answer.status().as_u16();
        let body = read_body(answer.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn the_operator_sees_checks_and_figures() {
        let well = Arc::new(AtomicBool::new(true));
        let asked = Arc::new(AtomicUsize::new(0));
        let health = Check::new("engine", {
            let well = well.clone();
            move || {
                let well = well.load(Relaxed);
                async move { if well { Ok(()) } else { Err("stuck".into()) } }
            }
        });
        let ready = Check::new("index", {
            let asked = asked.clone();
            move || {
                asked.fetch_add(1, Relaxed);
                async { Err("down".into()) }
            }
        });
        let admin = Admin::new(Role::Agent, Metrics::new(Role::Agent), vec![health], vec![ready]);
        let front = admin.front(Arc::new(Echo), |path| if path == "/a" { "a" } else { "other" });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = watch::channel(false);
        let server = tokio::spawn(http::serve(listener, front, stopped, Duration::from_secs(1)));

        let client = Client::default();
        assert_eq!(get(&client, format!("{url}/a")).await, (200, "/a".into()));
        assert_eq!(get(&client, format!("{url}/health")).await, (200, "OK\n".into()));
        well.store(false, Relaxed);
        assert_eq!(get(&client, format!("{url}/health")).await, (500, "probe engine: stuck\n".into()));
        for _ in 0..2 {
            let not_ready = (503, "agent not ready: index: down\n".into());
            assert_eq!(get(&client, format!("{url}/readiness")).await, not_ready);
        }
        assert_eq!(asked.load(Relaxed), 1, "the second answer came from memory");
        let (status, text) = get(&client, format!("{url}/metrics")).await;
        assert_eq!(status, 200);
        for line in [
            "shoal_http_requests_total{route=\"a\",method=\"GET\",code=\"200\",role=\"agent\"} 1",
            "shoal_http_requests_total{route=\"admin\",method=\"GET\",code=\"503\",role=\"agent\"} 2",
            "shoal_http_response_bytes_total{route=\"a\",role=\"agent\"} 2",
            "process_resident_memory_bytes{role=\"agent\"} ",
            "# EOF",
        ] {
            assert!(text.contains(line) || text.contains(&flipped(line)), "{line} is not in\n{text}");
        }
        stop.send_replace(true);
        server.await.unwrap();
    }

    /// The same line with the constant label first, as the encoder may have it.
    fn flipped(line: &str) -> String {
        line.replacen(",role=\"agent\"}", "}", 1).replacen('{', "{role=\"agent\",", 1)
    }
}
