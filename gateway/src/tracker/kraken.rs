//! Kraken's announce: JSON, one blob at a time, ids as arrays of twenty numbers, durations in nanoseconds.

use crate::http::{self, Error, Response};
use hyper::StatusCode;
use peer_proto::{
    Digest, PeerId,
    announce::{self, Blob, Node, State},
};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// Longest body.
pub(super) const BODY_MAX: usize = 4 << 10;
/// Peers that an unfinished agent is taken to want: Kraken does not say.
const WANT: u16 = 10;

#[derive(Deserialize)]
pub(super) struct Request {
    #[serde(default)]
    name: String,
    digest: Option<String>,
    info_hash: [u8; 20],
    peer: PeerInfo,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
struct PeerInfo {
    peer_id: [u8; 20],
    ip: IpAddr,
    port: u16,
    #[serde(default)]
    origin: bool,
    #[serde(default)]
    complete: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    peers: Option<Vec<PeerInfo>>,
    interval: u64,
}

impl Request {
    /// Reads a body; `info_hash` is the path's, where it has one.
    pub(super) fn decode(body: &[u8], info_hash: Option<&str>) -> Result<Self, Error> {
        // Kraken's own status for it.
        let request: Self =
            serde_json::from_slice(body).map_err(|error| Error::internal(format!("json decode request: {error}")))?;
        let in_path = info_hash.map(str::parse::<PeerId>).transpose();
        match in_path {
            Ok(None) => Ok(request),
            Ok(Some(hash)) if *hash.as_bytes() == request.info_hash => Ok(request),
            Ok(Some(_)) => Err(Error::bad_request("info hash of the path is not that of the body")),
            Err(_) => Err(Error::bad_request("info hash of the path is not 40 hex digits")),
        }
    }

    fn digest(&self) -> Result<Digest, Error> {
        let text = match &self.digest {
            Some(digest) => digest.clone(),
            None => format!("sha256:{}", self.name),
        };
        text.parse().map_err(|error| Error::bad_request(format!("{text}: {error}")))
    }

    /// The same in our words.
    pub(super) fn announce(&self) -> Result<announce::Request, Error> {
        let state = match self.peer.complete {
            true => State::Seeding { peers: 0 },
            false => State::Leeching { have: 0, pieces: 0, peers: 0, want: WANT },
        };
        let node = Node {
            id: PeerId::new(self.peer.peer_id),
            addr: SocketAddr::new(self.peer.ip, self.peer.port),
            zone: "".into(),
            origin: self.peer.origin,
        };
        Ok(announce::Request { node, full: false, blobs: vec![Blob { digest: self.digest()?, state }] })
    }

    /// Our answer in Kraken's words.
    pub(super) fn answer(&self, response: &announce::Response) -> Result<Response, Error> {
        let named = response.blobs.iter().flat_map(|(_, peers)| peers).map(|peer| PeerInfo {
            peer_id: *peer.id.as_bytes(),
            ip: peer.addr.ip(),
            port: peer.addr.port(),
            origin: peer.origin,
            complete: peer.origin,
        });
        let peers = (!self.peer.complete).then(|| named.collect::<Vec<_>>());
        if peers.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::internal("no peers available"));
        }
        let interval = u64::try_from(response.interval.as_nanos()).unwrap_or(u64::MAX);
        Ok(http::json(StatusCode::OK, &Answer { peers, interval }))
    }
}
