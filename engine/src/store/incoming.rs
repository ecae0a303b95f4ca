//! A blob on its way in from a client or a backend, in order: written and hashed as it comes.

use super::{Error, Store, life::State, record, table::Seat};
use crate::disk::{File, Space};
use peer_proto::{Algorithm, Digest, Layout, LayoutBuilder};
use std::{fmt, io, sync::Arc};
use uuid::Uuid;

/// Bytes read at once when an upload is hashed again.
const REHASH_LEN: usize = 1 << 20;

/// An upload and its writer's right to it. Whoever has it gives it back by [`Store::park_upload`], [`Store::commit_upload`] or
/// [`Store::drop_upload`].
pub struct Incoming {
    pub(super) id: Uuid,
    algorithm: Algorithm,
    file: Arc<dyn File>,
    builder: LayoutBuilder,
    /// Bytes that count against the quota for it, at least those written.
    pub(super) reserved: u64,
    /// Bytes set aside on disk when it was made.
    ahead: u64,
}

impl Incoming {
    /// Its name.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// What it is hashed by as it comes.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Bytes written.
    pub fn len(&self) -> u64 {
        self.builder.len()
    }

    /// Has the disk begin to take what was written from `start` on (see [`File::begin_sync`]); to be called on a thread that may
    /// wait for the disk.
    pub(crate) fn begin_sync(&self, start: u64) -> impl FnOnce() + Send + use<> {
        let (file, range) = (Arc::clone(&self.file), start..self.len());
        move || file.begin_sync(range)
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Incoming({}, {} bytes)", self.id, self.len())
    }
}

impl Store {
    /// Begins an upload, with space for `size` bytes where that is known.
    pub fn create_upload(&self, id: Uuid, algorithm: Algorithm, size: Option<u64>) -> Result<Incoming, Error> {
        let ahead = size.unwrap_or(0);
        self.seat_upload(id)?;
        let made = self
            .reserve(ahead)
            .and_then(|()| self.make_upload(id, algorithm, ahead).inspect_err(|_| self.table().unreserve(ahead)));
        match made {
            Ok(file) => {
                Ok(Incoming { id, algorithm, file, builder: LayoutBuilder::new(algorithm), reserved: ahead, ahead })
            }
            Err(e) => {
                self.table().uploads.remove(&id);
                Err(e)
            }
        }
    }

    fn seat_upload(&self, id: Uuid) -> Result<(), Error> {
        let mut table = self.table();
        if table.uploads.len() >= super::table::UPLOADS_MAX {
            return Err(Error::Busy("table of uploads"));
        }
        if table.uploads.contains_key(&id) {
            return Err(Error::UploadInUse);
        }
        table.uploads.insert(id, Seat::Taken { leaving: false });
        Ok(())
    }

    fn make_upload(&self, id: Uuid, algorithm: Algorithm, ahead: u64) -> Result<Arc<dyn File>, Error> {
        let dir = upload_dir(id);
        self.with_room(ahead, || {
            self.disk.create_dir(&dir)?;
            let made = self.disk.create(&format!("{dir}/data"), Space::Ahead(ahead)).and_then(|file| {
                let state = self.disk.create(&format!("{dir}/state"), Space::None)?;
                state.write_at(0, &record::encode_upload(self.options.boot, algorithm))?;
                Ok(file)
            });
            if made.is_err() {
                self.remove_tree(&dir)?;
            }
            made
        })
    }

    /// Takes up an upload that nobody writes to. One that an earlier process left is hashed again, which takes as long as
    /// reading it.
    pub fn resume_upload(&self, id: Uuid) -> Result<Incoming, Error> {
        let mut table = self.table();
        let seat = table.uploads.get_mut(&id).ok_or(Error::UploadUnknown)?;
        match std::mem::replace(seat, Seat::Taken { leaving: false }) {
            Seat::Taken { leaving } => {
                *seat = Seat::Taken { leaving };
                Err(if leaving { Error::UploadLeaving } else { Error::UploadInUse })
            }
            Seat::Parked { incoming, .. } => Ok(*incoming),
            Seat::OnDisk { len, since } => {
                drop(table);
                self.rehash_upload(id, len).inspect_err(|_| {
                    self.table().uploads.insert(id, Seat::OnDisk { len, since });
                })
            }
        }
    }

    fn rehash_upload(&self, id: Uuid, len: u64) -> Result<Incoming, Error> {
        let dir = upload_dir(id);
        let state = self.read_small(&format!("{dir}/state"))?.ok_or(Error::UploadUnknown)?;
        let (_, algorithm) = record::decode_upload(&state).ok_or(Error::UploadUnknown)?;
        let file = self.disk.open(&format!("{dir}/data"))?;
        let builder = hash(&*file, len, algorithm)?;
        Ok(Incoming { id, algorithm, file, builder, reserved: len, ahead: len })
    }

    /// Writes the next bytes. After an error nothing of them counts, and the same bytes may be written again.
    pub fn append_upload(&self, incoming: &mut Incoming, bytes: &[u8]) -> Result<(), Error> {
        let end = incoming.len() + bytes.len() as u64;
        if end > peer_proto::layout::LEN_MAX {
            return Err(Error::TooLong);
        }
        if end > incoming.reserved {
            let more = end - incoming.reserved;
            self.reserve(more)?;
            incoming.reserved = end;
        }
        self.with_room(bytes.len() as u64, || incoming.file.write_at(incoming.len(), bytes))?;
        incoming.builder.update(bytes).map_err(|_| Error::TooLong)
    }

    /// Says that an upload is about to be parked, so that who wants to resume it knows that it is worth waiting.
    pub fn leave_upload(&self, id: Uuid) {
        if let Some(Seat::Taken { leaving }) = self.table().uploads.get_mut(&id) {
            *leaving = true;
        }
    }

    /// Leaves an upload for [`Self::resume_upload`].
    pub fn park_upload(&self, incoming: Incoming) {
        let since = self.now();
        self.table().uploads.insert(incoming.id, Seat::Parked { incoming: Box::new(incoming), since });
    }

    /// Drops an upload and what was written.
    pub fn drop_upload(&self, incoming: Incoming) -> Result<(), Error> {
        let Incoming { id, reserved, .. } = incoming;
        drop(incoming);
        let removed = self.remove_tree(&upload_dir(id));
        let mut table = self.table();
        table.unreserve(reserved);
        table.uploads.remove(&id);
        Ok(removed?)
    }

    /// Closes an upload under its digest: checks it, makes it durable and gives it its name, in the order that leaves no name
    /// without its bytes whenever the power goes. Returns once a cut cannot undo it. Whatever the result, the upload is over.
    pub fn commit_upload(&self, incoming: Incoming, expected: &Digest) -> Result<Arc<Layout>, Error> {
        let len = incoming.len();
        let builder = if incoming.algorithm == expected.algorithm() {
            Ok(incoming.builder.clone())
        } else {
            hash(&*incoming.file, len, expected.algorithm())
        };
        let layout = match builder {
            Ok(builder) => Arc::new(builder.finish()),
            Err(e) => {
                self.drop_upload(incoming)?;
                return Err(e.into());
            }
        };
        if layout.digest() != expected {
            self.drop_upload(incoming)?;
            self.counters.upload_mismatches.add(1);
            return Err(Error::Mismatch { expected: *expected, actual: Box::new(*layout.digest()) });
        }
        let claim = self.claim(expected);
        match self.load(&claim) {
            Ok(Some(blob)) if blob.is_whole() => {
                let layout = Arc::clone(blob.layout());
                self.drop_upload(incoming)?;
                // It may be the work of a process that was killed before this, and the caller is about to acknowledge it.
                self.settle(expected)?;
                return Ok(layout);
            }
            Ok(_) => {}
            Err(e) => {
                self.drop_upload(incoming)?;
                return Err(e);
            }
        }
        if let Err(e) = self.name_upload(&incoming, &layout) {
            self.drop_upload(incoming)?;
            return Err(e);
        }
        let superseded = self.table().state(expected) == State::Partial;
        {
            let mut table = self.table();
            table.unreserve(incoming.reserved);
            table.uploads.remove(&incoming.id);
        }
        if superseded {
            // The download of the same blob, if one runs, learns it by `PieceError::Gone`. Its leftovers are not the
            // commit's business: that is durable.
            self.remove_partial(&claim);
        }
        self.enter_whole(&claim, &layout, incoming.file);
        self.counters.commits.add(1);
        Ok(layout)
    }

    fn name_upload(&self, incoming: &Incoming, layout: &Layout) -> Result<(), Error> {
        let dir = upload_dir(incoming.id);
        if incoming.ahead > incoming.len() {
            incoming.file.trim(incoming.len())?;
        }
        incoming.file.sync()?;
        let sidecar = self.disk.create(&format!("{dir}/layout"), Space::None)?;
        sidecar.write_at(0, &record::encode_sidecar(layout, None))?;
        sidecar.sync()?;
        self.disk.remove(&format!("{dir}/state"))?;
        self.name(&dir, layout.digest())
    }

    /// Ends uploads that nobody wrote to for `idle` seconds. Returns how many.
    pub fn expire_uploads(&self, idle: u64) -> Result<usize, Error> {
        let now = self.now();
        let mut expired = Vec::new();
        for (id, seat) in &mut self.table().uploads {
            let (Seat::Parked { since, .. } | Seat::OnDisk { since, .. }) = seat else { continue };
            if since.saturating_add(idle) <= now {
                // Taken by us, so that nobody resumes it meanwhile.
                expired.push((*id, std::mem::replace(seat, Seat::Taken { leaving: false })));
            }
        }
        let count = expired.len();
        for (id, seat) in expired {
            let reserved = match seat {
                Seat::Parked { incoming, .. } => incoming.reserved,
                Seat::OnDisk { len, .. } => len,
                Seat::Taken { .. } => 0,
            };
            let removed = self.remove_tree(&upload_dir(id));
            let mut table = self.table();
            table.unreserve(reserved);
            table.uploads.remove(&id);
            drop(table);
            removed?;
        }
        Ok(count)
    }

    /// Takes note of the uploads that an earlier process left; those that cannot be resumed go.
    pub(super) fn recover_uploads(&self) -> io::Result<()> {
        for listed in self.disk.list("upload")? {
            let path = format!("upload/{}", listed.name);
            match self.recover_upload(&listed.name)? {
                Some((id, len, since)) => {
                    let mut table = self.table();
                    // What is on disk is on disk: over the quota it is for the next reservation to make room.
                    table.admit(len);
                    table.uploads.insert(id, Seat::OnDisk { len, since });
                }
                None if listed.dir => self.remove_tree(&path)?,
                None => self.disk.remove(&path)?,
            }
        }
        Ok(())
    }

    fn recover_upload(&self, name: &str) -> io::Result<Option<(Uuid, u64, u64)>> {
        let Ok(id) = name.parse::<Uuid>() else { return Ok(None) };
        let dir = upload_dir(id);
        let Some(state) = self.read_small(&format!("{dir}/state"))? else { return Ok(None) };
        // After a power cut the bytes that were acknowledged may be gone: then the client starts again.
        let Some((boot, _)) = record::decode_upload(&state) else { return Ok(None) };
        let meta = self.disk.stat(&format!("{dir}/data"))?;
        Ok(meta.filter(|_| boot == self.options.boot).map(|meta| (id, meta.len, meta.modified.as_secs())))
    }
}

fn upload_dir(id: Uuid) -> String {
    format!("upload/{}", id.as_hyphenated())
}

fn hash(file: &dyn File, len: u64, algorithm: Algorithm) -> io::Result<LayoutBuilder> {
    let mut builder = LayoutBuilder::new(algorithm);
    let mut buf = vec![0; REHASH_LEN];
    while builder.len() < len {
        let left = usize::try_from(len - builder.len()).unwrap_or(usize::MAX);
        let part = &mut buf[..left.min(REHASH_LEN)];
        file.read_at(builder.len(), part)?;
        builder.update(part).map_err(|e| io::Error::new(io::ErrorKind::FileTooLarge, e))?;
    }
    Ok(builder)
}
