//! Blobs between nodes.

use crate::kit::{MIB, Node, blob, on_both_drivers, timely, until};
use engine::handle::{DriverChoice, Stat};

on_both_drivers! { a_blob_goes_from_an_origin_to_an_agent }

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
