//! The protocol over real sockets, against content in memory.

use super::{
    Rules, Service,
    harness::{Answer, NOWHERE, Server, bytes, descriptor, image},
    manifest::{self, Kind},
    manifests::digest_of,
    memory::Memory,
};
use crate::http;
use bytes::Bytes;
use futures_util::stream;
use peer_proto::{Algorithm, Digest};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

type Registry = Server<Service<Memory>>;

async fn start(content: Memory, rules: Rules) -> Registry {
    Server::start(Service::new(content, rules)).await
}

async fn registry() -> Registry {
    start(Memory::default(), Rules::default()).await
}

#[tokio::test]
async fn the_base_says_what_this_is() {
    let registry = registry().await;
    for path in ["/v2/", "/v2"] {
        let answer = registry.get(path).await;
        assert_eq!(
            (answer.status, &*answer.body, answer.header("content-type")),
            (200, &b"{}"[..], "application/json")
        );
    }
    let answer = registry.send("HEAD", "/v2/", &[], "").await;
    assert_eq!((answer.status, answer.header("content-length")), (200, "2"));
    let answer = registry.send("POST", "/v2/", &[], "").await;
    assert_eq!((answer.status, answer.code().as_str(), answer.header("allow")), (405, "UNSUPPORTED", "GET, HEAD"));
}

#[tokio::test]
async fn blobs_are_answered_whole_and_in_ranges() {
    let registry = registry().await;
    let content = bytes(2048);
    let digest = registry.push("a", content.clone()).await;
    let path = format!("/v2/a/blobs/{digest}");
    let etag = format!("\"{digest}\"");

    for method in ["GET", "HEAD"] {
        let answer = registry.send(method, &path, &[], "").await;
        assert_eq!((answer.status, answer.header("content-length")), (200, "2048"), "{method}");
        assert_eq!(answer.header("docker-content-digest"), digest.to_string());
        assert_eq!((answer.header("etag"), answer.header("accept-ranges")), (etag.as_str(), "bytes"));
        assert_eq!(answer.header("content-type"), "application/octet-stream");
        assert_eq!(answer.header("content-encoding"), "");
        assert_eq!(answer.body.len(), if method == "GET" { 2048 } else { 0 });
    }
    for (range, status, content_range, part) in [
        ("bytes=500-1499", 206, "bytes 500-1499/2048", 500..1500),
        ("bytes=500-", 206, "bytes 500-2047/2048", 500..2048),
        ("bytes=-500", 206, "bytes 1548-2047/2048", 1548..2048),
        ("bytes=2000-5000", 206, "bytes 2000-2047/2048", 2000..2048),
        ("bytes=0-", 206, "bytes 0-2047/2048", 0..2048),
        ("bytes=0-0,5000-", 206, "bytes 0-0/2048", 0..1),
        ("items=0-1", 200, "", 0..2048),
        ("bytes=x", 200, "", 0..2048),
        ("bytes=500-0", 416, "bytes */2048", 0..0),
        ("bytes=5000-10000", 416, "bytes */2048", 0..0),
        ("bytes=5000-,6000-", 416, "bytes */2048", 0..0),
    ] {
        let answer = registry.send("GET", &path, &[("range", range)], "").await;
        assert_eq!((answer.status, answer.header("content-range")), (status, content_range), "{range}");
        if status == 416 {
            assert_eq!(answer.code(), "RANGE_INVALID");
        } else {
            assert_eq!(answer.body, content.slice(part), "{range}");
            assert_eq!(answer.header("content-length"), answer.body.len().to_string());
        }
    }
    let answer = registry.send("HEAD", &path, &[("range", "bytes=0-1")], "").await;
    assert_eq!((answer.status, answer.header("content-length")), (200, "2048"), "ranges are for GET");

    let conditional: [(&[(&str, &str)], u16); 8] = [
        (&[("if-none-match", &etag)], 304),
        (&[("if-none-match", "\"x\", W/\"y\"")], 200),
        (&[("if-none-match", &format!("\"x\", W/{etag}"))], 304),
        (&[("if-none-match", "*")], 304),
        (&[("range", "bytes=0-1"), ("if-range", &etag)], 206),
        (&[("range", "bytes=0-1"), ("if-range", "\"x\"")], 200),
        (&[("range", "bytes=0-1"), ("if-range", "Sat, 29 Oct 1994 19:43:31 GMT")], 200),
        (&[("range", "bytes=0-1"), ("if-none-match", &etag)], 304),
    ];
    for (headers, status) in conditional {
        assert_eq!(registry.send("GET", &path, headers, "").await.status, status, "{headers:?}");
    }
    let many = format!("bytes={}", vec!["0-0"; 300].join(","));
    assert_eq!(registry.send("GET", &path, &[("range", &many)], "").await.status, 400, "clients step down on it");
}

#[tokio::test]
async fn several_ranges_come_as_parts() {
    let registry = registry().await;
    let content = bytes(300_000);
    let digest = registry.push("a", content.clone()).await;
    let path = format!("/v2/a/blobs/{digest}");
    let answer = registry.send("GET", &path, &[("range", "bytes=200000-299999, 0-9,-1")], "").await;
    assert_eq!(answer.status, 206);
    let parts = [(0..10), (200_000..300_000)];
    assert_parts(&answer, &content, &parts, "application/octet-stream");
    let answer = registry.send("GET", &path, &[("range", "bytes=200000-200009,0-9")], "").await;
    assert_parts(&answer, &content, &[(200_000..200_010), (0..10)], "application/octet-stream");
}

fn assert_parts(answer: &Answer, content: &Bytes, parts: &[std::ops::Range<usize>], media_type: &str) {
    let boundary = answer.header("content-type").strip_prefix("multipart/byteranges; boundary=").unwrap();
    let mut expected = Vec::new();
    for part in parts {
        let (first, last, total) = (part.start, part.end - 1, content.len());
        let head = format!(
            "\r\n--{boundary}\r\nContent-Type: {media_type}\r\nContent-Range: bytes {first}-{last}/{total}\r\n\r\n"
        );
        expected.extend_from_slice(head.as_bytes());
        expected.extend_from_slice(&content[part.clone()]);
    }
    expected.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
    assert_eq!(answer.header("content-length"), expected.len().to_string());
    assert_eq!(answer.body, expected);
}

#[tokio::test]
async fn an_empty_blob_is_a_blob() {
    let registry = registry().await;
    let digest = registry.push("a", "").await;
    let path = format!("/v2/a/blobs/{digest}");
    for (method, headers) in [("GET", &[][..]), ("HEAD", &[]), ("GET", &[("range", "bytes=0-")])] {
        let answer = registry.send(method, &path, headers, "").await;
        assert_eq!(
            (answer.status, answer.header("content-length"), answer.body.len()),
            (200, "0", 0),
            "{method} {headers:?}"
        );
    }
}

#[tokio::test]
async fn what_is_not_here_differs_from_what_cannot_be_known() {
    let registry = registry().await;
    let lost = registry.push("a", "lost").await;
    registry.service.content().lose(lost);
    for (path, status, code) in [
        (format!("/v2/a/blobs/{NOWHERE}"), 404, "BLOB_UNKNOWN"),
        (format!("/v2/a/manifests/{NOWHERE}"), 404, "MANIFEST_UNKNOWN"),
        ("/v2/a/manifests/latest".into(), 404, "MANIFEST_UNKNOWN"),
        ("/v2/a/tags/list".into(), 404, "NAME_UNKNOWN"),
        (format!("/v2/a/blobs/{lost}"), 503, "UNAVAILABLE"),
        (format!("/v2/a/manifests/{lost}"), 503, "UNAVAILABLE"),
    ] {
        let answer = registry.get(&path).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{path}");
        let head = registry.send("HEAD", &path, &[], "").await;
        assert_eq!((head.status, head.body.len()), (status, 0), "{path}");
    }
}

#[tokio::test]
async fn a_blob_that_breaks_off_never_looks_whole() {
    let registry = registry().await;
    let digest = registry.push("a", bytes(1 << 20)).await;
    registry.service.content().break_off(digest);
    let path = format!("/v2/a/blobs/{digest}");
    for headers in [&[][..], &[("range", "bytes=1-")], &[("range", "bytes=0-99999,200000-900000")]] {
        let answer = registry.try_send("GET", &path, headers, http::empty()).await;
        assert!(answer.is_err(), "{headers:?}");
    }
}

#[tokio::test]
async fn uploads_take_chunks_in_order_only() {
    let registry = registry().await;
    let content = bytes(30);
    let digest = digest_of(Algorithm::Sha256, &content);
    let location = registry.open("lib/app").await;
    assert!(location.starts_with("/v2/lib/app/blobs/uploads/"), "{location}");

    let patch = |range: &'static str, part: std::ops::Range<usize>| {
        let (registry, location, body) = (&registry, &location, content.slice(part));
        async move { registry.send("PATCH", location, &[("content-range", range)], body).await }
    };
    for (range, part, status, code, received) in [
        ("10-19", 10..20, 416, "BLOB_UPLOAD_INVALID", "0-0"),
        ("0-9", 0..10, 202, "", "0-9"),
        ("0-9", 0..10, 416, "BLOB_UPLOAD_INVALID", "0-9"),
        ("5-14", 5..15, 416, "BLOB_UPLOAD_INVALID", "0-9"),
        ("20-29", 20..30, 416, "BLOB_UPLOAD_INVALID", "0-9"),
        ("10-18", 10..20, 400, "SIZE_INVALID", "0-9"),
        ("bytes 10-19/30", 10..20, 400, "BLOB_UPLOAD_INVALID", "0-9"),
        ("10-19", 10..20, 202, "", "0-19"),
    ] {
        let answer = patch(range, part).await;
        assert_eq!(answer.status, status, "{range}");
        if status == 202 {
            assert_eq!((answer.header("location"), answer.header("range")), (location.as_str(), received), "{range}");
        } else {
            assert_eq!(answer.code(), code, "{range}");
            if status == 416 {
                assert_eq!(
                    (answer.header("location"), answer.header("range")),
                    (location.as_str(), received),
                    "{range}"
                );
            }
        }
        let stands = registry.get(&location).await;
        assert_eq!((stands.status, stands.header("range"), stands.body.len()), (204, received, 0), "after {range}");
    }
    let close = format!("{location}?digest={digest}");
    let early = registry.send("PUT", &close, &[("content-range", "25-29")], content.slice(25..)).await;
    assert_eq!((early.status, early.header("range")), (416, "0-19"), "the closing PUT is checked as well");
    let closed = registry.send("PUT", &close, &[("content-range", "20-29")], content.slice(20..)).await;
    assert_eq!((closed.status, closed.header("docker-content-digest")), (201, digest.to_string().as_str()));
    assert_eq!(registry.get(closed.header("location")).await.body, content);
    for method in ["GET", "PATCH", "DELETE"] {
        let gone = registry.send(method, &location, &[], "").await;
        assert_eq!((gone.status, gone.code().as_str()), (404, "BLOB_UPLOAD_UNKNOWN"), "{method}");
    }
}

#[tokio::test]
async fn uploads_come_in_all_shapes() {
    let registry = registry().await;
    let content = bytes(100_000);
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        let digest = digest_of(algorithm, &content);
        let uploads = "/v2/a/blobs/uploads/";
        // A stream of unknown length, closed by an empty PUT: docker.
        let opened = registry.send("POST", &format!("{uploads}?digest-algorithm={}", algorithm.name()), &[], "").await;
        assert_eq!(opened.status, 202);
        assert!(opened.header("location").contains(opened.header("docker-upload-uuid")));
        let pieces: Vec<_> =
            content.chunks(7000).map(|piece| Ok::<_, http::BoxError>(content.slice_ref(piece))).collect();
        let streamed = registry
            .try_send("PATCH", opened.header("location"), &[], http::stream(stream::iter(pieces)))
            .await
            .unwrap();
        assert_eq!((streamed.status, streamed.header("range")), (202, "0-99999"));
        let closed = registry.send("PUT", &format!("{}?digest={digest}", streamed.header("location")), &[], "").await;
        assert_eq!(closed.status, 201);
        assert_eq!(closed.header("location"), format!("/v2/a/blobs/{digest}"));
        // All in the PUT, with whatever type: containerd, regctl, curl.
        let location = registry.open("b").await;
        let form = [("content-type", "application/x-www-form-urlencoded")];
        let closed = registry.send("PUT", &format!("{location}?digest={digest}"), &form, content.clone()).await;
        assert_eq!(closed.status, 201);
        // All in the POST.
        let posted = registry.send("POST", &format!("{uploads}?digest={digest}"), &[], content.clone()).await;
        assert_eq!((posted.status, posted.header("docker-content-digest")), (201, digest.to_string().as_str()));
        assert_eq!(registry.get(posted.header("location")).await.body, content);
    }
}

#[tokio::test]
async fn wrong_uploads_have_their_codes() {
    let registry = registry().await;
    let unknown = format!("/v2/a/blobs/uploads/{}~memory:1", uuid::Uuid::nil());
    let location = registry.open("a").await;
    let put = |query: &str| format!("{location}{query}");
    for (method, path, body, status, code) in [
        ("POST", "/v2/A/blobs/uploads/".into(), "", 400, "NAME_INVALID"),
        ("POST", "/v2/a/../b/blobs/uploads/".into(), "", 400, "NAME_INVALID"),
        ("POST", "/v2/a/blobs/uploads/?digest-algorithm=md5".into(), "", 400, "DIGEST_INVALID"),
        ("POST", "/v2/a/blobs/uploads/?digest=sha256:12".into(), "x", 400, "DIGEST_INVALID"),
        ("POST", format!("/v2/a/blobs/uploads/?digest={NOWHERE}"), "x", 400, "DIGEST_INVALID"),
        ("POST", "/v2/a/blobs/uploads/?mount=sha256:12&from=b".into(), "", 400, "DIGEST_INVALID"),
        ("POST", format!("/v2/a/blobs/uploads/?mount={NOWHERE}&from=B"), "", 400, "NAME_INVALID"),
        ("GET", "/v2/a/blobs/uploads/".into(), "", 405, "UNSUPPORTED"),
        ("PUT", put(""), "x", 400, "DIGEST_INVALID"),
        ("PUT", put("?digest=sha256:baddigeststring"), "x", 400, "DIGEST_INVALID"),
        ("PUT", put("?digest=md5:00"), "x", 400, "DIGEST_INVALID"),
        ("GET", unknown.clone(), "", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("PATCH", unknown.clone(), "x", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("PUT", format!("{unknown}?digest={NOWHERE}"), "x", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("DELETE", unknown, "", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("PATCH", "/v2/a/blobs/uploads/what".into(), "x", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("PUT", format!("{location}?digest={NOWHERE}"), "x", 400, "DIGEST_INVALID"),
    ] {
        let answer = registry.send(method, &path, &[], body).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{method} {path}");
    }
    assert_eq!(registry.get(&location).await.status, 404, "a mismatch ends the session");
    let location = registry.open("a").await;
    assert_eq!(registry.send("DELETE", &location, &[], "").await.status, 204);
    assert_eq!(registry.get(&location).await.status, 404);
    let late = [("content-range", "5-5")];
    let late = registry.send("POST", &format!("/v2/a/blobs/uploads/?digest={NOWHERE}"), &late, "x").await;
    assert_eq!(late.status, 416);
    assert_eq!(registry.service.content().uploads(), 0, "nothing is left behind");
}

#[tokio::test]
async fn blobs_are_mounted_or_uploaded() {
    let registry = registry().await;
    let digest = registry.push("a", "blob").await;
    for from in ["&from=a", ""] {
        let answer = registry.send("POST", &format!("/v2/b/blobs/uploads/?mount={digest}{from}"), &[], "").await;
        assert_eq!((answer.status, answer.header("location")), (201, format!("/v2/b/blobs/{digest}").as_str()));
        assert_eq!(answer.header("docker-content-digest"), digest.to_string());
    }
    let answer = registry.send("POST", &format!("/v2/b/blobs/uploads/?mount={NOWHERE}&from=a"), &[], "").await;
    assert_eq!(answer.status, 202);
    assert_eq!(registry.get(answer.header("location")).await.status, 204);
}

#[tokio::test]
async fn manifests_are_kept_byte_for_byte() {
    let registry = registry().await;
    let (config, layer) = (registry.push("a", "{}").await, registry.push("a", "layer").await);
    let mut body = serde_json::to_string_pretty(&image(&config, &[layer])).unwrap();
    body.push_str("\n \n");
    let digest = digest_of(Algorithm::Sha256, body.as_bytes());
    let headers = [("content-type", Kind::OciManifest.media_type())];
    let pushed = registry.send("PUT", "/v2/a/manifests/v1", &headers, body.clone()).await;
    assert_eq!((pushed.status, pushed.header("docker-content-digest")), (201, digest.to_string().as_str()));
    assert_eq!(pushed.header("location"), format!("/v2/a/manifests/{digest}"));
    for reference in ["v1", &digest.to_string()] {
        let path = format!("/v2/a/manifests/{reference}");
        // Accept is not looked at: what is stored is what is answered.
        for method in ["GET", "HEAD"] {
            let answer = registry.send(method, &path, &[("accept", "text/plain")], "").await;
            assert_eq!((answer.status, answer.header("content-type")), (200, Kind::OciManifest.media_type()), "{path}");
            assert_eq!(answer.header("content-length"), body.len().to_string());
            assert_eq!(answer.header("docker-content-digest"), digest.to_string());
            assert_eq!(answer.body, if method == "GET" { body.as_str() } else { "" });
        }
        let answer = registry.send("GET", &path, &[("range", "bytes=0-")], "").await;
        assert_eq!((answer.status, &*answer.body), (206, body.as_bytes()), "containerd asks so");
        let answer = registry.send("GET", &path, &[("range", "bytes=0-1,5-6")], "").await;
        assert_parts(&answer, &Bytes::from(body.clone()), &[(0..2), (5..7)], Kind::OciManifest.media_type());
        let etag = format!("\"{digest}\"");
        assert_eq!(registry.send("GET", &path, &[("if-none-match", &etag)], "").await.status, 304);
    }
    let layer = registry.get(&format!("/v2/a/manifests/{layer}")).await;
    assert_eq!((layer.status, layer.code().as_str()), (404, "MANIFEST_UNKNOWN"), "a layer is no manifest");
}

#[tokio::test]
async fn manifests_are_checked() {
    let registry = registry().await;
    let config = registry.push("a", "{}").await;
    let nowhere: Digest = NOWHERE.parse().unwrap();
    let good = image(&config, &[]);
    let by_digest = |digest: &str| format!("/v2/a/manifests/{digest}");
    let mut foreign = image(&config, &[nowhere]);
    foreign["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar".into();
    let mut blake = image(&config, &[]);
    blake["config"]["digest"] = "blake3:00".into();
    let mut malformed = image(&config, &[]);
    malformed["config"]["digest"] = "sha256:00".into();
    let index = json!({"schemaVersion": 2, "manifests": [descriptor(Kind::OciManifest.media_type(), &nowhere, 1)]});
    for (path, body, status, code) in [
        (by_digest("v1"), json!({"schemaVersion": 2}), 400, "MANIFEST_INVALID"),
        (by_digest("v1"), json!("text"), 400, "MANIFEST_INVALID"),
        (by_digest("v1"), image(&nowhere, &[config]), 400, "MANIFEST_BLOB_UNKNOWN"),
        (by_digest("v1"), image(&config, &[nowhere]), 400, "MANIFEST_BLOB_UNKNOWN"),
        (by_digest("v1"), index.clone(), 400, "MANIFEST_BLOB_UNKNOWN"),
        (by_digest("v1"), blake, 400, "MANIFEST_BLOB_UNKNOWN"),
        (by_digest("v1"), malformed, 400, "DIGEST_INVALID"),
        (by_digest("v1"), foreign, 201, ""),
        (by_digest(NOWHERE), good.clone(), 400, "DIGEST_INVALID"),
        (by_digest("sha256:baddigeststring"), good.clone(), 400, "DIGEST_INVALID"),
        (by_digest(".v1"), good.clone(), 400, "MANIFEST_INVALID"),
        (format!("/v2/a/manifests/{}", "x".repeat(129)), good.clone(), 400, "MANIFEST_INVALID"),
        ("/v2/A/manifests/v1".into(), good.clone(), 400, "NAME_INVALID"),
    ] {
        let answer = registry.put_manifest(&path, &body).await;
        assert_eq!(answer.status, status, "{path} {body}: {:?}", answer.body);
        if status >= 400 {
            assert_eq!(answer.code(), code, "{path} {body}");
        }
    }
    let other: Digest = NOWHERE.replace('0', "1").parse().unwrap();
    let answer = registry.put_manifest("/v2/a/manifests/v1", &image(&nowhere, &[other, nowhere, config])).await;
    let missing: Vec<Value> =
        answer.json()["errors"].as_array().unwrap().iter().map(|e| e["detail"]["digest"].clone()).collect();
    assert_eq!(missing, [NOWHERE, &other.to_string()], "each of them once");

    let typed = [("content-type", Kind::DockerManifest.media_type())];
    let answer = registry.send("PUT", "/v2/a/manifests/v1", &typed, serde_json::to_vec(&good).unwrap()).await;
    assert_eq!((answer.status, answer.code().as_str()), (400, "MANIFEST_INVALID"), "header and body disagree");

    let lenient = start(Memory::default(), Rules { sparse: true, ..Rules::default() }).await;
    for body in [index, image(&nowhere, &[other])] {
        assert_eq!(lenient.put_manifest("/v2/a/manifests/v1", &body).await.status, 201);
    }
}

#[tokio::test]
async fn manifests_have_a_longest() {
    let registry = registry().await;
    let config = registry.push("a", "{}").await;
    let mut body = serde_json::to_vec(&image(&config, &[])).unwrap();
    body.resize(manifest::LEN_MAX, b' ');
    assert_eq!(registry.send("PUT", "/v2/a/manifests/most", &[], body.clone()).await.status, 201);
    assert_eq!(registry.get("/v2/a/manifests/most").await.body.len(), manifest::LEN_MAX);
    body.push(b' ');
    let chunks = |body: &[u8]| {
        let chunks: Vec<_> =
            body.chunks(100_000).map(|chunk| Ok::<_, http::BoxError>(Bytes::copy_from_slice(chunk))).collect();
        http::stream(stream::iter(chunks))
    };
    for body in [http::full(body.clone()), chunks(&body)] {
        let answer = registry.try_send("PUT", "/v2/a/manifests/more", &[], body).await.unwrap();
        assert_eq!((answer.status, answer.code().as_str()), (413, "SIZE_INVALID"));
    }
    assert_eq!(registry.get("/v2/a/manifests/more").await.status, 404);
}

#[tokio::test]
async fn one_push_sets_several_tags() {
    let registry = registry().await;
    let config = registry.push("a", "{}").await;
    let body = image(&config, &[]);
    let digest = digest_of(Algorithm::Sha512, &serde_json::to_vec(&body).unwrap());
    let tags: Vec<String> = (0..20).map(|i| format!("t{i:02}")).collect();
    let path = format!("/v2/a/manifests/{digest}?tag={}", tags.join("&tag="));
    let answer = registry.put_manifest(&path, &body).await;
    assert_eq!(answer.status, 201);
    let set: Vec<_> = answer.headers.get_all("oci-tag").iter().map(|tag| tag.to_str().unwrap().to_owned()).collect();
    assert_eq!(set, tags);
    let answer = registry.send("HEAD", "/v2/a/manifests/t07", &[], "").await;
    assert_eq!(answer.header("docker-content-digest"), digest.to_string());
    let path = format!("/v2/a/manifests/{digest}?tag={}", vec!["t"; 65].join("&tag="));
    assert_eq!(registry.put_manifest(&path, &body).await.status, 414);
    let path = format!("/v2/a/manifests/{digest}?tag=ok&tag=.bad");
    assert_eq!(registry.put_manifest(&path, &body).await.code(), "MANIFEST_INVALID");
    assert_eq!(registry.get("/v2/a/manifests/ok").await.status, 404, "none is set unless all can be");
}

#[tokio::test]
async fn tags_are_listed_in_pages_and_deleted() {
    let registry = registry().await;
    let config = registry.push("a", "{}").await;
    for tag in ["b", "a", "c", "B"] {
        assert_eq!(
            registry.put_manifest(&format!("/v2/lib/app/manifests/{tag}"), &image(&config, &[])).await.status,
            201
        );
    }
    let list = "/v2/lib/app/tags/list";
    for (query, tags, link) in [
        ("", json!(["B", "a", "b", "c"]), ""),
        ("?n=2", json!(["B", "a"]), "</v2/lib/app/tags/list?n=2&last=a>; rel=\"next\""),
        ("?n=2&last=a", json!(["b", "c"]), ""),
        ("?last=b", json!(["c"]), ""),
        ("?n=4", json!(["B", "a", "b", "c"]), ""),
        ("?n=0", json!([]), ""),
        ("?n=1&last=c", json!([]), ""),
    ] {
        let answer = registry.get(&format!("{list}{query}")).await;
        assert_eq!(answer.json(), json!({"name": "lib/app", "tags": tags}), "{query}");
        assert_eq!(answer.header("link"), link, "{query}");
    }
    let answer = registry.get(&format!("{list}?n=x")).await;
    assert_eq!((answer.status, answer.code().as_str()), (400, "PAGINATION_NUMBER_INVALID"));

    assert_eq!(registry.send("DELETE", "/v2/lib/app/manifests/b", &[], "").await.status, 202);
    let answer = registry.send("DELETE", "/v2/lib/app/manifests/b", &[], "").await;
    assert_eq!((answer.status, answer.code().as_str()), (404, "MANIFEST_UNKNOWN"));
    assert_eq!(registry.get(list).await.json()["tags"], json!(["B", "a", "c"]));

    registry.put_manifest("/v2/x/manifests/1", &image(&config, &[])).await;
    for (query, repositories, link) in [
        ("", json!(["lib/app", "x"]), ""),
        ("?n=1", json!(["lib/app"]), "</v2/_catalog?n=1&last=lib%2Fapp>; rel=\"next\""),
        ("?n=1&last=lib%2Fapp", json!(["x"]), ""),
        ("?last=x", json!([]), ""),
    ] {
        let answer = registry.get(&format!("/v2/_catalog{query}")).await;
        assert_eq!((answer.json(), answer.header("link")), (json!({"repositories": repositories}), link), "{query}");
    }
    assert_eq!(registry.get("/v2/_catalog?n=0").await.code(), "PAGINATION_NUMBER_INVALID");
}

#[tokio::test]
async fn what_is_deleted_is_gone_from_its_repository_at_once() {
    let registry = registry().await;
    let (config, layer) = (registry.push("a", "{}").await, registry.push("a", "layer").await);
    let blob = format!("/v2/a/blobs/{layer}");
    let status = async |method: &str, path: &str| {
        let answer = registry.send(method, path, &[], "").await;
        let code = if answer.status < 400 || method == "HEAD" { String::new() } else { answer.code() };
        (answer.status, code)
    };
    let gone = |code: &str| (404, code.to_owned());
    assert_eq!(status("DELETE", &blob).await, (202, String::new()));
    for method in ["GET", "DELETE"] {
        assert_eq!(status(method, &blob).await, gone("BLOB_UNKNOWN"), "{method}");
    }
    assert_eq!(status("HEAD", &blob).await.0, 404);
    assert_eq!(status("DELETE", &format!("/v2/a/blobs/{NOWHERE}")).await, gone("BLOB_UNKNOWN"));
    assert_eq!(registry.get(&format!("/v2/b/blobs/{layer}")).await.status, 200, "of one repository");
    let refused = registry.put_manifest("/v2/a/manifests/1", &image(&config, &[layer])).await;
    assert_eq!((refused.status, refused.code().as_str()), (400, "MANIFEST_BLOB_UNKNOWN"));
    let mount = |from: &str| format!("/v2/a/blobs/uploads/?mount={layer}{from}");
    assert_eq!(status("POST", &mount("&from=a")).await.0, 202, "not there to be mounted from");
    assert_eq!(status("POST", &mount("&from=b")).await.0, 201);
    assert_eq!(status("HEAD", &blob).await.0, 200, "mounted again");
    assert_eq!(status("DELETE", &blob).await.0, 202);
    registry.push("a", "layer").await;
    assert_eq!(status("HEAD", &blob).await.0, 200, "pushed again");

    // A manifest goes with its tags, and from the list of what is about its subject.
    let mut body = image(&config, &[layer]);
    body["subject"] = descriptor(Kind::OciManifest.media_type(), &NOWHERE.parse().unwrap(), 7);
    for (repository, tag) in [("a", "1"), ("a", "2"), ("b", "1")] {
        registry.put_manifest(&format!("/v2/{repository}/manifests/{tag}"), &body).await;
    }
    registry.put_manifest("/v2/a/manifests/other", &image(&config, &[])).await;
    let digest = digest_of(Algorithm::Sha256, &serde_json::to_vec(&body).unwrap());
    let manifest = format!("/v2/a/manifests/{digest}");
    assert_eq!(status("DELETE", &manifest).await, (202, String::new()));
    for path in [&manifest, "/v2/a/manifests/1", "/v2/a/manifests/2"] {
        assert_eq!(status("GET", path).await, gone("MANIFEST_UNKNOWN"), "{path}");
        assert_eq!(status("DELETE", path).await, gone("MANIFEST_UNKNOWN"), "{path}");
    }
    assert_eq!(status("GET", &format!("/v2/a/blobs/{digest}")).await, gone("BLOB_UNKNOWN"));
    assert_eq!(registry.get("/v2/a/tags/list").await.json()["tags"], json!(["other"]));
    let referrers = async |repository: &str| {
        let answer = registry.get(&format!("/v2/{repository}/referrers/{NOWHERE}")).await;
        answer.json()["manifests"].as_array().unwrap().len()
    };
    assert_eq!((referrers("a").await, referrers("b").await), (0, 1));
    assert_eq!(registry.get("/v2/b/manifests/1").await.status, 200);
    assert_eq!(registry.put_manifest(&manifest, &body).await.status, 201);
    assert_eq!((status("HEAD", &manifest).await.0, referrers("a").await), (200, 1), "pushed again");
}

#[tokio::test]
async fn referrers_are_found_by_their_subject() {
    let registry = registry().await;
    let config = registry.push("a", "{}").await;
    let subject: Digest = NOWHERE.parse().unwrap();
    let empty = registry.get(&format!("/v2/a/referrers/{subject}")).await;
    assert_eq!((empty.status, empty.header("content-type")), (200, Kind::OciIndex.media_type()));
    assert_eq!(empty.json(), json!({"schemaVersion": 2, "mediaType": Kind::OciIndex.media_type(), "manifests": []}));

    let mut expected = Vec::new();
    for artifact_type in ["a/sbom", "a/signature", "a/sbom2"] {
        let mut body = image(&config, &[]);
        body["subject"] = descriptor(Kind::OciManifest.media_type(), &subject, 7);
        body["artifactType"] = artifact_type.into();
        body["annotations"] = json!({"by": "test"});
        let bytes = serde_json::to_vec(&body).unwrap();
        let digest = digest_of(Algorithm::Sha256, &bytes);
        let pushed = registry.put_manifest(&format!("/v2/a/manifests/{digest}"), &body).await;
        assert_eq!((pushed.status, pushed.header("oci-subject")), (201, NOWHERE), "a subject may come later");
        let mut described = descriptor(Kind::OciManifest.media_type(), &digest, bytes.len());
        described["artifactType"] = artifact_type.into();
        described["annotations"] = json!({"by": "test"});
        expected.push(described);
    }
    expected.sort_by_key(|one| one["digest"].as_str().unwrap().to_owned());
    let list = format!("/v2/a/referrers/{subject}");
    assert_eq!(registry.get(&list).await.json()["manifests"], json!(expected));
    assert_eq!(
        registry.get(&format!("/v2/b/referrers/{subject}")).await.json()["manifests"],
        json!([]),
        "of one repository"
    );

    let filtered = registry.get(&format!("{list}?artifactType=a%2Fsbom")).await;
    assert_eq!(filtered.header("oci-filters-applied"), "artifactType");
    assert_eq!(filtered.json()["manifests"].as_array().unwrap().len(), 1);

    // In pages, by the links.
    let (mut next, mut paged) = (format!("{list}?n=1"), Vec::new());
    loop {
        let answer = registry.get(&next).await;
        paged.extend(answer.json()["manifests"].as_array().unwrap().clone());
        let Some(link) = answer.header("link").strip_prefix('<') else { break };
        next = link.split('>').next().unwrap().to_owned();
    }
    assert_eq!(paged, expected);

    // What a client without the API has listed under the fallback tag counts as well, once.
    let more = descriptor(Kind::OciManifest.media_type(), &config, 2);
    let index = json!({"schemaVersion": 2, "manifests": [expected[0], more]});
    let lenient = start(Memory::default(), Rules { sparse: true, ..Rules::default() }).await;
    let tag = format!("/v2/a/manifests/{}", NOWHERE.replace(':', "-"));
    assert_eq!(lenient.put_manifest(&tag, &index).await.status, 201);
    assert_eq!(lenient.get(&list).await.json()["manifests"], json!([expected[0], more]));
    let answer = registry.get("/v2/a/referrers/sha256:bad").await;
    assert_eq!((answer.status, answer.code().as_str()), (400, "DIGEST_INVALID"));
}

#[tokio::test]
async fn a_read_only_registry_refuses_writes() {
    let registry = start(Memory::read_only(), Rules::default()).await;
    for (method, path) in [
        ("POST", "/v2/a/blobs/uploads/".to_owned()),
        ("PATCH", format!("/v2/a/blobs/uploads/{}~memory:1", uuid::Uuid::nil())),
        ("PUT", "/v2/a/manifests/v1".into()),
        ("DELETE", "/v2/a/manifests/v1".into()),
        ("DELETE", format!("/v2/a/blobs/{NOWHERE}")),
    ] {
        let answer = registry.send(method, &path, &[], "x").await;
        assert_eq!((answer.status, answer.code().as_str()), (405, "UNSUPPORTED"), "{method} {path}");
    }
}

#[tokio::test]
async fn a_client_still_sending_reads_why_it_was_refused() {
    let registry = registry().await;
    let mut socket = TcpStream::connect(registry.addr).await.unwrap();
    let len = 8 << 20;
    let head = format!("PUT /v2/a/manifests/v1 HTTP/1.1\r\nHost: x\r\nContent-Length: {len}\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(&vec![b' '; len]).await.expect("all of it is taken");
    socket.write_all(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let statuses: Vec<_> = answer.match_indices("HTTP/1.1 ").map(|(at, _)| &answer[at + 9..at + 12]).collect();
    assert_eq!(statuses, ["413", "200"], "{answer}");

    let mut socket = TcpStream::connect(registry.addr).await.unwrap();
    let head = head.replace("\r\n\r\n", "\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 413"), "nothing is asked to be sent in vain: {answer}");
}
