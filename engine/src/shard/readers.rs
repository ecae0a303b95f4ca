//! Readers of blobs that still arrive.

use super::{
    Core,
    command::Answer,
    download::{READERS_MAX, Reader, Wait},
    read::Reading,
};
use crate::{driver::Effect, handle::Error};
use peer_proto::{
    Digest,
    swarm::{self, ReaderId},
};
use std::{ops::Range, sync::Weak};

impl Core {
    pub(super) fn reader(&mut self, digest: Digest, range: Range<u64>, alive: Weak<()>) -> Result<Reading, Error> {
        let id = ReaderId(self.next_number());
        let shared = self.blobs.get(&digest).ok_or(Error::NotFound(digest))?;
        let download = self.downloads.get_mut(&digest).ok_or(Error::NotFound(digest))?;
        let swarm = download.swarm.as_mut().ok_or(Error::NotFound(digest))?;
        let length = download.layout.length();
        if range.start > range.end || range.end > length {
            return Err(Error::Range(length));
        }
        if download.readers.len() >= READERS_MAX {
            return Err(Error::Busy("list of readers"));
        }
        let mut pieces = download.layout.geometry().covering(range);
        let have = swarm.have();
        let missing = pieces.clone().find(|n| download.layout.geometry().piece(*n).is_none_or(|p| !have.contains(p)));
        let head = pieces.start;
        pieces.start = missing.unwrap_or(pieces.end);
        swarm.handle(self.now, swarm::Event::Reader { id, pieces: pieces.into() });
        download.readers.insert(id, Reader { alive, head, wait: None });
        let (blob, kept) = (shared.blob.clone(), download.kept.clone());
        self.touch_download(digest);
        Ok(Reading { id, blob, kept })
    }

    pub(super) fn wait_for(&mut self, digest: Digest, id: ReaderId, wait: Wait) {
        let answer = match self.downloads.get_mut(&digest) {
            // It has ended: whole, and then the reader finds its piece there, or not.
            None if self.blobs.get(&digest).is_some_and(|shared| shared.blob.is_whole()) => Ok(None),
            None => Err(Error::Stopped(digest)),
            Some(download) if download.has(wait.piece, wait.all) => Ok(None),
            Some(download) => match download.readers.get_mut(&id) {
                Some(reader) => {
                    reader.head = wait.piece;
                    reader.wait = Some(wait);
                    return self.touch_download(digest);
                }
                None => Err(Error::NotFound(digest)),
            },
        };
        self.effects.push_back(Effect::Answer(Answer::Bytes(wait.reply, answer)));
    }
}
