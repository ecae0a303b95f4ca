//! What befalls a node from its disk and from those who talk to it, on real files and sockets.

use crate::kit::{MIB, Node, PATIENCE, blob, namespace, on_both_drivers, timely, until};
use engine::handle::{DriverChoice, Error};
use peer_proto::{
    Instant, Layout, PeerId,
    conn::{Conn, Effect, Event, Need},
    pieces::PieceSet,
    wire::{HEADER_LEN, Hello, Open},
};
use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};
use tempfile::TempDir;

on_both_drivers! {
    together {
        a_blob_file_cut_short_under_a_serving_node_harms_nobody
        a_blob_file_deleted_under_a_serving_node_is_served_on
        a_peer_that_stops_reading_is_let_go
        a_peer_that_says_a_byte_at_a_time_is_let_go
        a_half_closed_connection_is_let_go
        a_full_file_system_is_an_answer_and_room_made_is_used
    }
    alone {
        what_readers_and_rogues_held_is_given_back
    }
}

/// The files of whole blobs below a node's directory.
fn data_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(data_files(&path));
        } else if path.file_name().is_some_and(|name| name == "data") {
            found.push(path);
        }
    }
    found
}

async fn a_blob_file_cut_short_under_a_serving_node_harms_nobody(driver: DriverChoice) {
    let dir = Arc::new(TempDir::new().unwrap());
    let (broken, sound) = (Node::start_in(dir.clone(), driver, |_| {}), Node::agent(driver));
    let blob = blob(24 * MIB, 11);
    let layout = broken.put(&blob).await;
    sound.put(&blob).await;
    let first = Node::agent(driver);
    first.download(&layout, &[&broken]).await;
    assert!(first.read(&layout).await == blob, "while all was well");
    let files = data_files(dir.path());
    assert_eq!(files.len(), 1);
    fs::File::options().write(true).open(&files[0]).unwrap().set_len(3 * MIB as u64 + 17).unwrap();
    // The mapping reaches beyond the file's end now: a load there would be the end of this very process.
    let second = Node::agent(driver);
    second.download(&layout, &[&broken, &sound]).await;
    assert!(second.read(&layout).await == blob);
    timely(broken.handle.probe(Duration::from_secs(10))).await.unwrap();
    // And who reads the broken copy itself is told, not given what is not there.
    let mut reader = match broken.handle.read(layout.digest(), 0..layout.length()).await {
        Ok(reader) => reader,
        Err(error) => return assert!(matches!(error, Error::NotFound(_)), "{error}"),
    };
    let mut got = 0;
    let failed = loop {
        match timely(reader.next()).await {
            Some(Ok(bytes)) => got += bytes.len(),
            Some(Err(error)) => break error,
            None => panic!("{got} bytes and no error"),
        }
    };
    assert!(matches!(failed, Error::Damaged { .. } | Error::NotFound(_)), "{failed}");
}

async fn a_blob_file_deleted_under_a_serving_node_is_served_on(driver: DriverChoice) {
    let dir = Arc::new(TempDir::new().unwrap());
    let (origin, agent) = (Node::start_in(dir.clone(), driver, |_| {}), Node::agent(driver));
    let blob = blob(12 * MIB, 12);
    let layout = origin.put(&blob).await;
    data_files(dir.path()).iter().for_each(|file| fs::remove_file(file).unwrap());
    agent.download(&layout, &[&origin]).await;
    assert!(agent.read(&layout).await == blob);
}

/// A peer of the shipped protocol that does as it is told and no more: says hello, opens the blob.
struct Rogue {
    socket: TcpStream,
    conn: Conn,
}

const NOW: Instant = Instant::from_nanos(1);

impl Rogue {
    fn dial(node: &Node) -> Self {
        let socket = TcpStream::connect(node.handle.peer_addr()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, conn: Conn::dialled(NOW, Hello::new(PeerId::new([0x66; 20])), None) }
    }

    /// Until the other side has said hello, then until it has opened the blob.
    fn open(node: &Node, layout: &Layout) -> Self {
        let mut rogue = Self::dial(node);
        while rogue.conn.peer().is_none() {
            rogue.turn();
        }
        let geometry = layout.geometry();
        let has = PieceSet::new(&geometry);
        let open = Open { digest: *layout.digest(), namespace: namespace(), geometry, has };
        let channel = rogue.conn.open(NOW, &open).unwrap();
        for piece in geometry.all() {
            while rogue.conn.request(NOW, channel, piece).is_err() {
                if rogue.conn.room() == 0 {
                    return rogue;
                }
                rogue.turn();
            }
        }
        rogue.say();
        rogue
    }

    fn say(&mut self) {
        while let Some(effect) = self.conn.poll() {
            if let Effect::Send { head, .. } = effect {
                self.socket.write_all(&head).unwrap();
                self.conn.handle(NOW, Event::Sent(head));
            }
        }
    }

    /// Says what there is to say and hears one frame.
    fn turn(&mut self) {
        self.say();
        let mut header = [0; HEADER_LEN];
        self.socket.read_exact(&mut header).unwrap();
        self.conn.handle(NOW, Event::Header(&header));
        if let Need::Body(len) = self.conn.need() {
            let mut body = vec![0; len as usize];
            self.socket.read_exact(&mut body).unwrap();
            self.conn.handle(NOW, Event::Body(&body));
        }
        self.say();
    }

    /// Whether the node has ended the connection. What it said first is read and thrown away.
    fn drain(mut self) {
        let mut sink = vec![0; MIB];
        while matches!(self.socket.read(&mut sink), Ok(n) if n > 0) {}
    }
}

async fn a_peer_that_stops_reading_is_let_go(driver: DriverChoice) {
    // The sockets' buffers may hold all that it asked for: then it is its silence that gives it away.
    let node = Node::start(driver, |config| config.peer_idle = Duration::from_secs(2));
    let agent = Node::agent(driver);
    let blob = blob(24 * MIB, 13);
    let layout = node.put(&blob).await;
    let rogue = Rogue::open(&node, &layout);
    assert_eq!(node.metric("peer_connections"), 1);
    // Others are served meanwhile.
    agent.download(&layout, &[&node]).await;
    assert!(agent.read(&layout).await == blob);
    timely(agent.handle.shutdown(Duration::ZERO)).await;
    until("the one that does not read is let go", || node.metric("peer_connections") == 0).await;
    drop(rogue);
}

async fn a_peer_that_says_a_byte_at_a_time_is_let_go(driver: DriverChoice) {
    let node = Node::agent(driver);
    let mut slow = TcpStream::connect(node.handle.peer_addr()).unwrap();
    let mut hello = Vec::new();
    Hello::new(PeerId::new([0x67; 20])).encode(&mut hello);
    let mut pace = tokio::time::interval(Duration::from_millis(500));
    let mut said = 0;
    for byte in hello {
        pace.tick().await;
        if slow.write_all(&[byte]).is_err() {
            break;
        }
        said += 1;
    }
    assert!(said < 40, "{said} bytes were waited for, one at a time");
    timely(node.handle.probe(Duration::from_secs(10))).await.unwrap();
}

async fn a_half_closed_connection_is_let_go(driver: DriverChoice) {
    let node = Node::agent(driver);
    let layout = node.put(&blob(4 * MIB, 14)).await;
    let early = Rogue::dial(&node);
    early.socket.shutdown(Shutdown::Write).unwrap();
    let late = Rogue::open(&node, &layout);
    late.socket.shutdown(Shutdown::Write).unwrap();
    timely(tokio::task::spawn_blocking(|| {
        early.drain();
        late.drain();
    }))
    .await
    .unwrap();
    until("nobody is connected", || node.metric("peer_connections") == 0).await;
}

/// A file system of its own, where this user may mount one.
struct Mounted(TempDir);

impl Mounted {
    fn tmpfs(mib: usize) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let size = format!("size={mib}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(dir.path()).output();
        mounted.is_ok_and(|out| out.status.success()).then_some(Self(dir))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the engine's threads may still be letting go of their files.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

async fn a_full_file_system_is_an_answer_and_room_made_is_used(driver: DriverChoice) {
    let Some(small) = Mounted::tmpfs(16) else {
        return eprintln!("left out: this user may not mount a file system");
    };
    let origin = Node::agent(driver);
    let node = Node::start(driver, |config| config.data_dir = small.0.path().to_owned());
    let (fits, too_long) = (blob(9 * MIB, 15), blob(20 * MIB, 16));
    let (fits_layout, long_layout) = (origin.put(&fits).await, origin.put(&too_long).await);
    let class = engine::handle::Class::Foreground;
    let refused = timely(node.handle.download(namespace(), long_layout.clone(), class)).await;
    assert!(matches!(refused, Err(Error::NoSpace(_))), "{refused:?}");
    node.download(&fits_layout, &[&origin]).await;
    assert!(node.read(&fits_layout).await == fits);
    timely(node.handle.wait(fits_layout.digest())).await.unwrap();
    // Somebody else fills what is left, and the node makes room for another by what it can spare.
    fs::write(small.0.path().join("somebody-else"), vec![0; 5 * MIB]).unwrap();
    let next = blob(8 * MIB, 17);
    let layout = origin.put(&next).await;
    node.download(&layout, &[&origin]).await;
    assert!(node.read(&layout).await == next);
    timely(node.handle.shutdown(Duration::from_secs(1))).await;
}

/// Descriptors and mappings of this process.
fn held() -> (usize, usize) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let blobs = maps.lines().filter(|line| line.ends_with("/data") || line.ends_with("/data (deleted)")).count();
    (fs::read_dir("/proc/self/fd").unwrap().count(), blobs)
}

async fn what_readers_and_rogues_held_is_given_back(driver: DriverChoice) {
    let node = Node::agent(driver);
    let before = held();
    let blob = blob(20 * MIB, 18);
    let layout = node.put(&blob).await;
    let agents = [Node::agent(driver), Node::agent(driver)];
    let rogue = Rogue::open(&node, &layout);
    for agent in &agents {
        agent.download(&layout, &[&node]).await;
        assert!(agent.read(&layout).await == blob);
    }
    for agent in agents {
        timely(agent.handle.shutdown(Duration::ZERO)).await;
    }
    drop(rogue);
    until("nobody is connected", || node.metric("peer_connections") == 0).await;
    assert!(timely(node.handle.evict(layout.digest())).await.unwrap());
    until("descriptors and mappings are back at their level", || held() <= before).await;
}
