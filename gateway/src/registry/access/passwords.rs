//! Names and their passwords, in a file as `htpasswd -B` writes it.

use super::Invalid;
use peer_proto::{Algorithm, Digest, chain::Hasher};
use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Semaphore;

/// Passwords checked at once: each takes a core for a while, on purpose.
const CHECKS_MAX: usize = 2;
/// Passwords remembered as right, so that each is checked once.
const REMEMBERED_MAX: usize = 10_000;
/// Longest file of names, bytes.
const FILE_LEN_MAX: u64 = 16 << 20;
/// What an unknown name's password is compared with, so that it takes as long as a known one's.
const NOBODY: &str = "$2b$10$abcdefghijklmnopqrstuu5Lo0g67CiD3M4RpN1BmBb4Crp5w7dbK";

/// The names, as the file had them last.
pub(super) struct Passwords {
    path: PathBuf,
    names: Mutex<Names>,
    checks: Semaphore,
}

#[derive(Default)]
struct Names {
    /// The file when it was looked at last, good or not.
    seen: Option<String>,
    hashes: BTreeMap<String, String>,
    /// Digests of names and passwords that were right.
    right: HashSet<Digest>,
}

impl Passwords {
    /// Reads the file. Blocks.
    pub(super) fn open(path: PathBuf) -> Result<Self, Invalid> {
        let passwords = Self { path, names: Mutex::default(), checks: Semaphore::new(CHECKS_MAX) };
        passwords.reload()?;
        Ok(passwords)
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the file again and takes what is new; whether there was anything. Blocks.
    pub(super) fn reload(&self) -> Result<bool, Invalid> {
        let path = &self.path;
        let read = || {
            if std::fs::metadata(path)?.len() > FILE_LEN_MAX {
                return Err(std::io::Error::other(format!("longer than {FILE_LEN_MAX} bytes")));
            }
            std::fs::read_to_string(path)
        };
        let seen = read().map_err(|error| Invalid::Read(path.clone(), error))?;
        let mut names = self.names();
        if names.seen.as_ref() == Some(&seen) {
            return Ok(false);
        }
        let hashes = parse(&seen).map_err(|line| Invalid::Line(path.clone(), line));
        names.seen = Some(seen);
        names.hashes = hashes?;
        names.right.clear();
        Ok(true)
    }

    /// Whether this is the name's password.
    pub(super) async fn is_right(&self, name: &str, password: String) -> bool {
        let (hash, known) = {
            let names = self.names();
            let hash = names.hashes.get(name).cloned();
            (hash.clone().unwrap_or_else(|| NOBODY.to_owned()), hash.is_some())
        };
        let key = key(name, &password, &hash);
        if self.names().right.contains(&key) {
            return true;
        }
        let Ok(_place) = self.checks.acquire().await else { return false };
        let right = tokio::task::spawn_blocking(move || bcrypt::verify(password, &hash).unwrap_or(false)).await;
        if !known || !right.unwrap_or(false) {
            return false;
        }
        let mut names = self.names();
        if names.right.len() >= REMEMBERED_MAX {
            names.right.clear();
        }
        names.right.insert(key);
        true
    }
}

/// Names and hashes; the number of the line that is neither, a comment nor empty.
fn parse(text: &str) -> Result<BTreeMap<String, String>, usize> {
    let lines = text.lines().map(str::trim).enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let names = lines.map(|(number, line)| {
        let sound = line.split_once(':').filter(|(name, hash)| {
            let kind = ["$2a$", "$2b$", "$2y$"].iter().any(|kind| hash.starts_with(kind));
            !name.is_empty() && hash.len() == NOBODY.len() && kind
        });
        sound.map(|(name, hash)| (name.to_owned(), hash.to_owned())).ok_or(number + 1)
    });
    names.collect()
}

/// Names a password that was right, without being it.
fn key(name: &str, password: &str, hash: &str) -> Digest {
    let mut hasher = Hasher::new(Algorithm::Sha512);
    for part in [name, password, hash] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_has_a_hash_that_can_be_compared_with() {
        assert!(bcrypt::verify("x", NOBODY).is_ok());
    }
}
