//! Downloads on disk: space set aside, pieces put in their places, taken up again after a restart.

use super::{
    Blob, Claim, Error, PieceError, Store,
    files::{cache_dir, digest_of, partial_dir},
    life::State,
    record,
    table::Entry,
};
use crate::{disk::Space, handle::Proof, raw};
use peer_proto::{
    Algorithm, Layout, Namespace, PieceIndex, ProofError,
    chain::Lanes,
    layout::{self, Candidate},
};
use std::{io, sync::Arc};

impl Store {
    /// Takes up a download: sets space aside for it, evicting others for it where need be. Where the blob is here already,
    /// partial or whole, that is what comes back.
    pub fn begin(&self, layout: &Arc<Layout>, namespace: Option<&Namespace>) -> Result<Arc<Blob>, Error> {
        let digest = layout.digest();
        let claim = self.claim(digest);
        if let Some(blob) = self.load(&claim)? {
            if blob.is_whole() || blob.layout() == layout {
                return Ok(blob);
            }
            // Ours, the table's, and nobody else's: another layout may have its place.
            if Arc::strong_count(&blob) > 2 {
                return Err(Error::LayoutDiffers(*digest));
            }
            drop(blob);
            self.remove_partial(&claim);
        }
        self.reserve(layout.length())?;
        match self.make_partial(layout, namespace) {
            Ok(blob) => {
                let mut table = self.table();
                table.unreserve(layout.length());
                table.enter(digest, Entry { state: State::Partial, length: layout.length(), used: self.now() });
                drop(table);
                self.keep_open(&blob)?;
                Ok(blob)
            }
            Err(e) => {
                self.table().unreserve(layout.length());
                Err(e)
            }
        }
    }

    fn make_partial(&self, layout: &Arc<Layout>, namespace: Option<&Namespace>) -> Result<Arc<Blob>, Error> {
        let dir = partial_dir(layout.digest());
        let pieces = layout.geometry().pieces();
        // Leftovers that could not be removed when they should have been.
        self.discard(&dir)?;
        self.with_room(layout.length(), || {
            self.disk.create_dir(&dir)?;
            let made = self.disk.create(&format!("{dir}/data"), Space::Length(layout.length())).and_then(|data| {
                let sidecar = self.disk.create(&format!("{dir}/layout"), Space::None)?;
                sidecar.write_at(0, &record::encode_sidecar(layout, namespace))?;
                let record = self.disk.create(&format!("{dir}/pieces"), Space::None)?;
                record.write_at(0, &record::encode_pieces(self.options.boot, pieces, |_| false))?;
                let blob = Blob::new(Arc::clone(layout), namespace.cloned(), data, Arc::clone(&self.clock))?;
                blob.set_record(Some(record));
                Ok(Arc::new(blob))
            });
            if made.is_err() {
                self.remove_tree(&dir)?;
            }
            made
        })
    }

    /// Proves a piece.
    pub fn prove(&self, candidate: Candidate<'_>) -> Result<(), ProofError> {
        let Candidate { layout, piece, bytes } = candidate;
        match self.options.proof {
            Proof::Full => layout.prove(piece, bytes),
            Proof::Crc => layout.check_crc(piece, bytes),
        }
    }

    /// Proves several pieces, at once where that is cheaper (see [`Self::lanes`]).
    pub fn prove_together(&self, candidates: &[Candidate<'_>]) -> Vec<Result<(), ProofError>> {
        match self.lanes() {
            Some(lanes) => layout::prove_together(candidates, lanes),
            None => candidates.iter().map(|candidate| self.prove(*candidate)).collect(),
        }
    }

    /// How this processor proves several pieces at once; none where it cannot, or nothing is hashed.
    pub fn lanes(&self) -> Option<Lanes> {
        (self.options.proof == Proof::Full).then(raw::lanes).flatten()
    }

    /// Proves a piece and puts it in its place. False where it was there already.
    pub fn put(&self, blob: &Blob, piece: PieceIndex, bytes: &[u8]) -> Result<bool, PieceError> {
        self.place(blob, piece, bytes, self.prove(Candidate { layout: &blob.layout, piece, bytes }))
    }

    /// Puts a piece in its place, where it was proven. False where it was there already.
    pub(crate) fn place(
        &self,
        blob: &Blob,
        piece: PieceIndex,
        bytes: &[u8],
        proven: Result<(), ProofError>,
    ) -> Result<bool, PieceError> {
        if let Err(e) = proven {
            self.counters.pieces_refused.add(1);
            return Err(e.into());
        }
        if blob.is_gone() {
            return Err(PieceError::Gone);
        }
        if !blob.taken.set(piece) {
            return Ok(false);
        }
        let range = blob.layout.geometry().range(piece);
        let written = blob.file.write_at(range.start, bytes).and_then(|()| match blob.record() {
            // After the bytes: a note that outlives a kill speaks of bytes that do too.
            Some(record) => record.write_at(record::piece_offset(piece), &[1]),
            None => Ok(()),
        });
        if let Err(e) = written {
            blob.taken.clear(piece);
            self.counters.disk_errors.add(1);
            return Err(PieceError::Disk(e));
        }
        blob.checked(piece);
        blob.touch();
        self.counters.pieces_stored.add(1);
        self.counters.bytes_stored.add(bytes.len() as u64);
        Ok(true)
    }

    /// Opens a partial blob with the pieces that its record claims: as they are, where the kernel has run ever since; proven
    /// again one by one where it has not, because a power cut keeps notes and loses bytes as it likes.
    pub(super) fn load_partial(&self, claim: &Claim<'_>) -> Result<Option<Arc<Blob>>, Error> {
        let digest = &claim.digest;
        if self.table().state(digest) != State::Partial {
            return Ok(None);
        }
        let dir = partial_dir(digest);
        let sidecar = self.read_small(&format!("{dir}/layout"))?;
        let sound =
            sidecar.and_then(|bytes| record::decode_sidecar(&bytes)).filter(|(layout, _)| layout.digest() == digest);
        let Some((layout, namespace)) = sound else {
            self.remove_partial(claim);
            return Ok(None);
        };
        let data = self.disk.open(&format!("{dir}/data")).and_then(|file| Ok((file.len()?, file)));
        let file = match data {
            Ok((len, file)) if len == layout.length() => file,
            Ok(_) => {
                self.remove_partial(claim);
                return Ok(None);
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.remove_partial(claim);
                return Ok(None);
            }
            Err(e) => return Err(e.into()),
        };
        let blob = Blob::new(Arc::new(layout), namespace, file, Arc::clone(&self.clock))?;
        self.load_record(&blob, &dir)?;
        let blob = Arc::new(blob);
        self.enter_found(&blob, State::Partial);
        self.keep_open(&blob)?;
        blob.touch();
        Ok(Some(blob))
    }

    fn load_record(&self, blob: &Blob, dir: &str) -> Result<(), Error> {
        let geometry = blob.layout.geometry();
        let path = format!("{dir}/pieces");
        let bytes = self.read_small(&path)?;
        let claimed = bytes.as_deref().and_then(|bytes| record::decode_pieces(bytes, geometry.pieces()));
        let same_boot = claimed.is_some_and(|(boot, _)| boot == self.options.boot);
        if let Some((_, noted)) = claimed {
            for piece in geometry.all().filter(|piece| noted[piece.index()] == 1) {
                if same_boot {
                    blob.recovered(piece);
                } else if self.prove_again(blob, piece)? {
                    blob.checked(piece);
                }
            }
        }
        let record = match bytes {
            Some(_) => self.disk.open(&path)?,
            None => self.disk.create(&path, Space::None)?,
        };
        if !same_boot {
            let encoded = record::encode_pieces(self.options.boot, geometry.pieces(), |index| {
                geometry.piece(index).is_some_and(|piece| blob.pieces.has(piece))
            });
            // The notes before the boot id that vouches for them.
            let (header, noted) = encoded.split_at(encoded.len() - geometry.pieces() as usize);
            record.write_at(header.len() as u64, noted)?;
            record.write_at(0, header)?;
        }
        blob.set_record(Some(record));
        Ok(())
    }

    fn prove_again(&self, blob: &Blob, piece: PieceIndex) -> io::Result<bool> {
        let range = blob.layout.geometry().range(piece);
        let mut buf = vec![0; blob.layout.geometry().piece_len(piece) as usize];
        blob.file.read_at(range.start, &mut buf)?;
        Ok(match self.options.proof {
            Proof::Full => blob.layout.prove(piece, &buf).is_ok(),
            Proof::Crc => blob.layout.check_crc(piece, &buf).is_ok(),
        })
    }

    /// Takes note of the partial blobs that an earlier process left, without opening them.
    pub(super) fn recover_partials(&self, algorithm: Algorithm) -> io::Result<()> {
        let root = format!("{}/partial", algorithm.name());
        for listed in self.disk.list(&root)? {
            let path = format!("{root}/{}", listed.name);
            let digest = digest_of(algorithm, &listed.name);
            let data = self.disk.stat(&format!("{path}/data"))?;
            match (digest, data) {
                (Some(digest), Some(meta)) if self.disk.stat(&format!("{}/data", cache_dir(&digest)))?.is_none() => {
                    let entry = Entry { state: State::Partial, length: meta.len, used: meta.modified.as_secs() };
                    self.table().enter(&digest, entry);
                }
                _ if listed.dir => self.remove_tree(&path)?,
                _ => self.disk.remove(&path)?,
            }
        }
        Ok(())
    }

    /// Takes a partial blob away, without a word where the disk refuses: the next start sees to it.
    pub(super) fn remove_partial(&self, claim: &Claim<'_>) {
        let digest = &claim.digest;
        if let Err(error) = self.discard(&partial_dir(digest)) {
            tracing::warn!(%error, %digest, "partial blob could not be removed");
        }
        self.close_gone(digest);
        self.table().forget(digest);
    }
}
