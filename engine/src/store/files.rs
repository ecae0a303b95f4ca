//! Names on the disk, and the few things done to files that have nothing to do with blobs.

use super::{Store, record};
use crate::disk::Space;
use peer_proto::{Algorithm, Digest, PeerId};
use std::{
    io,
    sync::{PoisonError, atomic::Ordering::Relaxed},
};

impl Store {
    /// The node's name: the one kept here, or else `draw`, which is kept from now on.
    pub fn identity(&self, draw: impl FnOnce() -> PeerId) -> io::Result<PeerId> {
        let kept = self.read_small("id")?.and_then(|text| std::str::from_utf8(&text).ok()?.trim().parse().ok());
        if let Some(id) = kept {
            return Ok(id);
        }
        let id = draw();
        match self.disk.remove("id.new") {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        let file = self.disk.create("id.new", Space::None)?;
        file.write_at(0, format!("{id}\n").as_bytes())?;
        file.sync()?;
        self.disk.replace("id.new", "id")?;
        self.disk.sync_dir("")?;
        Ok(id)
    }

    /// Makes a directory, and its parents, with names that outlive a power cut.
    pub(super) fn make_durable(&self, path: &str) -> io::Result<()> {
        let durable = || self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        if path.is_empty() || durable().contains(path) {
            return Ok(());
        }
        self.make_durable(parent(path))?;
        match self.disk.create_dir(path) {
            // Perhaps made by somebody who has not synced its parent yet.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        self.disk.sync_dir(parent(path))?;
        durable().insert(path.to_owned());
        Ok(())
    }

    /// Deletes a directory: out of the way at once, then file by file.
    pub(super) fn discard(&self, dir: &str) -> io::Result<()> {
        let trash = format!("trash/{}", self.serial.fetch_add(1, Relaxed));
        match self.disk.rename(dir, &trash) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
            Ok(()) => self.remove_tree(&trash),
        }
    }

    /// Deletes a directory and what is in it; a no-op where there is none.
    pub(super) fn remove_tree(&self, path: &str) -> io::Result<()> {
        let listed = match self.disk.list(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for listed in listed {
            let path = format!("{path}/{}", listed.name);
            if listed.dir { self.remove_tree(&path)? } else { self.disk.remove(&path)? }
        }
        self.disk.remove_dir(path)
    }

    /// A small file's bytes; none where it is missing, or too long to be what it should.
    pub(super) fn read_small(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match self.disk.open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let len = file.len()?;
        let Some(len) = usize::try_from(len).ok().filter(|_| len <= record::SIDECAR_LEN_MAX) else { return Ok(None) };
        let mut bytes = vec![0; len];
        file.read_at(0, &mut bytes)?;
        Ok(Some(bytes))
    }
}

pub(super) fn cache_dir(digest: &Digest) -> String {
    let hex = digest.hex();
    format!("{}/cache/{}/{}/{hex}", digest.algorithm().name(), &hex[..2], &hex[2..4])
}

pub(super) fn partial_dir(digest: &Digest) -> String {
    format!("{}/partial/{}", digest.algorithm().name(), digest.hex())
}

pub(super) fn pin_path(digest: &Digest) -> String {
    format!("{}/pins/{}", digest.algorithm().name(), digest.hex())
}

pub(super) fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

pub(super) fn digest_of(algorithm: Algorithm, hex: &str) -> Option<Digest> {
    format!("{}:{hex}", algorithm.name()).parse().ok()
}
