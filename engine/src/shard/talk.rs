//! What goes over a connection: reading on, hearing what the other side says, passing it to whom it concerns.

use super::{Core, link::Link};
use crate::{
    driver::{Body, Effect, Send},
    receive::Pumped,
};
use peer_proto::{
    conn::{self, Need},
    pieces::PieceSet,
    swarm,
    wire::{HEADER_LEN, Header, Hello, Refusal, Rejection},
};

impl Core {
    pub(super) fn settle_link(&mut self, link: &mut Link) {
        if !link.up {
            return;
        }
        // A piece that is ready leaves in one write with whatever else there is to say.
        self.serve(link);
        loop {
            if !self.converse(link) {
                return;
            }
            match self.pump(link) {
                Pumped::Fed => continue,
                Pumped::Piece(buf) => {
                    link.arrived = Some(buf);
                    continue;
                }
                Pumped::Receive(op) => self.effects.push_back(Effect::Recv { socket: link.id, op }),
                Pumped::Starved => {
                    self.setup.stats.starved.add(1);
                    // It is us who keep the peer waiting: its clock must not run meanwhile.
                    link.conn.handle(self.now, conn::Event::Held);
                    self.starved.insert(link.id);
                    self.starve();
                }
                Pumped::Nothing => {}
            }
            if !self.serve(link) {
                return;
            }
        }
    }

    /// Says and hears all that there is; false where the link is over, or another shard's.
    pub(super) fn converse(&mut self, link: &mut Link) -> bool {
        loop {
            self.ask_again(link);
            let mut quiet = true;
            while let Some(effect) = link.conn.poll() {
                quiet = false;
                self.connection_says(link, effect);
                if link.over {
                    return false;
                }
            }
            if quiet {
                return !self.belongs_elsewhere(link);
            }
        }
    }

    pub(super) fn pump(&mut self, link: &mut Link) -> Pumped {
        // Jobs that wait for a worker hold buffers: no more of them until those are gone.
        if !self.held.is_empty() && matches!(link.conn.need(), Need::Payload { .. }) && link.intake.is_at_rest() {
            return Pumped::Starved;
        }
        link.intake.pump(self.now, &mut link.conn, &self.setup.pool)
    }

    /// Before an accepted connection says a word: does its HELLO name another of this node's shards?
    pub(super) fn belongs_elsewhere(&mut self, link: &mut Link) -> bool {
        if link.peer.is_some() || link.dialled.is_some() || link.adopted {
            return false;
        }
        let Need::Header = link.conn.need() else { return false };
        let staged = link.intake.staged();
        let Some(header) = staged.first_chunk::<HEADER_LEN>() else { return false };
        // Whatever is not a sound HELLO is for the connection to complain about.
        let Ok(Header::Hello { body }) = Header::decode(header) else { return false };
        let end = HEADER_LEN + body.len as usize;
        let Some(hello) = staged.get(..end) else { return self.await_hello(link, end) };
        let Ok(said) = Hello::decode(&hello[HEADER_LEN..]) else { return false };
        let to = (usize::from(said.shard) + self.spread(&said)) % self.setup.shards.max(1);
        if to == self.setup.index {
            return false;
        }
        // Nothing may be lost that came behind it.
        let hello = staged.into();
        self.effects.push_back(Effect::HandOver { socket: link.id, to, from: link.from, hello });
        link.over = true;
        link.handed_over = true;
        true
    }

    /// Agents have few shards and would all meet the first ones of an origin, which never dials them: there each goes to one of its
    /// own. Between equals the same numbers meet, so that one connection carries a blob both ways.
    fn spread(&self, said: &Hello) -> usize {
        if !self.setup.origin || said.origin {
            return 0;
        }
        let head = said.id.as_bytes().first_chunk::<2>().map_or(0, |bytes| u16::from_le_bytes(*bytes));
        usize::from(head)
    }

    /// Reads on until the whole HELLO is there, without telling the connection of its header yet.
    pub(super) fn await_hello(&mut self, link: &mut Link, len: usize) -> bool {
        if let Pumped::Receive(op) = link.intake.await_staged(self.now, len) {
            self.effects.push_back(Effect::Recv { socket: link.id, op });
        }
        true
    }

    pub(super) fn connection_says(&mut self, link: &mut Link, effect: conn::Effect) {
        use conn::Effect as Says;
        match effect {
            Says::Send { head, piece } => {
                let body = piece.map(|(channel, piece)| link.serve.take(channel, piece));
                let body = match body {
                    Some(None) => {
                        // A header without its piece would put the peer out of step.
                        tracing::error!(peer = %link.from, "a piece was announced that is not at hand");
                        link.over = true;
                        return;
                    }
                    Some(Some(body)) => body,
                    None => Body::NONE,
                };
                link.sending = true;
                let op = Send { control: head, control_sent: 0, body };
                self.effects.push_back(Effect::Send { socket: link.id, op });
            }
            Says::Handshaken(hello) => self.handshaken(link, &hello),
            Says::Offered(offer) => self.offered(link, offer),
            Says::Opened { channel, has } => self.opened(link, channel, has),
            Says::Refused { channel, reason } => {
                if let Some(lane) = self.remove_lane(link, channel)
                    && reason != Refusal::Duplicate
                {
                    self.tell_swarm(&lane.digest, link.peer.map(|id| swarm::Event::Failed { id }));
                }
            }
            Says::Has { channel, piece } => {
                if let Some(lane) = link.lanes.get_mut(&channel) {
                    lane.has.insert(piece);
                    let (slot, digest) = (lane.slot, lane.digest);
                    self.tell_swarm(&digest, Some(swarm::Event::Have { slot, piece }));
                    self.close_if_done(link, channel);
                }
            }
            Says::HasAll { channel } => {
                if let Some(lane) = link.lanes.get_mut(&channel)
                    && let Some(shared) = self.blobs.get(&lane.digest)
                {
                    lane.has = PieceSet::full(&shared.blob.layout().geometry());
                    let (slot, digest) = (lane.slot, lane.digest);
                    self.tell_swarm(&digest, Some(swarm::Event::HaveAll { slot }));
                    self.close_if_done(link, channel);
                }
            }
            Says::Serve { channel, piece, .. } if self.sent_of_late(link, channel, piece) => {
                self.reject(link, channel, piece, Rejection::Elsewhere);
            }
            Says::Serve { channel, piece, class } => link.serve.push(channel, piece, class),
            Says::Unserve { channel, piece } => link.serve.remove(channel, piece),
            Says::Arrived { channel, piece } => self.arrived(link, channel, piece),
            Says::Rejected { channel, piece, reason } => {
                if let Some(lane) = link.lanes.get(&channel) {
                    let reason = match reason {
                        Rejection::Missing | Rejection::Failed => swarm::Reject::Missing,
                        Rejection::Busy | Rejection::Cancelled => swarm::Reject::Busy,
                        Rejection::Elsewhere => swarm::Reject::Elsewhere,
                    };
                    let slot = lane.slot;
                    self.tell_swarm(&lane.digest, Some(swarm::Event::Rejected { slot, piece, reason }));
                }
            }
            // The window has room again, which is looked at after every event.
            Says::Released { .. } => {}
            Says::Shut { channel } => {
                if let Some(lane) = self.remove_lane(link, channel) {
                    self.tell_swarm(&lane.digest, Some(swarm::Event::Gone { slot: lane.slot }));
                }
            }
            Says::Closed(closed) => self.closed(link, &closed),
            Says::Hangup => link.over = true,
        }
    }
}
