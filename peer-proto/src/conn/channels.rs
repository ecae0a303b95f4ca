//! The channels of a connection: found by their number in one step, never more than [`CHANNELS_MAX`] a side.

use super::{CHANNELS_MAX, OPENING_MAX, Side, Violation};
use crate::{layout::Geometry, pieces::PieceSet, swarm::Class, wire::Channel};
use alloc::vec::Vec;

const SLOTS: u32 = 1024;
const _: () = assert!(SLOTS.is_power_of_two() && SLOTS as usize == CHANNELS_MAX);

/// How far a channel is.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// We sent OPEN.
    Opening,
    /// We sent OPEN and do not want it any more; CLOSE goes out once the answer is here.
    Abandoned,
    /// They sent OPEN and we have not answered; what they have by now.
    Offered(PieceSet),
    /// Open both ways.
    Open,
    /// We sent CLOSE; theirs has not come.
    Closing,
}

#[derive(Debug)]
pub(super) struct Lane {
    id: Channel,
    pub(super) geometry: Geometry,
    pub(super) phase: Phase,
    /// Of our requests.
    pub(super) class: Class,
}

/// A channel's number is its slot, the parity of the side that opened it below, and above a count of how often the slot
/// was used, so that a late command of ours never meets another channel.
pub(super) struct Channels {
    side: Side,
    ours: Vec<Option<Lane>>,
    uses: Vec<u32>,
    free: Vec<u32>,
    theirs: Vec<Option<Lane>>,
    opening: usize,
    offered: usize,
    len: usize,
}

impl Channels {
    pub(super) fn new(side: Side) -> Self {
        Self {
            side,
            ours: Vec::new(),
            uses: Vec::new(),
            free: Vec::new(),
            theirs: Vec::new(),
            opening: 0,
            offered: 0,
            len: 0,
        }
    }

    /// Channels in any phase.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// A channel of ours, where there is room.
    pub(super) fn open(&mut self, geometry: Geometry) -> Option<Channel> {
        if self.opening == OPENING_MAX {
            return None;
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.ours.len() == CHANNELS_MAX => return None,
            None => {
                self.ours.push(None);
                self.uses.push(0);
                u32::try_from(self.ours.len() - 1).unwrap_or(u32::MAX)
            }
        };
        let uses = self.uses[slot as usize];
        self.uses[slot as usize] = uses.wrapping_add(1);
        let id = Channel(uses << (SLOTS.trailing_zeros() + 1) | slot << 1 | self.parity());
        self.ours[slot as usize] = Some(Lane { id, geometry, phase: Phase::Opening, class: Class::Foreground });
        self.opening += 1;
        self.len += 1;
        Some(id)
    }

    /// Whether the peer may open this channel now.
    pub(super) fn may_offer(&self, id: Channel) -> Result<(), Violation> {
        if self.is_ours(id) || self.theirs.get(slot(id)).is_some_and(Option::is_some) {
            return Err(Violation::ChannelTaken(id.0));
        }
        if self.offered == OPENING_MAX { Err(Violation::Opening) } else { Ok(()) }
    }

    /// A channel of theirs that [`Self::may_offer`] allowed.
    pub(super) fn offer(&mut self, id: Channel, geometry: Geometry, has: PieceSet) {
        let slot = slot(id);
        if self.theirs.len() <= slot {
            self.theirs.resize_with(slot + 1, || None);
        }
        self.theirs[slot] = Some(Lane { id, geometry, phase: Phase::Offered(has), class: Class::Foreground });
        self.offered += 1;
        self.len += 1;
    }

    pub(super) fn get(&self, id: Channel) -> Option<&Lane> {
        let side = if self.is_ours(id) { &self.ours } else { &self.theirs };
        side.get(slot(id))?.as_ref().filter(|lane| lane.id == id)
    }

    pub(super) fn get_mut(&mut self, id: Channel) -> Option<&mut Lane> {
        let side = if self.is_ours(id) { &mut self.ours } else { &mut self.theirs };
        side.get_mut(slot(id))?.as_mut().filter(|lane| lane.id == id)
    }

    /// The geometry of a channel that is open both ways.
    pub(super) fn open_geometry(&self, id: Channel) -> Option<Geometry> {
        self.get(id).filter(|lane| lane.phase == Phase::Open).map(|lane| lane.geometry)
    }

    /// The class of our requests on a channel.
    pub(super) fn class(&self, id: Channel) -> Class {
        self.get(id).map_or(Class::Foreground, |lane| lane.class)
    }

    /// Moves a channel on; the phase it leaves.
    pub(super) fn enter(&mut self, id: Channel, phase: Phase) -> Option<Phase> {
        let left = core::mem::replace(&mut self.get_mut(id)?.phase, phase);
        // An abandoned opening is unanswered still.
        if !matches!(self.get(id)?.phase, Phase::Abandoned) {
            self.answered(&left);
        }
        Some(left)
    }

    /// Frees a channel's number.
    pub(super) fn remove(&mut self, id: Channel) {
        let ours = self.is_ours(id);
        let side = if ours { &mut self.ours } else { &mut self.theirs };
        let Some(lane) = side.get_mut(slot(id)).and_then(|lane| lane.take_if(|lane| lane.id == id)) else { return };
        if ours {
            self.free.push(id.0 >> 1 & (SLOTS - 1));
        }
        self.len -= 1;
        self.answered(&lane.phase);
    }

    fn answered(&mut self, left: &Phase) {
        match left {
            Phase::Opening | Phase::Abandoned => self.opening -= 1,
            Phase::Offered(_) => self.offered -= 1,
            Phase::Open | Phase::Closing => {}
        }
    }

    fn parity(&self) -> u32 {
        u32::from(self.side == Side::Acceptor)
    }

    fn is_ours(&self, id: Channel) -> bool {
        id.0 & 1 == self.parity()
    }
}

fn slot(id: Channel) -> usize {
    (id.0 >> 1) as usize % CHANNELS_MAX
}
