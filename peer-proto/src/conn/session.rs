//! A connection past its handshake: channels, requests both ways, and what each frame does to them.

use super::{
    Closed, CommandError, Effect, HAVES_QUEUE_MAX, Offer, Reading, Violation,
    channels::{Channels, Phase},
    writer::Writer,
};
use crate::{
    PieceIndex,
    layout::Geometry,
    pieces::PieceSet,
    swarm::Class,
    wire::{self, Channel, HAVES_MAX, Header, Hello, Open, Refusal, Rejection, VERSION_CLASSES, WINDOW_MAX},
};
use alloc::{boxed::Box, collections::VecDeque, vec::Vec};

pub(super) struct Session {
    pub(super) peer: Hello,
    /// The version that both speak.
    version: u16,
    /// Requests we take at once.
    window: u8,
    pub(super) channels: Channels,
    /// Our requests without an answer, at most the peer's window.
    asked: Vec<Asked>,
    /// The peer's requests without an answer, oldest first, at most `window`.
    serving: Vec<Serving>,
    /// Pieces to announce. At most [`HAVES_QUEUE_MAX`].
    haves: Vec<(Channel, u32)>,
    pong: bool,
}

struct Asked {
    channel: Channel,
    piece: PieceIndex,
    cancelled: bool,
}

struct Serving {
    channel: Channel,
    piece: PieceIndex,
    ready: bool,
}

/// Where a session puts what it has to say.
pub(super) struct Out<'a> {
    pub(super) writer: &'a mut Writer,
    pub(super) effects: &'a mut VecDeque<Effect>,
}

impl Session {
    pub(super) fn new(peer: Hello, version: u16, window: u8, channels: Channels) -> Self {
        Self {
            peer,
            version,
            window,
            channels,
            asked: Vec::with_capacity(usize::from(WINDOW_MAX)),
            serving: Vec::with_capacity(usize::from(WINDOW_MAX)),
            haves: Vec::new(),
            pong: false,
        }
    }

    /// Requests that may be made now.
    pub(super) fn room(&self) -> usize {
        usize::from(self.peer.window).saturating_sub(self.asked.len())
    }

    pub(super) fn unanswered(&self) -> usize {
        self.asked.len()
    }

    // What the peer does.

    /// Acts on a header, or says what of the frame is to be read before.
    pub(super) fn header(&mut self, header: Header, out: &mut Out<'_>) -> Result<Reading, Closed> {
        match header {
            Header::Hello { .. } => return Err(Violation::Hello.into()),
            Header::Open { channel, body, .. } => {
                self.channels.may_offer(channel)?;
                return Ok(Reading::Body { header, body });
            }
            Header::Opened { channel, body, .. } => {
                self.expect(channel, |phase| matches!(phase, Phase::Opening | Phase::Abandoned))?;
                if body.len > 0 {
                    return Ok(Reading::Body { header, body });
                }
                self.body(header, &[], out)?;
            }
            Header::Refused { channel, reason } => {
                self.expect(channel, |phase| matches!(phase, Phase::Opening | Phase::Abandoned))?;
                if self.channels.get(channel).is_some_and(|lane| lane.phase == Phase::Opening) {
                    out.effects.push_back(Effect::Refused { channel, reason });
                }
                self.channels.remove(channel);
            }
            Header::Have { channel, body } => {
                self.expect(channel, |phase| matches!(phase, Phase::Offered(_) | Phase::Open | Phase::Closing))?;
                return Ok(Reading::Body { header, body });
            }
            Header::HaveAll { channel } => self.has_all(channel, out)?,
            Header::Request { channel, piece, class } => self.requested(channel, piece, class, out)?,
            Header::Piece { channel, piece, len } => return Ok(self.piece(channel, piece, len, out)?),
            Header::Reject { channel, piece, reason } => {
                let (asked, _) = self.answered(channel, piece)?;
                out.effects.push_back(match asked.cancelled {
                    true => Effect::Released { channel, piece: asked.piece },
                    false => Effect::Rejected { channel, piece: asked.piece, reason },
                });
            }
            Header::Cancel { channel, piece } => self.cancelled(channel, piece, out)?,
            Header::Close { channel } => self.closed(channel, out)?,
            Header::Ping => self.pong = true,
            Header::Pong => {}
            Header::Goodbye { reason } => return Err(Closed::Theirs(reason)),
        }
        Ok(Reading::Header)
    }

    /// Acts on a frame whose body is here, its checksum not yet looked at.
    pub(super) fn body(&mut self, header: Header, bytes: &[u8], out: &mut Out<'_>) -> Result<(), Closed> {
        match header {
            Header::Open { channel, form, body } => {
                body.check(bytes)?;
                let Open { digest, namespace, geometry, has } = Open::decode(form, bytes)?;
                let offer = Offer { channel, digest, namespace, geometry, has: has.count() };
                self.channels.offer(channel, geometry, has);
                out.effects.push_back(Effect::Offered(Box::new(offer)));
            }
            Header::Opened { channel, form, body } => {
                body.check(bytes)?;
                let Some(lane) = self.channels.get(channel) else { return Ok(()) };
                if lane.phase == Phase::Opening {
                    let has = form.decode(&lane.geometry, bytes)?;
                    self.channels.enter(channel, Phase::Open);
                    out.effects.push_back(Effect::Opened { channel, has });
                } else {
                    self.channels.enter(channel, Phase::Closing);
                    out.writer.push(&Header::Close { channel })?;
                }
            }
            Header::Have { channel, body } => {
                body.check(bytes)?;
                for piece in wire::decode_have(bytes) {
                    self.has(channel, piece, out)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A lane of the peer's naming, in a phase in which the frame may come.
    fn expect(&mut self, channel: Channel, phases: impl FnOnce(&Phase) -> bool) -> Result<Geometry, Violation> {
        let lane = self.channels.get(channel).filter(|lane| phases(&lane.phase));
        lane.map(|lane| lane.geometry).ok_or_else(|| Violation::Channel(channel.get()))
    }

    fn has(&mut self, channel: Channel, piece: u32, out: &mut Out<'_>) -> Result<(), Violation> {
        let Some(lane) = self.channels.get_mut(channel) else { return Ok(()) };
        let piece = index(&lane.geometry, piece)?;
        match &mut lane.phase {
            Phase::Offered(has) => {
                has.insert(piece);
            }
            Phase::Open => out.effects.push_back(Effect::Has { channel, piece }),
            _ => {}
        }
        Ok(())
    }

    fn has_all(&mut self, channel: Channel, out: &mut Out<'_>) -> Result<(), Violation> {
        let lane = self.channels.get_mut(channel).ok_or_else(|| Violation::Channel(channel.get()))?;
        match &mut lane.phase {
            Phase::Offered(has) => *has = PieceSet::full(&lane.geometry),
            Phase::Open => out.effects.push_back(Effect::HasAll { channel }),
            Phase::Closing => {}
            Phase::Opening | Phase::Abandoned => return Err(Violation::Channel(channel.get())),
        }
        Ok(())
    }

    fn requested(&mut self, channel: Channel, piece: u32, class: Class, out: &mut Out<'_>) -> Result<(), Violation> {
        let geometry = self.expect(channel, |phase| matches!(phase, Phase::Open | Phase::Closing))?;
        let piece = index(&geometry, piece)?;
        if self.channels.open_geometry(channel).is_none() {
            return Ok(());
        }
        if self.serving.len() >= usize::from(self.window) {
            return Err(Violation::Window(self.window));
        }
        if self.serving(channel, piece).is_some() {
            return Err(Violation::Twice(piece.get()));
        }
        self.serving.push(Serving { channel, piece, ready: false });
        out.effects.push_back(Effect::Serve { channel, piece, class });
        Ok(())
    }

    fn piece(&mut self, channel: Channel, piece: u32, has: u32, out: &mut Out<'_>) -> Result<Reading, Violation> {
        let (asked, geometry) = self.answered(channel, piece)?;
        let says = geometry.piece_len(asked.piece);
        if has != says {
            return Err(Violation::Length { piece, has, says });
        }
        if asked.cancelled {
            out.effects.push_back(Effect::Released { channel, piece: asked.piece });
            return Ok(Reading::Discard(has));
        }
        Ok(Reading::Payload { channel, piece: asked.piece, len: has })
    }

    /// Takes out the request that an answer of the peer belongs to.
    fn answered(&mut self, channel: Channel, piece: u32) -> Result<(Asked, Geometry), Violation> {
        let geometry = self.expect(channel, |phase| matches!(phase, Phase::Open | Phase::Closing))?;
        let at = self.asked.iter().position(|asked| asked.channel == channel && asked.piece.get() == piece);
        at.map(|at| (self.asked.swap_remove(at), geometry)).ok_or(Violation::Unrequested(piece))
    }

    fn cancelled(&mut self, channel: Channel, piece: u32, out: &mut Out<'_>) -> Result<(), Closed> {
        let geometry = self.expect(channel, |phase| matches!(phase, Phase::Open | Phase::Closing))?;
        let piece = index(&geometry, piece)?;
        // One that is not here any more was answered while the CANCEL was on its way.
        if let Some(at) = self.serving(channel, piece) {
            self.serving.remove(at);
            out.effects.push_back(Effect::Unserve { channel, piece });
            let reason = Rejection::Cancelled;
            out.writer.push(&Header::Reject { channel, piece: piece.get(), reason })?;
        }
        Ok(())
    }

    fn closed(&mut self, channel: Channel, out: &mut Out<'_>) -> Result<(), Closed> {
        self.expect(channel, |phase| matches!(phase, Phase::Open | Phase::Closing))?;
        if self.channels.open_geometry(channel).is_some() {
            self.asked.retain(|asked| asked.channel != channel);
            self.serving.retain(|serving| serving.channel != channel);
            out.writer.push(&Header::Close { channel })?;
            out.effects.push_back(Effect::Shut { channel });
        } else {
            for asked in self.asked.extract_if(.., |asked| asked.channel == channel) {
                out.effects.push_back(Effect::Released { channel, piece: asked.piece });
            }
        }
        self.channels.remove(channel);
        Ok(())
    }

    // What this node wants. A command for a channel that is gone came too late, and does nothing.

    pub(super) fn open(&mut self, open: &Open, writer: &mut Writer) -> Result<Channel, CommandError> {
        let body = wire::CONTROL_LEN_MAX as usize;
        if !writer.has_room(body) {
            return Err(CommandError::Full);
        }
        let channel = self.channels.open(open.geometry).ok_or(CommandError::Full)?;
        let queued = writer.push_with(body, |out| open.encode(channel, out));
        queued.map_err(|_| CommandError::Full)?;
        Ok(channel)
    }

    pub(super) fn request(
        &mut self,
        channel: Channel,
        piece: PieceIndex,
        reading: &Reading,
        writer: &mut Writer,
    ) -> Result<(), CommandError> {
        let geometry = self.channels.open_geometry(channel).ok_or(CommandError::NotOpen)?;
        let piece = geometry.piece(piece.get()).ok_or(CommandError::NotOpen)?;
        let under_way =
            matches!(reading, Reading::Payload { channel: c, piece: p, .. } if (*c, *p) == (channel, piece));
        if under_way || self.asked.iter().any(|asked| (asked.channel, asked.piece) == (channel, piece)) {
            return Err(CommandError::Twice);
        }
        if self.room() == 0 {
            return Err(CommandError::Full);
        }
        let known = self.version >= VERSION_CLASSES;
        let class = if known { self.channels.class(channel) } else { Class::Foreground };
        writer.push(&Header::Request { channel, piece: piece.get(), class }).map_err(|_| CommandError::Full)?;
        self.asked.push(Asked { channel, piece, cancelled: false });
        Ok(())
    }

    pub(super) fn set_class(&mut self, channel: Channel, class: Class) {
        if let Some(lane) = self.channels.get_mut(channel) {
            lane.class = class;
        }
    }

    pub(super) fn accept(&mut self, channel: Channel, has: &PieceSet, out: &mut Out<'_>) -> Result<(), Closed> {
        let Some(lane) = self.channels.get(channel) else { return Ok(()) };
        let pieces = lane.geometry.pieces();
        if !matches!(lane.phase, Phase::Offered(_)) {
            return Ok(());
        }
        if has.pieces() != pieces {
            let reason = Refusal::Geometry;
            out.effects.push_back(Effect::Refused { channel, reason });
            return self.refuse(channel, reason, out);
        }
        out.writer.push_with(pieces.div_ceil(8) as usize, |out| wire::encode_opened(channel, has, out))?;
        if let Some(Phase::Offered(has)) = self.channels.enter(channel, Phase::Open) {
            out.effects.push_back(Effect::Opened { channel, has });
        }
        Ok(())
    }

    pub(super) fn refuse(&mut self, channel: Channel, reason: Refusal, out: &mut Out<'_>) -> Result<(), Closed> {
        let offered = self.channels.get(channel).is_some_and(|lane| matches!(lane.phase, Phase::Offered(_)));
        if offered {
            self.channels.remove(channel);
            out.writer.push(&Header::Refused { channel, reason })?;
        }
        Ok(())
    }

    pub(super) fn have(&mut self, channel: Channel, piece: PieceIndex) -> Result<(), Closed> {
        if self.announces(channel) {
            if self.haves.len() == HAVES_QUEUE_MAX {
                return Err(Closed::Unread("queue of announcements"));
            }
            self.haves.push((channel, piece.get()));
        }
        Ok(())
    }

    pub(super) fn have_all(&mut self, channel: Channel, out: &mut Out<'_>) -> Result<(), Closed> {
        if self.announces(channel) {
            self.haves.retain(|(to, _)| *to != channel);
            out.writer.push(&Header::HaveAll { channel })?;
        }
        Ok(())
    }

    /// Whether the peer wants to hear what is here: not before our OPENED, which says it.
    fn announces(&self, channel: Channel) -> bool {
        self.channels.get(channel).is_some_and(|lane| matches!(lane.phase, Phase::Opening | Phase::Open))
    }

    pub(super) fn cancel(&mut self, channel: Channel, piece: PieceIndex, out: &mut Out<'_>) -> Result<(), Closed> {
        let open = self.channels.open_geometry(channel).is_some();
        let asked = self.asked.iter_mut().find(|asked| (asked.channel, asked.piece) == (channel, piece));
        if let Some(asked) = asked.filter(|asked| open && !asked.cancelled) {
            asked.cancelled = true;
            out.writer.push(&Header::Cancel { channel, piece: piece.get() })?;
        }
        Ok(())
    }

    pub(super) fn ready(&mut self, channel: Channel, piece: PieceIndex) {
        if let Some(at) = self.serving(channel, piece) {
            self.serving[at].ready = true;
        }
    }

    pub(super) fn reject(
        &mut self,
        channel: Channel,
        piece: PieceIndex,
        reason: Rejection,
        out: &mut Out<'_>,
    ) -> Result<(), Closed> {
        if let Some(at) = self.serving(channel, piece) {
            self.serving.remove(at);
            out.writer.push(&Header::Reject { channel, piece: piece.get(), reason })?;
        }
        Ok(())
    }

    pub(super) fn close(&mut self, channel: Channel, out: &mut Out<'_>) -> Result<(), Closed> {
        match self.channels.get(channel).map(|lane| &lane.phase) {
            Some(Phase::Opening) => {
                self.channels.enter(channel, Phase::Abandoned);
            }
            Some(Phase::Offered(_)) => self.refuse(channel, Refusal::Unknown, out)?,
            Some(Phase::Open) => {
                self.channels.enter(channel, Phase::Closing);
                self.serving.retain(|serving| serving.channel != channel);
                for asked in self.asked.iter_mut().filter(|asked| asked.channel == channel) {
                    asked.cancelled = true;
                }
                out.writer.push(&Header::Close { channel })?;
            }
            Some(Phase::Abandoned | Phase::Closing) | None => {}
        }
        Ok(())
    }

    fn serving(&self, channel: Channel, piece: PieceIndex) -> Option<usize> {
        self.serving.iter().position(|serving| (serving.channel, serving.piece) == (channel, piece))
    }

    // What is said when the socket is free.

    /// Appends what gathered since the last write: announcements, an answer to PINGs, and the header of the next piece.
    pub(super) fn compose(&mut self, queue: &mut Vec<u8>) -> Option<(Channel, PieceIndex)> {
        if core::mem::take(&mut self.pong) {
            queue.extend(Header::Pong.encode());
        }
        if !self.haves.is_empty() {
            self.compose_haves(queue);
        }
        let at = self.serving.iter().position(|serving| serving.ready)?;
        let Serving { channel, piece, .. } = self.serving.remove(at);
        let len = self.channels.open_geometry(channel)?.piece_len(piece);
        queue.extend(Header::Piece { channel, piece: piece.get(), len }.encode());
        Some((channel, piece))
    }

    fn compose_haves(&mut self, queue: &mut Vec<u8>) {
        let mut haves = core::mem::take(&mut self.haves);
        haves.sort_unstable();
        for run in haves.chunk_by(|a, b| a.0 == b.0).filter(|run| self.announces(run[0].0)) {
            for part in run.chunks(HAVES_MAX) {
                wire::encode_have(part[0].0, part.iter().map(|(_, piece)| *piece), queue);
            }
        }
        haves.clear();
        self.haves = haves;
    }
}

fn index(geometry: &Geometry, piece: u32) -> Result<PieceIndex, Violation> {
    geometry.piece(piece).ok_or_else(|| Violation::Piece { piece, pieces: geometry.pieces() })
}
