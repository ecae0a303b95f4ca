//! Many connections, and bad ones.

use crate::kit::{MIB, Node, blob, on_both_drivers, timely, until};
use engine::handle::DriverChoice;
use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

on_both_drivers! {
    together {
        rogues_on_the_socket_do_no_harm
    }
    alone {
        ten_thousand_connections_opened_and_dropped_leave_nothing_behind
        stopping_ends_every_thread_and_connection
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

async fn ten_thousand_connections_opened_and_dropped_leave_nothing_behind(driver: DriverChoice) {
    let node = Node::agent(driver);
    let addr = node.handle.peer_addr();
    let before = descriptors();
    for _ in 0..200 {
        let some: Vec<TcpStream> = (0..50).map(|_| TcpStream::connect(addr).unwrap()).collect();
        drop(some);
    }
    until("every connection was accepted", || node.metric("peer_accepts_total") == 10_000).await;
    until("descriptors are back at their level", || descriptors() <= before).await;
    assert_eq!(node.metric("peer_connections"), 0);
    timely(node.handle.probe(Duration::from_secs(10))).await.unwrap();
}

async fn rogues_on_the_socket_do_no_harm(driver: DriverChoice) {
    let (origin, agent) = (Node::origin(driver), Node::agent(driver));
    let mut rogues: Vec<TcpStream> = [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xa5; 4096], &[]]
        .into_iter()
        .map(|bytes| {
            let mut rogue = TcpStream::connect(origin.handle.peer_addr()).unwrap();
            rogue.write_all(bytes).unwrap();
            rogue
        })
        .collect();
    let blob = blob(5 * MIB + 1, 2);
    let layout = origin.put(&blob).await;
    agent.download(&layout, &[&origin]).await;
    assert!(agent.read(&layout).await == blob);
    // The ones that spoke are told off and shown the door; the silent one is, too, when its time is up.
    for rogue in &mut rogues {
        rogue.set_read_timeout(Some(crate::kit::PATIENCE)).unwrap();
        let mut heard = Vec::new();
        // A reset is an end as well.
        let _ = rogue.read_to_end(&mut heard);
        assert!(heard.len() < 200, "{} bytes for a rogue", heard.len());
    }
}

async fn stopping_ends_every_thread_and_connection(driver: DriverChoice) {
    let before = descriptors();
    let (origin, agent) = (Node::origin(driver), Node::agent(driver));
    let blob = blob(3 * MIB, 3);
    let layout = origin.put(&blob).await;
    agent.download(&layout, &[&origin]).await;
    timely(agent.handle.wait(layout.digest())).await.unwrap();
    let open = TcpStream::connect(origin.handle.peer_addr()).unwrap();
    for node in [&origin, &agent] {
        timely(node.handle.shutdown(Duration::from_secs(1))).await;
        assert!(node.handle.wait(layout.digest()).await.is_err() || node.origin, "a stopped engine answers");
    }
    assert!(
        timely(async {
            while origin.handle.notice().await.is_some() {}
            true
        })
        .await
    );
    drop((origin, agent, open));
    until("descriptors are back at their level", || descriptors() <= before).await;
}
