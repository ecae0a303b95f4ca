//! What every store must do. Each check works under a prefix of its own and removes what it wrote, so that the suite can run
//! against a shared, real store.

use crate::{Backend, Content, Error, List, Page};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, future::join_all, stream};
use std::{io, sync::Arc};

/// Bytes of the large object: several parts of any store, and not a multiple of anything.
const LARGE_LEN: usize = (3 << 20) + 4321;

/// Every check. Panics with what is wrong.
pub async fn all(store: Arc<dyn Backend>) {
    streams(&*store).await;
    broken_writes_leave_nothing(&*store).await;
    assert_absent("delete", store.delete("conformance/absent").await);
    assert_absent("delete of a directory's name", store.delete("conformance").await);
    replayable(store).await;
}

/// The checks that also hold where a wrapper repeats calls: a stream cannot be repeated, and a repeated removal finds nothing.
pub async fn replayable(store: Arc<dyn Backend>) {
    objects(&*store).await;
    ranges(&*store).await;
    names(&*store).await;
    listing(&*store).await;
    replacement_is_atomic(store).await;
}

/// Bytes that tell where they are from: no part of them repeats within a power of two.
fn pattern(len: usize, salt: u8) -> Bytes {
    const PERIOD: usize = 4099;
    let mut byte = salt;
    let mut next = || {
        byte = byte.wrapping_mul(167).wrapping_add(13);
        byte
    };
    let period: Vec<u8> = (0..PERIOD).map(|i| next() ^ i.to_le_bytes()[1]).collect();
    let mut bytes = Vec::with_capacity(len + PERIOD);
    while bytes.len() < len {
        bytes.extend_from_slice(&period);
    }
    bytes.truncate(len);
    bytes.into()
}

async fn read(store: &dyn Backend, name: &str) -> Bytes {
    let object = store.read(name, None).await.expect("read");
    assert_eq!(object.range, 0..object.size);
    object.collect(64 << 20).await.expect("collect")
}

async fn put(store: &dyn Backend, name: &str, content: impl Into<Content>) {
    store.write(name, content.into()).await.unwrap_or_else(|error| panic!("write {name}: {error}"));
}

async fn remove(store: &dyn Backend, name: &str) {
    store.delete(name).await.unwrap_or_else(|error| panic!("delete {name}: {error}"));
}

fn assert_absent<T>(what: &str, answer: Result<T, Error>) {
    match answer {
        Err(Error::NotFound) => {}
        Err(error) => panic!("{what}: {error} instead of not found"),
        Ok(_) => panic!("{what}: there"),
    }
}

/// An object is written, seen, replaced and removed.
async fn objects(store: &dyn Backend) {
    let name = "conformance/objects/a";
    assert_absent("stat before", store.stat(name).await);
    assert_absent("read before", store.read(name, None).await);
    put(store, name, "first").await;
    assert_eq!(store.stat(name).await.expect("stat"), 5);
    assert_eq!(read(store, name).await, "first");
    put(store, name, "the second").await;
    assert_eq!(store.stat(name).await.expect("stat"), 10);
    assert_eq!(read(store, name).await, "the second");
    put(store, name, "").await;
    assert_eq!(store.stat(name).await.expect("stat"), 0);
    assert_eq!(read(store, name).await, "");
    assert_absent("a directory", store.stat("conformance/objects").await);
    assert_absent("a directory", store.read("conformance/objects", None).await);
    assert_absent("below an object", store.stat("conformance/objects/a/b").await);
    remove(store, name).await;
    assert_absent("stat after", store.stat(name).await);
}

/// Ranges are cut as the trait says.
async fn ranges(store: &dyn Backend) {
    let name = "conformance/ranges";
    let whole = pattern(LARGE_LEN, 1);
    put(store, name, whole.clone()).await;
    let size = LARGE_LEN as u64;
    for (start, end) in [
        (0, size),
        (0, 1),
        (size - 1, size),
        (1, size + 100),
        (4321, (2 << 20) + 1),
        (size, size),
        (size, size + 1),
        (7, 7),
        (5, u64::MAX),
    ] {
        let object = store.read(name, Some(start..end)).await.unwrap_or_else(|e| panic!("{start}..{end}: {e}"));
        let range = start..end.min(size);
        assert_eq!((object.size, &object.range), (size, &range));
        let at = |offset: u64| usize::try_from(offset).expect("small");
        assert!(
            object.collect(LARGE_LEN).await.expect("collect") == whole[at(range.start)..at(range.end)],
            "{range:?}"
        );
    }
    #[expect(clippy::reversed_empty_ranges, reason = "what a careless caller may pass")]
    for wrong in [size + 1..size + 2, 5..4] {
        let answer = store.read(name, Some(wrong.clone())).await;
        assert!(matches!(answer, Err(Error::Range { .. })), "{wrong:?}: {answer:?}");
    }
    let long = store.read(name, None).await.expect("read").collect(100).await;
    assert!(matches!(long, Err(Error::Invalid(_))));
    remove(store, name).await;
}

/// Streams of known and unknown length, in parts of all sizes, arrive whole.
async fn streams(store: &dyn Backend) {
    let name = "conformance/streams";
    let whole = pattern(LARGE_LEN, 2);
    for (part_len, size) in [(LARGE_LEN, None), (1 << 20, Some(LARGE_LEN as u64)), (777_777, None), (4096, None)] {
        let (whole, mut at) = (whole.clone(), 0);
        let parts = std::iter::from_fn(move || {
            let part = whole.slice(at..whole.len().min(at + part_len));
            at += part.len();
            (!part.is_empty()).then_some(Ok::<_, io::Error>(part))
        });
        put(store, name, Content::stream(size, stream::iter(parts))).await;
        assert_eq!(store.stat(name).await.expect("stat"), LARGE_LEN as u64);
    }
    assert!(read(store, name).await == whole, "{LARGE_LEN} bytes differ");
    put(store, name, Content::stream(None, stream::empty::<io::Result<Bytes>>())).await;
    assert_eq!(store.stat(name).await.expect("stat"), 0);
    remove(store, name).await;
}

/// A stream that fails, ends early or goes on too long changes nothing.
async fn broken_writes_leave_nothing(store: &dyn Backend) {
    let name = "conformance/broken";
    let parts = |n: usize| stream::iter((0..n).map(|_| Ok::<_, io::Error>(pattern(1 << 20, 3))));
    let failing = || parts(2).chain(stream::once(async { Err(io::Error::other("the source failed")) }));
    for before in [None, Some("kept")] {
        if let Some(before) = before {
            put(store, name, before).await;
        }
        for content in [
            Content::stream(None, failing()),
            Content::stream(Some(5 << 20), failing()),
            Content::stream(Some(5 << 20), parts(2)),
            Content::stream(Some(1 << 20), parts(2)),
            Content::stream(Some(5), parts(0)),
        ] {
            let answer = store.write(name, content).await;
            assert!(matches!(answer, Err(Error::Source(_) | Error::Invalid(_))), "{answer:?}");
        }
        match before {
            None => assert_absent("after broken writes", store.stat(name).await),
            Some(before) => assert_eq!(read(store, name).await, before),
        }
    }
    remove(store, name).await;
}

/// Names that could leave the tree are refused, odd ones work.
async fn names(store: &dyn Backend) {
    for bad in ["", "/", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "a/./b", "a\0b", "a\nb"] {
        for answer in [
            store.stat(bad).await.map(drop),
            store.read(bad, None).await.map(drop),
            store.write(bad, "x".into()).await,
            store.delete(bad).await,
        ] {
            assert!(matches!(answer, Err(Error::Invalid(_))), "{bad:?}: {answer:?}");
        }
    }
    for odd in
        ["conformance/names/ä ö%2F+&?#", "conformance/names/..a", "conformance/names/a:b@c", "conformance/.names"]
    {
        put(store, odd, odd).await;
        assert_eq!(read(store, odd).await, odd);
        remove(store, odd).await;
    }
}

/// Listings are complete, in byte order of whole names, and go on after any name.
async fn listing(store: &dyn Backend) {
    let base = "conformance/listing/";
    // In byte order '-' and '.' come before '/', letters after it: a walk of directories must not sort by component.
    let ends = ["a-b/x", "a.b", "a/b", "a/c/d", "a/c/e", "a0", "b/x", "b/y", "c"];
    let names: Vec<String> = ends.iter().map(|end| format!("{base}{end}")).collect();
    let empty = store.list(List { prefix: base, ..List::default() }).await.expect("list");
    assert_eq!(empty, Page::default(), "left from an earlier run");
    join_all(names.iter().map(|name| put(store, name, "x"))).await;
    for limit in [0, 1, 2, 3, 9, 10, 5000] {
        assert_eq!(collect(store, base, limit).await, names, "limit {limit}");
    }
    for prefix in ["a", "a/", "a/c", "a/c/", "b", "b/x", "c", "d", "a/c/d/"] {
        let prefix = format!("{base}{prefix}");
        let wanted: Vec<_> = names.iter().filter(|name| name.starts_with(&prefix)).cloned().collect();
        assert_eq!(collect(store, &prefix, 2).await, wanted, "{prefix}");
    }
    for after in ["a", "a-", "a/", "a/b", "a/bb", "a/c/zzz", "b", "c", "d", "a/\u{10ffff}"] {
        let after = format!("{base}{after}");
        let page = store.list(List { prefix: base, after: Some(&after), limit: 0 }).await.expect("list");
        let wanted: Vec<_> = names.iter().filter(|name| **name > after).cloned().collect();
        assert_eq!((page.names, page.more), (wanted, false), "{after}");
    }
    let before = store.list(List { prefix: base, after: Some("conformance/"), limit: 0 }).await.expect("list");
    assert_eq!(before.names, names);
    for bad in ["../", "/", "a/../b"] {
        let answer = store.list(List { prefix: bad, ..List::default() }).await;
        assert!(matches!(answer, Err(Error::Invalid(_))), "{bad}: {answer:?}");
    }
    for name in &names {
        remove(store, name).await;
    }
    assert_eq!(collect(store, base, 0).await, Vec::<String>::new());
}

async fn collect(store: &dyn Backend, prefix: &str, limit: usize) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    loop {
        let page = store.list(List { prefix, after: all.last().map(String::as_str), limit }).await.expect("list");
        assert!(limit == 0 || page.names.len() <= limit);
        assert!(!page.names.is_empty() || !page.more, "an empty page that is not the last");
        all.extend(page.names);
        if !page.more {
            return all;
        }
    }
}

/// While writers replace an object, every reader sees one of the versions, whole.
async fn replacement_is_atomic(store: Arc<dyn Backend>) {
    let name = "conformance/atomic";
    let version = |i: u8| pattern(100_000 + usize::from(i), i);
    put(&*store, name, version(0)).await;
    let writers = (0..4u8).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for i in 0..5 {
                put(&*store, name, version(writer * 5 + i)).await;
            }
        })
    });
    let readers = (0..4).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..20 {
                let object = store.read(name, None).await.expect("read");
                let parts: Result<Vec<Bytes>, Error> = object.bytes.try_collect().await;
                // A read that a store or a wrapper cannot finish from the version it began is an error, not a mixture.
                let Ok(parts) = parts else { continue };
                let seen = parts.concat();
                let i = u8::try_from(seen.len() - 100_000).expect("a version's length");
                assert!(seen == version(i), "a mixture of versions");
            }
        })
    });
    let tasks: Vec<_> = writers.chain(readers).collect();
    for task in tasks {
        task.await.expect("writers and readers do not fail");
    }
    remove(&*store, name).await;
}
