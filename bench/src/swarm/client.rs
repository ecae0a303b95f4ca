//! What runs beside an agent on its host, and the little HTTP that it takes.

use anyhow::{Context, Result, bail, ensure};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

/// One receive, bytes.
const CHUNK: usize = 1 << 20;

/// Longest head of an answer, bytes.
const HEAD_MAX: u64 = 64 << 10;

/// What a pull took.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Pulled {
    /// Seconds to the first byte of the body.
    pub(crate) first_s: f64,
    /// Seconds to the last.
    pub(crate) done_s: f64,
}

/// Waits for a line on standard input, pulls and discards, and prints a [`Pulled`] as JSON.
pub(crate) fn pull(server: &str, path: &str, len: u64) -> Result<()> {
    std::io::stdin().lock().read_line(&mut String::new())?;
    let started = Instant::now();
    let mut body = get(server, path)?;
    let (mut chunk, mut got, mut first_s) = (vec![0; CHUNK], 0, None);
    loop {
        let n = body.read(&mut chunk)?;
        if n == 0 {
            break;
        }
        first_s.get_or_insert_with(|| started.elapsed().as_secs_f64());
        got += n as u64;
    }
    ensure!(got == len, "{got} bytes of {len} came");
    let pulled = Pulled { first_s: first_s.unwrap_or_default(), done_s: started.elapsed().as_secs_f64() };
    println!("{}", serde_json::to_string(&pulled)?);
    Ok(())
}

/// The body of a GET, answered 200 with a length, up to the end of the connection.
pub(crate) fn get(server: &str, path: &str) -> Result<impl Read + use<>> {
    let mut socket = TcpStream::connect(server).with_context(|| format!("connect to {server}"))?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n")?;
    let mut answer = BufReader::with_capacity(CHUNK, socket);
    let (mut status, mut line) = (String::new(), String::new());
    let mut head = answer.by_ref().take(HEAD_MAX);
    head.read_line(&mut status)?;
    while head.read_line(&mut line)? > 2 {
        line.clear();
    }
    if status.split(' ').nth(1) != Some("200") {
        bail!("GET http://{server}{path} answered {}", status.trim());
    }
    Ok(answer)
}

/// The sum of a metric's series.
pub(crate) fn metric(server: &str, name: &str) -> Result<f64> {
    let mut page = String::new();
    get(server, "/metrics")?.read_to_string(&mut page)?;
    let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
    let values: Vec<f64> =
        page.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
    ensure!(!values.is_empty(), "{server} has no metric {name}");
    Ok(values.iter().sum())
}

/// The port of [`exchange`], in every host's namespace.
const EXCHANGE_PORT: u16 = 17000;
/// How long it takes, and the start of that, which is not counted: connections find their pace in it.
const EXCHANGE: Duration = Duration::from_secs(4);
const WARM_UP: Duration = Duration::from_secs(1);

/// Says that it listens, waits for a line, then sends to and receives from all that it dials and all that dial it; prints the bytes a
/// second that came.
pub(crate) fn exchange(dials: &[Ipv4Addr]) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", EXCHANGE_PORT))?;
    println!("ready");
    std::io::stdin().lock().read_line(&mut String::new())?;
    let (begun, got) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let dialled = dials.iter().map(|peer| TcpStream::connect((*peer, EXCHANGE_PORT)));
    for socket in dialled {
        swap(socket?, got.clone())?;
    }
    let count = got.clone();
    // All of these end with the process.
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            swap(socket, count.clone())?;
        }
        anyhow::Ok(())
    });
    thread::sleep(WARM_UP.saturating_sub(begun.elapsed()));
    let (from, before) = (Instant::now(), got.load(Relaxed));
    thread::sleep(EXCHANGE.saturating_sub(begun.elapsed()));
    let bytes = got.load(Relaxed) - before;
    println!("{}", bytes as f64 / from.elapsed().as_secs_f64());
    // The others are not done yet.
    std::io::stdin().lock().read_line(&mut String::new())?;
    Ok(())
}

/// Sends what there is room for, and counts what comes, until the other side goes.
fn swap(socket: TcpStream, got: Arc<AtomicU64>) -> Result<()> {
    let (mut from, mut to) = (socket.try_clone()?, socket);
    thread::spawn(move || std::io::copy(&mut std::io::repeat(0), &mut to));
    thread::spawn(move || {
        let mut chunk = vec![0; CHUNK];
        while let Ok(n @ 1..) = from.read(&mut chunk) {
            got.fetch_add(n as u64, Relaxed);
        }
    });
    Ok(())
}
