//! Channels: which blobs go over which connection, and what their other ends are told of them.

use super::{
    Core, LANES_MAX, Pending, Phase, Shared,
    command::Message,
    home,
    link::{Lane, Link},
    piece_set,
};
use crate::{driver::Effect, job::Job, store::Blob};
use peer_proto::{
    Digest, PieceIndex,
    conn::{self, Offer},
    pieces::PieceSet,
    swarm::{self, Has, Slot},
    wire::{Channel, Open, Refusal},
};
use std::{collections::BTreeSet, sync::Arc};

impl Core {
    pub(super) fn next_slot(&mut self) -> Slot {
        // Slots of closed channels are free again long before four billion were opened.
        self.next_slot = self.next_slot.wrapping_add(1);
        Slot(self.next_slot)
    }

    pub(super) fn add_lane(&mut self, link: &mut Link, channel: Channel, digest: Digest, ours: bool) {
        let Some(shared) = self.blobs.get(&digest) else { return };
        let has = PieceSet::new(&shared.blob.layout().geometry());
        let slot = self.next_slot();
        self.slots.insert(slot, (link.id, channel));
        if let Some(shared) = self.blobs.get_mut(&digest) {
            shared.lanes.insert(slot);
        }
        link.lanes.insert(channel, Lane { slot, digest, ours, open: false, has });
    }

    pub(super) fn remove_lane(&mut self, link: &mut Link, channel: Channel) -> Option<Lane> {
        let lane = link.lanes.remove(&channel)?;
        link.serve.close(channel);
        link.asks.retain(|(of, _)| *of != channel);
        self.slots.remove(&lane.slot);
        if let Some(shared) = self.blobs.get_mut(&lane.digest) {
            shared.lanes.remove(&lane.slot);
            self.forget_unused(&lane.digest);
        }
        Some(lane)
    }

    pub(super) fn forget_unused(&mut self, digest: &Digest) {
        if !self.downloads.contains_key(digest) && self.blobs.get(digest).is_some_and(|shared| shared.lanes.is_empty())
        {
            self.blobs.remove(digest);
        }
    }

    /// Opens a channel for a download, unless there is one.
    pub(super) fn open_lane(&mut self, link: &mut Link, digest: &Digest) {
        let Some(peer) = link.peer else { return };
        if link.lane_of(digest).is_some() {
            return;
        }
        let failed = Some(swarm::Event::Failed { id: peer });
        let Some((shared, download)) = self.blobs.get(digest).zip(self.downloads.get(digest)) else { return };
        let open = Open {
            digest: *digest,
            namespace: download.namespace.clone(),
            geometry: shared.blob.layout().geometry(),
            has: shared.told.clone(),
        };
        match link.conn.open(self.now, &open) {
            Ok(channel) => self.add_lane(link, channel, *digest, true),
            Err(error) => {
                tracing::debug!(peer = %link.from, %digest, %error, "channel not opened");
                self.tell_swarm(digest, failed);
            }
        }
    }

    pub(super) fn offered(&mut self, link: &mut Link, offer: Box<Offer>) {
        if self.phase != Phase::Running {
            return link
                .conn
                .handle(self.now, conn::Event::Refuse { channel: offer.channel, reason: Refusal::Leaving });
        }
        if self.blobs.contains_key(&offer.digest) {
            return self.answer_offer(link, &offer);
        }
        let digest = offer.digest;
        let waiting = self.offers.entry(digest).or_default();
        waiting.push((link.id, offer));
        if waiting.len() == 1 && !self.downloads.contains_key(&digest) {
            self.submit(Pending::Open(digest), Job::Open { digest });
        }
    }

    /// The blob is known: yes or no.
    pub(super) fn answer_offer(&mut self, link: &mut Link, offer: &Offer) {
        let Offer { channel, digest, .. } = *offer;
        let refuse = |core: &Self, link: &mut Link, reason| {
            link.conn.handle(core.now, conn::Event::Refuse { channel, reason });
        };
        let Some(shared) = self.blobs.get(&digest).filter(|shared| !shared.blob.is_gone()) else {
            return refuse(self, link, Refusal::Unknown);
        };
        if shared.blob.layout().geometry() != offer.geometry {
            return refuse(self, link, Refusal::Geometry);
        }
        let swarm = self.downloads.get(&digest).and_then(|download| download.swarm.as_ref());
        let admitted = match (swarm, link.peer) {
            (Some(swarm), Some(peer)) => swarm.is_complete() || swarm.admits(&peer),
            _ => true,
        };
        if !admitted || shared.lanes.len() >= LANES_MAX {
            return refuse(self, link, Refusal::Busy);
        }
        let has = shared.told.clone();
        self.add_lane(link, channel, digest, false);
        link.conn.handle(self.now, conn::Event::Accept { channel, has });
    }

    pub(super) fn answer_offers(&mut self, digest: &Digest) {
        for (socket, offer) in self.offers.remove(digest).unwrap_or_default() {
            self.with_link(socket, |core, link| core.answer_offer(link, &offer));
            self.touch(socket);
        }
    }

    /// Takes note of a blob, so that it can be served.
    pub(super) fn share(&mut self, blob: Arc<Blob>) {
        let digest = *blob.digest();
        let told = piece_set(&blob);
        if !blob.is_whole() && home(&digest, self.setup.shards) != self.setup.index {
            let message = Message::Watch { digest, shard: self.setup.index };
            self.effects.push_back(Effect::Tell { to: home(&digest, self.setup.shards), message });
        }
        match self.blobs.get_mut(&digest) {
            Some(shared) => shared.blob = blob,
            None => {
                self.blobs.insert(digest, Shared { blob, told, lanes: BTreeSet::new(), once: None });
            }
        }
    }

    pub(super) fn opened(&mut self, link: &mut Link, channel: Channel, has: PieceSet) {
        let Some(lane) = link.lanes.get_mut(&channel) else { return };
        lane.open = true;
        lane.has = has;
        self.introduce(link, channel);
        self.close_if_done(link, channel);
    }

    /// Tells a download of a peer with an open channel.
    pub(super) fn introduce(&mut self, link: &Link, channel: Channel) {
        let Some((lane, id)) = link.lanes.get(&channel).zip(link.peer) else { return };
        let has = Has::Some(&lane.has);
        let (slot, origin, dialed) = (lane.slot, link.origin, lane.ours);
        self.tell_swarm(&lane.digest, Some(swarm::Event::Connected { slot, id, origin, dialed, has }));
    }

    /// A channel on which both sides have everything is of no use.
    pub(super) fn close_if_done(&mut self, link: &mut Link, channel: Channel) {
        let Some(lane) = link.lanes.get(&channel).filter(|lane| lane.open) else { return };
        let complete = self.blobs.get(&lane.digest).is_some_and(|shared| shared.told.is_full());
        if complete && lane.has.is_full() {
            link.conn.handle(self.now, conn::Event::Close { channel });
            self.remove_lane(link, channel);
        }
    }

    /// Tells every channel of a blob which pieces have come since it was last told.
    pub(super) fn announce(&mut self, digest: &Digest) {
        let Some(shared) = self.blobs.get_mut(digest) else { return };
        let fresh: Vec<PieceIndex> =
            shared.blob.pieces().iter().filter(|piece| !shared.told.contains(*piece)).collect();
        if fresh.is_empty() {
            return;
        }
        fresh.iter().for_each(|piece| {
            shared.told.insert(*piece);
        });
        let full = shared.told.is_full();
        for slot in shared.lanes.clone() {
            let Some((socket, channel)) = self.slots.get(&slot).copied() else { continue };
            let Some(link) = self.links.get_mut(&socket) else { continue };
            let Some(lane) = link.lanes.get(&channel) else { continue };
            if full && !lane.has.is_full() {
                link.conn.handle(self.now, conn::Event::HaveAll { channel });
            } else {
                for piece in fresh.iter().filter(|piece| !lane.has.contains(**piece)) {
                    link.conn.handle(self.now, conn::Event::Have { channel, piece: *piece });
                }
            }
            if full {
                self.with_link(socket, |core, link| core.close_if_done(link, channel));
            }
            self.touch(socket);
        }
    }
}
