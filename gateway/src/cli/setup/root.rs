//! Files below a root, which is `/` or the root of an image that is being built.
//!
//! Symbolic links are followed as a process would that has the root for its own: an absolute link stays below it.

use rustix::fs::fchown;
use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::{self, File, Metadata, OpenOptions, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Component, Path, PathBuf},
};
use thiserror::Error;

/// Longest file that is read, bytes: these are configurations that people write.
pub(super) const FILE_LEN_MAX: u64 = 1 << 20;
/// Most symbolic links on the way to one file, as in the kernel.
const LINKS_MAX: u32 = 40;
/// Most entries of a folder that are looked at.
const NAMES_MAX: usize = 4096;

/// Why a file was not read or written.
#[derive(Debug, Error)]
pub(super) enum Error {
    #[error("{path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is longer than {FILE_LEN_MAX} bytes: not a configuration that this command understands")]
    TooLong { path: PathBuf },
    #[error("{path} is not UTF-8: move it away, or write it anew")]
    NotText { path: PathBuf },
    #[error("{path} leads through more than {LINKS_MAX} symbolic links: repair them")]
    Links { path: PathBuf },
    #[error("{path} has more than {NAMES_MAX} entries: not a folder that this command understands")]
    Crowded { path: PathBuf },
}

/// Who may do what with a file that is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Access {
    /// As with the file that it replaces; everybody reads it, and its owner writes it, where there is none.
    Kept,
    /// Nobody but its owner.
    Private,
}

/// Where paths begin.
#[derive(Debug)]
pub(super) struct Root(PathBuf);

impl Root {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self(dir)
    }

    /// The path outside of the root, as it is told to people.
    pub(super) fn shown(&self, path: &Path) -> PathBuf {
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Where a file really is, all links followed; what is not there is taken as it is written.
    pub(super) fn resolve(&self, path: &Path) -> Result<PathBuf, Error> {
        let part = |component: Component<'_>| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from("..")),
            _ => None,
        };
        let mut left: VecDeque<OsString> = path.components().filter_map(part).collect();
        let (mut inside, mut links) = (PathBuf::new(), 0);
        while let Some(name) = left.pop_front() {
            if name == ".." {
                inside.pop();
                continue;
            }
            let next = inside.join(&name);
            let Ok(target) = fs::read_link(self.0.join(&next)) else {
                // No link, or not there.
                inside = next;
                continue;
            };
            links += 1;
            if links > LINKS_MAX {
                return Err(Error::Links { path: self.shown(path) });
            }
            if target.is_absolute() {
                inside = PathBuf::new();
            }
            for component in target.components().rev().filter_map(part) {
                left.push_front(component);
            }
        }
        Ok(self.0.join(inside))
    }

    /// A file's text; none where there is no file.
    pub(super) fn read(&self, path: &Path) -> Result<Option<String>, Error> {
        let real = self.resolve(path)?;
        let file = match File::open(&real) {
            Ok(file) => file,
            Err(error) if is_absence(&error) => return Ok(None),
            Err(source) => return Err(Error::Io { path: real, source }),
        };
        let mut bytes = Vec::new();
        file.take(FILE_LEN_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| Error::Io { path: real.clone(), source })?;
        if bytes.len() as u64 > FILE_LEN_MAX {
            return Err(Error::TooLong { path: real });
        }
        String::from_utf8(bytes).map(Some).map_err(|_| Error::NotText { path: real })
    }

    /// The names in a folder, sorted; none where there is no folder.
    pub(super) fn names(&self, dir: &Path) -> Result<Vec<String>, Error> {
        let real = self.resolve(dir)?;
        let entries = match fs::read_dir(&real) {
            Ok(entries) => entries,
            Err(error) if is_absence(&error) => return Ok(Vec::new()),
            Err(source) => return Err(Error::Io { path: real, source }),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|source| Error::Io { path: real.clone(), source })?;
            if names.len() == NAMES_MAX {
                return Err(Error::Crowded { path: real });
            }
            // A name that is not UTF-8 is none that anybody here looks for.
            names.extend(entry.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }

    /// The folders above a file that are not there yet, the outermost first.
    pub(super) fn missing_dirs(&self, path: &Path) -> Result<Vec<PathBuf>, Error> {
        let mut missing = Vec::new();
        for dir in path.ancestors().skip(1) {
            if self.resolve(dir)?.exists() {
                break;
            }
            missing.insert(0, dir.to_owned());
        }
        Ok(missing)
    }

    /// Puts a text in a file's place in one step that survives a power cut, making the folders above it.
    pub(super) fn write(&self, path: &Path, text: &str, access: Access) -> Result<(), Error> {
        let like = fs::metadata(self.resolve(path)?).ok();
        self.write_like(path, text, access, like)
    }

    /// As [`Self::write`], with the owner and the permissions of another file.
    pub(super) fn copy_of(&self, path: &Path, text: &str, of: &Path) -> Result<(), Error> {
        let like = fs::metadata(self.resolve(of)?).ok();
        self.write_like(path, text, Access::Kept, like)
    }

    fn write_like(&self, path: &Path, text: &str, access: Access, like: Option<Metadata>) -> Result<(), Error> {
        let real = self.resolve(path)?;
        let failed = |source| Error::Io { path: real.clone(), source };
        let dir = real.parent().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let missing: Vec<_> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
        fs::create_dir_all(dir).map_err(failed)?;
        missing.iter().filter_map(|dir| dir.parent()).try_for_each(sync).map_err(failed)?;
        let temporary = dir.join(format!(".shoal-setup-{}", std::process::id()));
        let written = put(&temporary, text, access, like).and_then(|()| fs::rename(&temporary, &real));
        if written.is_err() {
            // Nothing more to be done about it: the first error is the one to be told.
            let _ = fs::remove_file(&temporary);
        }
        written.and_then(|()| sync(dir)).map_err(failed)
    }

    /// Takes a file away.
    pub(super) fn remove(&self, path: &Path) -> Result<(), Error> {
        let real = self.resolve(path)?;
        let gone = match fs::remove_file(&real) {
            Err(error) if is_absence(&error) => Ok(()),
            Ok(()) => real.parent().map_or(Ok(()), sync),
            failed => failed,
        };
        gone.map_err(|source| Error::Io { path: real, source })
    }

    /// Takes a folder away where it is empty; whether it is gone.
    pub(super) fn remove_empty(&self, dir: &Path) -> Result<bool, Error> {
        let real = self.resolve(dir)?;
        // What somebody else has put there stays.
        Ok(fs::remove_dir(&real).is_ok() || !real.exists())
    }
}

fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn put(path: &Path, text: &str, access: Access, like: Option<Metadata>) -> io::Result<()> {
    // What an earlier run of the same process id left.
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    if access == Access::Kept {
        let mode = like.as_ref().map_or(0o644, |like| like.mode() & 0o7777);
        let ours = file.metadata()?;
        if let Some(like) = like.filter(|like| (like.uid(), like.gid()) != (ours.uid(), ours.gid())) {
            let (user, group) =
                (rustix::process::Uid::from_raw(like.uid()), rustix::process::Gid::from_raw(like.gid()));
            fchown(&file, Some(user), Some(group))?;
        }
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    file.sync_all()
}

fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_followed_below_the_root_and_never_out_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().to_owned());
        fs::create_dir_all(dir.path().join("usr/share/docker")).unwrap();
        fs::create_dir_all(dir.path().join("etc")).unwrap();
        symlink("/usr/share/docker", dir.path().join("etc/docker")).unwrap();
        symlink("../../../../../usr/share/docker/real.json", dir.path().join("usr/share/docker/daemon.json")).unwrap();
        let path = Path::new("/etc/docker/daemon.json");
        assert_eq!(root.resolve(path).unwrap(), dir.path().join("usr/share/docker/real.json"));
        assert_eq!(root.read(path).unwrap(), None);

        root.write(path, "{}", Access::Kept).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("usr/share/docker/real.json")).unwrap(), "{}");
        assert!(dir.path().join("usr/share/docker/daemon.json").is_symlink());
        assert_eq!(root.read(path).unwrap().as_deref(), Some("{}"));

        symlink("loop", dir.path().join("etc/loop")).unwrap();
        assert!(matches!(root.read(Path::new("/etc/loop")), Err(Error::Links { .. })));
    }

    #[test]
    fn permissions_are_kept_and_nothing_is_left_beside() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().to_owned());
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().mode() & 0o777;
        for (name, access, first) in [("/new", Access::Kept, 0o644), ("/secret", Access::Private, 0o600)] {
            root.write(Path::new(name), "1", access).unwrap();
            assert_eq!(mode(&name[1..]), first);
        }
        fs::set_permissions(dir.path().join("new"), Permissions::from_mode(0o640)).unwrap();
        root.write(Path::new("/new"), "2", Access::Kept).unwrap();
        root.copy_of(Path::new("/copy"), "2", Path::new("/new")).unwrap();
        assert_eq!((mode("new"), mode("copy")), (0o640, 0o640));
        assert_eq!(root.names(Path::new("/")).unwrap(), ["copy", "new", "secret"]);
    }

    #[test]
    fn folders_are_made_and_taken_away_again_where_they_are_empty() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().to_owned());
        let path = Path::new("/a/b/c/file");
        let made = root.missing_dirs(path).unwrap();
        assert_eq!(made, ["/a", "/a/b", "/a/b/c"].map(PathBuf::from));
        root.write(path, "", Access::Kept).unwrap();
        assert!(root.missing_dirs(path).unwrap().is_empty());
        fs::write(dir.path().join("a/other"), "").unwrap();
        root.remove(path).unwrap();
        let gone: Vec<_> = made.iter().rev().map(|dir| root.remove_empty(dir).unwrap()).collect();
        assert_eq!(gone, [true, true, false]);
        assert_eq!(root.names(Path::new("/a")).unwrap(), ["other"]);
    }

    #[test]
    fn what_is_no_configuration_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().to_owned());
        fs::write(dir.path().join("binary"), [0xff, 0xfe]).unwrap();
        fs::write(dir.path().join("long"), vec![b' '; 2 << 20]).unwrap();
        assert!(matches!(root.read(Path::new("/binary")), Err(Error::NotText { .. })));
        assert!(matches!(root.read(Path::new("/long")), Err(Error::TooLong { .. })));
        assert_eq!(root.read(Path::new("/binary/below")).unwrap(), None);
        assert!(matches!(root.read(Path::new("/")), Err(Error::Io { .. })));
    }
}
