//! A disk in memory that loses power, runs full and fails, the same way for the same seed.
//!
//! What is written is seen at once by everybody and is durable only when synced, as POSIX has it and not kinder:
//!
//! - a file's bytes and length: by [`File::sync`] of that file. At a power cut each page of 4 KiB that was not synced is kept
//!   or lost by itself, and so is a change of length;
//! - a name: by [`Disk::sync_dir`] of its directory. At a power cut each change of names that was not synced is kept or lost by
//!   itself, unless it builds on one that was lost. A rename is one change. A directory's own name is its parent's business.
//!
//! A sync that fails leaves its pages clean and not durable, as Linux does.

use super::{Disk, File, Listed, Mapping, Meta, Space};
use bytes::Bytes;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

const PAGE: u64 = 4096;

/// The disk. Clones are one disk.
#[derive(Clone)]
pub struct Sim {
    world: Arc<Mutex<World>>,
}

/// A step that goes wrong, by the number of the operation that changes, syncs or opens something ([`Sim::ops`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// From this operation on nothing works: the power is about to go.
    Cut(u64),
    /// This operation fails with EIO.
    Io(u64),
    /// This operation finds the disk full.
    Full(u64),
}

struct World {
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    /// Changes of names that are not durable yet, in order.
    pending: Vec<Change>,
    capacity: u64,
    /// Bytes that files take.
    taken: u64,
    ops: u64,
    faults: Vec<Fault>,
    /// Counts power cuts: handles of an earlier life are dead.
    life: u64,
    now: Duration,
    random: u64,
}

enum Inode {
    File(Content),
    Dir { names: BTreeMap<String, u64>, durable: BTreeMap<String, u64> },
}

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<u64>,
    /// Pages in memory, as far as a reader could tell.
    cached: BTreeSet<u64>,
    ahead: u64,
    modified: Duration,
    links: u32,
    handles: u32,
    /// Durable names, and changes under way that would give it one.
    durable_links: u32,
}

impl Content {
    /// Bytes it takes of the disk.
    fn size(&self) -> u64 {
        if self.links + self.handles > 0 { self.ahead.max(self.bytes.len() as u64) } else { 0 }
    }
}

#[derive(Clone, Debug)]
struct Change {
    /// Names that it takes away.
    takes: Option<(u64, String)>,
    /// A name that it gives, and to what.
    gives: Option<(u64, String, u64)>,
}

impl Change {
    fn touches(&self, dir: u64) -> bool {
        self.takes.as_ref().is_some_and(|(d, _)| *d == dir) || self.gives.as_ref().is_some_and(|(d, ..)| *d == dir)
    }

    fn names(&self) -> impl Iterator<Item = (u64, &str)> {
        let takes = self.takes.iter().map(|(dir, name)| (*dir, name.as_str()));
        takes.chain(self.gives.iter().map(|(dir, name, _)| (*dir, name.as_str())))
    }

    fn builds_on(&self, earlier: &Self) -> bool {
        self.names().any(|name| earlier.names().any(|other| other == name))
    }
}

const ROOT: u64 = 0;

impl Sim {
    /// An empty disk of `capacity` bytes.
    pub fn new(seed: u64, capacity: u64) -> Self {
        let root = Inode::Dir { names: BTreeMap::new(), durable: BTreeMap::new() };
        let world = World {
            inodes: BTreeMap::from([(ROOT, root)]),
            next_inode: ROOT + 1,
            pending: Vec::new(),
            capacity,
            taken: 0,
            ops: 0,
            faults: Vec::new(),
            life: 0,
            now: Duration::ZERO,
            random: seed,
        };
        Self { world: Arc::new(Mutex::new(world)) }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Operations so far, to number faults by.
    pub fn ops(&self) -> u64 {
        self.world().ops
    }

    /// Plans a fault.
    pub fn fail(&self, fault: Fault) {
        self.world().faults.push(fault);
    }

    /// Sets the clock that files are dated by, since 1970.
    pub fn set_now(&self, now: Duration) {
        self.world().now = now;
    }

    /// Cuts the power and switches it on again: what was not durable is kept or lost by the seed, faults are over, open files
    /// are dead.
    pub fn crash(&self) {
        self.world().crash();
    }

    /// Ends the process, not the machine: open files are dead, nothing is lost, faults are over.
    pub fn kill(&self) {
        let mut world = self.world();
        world.life += 1;
        world.faults.clear();
        let ids: Vec<u64> = world.inodes.keys().copied().collect();
        for id in ids {
            world.change(id, |content| content.handles = 0);
        }
    }

    /// Makes every page cold, as if other files had taken the memory.
    pub fn drop_caches(&self) {
        for inode in self.world().inodes.values_mut() {
            if let Inode::File(content) = inode {
                content.cached.clear();
            }
        }
    }

    /// Flips a bit of a file, on the platter and in memory.
    pub fn corrupt(&self, path: &str, offset: usize) -> io::Result<()> {
        let mut world = self.world();
        let inode = world.find(path)?;
        let content = world.content(inode)?;
        for bytes in [&mut content.bytes, &mut content.durable] {
            if let Some(byte) = bytes.get_mut(offset) {
                *byte ^= 1;
            }
        }
        Ok(())
    }
}

impl World {
    fn random(&mut self) -> u64 {
        // SplitMix64.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn coin(&mut self) -> bool {
        self.random() & 1 == 1
    }

    /// Counts an operation and says whether it is one that fails.
    fn step(&mut self) -> io::Result<()> {
        let op = self.ops;
        self.ops += 1;
        for fault in &self.faults {
            match *fault {
                Fault::Cut(at) if op >= at => return Err(eio()),
                Fault::Io(at) if op == at => return Err(eio()),
                Fault::Full(at) if op == at => return Err(io::ErrorKind::StorageFull.into()),
                _ => {}
            }
        }
        Ok(())
    }

    fn find(&self, path: &str) -> io::Result<u64> {
        path.split('/').filter(|part| !part.is_empty()).try_fold(ROOT, |dir, part| match self.inodes.get(&dir) {
            Some(Inode::Dir { names, .. }) => names.get(part).copied().ok_or_else(|| io::ErrorKind::NotFound.into()),
            _ => Err(io::ErrorKind::NotADirectory.into()),
        })
    }

    /// A path's directory and last component.
    fn place<'a>(&self, path: &'a str) -> io::Result<(u64, &'a str)> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.find(dir)?, name))
    }

    fn names(&mut self, dir: u64) -> io::Result<&mut BTreeMap<String, u64>> {
        match self.inodes.get_mut(&dir) {
            Some(Inode::Dir { names, .. }) => Ok(names),
            _ => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    fn content(&mut self, inode: u64) -> io::Result<&mut Content> {
        match self.inodes.get_mut(&inode) {
            Some(Inode::File(content)) => Ok(content),
            Some(Inode::Dir { .. }) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(eio()),
        }
    }

    fn add(&mut self, path: &str, inode: Inode) -> io::Result<u64> {
        let (dir, name) = self.place(path)?;
        let id = self.next_inode;
        let names = self.names(dir)?;
        if names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        names.insert(name.to_owned(), id);
        self.next_inode += 1;
        if let Inode::File(content) = &inode {
            self.taken += content.size();
        }
        self.inodes.insert(id, inode);
        self.note(Change { takes: None, gives: Some((dir, name.to_owned(), id)) });
        Ok(id)
    }

    /// Changes a file's content or counts, keeps the books, and lets the file go with its last name and handle; out of sight it
    /// is kept as long as a crash could bring a name of it back.
    fn change<T>(&mut self, inode: u64, change: impl FnOnce(&mut Content) -> T) -> Option<T> {
        let Some(Inode::File(content)) = self.inodes.get_mut(&inode) else { return None };
        let before = content.size();
        let result = change(content);
        self.taken = self.taken - before + content.size();
        if content.links + content.handles + content.durable_links == 0 {
            self.inodes.remove(&inode);
        }
        Some(result)
    }

    fn note(&mut self, change: Change) {
        if let Some((.., inode)) = change.gives {
            self.change(inode, |content| content.durable_links += 1);
        }
        self.pending.push(change);
    }

    /// Grows what a file takes, where there is room.
    fn grow(&mut self, inode: u64, to: u64) -> io::Result<()> {
        let (taken, capacity) = (self.taken, self.capacity);
        let has = self.content(inode)?.size();
        if to > has && taken + (to - has) > capacity {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    /// Makes those pending changes durable that `wanted` says, in order, and those they build on.
    fn settle(&mut self, mut wanted: Vec<bool>) {
        for i in (0..self.pending.len()).rev() {
            if wanted[i] {
                for (wanted, earlier) in wanted.iter_mut().zip(&self.pending[..i]) {
                    *wanted |= self.pending[i].builds_on(earlier);
                }
            }
        }
        let mut left = Vec::new();
        for (change, wanted) in std::mem::take(&mut self.pending).into_iter().zip(wanted) {
            if wanted { self.apply(&change) } else { left.push(change) }
        }
        self.pending = left;
    }

    fn apply(&mut self, change: &Change) {
        let mut unnamed = Vec::new();
        if let Some((dir, name)) = &change.takes
            && let Some(Inode::Dir { durable, .. }) = self.inodes.get_mut(dir)
        {
            unnamed.extend(durable.remove(name));
        }
        if let Some((dir, name, inode)) = &change.gives
            && let Some(Inode::Dir { durable, .. }) = self.inodes.get_mut(dir)
        {
            // Counted since it was noted.
            unnamed.extend(durable.insert(name.clone(), *inode));
        }
        for inode in unnamed {
            self.change(inode, |content| content.durable_links -= 1);
        }
    }

    fn crash(&mut self) {
        self.life += 1;
        self.faults.clear();
        let mut lost: Vec<Change> = Vec::new();
        for change in std::mem::take(&mut self.pending) {
            if lost.iter().any(|earlier| change.builds_on(earlier)) || !self.coin() {
                lost.push(change);
            } else {
                self.apply(&change);
            }
        }
        let ids: Vec<u64> = self.inodes.keys().copied().collect();
        for id in ids {
            let mut coins = self.random();
            let mut coin = || {
                coins = coins.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                coins >> 63 == 1
            };
            match self.inodes.get_mut(&id) {
                Some(Inode::Dir { names, durable }) => names.clone_from(durable),
                Some(Inode::File(content)) => content.crash(&mut coin),
                None => {}
            }
        }
        self.collect();
    }

    /// Counts links anew and drops what nothing leads to.
    fn collect(&mut self) {
        let mut links: BTreeMap<u64, u32> = BTreeMap::new();
        let mut reached = vec![ROOT];
        while let Some(dir) = reached.pop() {
            let Some(Inode::Dir { names, .. }) = self.inodes.get(&dir) else { continue };
            for inode in names.values() {
                *links.entry(*inode).or_default() += 1;
                reached.push(*inode);
            }
        }
        self.inodes.retain(|id, inode| {
            let links = links.get(id).copied().unwrap_or(0);
            if let Inode::File(content) = inode {
                (content.links, content.durable_links, content.handles) = (links, links, 0);
            }
            *id == ROOT || links > 0
        });
        let files = self.inodes.values().map(|inode| match inode {
            Inode::File(content) => content.size(),
            Inode::Dir { .. } => 0,
        });
        self.taken = files.sum();
    }
}

impl Content {
    fn crash(&mut self, coin: &mut impl FnMut() -> bool) {
        let len = if coin() { self.bytes.len() } else { self.durable.len() };
        self.durable.resize(len, 0);
        for page in std::mem::take(&mut self.dirty) {
            if coin() {
                self.keep(page);
            }
        }
        self.bytes.clone_from(&self.durable);
        self.cached.clear();
        self.ahead = 0;
    }

    /// Makes a page durable, as far as the durable length goes.
    fn keep(&mut self, page: u64) {
        let [start, end] = [page * PAGE, (page + 1) * PAGE].map(|at| usize::try_from(at).unwrap_or(usize::MAX));
        let end = end.min(self.durable.len()).min(self.bytes.len());
        if start < end {
            self.durable[start..end].copy_from_slice(&self.bytes[start..end]);
        }
    }
}

impl Disk for Sim {
    fn create(&self, path: &str, space: Space) -> io::Result<Arc<dyn File>> {
        let mut world = self.world();
        world.step()?;
        let (len, ahead) = match space {
            Space::None => (0, 0),
            Space::Length(len) => (len, len),
            Space::Ahead(ahead) => (0, ahead),
        };
        if world.taken + ahead > world.capacity {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let modified = world.now;
        let bytes = vec![0; usize::try_from(len).map_err(|_| io::ErrorKind::StorageFull)?];
        let content = Content { bytes, ahead, modified, links: 1, handles: 1, ..Content::default() };
        let inode = world.add(path, Inode::File(content))?;
        Ok(Arc::new(Open { sim: self.clone(), inode, life: world.life }))
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let mut world = self.world();
        world.step()?;
        let inode = world.find(path)?;
        world.content(inode)?.handles += 1;
        Ok(Arc::new(Open { sim: self.clone(), inode, life: world.life }))
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        let mut world = self.world();
        world.step()?;
        world.add(path, Inode::Dir { names: BTreeMap::new(), durable: BTreeMap::new() })?;
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut world = self.world();
        world.step()?;
        if world.find(to).is_ok() {
            world.find(from)?;
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        world.moved(from, to)
    }

    fn replace(&self, from: &str, to: &str) -> io::Result<()> {
        let mut world = self.world();
        world.step()?;
        let replaced = world.find(to).ok();
        world.moved(from, to)?;
        if let Some(replaced) = replaced {
            world.change(replaced, |content| content.links -= 1);
        }
        Ok(())
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        let mut world = self.world();
        world.step()?;
        let dir = world.find(path)?;
        let wanted = world.pending.iter().map(|change| change.touches(dir)).collect();
        world.settle(wanted);
        Ok(())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let mut world = self.world();
        world.step()?;
        let inode = world.find(path)?;
        world.content(inode)?;
        world.unnamed(path)?;
        world.change(inode, |content| content.links -= 1);
        Ok(())
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        let mut world = self.world();
        world.step()?;
        let inode = world.find(path)?;
        if !world.names(inode)?.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        world.unnamed(path)
    }

    fn list(&self, path: &str) -> io::Result<Vec<Listed>> {
        let mut world = self.world();
        let dir = world.find(path)?;
        let names = world.names(dir)?.clone();
        let listed = names.into_iter().map(|(name, inode)| {
            let dir = matches!(world.inodes.get(&inode), Some(Inode::Dir { .. }));
            Listed { name, dir }
        });
        Ok(listed.collect())
    }

    fn stat(&self, path: &str) -> io::Result<Option<Meta>> {
        let mut world = self.world();
        match world.find(path) {
            Ok(inode) => {
                let content = world.content(inode)?;
                Ok(Some(Meta { len: content.bytes.len() as u64, modified: content.modified }))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn free(&self) -> io::Result<u64> {
        let world = self.world();
        Ok(world.capacity.saturating_sub(world.taken))
    }
}

impl World {
    fn moved(&mut self, from: &str, to: &str) -> io::Result<()> {
        let inode = self.find(from)?;
        let (from_dir, from_name) = self.place(from)?;
        let (to_dir, to_name) = self.place(to)?;
        self.names(to_dir)?.insert(to_name.to_owned(), inode);
        self.names(from_dir)?.remove(from_name);
        let takes = Some((from_dir, from_name.to_owned()));
        self.note(Change { takes, gives: Some((to_dir, to_name.to_owned(), inode)) });
        Ok(())
    }

    fn unnamed(&mut self, path: &str) -> io::Result<()> {
        let (dir, name) = self.place(path)?;
        self.names(dir)?.remove(name);
        self.note(Change { takes: Some((dir, name.to_owned())), gives: None });
        Ok(())
    }
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sim({} ops)", self.ops())
    }
}

#[derive(Debug)]
struct Open {
    sim: Sim,
    inode: u64,
    life: u64,
}

impl Open {
    fn world(&self) -> io::Result<MutexGuard<'_, World>> {
        let world = self.sim.world();
        if world.life == self.life { Ok(world) } else { Err(eio()) }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Ok(mut world) = self.world() {
            world.change(self.inode, |content| content.handles -= 1);
        }
    }
}

impl File for Open {
    fn len(&self) -> io::Result<u64> {
        Ok(self.world()?.content(self.inode)?.bytes.len() as u64)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut world = self.world()?;
        world.step()?;
        let end = offset + bytes.len() as u64;
        world.grow(self.inode, end)?;
        let now = world.now;
        let range = span(offset, end)?;
        world.change(self.inode, |content| {
            if content.bytes.len() < range.end {
                content.bytes.resize(range.end, 0);
            }
            content.bytes[range].copy_from_slice(bytes);
            content.modified = now;
            content.dirty.extend(pages(offset..end));
            content.cached.extend(pages(offset..end));
        });
        Ok(())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut world = self.world()?;
        world.step()?;
        let end = offset + buf.len() as u64;
        let content = world.content(self.inode)?;
        let bytes = content.bytes.get(span(offset, end)?).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        content.cached.extend(pages(offset..end));
        Ok(())
    }

    fn trim(&self, len: u64) -> io::Result<()> {
        let mut world = self.world()?;
        world.step()?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::StorageFull)?;
        world.change(self.inode, |content| {
            content.bytes.resize(len, 0);
            content.ahead = 0;
        });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut world = self.world()?;
        let result = world.step();
        let content = world.content(self.inode)?;
        let dirty = std::mem::take(&mut content.dirty);
        result?;
        content.durable.resize(content.bytes.len(), 0);
        dirty.into_iter().for_each(|page| content.keep(page));
        Ok(())
    }

    fn map(&self, len: u64) -> io::Result<Option<Arc<dyn Mapping>>> {
        if len == 0 {
            return Ok(None);
        }
        let mut world = self.world()?;
        let content = world.content(self.inode)?;
        if (content.bytes.len() as u64) < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        content.handles += 1;
        Ok(Some(Arc::new(Self { sim: self.sim.clone(), inode: self.inode, life: self.life })))
    }
}

/// The kernel's view of a mapping is a copy here: nothing else can look at it without noticing a crash.
impl Mapping for Open {
    fn bytes(self: Arc<Self>, range: Range<u64>) -> Bytes {
        let copy = || -> io::Result<Bytes> {
            let mut world = self.world()?;
            let content = world.content(self.inode)?;
            content.cached.extend(pages(range.clone()));
            let bytes = content.bytes.get(span(range.start, range.end)?).ok_or(io::ErrorKind::UnexpectedEof)?;
            Ok(Bytes::copy_from_slice(bytes))
        };
        // As EFAULT would be to a sender: it has less to send than it was promised.
        copy().unwrap_or_default()
    }

    fn resident(&self, range: Range<u64>) -> bool {
        let resident = || -> io::Result<bool> {
            let mut world = self.world()?;
            let content = world.content(self.inode)?;
            Ok(pages(range.clone()).all(|page| content.cached.contains(&page)))
        };
        resident().unwrap_or(false)
    }
}

fn pages(range: Range<u64>) -> Range<u64> {
    range.start / PAGE..range.end.div_ceil(PAGE)
}

fn span(start: u64, end: u64) -> io::Result<Range<usize>> {
    let at = |at| usize::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof));
    Ok(at(start)?..at(end)?)
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}
