//! Credentials, tokens, scopes, keys and certificates' names: whatever is sent, nobody is let in.
#![no_main]

use gateway::{
    http::tls,
    registry::access::{
        credentials::Credentials,
        endpoint,
        keys::{Keys, Public, parse_public},
        scope::{SCOPES_MAX, Scope},
        token,
    },
};
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

/// Public keys of every kind, with names that are easily guessed. Nobody kept their other halves.
const KEYS: &str = r#"{"keys":[
{"kty":"OKP","crv":"Ed25519","kid":"1","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},
{"kty":"EC","crv":"P-256","kid":"2","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"},
{"kty":"RSA","kid":"3","e":"AQAB","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"}
]}"#;

static TRUSTED: LazyLock<Vec<Public>> = LazyLock::new(|| parse_public(KEYS.as_bytes()).expect("keys"));

fuzz_target!(|data: &[u8]| {
    if let Ok(value) = HeaderValue::from_bytes(data) {
        let headers: HeaderMap = [(AUTHORIZATION, value)].into_iter().collect();
        if let Ok(Some(Credentials::Bearer(text))) = Credentials::of(&headers) {
            assert!((1..=token::LEN_MAX).contains(&text.len()));
        }
    }
    let keys = Keys::trusting(TRUSTED.clone()).expect("three names");
    if let Ok(text) = std::str::from_utf8(data) {
        assert!(token::verify(&keys, "i", "s", 1_800_000_000, text).is_err());
        if let Some(scope) = Scope::parse(text) {
            assert!(scope.actions.len() <= text.len());
        }
        assert!(endpoint::parse(text).scopes.len() <= SCOPES_MAX + 1);
        // What is written right but for the signature.
        use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
        for (kid, alg) in [("1", "EdDSA"), ("2", "ES256"), ("3", "RS256")] {
            let header = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"{alg}","kid":"{kid}"}}"#));
            let forged = format!("{header}.{}.{}", URL_SAFE_NO_PAD.encode(text), URL_SAFE_NO_PAD.encode(data));
            assert!(token::verify(&keys, "i", "s", 1_800_000_000, &forged).is_err());
        }
    }
    if let Ok(keys) = parse_public(data) {
        assert!(!keys.is_empty());
        if let Ok(keys) = Keys::trusting(keys) {
            assert!(parse_public(keys.jwks().as_bytes()).is_ok());
        }
    }
    let _ = tls::names(data);
});
