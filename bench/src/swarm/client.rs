//! What runs beside an agent on its host, and the little HTTP that it takes.

use anyhow::{Context, Result, bail, ensure};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
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

/// Sends `len` bytes to the first that connects; prints `ready PORT` before.
pub(crate) fn pour(len: u64) -> Result<()> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    println!("ready {}", listener.local_addr()?.port());
    let (mut socket, _) = listener.accept()?;
    std::io::copy(&mut std::io::repeat(0).take(len), &mut socket)?;
    Ok(())
}

/// Receives to the end; prints bytes and seconds of all but the first tenth of a second, in which the connection finds its pace.
pub(crate) fn drain(server: &str) -> Result<()> {
    let mut socket = TcpStream::connect(server).with_context(|| format!("connect to {server}"))?;
    let mut chunk = vec![0; CHUNK];
    let begun = Instant::now();
    let (mut got, mut from) = (0, None);
    loop {
        let n = socket.read(&mut chunk)?;
        if n == 0 {
            break;
        }
        match from {
            None if begun.elapsed() >= Duration::from_millis(100) => from = Some(Instant::now()),
            None => {}
            Some(_) => got += n as u64,
        }
    }
    let from = from.context("the transfer was too short to measure")?;
    println!("{got} {}", from.elapsed().as_secs_f64());
    Ok(())
}
