//! The server loop: accept, bound, answer, drain.

use super::{
    Request, Response,
    tls::{H2, Tls},
};
use futures_util::{FutureExt, future::BoxFuture};
use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::GracefulConnection,
};
use std::{convert::Infallible, fmt::Display, future::Future, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};

/// Longest wait for a request's headers, from the connection's start or the last answer's end.
const HEADER_TIMEOUT: Duration = Duration::from_secs(75);
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

/// What answers requests. Never fails: an error is a response.
pub trait Service: Send + Sync + 'static {
    /// Answers one request.
    fn answer(self: Arc<Self>, request: Request) -> impl Future<Output = Response> + Send;
}

/// Serves until `stop` turns true, then lets requests under way end for at most `drain`.
pub async fn serve<S: Service>(listener: TcpListener, service: Arc<S>, stop: watch::Receiver<bool>, drain: Duration) {
    serve_with(listener, None, service, stop, drain).await;
}

/// The same, over TLS where there is a certificate.
pub async fn serve_with<S: Service>(
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
            connection(socket, tls, service, stop).await;
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
    socket: TcpStream,
    tls: Option<Arc<Tls>>,
    service: Arc<S>,
    stop: watch::Receiver<bool>,
) {
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "set TCP_NODELAY");
    }
    let answer = service_fn(move |request| {
        let service = service.clone();
        async move { Ok::<_, Infallible>(service.answer(request).await) }
    });
    let mut one = http1::Builder::new();
    one.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_LEN_MAX as usize)
        .half_close(false);
    let Some(tls) = tls else {
        return run(one.serve_connection(TokioIo::new(socket), answer), stop).await;
    };
    let Some(socket) = tls.accept(socket).await else { return };
    if socket.get_ref().1.alpn_protocol() != Some(H2) {
        return run(one.serve_connection(TokioIo::new(socket), answer), stop).await;
    }
    let mut two = http2::Builder::new(TokioExecutor::new());
    two.timer(TokioTimer::new())
        .adaptive_window(true)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_LEN_MAX)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    run(two.serve_connection(TokioIo::new(socket), answer), stop).await;
}

/// Until the connection ends; once `stop` is true, that is with the requests under way. Boxed, because the compiler cannot see
/// through its type in a larger future.
fn run<C>(connection: C, mut stop: watch::Receiver<bool>) -> BoxFuture<'static, ()>
where
    C: GracefulConnection<Error: Display + Send> + Send + 'static,
{
    async move {
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = stopped(&mut stop) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "connection ended");
        }
    }
    .boxed()
}
