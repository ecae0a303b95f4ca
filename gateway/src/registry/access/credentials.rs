//! What a request's `Authorization` gives to know its client by.

use super::token;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::header::{self, HeaderMap};

/// Longest name and password together, bytes, in base64.
const BASIC_LEN_MAX: usize = 4 << 10;

/// Credentials, not yet looked at.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A name and a password.
    Basic {
        /// The name; not empty.
        name: String,
        /// The password.
        password: String,
    },
    /// A token, at most [`token::LEN_MAX`] bytes long.
    Bearer(String),
}

/// The header is none that we understand.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the Authorization header must be one, Basic or Bearer")]
pub struct Malformed;

impl Credentials {
    /// Reads the header; none where there is none, or where it says nothing. Two of them are refused: others on the way might
    /// have looked at the other one.
    pub fn of(headers: &HeaderMap) -> Result<Option<Self>, Malformed> {
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let Some(value) = values.next() else { return Ok(None) };
        if values.next().is_some() {
            return Err(Malformed);
        }
        let (scheme, rest) = value.to_str().ok().and_then(|text| text.split_once(' ')).ok_or(Malformed)?;
        let rest = rest.trim();
        if scheme.eq_ignore_ascii_case("bearer") {
            let sound = (1..=token::LEN_MAX).contains(&rest.len());
            return sound.then(|| Some(Self::Bearer(rest.to_owned()))).ok_or(Malformed);
        }
        if !scheme.eq_ignore_ascii_case("basic") || rest.len() > BASIC_LEN_MAX {
            return Err(Malformed);
        }
        let bytes = STANDARD.decode(rest).map_err(|_| Malformed)?;
        let text = String::from_utf8(bytes).map_err(|_| Malformed)?;
        let (name, password) = text.split_once(':').ok_or(Malformed)?;
        match (name, password) {
            // What some clients send that have neither.
            ("", "") => Ok(None),
            ("", _) => Err(Malformed),
            _ => Ok(Some(Self::Basic { name: name.to_owned(), password: password.to_owned() })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;
    use proptest::prelude::*;

    fn read(values: &[&[u8]]) -> Result<Option<Credentials>, Malformed> {
        let values = values.iter().map(|value| (header::AUTHORIZATION, HeaderValue::from_bytes(value).unwrap()));
        let mut headers = HeaderMap::new();
        values.for_each(|(name, value)| {
            headers.append(name, value);
        });
        Credentials::of(&headers)
    }

    #[test]
    fn one_header_of_one_scheme_is_read() {
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        let ann = |password: &str| Some(Credentials::Basic { name: "ann".into(), password: password.into() });
        let bearer = Some(Credentials::Bearer("x.y.z".into()));
        let long = |len: usize| format!("Bearer {}", "x".repeat(len));
        assert!(read(&[]) == Ok(None));
        for (value, expected) in [
            (basic("ann:pw"), Ok(ann("pw"))),
            (basic("ann:p:w"), Ok(ann("p:w"))),
            (basic("ann:"), Ok(ann(""))),
            (basic(":"), Ok(None)),
            ("bearer  x.y.z ".into(), Ok(bearer.clone())),
            (basic(":pw"), Err(Malformed)),
            (basic("ann"), Err(Malformed)),
            (basic(&"x".repeat(BASIC_LEN_MAX)), Err(Malformed)),
            ("Basic ?".into(), Err(Malformed)),
            ("Basic //8=".into(), Err(Malformed)),
            ("Bearer ".into(), Err(Malformed)),
            ("Bearer".into(), Err(Malformed)),
            (long(token::LEN_MAX + 1), Err(Malformed)),
            ("Digest x".into(), Err(Malformed)),
            (String::new(), Err(Malformed)),
            ("Bearer \u{e9}".into(), Err(Malformed)),
        ] {
            assert!(read(&[value.as_bytes()]) == expected, "{value}");
        }
        assert!(read(&[b"Bearer a", b"Bearer a"]) == Err(Malformed));
    }

    proptest! {
        #[test]
        fn whatever_stands_in_it(scheme in "(Basic|Bearer|basic|)[ :]{0,2}", bytes in any::<Vec<u8>>(), inner in any::<String>()) {
            let encoded = STANDARD.encode(&inner);
            for rest in [&bytes[..], inner.as_bytes(), encoded.as_bytes()] {
                let text = [scheme.as_bytes(), rest].concat();
                let Ok(value) = HeaderValue::from_bytes(&text) else { continue };
                let headers = [(header::AUTHORIZATION, value)].into_iter().collect();
                match Credentials::of(&headers) {
                    Ok(Some(Credentials::Basic { name, password })) => {
                        prop_assert!(!name.is_empty() && !name.contains(':'));
                        prop_assert_eq!(format!("{name}:{password}"), inner.clone());
                    }
                    Ok(Some(Credentials::Bearer(token))) => prop_assert!((1..=token::LEN_MAX).contains(&token.len())),
                    Ok(None) | Err(Malformed) => {}
                }
            }
        }
    }
}
