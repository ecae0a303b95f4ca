//! Where tokens are issued, and where the keys that check them are published.
//!
//! | request | answer |
//! |---|---|
//! | `GET /token?service=&scope=&scope=` with `Authorization: Basic`, a client certificate, or neither | a token |
//! | `POST /token` with a form: `grant_type=password`, `username`, `password`, `service`, `scope` | the same |
//! | `GET /.well-known/jwks.json` | the public keys |
//!
//! A token has those of the rights asked for that its holder has: fewer, or none, are no error. No tokens are given that others
//! could be had with (`offline_token`, `refresh_token`): clients keep the password then.

use super::{
    super::{
        error::{Code, Error},
        service::text,
    },
    Access, Who,
    credentials::Credentials,
    scope::{CATALOG, REGISTRY, REPOSITORY, Resource, SCOPES_MAX, Scope},
    token::Grant,
    tokens::Tokens,
};
use crate::http::{self, Body, Response};
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use hyper::{
    Method, StatusCode,
    header::{self, HeaderValue},
    http::request::Parts,
};
use serde::Serialize;
use std::{borrow::Cow, collections::BTreeMap};

/// Where tokens are had.
pub(in super::super) const TOKEN_PATH: &str = "/token";
/// Where the keys are.
const KEYS_PATH: &str = "/.well-known/jwks.json";
/// Longest form, bytes.
const FORM_LEN_MAX: usize = 32 << 10;

#[derive(Serialize)]
struct Answer {
    /// The token twice: by the name that registries' clients know, and by that of OAuth 2.
    token: String,
    access_token: String,
    token_type: &'static str,
    /// Seconds. When it was issued is not said: by the client's clock that is now, and ours may be another.
    expires_in: u64,
}

/// One of these paths.
pub(in super::super) enum Endpoint {
    /// Where tokens are had.
    Token,
    /// Where the keys are.
    Keys,
}

impl Access {
    /// What a path is here beside the registry's own.
    pub(in super::super) fn endpoint(&self, path: &str) -> Option<Endpoint> {
        let tokens = self.tokens.as_ref()?;
        match path {
            TOKEN_PATH if tokens.are_issued() => Some(Endpoint::Token),
            KEYS_PATH => Some(Endpoint::Keys),
            _ => None,
        }
    }

    /// The answer to a request for a token or for the keys.
    pub(in super::super) async fn answer(&self, at: Endpoint, parts: &Parts, body: Body) -> Result<Response, Error> {
        let no_tokens = || Error::new(Code::Unsupported, "no tokens here").status(StatusCode::NOT_FOUND);
        let tokens = self.tokens.as_ref().ok_or_else(no_tokens)?;
        match at {
            Endpoint::Token => self.token(tokens, parts, body).await,
            Endpoint::Keys if matches!(parts.method, Method::GET | Method::HEAD) => {
                Ok(http::with_type(StatusCode::OK, "application/jwk-set+json", tokens.jwks()))
            }
            Endpoint::Keys => Err(not_allowed("GET, HEAD")),
        }
    }

    async fn token(&self, tokens: &Tokens, parts: &Parts, body: Body) -> Result<Response, Error> {
        let (asked, given) = match parts.method {
            Method::GET => (parse(parts.uri.query().unwrap_or_default()), None),
            Method::POST => {
                let form = collect(body).await;
                let form = form.map_err(|error| Error::new(Code::Unsupported, error.message).status(error.status))?;
                let asked = parse(&String::from_utf8_lossy(&form));
                if asked.grant_type.as_deref() != Some("password") {
                    return Err(bad("grant_type must be password: no other grants are given here"));
                }
                let name = asked.username.clone().filter(|name| !name.is_empty());
                let password = asked.password.clone();
                let Some((name, password)) = name.zip(password) else {
                    return Err(bad("username or password is missing"));
                };
                (asked, Some(Credentials::Basic { name, password }))
            }
            _ => return Err(not_allowed("GET, POST")),
        };
        if asked.service.as_ref().is_some_and(|service| service != tokens.service()) {
            return Err(bad(format!("tokens are for service {:?} alone", tokens.service())));
        }
        if asked.scopes.len() > SCOPES_MAX {
            return Err(bad(format!("at most {SCOPES_MAX} scopes can be asked for at once")));
        }
        let who = match given {
            Some(given) => self.prove(given).await,
            None => self.identify(parts).await,
        };
        let who = match who {
            Ok(Who::Bearer(_)) => return Err(self.ask_for_name("a token is not had for a token")),
            Ok(who) => who,
            Err(why) => return Err(self.ask_for_name(why.message())),
        };
        let grants = self.grants(&who, &asked.scopes);
        let token = tokens.issue(who.name().to_owned(), grants);
        let token = token.ok_or_else(|| Error::new(Code::Unavailable, "no token can be signed now"))?;
        self.figures.issued.inc();
        let expires_in = tokens.life().as_secs();
        let answer = Answer { access_token: token.clone(), token, token_type: "Bearer", expires_in };
        let mut response = http::json(StatusCode::OK, &answer);
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        Ok(response)
    }

    /// Those of the rights asked for that somebody has.
    fn grants(&self, who: &Who, asked: &[Scope]) -> Vec<Grant> {
        let mut merged: BTreeMap<&Resource, Vec<&str>> = BTreeMap::new();
        for scope in asked {
            merged.entry(&scope.resource).or_default().extend(&scope.actions);
        }
        let grants = merged.into_iter().filter_map(|(resource, asked)| {
            let (kind, name, actions) = match resource {
                Resource::Repository(repository) => {
                    (REPOSITORY, repository.as_str(), self.granted(who, repository, &asked))
                }
                Resource::Catalog if self.may_list(who) => (REGISTRY, CATALOG, vec!["*"]),
                Resource::Catalog => return None,
            };
            let actions: Vec<String> = actions.into_iter().map(Into::into).collect();
            (!actions.is_empty()).then(|| Grant { kind: kind.into(), name: name.into(), actions })
        });
        grants.collect()
    }

    /// Asks whoever comes to the token service for a name: by Basic, as tokens are what it has.
    fn ask_for_name(&self, message: &'static str) -> Error {
        Error::new(Code::Unauthorized, message).header(header::WWW_AUTHENTICATE, super::BASIC)
    }
}

/// The bytes of a form. Boxed, because the compiler cannot see through the error's type in a larger future.
fn collect(body: Body) -> BoxFuture<'static, Result<Bytes, http::Error>> {
    http::read_body(body, FORM_LEN_MAX).boxed()
}

fn bad(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(Code::Unsupported, message).status(StatusCode::BAD_REQUEST)
}

fn not_allowed(methods: &'static str) -> Error {
    let error = Error::new(Code::Unsupported, format!("only {methods} here"));
    match text(methods) {
        Ok(methods) => error.header(header::ALLOW, methods),
        Err(error) => error,
    }
}

/// What a query or a form asks for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Asked {
    /// The registry.
    pub service: Option<String>,
    /// Those that something can be granted for; at most one more than are answered.
    pub scopes: Vec<Scope>,
    /// The way to a token, of OAuth 2.
    pub grant_type: Option<String>,
    /// With a password.
    pub username: Option<String>,
    /// As it was typed.
    pub password: Option<String>,
}

/// Reads a query or a form: `+` is a space in either. What it does not know, it passes over.
pub fn parse(text: &str) -> Asked {
    let mut asked = Asked::default();
    for pair in text.split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = || percent_encoding::percent_decode_str(&value.replace('+', " ")).decode_utf8_lossy().into_owned();
        match name {
            "service" => asked.service = Some(value()),
            "scope" => {
                let left = (SCOPES_MAX + 1).saturating_sub(asked.scopes.len());
                asked.scopes.extend(value().split_whitespace().filter_map(Scope::parse).take(left));
            }
            "grant_type" => asked.grant_type = Some(value()),
            "username" => asked.username = Some(value()),
            "password" => asked.password = Some(value()),
            _ => {}
        }
    }
    asked
}
