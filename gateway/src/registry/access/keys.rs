//! The keys of tokens: private ones that sign, public ones that check.
//!
//! A key has one algorithm, which no token can choose another for, and a name (`kid`): its thumbprint of RFC 7638 unless the file
//! that it comes from gives it another.

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use ring::{
    digest::{SHA256, digest},
    rand::SystemRandom,
    rsa::PublicKeyComponents,
    signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey},
};
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer, pem::PemObject};
use serde::{Deserialize, Serialize};
/// Most keys in force.
const KEYS_MAX: usize = 64;
/// Longest name of a key, bytes.
const ID_LEN_MAX: usize = 256;
/// Shortest and longest modulus of an RSA key, bytes.
const RSA_LEN: std::ops::RangeInclusive<usize> = 256..=1024;
/// What stands before the point in the DER form of a public key on P-256, and before the key in that of Ed25519.
const P256_PREFIX: &[u8] =
    b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00";
const ED25519_PREFIX: &[u8] = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";

/// How tokens are signed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Algorithm {
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// Ed25519.
    EdDsa,
    /// RSA with SHA-256: other issuers' tokens only, we sign none so.
    Rs256,
}

impl Algorithm {
    /// As tokens write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Es256 => "ES256",
            Self::EdDsa => "EdDSA",
            Self::Rs256 => "RS256",
        }
    }
}

/// Keys that cannot be in force together.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Conflict {
    /// Two different keys have one name.
    #[error("two different keys are named {0:?}")]
    Twice(String),
    /// There are too many.
    #[error("more than {KEYS_MAX} keys")]
    TooMany,
}

/// A key that checks signatures.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Public {
    id: String,
    material: Material,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Material {
    /// The point, uncompressed.
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
}

/// A public key as JSON (RFC 7517): what we publish and what we read.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Jwk {
    kty: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crv: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    x: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    y: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    n: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    e: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kid: Option<String>,
    #[serde(default, rename = "use", skip_serializing_if = "Option::is_none")]
    purpose: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alg: Option<String>,
    /// The private half, which has no place here.
    #[serde(default, skip_serializing)]
    d: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Jwks {
    keys: Vec<Jwk>,
}

impl Public {
    fn of(material: Material, id: Option<String>) -> Result<Self, String> {
        let key = Self { id: id.unwrap_or_else(|| material.thumbprint()), material };
        if key.id.is_empty() || key.id.len() > ID_LEN_MAX {
            return Err(format!("a kid must be 1 to {ID_LEN_MAX} bytes long"));
        }
        Ok(key)
    }

    /// What tokens name it by.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The one algorithm that it is used with.
    pub fn algorithm(&self) -> Algorithm {
        match self.material {
            Material::P256(_) => Algorithm::Es256,
            Material::Ed25519(_) => Algorithm::EdDsa,
            Material::Rsa { .. } => Algorithm::Rs256,
        }
    }

    /// Whether this key's private half signed the message.
    pub fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        match &self.material {
            Material::P256(point) => {
                UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point).verify(message, signature)
            }
            Material::Ed25519(key) => UnparsedPublicKey::new(&signature::ED25519, key).verify(message, signature),
            Material::Rsa { n, e } => {
                PublicKeyComponents { n, e }.verify(&signature::RSA_PKCS1_2048_8192_SHA256, message, signature)
            }
        }
        .is_ok()
    }

    fn jwk(&self) -> Jwk {
        let (kid, purpose, alg) = (Some(self.id.clone()), Some("sig".into()), Some(self.algorithm().name().into()));
        Jwk { kid, purpose, alg, ..self.material.jwk() }
    }
}

impl Material {
    fn jwk(&self) -> Jwk {
        let text = |bytes: &[u8]| Some(URL_SAFE_NO_PAD.encode(bytes));
        match self {
            Self::P256(point) => {
                let (x, y) = point[1..].split_at(32);
                Jwk { kty: "EC".into(), crv: Some("P-256".into()), x: text(x), y: text(y), ..Jwk::default() }
            }
            Self::Ed25519(key) => {
                Jwk { kty: "OKP".into(), crv: Some("Ed25519".into()), x: text(key), ..Jwk::default() }
            }
            Self::Rsa { n, e } => Jwk { kty: "RSA".into(), n: text(n), e: text(e), ..Jwk::default() },
        }
    }

    /// RFC 7638: a digest of the members that make the key, in the order of their names.
    fn thumbprint(&self) -> String {
        let Jwk { kty, crv, x, y, n, e, .. } = self.jwk();
        let members = [("crv", crv), ("e", e), ("kty", Some(kty)), ("n", n), ("x", x), ("y", y)];
        let members = members.into_iter().filter_map(|(name, value)| Some(format!("\"{name}\":\"{}\"", value?)));
        let text = format!("{{{}}}", members.collect::<Vec<_>>().join(","));
        URL_SAFE_NO_PAD.encode(digest(&SHA256, text.as_bytes()))
    }

    /// None for kinds of keys that we do not know.
    fn of_jwk(jwk: &Jwk) -> Result<Option<Self>, String> {
        let bytes = |name: &str, value: &Option<String>| {
            let value = value.as_ref().ok_or_else(|| format!("a key without {name}"))?;
            URL_SAFE_NO_PAD.decode(value).map_err(|error| format!("{name} of a key: {error}"))
        };
        let sized = |name: &str, value: &Option<String>| {
            let value = bytes(name, value)?;
            if value.len() == 32 {
                Ok(value)
            } else {
                Err(format!("{name} of a key has {} bytes, not 32", value.len()))
            }
        };
        Ok(Some(match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("EC", Some("P-256")) => Self::P256([vec![4], sized("x", &jwk.x)?, sized("y", &jwk.y)?].concat()),
            ("OKP", Some("Ed25519")) => Self::Ed25519(sized("x", &jwk.x)?),
            ("RSA", _) => {
                let number = |name, value| {
                    bytes(name, value).map(|bytes| bytes.into_iter().skip_while(|byte| *byte == 0).collect::<Vec<_>>())
                };
                let (n, e) = (number("n", &jwk.n)?, number("e", &jwk.e)?);
                if !RSA_LEN.contains(&n.len()) {
                    return Err(format!("an RSA key of {} bits, must be 2048 to 8192", n.len() * 8));
                }
                Self::Rsa { n, e }
            }
            _ => return Ok(None),
        }))
    }
}

/// A key that signs.
pub struct Private {
    pair: Pair,
    public: Public,
}

enum Pair {
    P256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

/// Randomness, or memory, that the system does not give.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the system gives no randomness")]
pub struct NoRandomness;

impl Private {
    /// From PKCS#8 in PEM, as `shoal token-key new` and `openssl genpkey` write it.
    pub fn parse(pem: &[u8]) -> Result<Self, String> {
        const WANTED: &str = "an ES256 (P-256) or Ed25519 private key as PKCS#8 in PEM, as `shoal token-key new` makes";
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem).map_err(|error| format!("must be {WANTED}: {error:?}"))?;
        let der = der.secret_pkcs8_der();
        let pair = EcdsaKeyPair::from_pkcs8(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, der, &SystemRandom::new());
        let pair = match pair {
            Ok(pair) => Pair::P256(pair),
            // Without its public half too, as openssl writes it.
            Err(_) => match Ed25519KeyPair::from_pkcs8_maybe_unchecked(der) {
                Ok(pair) => Pair::Ed25519(pair),
                Err(error) => return Err(format!("must be {WANTED}: {error}")),
            },
        };
        let material = match &pair {
            Pair::P256(pair) => Material::P256(pair.public_key().as_ref().to_vec()),
            Pair::Ed25519(pair) => Material::Ed25519(pair.public_key().as_ref().to_vec()),
        };
        Ok(Self { pair, public: Public::of(material, None)? })
    }

    /// A new key in PEM. `Rs256` is none of ours: ES256 then.
    pub fn generate(algorithm: Algorithm) -> Result<String, NoRandomness> {
        let random = SystemRandom::new();
        let der = match algorithm {
            Algorithm::EdDsa => Ed25519KeyPair::generate_pkcs8(&random),
            _ => EcdsaKeyPair::generate_pkcs8(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, &random),
        };
        let text = STANDARD.encode(der.map_err(|_| NoRandomness)?);
        let lines = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect::<Vec<_>>().join("\n");
        Ok(format!("-----BEGIN PRIVATE KEY-----\n{lines}\n-----END PRIVATE KEY-----\n"))
    }

    /// Its public half.
    pub fn public(&self) -> &Public {
        &self.public
    }

    /// Signs a message.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, NoRandomness> {
        match &self.pair {
            Pair::P256(pair) => match pair.sign(&SystemRandom::new(), message) {
                Ok(signature) => Ok(signature.as_ref().to_vec()),
                Err(_) => Err(NoRandomness),
            },
            Pair::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_vec()),
        }
    }
}

/// The keys in force.
#[derive(Default)]
pub struct Keys {
    signing: Option<Private>,
    trusted: Vec<Public>,
}

impl Keys {
    /// Keys that check, without one that signs.
    pub fn trusting(keys: Vec<Public>) -> Result<Self, Conflict> {
        let mut all = Self::default();
        keys.into_iter().try_for_each(|key| all.trust(key))?;
        Ok(all)
    }

    /// Takes the signatures of a key for good.
    pub(super) fn trust(&mut self, key: Public) -> Result<(), Conflict> {
        if let Some(known) = self.trusted.iter().find(|known| known.id == key.id) {
            return if *known == key { Ok(()) } else { Err(Conflict::Twice(key.id)) };
        }
        self.trusted.push(key);
        if self.trusted.len() > KEYS_MAX { Err(Conflict::TooMany) } else { Ok(()) }
    }

    /// Has a key sign from now on, and takes its signatures for good.
    pub(super) fn sign_with(&mut self, key: Private) -> Result<(), Conflict> {
        self.trust(key.public.clone())?;
        self.signing = Some(key);
        Ok(())
    }

    /// The key that signs.
    pub fn signing(&self) -> Option<&Private> {
        self.signing.as_ref()
    }

    /// The key that a token names; where it names none, the only one.
    pub fn find(&self, id: Option<&str>) -> Option<&Public> {
        match (id, &*self.trusted) {
            (Some(id), keys) => keys.iter().find(|key| key.id == id),
            (None, [only]) => Some(only),
            (None, _) => None,
        }
    }

    /// All public keys as a JSON Web Key Set.
    pub fn jwks(&self) -> String {
        let set = Jwks { keys: self.trusted.iter().map(Public::jwk).collect() };
        serde_json::to_string_pretty(&set).unwrap_or_default()
    }
}

/// The public keys of a file: a JSON Web Key Set, or PEM. Keys of kinds or for uses that are none of ours are passed over, but not
/// all of them.
pub fn parse_public(text: &[u8]) -> Result<Vec<Public>, String> {
    let mut keys = Vec::new();
    if text.trim_ascii_start().first() == Some(&b'{') {
        let set: Jwks = serde_json::from_slice(text).map_err(|error| format!("no JSON Web Key Set: {error}"))?;
        for jwk in set.keys {
            if jwk.d.is_some() {
                return Err("holds a private key (d): only public keys belong here".into());
            }
            if jwk.purpose.as_deref().is_some_and(|purpose| purpose != "sig") {
                continue;
            }
            let Some(material) = Material::of_jwk(&jwk)? else { continue };
            let key = Public::of(material, jwk.kid)?;
            let own = key.jwk().alg;
            if jwk.alg.is_none_or(|alg| Some(alg) == own) {
                keys.push(key);
            }
        }
    } else {
        for der in SubjectPublicKeyInfoDer::pem_slice_iter(text) {
            let der = der.map_err(|error| format!("not PEM: {error:?}"))?;
            let material = match (der.strip_prefix(P256_PREFIX), der.strip_prefix(ED25519_PREFIX)) {
                (Some(point), _) if point.len() == 65 => Material::P256(point.to_vec()),
                (_, Some(key)) if key.len() == 32 => Material::Ed25519(key.to_vec()),
                _ => return Err("a public key that is neither P-256 nor Ed25519: give it as a JSON Web Key Set".into()),
            };
            keys.push(Public::of(material, None)?);
        }
    }
    if keys.is_empty() {
        return Err("no public key in it that can check ES256, EdDSA or RS256".into());
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `openssl genpkey`, which writes another form of either than ring does.
    const OPENSSL: [&str; 2] = [
        "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAB2a1DIZ9tUM4oAg7DqG/tDVVffRl5H2s26w6TU3bc3\n-----END PRIVATE KEY-----\n",
        "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgcde9/hrOQA6shSD6\n\
         Zk0Axp3cnP4eyrCGN5w3pCjcENyhRANCAARaVx5tkuzHpX4Ceyq2pQ+YA7jb3nMq\n\
         kAMf02vmBIGflKyBBYsa4QGNjw3VcJtGU+xfTHyS2FEASvx+trvygUIF\n-----END PRIVATE KEY-----\n",
    ];

    #[test]
    fn what_is_signed_is_checked_by_the_published_key_alone() {
        let made = [Algorithm::Es256, Algorithm::EdDsa].map(|one| Private::generate(one).unwrap());
        let mut all: Vec<Private> = Vec::new();
        for pem in made.iter().map(String::as_str).chain(OPENSSL) {
            all.push(Private::parse(pem.as_bytes()).unwrap_or_else(|why| panic!("{why}: {pem}")));
        }
        for signer in &all {
            let keys = Keys { trusted: vec![signer.public().clone()], ..Keys::default() };
            let read = parse_public(keys.jwks().as_bytes()).unwrap();
            assert_eq!(read, keys.trusted, "{}", keys.jwks());
            let signature = signer.sign(b"message").unwrap();
            assert!(read[0].has_signed(b"message", &signature));
            assert!(!read[0].has_signed(b"massage", &signature));
            assert!(!read[0].has_signed(b"message", &signature[1..]));
            let others = all.iter().filter(|other| other.public() != signer.public());
            assert!(others.into_iter().all(|other| !other.public().has_signed(b"message", &signature)));
        }
    }

    #[test]
    fn thumbprints_are_those_of_the_standards() {
        for (jwk, thumbprint) in [
            // RFC 8037, A.3.
            (
                r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#,
                "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k",
            ),
            // RFC 7638, 3.1.
            (
                r#"{"kty":"RSA","e":"AQAB","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"}"#,
                "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs",
            ),
        ] {
            let keys = parse_public(format!(r#"{{"keys":[{jwk}]}}"#).as_bytes()).unwrap();
            assert_eq!(keys[0].id(), thumbprint);
        }
    }

    #[test]
    fn files_that_hold_no_keys_are_named_with_why() {
        let short = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AAAA"}]}"#;
        let private = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AAAA","d":"AAAA"}]}"#;
        for (text, why) in [
            ("", "no public key"),
            ("{", "no JSON Web Key Set"),
            (r#"{"keys":[]}"#, "no public key"),
            (r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#, "no public key"),
            (r#"{"keys":[{"kty":"EC","crv":"P-256","x":"AAAA"}]}"#, "has 3 bytes, not 32"),
            (r#"{"keys":[{"kty":"EC","crv":"P-256","x":"+"}]}"#, "x of a key"),
            (r#"{"keys":[{"kty":"RSA","n":"AAAA","e":"AQAB"}]}"#, "an RSA key of 0 bits"),
            (r#"{"keys":[{"kty":"RSA","e":"AQAB"}]}"#, "without n"),
            (short, "has 3 bytes, not 32"),
            (private, "private key"),
            ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "neither P-256 nor Ed25519"),
        ] {
            let said = parse_public(text.as_bytes()).expect_err(text);
            assert!(said.contains(why), "{text}: {said}");
        }
        for text in ["", "x", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"] {
            assert!(Private::parse(text.as_bytes()).err().unwrap().contains("token-key new"));
        }
    }

    #[test]
    fn one_name_is_one_key() {
        let key = |x: u8| Public::of(Material::Ed25519(vec![x; 32]), Some("a".into())).unwrap();
        assert!(matches!(Keys::trusting(vec![key(1), key(2)]), Err(Conflict::Twice(id)) if id == "a"));
        assert_eq!(Keys::trusting(vec![key(1), key(1)]).unwrap().find(None), Some(&key(1)));
    }
}
