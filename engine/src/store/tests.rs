//! The store against a disk that loses power, fails and runs full. Every failure names its seed and step.

use super::*;
use crate::disk::{
    real::Real,
    sim::{Fault, Sim},
};
use crate::handle::SendPath;
use bytes::Bytes;
use peer_proto::{Layout, LayoutBuilder};
use peer_proto::{PieceIndex, ProofError};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

const MIB: usize = 1 << 20;
const PLENTY: u64 = 1 << 30;
const NOW: u64 = 1_700_000_000;

/// A blob of made-up bytes.
struct Made {
    bytes: Bytes,
    layout: Arc<Layout>,
}

impl Made {
    fn new(seed: u8, len: usize, algorithm: Algorithm) -> Self {
        let bytes: Bytes = (0..len).map(|i| seed ^ (i as u8) ^ ((i >> 8) as u8).wrapping_mul(31)).collect();
        let mut builder = LayoutBuilder::new(algorithm);
        builder.update(&bytes).unwrap();
        Self { bytes, layout: Arc::new(builder.finish()) }
    }

    fn digest(&self) -> &Digest {
        self.layout.digest()
    }

    fn piece(&self, index: u32) -> (PieceIndex, &[u8]) {
        let piece = self.layout.geometry().piece(index).unwrap();
        let range = self.layout.geometry().range(piece);
        (piece, &self.bytes[range.start as usize..range.end as usize])
    }

    fn upload(&self, store: &Store, id: u128) -> Result<(), Error> {
        let id = Uuid::from_u128(id);
        let mut incoming = store.create_upload(id, self.digest().algorithm(), Some(self.bytes.len() as u64))?;
        for chunk in self.bytes.chunks(700_000) {
            if let Err(e) = store.append_upload(&mut incoming, chunk) {
                store.drop_upload(incoming)?;
                return Err(e);
            }
        }
        store.commit_upload(incoming, self.digest()).map(drop)
    }

    fn put(&self, store: &Store, blob: &Blob, pieces: impl IntoIterator<Item = u32>) -> Result<(), PieceError> {
        pieces.into_iter().try_for_each(|index| {
            let (piece, bytes) = self.piece(index);
            store.put(blob, piece, bytes).map(drop)
        })
    }

    /// Downloads it, last piece first.
    fn download(&self, store: &Store) -> Result<(), Failed> {
        let blob = store.begin(&self.layout, None)?;
        let lacking: Vec<u32> = blob.layout().geometry().all().rev().map(PieceIndex::get).collect();
        if !blob.is_whole() {
            match self.put(store, &blob, lacking) {
                // An upload was faster: the end of the download gives its blob.
                Err(PieceError::Gone) => {}
                put => put?,
            }
        }
        Ok(store.finish(&blob).map(drop)?)
    }

    /// Every piece that the store says it has is right.
    fn check(&self, store: &Store, what: &str) -> Stat {
        let Some(blob) = store.blob(self.digest()).unwrap() else { return Stat::Absent };
        for piece in blob.pieces().iter() {
            let range = self.layout.geometry().range(piece);
            let read = store.read(&blob, range.clone()).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(read, self.piece(piece.get()).1, "{what}: {piece}");
            assert_eq!(blob.slice(range).unwrap(), read, "{what}: {piece}, mapped");
        }
        assert!(!blob.is_whole() || blob.pieces().is_full(), "{what}");
        blob.stat()
    }
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Store(#[from] Error),
    #[error(transparent)]
    Piece(#[from] PieceError),
}

fn open(disk: &Sim, quota: Option<u64>, boot: u8) -> io::Result<Store> {
    let options = Options { quota, proof: Proof::Full, boot: [boot; 16] };
    Store::open(Arc::new(disk.clone()), options, Pool::new(64 * MIB), NOW)
}

/// What a run was told is done, and so must hold.
#[derive(Default)]
struct Acked {
    whole: BTreeSet<Digest>,
    pinned: BTreeSet<Digest>,
    /// Deleted, or asked to be: may be there or not.
    doubtful: BTreeSet<Digest>,
}

struct World {
    uploaded: Made,
    downloaded: Made,
    partial: Made,
    long: Made,
}

impl World {
    fn new() -> Self {
        Self {
            uploaded: Made::new(1, 5_000, Algorithm::Sha256),
            downloaded: Made::new(2, MIB + 9_000, Algorithm::Sha256),
            partial: Made::new(3, 2 * MIB + 5, Algorithm::Sha256),
            long: Made::new(4, MIB + 1, Algorithm::Sha512),
        }
    }

    fn all(&self) -> [&Made; 4] {
        [&self.uploaded, &self.downloaded, &self.partial, &self.long]
    }

    /// A bit of everything, noting what was acknowledged. Ends at the first failure, as a caller that gives up does.
    /// `n` numbers the run, so that its uploads have names of their own.
    fn run(&self, store: &Store, n: u128, acked: &mut Acked) -> Result<(), Failed> {
        self.uploaded.upload(store, 10 * n + 1)?;
        acked.whole.insert(*self.uploaded.digest());
        self.downloaded.download(store)?;
        acked.whole.insert(*self.downloaded.digest());
        store.pin(self.downloaded.digest())?;
        acked.pinned.insert(*self.downloaded.digest());
        let partial = store.begin(&self.partial.layout, Some(&"lib/app".parse().unwrap()))?;
        self.partial.put(store, &partial, [2, 0])?;
        self.long.upload(store, 10 * n + 2)?;
        acked.whole.insert(*self.long.digest());
        self.uploaded.upload(store, 10 * n + 3)?;
        store.save_index().map_err(Error::from)?;
        acked.whole.remove(self.long.digest());
        acked.doubtful.insert(*self.long.digest());
        store.evict(self.long.digest())?;
        // Left in the middle.
        let mut incoming = store.create_upload(Uuid::from_u128(10 * n + 4), Algorithm::Sha256, None)?;
        let appended = store.append_upload(&mut incoming, b"some bytes");
        store.park_upload(incoming);
        Ok(appended?)
    }

    fn check(&self, store: &Store, acked: &Acked, what: &str) {
        for made in self.all() {
            let stat = made.check(store, what);
            let whole = matches!(stat, Stat::Whole { .. });
            assert!(whole || !acked.whole.contains(made.digest()), "{what}: {:?} was lost: {stat:?}", made.digest());
        }
        for digest in &acked.pinned {
            assert!(matches!(store.evict(digest), Err(Error::Pinned(_))), "{what}: the pin was lost");
        }
    }

    /// The same again on a store that went through something, and nothing may be left over.
    fn goes_on(&self, disk: &Sim, store: &Store, what: &str) {
        let mut acked = Acked::default();
        store.expire_uploads(0).unwrap();
        self.run(store, 1, &mut acked).unwrap_or_else(|e| panic!("{what}, afterwards: {e}"));
        self.check(store, &acked, what);
        let listed: BTreeMap<Digest, u64> =
            store.list(None, 10).unwrap().into_iter().map(|entry| (entry.digest, entry.length)).collect();
        let whole: BTreeMap<Digest, u64> =
            [&self.uploaded, &self.downloaded].map(|made| (*made.digest(), made.bytes.len() as u64)).into();
        assert_eq!(listed, whole, "{what}");
        let used = whole.values().sum::<u64>() + self.partial.bytes.len() as u64 + 10;
        assert_eq!(store.used(), used, "{what}: bytes counted");
        assert_eq!(names(disk, "trash"), [""; 0], "{what}");
        assert_eq!(names(disk, "upload"), [Uuid::from_u128(14).to_string()], "{what}");
        assert_eq!(names(disk, "sha256/partial"), [self.partial.digest().hex()], "{what}");
        assert_eq!(names(disk, "sha256/quarantine"), [""; 0], "{what}");
    }
}

fn names(disk: &Sim, path: &str) -> Vec<String> {
    disk.list(path).unwrap().into_iter().map(|listed| listed.name).collect()
}

/// Seeds to try: 1, or as many as `SHOAL_SEEDS` says.
fn seeds() -> u64 {
    std::env::var("SHOAL_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// The power goes at every step of everything the store does, and then again while it recovers.
#[test]
fn after_a_power_cut_at_any_step_what_was_acknowledged_is_there_and_every_name_has_its_bytes() {
    let world = World::new();
    let mut steps = 0;
    for seed in 0..seeds() {
        for cut in 0.. {
            let what = format!("seed {seed}, cut at {cut}");
            let disk = Sim::new(seed << 32 | cut, PLENTY);
            disk.fail(Fault::Cut(cut));
            let mut acked = Acked::default();
            let done = open(&disk, None, 1).is_ok_and(|store| world.run(&store, 0, &mut acked).is_ok());
            let ops = disk.ops();
            disk.crash();
            // A second cut, somewhere in the recovery.
            disk.fail(Fault::Cut(disk.ops() + cut % 11));
            drop(open(&disk, None, 2).map(|store| store.blob(world.partial.digest()).is_ok()));
            disk.crash();
            let store = open(&disk, None, 3).unwrap_or_else(|e| panic!("{what}: {e}"));
            world.check(&store, &acked, &what);
            if cut % 5 == seed % 5 {
                world.goes_on(&disk, &store, &what);
            }
            if done {
                steps = ops;
                break;
            }
        }
    }
    assert!(steps > 100, "the scenario got short: {steps} steps");
}

/// The process dies at every step, the machine does not: pieces are trusted by their notes, and what is acknowledged after
/// the restart is durable even where the first process had not come to syncing it.
#[test]
fn after_a_kill_at_any_step_pieces_are_kept_and_a_later_acknowledgement_holds() {
    let world = World::new();
    for cut in 0.. {
        let what = format!("killed at {cut}");
        let disk = Sim::new(cut, PLENTY);
        disk.fail(Fault::Cut(cut));
        let mut acked = Acked::default();
        let done = open(&disk, None, 1).is_ok_and(|store| world.run(&store, 0, &mut acked).is_ok());
        disk.kill();
        let store = open(&disk, None, 1).unwrap();
        world.check(&store, &acked, &what);
        if done {
            let blob = store.blob(world.partial.digest()).unwrap().unwrap();
            assert_eq!(blob.pieces().iter().map(PieceIndex::get).collect::<Vec<_>>(), [0, 2]);
            assert_eq!(blob.namespace().unwrap().as_str(), "lib/app");
            let resumed = store.resume_upload(Uuid::from_u128(4)).unwrap();
            assert_eq!(resumed.len(), 10);
            store.park_upload(resumed);
        }
        let mut acked = Acked::default();
        world.uploaded.upload(&store, 9).unwrap();
        acked.whole.insert(*world.uploaded.digest());
        drop(store);
        disk.crash();
        world.check(&open(&disk, None, 2).unwrap(), &acked, &what);
        if done {
            break;
        }
    }
}

/// Each single operation fails once, with EIO and with ENOSPC. Whatever is answered, no name lies, what was acknowledged is durable,
/// and the store works on.
#[test]
fn one_failing_operation_is_an_error_and_no_more() {
    let world = World::new();
    let healthy = Sim::new(0, PLENTY);
    let first = {
        open(&healthy, None, 1).unwrap();
        healthy.ops()
    };
    for at in first.. {
        for fault in [Fault::Io(at), Fault::Full(at)] {
            let what = format!("{fault:?}");
            let disk = Sim::new(at, PLENTY);
            disk.fail(fault);
            let store = open(&disk, None, 1).unwrap();
            let mut acked = Acked::default();
            let done = world.run(&store, 0, &mut acked).is_ok();
            if done && disk.ops() <= at {
                return;
            }
            if let Fault::Full(_) = fault {
                // Whoever is not pinned may have had to make room.
                acked.whole.retain(|digest| acked.pinned.contains(digest));
            }
            world.check(&store, &acked, &what);
            store.expire_uploads(0).unwrap();
            let again = world.run(&store, 1, &mut acked);
            assert!(again.is_ok(), "{what}: {again:?}");
            world.check(&store, &acked, &what);
            drop(store);
            disk.crash();
            world.check(&open(&disk, None, 2).unwrap(), &acked, &what);
        }
    }
}

#[test]
fn the_quota_holds_to_the_byte_and_the_least_recently_used_go() {
    let disk = Sim::new(1, PLENTY);
    let store = open(&disk, Some(3_000), 1).unwrap();
    let blobs: Vec<Made> = (0..4).map(|i| Made::new(i, 1_000, Algorithm::Sha256)).collect();
    let here =
        |store: &Store| blobs.iter().map(|made| !matches!(made.check(store, "here"), Stat::Absent)).collect::<Vec<_>>();
    for (i, made) in blobs.iter().take(3).enumerate() {
        store.tick(NOW + i as u64);
        made.upload(&store, i as u128).unwrap();
    }
    assert_eq!(store.used(), 3_000);
    store.tick(NOW + 10);
    store.opened(blobs[0].digest()).unwrap();
    store.tick(NOW + 11);
    blobs[3].upload(&store, 3).unwrap();
    assert_eq!(store.used(), 3_000);
    assert_eq!(here(&store), [true, false, true, true], "the first was used since");

    for made in [&blobs[0], &blobs[2]] {
        store.pin(made.digest()).unwrap();
    }
    let big = Made::new(9, 1_001, Algorithm::Sha256);
    assert!(matches!(store.begin(&big.layout, None), Err(Error::NoSpace(1_001))), "pinned ones stay");
    assert_eq!(here(&store), [true, false, true, true], "and nothing goes in vain");
    store.unpin(blobs[0].digest()).unwrap();
    let blob = store.begin(&big.layout, None).unwrap();
    assert_eq!(store.used(), 2_001);
    assert_eq!(here(&store), [false, false, true, false]);
    assert!(matches!(
        store.create_upload(Uuid::from_u128(7), Algorithm::Sha256, Some(1_000)),
        Err(Error::NoSpace(1_000))
    ));
    let mut upload = store.create_upload(Uuid::from_u128(7), Algorithm::Sha256, None).unwrap();
    store.append_upload(&mut upload, &[0; 999]).unwrap();
    assert!(matches!(store.append_upload(&mut upload, &[0]), Err(Error::NoSpace(1))), "a download in use stays");
    assert_eq!(upload.len(), 999);
    drop(blob);
    store.append_upload(&mut upload, &[0]).unwrap();
    assert_eq!(store.used(), 2_000, "one that nobody is at goes");
    store.drop_upload(upload).unwrap();
    assert_eq!(store.used(), 1_000);
    drop(store);

    let store = open(&disk, Some(999), 1).unwrap();
    while store.scan().unwrap() {}
    assert_eq!(store.used(), 1_000);
    store.enforce_quota();
    assert_eq!(store.used(), 1_000, "pinned, whatever the quota");
    store.unpin(blobs[2].digest()).unwrap();
    store.enforce_quota();
    assert_eq!(store.used(), 0);
}

#[test]
fn a_full_disk_evicts_and_is_an_answer_when_there_is_nothing_to_evict() {
    let disk = Sim::new(1, 3 * MIB as u64);
    let store = open(&disk, None, 1).unwrap();
    let [old, new] = [1, 2].map(|seed| Made::new(seed, MIB + MIB / 2, Algorithm::Sha256));
    old.upload(&store, 1).unwrap();
    new.download(&store).unwrap();
    assert!(matches!(old.check(&store, "old"), Stat::Absent), "made room");
    assert!(matches!(new.check(&store, "new"), Stat::Whole { .. }));
    let huge = Made::new(3, 3 * MIB + 1, Algorithm::Sha256);
    let free = disk.free().unwrap();
    assert!(matches!(store.begin(&huge.layout, None), Err(Error::NoSpace(_))));
    assert!(matches!(new.check(&store, "new"), Stat::Whole { .. }), "not evicted in vain");
    assert_eq!((disk.free().unwrap(), store.used()), (free, new.bytes.len() as u64), "nothing is left of the attempt");
}

/// Pieces noted under another boot are proven again: those that the power cut took do not count.
#[test]
fn after_a_reboot_only_proven_pieces_count() {
    let made = Made::new(5, 9 * MIB, Algorithm::Sha256);
    let mut lost = 0;
    for seed in 0..10 {
        let disk = Sim::new(seed, PLENTY);
        let store = open(&disk, None, 1).unwrap();
        let blob = store.begin(&made.layout, None).unwrap();
        made.put(&store, &blob, 0..8).unwrap();
        // Names and notes survive, bytes as it comes.
        disk.sync_dir("sha256/partial").unwrap();
        let dir = files::partial_dir(made.digest());
        disk.sync_dir(&dir).unwrap();
        for file in ["pieces", "layout"] {
            disk.open(&format!("{dir}/{file}")).unwrap().sync().unwrap();
        }
        drop((blob, store));
        disk.crash();
        let store = open(&disk, None, 2).unwrap();
        if let Stat::Partial { have, .. } = made.check(&store, &format!("seed {seed}")) {
            assert!(have <= 8 * MIB as u64);
            lost += 8 - have as usize / MIB;
        }
        made.download(&store).unwrap();
        assert!(matches!(made.check(&store, "whole"), Stat::Whole { .. }), "seed {seed}");
    }
    assert!(lost > 0, "the disk lost nothing, so this showed nothing");
}

#[test]
fn damage_is_found_on_reading_and_kept_aside() {
    let disk = Sim::new(1, PLENTY);
    let store = open(&disk, None, 1).unwrap();
    let made = Made::new(1, MIB + 100, Algorithm::Sha256);
    made.upload(&store, 1).unwrap();
    drop(store);
    let data = format!("{}/data", files::cache_dir(made.digest()));
    disk.corrupt(&data, MIB + 7).unwrap();
    let store = open(&disk, None, 1).unwrap();
    let blob = store.blob(made.digest()).unwrap().unwrap();
    assert!(blob.slice(0..10).is_none() && !blob.resident(0..10), "not checked in this life");
    assert_eq!(store.read(&blob, 5..10).unwrap(), made.bytes[5..10]);
    assert!(blob.slice(0..10).is_some());
    assert!(
        matches!(store.read(&blob, MIB as u64..MIB as u64 + 1), Err(ReadError::Damaged { .. })),
        "a byte beside it"
    );
    assert!(blob.is_gone());
    assert!(matches!(store.stat(made.digest()).unwrap(), Stat::Absent));
    assert_eq!(store.used(), 0);
    let kept = names(&disk, "sha256/quarantine");
    let file = disk.open(&format!("sha256/quarantine/{}/reason", kept[0])).unwrap();
    let mut reason = vec![0; file.len().unwrap() as usize];
    file.read_at(0, &mut reason).unwrap();
    assert_eq!(reason, b"piece 1 fails its checksum");
    made.upload(&store, 2).unwrap();
    assert!(matches!(made.check(&store, "again"), Stat::Whole { .. }));

    for i in 0..QUARANTINE_MAX {
        disk.corrupt(&data, i).unwrap();
        let blob = store.blob(made.digest()).unwrap().unwrap();
        assert!(store.read(&blob, 0..MIB as u64).is_err());
        made.upload(&store, 3).unwrap();
    }
    assert_eq!(names(&disk, "sha256/quarantine").len(), QUARANTINE_MAX, "the oldest went");
}

/// Wrong, foreign and repeated pieces, and a layout that is not the one in use.
#[test]
fn pieces_are_proven_before_they_count() {
    let disk = Sim::new(1, PLENTY);
    let store = open(&disk, None, 1).unwrap();
    let made = Made::new(1, 3 * MIB, Algorithm::Sha256);
    let blob = store.begin(&made.layout, None).unwrap();
    assert!(Arc::ptr_eq(&blob, &store.begin(&made.layout, None).unwrap()), "one download");
    let (piece, bytes) = made.piece(1);
    let mut wrong = bytes.to_vec();
    wrong[MIB - 1] ^= 1;
    assert!(matches!(store.put(&blob, piece, &wrong), Err(PieceError::Proof(ProofError::Checksum(_)))));
    assert!(matches!(store.put(&blob, piece, &bytes[1..]), Err(PieceError::Proof(ProofError::Length { .. }))));
    assert!(matches!(store.finish(&blob), Err(Error::Incomplete(_))));
    assert!(store.put(&blob, piece, bytes).unwrap());
    assert!(!store.put(&blob, piece, bytes).unwrap(), "a second arrival");
    assert!(matches!(store.read(&blob, 0..1), Err(ReadError::Absent(_))));
    assert!(matches!(store.read(&blob, 2 * MIB as u64 - 1..2 * MIB as u64 + 1), Err(ReadError::Range)));
    disk.drop_caches();
    let range = MIB as u64..2 * MIB as u64;
    assert!(!blob.resident(range.clone()), "cold");
    store.read(&blob, range.clone()).unwrap();
    assert!(blob.resident(range));
    // An upload of the same blob overtakes the download.
    made.upload(&store, 1).unwrap();
    assert!(matches!(store.put(&blob, made.piece(0).0, made.piece(0).1), Err(PieceError::Gone)));
    assert!(store.finish(&blob).unwrap().is_whole());
    assert_eq!(store.used(), 3 * MIB as u64);
}

/// Eight writers of one digest, one of them a download (a shard owns it: there is never a second): all are told it is there, one of them is right about having put it there.
#[test]
fn concurrent_commits_of_one_digest_leave_one_blob() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { quota: Some(20 * MIB as u64), proof: Proof::Full, boot: [1; 16] };
    let disk = Arc::new(Real::open(dir.path(), true, SendPath::default()).unwrap());
    let store = Store::open(disk, options, Pool::new(64 * MIB), NOW).unwrap();
    let made = Made::new(1, MIB + 1, Algorithm::Sha256);
    std::thread::scope(|scope| {
        for id in 0..8 {
            let (store, made) = (&store, &made);
            scope.spawn(move || if id == 3 { made.download(store).unwrap() } else { made.upload(store, id).unwrap() });
        }
    });
    assert!(matches!(made.check(&store, "after all"), Stat::Whole { .. }));
    assert_eq!(store.used(), MIB as u64 + 1);
    for empty in ["upload", "trash", "sha256/partial", "sha256/quarantine"] {
        assert_eq!(std::fs::read_dir(dir.path().join(empty)).unwrap().count(), 0, "{empty}");
    }
}

#[test]
fn idle_uploads_end_and_their_number_is_bounded() {
    let disk = Sim::new(1, PLENTY);
    let store = open(&disk, None, 1).unwrap();
    for id in 0..table::UPLOADS_MAX as u128 {
        store.park_upload(store.create_upload(Uuid::from_u128(id), Algorithm::Sha256, Some(1)).unwrap());
    }
    assert!(matches!(store.create_upload(Uuid::nil(), Algorithm::Sha256, None), Err(Error::Busy(_))));
    store.tick(NOW + 100);
    let fresh = store.resume_upload(Uuid::from_u128(5)).unwrap();
    assert!(matches!(store.resume_upload(Uuid::from_u128(5)), Err(Error::UploadInUse)));
    assert_eq!(store.expire_uploads(101).unwrap(), 0);
    assert_eq!(store.expire_uploads(100).unwrap(), table::UPLOADS_MAX - 1);
    assert_eq!(store.used(), 1);
    store.drop_upload(fresh).unwrap();
    assert_eq!((store.used(), names(&disk, "upload").len()), (0, 0));
}

/// The snapshot is only ever a help: with it, without it, with a damaged or outdated one, the same blobs are listed.
#[test]
fn the_inventory_is_right_whatever_the_snapshot_says() {
    let blobs: Vec<Made> = (0..6)
        .map(|i| Made::new(i, 100 + i as usize, [Algorithm::Sha256, Algorithm::Sha512][i as usize % 2]))
        .collect();
    for case in ["no snapshot", "snapshot", "damaged", "outdated"] {
        let disk = Sim::new(1, PLENTY);
        let store = open(&disk, None, 1).unwrap();
        for (i, made) in blobs.iter().take(5).enumerate() {
            store.tick(NOW + i as u64);
            made.upload(&store, i as u128).unwrap();
        }
        assert!(store.index_is_stale());
        if case != "no snapshot" {
            store.save_index().unwrap();
            assert!(!store.index_is_stale());
        }
        match case {
            "damaged" => disk.corrupt("index", 77).unwrap(),
            "outdated" => {
                blobs[5].upload(&store, 5).unwrap();
                store.evict(blobs[0].digest()).unwrap();
            }
            _ => {}
        }
        drop(store);
        let store = open(&disk, None, 1).unwrap();
        assert_eq!(store.is_inventoried(), matches!(case, "snapshot" | "outdated"), "{case}");
        if case == "snapshot" {
            store.tick(NOW + 10);
            let idle: BTreeMap<_, _> =
                store.list(None, 9).unwrap().into_iter().map(|e| (e.digest, e.idle.as_secs())).collect();
            assert_eq!(idle[blobs[1].digest()], 9, "last uses are kept");
        }
        let certain = |made: &&Made| store.knows_absent(made.digest());
        assert_eq!(blobs.iter().filter(certain).count(), 0, "{case}: not before all was seen");
        while store.scan().unwrap() {}
        let absent = if case == "outdated" { 0..1 } else { 5..6 };
        assert!((0..6).all(|i| certain(&&blobs[i]) == absent.contains(&i)), "{case}");
        let present = if case == "outdated" { &blobs[1..6] } else { &blobs[..5] };
        let mut expected: Vec<Digest> = present.iter().map(|made| *made.digest()).collect();
        expected.sort();
        let listed: Vec<Digest> = store.list(None, 9).unwrap().into_iter().map(|e| e.digest).collect();
        assert_eq!(listed, expected, "{case}");
        let paged: Vec<Digest> = store.list(Some(&expected[1]), 2).unwrap().into_iter().map(|e| e.digest).collect();
        assert_eq!(paged, expected[2..4], "{case}");
        assert_eq!(store.used(), present.iter().map(|made| made.bytes.len() as u64).sum::<u64>(), "{case}");
    }
}
