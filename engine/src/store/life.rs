//! What becomes of a blob on this node, and what may become of it next. No files here, only the rule.
//!
//! ```text
//!            begin              all pieces here            synced, renamed
//!   Absent ─────────► Partial ───────────────► Verifying ─────────────────► Whole
//!     ▲  └───────────────┼──── an upload committed ───┼───────────────────────▲ │
//!     │                  │ evict             failed ▼                   evict │
//!     └────── removed ───┴────────────────── Evicting ◄───────────────────────┘
//! ```

/// Where a blob stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Not here.
    Absent,
    /// Space is set aside, pieces come in.
    Partial,
    /// Every piece is here; being made durable under its name.
    Verifying,
    /// Proven, durable, immutable.
    Whole,
    /// On its way out; its name is free already or will be at once.
    Evicting,
}

/// What happens to a blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A download wants its space.
    Begin,
    /// All pieces are in.
    Complete,
    /// The files are durable under the blob's name: the end of [`State::Verifying`], or of an upload.
    Durable,
    /// It could not be made durable.
    Failed,
    /// Space is needed, or somebody said so, or a wrong byte was found.
    Evict,
    /// Its files are gone.
    Removed,
}

impl State {
    /// What it is after `event`; none where that must not happen.
    pub const fn after(self, event: Event) -> Option<Self> {
        match (self, event) {
            (Self::Absent, Event::Begin) => Some(Self::Partial),
            (Self::Partial, Event::Complete) => Some(Self::Verifying),
            (Self::Absent | Self::Partial | Self::Verifying, Event::Durable) => Some(Self::Whole),
            (Self::Verifying, Event::Failed) | (Self::Partial | Self::Whole, Event::Evict) => Some(Self::Evicting),
            (Self::Evicting, Event::Removed) => Some(Self::Absent),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Event::*, State::*, *};

    #[test]
    fn every_road() {
        let run = |events: &[Event]| events.iter().try_fold(Absent, |state, event| state.after(*event));
        assert_eq!(run(&[Begin, Complete, Durable, Evict, Removed]), Some(Absent));
        assert_eq!(run(&[Begin, Complete, Failed, Removed, Begin]), Some(Partial));
        assert_eq!(run(&[Durable]), Some(Whole), "an upload");
        assert_eq!(run(&[Begin, Durable]), Some(Whole), "an upload overtakes a download");
        for wrong in [&[Complete][..], &[Durable, Begin], &[Begin, Complete, Evict], &[Evict], &[Durable, Durable]] {
            assert_eq!(run(wrong), None, "{wrong:?}");
        }
    }
}
