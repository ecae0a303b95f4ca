//! What an upstream asks of us before it answers, and the tokens that its identity service gives for it.

use super::credentials::Secret;
use crate::http::{self, Body, Client, encode_segment};
use hyper::{
    Method, StatusCode, Uri,
    header::{self, HeaderMap, HeaderValue},
};
use serde::Deserialize;
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Life of a token that does not say how long it lives, as the protocol has it.
const LIFE_DEFAULT: Duration = Duration::from_secs(60);
/// Longest time that a token is used, whatever it says.
const LIFE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Longest wait for a token.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest answer of a token service, bytes.
const ANSWER_LEN_MAX: usize = 1 << 20;
/// Most tokens kept: one for each repository.
const TOKENS_MAX: usize = 10_000;

/// What a 401 asks for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The first challenge of these headers that we can meet; a Bearer one rather than a Basic one.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let mut basic = None;
        for value in values {
            let (scheme, parameters) = value.trim().split_once(' ').unwrap_or_else(|| (value.trim(), ""));
            if scheme.eq_ignore_ascii_case("bearer") {
                let parameters = parse(parameters);
                let get = |name: &str| parameters.get(name).cloned();
                if let Some(realm) = get("realm") {
                    return Some(Self::Bearer { realm, service: get("service"), scope: get("scope") });
                }
            } else if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Self::Basic);
            }
        }
        basic
    }
}

/// `name="value", name=value`: values may hold commas and escaped quotes.
fn parse(text: &str) -> HashMap<String, String> {
    let mut parameters = HashMap::new();
    let mut rest = text.trim_start();
    while let Some((name, after)) = rest.split_once('=') {
        let mut value = String::new();
        let after = after.trim_start();
        rest = if let Some(quoted) = after.strip_prefix('"') {
            let mut chars = quoted.char_indices();
            let mut end = quoted.len();
            while let Some((at, c)) = chars.next() {
                match c {
                    '\\' => value.extend(chars.next().map(|(_, c)| c)),
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    c => value.push(c),
                }
            }
            &quoted[end..]
        } else {
            let end = after.find(',').unwrap_or(after.len());
            value.push_str(after[..end].trim());
            &after[end..]
        };
        parameters.insert(name.trim().to_ascii_lowercase(), value);
        rest = rest.trim_start().trim_start_matches(',').trim_start();
    }
    parameters
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("token service {0}")]
    Unreachable(String),
    #[error("token service refuses: {0}")]
    Refused(String),
}

struct Token {
    header: HeaderValue,
    until: Instant,
}

/// Tokens by repository. Used until the last quarter of their lives.
#[derive(Default)]
pub(super) struct Tokens {
    tokens: Mutex<HashMap<String, Token>>,
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Tokens {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Token>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The header that a repository was given last, while it is good.
    pub(super) fn get(&self, repository: &str) -> Option<HeaderValue> {
        self.get_at(Instant::now(), repository)
    }

    fn get_at(&self, now: Instant, repository: &str) -> Option<HeaderValue> {
        self.lock().get(repository).filter(|token| now < token.until).map(|token| token.header.clone())
    }

    /// Keeps a token that was given at `now` for so many seconds, as it says itself.
    fn keep(&self, now: Instant, repository: &str, header: HeaderValue, expires_in: Option<u64>) {
        let life = expires_in.map_or(LIFE_DEFAULT, Duration::from_secs).clamp(LIFE_DEFAULT, LIFE_MAX);
        let mut tokens = self.lock();
        if tokens.len() >= TOKENS_MAX {
            tokens.retain(|_, token| now < token.until);
        }
        if tokens.len() >= TOKENS_MAX {
            tokens.clear();
        }
        tokens.insert(repository.to_owned(), Token { header, until: now + life / 4 * 3 });
    }

    /// Drops a token that was refused, unless there is another by now.
    pub(super) fn refused(&self, repository: &str, header: &HeaderValue) {
        let mut tokens = self.lock();
        if tokens.get(repository).is_some_and(|token| token.header == *header) {
            tokens.remove(repository);
        }
    }

    /// Fetches a token and keeps it.
    pub(super) async fn fetch(
        &self,
        http: &Client,
        repository: &str,
        challenge: &Challenge,
        secret: Option<&Secret>,
    ) -> Result<HeaderValue, Error> {
        let Challenge::Bearer { realm, service, scope } = challenge else {
            return Err(Error::Refused("no challenge for a token".into()));
        };
        let request = request(realm, service.as_deref(), scope.as_deref(), secret).map_err(Error::Refused)?;
        let exchange = async {
            let answer = http.send(request, TIMEOUT).await.map_err(|error| Error::Unreachable(error.to_string()))?;
            let status = answer.status();
            let body = http::read_body(answer.into_body(), ANSWER_LEN_MAX).await;
            Ok((status, body.map_err(|error| Error::Unreachable(format!("{realm}: {error}")))?))
        };
        let exchanged = tokio::time::timeout(TIMEOUT, exchange).await;
        let (status, body) =
            exchanged.map_err(|_| Error::Unreachable(format!("{realm}: no token within {TIMEOUT:?}")))??;
        match status {
            StatusCode::OK => {}
            StatusCode::TOO_MANY_REQUESTS => return Err(Error::Unreachable(format!("{realm}: {status}"))),
            status if status.is_server_error() => return Err(Error::Unreachable(format!("{realm}: {status}"))),
            status => return Err(Error::Refused(format!("{realm}: {status}"))),
        }
        let odd = || Error::Refused(format!("{realm}: no token in its answer"));
        let answer: Answer = serde_json::from_slice(&body).map_err(|_| odd())?;
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty()).ok_or_else(odd)?;
        let mut header = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| odd())?;
        header.set_sensitive(true);
        self.keep(Instant::now(), repository, header.clone(), answer.expires_in);
        Ok(header)
    }
}

fn request(
    realm: &str,
    service: Option<&str>,
    scope: Option<&str>,
    secret: Option<&Secret>,
) -> Result<hyper::Request<Body>, String> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    pairs.extend(service.map(|service| ("service", service)));
    let odd = |error: hyper::http::Error| error.to_string();
    let encoded = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(key, value)| format!("{key}={}", encode_segment(value))).collect::<Vec<_>>().join("&")
    };
    if let Some(Secret::Identity(token)) = secret {
        pairs.extend(scope.map(|scope| ("scope", scope)));
        pairs.extend([("grant_type", "refresh_token"), ("client_id", "shoal"), ("refresh_token", token.as_str())]);
        let uri: Uri = realm.parse().map_err(|_| format!("{realm:?} is no address"))?;
        let request = Client::request(Method::POST, uri)
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(http::full(encoded(&pairs)));
        return request.map_err(odd);
    }
    // A list of scopes is one parameter each.
    pairs.extend(scope.into_iter().flat_map(str::split_whitespace).map(|scope| ("scope", scope)));
    let joint = if realm.contains('?') { '&' } else { '?' };
    let uri: Uri =
        format!("{realm}{joint}{}", encoded(&pairs)).parse().map_err(|_| format!("{realm:?} is no address"))?;
    let mut request = Client::request(Method::GET, uri);
    if let Some(basic) = secret.and_then(Secret::basic) {
        request = request.header(header::AUTHORIZATION, basic);
    }
    request.body(http::empty()).map_err(odd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scope: scope.map(Into::into),
        };
        for (values, expected) in [
            (
                &["Bearer realm=\"https://a/token\",service=\"a\",scope=\"repository:x/y:pull,push\""][..],
                Some(bearer("https://a/token", Some("a"), Some("repository:x/y:pull,push"))),
            ),
            (&["bearer Realm=https://a/t , service = \"q\\\"x\""], Some(bearer("https://a/t", Some("q\"x"), None))),
            (&["Basic realm=\"x\"", "Bearer realm=\"https://a\""], Some(bearer("https://a", None, None))),
            (&["Basic realm=\"x\""], Some(Challenge::Basic)),
            (&["Negotiate", "Bearer service=\"x\""], None),
            (&["Bearer realm=\"unclosed"], Some(bearer("unclosed", None, None))),
            (&[""], None),
        ] {
            let headers =
                values.iter().map(|value| (header::WWW_AUTHENTICATE, value.parse().unwrap())).collect::<HeaderMap>();
            assert_eq!(Challenge::of(&headers), expected, "{values:?}");
        }
    }

    #[test]
    fn tokens_are_asked_for_by_name_or_by_identity() {
        let name = Secret::Password { username: "ann".into(), password: "pw".into() };
        let asked = request("https://a/token?x=1", Some("a b"), Some("s:1 s:2"), Some(&name)).unwrap();
        assert_eq!(asked.uri().to_string(), "https://a/token?x=1&service=a%20b&scope=s:1&scope=s:2");
        assert_eq!(asked.headers()[header::AUTHORIZATION], "Basic YW5uOnB3");
        let anonymous = request("https://a/token", None, None, None).unwrap();
        assert!(!anonymous.headers().contains_key(header::AUTHORIZATION));
        let identity = request("https://a/token", None, None, Some(&Secret::Identity("r".into()))).unwrap();
        assert_eq!((identity.method(), identity.uri().to_string().as_str()), (&Method::POST, "https://a/token"));
        assert!(request("not an address", None, None, None).is_err());
    }

    #[test]
    fn tokens_are_used_until_the_last_quarter_of_their_lives() {
        let (tokens, now) = (Tokens::default(), Instant::now());
        let header = |text| HeaderValue::from_static(text);
        for (expires_in, good_s) in [(Some(300), 225), (None, 45), (Some(1), 45), (Some(u64::MAX), 18 * 3600)] {
            tokens.keep(now, "lib/app", header("Bearer a"), expires_in);
            let after = |s| tokens.get_at(now + Duration::from_secs(s), "lib/app");
            assert_eq!((after(good_s - 1), after(good_s)), (Some(header("Bearer a")), None), "{expires_in:?}");
        }
        tokens.keep(now, "lib/app", header("Bearer b"), Some(300));
        tokens.refused("lib/app", &header("Bearer a"));
        assert_eq!(tokens.get("lib/app"), Some(header("Bearer b")), "another was refused");
        tokens.refused("lib/app", &header("Bearer b"));
        assert!(tokens.get("lib/app").is_none() && tokens.get("lib/other").is_none());
    }
}
