//! Figures for Prometheus: a registry per role, HTTP counters, the process, the engine.

use crate::{
    config::Role,
    http::{self, Body, BoxError, Response},
};
use bytes::Bytes;
use engine::handle::MetricValue;
use http_body_util::BodyExt;
use hyper::{
    Method, StatusCode,
    body::{Frame, SizeHint},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};
use std::{
    borrow::Cow,
    fmt, fs, io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// Prefix of the names of our own figures.
const PREFIX: &str = "shoal";
/// Ticks of `/proc/self/stat` in a second: fixed by the kernel's interface.
const TICKS_PER_S: f64 = 100.0;

/// The figures of one role. Label values are from small fixed sets, never from a client.
pub struct Metrics {
    registry: Registry,
    http: Http,
}

impl Metrics {
    /// A registry with the figures that every role has.
    pub fn new(role: Role) -> Self {
        let role = (Cow::Borrowed("role"), Cow::Borrowed(role.name()));
        let mut registry = Registry::with_labels(std::iter::once(role));
        registry.register_collector(Box::new(Process { started: SystemTime::now() }));
        let mut metrics = Self { registry, http: Http::default() };
        let http = metrics.http.clone();
        http.register(metrics.registry());
        metrics
    }

    /// Where the role's parts put theirs; names get the prefix `shoal_`.
    pub fn registry(&mut self) -> &mut Registry {
        self.registry.sub_registry_with_prefix(PREFIX)
    }

    /// Adds the engine's figures.
    pub fn engine(&mut self, engine: engine::Handle) {
        self.registry().register_collector(Box::new(Engine { engine }));
    }

    pub(super) fn http(&self) -> &Http {
        &self.http
    }

    pub(super) fn answer(&self) -> Response {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => {
                http::with_type(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", text)
            }
            Err(error) => http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("encode metrics: {error}")),
        }
    }
}

/// What is counted of every request.
#[derive(Clone)]
pub(super) struct Http {
    requests: Family<RequestLabels, Counter>,
    seconds: Family<RouteLabels, Histogram>,
    bytes: Family<RouteLabels, Counter>,
    active: Gauge,
    stalled: Counter,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    method: &'static str,
    code: u16,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct RouteLabels {
    route: &'static str,
}

impl Default for Http {
    fn default() -> Self {
        let seconds = || Histogram::new([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]);
        Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(seconds as fn() -> Histogram),
            bytes: Family::default(),
            active: Gauge::default(),
            stalled: Counter::default(),
        }
    }
}

impl Http {
    fn register(self, registry: &mut Registry) {
        registry.register("http_requests", "Requests answered, by route class", self.requests);
        registry.register("http_response_head_seconds", "Time to the head of an answer", self.seconds);
        registry.register("http_response_bytes", "Bytes of answers' bodies handed to connections", self.bytes);
        registry.register("http_requests_active", "Requests whose answers have not ended", self.active);
        let help = "Clients given up because they brought no more of a request, or took no more of an answer";
        registry.register("http_clients_stalled", help, self.stalled);
    }

    /// Counts a client that was given up.
    pub(super) fn stalled(&self) {
        self.stalled.inc();
    }

    /// Begins to count a request.
    pub(super) fn begin(&self, route: &'static str, method: &Method) -> Begun<'_> {
        let method = match *method {
            Method::GET => "GET",
            Method::HEAD => "HEAD",
            Method::POST => "POST",
            Method::PUT => "PUT",
            Method::PATCH => "PATCH",
            Method::DELETE => "DELETE",
            _ => "other",
        };
        Begun { http: self, route, method, at: Instant::now(), active: Active::new(&self.active) }
    }
}

/// A request that has no answer yet.
pub(super) struct Begun<'a> {
    http: &'a Http,
    route: &'static str,
    method: &'static str,
    at: Instant,
    active: Active,
}

impl Begun<'_> {
    /// Counts the answer, and its body while it goes out.
    pub(super) fn answered(self, response: Response) -> Response {
        let Self { http, route, method, at, active } = self;
        let code = response.status().as_u16();
        http.requests.get_or_create(&RequestLabels { route, method, code }).inc();
        http.seconds.get_or_create(&RouteLabels { route }).observe(at.elapsed().as_secs_f64());
        let bytes = http.bytes.get_or_create(&RouteLabels { route }).clone();
        response.map(|body| BodyExt::boxed(Counted { body, bytes, _active: active }))
    }
}

/// One request under way.
struct Active(Gauge);

impl Active {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A body whose bytes are counted as they leave.
struct Counted {
    body: Body,
    bytes: Counter,
    _active: Active,
}

impl hyper::body::Body for Counted {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.bytes.inc_by(data.len() as u64);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Panics since the start, caught or not.
pub(super) static PANICS: AtomicU64 = AtomicU64::new(0);

/// What the kernel knows of this process, read when asked.
#[derive(Debug)]
struct Process {
    started: SystemTime,
}

/// The figures of `/proc/self`.
#[derive(PartialEq, Debug)]
struct ProcFigures {
    resident_bytes: u64,
    anonymous_bytes: u64,
    threads: u64,
    cpu_seconds: f64,
}

impl ProcFigures {
    fn read() -> io::Result<Self> {
        Self::parse(&fs::read_to_string("/proc/self/status")?, &fs::read_to_string("/proc/self/stat")?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/self is not as we know it"))
    }

    fn parse(status: &str, stat: &str) -> Option<Self> {
        let field = |name| {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?;
            value.split_whitespace().next()?.parse::<u64>().ok()
        };
        // The command's name stands in brackets and may hold anything; user and system time are fields 14 and 15 of all.
        let mut times = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map(str::parse::<f64>);
        let ticks = times.next()?.ok()? + times.next()?.ok()?;
        Some(Self {
            resident_bytes: field("VmRSS:")? * 1024,
            anonymous_bytes: field("RssAnon:")? * 1024,
            threads: field("Threads:")?,
            cpu_seconds: ticks / TICKS_PER_S,
        })
    }
}

/// What the control group of this process is charged for pages of files; none outside of version 2's hierarchy.
fn page_cache() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let stat = fs::read_to_string(format!("/sys/fs/cgroup{}/memory.stat", group.trim_end_matches('/'))).ok()?;
    stat.lines().find_map(|line| line.strip_prefix("file "))?.parse().ok()
}

/// Open descriptors. Newer kernels tell their number as the directory's size; elsewhere they are counted.
fn open_fds() -> io::Result<u64> {
    match fs::metadata("/proc/self/fd")?.len() {
        0 => Ok(fs::read_dir("/proc/self/fd")?.count() as u64),
        known => Ok(known),
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut gauge = |name: &str, help: &str, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
        };
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        gauge("process_start_time_seconds", "When the process began, since the epoch", started.as_secs_f64())?;
        match open_fds() {
            Ok(fds) => gauge("process_open_fds", "Open descriptors", fds as f64)?,
            Err(error) => tracing::debug!(%error, "count descriptors"),
        }
        let figures = match ProcFigures::read() {
            Ok(figures) => figures,
            Err(error) => {
                tracing::debug!(%error, "read /proc/self");
                return Ok(());
            }
        };
        gauge("process_resident_memory_bytes", "Memory in use, file pages included", figures.resident_bytes as f64)?;
        let help = "Memory in use that no file stands behind: what cannot be given back by forgetting pages";
        gauge("process_anonymous_memory_bytes", help, figures.anonymous_bytes as f64)?;
        if let Some(bytes) = page_cache() {
            let help =
                "Pages of files in memory that the process's control group is charged for, blobs served among them";
            gauge("process_page_cache_bytes", help, bytes as f64)?;
        }
        gauge("process_threads", "Threads", figures.threads as f64)?;
        let cpu = ConstCounter::new(figures.cpu_seconds);
        let help = "Processor time used, user and system";
        cpu.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, MetricType::Counter)?)?;
        let panics = ConstCounter::new(PANICS.load(Ordering::Relaxed));
        let help = "Panics since the start";
        panics.encode(encoder.encode_descriptor("shoal_panics", help, None, MetricType::Counter)?)
    }
}

/// The engine's figures, summed over its shards when asked.
struct Engine {
    engine: engine::Handle,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Engine")
    }
}

impl Collector for Engine {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut figures = self.engine.metrics();
        figures.sort_by_key(|figure| figure.name);
        for series in figures.chunk_by(|a, b| a.name == b.name) {
            let Some(first) = series.first() else { continue };
            // The encoder puts the suffix of counters behind the name itself.
            let name = first.name.strip_suffix("_total").unwrap_or(first.name);
            let kind = match first.value {
                MetricValue::Counter(_) => MetricType::Counter,
                MetricValue::Gauge(_) => MetricType::Gauge,
            };
            let mut descriptor = encoder.encode_descriptor(name, first.help, None, kind)?;
            for figure in series {
                let labels: Vec<(&str, &str)> = figure.label.into_iter().collect();
                let labelled = descriptor.encode_family(&labels)?;
                match figure.value {
                    MetricValue::Counter(value) => ConstCounter::new(value).encode(labelled)?,
                    MetricValue::Gauge(value) => ConstGauge::new(value).encode(labelled)?,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_read_whatever_its_name() {
        let status = "Name:\ta) b\nVmRSS:\t    2048 kB\nRssAnon:\t    1024 kB\nThreads:\t7\n";
        let stat = "12 (a) b) S 1 12 12 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 7 0 100 1 2";
        let figures = ProcFigures { resident_bytes: 2 << 20, anonymous_bytes: 1 << 20, threads: 7, cpu_seconds: 2.0 };
        assert_eq!(ProcFigures::parse(status, stat), Some(figures));
        assert_eq!(ProcFigures::parse("", ""), None);
        ProcFigures::read().unwrap();
        assert!(open_fds().unwrap() > 2);
    }
}
