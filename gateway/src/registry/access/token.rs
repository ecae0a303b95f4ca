//! Tokens: JSON Web Tokens with the rights of their holder, in the form that Docker's distribution gives them.
//!
//! ```text
//!  {"alg":"ES256","kid":"…"} . {"iss":…,"sub":…,"aud":…,"exp":…,"nbf":…,"access":[{"type":"repository","name":"a/b","actions":["pull"]}]} . signature
//! ```
//!
//! A token is checked with a key that we were given beforehand and by that key's algorithm. What the token itself says of keys
//! (`jwk`, `x5c`, `jku`) is never looked at.

use super::keys::{Keys, NoRandomness, Private};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

/// Longest token, bytes: one for as many scopes as can be asked for at once.
pub const LEN_MAX: usize = 40 << 10;
/// How far the clocks of those who issue tokens and of those who check them may be apart, seconds.
const LEEWAY_S: u64 = 30;

/// One thing that a token's holder may do something with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Grant {
    /// `repository`, or `registry` for the catalog.
    #[serde(rename = "type")]
    pub kind: String,
    /// The repository, or `catalog`.
    pub name: String,
    /// `pull`, `push`, `delete`, `create`; `*` for all.
    pub actions: Vec<String>,
}

/// What a token says.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Claims {
    /// Who issued it.
    pub iss: String,
    /// Whom it was issued to; empty for nobody in particular.
    #[serde(default)]
    pub sub: String,
    /// The services that it is for.
    pub aud: Audience,
    /// The end of its life.
    pub exp: Time,
    /// The beginning, where it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbf: Option<Time>,
    /// When it was issued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iat: Option<Time>,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jti: Option<String>,
    /// What its holder may do.
    #[serde(default)]
    pub access: Option<Vec<Grant>>,
}

/// Seconds since 1970. Some issuers write fractions; we do not, as some who read cannot.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Time {
    /// Whole ones.
    Whole(u64),
    /// Others.
    Other(f64),
}

impl Time {
    #[expect(clippy::cast_precision_loss, reason = "exact for 285 million years")]
    fn seconds(self) -> f64 {
        match self {
            Self::Whole(seconds) => seconds as f64,
            Self::Other(seconds) => seconds,
        }
    }
}

/// One service or several.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Audience {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Audience {
    fn has(&self, service: &str) -> bool {
        match self {
            Self::One(one) => one == service,
            Self::Many(many) => many.iter().any(|one| one == service),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    typ: Option<String>,
    alg: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kid: Option<String>,
    /// Extensions that whoever checks has to know: we know none.
    #[serde(default, skip_serializing)]
    crit: Option<serde::de::IgnoredAny>,
}

/// Why a token is not taken.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Fault {
    /// It is no JWT, or too long.
    #[error("the token is malformed")]
    Form,
    /// It is signed by no key that is trusted here.
    #[error("the token's key is not trusted here")]
    Key,
    /// Its key has another algorithm.
    #[error("the token's algorithm is not its key's")]
    Algorithm,
    /// The key did not sign it.
    #[error("the token's signature is wrong")]
    Signature,
    /// Somebody else issued it.
    #[error("the token is of another issuer")]
    Issuer,
    /// It is for another service.
    #[error("the token is for another service")]
    Audience,
    /// Its life is over.
    #[error("the token has expired")]
    Expired,
    /// Its life has not begun.
    #[error("the token is not valid yet")]
    Early,
}

impl Fault {
    /// A word for it, for counters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Form => "token_form",
            Self::Key => "token_key",
            Self::Algorithm => "token_algorithm",
            Self::Signature => "token_signature",
            Self::Issuer => "token_issuer",
            Self::Audience => "token_audience",
            Self::Expired => "token_expired",
            Self::Early => "token_early",
        }
    }
}

/// Signs what a token says.
pub fn sign(key: &Private, claims: &Claims) -> Result<String, NoRandomness> {
    let header = Header {
        typ: Some("JWT".into()),
        alg: key.public().algorithm().name().into(),
        kid: Some(key.public().id().into()),
        crit: None,
    };
    let part = |json: serde_json::Result<Vec<u8>>| URL_SAFE_NO_PAD.encode(json.unwrap_or_default());
    let message = format!("{}.{}", part(serde_json::to_vec(&header)), part(serde_json::to_vec(claims)));
    let signature = key.sign(message.as_bytes())?;
    Ok(format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

/// What a token says, if it is good: of this issuer, for this service, at this time (seconds since 1970), signed by one of the keys.
pub fn verify(keys: &Keys, issuer: &str, service: &str, now: u64, text: &str) -> Result<Claims, Fault> {
    if text.len() > LEN_MAX {
        return Err(Fault::Form);
    }
    let (message, signature) = text.rsplit_once('.').ok_or(Fault::Form)?;
    let (header, claims) = message.split_once('.').ok_or(Fault::Form)?;
    let bytes = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| Fault::Form);
    let header: Header = serde_json::from_slice(&bytes(header)?).map_err(|_| Fault::Form)?;
    if header.crit.is_some() {
        return Err(Fault::Form);
    }
    let key = keys.find(header.kid.as_deref()).ok_or(Fault::Key)?;
    if header.alg != key.algorithm().name() {
        return Err(Fault::Algorithm);
    }
    let (claims, signature) = (bytes(claims)?, bytes(signature)?);
    if !key.has_signed(message.as_bytes(), &signature) {
        return Err(Fault::Signature);
    }
    let claims: Claims = serde_json::from_slice(&claims).map_err(|_| Fault::Form)?;
    let (late, early) = (Time::Whole(now.saturating_sub(LEEWAY_S)), Time::Whole(now.saturating_add(LEEWAY_S)));
    if claims.iss != issuer {
        return Err(Fault::Issuer);
    }
    if !claims.aud.has(service) {
        return Err(Fault::Audience);
    }
    if claims.exp.seconds() <= late.seconds() {
        return Err(Fault::Expired);
    }
    if claims.nbf.is_some_and(|begins| begins.seconds() > early.seconds()) {
        return Err(Fault::Early);
    }
    Ok(claims)
}

#[cfg(test)]
mod tests {
    use super::{
        super::keys::{Algorithm, Public, parse_public},
        *,
    };
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::sync::LazyLock;

    const NOW: u64 = 1_800_000_000;

    fn key(algorithm: Algorithm) -> Private {
        Private::parse(Private::generate(algorithm).unwrap().as_bytes()).unwrap()
    }

    fn claims() -> Value {
        json!({"iss": "i", "sub": "ann", "aud": "s", "exp": NOW + 60, "nbf": NOW, "access": [
            {"type": "repository", "name": "a/b", "actions": ["pull"]}]})
    }

    fn with(name: &str, value: Value) -> Value {
        let mut claims = claims();
        claims[name] = value;
        claims
    }

    fn without(name: &str) -> Value {
        let mut claims = claims();
        claims.as_object_mut().unwrap().remove(name);
        claims
    }

    /// Signed whatever it says.
    fn token(key: &Private, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(header), part(claims));
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(key.sign(message.as_bytes()).unwrap()))
    }

    fn header(key: &Private) -> Value {
        json!({"alg": key.public().algorithm().name(), "kid": key.public().id()})
    }

    #[test]
    fn a_token_is_taken_for_what_its_issuer_signed() {
        for algorithm in [Algorithm::Es256, Algorithm::EdDsa] {
            let (ours, other) = (key(algorithm), key(algorithm));
            let keys = Keys::trusting(vec![ours.public().clone()]).unwrap();
            let check = |text: &str| verify(&keys, "i", "s", NOW, text).map(|claims| claims.sub);
            let parsed: Claims = serde_json::from_value(claims()).unwrap();
            assert_eq!(verify(&keys, "i", "s", NOW, &sign(&ours, &parsed).unwrap()), Ok(parsed.clone()));
            for (claims, expected) in [
                (claims(), Ok(())),
                (with("aud", json!(["t", "s"])), Ok(())),
                (without("nbf"), Ok(())),
                (without("access"), Ok(())),
                (with("access", json!(null)), Ok(())),
                (with("exp", json!(1_800_000_000.5)), Ok(())),
                (with("exp", json!(NOW - LEEWAY_S + 1)), Ok(())),
                (with("nbf", json!(NOW + LEEWAY_S)), Ok(())),
                (with("unknown", json!({"a": [1]})), Ok(())),
                (with("exp", json!(NOW - LEEWAY_S)), Err(Fault::Expired)),
                (with("exp", json!(-1)), Err(Fault::Expired)),
                (with("nbf", json!(NOW + LEEWAY_S + 1)), Err(Fault::Early)),
                (with("iss", json!("j")), Err(Fault::Issuer)),
                (with("aud", json!("t")), Err(Fault::Audience)),
                (with("aud", json!([])), Err(Fault::Audience)),
                (with("exp", json!("soon")), Err(Fault::Form)),
                (without("exp"), Err(Fault::Form)),
                (without("aud"), Err(Fault::Form)),
                (without("iss"), Err(Fault::Form)),
                (with("access", json!("all")), Err(Fault::Form)),
                (json!([]), Err(Fault::Form)),
            ] {
                let text = token(&ours, &header(&ours), &claims);
                assert_eq!(check(&text).map(drop), expected, "{claims}");
            }
            let (alg, kid) = (algorithm.name(), ours.public().id());
            let own = serde_json::from_str::<Value>(&keys.jwks()).unwrap()["keys"][0].clone();
            let others = Keys::trusting(vec![other.public().clone()]).unwrap().jwks();
            let others = serde_json::from_str::<Value>(&others).unwrap()["keys"][0].clone();
            for (signer, header, expected) in [
                (&ours, json!({"alg": alg}), Ok(())),
                (&ours, json!({"alg": alg, "kid": kid, "jwk": own, "typ": "JWT"}), Ok(())),
                (&other, header(&other), Err(Fault::Key)),
                (&other, json!({"alg": alg, "kid": kid}), Err(Fault::Signature)),
                (&other, json!({"alg": alg, "kid": kid, "jwk": others}), Err(Fault::Signature)),
                (&other, json!({"alg": alg, "jwk": others}), Err(Fault::Signature)),
                (&ours, json!({"alg": "none", "kid": kid}), Err(Fault::Algorithm)),
                (&ours, json!({"alg": "None", "kid": kid}), Err(Fault::Algorithm)),
                (&ours, json!({"alg": "HS256", "kid": kid}), Err(Fault::Algorithm)),
                (&ours, json!({"alg": "RS256", "kid": kid}), Err(Fault::Algorithm)),
                (&ours, json!({"alg": alg.to_lowercase(), "kid": kid}), Err(Fault::Algorithm)),
                (&ours, json!({"alg": alg, "kid": kid, "crit": ["exp"]}), Err(Fault::Form)),
                (&ours, json!({"kid": kid}), Err(Fault::Form)),
                (&ours, json!({"alg": alg, "kid": 1}), Err(Fault::Form)),
            ] {
                assert_eq!(check(&token(signer, &header, &claims())).map(drop), expected, "{header}");
            }
        }
    }

    #[test]
    fn a_public_key_is_no_secret_to_sign_with() {
        let ours = key(Algorithm::Es256);
        let keys = Keys::trusting(vec![ours.public().clone()]).unwrap();
        let kid = ours.public().id();
        let message = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(json!({"alg": "HS256", "kid": kid}).to_string()),
            URL_SAFE_NO_PAD.encode(claims().to_string())
        );
        let secret = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, keys.jwks().as_bytes());
        let forged = format!("{message}.{}", URL_SAFE_NO_PAD.encode(ring::hmac::sign(&secret, message.as_bytes())));
        assert_eq!(verify(&keys, "i", "s", NOW, &forged), Err(Fault::Algorithm));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let ours = key(Algorithm::EdDsa);
        let keys = Keys::trusting(vec![ours.public().clone()]).unwrap();
        let good = token(&ours, &header(&ours), &claims());
        let (head, rest) = good.split_once('.').unwrap();
        let (body, signature) = rest.split_once('.').unwrap();
        for bad in [
            String::new(),
            ".".into(),
            "..".into(),
            "a.b.c".into(),
            format!("{head}.{body}"),
            format!("{head}.{body}.{signature}.{signature}"),
            format!("{head}.{body}.{signature}="),
            format!(" {good}"),
            "x".repeat(LEN_MAX + 1),
        ] {
            assert_eq!(verify(&keys, "i", "s", NOW, &bad), Err(Fault::Form), "{bad}");
        }
        for bad in [format!("{head}.{body}."), format!("{head}.{}.{signature}", URL_SAFE_NO_PAD.encode("{}"))] {
            assert_eq!(verify(&keys, "i", "s", NOW, &bad), Err(Fault::Signature), "{bad}");
        }
        assert_eq!(verify(&Keys::default(), "i", "s", NOW, &good), Err(Fault::Key));
    }

    static KEYS: LazyLock<(String, Vec<Public>)> = LazyLock::new(|| {
        let ours = key(Algorithm::EdDsa);
        let keys = Keys::trusting(vec![ours.public().clone()]).unwrap();
        (token(&ours, &header(&ours), &claims()), parse_public(keys.jwks().as_bytes()).unwrap())
    });

    proptest! {
        #[test]
        fn nothing_but_the_token_is_the_token(text in any::<String>(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let (good, trusted) = &*KEYS;
            let keys = Keys::trusting(trusted.clone()).unwrap();
            let mut changed = good.clone().into_bytes();
            let at = at.index(changed.len());
            changed[at] = byte;
            let changed = String::from_utf8_lossy(&changed).into_owned();
            for bad in [text, changed] {
                prop_assert!(bad == *good || verify(&keys, "i", "s", NOW, &bad).is_err(), "{}", bad);
            }
        }
    }
}
