//! A directory tree as a store: the embedded default, and any shared file system.
//!
//! ```text
//! root/.partial/<pid>-<n>          a write under way, locked by its writer
//! root/docker/registry/v2/...      objects, each under its name
//! ```
//!
//! An object appears by rename after its bytes are on the disk, and is acknowledged once its directories are too. Several
//! processes may share a root. Symbolic links are followed where an operator put them on the way to an object, but not listed.

use crate::{
    Answer, Backend, Content, Error, List, Object, Page,
    backend::within,
    name::{NAME_LEN_MAX, check, check_prefix},
};
use bytes::Bytes;
use futures_util::{
    StreamExt, TryStreamExt,
    future::FutureExt,
    stream::{self},
};
use rustix::{fs::FallocateFlags, io::Errno};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    fs::{self, File, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    ops::Range,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Bytes read at a time.
const READ_LEN: usize = 1 << 20;
/// Bytes gathered before they are written.
const WRITE_LEN: usize = 1 << 20;
/// Where writes under way live; no object may be in it.
const PARTIAL_DIR: &str = ".partial";
/// Directories known to be on the disk, before they are looked at anew. About 10 MB.
const DURABLE_DIRS_MAX: usize = 64 << 10;
/// Tries of a commit whose directories others remove meanwhile.
const COMMIT_TRIES: u32 = 16;

/// A directory tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// The tree's root; made where it is missing.
    pub root: PathBuf,
}

/// The store. Its file work runs on tokio's blocking threads.
#[derive(Debug)]
pub struct Fs {
    tree: Arc<Tree>,
}

impl Fs {
    /// Opens a tree and removes what dead writers left. Blocks.
    pub fn open(config: &FsConfig) -> Result<Self, Error> {
        fs::create_dir_all(config.root.join(PARTIAL_DIR))?;
        let tree = Tree { root: config.root.canonicalize()?, serial: AtomicU64::new(0), durable: Mutex::default() };
        // The root may be new: its own entry, and the one beside it, have to last as well.
        if let Some(above) = tree.root.parent() {
            sync_dir(above)?;
        }
        sync_dir(&tree.root)?;
        tree.sweep()?;
        Ok(Self { tree: Arc::new(tree) })
    }

    async fn open_for_read(&self, name: &str, range: Option<Range<u64>>) -> Result<Object, Error> {
        let path = self.tree.path(name)?;
        let (file, size, range) = blocking(move || {
            let mut file = File::open(&path).map_err(absent)?;
            let meta = file.metadata()?;
            if !meta.is_file() {
                return Err(Error::NotFound);
            }
            let range = within(range, meta.len())?;
            file.seek(SeekFrom::Start(range.start))?;
            Ok((file, meta.len(), range))
        })
        .await?;
        let left = range.end - range.start;
        let bytes = stream::try_unfold((file, left), |(mut file, left)| async move {
            if left == 0 {
                return Ok(None);
            }
            let (file, part) = blocking(move || {
                let part = read_part(&mut file, left)?;
                Ok((file, part))
            })
            .await?;
            let left = left - part.len() as u64;
            Ok(Some((part, (file, left))))
        });
        Ok(Object { size, range, bytes: bytes.boxed() })
    }

    async fn put(&self, name: &str, content: Content) -> Result<(), Error> {
        let path = self.tree.path(name)?;
        let size = content.size();
        let tree = self.tree.clone();
        let mut partial = blocking(move || tree.start(size)).await?;
        let mut parts = content.into_stream();
        let mut gathered: Vec<Bytes> = Vec::new();
        let mut len = 0;
        loop {
            let part = parts.try_next().await?;
            let end = part.is_none();
            if let Some(part) = part {
                len += part.len();
                gathered.push(part);
            }
            if len >= WRITE_LEN || (end && len > 0) {
                let parts = std::mem::take(&mut gathered);
                len = 0;
                partial = blocking(move || {
                    for part in parts {
                        partial.file.write_all(&part)?;
                    }
                    Ok(partial)
                })
                .await?;
            }
            if end {
                break;
            }
        }
        let tree = self.tree.clone();
        blocking(move || tree.commit(partial, &path)).await
    }
}

impl Backend for Fs {
    fn stat<'a>(&'a self, name: &'a str) -> Answer<'a, u64> {
        async move {
            let path = self.tree.path(name)?;
            blocking(move || {
                let meta = fs::metadata(&path).map_err(absent)?;
                if meta.is_file() { Ok(meta.len()) } else { Err(Error::NotFound) }
            })
            .await
        }
        .boxed()
    }

    fn read<'a>(&'a self, name: &'a str, range: Option<Range<u64>>) -> Answer<'a, Object> {
        self.open_for_read(name, range).boxed()
    }

    fn write<'a>(&'a self, name: &'a str, content: Content) -> Answer<'a, ()> {
        self.put(name, content).boxed()
    }

    fn list<'a>(&'a self, list: List<'a>) -> Answer<'a, Page> {
        async move {
            check_prefix(list.prefix)?;
            let tree = self.tree.clone();
            let prefix = list.prefix.to_owned();
            let mut walk =
                Walk { prefix, after: list.after.map(str::to_owned), limit: list.limit(), page: Page::default() };
            blocking(move || {
                let base = walk.prefix.rfind('/').map_or("", |slash| &walk.prefix[..=slash]).to_owned();
                walk.directory(&tree.root.join(&base), &base)?;
                Ok(walk.page)
            })
            .await
        }
        .boxed()
    }

    fn delete<'a>(&'a self, name: &'a str) -> Answer<'a, ()> {
        async move {
            let path = self.tree.path(name)?;
            let tree = self.tree.clone();
            blocking(move || tree.remove(&path)).await
        }
        .boxed()
    }
}

/// Runs file work on a blocking thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(stopping) => Err(Error::Unavailable(stopping.into())),
        },
    }
}

/// A file below a file is as absent as any other.
fn absent(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotADirectory => Error::NotFound,
        _ => error.into(),
    }
}

/// Reads the next part of a file of which `left` bytes are still wanted.
fn read_part(file: &mut File, left: u64) -> Result<Bytes, Error> {
    let want = usize::try_from(left).unwrap_or(READ_LEN).min(READ_LEN);
    let mut part = Vec::with_capacity(want);
    file.take(want as u64).read_to_end(&mut part)?;
    if part.len() < want {
        return Err(Error::Failed(format!("file ended {} bytes early", left - part.len() as u64).into()));
    }
    Ok(part.into())
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Syncs a directory, unless it was emptied and removed meanwhile: then there is nothing to keep.
fn sync_dir_if_there(path: &Path) -> io::Result<()> {
    match sync_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[derive(Debug)]
struct Tree {
    root: PathBuf,
    /// Numbers this process's partial files.
    serial: AtomicU64,
    /// Directories whose entries above them are on the disk up to the root.
    durable: Mutex<HashSet<PathBuf>>,
}

impl Tree {
    fn path(&self, name: &str) -> Result<PathBuf, Error> {
        check(name)?;
        if name.split('/').next() == Some(PARTIAL_DIR) {
            return Err(Error::Invalid(format!("{PARTIAL_DIR} is the store's own")));
        }
        Ok(self.root.join(name))
    }

    fn durable(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes partial files whose writers are gone: a living one holds a lock.
    fn sweep(&self) -> Result<(), Error> {
        for entry in fs::read_dir(self.root.join(PARTIAL_DIR))? {
            let path = entry?.path();
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error.into()),
            };
            match file.try_lock() {
                Ok(()) => remove_if_there(&path)?,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Starts a write: a locked file of its own, with room for `size` bytes where known.
    fn start(&self, size: Option<u64>) -> Result<Partial, Error> {
        let partial = loop {
            let serial = self.serial.fetch_add(1, Ordering::Relaxed);
            let path = self.root.join(PARTIAL_DIR).join(format!("{}-{serial}", std::process::id()));
            let file = match File::options().write(true).create_new(true).open(&path) {
                Ok(file) => file,
                // Of a process that had our number in another container, or before us.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error.into()),
            };
            // Between the creation and the lock another process's sweep may have taken the file for a dead one.
            match file.try_lock() {
                Ok(()) if file.metadata()?.nlink() > 0 => break Partial { path, file },
                Ok(()) | Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => {
                    remove_if_there(&path)?;
                    return Err(error.into());
                }
            }
        };
        if let Some(size) = size.filter(|size| *size > 0) {
            // A full disk shows before the first byte. KEEP_SIZE: the file is as long as what is written.
            match rustix::fs::fallocate(&partial.file, FallocateFlags::KEEP_SIZE, 0, size) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(partial)
    }

    /// Makes a finished write an object: bytes, then name, then directories.
    fn commit(&self, partial: Partial, path: &Path) -> Result<(), Error> {
        // A failed sync is final: the pages count as clean afterwards. The file goes, the caller writes anew.
        partial.file.sync_data()?;
        let above = path.parent().unwrap_or(&self.root);
        for _ in 0..COMMIT_TRIES {
            match self.make_dirs(above).and_then(|()| fs::rename(&partial.path, path)) {
                Ok(()) => return Ok(sync_dir_if_there(above)?),
                // The last object beside ours was removed, and the directory with it.
                Err(error) if error.kind() == io::ErrorKind::NotFound && partial.path.try_exists()? => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Unavailable(format!("{} vanished {COMMIT_TRIES} times", above.display()).into()))
    }

    /// Makes a directory and those above it, durably. Another writer may have made one and not yet synced it, so that
    /// "exists" is not enough: only what this process has synced itself counts.
    fn make_dirs(&self, dir: &Path) -> io::Result<()> {
        let missing = !dir.try_exists()?;
        if dir == self.root || (!missing && self.durable().contains(dir)) {
            return Ok(());
        }
        let above = dir.parent().unwrap_or(&self.root);
        self.make_dirs(above)?;
        if missing {
            match fs::create_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        sync_dir(above)?;
        let mut durable = self.durable();
        if durable.len() >= DURABLE_DIRS_MAX {
            durable.clear();
        }
        durable.insert(dir.to_owned());
        Ok(())
    }

    /// Removes an object, and the directories it leaves empty.
    fn remove(&self, path: &Path) -> Result<(), Error> {
        if fs::symlink_metadata(path).map_err(absent)?.is_dir() {
            return Err(Error::NotFound);
        }
        fs::remove_file(path).map_err(absent)?;
        let mut dir = path.parent();
        while let Some(empty) = dir.filter(|dir| *dir != self.root) {
            match fs::remove_dir(empty) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    // In use, or not ours to remove: it stays.
                    return Ok(sync_dir_if_there(empty)?);
                }
                _ => self.durable().remove(empty),
            };
            dir = empty.parent();
        }
        Ok(sync_dir(&self.root)?)
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A write under way. Dropped before its commit, it leaves nothing.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
    file: File,
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After a commit the name is gone; what cannot be removed now, the next sweep takes.
        let _ = fs::remove_file(&self.path);
    }
}

/// A listing under way.
struct Walk {
    prefix: String,
    after: Option<String>,
    limit: usize,
    page: Page,
}

impl Walk {
    /// Adds the names in `dir`, all of which begin with `base`, until the page is full.
    fn directory(&mut self, dir: &Path, base: &str) -> Result<(), Error> {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            // Emptied and removed meanwhile, or never there.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            // A directory stands for names that go on with a slash, and sorts like them.
            let name = match () {
                () if kind.is_dir() => format!("{base}{name}/"),
                () if kind.is_file() => format!("{base}{name}"),
                () => continue,
            };
            if self.wants(&name) {
                names.push(name);
            }
        }
        names.sort_unstable();
        for name in names {
            if self.page.more {
                break;
            }
            if name.ends_with('/') {
                self.directory(&dir.join(&name[base.len()..]), &name)?;
            } else if self.page.names.len() < self.limit {
                self.page.names.push(name);
            } else {
                self.page.more = true;
            }
        }
        Ok(())
    }

    /// Whether the name, or names in the directory where it ends with a slash, belong to the listing.
    fn wants(&self, name: &str) -> bool {
        let dir = name.ends_with('/');
        let in_prefix = name.starts_with(&self.prefix) || (dir && self.prefix.starts_with(name));
        let after = self.after.as_deref().is_none_or(|after| name > after || (dir && after.starts_with(name)));
        let partial = name.strip_suffix('/') == Some(PARTIAL_DIR);
        in_prefix && after && !partial && name.len() <= NAME_LEN_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance;
    use futures_util::future::join_all;

    fn store() -> (tempfile::TempDir, Fs) {
        let dir = tempfile::tempdir().unwrap();
        let store = Fs::open(&FsConfig { root: dir.path().join("blobs") }).unwrap();
        (dir, store)
    }

    fn partials(dir: &tempfile::TempDir) -> usize {
        fs::read_dir(dir.path().join("blobs").join(PARTIAL_DIR)).unwrap().count()
    }

    #[tokio::test]
    async fn conforms() {
        let (dir, store) = store();
        conformance::all(Arc::new(store)).await;
        assert_eq!(partials(&dir), 0);
    }

    #[tokio::test]
    async fn objects_outlive_the_process_and_leftovers_do_not() {
        let (dir, store) = store();
        store.write("a/b", "kept".into()).await.unwrap();
        let dead = dir.path().join("blobs").join(PARTIAL_DIR).join("1-0");
        fs::write(&dead, "left by a dead writer").unwrap();
        let alive = store.tree.start(Some(1 << 20)).unwrap();
        let again = Fs::open(&FsConfig { root: dir.path().join("blobs") }).unwrap();
        assert!(!dead.exists());
        assert!(alive.path.exists(), "a living writer's file stays");
        assert_eq!(again.read("a/b", None).await.unwrap().collect(10).await.unwrap(), "kept");
        drop(alive);
        assert_eq!(partials(&dir), 0);
    }

    #[tokio::test]
    async fn a_dropped_write_leaves_nothing() {
        let (dir, store) = store();
        let (mut parts, bytes) = endless();
        let write = store.write("x", Content::stream(None, bytes));
        parts.push(Bytes::from(vec![7; 3 << 20]));
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), write).await.is_err());
        assert!(matches!(store.stat("x").await, Err(Error::NotFound)));
        drop(parts);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while partials(&dir) > 0 {
            assert!(std::time::Instant::now() < deadline, "the partial file stays");
            tokio::task::yield_now().await;
        }
    }

    /// A stream that gives what is pushed and never ends.
    fn endless() -> (Parts, impl futures_util::Stream<Item = Result<Bytes, Error>> + Send + 'static) {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        let parts = stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|b| (Ok(b), receiver)) });
        (Parts(sender), parts)
    }

    struct Parts(tokio::sync::mpsc::UnboundedSender<Bytes>);

    impl Parts {
        fn push(&mut self, bytes: Bytes) {
            self.0.send(bytes).unwrap();
        }
    }

    #[tokio::test]
    async fn removal_takes_empty_directories_and_never_a_writer_down() {
        let (dir, store) = store();
        store.write("a/b/c", "1".into()).await.unwrap();
        store.write("a/d", "2".into()).await.unwrap();
        store.delete("a/b/c").await.unwrap();
        assert!(!dir.path().join("blobs/a/b").exists());
        assert!(dir.path().join("blobs/a/d").exists());
        let rounds = (0..200).map(|i| {
            let store = &store;
            async move {
                let name = format!("r/{}/{}", i % 3, i % 2);
                store.write(&name, "x".into()).await.unwrap();
                match store.delete(&name).await {
                    Ok(()) | Err(Error::NotFound) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
        join_all(rounds).await;
        assert!(!dir.path().join("blobs/r").exists());
    }

    #[tokio::test]
    async fn the_stores_own_directory_is_out_of_reach() {
        let (_dir, store) = store();
        assert!(matches!(store.write(".partial/x", "".into()).await, Err(Error::Invalid(_))));
        assert!(matches!(store.stat(".partial").await, Err(Error::Invalid(_))));
        let _alive = store.tree.start(None).unwrap();
        assert_eq!(store.list(List::default()).await.unwrap(), Page::default());
    }
}
