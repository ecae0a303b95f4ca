//! Blobs between nodes.

use crate::kit::{MIB, Node, blob, namespace, on_both_drivers, timely, until};
use engine::handle::{Active, Class, DriverChoice, Error, MetricValue, SendPath, Stat};
use std::time::Duration;

on_both_drivers! {
    together {
        a_blob_goes_from_an_origin_to_an_agent
        a_blob_goes_by_every_way_of_sending
        an_image_of_sixty_layers_takes_one_connection_per_peer_and_shard
        a_stopped_download_is_gone_and_its_readers_know
        a_range_of_a_cold_blob_takes_one_piece_and_a_second_is_read_beside_it
        pieces_that_come_by_another_way_are_proven_and_go_to_readers
        notices_tell_of_a_download_from_its_start_to_its_end
    }
    alone {}
}

async fn a_blob_goes_from_an_origin_to_an_agent(driver: DriverChoice) {
    let (origin, agent) = (Node::origin(driver), Node::agent(driver));
    let blob = blob(64 * MIB + 12_345, 1);
    let layout = origin.put(&blob).await;
    agent.download(&layout, &[&origin]).await;
    let read = agent.read(&layout).await;
    assert!(read == blob, "the reader saw other bytes");
    timely(agent.handle.wait(layout.digest())).await.unwrap();
    assert!(matches!(agent.handle.stat(layout.digest()).await.unwrap(), Stat::Whole { .. }));
    assert!(agent.read(&layout).await == blob, "the store has other bytes");
    until("the origin has closed its books", || origin.metric("peer_connections") > 0).await;
    let sent = origin.metric("peer_sent_bytes_total") as u64;
    assert!(sent < layout.length() + layout.length() / 100, "{sent} bytes sent");
}

/// Hot from the file's pages or its mapping, and read into buffers where nothing is mapped: past the page cache at first.
async fn a_blob_goes_by_every_way_of_sending(driver: DriverChoice) {
    let blob = blob(5 * MIB + 12_345, 5);
    for (mmap, send) in [(true, SendPath::Sendfile), (true, SendPath::Mapped), (false, SendPath::Sendfile)] {
        let origin = Node::start(driver, |config| (config.origin, config.mmap, config.send) = (true, mmap, send));
        let layout = origin.put(&blob).await;
        for agent in [Node::agent(driver), Node::agent(driver)] {
            agent.download(&layout, &[&origin]).await;
            assert!(agent.read(&layout).await == blob, "mapped {mmap}, {send:?}");
        }
        let cold = origin.handle.metrics().into_iter().find(|metric| metric.label == Some(("from", "disk"))).unwrap();
        let none = matches!(cold.value, MetricValue::Counter(0));
        assert_eq!(none, mmap, "{cold:?}");
    }
}

async fn an_image_of_sixty_layers_takes_one_connection_per_peer_and_shard(driver: DriverChoice) {
    let (origin, seeder, agent) = (Node::origin(driver), Node::agent(driver), Node::agent(driver));
    let mut layers = Vec::new();
    for n in 0..60 {
        let blob = blob(150_000 + n, 100 + n as u64);
        layers.push(origin.put(&blob).await);
        seeder.put(&blob).await;
    }
    for layout in &layers {
        agent.download(layout, &[&origin, &seeder]).await;
    }
    for layout in &layers {
        timely(agent.handle.wait(layout.digest())).await.unwrap();
    }
    let shards = 2;
    assert!(agent.metric("peer_dials_total") <= 2 * shards, "{} dials to two peers", agent.metric("peer_dials_total"));
    for node in [&origin, &seeder] {
        assert!(node.metric("peer_accepts_total") <= shards, "{} connections", node.metric("peer_accepts_total"));
    }
}

async fn a_stopped_download_is_gone_and_its_readers_know(driver: DriverChoice) {
    let (origin, agent) = (Node::origin(driver), Node::agent(driver));
    let layout = origin.put(&blob(3 * MIB, 4)).await;
    agent.handle.download(namespace(), layout.clone(), Class::Foreground).await.unwrap();
    assert!(matches!(agent.handle.stat(layout.digest()).await.unwrap(), Stat::Partial { have: 0, .. }));
    let mut reader = agent.handle.read(layout.digest(), 5..10).await.unwrap();
    let mut hasty = agent.handle.read(layout.digest(), 5..10).await.unwrap();
    hasty.patience(Duration::from_millis(20));
    assert!(matches!(timely(hasty.next()).await, Some(Err(Error::Stalled { .. }))));
    let waiting = tokio::spawn(async move { reader.next().await });
    let handle = agent.handle.clone();
    let digest = *layout.digest();
    let end = tokio::spawn(async move { handle.wait(&digest).await });
    tokio::task::yield_now().await;
    agent.handle.stop(layout.digest()).await.unwrap();
    assert!(matches!(timely(waiting).await.unwrap(), Some(Err(Error::Stopped(_) | Error::NotFound(_)))));
    assert!(matches!(timely(end).await.unwrap(), Err(Error::Stopped(_) | Error::NotFound(_))));
    assert!(matches!(agent.handle.stat(layout.digest()).await.unwrap(), Stat::Absent));
    assert!(matches!(agent.handle.read(layout.digest(), 0..1).await, Err(Error::NotFound(_))));
}

async fn a_range_of_a_cold_blob_takes_one_piece_and_a_second_is_read_beside_it(driver: DriverChoice) {
    let (origin, agent) = (Node::origin(driver), Node::agent(driver));
    let blob = blob(40 * MIB + 5, 6);
    let layout = origin.put(&blob).await;
    let digest = *layout.digest();
    let open = async |range: std::ops::Range<u64>| {
        let reader = agent.handle.open(namespace(), layout.clone(), range).await;
        agent.handle.peers(&digest, vec![origin.peer()]);
        reader
    };
    let have = async || match agent.handle.stat(&digest).await.unwrap() {
        Stat::Partial { have, .. } => have / MIB as u64,
        stat => panic!("{stat:?}"),
    };
    let (mut first, mut second) = (open(5_000_000..5_001_000).await.unwrap(), open(0..10).await.unwrap());
    let (first, second) = tokio::join!(timely(first.next()), timely(second.next()));
    assert_eq!(first.unwrap().unwrap(), blob.slice(5_000_000..5_001_000));
    assert_eq!(second.unwrap().unwrap(), blob.slice(..10));
    assert_eq!(have().await, 2);
    // What is here is read without a download.
    let mut again = open(5_000_100..5_000_200).await.unwrap();
    assert_eq!(timely(again.next()).await.unwrap().unwrap(), blob.slice(5_000_100..5_000_200));
    assert!(matches!(open(0..layout.length() + 1).await, Err(Error::Range(_))));
    // Several parts of the blob are a wish for all of it.
    let mut half = open(20 << 20..layout.length()).await.unwrap();
    while let Some(bytes) = timely(half.next()).await {
        bytes.unwrap();
    }
    timely(agent.handle.wait(&digest)).await.unwrap();
    assert!(agent.read(&layout).await == blob);
}

async fn pieces_that_come_by_another_way_are_proven_and_go_to_readers(driver: DriverChoice) {
    let (origin, agent) = (Node::origin(driver), Node::agent(driver));
    let blob = blob(3 * MIB + 5, 7);
    let layout = origin.put(&blob).await;
    let digest = *layout.digest();
    let mut reader = agent.handle.open(namespace(), layout.clone(), 0..layout.length()).await.unwrap();
    let piece = |n: u32| layout.geometry().piece(n).unwrap();
    let bytes = |n: u32| {
        let range = layout.geometry().range(piece(n));
        blob.slice(range.start as usize..range.end as usize)
    };
    for (n, wrong) in [(0, bytes(1)), (1, bytes(1).slice(1..)), (3, bytes(0))] {
        let refused = agent.handle.supply(&digest, piece(n), wrong).await;
        assert!(matches!(refused, Err(Error::WrongPiece { .. })), "{refused:?}");
    }
    let mut read = Vec::new();
    for n in [2, 0, 1, 3] {
        assert!(agent.handle.supply(&digest, piece(n), bytes(n)).await.unwrap());
        assert!(!agent.handle.supply(&digest, piece(n), bytes(n)).await.unwrap(), "again");
    }
    while let Some(part) = timely(reader.next()).await {
        read.extend_from_slice(&part.unwrap());
    }
    assert!(read == blob);
    timely(agent.handle.wait(&digest)).await.unwrap();
    assert!(!agent.handle.supply(&digest, piece(0), bytes(0)).await.unwrap(), "it is whole");
}

async fn notices_tell_of_a_download_from_its_start_to_its_end(driver: DriverChoice) {
    let (origin, agent) = (Node::origin(driver), Node::agent(driver));
    let layout = origin.put(&blob(2 * MIB, 5)).await;
    agent.handle.download(namespace(), layout.clone(), Class::Background).await.unwrap();
    let first = timely(agent.handle.notice()).await.unwrap();
    assert_eq!((first.digest, first.have, first.pieces), (*layout.digest(), 0, 2));
    assert!(matches!(first.state, Active::Leeching { want } if want > 0), "{first:?}");
    agent.handle.peers(layout.digest(), vec![origin.peer()]);
    loop {
        let notice = timely(agent.handle.notice()).await.unwrap();
        if notice.state == Active::Seeding {
            assert_eq!((notice.have, notice.namespace), (2, namespace()));
            break;
        }
    }
    assert!(agent.handle.evict(layout.digest()).await.unwrap());
    assert_eq!(timely(agent.handle.notice()).await.unwrap().state, Active::Gone);
}
