//! The server loop: accept, bound, answer, drain.

use super::{
    Request, Response,
    plain::Plain,
    stall::{Arriving, Notice, Taken, Unread},
    streams::{Offered, Streams},
    tls::{H2, Tls, peer_names},
};
use futures_util::{FutureExt, future::BoxFuture};
use http_body_util::BodyExt;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::GracefulConnection,
};
use std::{
    convert::Infallible,
    fmt::Display,
    future::{Future, pending},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};

/// Longest wait for a request's headers, from the connection's start or the last answer's end.
const HEADER_TIMEOUT: Duration = Duration::from_secs(75);
/// Longest wait for a client that brings no more of its request's body, or takes no more of its answer. Long, because runtimes
/// pause while they unpack; services may wait for less.
const STALL_TIMEOUT: Duration = Duration::from_secs(300);
/// Most connections of one listener.
const CONNECTIONS_MAX: usize = 8192;
/// Longest request head, bytes.
const HEAD_LEN_MAX: u32 = 64 << 10;
/// Most requests at once on one connection of HTTP/2.
const STREAMS_MAX: u32 = 128;
/// How often an HTTP/2 client is asked whether it is still there.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// Longest wait for its answer.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Most headers of a request.
const HEADERS_MAX: usize = 100;

/// What is known of whoever is at a connection's other end: among the extensions of each of its requests.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Whether the connection speaks TLS.
    pub secure: bool,
    /// The names of its certificate, where it was asked for one and gave one that our authorities signed.
    pub names: Arc<[String]>,
}

/// What answers requests. Never fails: an error is a response.
pub trait Service: Send + Sync + 'static {
    /// Answers one request.
    fn answer(self: Arc<Self>, request: Request) -> impl Future<Output = Response> + Send;

    /// Told that a client stood still in mid-request or mid-answer and was given up.
    fn stalled(&self) {}
}

/// How long clients are waited for.
#[derive(Clone, Copy)]
struct Waits {
    head: Duration,
    stall: Duration,
}

const WAITS: Waits = Waits { head: HEADER_TIMEOUT, stall: STALL_TIMEOUT };

/// Serves until `stop` turns true, then lets requests under way end for at most `drain`.
pub async fn serve<S: Service>(listener: TcpListener, service: Arc<S>, stop: watch::Receiver<bool>, drain: Duration) {
    serve_with(listener, None, service, stop, drain).await;
}

/// The same, over TLS where there is a certificate.
pub async fn serve_with<S: Service>(
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    service: Arc<S>,
    stop: watch::Receiver<bool>,
    drain: Duration,
) {
    serve_within(WAITS, listener, tls, service, stop, drain).await;
}

async fn serve_within<S: Service>(
    waits: Waits,
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    service: Arc<S>,
    mut stop: watch::Receiver<bool>,
    drain: Duration,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopped(&mut stop) => break,
        };
        while connections.try_join_next().is_some() {}
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                // Out of descriptors, or a connection gone before we took it: others may end meanwhile.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (service, tls, stop) = (service.clone(), tls.clone(), stop.clone());
        connections.spawn(async move {
            connection(waits, socket, tls, service, stop).await;
            drop(place);
        });
    }
    drop(listener);
    let drained = tokio::time::timeout(drain, async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!(left = connections.len(), "requests cut after the drain time");
        connections.shutdown().await;
    }
}

/// Until `stop` is true, or its sender gone.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn connection<S: Service>(
    waits: Waits,
    socket: TcpStream,
    tls: Option<Arc<Tls>>,
    service: Arc<S>,
    stop: watch::Receiver<bool>,
) {
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "set TCP_NODELAY");
    }
    let notice: Notice = Arc::new({
        let service = service.clone();
        move || service.stalled()
    });
    let unread = Unread::default();
    let (taken, left, untaken) = (notice.clone(), unread.clone(), notice.clone());
    let answer = |peer: Peer| {
        service_fn(move |request: hyper::Request<Incoming>| {
            let (service, notice, unread) = (service.clone(), notice.clone(), unread.clone());
            let mut request = request.map(|body| Arriving::new(body, waits.stall, notice, unread));
            request.extensions_mut().insert(peer.clone());
            async move { Ok::<_, Infallible>(service.answer(request).await) }
        })
    };
    let mut one = http1::Builder::new();
    one.timer(TokioTimer::new())
        .header_read_timeout(waits.head)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_LEN_MAX as usize)
        .half_close(false);
    let Some(tls) = tls else {
        let socket = Taken::new(Plain::new(socket), waits.stall, taken, left);
        return run(one.serve_connection(TokioIo::new(socket), answer(Peer::default())), pending(), stop).await;
    };
    let Some(socket) = tls.accept(socket).await else { return };
    let is_two = socket.get_ref().1.alpn_protocol() == Some(H2);
    let answer = answer(Peer { secure: true, names: peer_names(socket.get_ref().1).into() });
    let socket = Taken::new(socket, waits.stall, taken, left);
    if !is_two {
        return run(one.serve_connection(TokioIo::new(socket), answer), pending(), stop).await;
    }
    let mut two = http2::Builder::new(TokioExecutor::new());
    two.timer(TokioTimer::new())
        .adaptive_window(true)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_LEN_MAX)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    let streams = Arc::new(Streams::default());
    let offer = streams.clone();
    let answer = service_fn(move |request| {
        let (answered, offer) = (hyper::service::Service::call(&answer, request), offer.clone());
        async move { answered.await.map(|response| response.map(|body| BodyExt::boxed(Offered::new(body, offer)))) }
    });
    let stalled = async move { streams.stalled(waits.stall, &untaken).await };
    run(two.serve_connection(TokioIo::new(socket), answer), stalled, stop).await;
}

/// Until the connection ends, or `stalled` does; once `stop` is true, that is with the requests under way. Boxed, because the
/// compiler cannot see through its type in a larger future.
fn run<C>(
    connection: C,
    stalled: impl Future<Output = ()> + Send + 'static,
    mut stop: watch::Receiver<bool>,
) -> BoxFuture<'static, ()>
where
    C: GracefulConnection<Error: Display + Send> + Send + 'static,
{
    async move {
        let (mut connection, mut stalled) = (std::pin::pin!(connection), std::pin::pin!(stalled));
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = stalled.as_mut() => return,
            () = stopped(&mut stop) => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = connection => ended,
                    () = stalled => return,
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "connection ended");
        }
    }
    .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{self, tls};
    use bytes::Bytes;
    use futures_util::stream;
    use hyper::StatusCode;
    use std::time::Instant;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Longer than any test runs: nothing may wait for it.
    const NEVER: Duration = Duration::from_secs(3600);
    /// What a test waits for.
    const SOON: Duration = Duration::from_millis(300);
    const PART: usize = 64 << 10;

    /// Answers with `len` bytes, or how a request's body ended.
    struct Long {
        len: usize,
        stalled: watch::Sender<usize>,
    }

    impl Service for Long {
        async fn answer(self: Arc<Self>, request: Request) -> Response {
            if request.method() == hyper::Method::PUT {
                return http::text(StatusCode::FORBIDDEN, "no");
            }
            if request.method() == hyper::Method::POST {
                return match http::read_body(request.into_body(), 1 << 20).await {
                    Ok(body) => http::text(StatusCode::OK, body),
                    Err(error) => error.into(),
                };
            }
            let part = Bytes::from(vec![7; PART]);
            let parts = std::iter::repeat_n(part, self.len / PART).map(Ok::<_, http::BoxError>);
            Response::new(http::stream(stream::iter(parts)))
        }

        fn stalled(&self) {
            self.stalled.send_modify(|stalled| *stalled += 1);
        }
    }

    async fn start(waits: Waits, len: usize) -> (Arc<Long>, TcpStream, watch::Sender<bool>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = Arc::new(Long { len, stalled: watch::Sender::new(0) });
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(serve_within(waits, listener, None, service.clone(), stopped, Duration::ZERO));
        (service, TcpStream::connect(addr).await.unwrap(), stop)
    }

    /// All that comes until the server ends the connection, cleanly or not.
    async fn rest(socket: &mut TcpStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(60), socket.read_to_end(&mut bytes));
        let _ = read.await.expect("the connection's end");
        bytes
    }

    #[tokio::test]
    async fn a_head_that_trickles_in_has_its_time() {
        let (_service, mut socket, _stop) = start(Waits { head: SOON, stall: NEVER }, 0).await;
        let began = Instant::now();
        let (mut from, mut to) = socket.split();
        let trickle = async {
            to.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nX: ").await.unwrap();
            while to.write_all(b"a").await.is_ok() {
                tokio::time::sleep(SOON / 20).await;
            }
        };
        let mut answer = Vec::new();
        tokio::select! {
            read = from.read_to_end(&mut answer) => drop(read),
            () = trickle => {}
        }
        assert!(began.elapsed() >= SOON && began.elapsed() < SOON * 20, "{:?}", began.elapsed());
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn a_body_that_comes_no_further_is_not_waited_for() {
        let (service, mut socket, _stop) = start(Waits { head: NEVER, stall: SOON }, 0).await;
        socket.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc").await.unwrap();
        let answer = String::from_utf8(rest(&mut socket).await).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("no bytes for 300ms"), "{answer}");
        assert_eq!(*service.stalled.borrow(), 1);
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_given_up() {
        let (service, mut socket, _stop) = start(Waits { head: NEVER, stall: SOON }, 256 << 20).await;
        socket.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let began = Instant::now();
        service.stalled.subscribe().wait_for(|stalled| *stalled == 1).await.unwrap();
        assert!(began.elapsed() >= SOON);
        assert!(rest(&mut socket).await.len() < 256 << 20, "what it did not take never comes");
    }

    /// The same of one answer of several: its connection is not full, and takes what else it asks for.
    #[tokio::test]
    async fn an_answer_of_http_2_that_is_not_taken_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let (tls, ca) = tls::tests::issued(&dir);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = Arc::new(Long { len: 32 << 20, stalled: watch::Sender::new(0) });
        let (_stop, stopped) = watch::channel(false);
        let waits = Waits { head: NEVER, stall: SOON };
        tokio::spawn(serve_within(waits, listener, Some(tls), service.clone(), stopped, Duration::ZERO));
        let mut send = tls::tests::two(addr, tls::trusting(&ca).unwrap()).await.unwrap();
        let mut get = async || {
            let request = http::Client::request(hyper::Method::GET, format!("https://{addr}/").parse().unwrap());
            send.send_request(request.body(http::empty()).unwrap()).await.unwrap().into_body()
        };
        let began = Instant::now();
        for _ in 0..3 {
            let mut taken = get().await;
            let mut got = 0;
            while let Some(frame) = taken.frame().await {
                got += frame.unwrap().into_data().unwrap().len();
                if got % (8 << 20) == 0 {
                    tokio::time::sleep(SOON / 2).await;
                }
            }
            assert_eq!(got, 32 << 20, "whoever takes its time gets all");
        }
        assert!(began.elapsed() >= SOON && *service.stalled.borrow() == 0);
        let (began, untaken) = (Instant::now(), get().await);
        service.stalled.subscribe().wait_for(|stalled| *stalled == 1).await.unwrap();
        assert!(began.elapsed() >= SOON);
        assert!(untaken.collect().await.is_err(), "it never ends well");
    }

    #[tokio::test]
    async fn a_client_that_is_still_sending_reads_its_answer() {
        for _ in 0..10 {
            let (_service, mut socket, _stop) = start(Waits { head: NEVER, stall: NEVER }, 0).await;
            let len = 64 << 20;
            socket
                .write_all(format!("PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: {len}\r\n\r\n").as_bytes())
                .await
                .unwrap();
            socket.write_all(&vec![0; len]).await.expect("all of it is taken");
            let answer = rest(&mut socket).await;
            assert!(answer.starts_with(b"HTTP/1.1 403"), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn what_is_under_way_ends_and_nothing_new_begins_once_it_stops() {
        let len = 32 << 20;
        for (drain, whole) in [(NEVER, true), (SOON, false)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap();
            let service = Arc::new(Long { len, stalled: watch::Sender::new(0) });
            let (stop, stopped) = watch::channel(false);
            let server = tokio::spawn(serve(listener, service, stopped, drain));
            let mut socket = TcpStream::connect(addr).await.unwrap();
            socket.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            let mut first = vec![0; 1 << 20];
            socket.read_exact(&mut first).await.unwrap();
            stop.send_replace(true);
            // Whoever takes nothing more is waited for no longer than it was said.
            let server = if whole { Some(server) } else { server.await.map(|()| None).unwrap() };
            let got = first.len() + rest(&mut socket).await.len();
            assert_eq!(got > len, whole, "{got} bytes with {drain:?}");
            if let Some(server) = server {
                server.await.unwrap();
            }
            assert!(TcpStream::connect(addr).await.is_err(), "nobody listens any more");
        }
    }

    #[tokio::test]
    async fn a_client_that_takes_its_time_gets_all() {
        let len = 32 << 20;
        let (service, mut socket, _stop) = start(Waits { head: NEVER, stall: SOON * 4 }, len).await;
        socket.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let (mut got, mut part) = (0, vec![0; 4 << 20]);
        while got < len / 2 {
            got += socket.read(&mut part).await.unwrap();
            if got % (1 << 20) == 0 {
                tokio::time::sleep(SOON / 10).await;
            }
        }
        got += rest(&mut socket).await.len();
        assert!(got > len, "head and body: {got}");
        assert_eq!(*service.stalled.borrow(), 0);
    }
}
