//! The files that keys of tokens are kept in.

use super::keys::{Conflict, Keys, Private, parse_public};
use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

/// Most files of keys in one folder.
const FILES_MAX: usize = 32;
/// Most names in a folder that is looked through for them.
const FOLDER_MAX: usize = 1024;
/// Longest file of keys, bytes.
const FILE_LEN_MAX: u64 = 256 << 10;

/// Why there are no keys as configured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder cannot be read.
    #[error("{0}: {1}")]
    Read(PathBuf, #[source] std::io::Error),
    /// A file holds no key that can be used.
    #[error("{0}: {1}")]
    Parse(PathBuf, String),
    /// A folder has no file of keys, or too many.
    #[error("{0}: {1} files of keys ({2}), must be 1 to {FILES_MAX}")]
    Count(PathBuf, usize, &'static str),
    /// Keys that are each sound, but not together.
    #[error(transparent)]
    Conflict(#[from] Conflict),
}

/// Where keys are kept.
#[derive(Clone, Debug)]
pub struct Paths {
    /// A private key, or a folder of `.pem` files with one each.
    pub signing: Option<PathBuf>,
    /// Public keys, or a folder of `.json` and `.pem` files of them.
    pub trusted: Option<PathBuf>,
}

/// The files of keys with what they held when they were looked at.
#[derive(PartialEq, Eq, Default)]
pub struct Seen {
    signing: Vec<(PathBuf, Vec<u8>)>,
    trusted: Vec<(PathBuf, Vec<u8>)>,
}

impl Paths {
    /// Reads the files. Blocks.
    pub fn read(&self) -> Result<Seen, Error> {
        let files = |path: &Option<PathBuf>, kinds| path.as_deref().map(|path| files(path, kinds)).transpose();
        Ok(Seen {
            signing: files(&self.signing, &["pem"])?.unwrap_or_default(),
            trusted: files(&self.trusted, &["json", "pem"])?.unwrap_or_default(),
        })
    }
}

impl Seen {
    /// The keys in the files. The private key in the file that is last by name signs; the others before it are still good.
    pub fn parse(&self) -> Result<Keys, Error> {
        let mut keys = Keys::default();
        for (path, text) in &self.signing {
            let key = Private::parse(text).map_err(|why| Error::Parse(path.clone(), why))?;
            keys.sign_with(key)?;
        }
        for (path, text) in &self.trusted {
            for key in parse_public(text).map_err(|why| Error::Parse(path.clone(), why))? {
                keys.trust(key)?;
            }
        }
        Ok(keys)
    }
}

/// A file, or those of a folder with one of these endings, by name. Names that begin with a dot are none: orchestrators keep the
/// content of mounted folders behind such.
fn files(path: &Path, kinds: &'static [&'static str]) -> Result<Vec<(PathBuf, Vec<u8>)>, Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| Error::Read(path, error)
    };
    let content = |path: PathBuf| {
        let mut bytes = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(FILE_LEN_MAX + 1).read_to_end(&mut bytes));
        read.map_err(failed(&path))?;
        if bytes.len() as u64 > FILE_LEN_MAX {
            return Err(Error::Parse(path, format!("longer than {FILE_LEN_MAX} bytes")));
        }
        Ok((path, bytes))
    };
    if !std::fs::metadata(path).map_err(failed(path))?.is_dir() {
        return Ok(vec![content(path.to_owned())?]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed(path))?.take(FOLDER_MAX) {
        let entry = entry.map_err(failed(path))?.path();
        let hidden = entry.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let kind = entry.extension().and_then(|kind| kind.to_str()).unwrap_or_default();
        if !hidden && kinds.contains(&kind) {
            found.push(entry);
        }
    }
    if !(1..=FILES_MAX).contains(&found.len()) {
        let endings = if kinds.len() == 1 { ".pem" } else { ".json, .pem" };
        return Err(Error::Count(path.to_owned(), found.len(), endings));
    }
    found.sort_unstable();
    found.into_iter().map(content).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::keys::Algorithm, *};
    use tempfile::TempDir;

    #[test]
    fn folders_are_read_by_name_and_the_last_key_signs() {
        let dir = TempDir::new().unwrap();
        let paths = Paths { signing: Some(dir.path().to_owned()), trusted: None };
        assert!(matches!(paths.read(), Err(Error::Count(_, 0, _))));
        let put = |name: &str| {
            let pem = Private::generate(Algorithm::EdDsa).unwrap();
            std::fs::write(dir.path().join(name), &pem).unwrap();
            Private::parse(pem.as_bytes()).unwrap().public().clone()
        };
        let (new, old) = (put("2026-02.pem"), put("2026-01.pem"));
        for other in ["notes.txt", ".2027.pem"] {
            std::fs::write(dir.path().join(other), "no key").unwrap();
        }
        let seen = paths.read().unwrap();
        let keys = seen.parse().unwrap();
        assert_eq!(keys.signing().unwrap().public(), &new);
        assert_eq!((keys.find(Some(old.id())), keys.find(None)), (Some(&old), None), "both are good");
        assert!(paths.read().unwrap() == seen);
        for number in 0..FILES_MAX {
            put(&format!("{number}.pem"));
        }
        assert!(matches!(paths.read(), Err(Error::Count(_, 34, _))));
        let nowhere = Paths { signing: None, trusted: Some("/nowhere/x".into()) };
        assert!(matches!(nowhere.read(), Err(Error::Read(..))));
        std::fs::write(dir.path().join("notes.txt"), vec![b' '; 300 << 10]).unwrap();
        let long = Paths { signing: None, trusted: Some(dir.path().join("notes.txt")) };
        assert!(matches!(long.read(), Err(Error::Parse(..))));
    }
}
