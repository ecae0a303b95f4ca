//! The bytes of an announce: `POST /announce`, `application/vnd.shoal.announce`.
//!
//! Little endian, version 1; a change of any field's meaning takes a new version. A body is at most [`BODY_MAX`] bytes.
//!
//! Request:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `SANN` |
//! | 4 | version, 1 |
//! | 5 | flags: 1 full, 2 origin |
//! | 6..26 | peer id |
//! | then 7 or 19 | address: family u8 (4 or 6), IP, port u16 |
//! | then 1 + *z* | zone: length *z* u8, at most 63, UTF-8 |
//! | then 2 | number of blobs |
//! | for each | digest: algorithm u8 (0 sha256, 1 sha512), 32 or 64 bytes |
//! | | state u8: 0 gone, 1 leeching, 2 seeding |
//! | | peers u16, where leeching or seeding |
//! | | want u16, have u32, pieces u32, where leeching |
//!
//! Response:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `SANR` |
//! | 4 | version, 1 |
//! | 5 | flags: 1 resend |
//! | 6..10 | interval, ms |
//! | 10..12 | number of peers |
//! | for each | peer id, 20 bytes; flags u8: 1 origin; address as above |
//! | then 2 | number of blobs |
//! | for each | digest as above; number u8; places in the list of peers, u16 each |

use super::{Blob, Node, Request, Response, State};
use crate::{
    id::{Algorithm, Digest, PeerId},
    swarm::Candidate,
};
use alloc::{boxed::Box, collections::BTreeMap, vec::Vec};
use core::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// Longest body, bytes.
pub const BODY_MAX: usize = 64 << 10;
/// Most blobs in a request.
pub const BLOBS_MAX: usize = 512;
/// Most peers named for a blob.
pub const PEERS_PER_BLOB_MAX: usize = 32;
/// Longest zone, bytes.
pub const ZONE_LEN_MAX: usize = 63;

const DIGEST_LEN_MAX: usize = 65;
const ADDR_LEN_MAX: usize = 19;
const REQUEST_LEN_MAX: usize = 26 + ADDR_LEN_MAX + 1 + ZONE_LEN_MAX + 2 + BLOBS_MAX * (DIGEST_LEN_MAX + 13);
const _: () = assert!(REQUEST_LEN_MAX <= BODY_MAX);

/// Bytes that are no announce.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// Longer than [`BODY_MAX`].
    #[error("announce has {0} bytes, at most {BODY_MAX} are taken")]
    TooLong(usize),
    /// Another magic or version.
    #[error("announce has an unknown magic or version")]
    Kind,
    /// Ends within a field, or goes on after the last.
    #[error("announce is shorter or longer than it says")]
    Length,
    /// A field that cannot be.
    #[error("announce has no such {0}")]
    Value(&'static str),
}

impl Request {
    /// The bytes of the table. Blobs beyond [`BLOBS_MAX`] and a zone beyond [`ZONE_LEN_MAX`] are left out.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128 + 46 * self.blobs.len().min(BLOBS_MAX));
        out.extend(*b"SANN\x01");
        out.push(u8::from(self.full) | u8::from(self.node.origin) << 1);
        out.extend(self.node.id.as_bytes());
        put_addr(&mut out, self.node.addr);
        let zone = Some(&*self.node.zone).filter(|zone| zone.len() <= ZONE_LEN_MAX).unwrap_or_default();
        out.extend(u8::try_from(zone.len()));
        out.extend(zone.as_bytes());
        let blobs = &self.blobs[..self.blobs.len().min(BLOBS_MAX)];
        put_count(&mut out, blobs.len());
        for blob in blobs {
            put_digest(&mut out, &blob.digest);
            match blob.state {
                State::Gone => out.push(0),
                State::Leeching { have, pieces, peers, want } => {
                    out.push(1);
                    out.extend(peers.to_le_bytes());
                    out.extend(want.to_le_bytes());
                    out.extend(have.to_le_bytes());
                    out.extend(pieces.to_le_bytes());
                }
                State::Seeding { peers } => {
                    out.push(2);
                    out.extend(peers.to_le_bytes());
                }
            }
        }
        out
    }

    /// Reads what [`Self::encode`] wrote. Allocates no more than a few times the bytes given.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut read = Read::new(bytes, *b"SANN\x01")?;
        let flags = read.u8()?;
        if flags & !3 != 0 {
            return Err(DecodeError::Value("flag"));
        }
        let id = PeerId::new(read.array()?);
        let addr = read.addr()?;
        let zone_len = usize::from(read.u8()?);
        let zone = core::str::from_utf8(read.take(zone_len)?).ok().filter(|_| zone_len <= ZONE_LEN_MAX);
        let zone: Box<str> = zone.ok_or(DecodeError::Value("zone"))?.into();
        let count = usize::from(read.u16()?);
        if count > BLOBS_MAX {
            return Err(DecodeError::Value("number of blobs"));
        }
        let blobs = (0..count).map(|_| read.blob()).collect::<Result<_, _>>()?;
        read.end()?;
        Ok(Self { node: Node { id, addr, zone, origin: flags & 2 != 0 }, full: flags & 1 != 0, blobs })
    }
}

impl Response {
    /// The bytes of the table. Blobs that would pass [`BODY_MAX`] are left out: who still wants peers asks again.
    pub fn encode(&self) -> Vec<u8> {
        let mut peers = Vec::new();
        let mut places = BTreeMap::new();
        let mut blobs = Vec::new();
        let mut count = 0;
        for (digest, candidates) in &self.blobs {
            let candidates = &candidates[..candidates.len().min(PEERS_PER_BLOB_MAX)];
            let more = DIGEST_LEN_MAX + 1 + candidates.len() * (2 + 21 + ADDR_LEN_MAX);
            if 14 + peers.len() + blobs.len() + more > BODY_MAX {
                break;
            }
            put_digest(&mut blobs, digest);
            blobs.extend(u8::try_from(candidates.len()));
            for candidate in candidates {
                let fresh = u16::try_from(places.len()).unwrap_or(u16::MAX);
                let place = *places.entry(candidate.id).or_insert_with(|| {
                    peers.extend(candidate.id.as_bytes());
                    peers.push(u8::from(candidate.origin));
                    put_addr(&mut peers, candidate.addr);
                    fresh
                });
                blobs.extend(place.to_le_bytes());
            }
            count += 1;
        }
        let mut out = Vec::with_capacity(14 + peers.len() + blobs.len());
        out.extend(*b"SANR\x01");
        out.push(u8::from(self.resend));
        out.extend(u32::try_from(self.interval.as_millis()).unwrap_or(u32::MAX).to_le_bytes());
        put_count(&mut out, places.len());
        out.extend(peers);
        put_count(&mut out, count);
        out.extend(blobs);
        out
    }

    /// Reads what [`Self::encode`] wrote. Allocates a bounded amount: at most [`PEERS_PER_BLOB_MAX`] peers for each blob named.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut read = Read::new(bytes, *b"SANR\x01")?;
        let flags = read.u8()?;
        if flags & !1 != 0 {
            return Err(DecodeError::Value("flag"));
        }
        let interval = Duration::from_millis(u64::from(u32::from_le_bytes(read.array()?)));
        let peers = (0..read.u16()?).map(|_| read.candidate()).collect::<Result<Vec<_>, _>>()?;
        let count = read.u16()?;
        let mut blobs = Vec::with_capacity(usize::from(count).min(BLOBS_MAX));
        for _ in 0..count {
            let digest = read.digest()?;
            let number = usize::from(read.u8()?);
            if number > PEERS_PER_BLOB_MAX {
                return Err(DecodeError::Value("number of peers"));
            }
            let named = (0..number).map(|_| {
                let place = usize::from(read.u16()?);
                peers.get(place).copied().ok_or(DecodeError::Value("place of a peer"))
            });
            blobs.push((digest, named.collect::<Result<_, _>>()?));
        }
        read.end()?;
        Ok(Self { interval, resend: flags & 1 != 0, blobs })
    }
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend(u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes());
}

fn put_digest(out: &mut Vec<u8>, digest: &Digest) {
    out.push(u8::from(digest.algorithm() == Algorithm::Sha512));
    out.extend(digest.as_bytes());
}

fn put_addr(out: &mut Vec<u8>, addr: SocketAddr) {
    match addr.ip() {
        IpAddr::V4(ip) => {
            out.push(4);
            out.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            out.push(6);
            out.extend(ip.octets());
        }
    }
    out.extend(addr.port().to_le_bytes());
}

struct Read<'a>(&'a [u8]);

impl<'a> Read<'a> {
    fn new(bytes: &'a [u8], kind: [u8; 5]) -> Result<Self, DecodeError> {
        if bytes.len() > BODY_MAX {
            return Err(DecodeError::TooLong(bytes.len()));
        }
        bytes.strip_prefix(&kind).map(Self).ok_or(DecodeError::Kind)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(DecodeError::Length)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(DecodeError::Length)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn end(self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::Length) }
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    fn digest(&mut self) -> Result<Digest, DecodeError> {
        match self.u8()? {
            0 => self.array().map(Digest::sha256),
            1 => self.array().map(Digest::sha512),
            _ => Err(DecodeError::Value("digest algorithm")),
        }
    }

    fn addr(&mut self) -> Result<SocketAddr, DecodeError> {
        let ip = match self.u8()? {
            4 => IpAddr::from(self.array::<4>()?),
            6 => IpAddr::from(self.array::<16>()?),
            _ => return Err(DecodeError::Value("address family")),
        };
        Ok(SocketAddr::new(ip, self.u16()?))
    }

    fn candidate(&mut self) -> Result<Candidate, DecodeError> {
        let id = PeerId::new(self.array()?);
        let origin = match self.u8()? {
            0 => false,
            1 => true,
            _ => return Err(DecodeError::Value("flag")),
        };
        Ok(Candidate { id, addr: self.addr()?, origin })
    }

    fn blob(&mut self) -> Result<Blob, DecodeError> {
        let digest = self.digest()?;
        let state = match self.u8()? {
            0 => State::Gone,
            1 => {
                let (peers, want) = (self.u16()?, self.u16()?);
                State::Leeching { peers, want, have: self.u32()?, pieces: self.u32()? }
            }
            2 => State::Seeding { peers: self.u16()? },
            _ => return Err(DecodeError::Value("state")),
        };
        Ok(Blob { digest, state })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Just, Strategy, any, prop_assert_eq, prop_oneof, proptest};

    fn digest() -> impl Strategy<Value = Digest> {
        prop_oneof![
            any::<[u8; 32]>().prop_map(Digest::sha256),
            any::<[[u8; 32]; 2]>().prop_map(|halves| Digest::sha512(*halves.as_flattened().as_array().unwrap())),
        ]
    }

    fn addr() -> impl Strategy<Value = SocketAddr> {
        let v4 = any::<[u8; 4]>().prop_map(IpAddr::from);
        let v6 = any::<[u8; 16]>().prop_map(IpAddr::from);
        (prop_oneof![v4, v6], any::<u16>()).prop_map(SocketAddr::from)
    }

    fn blob() -> impl Strategy<Value = Blob> {
        let leeching = any::<(u32, u32, u16, u16)>().prop_map(|(have, pieces, peers, want)| State::Leeching {
            have,
            pieces,
            peers,
            want,
        });
        let seeding = any::<u16>().prop_map(|peers| State::Seeding { peers });
        (digest(), prop_oneof![leeching, seeding, Just(State::Gone)]).prop_map(|(digest, state)| Blob { digest, state })
    }

    fn candidate() -> impl Strategy<Value = Candidate> {
        // Few names, so that the list of peers is shared; an address follows from the name.
        (0u8..40).prop_map(|n| Candidate {
            id: PeerId::new([n; 20]),
            addr: SocketAddr::from(([10, 0, 0, n], 16001)),
            origin: n % 7 == 0,
        })
    }

    proptest! {
        #[test]
        fn requests_round_trip(
            id: [u8; 20], addr in addr(), zone in "[a-z0-9-]{0,63}", origin: bool, full: bool,
            blobs in proptest::collection::vec(blob(), 0..60),
        ) {
            let request = Request { node: Node { id: PeerId::new(id), addr, zone: zone.into(), origin }, full, blobs };
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
        }

        #[test]
        fn responses_round_trip(
            ms in 0u64..100_000, resend: bool,
            blobs in proptest::collection::vec((digest(), proptest::collection::vec(candidate(), 0..10)), 0..60),
        ) {
            let response = Response { interval: Duration::from_millis(ms), resend, blobs };
            prop_assert_eq!(Response::decode(&response.encode()), Ok(response));
        }

        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), kind in 0usize..2) {
            if bytes.len() >= 5 {
                bytes[..5].copy_from_slice([b"SANN\x01", b"SANR\x01"][kind]);
            }
            let _ = Request::decode(&bytes);
            let _ = Response::decode(&bytes);
        }
    }

    #[test]
    fn bounds_hold() {
        let blob =
            Blob { digest: Digest::sha512([7; 64]), state: State::Leeching { have: 1, pieces: 2, peers: 3, want: 4 } };
        let node = Node {
            id: PeerId::new([1; 20]),
            addr: SocketAddr::from(([0u16; 8], 1)),
            zone: "z".repeat(63).into(),
            origin: false,
        };
        let request = Request { node, full: true, blobs: alloc::vec![blob; 2000] };
        let bytes = request.encode();
        assert!(bytes.len() <= BODY_MAX);
        assert_eq!(Request::decode(&bytes).unwrap().blobs.len(), BLOBS_MAX);
        let peers = (0..100u8).map(|n| Candidate {
            id: PeerId::new([n; 20]),
            addr: SocketAddr::from(([0u16; 8], 1)),
            origin: false,
        });
        let peers: Vec<Candidate> = peers.collect();
        let response =
            Response { interval: Duration::ZERO, resend: false, blobs: alloc::vec![(blob.digest, peers); 2000] };
        let bytes = response.encode();
        assert!(bytes.len() <= BODY_MAX);
        assert_eq!(Response::decode(&bytes).unwrap().blobs[0].1.len(), PEERS_PER_BLOB_MAX);
        assert_eq!(Request::decode(&[0; BODY_MAX + 1]), Err(DecodeError::TooLong(BODY_MAX + 1)));
        assert_eq!(Request::decode(b"SANN\x02"), Err(DecodeError::Kind));
        assert_eq!(Request::decode(b"SANN\x01\0"), Err(DecodeError::Length));
    }
}
