//! The tokens of one registry: which it takes, and those that it issues.

use super::{
    Invalid,
    key_files::{Paths, Seen},
    keys::Keys,
    token::{self, Audience, Claims, Fault, Grant, Time},
};
use crate::config::Span;
use hyper::{Uri, http::uri::Scheme};
use serde::{Deserialize, Serialize};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use uuid::Uuid;

/// Shortest and longest life of a token.
const LIFE: std::ops::RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(24 * 3600);
/// Longest name of an issuer or a service, bytes.
const NAME_LEN_MAX: usize = 255;

/// `[access.tokens]`: the same issuer and service at all roles.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The registry's name, which its tokens are for.
    #[serde(default = "shoal")]
    pub service: String,
    /// Who issues them.
    #[serde(default = "shoal")]
    pub issuer: String,
    /// A private key in PEM, or a folder of them whose last by name signs: with it, tokens are issued at `/token`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signing_keys: Option<PathBuf>,
    /// Public keys of other issuers or of those to come: a JSON Web Key Set, PEM, or a folder of such files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trusted_keys: Option<PathBuf>,
    /// Where clients get tokens; `/token` at the address that they called unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub realm: Option<String>,
    /// How long a token is good.
    #[serde(default = "life")]
    pub life: Span,
}

fn shoal() -> String {
    "shoal".into()
}

const fn life() -> Span {
    Span::secs(300)
}

impl Config {
    fn check(&self) -> Result<(), Invalid> {
        let wrong = |key, why: String| Err(Invalid::Token(key, why));
        for (key, name) in [("service", &self.service), ("issuer", &self.issuer)] {
            let sound = |b: u8| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\');
            if name.is_empty() || name.len() > NAME_LEN_MAX || !name.bytes().all(sound) {
                return wrong(key, format!("{name:?} must be 1 to {NAME_LEN_MAX} visible characters without quotes"));
            }
        }
        if let Some(realm) = &self.realm {
            let uri = realm.parse::<Uri>().ok().filter(|uri| uri.host().is_some() && !realm.contains(['"', '\\']));
            let scheme = uri.as_ref().and_then(Uri::scheme);
            if scheme != Some(&Scheme::HTTP) && scheme != Some(&Scheme::HTTPS) {
                return wrong("realm", format!("{realm:?} must be an address such as https://registry.example/token"));
            }
        }
        if !LIFE.contains(&self.life.get()) {
            return wrong("life", format!("must be {:?} to {:?}, not {}", LIFE.start(), LIFE.end(), self.life));
        }
        if self.signing_keys.is_none() && self.trusted_keys.is_none() {
            return wrong("trusted_keys", "name these or signing_keys: no token can be checked without a key".into());
        }
        Ok(())
    }
}

/// What is needed to take tokens and to issue them.
pub(super) struct Tokens {
    config: Config,
    paths: Paths,
    current: Mutex<Current>,
}

struct Current {
    /// The files when they were looked at last, good or not.
    seen: Seen,
    keys: Arc<Keys>,
}

impl Tokens {
    /// Reads the keys. Blocks.
    pub(super) fn open(config: Config) -> Result<Self, Invalid> {
        config.check()?;
        let paths = Paths { signing: config.signing_keys.clone(), trusted: config.trusted_keys.clone() };
        let seen = paths.read()?;
        let keys = Arc::new(seen.parse()?);
        Ok(Self { config, paths, current: Mutex::new(Current { seen, keys }) })
    }

    /// Reads the keys again and takes what is new; whether there was anything. Blocks.
    pub(super) fn reload(&self) -> Result<bool, Invalid> {
        let seen = self.paths.read()?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.seen == seen {
            return Ok(false);
        }
        let keys = seen.parse();
        current.seen = seen;
        current.keys = Arc::new(keys?);
        Ok(true)
    }

    fn keys(&self) -> Arc<Keys> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).keys.clone()
    }

    /// Whether it issues any.
    pub(super) fn are_issued(&self) -> bool {
        self.config.signing_keys.is_some()
    }

    /// The registry's name.
    pub(super) fn service(&self) -> &str {
        &self.config.service
    }

    /// Where clients get them, where that is said.
    pub(super) fn realm(&self) -> Option<&str> {
        self.config.realm.as_deref()
    }

    /// How long one is good.
    pub(super) fn life(&self) -> Duration {
        self.config.life.get()
    }

    /// What a token says, if it is good now.
    pub(super) fn verify(&self, text: &str) -> Result<Claims, Fault> {
        token::verify(&self.keys(), &self.config.issuer, &self.config.service, now(), text)
    }

    /// A token with these rights. None where nothing signs, or there is no randomness to sign with.
    pub(super) fn issue(&self, subject: String, access: Vec<Grant>) -> Option<String> {
        let now = now();
        let claims = Claims {
            iss: self.config.issuer.clone(),
            sub: subject,
            aud: Audience::One(self.config.service.clone()),
            exp: Time::Whole(now.saturating_add(self.life().as_secs())),
            nbf: Some(Time::Whole(now)),
            iat: Some(Time::Whole(now)),
            jti: Some(Uuid::new_v4().to_string()),
            access: Some(access),
        };
        token::sign(self.keys().signing()?, &claims).ok()
    }

    /// The public keys.
    pub(super) fn jwks(&self) -> String {
        self.keys().jwks()
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
