//! Frames: what two nodes write to each other over one connection.
//!
//! A frame is a header of 32 bytes and a body of the length it names. Little endian throughout. The header has the same shape
//! in every version:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | type |
//! | 1 | code: form of a piece set, a class, or a reason; else 0 |
//! | 2..4 | zero |
//! | 4..8 | length of the body, bytes |
//! | 8..12 | channel, where the frame belongs to one; else 0 |
//! | 12..16 | piece, where the frame is about one; else 0 |
//! | 16..24 | CRC-32 of the body of a HELLO, OPEN, OPENED or HAVE; else 0 |
//! | 24..28 | zero |
//! | 28..32 | CRC-32 (IEEE) of bytes 0..28 |
//!
//! | type | frame | code | fields | body |
//! |---|---|---|---|---|
//! | 1 | HELLO | | | below; first frame each way |
//! | 2 | OPEN | form | channel | below |
//! | 3 | OPENED | form | channel | the answerer's bits |
//! | 4 | REFUSED | [`Refusal`] | channel | |
//! | 5 | HAVE | | channel | piece numbers, u32 each, at least one |
//! | 6 | HAVE_ALL | | channel | |
//! | 7 | REQUEST | class | channel, piece | |
//! | 8 | PIECE | | channel, piece | the piece |
//! | 9 | REJECT | [`Rejection`] | channel, piece | |
//! | 10 | CANCEL | | channel, piece | |
//! | 11 | CLOSE | | channel | |
//! | 12 | PING | | | |
//! | 13 | PONG | | | |
//! | 14 | GOODBYE | [`Farewell`] | | |
//!
//! A piece set has one of three forms: 0 bits (a body of one bit a piece, see [`crate::pieces`]), 1 all, 2 none (both without
//! bits). The writer takes the shortest.
//!
//! A class is 0, somebody waits for the piece, or, since version 2, 1, nobody does.
//!
//! HELLO:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `SHOL` |
//! | 4..6 | lowest version spoken |
//! | 6..8 | highest version spoken |
//! | 8..28 | peer id |
//! | 28 | flags: bit 0 origin; the others are ignored |
//! | 29 | window: requests it takes at once, 1..=16 |
//! | 30..32 | port where it accepts peers; 0 nowhere |
//! | 32..34 | shard that dials; 0 from the accepting side |
//! | 34..38 | zone, see [`Zone`]; 0 none |
//! | 38..40 | ignored, written as zero |
//! | 40.. | ignored, up to 256 bytes in all |
//!
//! OPEN:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | algorithm: 0 sha256, 1 sha512 |
//! | 1 | length *n* of the namespace, 1..=255 |
//! | 2..4 | zero |
//! | 4..8 | piece length, bytes |
//! | 8..16 | length of the blob, bytes |
//! | then 32 or 64 | digest |
//! | then *n* | namespace, UTF-8 |
//! | then | the opener's bits, where the form has them |
//!
//! **Versions.** Both sides speak the highest version that both name ([`negotiate`]); this is version 2. Version 1 has no classes. The
//! header's shape, HELLO up to byte 8 and GOODBYE stay for ever, so that any two versions can tell each other that they do not match.
//! What HELLO ignores may gain a meaning that older nodes can do without; any other change takes a new version.
//!
//! **Bounds.** A header says nothing that is acted on before it is checked: a control body is at most [`CONTROL_LEN_MAX`], and the
//! length of a PIECE must be that of the piece which was asked for, known from the blob's geometry. Nothing is allocated by what
//! a frame claims.

use crate::{
    id::{Algorithm, Digest, Namespace, PeerId},
    layout::{Geometry, PIECE_LEN_MAX},
    pieces::PieceSet,
    swarm::Class,
};
use alloc::vec::Vec;

/// Bytes of a header.
pub const HEADER_LEN: usize = 32;
/// Longest body of any frame but PIECE, bytes.
pub const CONTROL_LEN_MAX: u32 = 32 << 10;
/// Most pieces named by one HAVE.
pub const HAVES_MAX: usize = CONTROL_LEN_MAX as usize / 4;
/// Most requests unanswered at once, per direction of a connection.
pub const WINDOW_MAX: u8 = 16;
/// The lowest version this code speaks.
pub const VERSION_MIN: u16 = 1;
/// The highest version this code speaks.
pub const VERSION_MAX: u16 = 2;
/// The first version that knows classes.
pub(crate) const VERSION_CLASSES: u16 = 2;

const MAGIC: [u8; 4] = *b"SHOL";
const HELLO_LEN: usize = 40;
const HELLO_LEN_MAX: usize = 256;
const OPEN_LEN: usize = 16;
/// An OPEN of the longest digest and namespace with the most bits fits a control frame.
const _: () =
    assert!(OPEN_LEN + 64 + Namespace::LEN_MAX + crate::layout::PIECES_MAX as usize / 8 <= CONTROL_LEN_MAX as usize);

/// One blob's lane on a connection. The dialling side opens even ones, the accepting side odd ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Channel(pub(crate) u32);

impl Channel {
    /// The number on the wire.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// Bytes that are no frame of ours: the other side is broken or hostile.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// A header damaged on the way, or not a header at all.
    #[error("header fails its checksum")]
    HeaderChecksum,
    /// A type of no version we speak.
    #[error("frame has unknown type {0}")]
    Type(u8),
    /// A code that the type does not have.
    #[error("frame of type {kind} has unknown code {code}")]
    Code {
        /// The type.
        kind: u8,
        /// The code.
        code: u8,
    },
    /// A field is set that the type does not have.
    #[error("frame of type {0} sets a field that must be zero")]
    Reserved(u8),
    /// A body longer or shorter than its type allows.
    #[error("frame of type {kind} has a body of {len} bytes")]
    Length {
        /// The type.
        kind: u8,
        /// The length claimed.
        len: u32,
    },
    /// A body damaged on the way.
    #[error("body fails its checksum")]
    BodyChecksum,
    /// A HELLO without the magic.
    #[error("hello has a wrong magic")]
    Magic,
    /// A field of a body that no sound node writes.
    #[error("{0} is out of bounds")]
    Field(&'static str),
}

macro_rules! codes {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $code:literal, $text:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
        pub enum $name {
            $($(#[$doc])* #[error($text)] $variant,)*
        }

        impl $name {
            /// Every one, in the order of their codes.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            const fn code(self) -> u8 {
                match self {
                    $(Self::$variant => $code,)*
                }
            }

            const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    /// Why a channel is not opened.
    Refusal {
        /// The blob is not here and not being fetched.
        Unknown = 1, "blob is unknown";
        /// No room for another channel or blob now.
        Busy = 2, "busy";
        /// The blob has other edges here.
        Geometry = 3, "geometry differs";
        /// A channel for this blob is open already, or is being opened by the dialling side.
        Duplicate = 4, "channel is a duplicate";
        /// The node is going away.
        Leaving = 5, "leaving";
    }
}

codes! {
    /// Why a request is not answered with its piece.
    Rejection {
        /// The piece is not here (any more).
        Missing = 1, "piece is missing";
        /// Not now: the node serves as much as it can.
        Busy = 2, "busy";
        /// It was cancelled in time.
        Cancelled = 3, "cancelled";
        /// The piece could not be read.
        Failed = 4, "piece could not be read";
        /// An origin has just sent it to another, from whom it will spread.
        Elsewhere = 5, "piece was just sent elsewhere";
    }
}

codes! {
    /// Why a node ends a connection.
    Farewell {
        /// It is going away.
        Leaving = 1, "leaving";
        /// Nothing is left to do on it.
        Done = 2, "done";
        /// The two nodes have another connection.
        Duplicate = 3, "duplicate connection";
        /// No room for another connection now.
        Busy = 4, "busy";
        /// No version in common.
        Version = 5, "no version in common";
        /// The other side is this node itself, or not the node that was dialled.
        Identity = 6, "wrong peer";
        /// The other side broke the protocol.
        Protocol = 7, "protocol violation";
        /// The other side was too slow or silent.
        Timeout = 8, "timeout";
        /// The other side sent too much bad data.
        Banned = 9, "banned";
    }
}

/// How a piece set is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// A bit for each piece.
    Bits,
    /// Every piece; no bytes.
    All,
    /// No piece; no bytes.
    None,
}

impl Form {
    /// The shortest form of this set.
    pub fn of(set: &PieceSet) -> Self {
        if set.is_full() {
            Self::All
        } else if set.is_empty() {
            Self::None
        } else {
            Self::Bits
        }
    }

    const fn code(self) -> u8 {
        match self {
            Self::Bits => 0,
            Self::All => 1,
            Self::None => 2,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Bits),
            1 => Some(Self::All),
            2 => Some(Self::None),
            _ => None,
        }
    }

    /// Reads the set that `bytes` hold in this form, of a blob with this geometry.
    pub fn decode(self, geometry: &Geometry, bytes: &[u8]) -> Result<PieceSet, WireError> {
        let set = match self {
            Self::Bits => PieceSet::from_bytes(geometry, bytes),
            Self::All => bytes.is_empty().then(|| PieceSet::full(geometry)),
            Self::None => bytes.is_empty().then(|| PieceSet::new(geometry)),
        };
        set.ok_or(WireError::Field("piece set"))
    }
}

/// A body that is to be read and checked against a CRC-32 before it is looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Body {
    /// Its length, bytes; within the bound of its frame.
    pub len: u32,
    /// Its CRC-32.
    pub crc: u32,
}

impl Body {
    /// Describes these bytes.
    #[expect(clippy::cast_possible_truncation, reason = "bodies are made here, within CONTROL_LEN_MAX")]
    fn of(bytes: &[u8]) -> Self {
        debug_assert!(bytes.len() <= CONTROL_LEN_MAX as usize);
        Self { len: bytes.len() as u32, crc: crc32fast::hash(bytes) }
    }

    /// Whether these are the bytes described.
    pub fn check(&self, bytes: &[u8]) -> Result<(), WireError> {
        let same = bytes.len() == self.len as usize && crc32fast::hash(bytes) == self.crc;
        if same { Ok(()) } else { Err(WireError::BodyChecksum) }
    }
}

/// A header that passed every check which needs no knowledge of the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the module's table says what the fields are")]
pub enum Header {
    /// Who is there; the first frame each way.
    Hello { body: Body },
    /// Opens a channel for a blob.
    Open { channel: Channel, form: Form, body: Body },
    /// Yes to an OPEN.
    Opened { channel: Channel, form: Form, body: Body },
    /// No to an OPEN.
    Refused { channel: Channel, reason: Refusal },
    /// More pieces are here.
    Have { channel: Channel, body: Body },
    /// All pieces are here.
    HaveAll { channel: Channel },
    /// Asks for a piece.
    Request { channel: Channel, piece: u32, class: Class },
    /// Yes to a REQUEST; `len` is claimed, not checked.
    Piece { channel: Channel, piece: u32, len: u32 },
    /// No to a REQUEST.
    Reject { channel: Channel, piece: u32, reason: Rejection },
    /// Takes a REQUEST back; it is still answered, by PIECE or REJECT.
    Cancel { channel: Channel, piece: u32 },
    /// Ends a channel. Answered by CLOSE unless it is itself the answer; a side that has sent CLOSE sends nothing more on the channel.
    Close { channel: Channel },
    /// Asks for a PONG.
    Ping,
    /// Answers PING.
    Pong,
    /// Ends the connection.
    Goodbye { reason: Farewell },
}

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const OPEN: u8 = 2;
    pub(super) const OPENED: u8 = 3;
    pub(super) const REFUSED: u8 = 4;
    pub(super) const HAVE: u8 = 5;
    pub(super) const HAVE_ALL: u8 = 6;
    pub(super) const REQUEST: u8 = 7;
    pub(super) const PIECE: u8 = 8;
    pub(super) const REJECT: u8 = 9;
    pub(super) const CANCEL: u8 = 10;
    pub(super) const CLOSE: u8 = 11;
    pub(super) const PING: u8 = 12;
    pub(super) const PONG: u8 = 13;
    pub(super) const GOODBYE: u8 = 14;
}

fn class_code(class: Class) -> u8 {
    match class {
        Class::Foreground => 0,
        Class::Background => 1,
    }
}

fn class_from(code: u8) -> Option<Class> {
    [Class::Foreground, Class::Background].into_iter().find(|class| class_code(*class) == code)
}

/// The fields of a header before they have a meaning.
#[derive(Clone, Copy, Default)]
struct Raw {
    kind: u8,
    code: u8,
    len: u32,
    channel: u32,
    piece: u32,
    crc: u64,
}

impl Raw {
    fn new(kind: u8) -> Self {
        Self { kind, ..Self::default() }
    }

    fn code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    fn channel(self, channel: Channel) -> Self {
        Self { channel: channel.0, ..self }
    }

    fn piece(self, piece: u32) -> Self {
        Self { piece, ..self }
    }

    fn body(self, body: Body) -> Self {
        Self { len: body.len, crc: u64::from(body.crc), ..self }
    }
}

impl Header {
    /// The 32 bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let raw = match *self {
            Self::Hello { body } => Raw::new(kind::HELLO).body(body),
            Self::Open { channel, form, body } => Raw::new(kind::OPEN).channel(channel).code(form.code()).body(body),
            Self::Opened { channel, form, body } => {
                Raw::new(kind::OPENED).channel(channel).code(form.code()).body(body)
            }
            Self::Refused { channel, reason } => Raw::new(kind::REFUSED).channel(channel).code(reason.code()),
            Self::Have { channel, body } => Raw::new(kind::HAVE).channel(channel).body(body),
            Self::HaveAll { channel } => Raw::new(kind::HAVE_ALL).channel(channel),
            Self::Request { channel, piece, class } => {
                Raw::new(kind::REQUEST).channel(channel).piece(piece).code(class_code(class))
            }
            Self::Piece { channel, piece, len } => Raw { len, ..Raw::new(kind::PIECE) }.channel(channel).piece(piece),
            Self::Reject { channel, piece, reason } => {
                Raw::new(kind::REJECT).channel(channel).piece(piece).code(reason.code())
            }
            Self::Cancel { channel, piece } => Raw::new(kind::CANCEL).channel(channel).piece(piece),
            Self::Close { channel } => Raw::new(kind::CLOSE).channel(channel),
            Self::Ping => Raw::new(kind::PING),
            Self::Pong => Raw::new(kind::PONG),
            Self::Goodbye { reason } => Raw::new(kind::GOODBYE).code(reason.code()),
        };
        let mut out = [0; HEADER_LEN];
        out[0] = raw.kind;
        out[1] = raw.code;
        out[4..8].copy_from_slice(&raw.len.to_le_bytes());
        out[8..12].copy_from_slice(&raw.channel.to_le_bytes());
        out[12..16].copy_from_slice(&raw.piece.to_le_bytes());
        out[16..24].copy_from_slice(&raw.crc.to_le_bytes());
        let seal = crc32fast::hash(&out[..28]);
        out[28..].copy_from_slice(&seal.to_le_bytes());
        out
    }

    /// Reads a header: checksum, type, code, the bounds of the body's length, and that every field the type does not have is zero.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let mut fields = Reader(bytes);
        let (kind, code) = (fields.u8()?, fields.u8()?);
        let zero = fields.u16()?;
        let (len, channel, piece, crc) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u64()?);
        let zero = u32::from(zero) | fields.u32()?;
        if fields.u32()? != crc32fast::hash(&bytes[..28]) {
            return Err(WireError::HeaderChecksum);
        }
        let unknown = WireError::Code { kind, code };
        let body = Body { len, crc: u32::try_from(crc).map_err(|_| WireError::Reserved(kind))? };
        let form = Form::from_code(code).ok_or(unknown);
        let on = Channel(channel);
        let header = match kind {
            kind::HELLO => Self::Hello { body },
            kind::OPEN => Self::Open { channel: on, form: form?, body },
            kind::OPENED => Self::Opened { channel: on, form: form?, body },
            kind::REFUSED => Self::Refused { channel: on, reason: Refusal::from_code(code).ok_or(unknown)? },
            kind::HAVE => Self::Have { channel: on, body },
            kind::HAVE_ALL => Self::HaveAll { channel: on },
            kind::REQUEST => Self::Request { channel: on, piece, class: class_from(code).ok_or(unknown)? },
            kind::PIECE => Self::Piece { channel: on, piece, len },
            kind::REJECT => Self::Reject { channel: on, piece, reason: Rejection::from_code(code).ok_or(unknown)? },
            kind::CANCEL => Self::Cancel { channel: on, piece },
            kind::CLOSE => Self::Close { channel: on },
            kind::PING => Self::Ping,
            kind::PONG => Self::Pong,
            kind::GOODBYE => Self::Goodbye { reason: Farewell::from_code(code).ok_or(unknown)? },
            _ => return Err(WireError::Type(kind)),
        };
        if !header.allows(len) {
            return Err(WireError::Length { kind, len });
        }
        // Whatever this type does not carry was lost in `header`; written again it would differ.
        if zero != 0 || header.encode() != *bytes {
            return Err(WireError::Reserved(kind));
        }
        Ok(header)
    }

    fn allows(&self, len: u32) -> bool {
        match self {
            Self::Hello { .. } => (HELLO_LEN..=HELLO_LEN_MAX).contains(&(len as usize)),
            Self::Open { .. } => len as usize > OPEN_LEN + 32 && len <= CONTROL_LEN_MAX,
            Self::Opened { form: Form::Bits, .. } => (1..=CONTROL_LEN_MAX).contains(&len),
            Self::Have { .. } => (4..=CONTROL_LEN_MAX).contains(&len) && len.is_multiple_of(4),
            Self::Piece { .. } => (1..=PIECE_LEN_MAX).contains(&len),
            _ => len == 0,
        }
    }
}

/// What a node says of itself first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Lowest and highest version it speaks.
    pub versions: (u16, u16),
    /// Its name.
    pub id: PeerId,
    /// Whether it is an origin.
    pub origin: bool,
    /// Requests it takes at once, 1..=[`WINDOW_MAX`].
    pub window: u8,
    /// Port where it accepts peers; none where it does not.
    pub port: Option<core::num::NonZeroU16>,
    /// The shard that dials; 0 from the accepting side.
    pub shard: u16,
    /// The zone it is in.
    pub zone: Zone,
}

/// A network zone on the wire: the CRC-32 of its name, which is enough to tell a few apart; 0 for none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Zone(u32);

impl Zone {
    /// No zone.
    pub const NONE: Self = Self(0);

    /// The zone of this name; none where it is empty.
    pub fn of(name: &str) -> Self {
        Self(crc32fast::hash(name.as_bytes()))
    }
}

impl Hello {
    /// A node that speaks what this code speaks and takes [`WINDOW_MAX`] requests.
    pub const fn new(id: PeerId) -> Self {
        Self {
            versions: (VERSION_MIN, VERSION_MAX),
            id,
            origin: false,
            window: WINDOW_MAX,
            port: None,
            shard: 0,
            zone: Zone::NONE,
        }
    }

    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        frame(
            out,
            |body| Header::Hello { body },
            |out| {
                out.extend(MAGIC);
                out.extend(self.versions.0.to_le_bytes());
                out.extend(self.versions.1.to_le_bytes());
                out.extend(self.id.as_bytes());
                out.extend([u8::from(self.origin), self.window]);
                out.extend(self.port.map_or(0, core::num::NonZeroU16::get).to_le_bytes());
                out.extend(self.shard.to_le_bytes());
                out.extend(self.zone.0.to_le_bytes());
                out.extend([0; 2]);
            },
        );
    }

    /// Reads a body whose checksum holds. Of a HELLO with another version only the versions and the id are bound to be sound.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Reader(bytes);
        if fields.array()? != MAGIC {
            return Err(WireError::Magic);
        }
        let versions = (fields.u16()?, fields.u16()?);
        let id = PeerId::new(fields.array()?);
        let (flags, window) = (fields.u8()?, fields.u8()?);
        let (port, shard) = (core::num::NonZeroU16::new(fields.u16()?), fields.u16()?);
        let zone = Zone(fields.u32()?);
        if versions.0 > versions.1 {
            return Err(WireError::Field("version"));
        }
        if negotiate(versions).is_some() && !(1..=WINDOW_MAX).contains(&window) {
            return Err(WireError::Field("window"));
        }
        Ok(Self { versions, id, origin: flags & 1 != 0, window, port, shard, zone })
    }
}

/// The version to speak with a node that speaks these, lowest and highest: the highest in common.
pub fn negotiate(theirs: (u16, u16)) -> Option<u16> {
    let version = theirs.1.min(VERSION_MAX);
    (version >= theirs.0.max(VERSION_MIN)).then_some(version)
}

/// The body of an OPEN: which blob, cut how, and what of it the opener has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Open {
    /// The blob.
    pub digest: Digest,
    /// The group it was asked under.
    pub namespace: Namespace,
    /// Where its edges are.
    pub geometry: Geometry,
    /// What the opener has.
    pub has: PieceSet,
}

impl Open {
    /// Appends the frame.
    pub fn encode(&self, channel: Channel, out: &mut Vec<u8>) {
        let form = Form::of(&self.has);
        frame(
            out,
            |body| Header::Open { channel, form, body },
            |out| {
                let namespace = self.namespace.as_str();
                out.push(u8::from(self.digest.algorithm() == Algorithm::Sha512));
                out.push(u8::try_from(namespace.len()).unwrap_or(u8::MAX));
                out.extend([0; 2]);
                out.extend(self.geometry.piece_length().to_le_bytes());
                out.extend(self.geometry.length().to_le_bytes());
                out.extend(self.digest.as_bytes());
                out.extend(namespace.as_bytes());
                set_bits(&self.has, out);
            },
        );
    }

    /// Reads a body whose checksum holds.
    pub fn decode(form: Form, bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Reader(bytes);
        let algorithm = match fields.u8()? {
            0 => Algorithm::Sha256,
            1 => Algorithm::Sha512,
            _ => return Err(WireError::Field("algorithm")),
        };
        let namespace_len = usize::from(fields.u8()?);
        if fields.u16()? != 0 {
            return Err(WireError::Field("padding"));
        }
        let piece_length = fields.u32()?;
        let geometry = Geometry::new(fields.u64()?, piece_length).ok_or(WireError::Field("geometry"))?;
        let digest = Digest::from_bytes(algorithm, fields.take(algorithm.digest_len())?);
        let digest = digest.ok_or(WireError::Field("digest"))?;
        let namespace = core::str::from_utf8(fields.take(namespace_len)?).ok().and_then(|text| text.parse().ok());
        let namespace = namespace.ok_or(WireError::Field("namespace"))?;
        let has = form.decode(&geometry, fields.0)?;
        Ok(Self { digest, namespace, geometry, has })
    }
}

/// Appends an OPENED.
pub fn encode_opened(channel: Channel, has: &PieceSet, out: &mut Vec<u8>) {
    let form = Form::of(has);
    frame(out, |body| Header::Opened { channel, form, body }, |out| set_bits(has, out));
}

/// Appends a HAVE of at least one and at most [`HAVES_MAX`] pieces.
pub fn encode_have(channel: Channel, pieces: impl Iterator<Item = u32>, out: &mut Vec<u8>) {
    frame(out, |body| Header::Have { channel, body }, |out| out.extend(pieces.flat_map(u32::to_le_bytes)));
}

/// Reads the piece numbers of a HAVE's body whose checksum holds; none of them is checked.
pub fn decode_have(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.as_chunks().0.iter().map(|piece| u32::from_le_bytes(*piece))
}

fn set_bits(set: &PieceSet, out: &mut Vec<u8>) {
    if Form::of(set) == Form::Bits {
        let bytes = set.words().iter().flat_map(|word| word.to_le_bytes());
        out.extend(bytes.take(set.pieces().div_ceil(8) as usize));
    }
}

/// Appends a frame whose header describes the body that `write` appends.
fn frame(out: &mut Vec<u8>, header: impl FnOnce(Body) -> Header, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend([0; HEADER_LEN]);
    write(out);
    let (head, body) = out[start..].split_at_mut(HEADER_LEN);
    let header = match body.is_empty() {
        true => header(Body { len: 0, crc: 0 }),
        false => header(Body::of(body)),
    };
    head.copy_from_slice(&header.encode());
}

/// Takes fields off the front of a body; a body that ends early is an error.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(WireError::Field("length of the body"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(WireError::Field("length of the body"))?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    const ON: Channel = Channel(0x0102_0304);

    fn geometry(pieces: u32) -> Geometry {
        Geometry::new(u64::from(pieces) << 20, 1 << 20).unwrap()
    }

    fn set(geometry: &Geometry, pieces: &[u32]) -> PieceSet {
        let mut set = PieceSet::new(geometry);
        pieces.iter().for_each(|piece| assert!(set.insert(geometry.piece(*piece).unwrap())));
        set
    }

    fn hello() -> Hello {
        Hello {
            origin: true,
            port: core::num::NonZeroU16::new(16_001),
            shard: 0x0a0b,
            zone: Zone::of("rack-7"),
            ..Hello::new(PeerId::new([7; 20]))
        }
    }

    fn open(algorithm: Algorithm, namespace: &str, has: &[u32]) -> Open {
        let digest = Digest::from_bytes(algorithm, &vec![9; algorithm.digest_len()]).unwrap();
        let geometry = geometry(12);
        Open { digest, namespace: namespace.parse().unwrap(), geometry, has: set(&geometry, has) }
    }

    /// One header of every type and code.
    fn headers() -> Vec<Header> {
        let body = Body { len: 200, crc: 0xdead_beef };
        let (channel, piece) = (ON, 77);
        let mut all = vec![
            Header::Hello { body },
            Header::Open { channel, form: Form::Bits, body },
            Header::Open { channel, form: Form::All, body },
            Header::Opened { channel, form: Form::Bits, body },
            Header::Opened { channel, form: Form::None, body: Body { len: 0, crc: 0 } },
            Header::Have { channel, body },
            Header::HaveAll { channel },
            Header::Request { channel, piece, class: Class::Foreground },
            Header::Request { channel, piece, class: Class::Background },
            Header::Piece { channel, piece, len: PIECE_LEN_MAX },
            Header::Cancel { channel, piece },
            Header::Close { channel },
            Header::Ping,
            Header::Pong,
        ];
        all.extend(Refusal::ALL.iter().map(|reason| Header::Refused { channel, reason: *reason }));
        all.extend(Rejection::ALL.iter().map(|reason| Header::Reject { channel, piece, reason: *reason }));
        all.extend(Farewell::ALL.iter().map(|reason| Header::Goodbye { reason: *reason }));
        all
    }

    /// A frame's header and body.
    fn split(bytes: &[u8]) -> (Header, &[u8]) {
        let (header, body) = bytes.split_first_chunk().unwrap();
        (Header::decode(header).unwrap(), body)
    }

    /// A header with these bytes put in, its seal made good again: what a hostile node can write.
    fn forged(header: Header, at: usize, bytes: &[u8]) -> [u8; HEADER_LEN] {
        let mut out = header.encode();
        out[at..at + bytes.len()].copy_from_slice(bytes);
        let seal = crc32fast::hash(&out[..28]);
        out[28..].copy_from_slice(&seal.to_le_bytes());
        out
    }

    #[test]
    fn a_request_on_the_wire() {
        let request = Header::Request { channel: ON, piece: 5, class: Class::Foreground }.encode();
        let (fields, seal) = request.split_at(28);
        assert_eq!(fields, [7, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(seal, crc32fast::hash(fields).to_le_bytes());
    }

    #[test]
    fn every_header_round_trips_and_any_flipped_bit_is_noticed() {
        for header in headers() {
            let bytes = header.encode();
            assert_eq!(Header::decode(&bytes), Ok(header));
            for bit in 0..8 * HEADER_LEN {
                let mut damaged = bytes;
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Header::decode(&damaged), Err(WireError::HeaderChecksum), "{header:?}, bit {bit}");
            }
        }
    }

    #[test]
    fn a_sound_checksum_does_not_make_a_sound_header() {
        let len = |header, len: u32| Header::decode(&forged(header, 4, &len.to_le_bytes()));
        let body = Body { len: 200, crc: 1 };
        let opened = Header::Opened { channel: ON, form: Form::All, body: Body { len: 0, crc: 0 } };
        for (header, bad) in [
            (Header::Hello { body }, 39),
            (Header::Hello { body }, 257),
            (Header::Open { channel: ON, form: Form::Bits, body }, 48),
            (Header::Open { channel: ON, form: Form::Bits, body }, CONTROL_LEN_MAX + 1),
            (opened, 1),
            (Header::Have { channel: ON, body }, 0),
            (Header::Have { channel: ON, body }, 6),
            (Header::Have { channel: ON, body }, u32::MAX),
            (Header::Piece { channel: ON, piece: 0, len: 1 }, 0),
            (Header::Piece { channel: ON, piece: 0, len: 1 }, PIECE_LEN_MAX + 1),
            (Header::Ping, 1),
        ] {
            let kind = header.encode()[0];
            assert_eq!(len(header, bad), Err(WireError::Length { kind, len: bad }), "{header:?}");
        }
        assert_eq!(Header::decode(&forged(Header::Ping, 0, &[0])), Err(WireError::Type(0)));
        assert_eq!(Header::decode(&forged(Header::Ping, 0, &[15])), Err(WireError::Type(15)));
        let refused = Header::Refused { channel: ON, reason: Refusal::Busy };
        assert_eq!(Header::decode(&forged(refused, 1, &[99])), Err(WireError::Code { kind: 4, code: 99 }));
        // Fields that PING has not: code, padding, channel, piece, checksum of a body, padding.
        for at in [1, 2, 8, 12, 16, 20, 24] {
            assert_eq!(Header::decode(&forged(Header::Ping, at, &[1])), Err(WireError::Reserved(12)), "byte {at}");
        }
    }

    #[test]
    fn hello_round_trips_and_ignores_what_a_later_one_adds() {
        let mut frame = Vec::new();
        hello().encode(&mut frame);
        let (Header::Hello { body }, bytes) = split(&frame) else { panic!("not a hello") };
        assert_eq!(body.check(bytes), Ok(()));
        assert_eq!(Hello::decode(bytes), Ok(hello()));
        let mut longer = bytes.to_vec();
        longer.extend([0xff; 30]);
        longer[28] |= 0xf0;
        longer[38..40].fill(1);
        assert_eq!(Hello::decode(&longer), Ok(hello()));
        let with = |at: usize, value: u8| {
            let mut bytes = bytes.to_vec();
            bytes[at] = value;
            Hello::decode(&bytes)
        };
        assert_eq!(with(0, b'X'), Err(WireError::Magic));
        assert_eq!(with(29, 0), Err(WireError::Field("window")));
        assert_eq!(with(29, 17), Err(WireError::Field("window")));
        assert_eq!(with(6, 0), Err(WireError::Field("version")));
        // A stranger's version may have given byte 29 another meaning.
        let mut stranger = bytes.to_vec();
        stranger[4] = 9;
        stranger[6] = 9;
        stranger[29] = 99;
        assert_eq!(Hello::decode(&stranger).unwrap().versions, (9, 9));
        (0..HELLO_LEN - 6).for_each(|len| assert!(Hello::decode(&bytes[..len]).is_err(), "{len} bytes"));
    }

    #[test]
    fn the_highest_version_in_common_is_spoken() {
        assert_eq!(negotiate((1, 1)), Some(1));
        assert_eq!(negotiate((1, 7)), Some(VERSION_MAX));
        assert_eq!(negotiate((0, 0)), None);
        assert_eq!(negotiate((VERSION_MAX + 1, 7)), None);
    }

    #[test]
    fn open_round_trips_and_refuses_every_cut() {
        let all: Vec<u32> = (0..12).collect();
        for (algorithm, namespace, has) in [
            (Algorithm::Sha256, "library/app", &[0, 5, 11][..]),
            (Algorithm::Sha512, "x", &[]),
            (Algorithm::Sha256, &"n".repeat(255), &all),
        ] {
            let open = open(algorithm, namespace, has);
            let mut frame = Vec::new();
            open.encode(ON, &mut frame);
            let (Header::Open { channel, form, body }, bytes) = split(&frame) else { panic!("not an open") };
            assert_eq!((channel, form), (ON, Form::of(&open.has)));
            assert_eq!(body.check(bytes), Ok(()));
            assert_eq!(Open::decode(form, bytes), Ok(open));
            (0..bytes.len()).for_each(|len| assert!(Open::decode(form, &bytes[..len]).is_err(), "{len} bytes"));
            let longer = [bytes, &[0]].concat();
            assert_eq!(Open::decode(form, &longer), Err(WireError::Field("piece set")));
        }
    }

    #[test]
    fn an_open_out_of_bounds_is_refused() {
        let mut frame = Vec::new();
        open(Algorithm::Sha256, "a/b", &[1]).encode(ON, &mut frame);
        let with = |at: usize, value: &[u8]| {
            let mut bytes = frame[HEADER_LEN..].to_vec();
            bytes[at..at + value.len()].copy_from_slice(value);
            Open::decode(Form::Bits, &bytes).unwrap_err()
        };
        assert_eq!(with(0, &[2]), WireError::Field("algorithm"));
        assert_eq!(with(1, &[0]), WireError::Field("namespace"));
        assert_eq!(with(2, &[1]), WireError::Field("padding"));
        for piece_length in [0, 1, 3 << 20, 1 << 25, u32::MAX] {
            assert_eq!(with(4, &piece_length.to_le_bytes()), WireError::Field("geometry"), "{piece_length}");
        }
        assert_eq!(with(8, &u64::MAX.to_le_bytes()), WireError::Field("geometry"));
        assert_eq!(with(48, b"a//"), WireError::Field("namespace"));
        assert_eq!(with(48, &[0xff, 0xfe, 0xfd]), WireError::Field("namespace"));
        assert_eq!(with(52, &[0xff]), WireError::Field("piece set"), "a bit beyond the last piece");
    }

    #[test]
    fn piece_sets_take_the_shortest_form() {
        let g = geometry(9);
        for (has, form, bytes) in [
            (set(&g, &[]), Form::None, &[][..]),
            (PieceSet::full(&g), Form::All, &[]),
            (set(&g, &[0, 8]), Form::Bits, &[1, 1]),
        ] {
            let mut frame = Vec::new();
            encode_opened(ON, &has, &mut frame);
            let (Header::Opened { form: written, .. }, body) = split(&frame) else { panic!("not an opened") };
            assert_eq!((written, body), (form, bytes));
            assert_eq!(form.decode(&g, body), Ok(has));
        }
        assert!(Form::All.decode(&g, &[0]).is_err());
        assert!(Form::Bits.decode(&g, &[1, 1, 0]).is_err());
    }

    #[test]
    fn haves_round_trip_to_the_bound() {
        for count in [1, 2, HAVES_MAX as u32] {
            let mut frame = Vec::new();
            encode_have(ON, 0..count, &mut frame);
            let (Header::Have { channel, body }, bytes) = split(&frame) else { panic!("not a have") };
            assert_eq!((channel, body.len), (ON, 4 * count));
            assert_eq!(body.check(bytes), Ok(()));
            assert!(decode_have(bytes).eq(0..count));
        }
    }

    #[test]
    fn a_flipped_bit_in_a_body_is_noticed() {
        let mut frames = [const { Vec::new() }; 4];
        hello().encode(&mut frames[0]);
        open(Algorithm::Sha256, "a", &[3]).encode(ON, &mut frames[1]);
        encode_opened(ON, &set(&geometry(20), &[3]), &mut frames[2]);
        encode_have(ON, [1, 2, 3].into_iter(), &mut frames[3]);
        for frame in frames {
            let (header, bytes) = split(&frame);
            let (Header::Hello { body }
            | Header::Open { body, .. }
            | Header::Opened { body, .. }
            | Header::Have { body, .. }) = header
            else {
                panic!("a frame without a body");
            };
            for bit in 0..8 * bytes.len() {
                let mut damaged = bytes.to_vec();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(body.check(&damaged), Err(WireError::BodyChecksum), "{header:?}, bit {bit}");
            }
            assert!(body.check(&bytes[1..]).is_err());
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), pieces in 0u32..3000) {
            if let Some(header) = bytes.first_chunk() {
                let _ = Header::decode(header);
            }
            let _ = Hello::decode(&bytes);
            let g = geometry(pieces);
            for form in [Form::Bits, Form::All, Form::None] {
                let _ = Open::decode(form, &bytes);
                let _ = form.decode(&g, &bytes);
            }
            prop_assert!(decode_have(&bytes).count() <= bytes.len() / 4);
        }

        /// Whatever passes with a good seal is exactly what we would have written.
        #[test]
        fn headers_have_one_spelling(mut bytes in any::<[u8; HEADER_LEN]>(), kind in 0u8..16, zeros in any::<u32>()) {
            bytes[0] = kind;
            // Most of the fields zero, or nothing would ever pass.
            (1..28).filter(|at| zeros >> at & 1 == 0).for_each(|at| bytes[at] = 0);
            let seal = crc32fast::hash(&bytes[..28]);
            bytes[28..].copy_from_slice(&seal.to_le_bytes());
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }

        #[test]
        fn opens_with_any_damage_never_panic(at in 0usize..90, with in any::<[u8; 4]>(), cut in 0usize..90) {
            let mut frame = Vec::new();
            open(Algorithm::Sha256, "library/some/longer/name", &[1, 2]).encode(ON, &mut frame);
            let mut body = frame.split_off(HEADER_LEN);
            let end = (at + 4).min(body.len());
            body[at.min(end)..end].copy_from_slice(&with[..end - at.min(end)]);
            body.truncate(body.len().saturating_sub(cut));
            let _ = Open::decode(Form::Bits, &body);
            let _ = Open::decode(Form::None, &body);
        }
    }
}
