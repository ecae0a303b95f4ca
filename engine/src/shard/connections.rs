//! Connections from the first byte to the last: accepted, dialled, known, lost.

use super::{Alarm, BAN, BANS_MAX, CONNECTIONS_MAX, Core, DIAL_TIME, IDLE_CLOSE, PER_ADDRESS_MAX, Phase, link::Link};
use crate::{
    driver::{Effect, Recv, Send, SocketId},
    receive::Intake,
};
use peer_proto::{
    Digest, PeerId,
    conn::{self, Closed, Conn, Fault},
    swarm::{self, Candidate},
    wire::{Channel, Farewell, Hello},
};
use std::{io, net::SocketAddr};

impl Core {
    pub(super) fn accepted(&mut self, socket: SocketId, from: SocketAddr) {
        self.setup.stats.accepts.add(1);
        self.admit(socket, from);
    }

    pub(super) fn admit(&mut self, socket: SocketId, from: SocketAddr) {
        let count = self.accepted_from.get(&from.ip()).copied().unwrap_or(0);
        let refused = if self.links.len() >= CONNECTIONS_MAX || self.phase != Phase::Running {
            Some(&self.setup.stats.refused_node)
        } else if count >= PER_ADDRESS_MAX && !from.ip().is_loopback() {
            Some(&self.setup.stats.refused_address)
        } else {
            None
        };
        if let Some(refused) = refused {
            refused.add(1);
            self.effects.push_back(Effect::Close { socket });
            return;
        }
        *self.accepted_from.entry(from.ip()).or_default() += 1;
        let conn = Conn::accepted(self.now, self.hello()).idle_after(self.setup.peer_idle);
        self.links.insert(socket, Link::new(socket, conn, from, None));
        self.touch(socket);
    }

    pub(super) fn adopted(&mut self, socket: SocketId, from: SocketAddr, hello: &[u8]) {
        self.admit(socket, from);
        if let Some(link) = self.links.get_mut(&socket) {
            link.intake = Intake::with(hello);
            link.adopted = true;
        }
    }

    pub(super) fn hello(&self) -> Hello {
        let shard = u16::try_from(self.setup.index).unwrap_or(0);
        let super::Setup { origin, port, zone, .. } = self.setup;
        Hello { origin, port, shard, zone, ..Hello::new(self.setup.id) }
    }

    pub(super) fn dial(&mut self, digest: Digest, candidate: Candidate) -> bool {
        if self.links.len() >= CONNECTIONS_MAX || self.phase != Phase::Running {
            self.setup.stats.refused_node.add(1);
            return false;
        }
        self.setup.stats.dials.add(1);
        let socket = self.next_socket();
        let conn = Conn::dialled(self.now, self.hello(), Some(candidate.id)).idle_after(self.setup.peer_idle);
        let mut link = Link::new(socket, conn, candidate.addr, Some(candidate));
        link.waiting.push(digest);
        link.patience = Some(self.now + DIAL_TIME);
        self.links.insert(socket, link);
        self.dialling.insert(candidate.id, socket);
        self.effects.push_back(Effect::Dial { socket, to: candidate.addr });
        self.touch(socket);
        true
    }

    pub(super) fn dialled(&mut self, socket: SocketId, result: io::Result<()>) {
        let Some(link) = self.links.get_mut(&socket) else { return };
        match result {
            Ok(()) => {
                link.up = true;
                link.patience = None;
                self.touch(socket);
            }
            Err(error) => {
                tracing::debug!(peer = %link.from, %error, "dial failed");
                self.drop_link(socket);
            }
        }
    }

    pub(super) fn received(&mut self, socket: SocketId, result: io::Result<usize>, op: Recv) {
        let Some(link) = self.links.get_mut(&socket) else { return };
        link.intake.received(self.now, op);
        match result {
            Ok(n) if n > 0 => {
                self.setup.stats.recv_syscalls.add(1);
                self.setup.stats.bytes_in.add(n as u64);
                link.conn.handle(self.now, conn::Event::Read(n as u64));
            }
            Ok(_) => link.conn.handle(self.now, conn::Event::Lost),
            Err(error) => {
                tracing::debug!(peer = %link.from, %error, "receive failed");
                link.conn.handle(self.now, conn::Event::Lost);
            }
        }
        self.touch(socket);
    }

    pub(super) fn sent(&mut self, socket: SocketId, result: io::Result<usize>, op: Send) {
        let Some(link) = self.links.get_mut(&socket) else { return };
        match result {
            Ok(n) => {
                self.setup.stats.send_syscalls.add(1);
                self.setup.stats.bytes_out.add(n as u64);
                if op.is_over() {
                    link.sending = false;
                    link.conn.handle(self.now, conn::Event::Sent(op.control));
                } else {
                    link.conn.handle(self.now, conn::Event::Written(n as u64));
                    self.effects.push_back(Effect::Send { socket, op });
                }
            }
            Err(error) => {
                tracing::debug!(peer = %link.from, %error, "send failed");
                link.sending = false;
                link.conn.handle(self.now, conn::Event::Lost);
            }
        }
        self.touch(socket);
    }

    pub(super) fn link_alarm(&mut self, id: SocketId) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.alarm = None;
        if link.held.is_some_and(|at| at <= self.now) {
            link.held = None;
        } else if link.patience.is_some_and(|at| at <= self.now) {
            if !link.up {
                tracing::debug!(peer = %link.from, "dial timed out");
                self.drop_link(id);
                return;
            }
            link.patience = None;
            if link.is_idle() {
                link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Done));
            }
        } else {
            link.conn.handle(self.now, conn::Event::Tick);
        }
        self.touch(id);
    }

    pub(super) fn touch(&mut self, id: SocketId) {
        if let Some(link) = self.links.get_mut(&id)
            && !link.dirty
        {
            link.dirty = true;
            self.dirty_links.push_back(id);
        }
    }

    /// Takes a link out of the table while it is worked on.
    pub(super) fn with_link(&mut self, id: SocketId, work: impl FnOnce(&mut Self, &mut Link)) {
        let Some(mut link) = self.links.remove(&id) else { return };
        work(self, &mut link);
        if link.over {
            self.ended(link);
        } else {
            self.set_link_alarm(&mut link);
            self.links.insert(id, link);
        }
    }

    pub(super) fn set_link_alarm(&mut self, link: &mut Link) {
        if !link.is_idle() && link.up {
            link.patience = None;
        } else if link.is_idle() && link.patience.is_none() {
            link.patience = Some(self.now + IDLE_CLOSE);
        }
        let due = if link.up { link.conn.deadline() } else { None };
        let due = due.into_iter().chain(link.patience).chain(link.held).min();
        if due != link.alarm {
            if let Some(old) = link.alarm {
                self.alarms.remove(&(old, Alarm::Link(link.id)));
            }
            self.alarms.extend(due.map(|at| (at, Alarm::Link(link.id))));
            link.alarm = due;
        }
    }

    pub(super) fn handshaken(&mut self, link: &mut Link, hello: &Hello) {
        link.peer = Some(hello.id);
        link.meter = self.setup.meters.of(hello.id);
        link.origin = hello.origin;
        link.zone = hello.zone;
        link.shard = hello.shard;
        if let Some(candidate) = link.dialled {
            self.dialling.remove(&candidate.id);
        }
        if self.bans.get(&hello.id).is_some_and(|until| *until > self.now) {
            self.setup.stats.refused_banned.add(1);
            link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Banned));
            return;
        }
        if self.phase != Phase::Running {
            link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Leaving));
            return;
        }
        let twins = self.peers.entry(hello.id).or_default().clone();
        let mut duplicate = false;
        for twin in twins {
            let Some(other) = self.links.get_mut(&twin) else { continue };
            // Of two dials that crossed, the lower name's stays; its own is dropped by the other node.
            let theirs_wins = hello.id < self.setup.id;
            let drop_other = match (link.dialled.is_some(), other.dialled.is_some()) {
                (true, false) => {
                    duplicate |= theirs_wins;
                    false
                }
                (false, true) => theirs_wins,
                // The node at the other end came anew: it does not know the old connection any more.
                (false, false) => other.shard == hello.shard,
                (true, true) => true,
            };
            if drop_other {
                link.waiting.extend(other.lanes.values().map(|lane| lane.digest));
                other.conn.handle(self.now, conn::Event::Goodbye(Farewell::Duplicate));
                self.touch(twin);
            }
        }
        if duplicate {
            link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Duplicate));
            let waiting = std::mem::take(&mut link.waiting);
            self.peers.entry(hello.id).or_default().push(link.id);
            for digest in waiting {
                self.reconnect(&digest, hello.id);
            }
            return;
        }
        if let Some(own) = self.dialling.get(&hello.id).copied()
            && let Some(dial) = self.links.get_mut(&own)
        {
            // Our own dial is under way: what waits for it need wait no longer.
            link.waiting.append(&mut dial.waiting);
        }
        self.peers.entry(hello.id).or_default().push(link.id);
        self.count_links();
        for digest in std::mem::take(&mut link.waiting) {
            self.open_lane(link, &digest);
        }
    }

    /// A download wants a channel to a node that is connected, over whichever connection stands.
    pub(super) fn reconnect(&mut self, digest: &Digest, peer: PeerId) {
        let up = self.connection_to(&peer);
        match up {
            Some(id) => self.with_link(id, |core, link| core.open_lane(link, digest)),
            None => self.tell_swarm(digest, Some(swarm::Event::Failed { id: peer })),
        }
        if let Some(id) = up {
            self.touch(id);
        }
    }

    pub(super) fn connection_to(&self, peer: &PeerId) -> Option<SocketId> {
        let ids = self.peers.get(peer)?;
        ids.iter().copied().find(|id| self.links.get(id).is_some_and(|link| link.conn.peer().is_some()))
    }

    pub(super) fn closed(&mut self, link: &mut Link, closed: &Closed) {
        let stats = &self.setup.stats;
        match closed.fault() {
            Fault::Peer => &stats.ends_peer,
            Fault::Network => &stats.ends_network,
            Fault::Nobody => &stats.ends_nobody,
        }
        .add(1);
        match closed.fault() {
            Fault::Peer => tracing::warn!(peer = %link.from, id = ?link.peer, reason = %closed, "peer misbehaved"),
            Fault::Network | Fault::Nobody => {
                tracing::debug!(peer = %link.from, id = ?link.peer, reason = %closed, "connection ended")
            }
        }
        if closed.fault() == Fault::Peer
            && let Some(peer) = link.peer
        {
            self.ban(peer);
        }
        self.detach(link);
    }

    /// Takes the link's channels from those who use them.
    pub(super) fn detach(&mut self, link: &mut Link) {
        if let Some(peer) = link.peer
            && let Some(ids) = self.peers.get_mut(&peer)
        {
            ids.retain(|id| *id != link.id);
            if ids.is_empty() {
                self.peers.remove(&peer);
            }
        }
        if let Some(candidate) = link.dialled
            && self.dialling.get(&candidate.id) == Some(&link.id)
        {
            self.dialling.remove(&candidate.id);
        }
        let channels: Vec<Channel> = link.lanes.keys().copied().collect();
        for channel in channels {
            if let Some(lane) = self.remove_lane(link, channel) {
                let event = if lane.open {
                    Some(swarm::Event::Gone { slot: lane.slot })
                } else {
                    link.peer.filter(|_| lane.ours).map(|id| swarm::Event::Failed { id })
                };
                self.tell_swarm(&lane.digest, event);
            }
        }
        let wanted = link.peer.or_else(|| link.dialled.map(|candidate| candidate.id));
        for digest in std::mem::take(&mut link.waiting) {
            self.tell_swarm(&digest, wanted.map(|id| swarm::Event::Failed { id }));
        }
        link.asks.clear();
    }

    /// Ends a link without a word.
    pub(super) fn drop_link(&mut self, id: SocketId) {
        self.with_link(id, |_, link| link.over = true);
    }

    /// The link is out of the table, and nothing of it may be left behind.
    pub(super) fn ended(&mut self, mut link: Link) {
        self.detach(&mut link);
        if link.dialled.is_some() {
            if !link.up || link.peer.is_none() {
                self.setup.stats.dial_failures.add(1);
            }
        } else if let Some(count) = self.accepted_from.get_mut(&link.from.ip()) {
            *count -= 1;
            if *count == 0 {
                self.accepted_from.remove(&link.from.ip());
            }
        }
        if let Some(at) = link.alarm {
            self.alarms.remove(&(at, Alarm::Link(link.id)));
        }
        if !link.handed_over {
            self.effects.push_back(Effect::Close { socket: link.id });
        }
        self.count_links();
    }

    pub(super) fn count_links(&self) {
        self.setup.stats.connections.set(self.peers.values().map(Vec::len).sum());
    }

    pub(super) fn ban(&mut self, peer: PeerId) {
        self.setup.stats.bans.add(1);
        if self.bans.len() >= BANS_MAX
            && let Some(oldest) = self.bans.iter().min_by_key(|(_, until)| **until).map(|(id, _)| *id)
        {
            self.bans.remove(&oldest);
        }
        self.bans.insert(peer, self.now + BAN);
    }
}
