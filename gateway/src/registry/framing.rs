//! Requests as bytes on a socket: what no client of ours would send, and what two servers in a row could read in two ways.

use super::{Rules, Service, harness::Server, memory::Memory};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Everything that a server answers to these bytes until it closes the connection.
async fn answers(server: &Server<Service<Memory>>, bytes: &[u8]) -> Vec<String> {
    let mut socket = TcpStream::connect(server.addr).await.unwrap();
    // A server that has refused may close before all is sent.
    let _ = socket.write_all(bytes).await;
    let _ = socket.shutdown().await;
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(30), socket.read_to_end(&mut answer));
    let _ = read.await.expect("an answer, or the connection's end");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    answer.match_indices("HTTP/1.1 ").map(|(at, _)| answer[at + 9..at + 12].to_owned()).collect()
}

#[tokio::test]
async fn requests_that_can_be_read_in_two_ways_are_refused() {
    let server = Server::start(Service::new(Memory::default(), Rules::default())).await;
    let post =
        |headers: &str, body: &str| format!("POST /v2/a/blobs/uploads/ HTTP/1.1\r\nHost: x\r\n{headers}\r\n{body}");
    // The request that would be smuggled in.
    let second = "DELETE /v2/a/manifests/1 HTTP/1.1\r\nHost: x\r\n\r\n";
    for (name, bytes) in [
        ("two lengths", post("Content-Length: 0\r\nContent-Length: 49\r\n", second)),
        ("a list of lengths", post("Content-Length: 0, 49\r\n", second)),
        ("a signed length", post("Content-Length: +0\r\n", second)),
        ("a negative length", post("Content-Length: -1\r\n", second)),
        ("a length in hex", post("Content-Length: 0x0\r\n", second)),
        ("an unknown coding", post("Transfer-Encoding: xchunked\r\n", second)),
        ("a coding after chunked", post("Transfer-Encoding: chunked, identity\r\n", second)),
        ("a space before the colon", post("Content-Length : 0\r\n", second)),
        ("a folded header", post("X: a\r\n b\r\nContent-Length: 0\r\n", second)),
        ("a bare carriage return", post("X: a\rContent-Length: 0\r\n", second)),
        ("a null", post("X: a\0b\r\n", second)),
        ("no version", "GET /v2/\r\n\r\n".to_owned()),
        ("another version", "GET /v2/ HTTP/3.0\r\n\r\n".to_owned()),
        ("a path with a space", "GET /v2/ a HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()),
    ] {
        let statuses = answers(&server, bytes.as_bytes()).await;
        assert!(statuses.len() <= 1, "{name}: {statuses:?}");
        assert!(statuses.iter().all(|status| status == "400"), "{name}: {statuses:?}");
    }
    // With both, the length is ignored, and the connection is not used again for what could be a part of the body.
    let both = post("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", &format!("0\r\n\r\n{second}"));
    let statuses = answers(&server, both.as_bytes()).await;
    assert!(!statuses.contains(&"404".to_owned()), "{statuses:?}");
}

#[tokio::test]
async fn heads_have_a_longest() {
    let server = Server::start(Service::new(Memory::default(), Rules::default())).await;
    let get =
        |path: &str, headers: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
    let many = |n: usize| (0..n).map(|i| format!("x-{i}: 1\r\n")).collect::<String>();
    for (name, bytes, expected) in [
        ("a head of 60 KB", get("/v2/", &format!("x: {}\r\n", "a".repeat(60_000))), "200"),
        ("one of 200 KB", get("/v2/", &format!("x: {}\r\n", "a".repeat(200_000))), "431"),
        ("97 headers and two more", get("/v2/", &many(97)), "200"),
        ("a hundred more", get("/v2/", &many(100)), "431"),
        ("a path of 300 bytes", get(&format!("/v2/{}/tags/list", "a".repeat(300)), ""), "400"),
        ("one of 20 KB", get(&format!("/v2/{}/tags/list", "a".repeat(20_000)), ""), "414"),
        ("a query of 20 KB", get(&format!("/v2/a/tags/list?last={}", "a".repeat(20_000)), ""), "414"),
        ("a path of 200 KB", get(&format!("/v2/{}/tags/list", "a".repeat(200_000)), ""), "431"),
    ] {
        assert_eq!(answers(&server, bytes.as_bytes()).await, [expected], "{name}");
    }
}

#[tokio::test]
async fn chunks_that_lie_store_nothing() {
    let server = Server::start(Service::new(Memory::default(), Rules::default())).await;
    for body in
        ["x\r\n", "-1\r\nx\r\n0\r\n\r\n", "5\r\nab\r\n0\r\n\r\n", "ffffffffffffffffff\r\nx", "2\r\nabc\r\n0\r\n\r\n"]
    {
        let location = server.open("a").await;
        let bytes = format!("PATCH {location} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        let statuses = answers(&server, bytes.as_bytes()).await;
        assert!(statuses.iter().all(|status| status.starts_with('4')), "{body:?}: {statuses:?}");
        assert_eq!(server.get(&location).await.header("range"), "0-0", "{body:?}");
    }
}
