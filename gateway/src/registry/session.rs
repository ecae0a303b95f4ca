//! Upload sessions by name: which origin holds the bytes, and what it calls them. A client carries the name from request to
//! request, so that any instance of the proxy can go on with an upload that another began.

use super::error::{Code, Error};
use crate::http;
use std::{fmt, str::FromStr};
use uuid::Uuid;

/// Longest place, bytes: a host name and a port.
const PLACE_LEN_MAX: usize = 300;

/// An upload's name: `<uuid>~<place>`. Opaque to clients; whoever reads the place has to check that it is one of ours.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Session {
    /// What the holder of the bytes calls the upload.
    pub id: Uuid,
    /// The holder: `host:port` of an origin.
    pub place: String,
}

impl Session {
    /// As it stands in a path.
    pub fn segment(&self) -> String {
        format!("{}~{}", self.id, http::encode_segment(&self.place))
    }
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}~{}", self.id, self.place)
    }
}

impl FromStr for Session {
    type Err = Error;

    /// Reads a decoded path segment; what is none of ours is an unknown upload.
    fn from_str(s: &str) -> Result<Self, Error> {
        let unknown = || Error::new(Code::BlobUploadUnknown, "upload is unknown");
        let (id, place) = s.split_once('~').ok_or_else(unknown)?;
        let id = Uuid::try_parse(id).map_err(|_| unknown())?;
        let sound = (1..=PLACE_LEN_MAX).contains(&place.len())
            && place.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b));
        sound.then(|| Self { id, place: place.to_owned() }).ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_path() {
        for place in ["127.0.0.1:15002", "[::1]:15002", "origin-0.example.com:80"] {
            let session = Session { id: Uuid::new_v4(), place: place.into() };
            let path = format!("/v2/{}", session.segment());
            assert!(path.parse::<hyper::Uri>().is_ok());
            assert_eq!(http::segments(&path).unwrap()[1].parse::<Session>().unwrap(), session);
        }
        let id = Uuid::new_v4();
        for bad in [
            "",
            "x",
            "x~y",
            &format!("{id}"),
            &format!("{id}~"),
            &format!("{id}~a/b"),
            &format!("{id}~a b"),
            &format!("{id}~u@h"),
        ] {
            assert!(bad.parse::<Session>().is_err(), "{bad}");
        }
    }
}
