//! What befalls nodes, and what must hold all the same. Each runs for several seeds and names the one that failed.

use super::{MIB, Made, World, layout_of};
use crate::{
    disk::sim::Fault,
    handle::{Class, Error, Limits},
};
use bytes::Bytes;
use peer_proto::{
    Digest, Layout, PeerId,
    wire::{HEADER_LEN, Hello},
};
use std::{num::NonZeroU64, sync::Arc, time::Duration};

const SECOND: Duration = Duration::from_secs(1);
/// Virtual time in which everything that ends at all has ended.
const LONG: Duration = Duration::from_secs(120);

/// Seeds of a test; `SHOAL_SEEDS=from..to` runs others.
fn seeds(count: u64) -> std::ops::Range<u64> {
    let given = std::env::var("SHOAL_SEEDS").ok();
    let given = given.as_deref().and_then(|text| text.split_once(".."));
    given.and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?)).unwrap_or(0..count)
}

/// Runs a test for each seed, and says which one it is that fails.
fn with_seeds(count: u64, test: impl Fn(u64)) {
    struct Named(u64);
    impl Drop for Named {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("failed with SHOAL_SEEDS={}..{}", self.0, self.0 + 1);
            }
        }
    }
    for seed in seeds(count) {
        let _named = Named(seed);
        test(seed);
    }
}

fn blob(pieces: usize, rest: usize, seed: u64) -> Bytes {
    (0..pieces * MIB / 8 + rest / 8).flat_map(|n| ((n as u64) << 20 ^ seed).to_le_bytes()).collect()
}

impl World {
    fn sent_by(&self, node: usize) -> u64 {
        self.nodes[node].stats.iter().map(|stats| stats.bytes_out.value()).sum()
    }

    fn received_by(&self, node: usize) -> u64 {
        self.nodes[node].stats.iter().map(|stats| stats.bytes_in.value()).sum()
    }

    fn count(&self, node: usize, of: impl Fn(&crate::shard::stats::Stats) -> u64) -> u64 {
        self.nodes[node].stats.iter().map(|stats| of(stats)).sum()
    }

    /// Downloads under way.
    fn downloads(&self, node: usize) -> i64 {
        self.nodes[node].stats.iter().map(|stats| stats.downloads.value()).sum()
    }

    /// The node has the blob, durable under its name, byte for byte.
    fn assert_whole(&self, node: usize, layout: &Layout, blob: &Bytes) {
        let store = self.nodes[node].store.clone().unwrap();
        let here = store.blob(layout.digest()).unwrap().expect("blob is not here");
        assert!(here.is_whole());
        for piece in layout.geometry().all() {
            let range = layout.geometry().range(piece);
            let bytes = store.read_or_allocate(&here, range.clone()).unwrap();
            assert!(bytes == blob[range.start as usize..range.end as usize], "piece {piece} of node {node} is wrong");
        }
    }

    fn have(&self, node: usize, digest: &Digest) -> u32 {
        let store = self.nodes[node].store.as_ref();
        store.and_then(|store| store.opened(digest)).map_or(0, |blob| blob.pieces().count())
    }
}

fn agent() -> Made {
    Made::default()
}

fn origin() -> Made {
    Made { origin: true, ..Made::default() }
}

#[test]
fn three_agents_get_a_blob_that_leaves_the_origin_about_once() {
    with_seeds(3, |seed| {
        let mut world = World::new(seed);
        let all: Vec<usize> = vec![world.node(origin()), world.node(agent()), world.node(agent()), world.node(agent())];
        let blob = blob(128, 12_344, seed);
        let layout = world.put(0, &blob);
        let mut ends: Vec<_> = (1..4).map(|node| world.download(node, &layout, &all)).collect();
        for end in &mut ends {
            world.answer(end, LONG).expect("no end in sight").unwrap();
        }
        (1..4).for_each(|node| world.assert_whole(node, &layout, &blob));
        let copies = world.sent_by(0) as f64 / blob.len() as f64;
        assert!(copies <= 1.2, "{copies} copies left the origin");
    });
}

#[test]
fn nodes_of_any_number_of_shards_serve_each_other() {
    with_seeds(6, |seed| {
        let mut world = World::new(seed);
        for shards in [1, 3, 2, 4] {
            world.node(Made { shards, ..agent() });
        }
        let (first, second) = (blob(3, 800, seed), blob(5, 0, seed + 1));
        let (one, two) = (world.put(0, &first), world.put(3, &second));
        let mut ends = vec![
            world.download(1, &one, &[0, 2, 3]),
            world.download(2, &one, &[1]),
            world.download(3, &one, &[2]),
            world.download(0, &two, &[1]),
            world.download(1, &two, &[2]),
            world.download(2, &two, &[3]),
        ];
        for end in &mut ends {
            world.answer(end, LONG).expect("no end in sight").unwrap();
        }
        [1, 2, 3].into_iter().for_each(|node| world.assert_whole(node, &one, &first));
        [0, 1, 2].into_iter().for_each(|node| world.assert_whole(node, &two, &second));
    });
}

#[test]
fn a_reader_has_its_bytes_before_the_blob_is_whole_and_a_range_before_the_rest() {
    with_seeds(3, |seed| {
        let mut world = World::new(seed);
        world.net.bytes_per_s = 10 * MIB as u64;
        world.node(origin());
        world.node(agent());
        let blob = blob(40, 5_000, seed);
        let layout = world.put(0, &blob);
        let mut end = world.download(1, &layout, &[0]);
        world.run_for(SECOND / 2);
        let range = 30 * MIB as u64 + 17..31 * MIB as u64 + 3;
        let read = world.read(1, &layout, range.clone(), LONG).unwrap();
        assert!(read == blob[range.start as usize..range.end as usize]);
        let have = world.have(1, layout.digest());
        assert!(have < 30, "{have} pieces came before the range");
        let whole = world.read(1, &layout, 0..layout.length(), LONG).unwrap();
        assert!(whole == blob);
        world.answer(&mut end, LONG).expect("no end in sight").unwrap();
    });
}

#[test]
fn ranges_of_a_cold_blob_cost_their_pieces_and_leave_nothing_running() {
    with_seeds(2, |seed| {
        let mut world = World::new(seed);
        world.node(origin());
        world.node(agent());
        let blob = blob(40, 5_000, seed);
        let layout = world.put(0, &blob);
        let digest = *layout.digest();
        let length = layout.length();
        world.download_ranges(1, &layout, &[0]);
        let mut have = 0;
        // In one piece; over an edge; at the end.
        for (range, pieces) in
            [(30 << 20..(30 << 20) + 1024, 1), ((10 << 20) - 5..(10 << 20) + 5, 2), (length - 9..length, 1)]
        {
            let read = world.read(1, &layout, range.clone(), LONG).unwrap();
            assert!(read == blob[range.start as usize..range.end as usize]);
            have += pieces;
            assert_eq!(world.have(1, &digest), have);
        }
        let received = world.received_by(1);
        world.run_for(LONG);
        assert_eq!(world.have(1, &digest), have, "nobody wants more");
        let since = world.received_by(1) - received;
        assert!(since < 4096, "{since} bytes came, and not only pings");
        assert_eq!(world.downloads(1), 0, "the download has ended");
        let store = world.nodes[1].store.clone().unwrap();
        let held = store.opened(&digest).map(|blob| Arc::strong_count(&blob));
        assert_eq!(held, Some(2), "the store's and ours: it can be evicted");

        // What is here is taken up again, and a reader of all of it gets all of it.
        world.download_ranges(1, &layout, &[0]);
        let whole = world.read(1, &layout, 0..length, LONG).unwrap();
        assert!(whole == blob);
        assert!(world.received_by(1) < length + length / 50, "{} bytes of {length} came", world.received_by(1));
        world.run_for(SECOND);
        world.assert_whole(1, &layout, &blob);
        assert_eq!(world.downloads(1), 0);
    });
}

#[test]
fn readers_that_leave_their_ranges_unread_cost_little_more_than_the_blob() {
    with_seeds(2, |seed| {
        let mut world = World::new(seed);
        world.net.bytes_per_s = 50 * MIB as u64;
        world.node(origin());
        world.node(agent());
        let blob = blob(32, 77 * 8, seed);
        let layout = world.put(0, &blob);
        let digest = *layout.digest();
        // As containerd does: each asks for all the rest, reads its share, and leaves.
        let chunk = 4 * MIB as u64;
        let mut starts: Vec<u64> = (0..layout.length().div_ceil(chunk)).map(|n| n * chunk).collect();
        starts.reverse();
        for start in starts {
            world.download_ranges(1, &layout, &[0]);
            let (alive, range) = (Arc::new(()), start..layout.length());
            let weak = Arc::downgrade(&alive);
            let mut opened = world.ask(1, &digest, |reply| crate::shard::command::Command::Read {
                digest,
                range: range.clone(),
                alive: weak,
                reply,
            });
            world.answer(&mut opened, LONG).unwrap().unwrap();
            let read = world.read(1, &layout, start..(start + chunk).min(range.end), LONG).unwrap();
            assert!(read == blob[start as usize..(start + chunk).min(range.end) as usize]);
            drop(alive);
        }
        world.run_for(LONG);
        world.assert_whole(1, &layout, &blob);
        assert_eq!(world.downloads(1), 0);
        let received = world.received_by(1);
        assert!(received < layout.length() * 11 / 10, "{received} bytes came of {}", layout.length());
    });
}

#[test]
fn a_peer_that_sends_wrong_pieces_is_banned_and_does_no_harm() {
    with_seeds(4, |seed| {
        let mut world = World::new(seed);
        let all = [world.node(origin()), world.node(agent()), world.node(agent())];
        let blob = blob(6, 100, seed);
        let layout = world.put(0, &blob);
        world.put(1, &blob);
        let hex = layout.digest().hex();
        for piece in 0..6 {
            let path = format!("sha256/cache/{}/{}/{hex}/data", &hex[..2], &hex[2..4]);
            world.nodes[1].disk.corrupt(&path, piece * MIB + 99).unwrap();
        }
        let mut end = world.download(2, &layout, &all);
        world.answer(&mut end, LONG).expect("no end in sight").unwrap();
        world.assert_whole(2, &layout, &blob);
        let wrong = world.count(2, |stats| stats.pieces_wrong.value());
        let bans = world.count(2, |stats| stats.bans.value());
        let rejected = world.count(1, |stats| stats.rejects.value());
        assert!(wrong == 0 || bans > 0, "{wrong} wrong pieces, {bans} bans");
        assert!(wrong + rejected > 0 || world.sent_by(1) < MIB as u64, "the damage was never met");
    });
}

/// A header that no encoder of ours would make.
fn header(kind: u8, len: u32, channel: u32, piece: u32) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_LEN];
    bytes[0] = kind;
    bytes[4..8].copy_from_slice(&len.to_le_bytes());
    bytes[8..12].copy_from_slice(&channel.to_le_bytes());
    bytes[12..16].copy_from_slice(&piece.to_le_bytes());
    let seal = crc32fast::hash(&bytes[..28]);
    bytes[28..].copy_from_slice(&seal.to_le_bytes());
    bytes
}

fn after_hello(node: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Hello::new(PeerId::new([node; 20])).encode(&mut bytes);
    bytes.extend_from_slice(rest);
    bytes
}

#[test]
fn peers_that_send_garbage_giant_lengths_or_nothing_do_no_harm() {
    with_seeds(2, |seed| {
        let mut world = World::new(seed);
        let origin = world.node(origin());
        let agent = world.node(agent());
        let rogues = [
            world.rogue(&b"GET / HTTP/1.1\r\nHost: shoal\r\n\r\n........................................"[..]),
            world.rogue(vec![0xa5; 100_000]),
            world.rogue(header(1, u32::MAX, 0, 0)),
            world.rogue(after_hello(6, &header(8, u32::MAX, 0, 0))),
            world.rogue(after_hello(7, &header(2, 32 << 10, 1, 0))),
            world.rogue(after_hello(8, &header(5, 4 << 20, 0, 0))),
            world.rogue(after_hello(9, &[])),
            world.rogue(Vec::new()),
        ];
        let blob = blob(8, 0, seed);
        let layout = world.put(origin, &blob);
        let mut named = rogues.to_vec();
        named.push(origin);
        let start = world.now;
        let mut end = world.download(agent, &layout, &named);
        world.answer(&mut end, LONG).expect("no end in sight").unwrap();
        assert!(world.now - start < SECOND * 2, "rogues cost {:?}", world.now - start);
        world.assert_whole(agent, &layout, &blob);
        world.run_for(LONG);
        let broken = world.count(agent, |stats| stats.ends_peer.value());
        assert!(broken >= 5, "only {broken} connections were ended for what came over them");
    });
}

#[test]
fn a_killed_agent_resumes_at_the_piece() {
    with_seeds(4, |seed| {
        let mut world = World::new(seed);
        world.net.bytes_per_s = 50 * MIB as u64;
        let (origin, agent) = (world.node(origin()), world.node(agent()));
        let blob = blob(24, 4_000, seed);
        let layout = world.put(origin, &blob);
        drop(world.download(agent, &layout, &[origin]));
        assert!(world.run_until(LONG, |world| world.have(agent, layout.digest()) >= 10));
        let store = world.nodes[agent].store.clone().unwrap();
        let had = store.opened(layout.digest()).unwrap().pieces().bytes();
        drop(store);
        world.kill(agent);
        world.run_for(SECOND);
        world.boot(agent, 2);
        let mut end = world.download(agent, &layout, &[origin]);
        world.answer(&mut end, LONG).expect("no end in sight").unwrap();
        world.assert_whole(agent, &layout, &blob);
        let missing = blob.len() as u64 - had;
        let came = world.received_by(agent);
        assert!(came < missing + MIB as u64 / 10, "{came} bytes came, {missing} were missing");
    });
}

#[test]
fn an_only_seeder_gone_for_a_second_costs_two_at_most() {
    with_seeds(6, |seed| {
        let finish = |gone: bool| {
            let mut world = World::new(seed);
            world.net.bytes_per_s = 20 * MIB as u64;
            let (origin, agent) = (world.node(origin()), world.node(agent()));
            let blob = blob(20, 0, seed);
            let layout = world.put(origin, &blob);
            let start = world.now;
            let mut end = world.download(agent, &layout, &[origin]);
            if gone {
                assert!(world.run_until(LONG, |world| world.have(agent, layout.digest()) >= 7));
                world.kill(origin);
                world.run_for(SECOND);
                world.boot(origin, 2);
            }
            world.answer(&mut end, LONG).expect("no end in sight").unwrap();
            world.assert_whole(agent, &layout, &blob);
            world.now - start
        };
        let (without, with) = (finish(false), finish(true));
        assert!(with < without + SECOND * 2, "{without:?} without, {with:?} with the second");
    });
}

#[test]
fn a_full_disk_is_refused_before_the_first_byte() {
    let mut world = World::new(1);
    let origin = world.node(origin());
    let agent = world.node(Made { disk_bytes: 5 * MIB as u64, ..agent() });
    let layout = world.put(origin, &blob(8, 0, 1));
    let namespace = "lib/app".parse().unwrap();
    let class = Class::Foreground;
    let digest = *layout.digest();
    let mut begun = world.ask(agent, &digest, |reply| crate::shard::command::Command::Download {
        extent: crate::shard::command::Extent::Whole,
        namespace,
        layout: layout.clone(),
        class,
        reply,
    });
    let refused = world.answer(&mut begun, LONG).expect("no answer");
    assert!(matches!(refused, Err(Error::NoSpace(_))), "{refused:?}");
    assert_eq!(world.received_by(agent), 0);
}

#[test]
fn a_write_that_fails_once_is_made_good_and_one_that_always_fails_is_an_error() {
    with_seeds(4, |seed| {
        let mut world = World::new(seed);
        let (origin, agent) = (world.node(origin()), world.node(agent()));
        let blob = blob(8, 0, seed);
        let layout = world.put(origin, &blob);
        let disk = world.nodes[agent].disk.clone();
        let mut end = world.download(agent, &layout, &[origin]);
        assert!(world.run_until(LONG, |world| world.have(agent, layout.digest()) >= 2));
        disk.fail(Fault::Io(disk.ops() + 1 + seed % 3));
        world.answer(&mut end, LONG).expect("no end in sight").unwrap();
        world.assert_whole(agent, &layout, &blob);

        let other = self::blob(8, 8, seed);
        let layout = world.put(origin, &other);
        let mut end = world.download(agent, &layout, &[origin]);
        assert!(world.run_until(LONG, |world| world.have(agent, layout.digest()) >= 2));
        disk.fail(Fault::Cut(disk.ops() + 1));
        let failed = world.answer(&mut end, LONG).expect("no end in sight");
        assert!(matches!(failed, Err(Error::Disk(_))), "{failed:?}");
    });
}

#[test]
fn cold_pieces_are_read_off_the_shard_and_served() {
    let mut world = World::new(5);
    let (origin, agent) = (world.node(origin()), world.node(agent()));
    let blob = blob(12, 77, 5);
    let layout = world.put(origin, &blob);
    world.nodes[origin].disk.drop_caches();
    let mut end = world.download(agent, &layout, &[origin]);
    world.answer(&mut end, LONG).expect("no end in sight").unwrap();
    world.assert_whole(agent, &layout, &blob);
    assert!(world.count(origin, |stats| stats.pieces_cold.value()) > 0, "nothing was read from disk");
}

#[test]
fn a_limit_on_sending_is_held_and_shared() {
    let mut world = World::new(9);
    let rate = 20 * MIB as u64;
    let limits = Limits { bytes_out_per_s: NonZeroU64::new(rate), ..Limits::default() };
    let origin = world.node(Made { limits, ..origin() });
    let agents = [world.node(agent()), world.node(agent())];
    let blobs = [blob(20, 0, 1), blob(20, 8, 2)];
    let layouts: Vec<Arc<Layout>> = blobs.iter().map(|blob| world.put(origin, blob)).collect();
    let start = world.now;
    let mut ends: Vec<_> =
        agents.iter().zip(&layouts).map(|(agent, layout)| world.download(*agent, layout, &[origin])).collect();
    for end in &mut ends {
        world.answer(end, LONG).expect("no end in sight").unwrap();
    }
    let took = (world.now - start).as_secs_f64();
    let ideal = blobs.iter().map(Bytes::len).sum::<usize>() as f64 / rate as f64;
    assert!((took / ideal - 1.0).abs() < 0.06, "{took} s instead of {ideal} s");
    let sent: Vec<f64> = agents.iter().map(|agent| world.received_by(*agent) as f64).collect();
    assert!((sent[0] / sent[1] - 1.0).abs() < 0.1, "{sent:?}");
}

const RATE: u64 = 50 * MIB as u64;

fn seconds_at_rate(blobs: &[Bytes]) -> f64 {
    blobs.iter().map(Bytes::len).sum::<usize>() as f64 / RATE as f64
}

fn assert_close(what: &str, took: f64, ideal: f64) {
    assert!((took / ideal - 1.0).abs() < 0.03, "{what}: {took} s instead of {ideal} s");
}

#[test]
fn limits_of_each_peer_are_held_and_hold_up_nobody_else() {
    let rate = NonZeroU64::new(RATE);
    let outward = Limits { peer_out_per_s: rate, ..Limits::default() };
    let inward = Limits { peer_in_per_s: rate, ..Limits::default() };
    for (what, seeds, leeches) in
        [("sent to", outward, Limits::default()), ("received from", Limits::default(), inward)]
    {
        let mut world = World::new(3);
        let seeders = [(); 2].map(|()| world.node(Made { limits: seeds, ..agent() }));
        let leecher = world.node(Made { limits: leeches, ..agent() });
        let blobs = [blob(100, 0, 1), blob(100, 8, 2)];
        let start = world.now;
        let mut ends = Vec::new();
        for (seeder, blob) in seeders.into_iter().zip(&blobs) {
            let layout = world.put(seeder, blob);
            ends.push(world.download(leecher, &layout, &[seeder]));
        }
        for end in &mut ends {
            world.answer(end, LONG).expect("no end in sight").unwrap();
        }
        // Each from a peer of its own: together twice the rate.
        assert_close(what, (world.now - start).as_secs_f64(), seconds_at_rate(&blobs) / 2.0);
    }
}

#[test]
fn limits_of_classes_are_held_and_who_waits_goes_first() {
    let rate = NonZeroU64::new(RATE);
    let blobs = [blob(100, 0, 1), blob(100, 8, 2)];
    let finish = |limits: Limits| {
        let mut world = World::new(4);
        let (seeder, leecher) = (world.node(agent()), world.node(Made { limits, ..agent() }));
        let layouts = [0, 1].map(|n| world.put(seeder, &blobs[n]));
        let start = world.now;
        let mut slow = world.download_as(Class::Background, leecher, &layouts[0], &[seeder]);
        let mut fast = world.download_as(Class::Foreground, leecher, &layouts[1], &[seeder]);
        world.answer(&mut fast, LONG).expect("no end in sight").unwrap();
        let first = (world.now - start).as_secs_f64();
        world.answer(&mut slow, LONG).expect("no end in sight").unwrap();
        (first, (world.now - start).as_secs_f64())
    };
    let (fast, slow) = finish(Limits { background_in_per_s: rate, ..Limits::default() });
    assert!(fast < seconds_at_rate(&blobs[1..]) / 4.0, "{fast} s for what has no limit");
    assert_close("background", slow, seconds_at_rate(&blobs[..1]));
    let (fast, _) = finish(Limits { foreground_in_per_s: rate, ..Limits::default() });
    assert_close("foreground", fast, seconds_at_rate(&blobs[1..]));
    let (fast, slow) = finish(Limits { bytes_in_per_s: rate, ..Limits::default() });
    assert!(fast < seconds_at_rate(&blobs[1..]) * 1.25, "{fast} s: it did not go first");
    assert_close("both", slow, seconds_at_rate(&blobs));
}

#[test]
fn limits_of_what_is_sent_to_a_class_are_held_and_hold_up_no_other() {
    let rate = NonZeroU64::new(RATE);
    let blobs = [blob(100, 0, 1), blob(100, 8, 2)];
    let limits = Limits { background_out_per_s: rate, ..Limits::default() };
    let mut world = World::new(5);
    // Both over one connection.
    let (seeder, leecher) = (world.node(Made { limits, ..agent() }), world.node(agent()));
    let layouts = [0, 1].map(|n| world.put(seeder, &blobs[n]));
    let start = world.now;
    let mut slow = world.download_as(Class::Background, leecher, &layouts[0], &[seeder]);
    let mut fast = world.download_as(Class::Foreground, leecher, &layouts[1], &[seeder]);
    world.answer(&mut fast, LONG).expect("no end in sight").unwrap();
    let first = (world.now - start).as_secs_f64();
    assert!(first < seconds_at_rate(&blobs[1..]) / 4.0, "{first} s for what has no limit");
    world.answer(&mut slow, LONG).expect("no end in sight").unwrap();
    assert_close("background", (world.now - start).as_secs_f64(), seconds_at_rate(&blobs[..1]));
}

#[test]
fn a_limit_holds_up_no_control_message() {
    let mut world = World::new(6);
    let limits = Limits { bytes_out_per_s: NonZeroU64::new(MIB as u64), ..Limits::default() };
    let seeder = world.node(Made { limits, ..agent() });
    let (busy, newcomer) = (world.node(agent()), world.node(agent()));
    let layout = world.put(seeder, &blob(30, 0, 1));
    let _busy = world.download(busy, &layout, &[seeder]);
    world.run_for(SECOND * 3);
    let _newcomer = world.download(newcomer, &layout, &[seeder]);
    // A dial, two greetings, a channel: some round trips of 0.4 ms, while a piece takes a second.
    let answered = world.run_until(Duration::from_millis(10), |world| world.received_by(newcomer) > 100);
    assert!(answered, "{} bytes came in 10 ms", world.received_by(newcomer));
    assert!(world.received_by(newcomer) < MIB as u64);
}

/// Anything may happen for a while; then everybody who lives gets the right bytes.
#[test]
fn whatever_happens_everybody_alive_finishes_with_the_right_bytes() {
    with_seeds(12, |seed| {
        let mut world = World::new(seed);
        world.net.bytes_per_s = 30 * MIB as u64;
        world.net.latency = Duration::from_micros(100 + world.rng.below(5_000));
        let shards = |world: &mut World| 1 + world.rng.below(3) as usize;
        let count = 3 + world.rng.below(3) as usize;
        let mut kept = Vec::new();
        for node in 0..count {
            let shards = shards(&mut world);
            world.node(Made { shards, origin: node == 0, ..Made::default() });
            kept.push(shards);
        }
        let all: Vec<usize> = (0..count).collect();
        let blob = blob(6 + world.rng.below(8) as usize, 3_000, seed);
        let layout = layout_of(&blob);
        assert_eq!(layout, world.put(0, &blob));
        let mut ends: Vec<_> = (1..count).map(|node| Some(world.download(node, &layout, &all))).collect();
        for _ in 0..6 {
            let pause = Duration::from_millis(world.rng.below(150));
            world.run_for(pause);
            let victim = world.rng.below(count as u64) as usize;
            let down = Duration::from_millis(10 + world.rng.below(900));
            match world.rng.below(4) {
                0 => {
                    world.cut_off(victim);
                    world.run_for(down);
                    world.mend(victim);
                }
                1 => world.reset_connections(),
                gone => {
                    if gone == 2 {
                        world.kill(victim)
                    } else {
                        world.power_cut(victim)
                    }
                    world.run_for(down);
                    world.boot(victim, kept[victim]);
                    if victim > 0 {
                        ends[victim - 1] = Some(world.download(victim, &layout, &all));
                    }
                }
            }
        }
        for end in ends.iter_mut().flatten() {
            world.answer(end, LONG).expect("no end in sight").unwrap();
        }
        (1..count).for_each(|node| world.assert_whole(node, &layout, &blob));
    });
}
