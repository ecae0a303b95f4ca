//! The end of a download or an upload: durable under its name; and finding it there later.

use super::{
    Blob, Claim, Error, Store,
    files::{cache_dir, parent, partial_dir},
    life::{Event, State},
    record,
    table::Entry,
};
use crate::disk::File;
use peer_proto::{Digest, Layout};
use std::{io, sync::Arc};

impl Store {
    /// Makes a blob of which every piece is here durable under its name. The blob that comes back is the one given, or the
    /// one that an upload has made whole meanwhile.
    pub fn finish(&self, blob: &Arc<Blob>) -> Result<Arc<Blob>, Error> {
        let digest = *blob.digest();
        let claim = self.claim(&digest);
        if blob.is_whole() {
            return Ok(Arc::clone(blob));
        }
        if let Some(other) = self.table().open(&digest)
            && other.is_whole()
        {
            return Ok(Arc::clone(other));
        }
        if blob.is_gone() {
            return Err(Error::Gone(digest));
        }
        if !blob.pieces.is_full() {
            return Err(Error::Incomplete(digest));
        }
        self.table().advance(&digest, Event::Complete);
        match self.check_recovered(blob).and_then(|()| self.name_partial(blob)) {
            Ok(()) => {
                self.table().advance(&digest, Event::Durable);
                blob.set_whole();
                self.counters.commits.add(1);
                Ok(Arc::clone(blob))
            }
            Err(Error::Damaged { reason, .. }) => {
                self.table().advance(&digest, Event::Failed);
                self.quarantine(&claim, &partial_dir(&digest), &reason)?;
                Err(Error::Damaged { digest, reason })
            }
            Err(e) => {
                // What the disk made of it is unknown: it must come again.
                self.table().advance(&digest, Event::Failed);
                self.counters.disk_errors.add(1);
                self.remove_partial(&claim);
                Err(e)
            }
        }
    }

    /// Pieces that an earlier process wrote were proven then; what matters is that the disk still has them.
    fn check_recovered(&self, blob: &Blob) -> Result<(), Error> {
        let mut buf = Vec::new();
        for piece in blob.layout.geometry().all().filter(|piece| !blob.seen.has(*piece)) {
            let range = blob.layout.geometry().range(piece);
            buf.resize(blob.layout.geometry().piece_len(piece) as usize, 0);
            blob.file.read_at(range.start, &mut buf)?;
            blob.layout
                .check_crc(piece, &buf)
                .map_err(|e| Error::Damaged { digest: *blob.digest(), reason: e.to_string() })?;
            blob.checked(piece);
        }
        Ok(())
    }

    fn name_partial(&self, blob: &Blob) -> Result<(), Error> {
        let dir = partial_dir(blob.digest());
        blob.file.sync()?;
        self.disk.open(&format!("{dir}/layout"))?.sync()?;
        self.name(&dir, blob.digest())?;
        let leftover = format!("{}/pieces", cache_dir(blob.digest()));
        if let Err(error) = self.disk.remove(&leftover) {
            // The blob is durable; a few bytes too many go with it one day.
            tracing::debug!(%error, leftover, "piece map of a whole blob stays");
        }
        Ok(())
    }

    /// Gives a directory with durable files its blob's name, durably.
    pub(super) fn name(&self, dir: &str, digest: &Digest) -> Result<(), Error> {
        self.disk.sync_dir(dir)?;
        let to = cache_dir(digest);
        let parent = parent(&to);
        self.make_durable(parent)?;
        match self.disk.rename(dir, &to) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                // Not loadable, or we would not be here.
                self.discard(&to)?;
                self.disk.rename(dir, &to)?;
            }
            other => other?,
        }
        if let Err(e) = self.disk.sync_dir(parent) {
            // Whether the name lasts is unknown, so nobody may find it and believe it does.
            self.discard(&to)?;
            return Err(e.into());
        }
        Ok(())
    }

    /// Makes sure that the name of a blob that is whole outlives a power cut.
    pub(super) fn settle(&self, digest: &Digest) -> Result<(), Error> {
        let dir = cache_dir(digest);
        self.make_durable(parent(&dir))?;
        Ok(self.disk.sync_dir(parent(&dir))?)
    }

    /// Enters a blob that was just made durable by other means than a download. It is here, whether it can be kept open or
    /// not.
    pub(super) fn enter_whole(&self, claim: &Claim<'_>, layout: &Arc<Layout>, file: Arc<dyn File>) {
        let entry = Entry { state: State::Whole, length: layout.length(), used: self.now() };
        self.table().enter(&claim.digest, entry);
        let opened = Blob::new(Arc::clone(layout), None, file, Arc::clone(&self.clock)).map_err(Error::from);
        let kept = opened.and_then(|blob| {
            layout.geometry().all().for_each(|piece| blob.checked(piece));
            blob.set_whole();
            self.keep_open(&Arc::new(blob))
        });
        if let Err(error) = kept {
            tracing::debug!(%error, digest = %claim.digest, "new blob is not kept open");
        }
    }

    pub(super) fn load_whole(&self, claim: &Claim<'_>) -> Result<Option<Arc<Blob>>, Error> {
        let digest = &claim.digest;
        let dir = cache_dir(digest);
        let Some(sidecar) = self.read_small(&format!("{dir}/layout"))? else {
            if self.table().state(digest) == State::Whole {
                // Somebody else deleted it.
                self.table().forget(digest);
            }
            return Ok(None);
        };
        let sound = record::decode_sidecar(&sidecar).filter(|(layout, _)| layout.digest() == digest);
        let opened = match sound {
            None => Err("its layout is damaged".to_owned()),
            Some((layout, namespace)) => match self.disk.open(&format!("{dir}/data")) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Err("its data is missing".to_owned()),
                Err(e) => return Err(e.into()),
                Ok(file) => match file.len()? {
                    len if len == layout.length() => Ok((Arc::new(layout), namespace, file)),
                    len => Err(format!("its data has {len} bytes, its layout says {}", layout.length())),
                },
            },
        };
        match opened {
            Ok((layout, namespace, file)) => {
                let blob = Blob::new(layout, namespace, file, Arc::clone(&self.clock))?;
                blob.layout.geometry().all().for_each(|piece| blob.recovered(piece));
                blob.set_whole();
                let blob = Arc::new(blob);
                self.enter_found(&blob, State::Whole);
                self.keep_open(&blob)?;
                blob.touch();
                Ok(Some(blob))
            }
            Err(reason) => {
                self.quarantine(claim, &dir, &reason)?;
                Ok(None)
            }
        }
    }
}
