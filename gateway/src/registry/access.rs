//! Who may do what in which repository: names and passwords from a file, rights from rules.
//!
//! Without rules everybody may do everything. With them, nobody may do what no rule says. A client without a name is told to give
//! one (401) where a name could help it; one with a name that is not enough is refused (403).

use super::{
    error::{Code, Error},
    name::Repository,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::header::{self, HeaderMap, HeaderValue};
use peer_proto::{Algorithm, Digest, chain::Hasher};
use regex::Regex;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{Semaphore, watch};

/// How often the file of names is looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);
/// Passwords checked at once: each takes a core for a while, on purpose.
const CHECKS_MAX: usize = 2;
/// Passwords remembered as right, so that each is checked once.
const REMEMBERED_MAX: usize = 10_000;
/// Longest file of names, bytes.
const FILE_LEN_MAX: u64 = 16 << 20;
/// Longest pattern of a repository once compiled, bytes.
const REGEX_SIZE_MAX: usize = 1 << 20;
/// What an unknown name's password is compared with, so that it takes as long as a known one's.
const NOBODY: &str = "$2b$10$abcdefghijklmnopqrstuu5Lo0g67CiD3M4RpN1BmBb4Crp5w7dbK";

/// Something that a rule allows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Read blobs, manifests, tags and referrers.
    Pull,
    /// Write them, and move tags.
    Push,
    /// Write them, and set tags that are not set.
    Create,
    /// Delete them.
    Delete,
    /// List the repositories.
    Catalog,
}

/// `[access]`: who may do what, at proxies and agents alike.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Names and bcrypt hashes of passwords, as `htpasswd -B` writes them; read again when it changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub htpasswd: Option<PathBuf>,
    /// Answer also for content that no push through a proxy has put into the repository asked for. Then whoever may pull from
    /// any repository can read whatever digest they know of.
    #[serde(default)]
    pub unrecorded: bool,
    /// What is allowed; everything that any of them allows.
    pub rules: Vec<Rule>,
}

/// One rule.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// A regular expression that the whole name of a repository has to match.
    pub repository: String,
    /// Names; `*` for everybody with a name, `anonymous` for everybody.
    pub users: BTreeSet<String>,
    /// What they may do there.
    pub actions: BTreeSet<Action>,
}

/// Why there can be no access control as configured.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// A rule's pattern.
    #[error("rule for {0:?}: {1}")]
    Pattern(String, #[source] Box<regex::Error>),
    /// The file of names cannot be read.
    #[error("{0}: {1}")]
    Read(PathBuf, #[source] std::io::Error),
    /// A line of it is not `name:bcrypt`.
    #[error("{0}, line {1}: not a name and a bcrypt hash")]
    Line(PathBuf, usize),
}

/// Access control of one role.
pub struct Access {
    htpasswd: Option<PathBuf>,
    strict: bool,
    rules: Vec<(Regex, Rule)>,
    names: Mutex<Names>,
    checks: Semaphore,
}

#[derive(Default)]
struct Names {
    /// The file when it was looked at last, good or not.
    seen: String,
    hashes: BTreeMap<String, String>,
    /// Digests of names and passwords that were right.
    right: HashSet<Digest>,
}

/// Who asks: a name that was proven, or nobody.
pub(super) type User = Option<String>;

impl Access {
    /// Reads the rules and the file of names. Blocks.
    pub fn open(config: Config) -> Result<Arc<Self>, Invalid> {
        let rules = config.rules.into_iter().map(|rule| {
            let pattern =
                regex::RegexBuilder::new(&format!("^(?:{})$", rule.repository)).size_limit(REGEX_SIZE_MAX).build();
            match pattern {
                Ok(pattern) => Ok((pattern, rule)),
                Err(error) => Err(Invalid::Pattern(rule.repository, error.into())),
            }
        });
        let access = Self {
            htpasswd: config.htpasswd,
            strict: !config.unrecorded,
            rules: rules.collect::<Result<_, _>>()?,
            names: Mutex::default(),
            checks: Semaphore::new(CHECKS_MAX),
        };
        access.reload()?;
        Ok(Arc::new(access))
    }

    /// Whether only content with a record in a repository is that repository's.
    pub fn is_strict(&self) -> bool {
        self.strict
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the file of names again and takes what is new; whether there was anything. Blocks.
    pub fn reload(&self) -> Result<bool, Invalid> {
        let Some(path) = &self.htpasswd else { return Ok(false) };
        let read = || {
            if std::fs::metadata(path)?.len() > FILE_LEN_MAX {
                return Err(std::io::Error::other(format!("longer than {FILE_LEN_MAX} bytes")));
            }
            std::fs::read_to_string(path)
        };
        let seen = read().map_err(|error| Invalid::Read(path.clone(), error))?;
        let mut names = self.names();
        if names.seen == seen {
            return Ok(false);
        }
        names.seen = seen;
        let mut hashes = BTreeMap::new();
        for (number, line) in names.seen.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let sound = line.split_once(':').filter(|(name, hash)| {
                let kind = ["$2a$", "$2b$", "$2y$"].iter().any(|kind| hash.starts_with(kind));
                !name.is_empty() && hash.len() == NOBODY.len() && kind
            });
            let (name, hash) = sound.ok_or_else(|| Invalid::Line(path.clone(), number + 1))?;
            hashes.insert(name.to_owned(), hash.to_owned());
        }
        names.hashes = hashes;
        names.right.clear();
        Ok(true)
    }

    /// Reloads from time to time until `stop` is true.
    pub async fn watch(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(RELOAD_INTERVAL) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            let access = self.clone();
            match tokio::task::spawn_blocking(move || access.reload()).await {
                Ok(Ok(true)) => tracing::info!("names and passwords reloaded"),
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "reload names and passwords; those before stay in force"),
                Err(error) => tracing::warn!(%error, "reload names and passwords"),
            }
        }
    }

    /// Who asks, by the request's `Authorization`. 401 for a name whose password is wrong.
    pub(super) async fn identify(&self, headers: &HeaderMap) -> Result<User, Error> {
        let Some(given) = headers.get(header::AUTHORIZATION) else { return Ok(None) };
        let given = given.to_str().ok().and_then(|text| text.split_once(' '));
        let basic = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"));
        let text = basic
            .and_then(|(_, text)| STANDARD.decode(text.trim()).ok())
            .and_then(|bytes| String::from_utf8(bytes).ok());
        let (name, password) = text
            .as_deref()
            .and_then(|text| text.split_once(':'))
            .ok_or_else(|| challenge("no name and password in it"))?;
        // What some clients send that have neither.
        if name.is_empty() && password.is_empty() {
            return Ok(None);
        }
        let (hash, known) = {
            let names = self.names();
            let hash = names.hashes.get(name).cloned();
            (hash.clone().unwrap_or_else(|| NOBODY.to_owned()), hash.is_some())
        };
        let key = key(name, password, &hash);
        if self.names().right.contains(&key) {
            return Ok(Some(name.to_owned()));
        }
        let _place = self.checks.acquire().await.map_err(|error| Error::new(Code::Unknown, error.to_string()))?;
        let password = password.to_owned();
        let right = tokio::task::spawn_blocking(move || bcrypt::verify(password, &hash).unwrap_or(false)).await;
        if !known || !right.unwrap_or(false) {
            return Err(challenge("name or password is wrong"));
        }
        let mut names = self.names();
        if names.right.len() >= REMEMBERED_MAX {
            names.right.clear();
        }
        names.right.insert(key);
        Ok(Some(name.to_owned()))
    }

    /// Whether a user may do something in a repository.
    pub(super) fn allows(&self, user: &User, repository: &Repository, action: Action) -> bool {
        self.rules.iter().any(|(pattern, rule)| {
            rule.actions.contains(&action) && is_among(user, &rule.users) && pattern.is_match(repository.as_str())
        })
    }

    /// The same as an answer.
    pub(super) fn require(&self, user: &User, repository: &Repository, actions: &[Action]) -> Result<(), Error> {
        let allowed = actions.iter().any(|action| self.allows(user, repository, *action));
        if allowed { Ok(()) } else { Err(refusal(user)) }
    }

    /// 401 for a client without a name where names are known: clients learn so that they may give one.
    pub(super) fn require_name(&self, user: &User) -> Result<(), Error> {
        if user.is_none() && self.htpasswd.is_some() { Err(refusal(user)) } else { Ok(()) }
    }

    /// Whether a user may list the repositories.
    pub(super) fn require_catalog(&self, user: &User) -> Result<(), Error> {
        let allowed =
            self.rules.iter().any(|(_, rule)| rule.actions.contains(&Action::Catalog) && is_among(user, &rule.users));
        if allowed { Ok(()) } else { Err(refusal(user)) }
    }
}

fn is_among(user: &User, users: &BTreeSet<String>) -> bool {
    users.contains("anonymous") || user.as_ref().is_some_and(|user| users.contains("*") || users.contains(user))
}

fn refusal(user: &User) -> Error {
    match user {
        None => challenge("this needs a name and a password"),
        Some(user) => Error::new(Code::Denied, format!("{user} may not do this here")),
    }
}

/// 401, with what a client needs to do better.
pub(super) fn challenge(message: &'static str) -> Error {
    Error::new(Code::Unauthorized, message)
        .header(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"shoal\""))
}

/// Names a password that was right, without being it.
fn key(name: &str, password: &str, hash: &str) -> Digest {
    let mut hasher = Hasher::new(Algorithm::Sha512);
    for part in [name, password, hash] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::super::{
        Rules, Service,
        harness::{Server, image},
        memory::Memory,
    };
    use super::*;
    use bytes::Bytes;
    use tempfile::TempDir;

    fn rule(repository: &str, users: &[&str], actions: &[Action]) -> Rule {
        let users = users.iter().map(|user| (*user).to_owned()).collect();
        Rule { repository: repository.into(), users, actions: actions.iter().copied().collect() }
    }

    fn line(name: &str, password: &str) -> String {
        format!("{name}:{}\n", bcrypt::hash(password, 4).unwrap())
    }

    fn basic(name: &str, password: &str) -> String {
        format!("Basic {}", STANDARD.encode(format!("{name}:{password}")))
    }

    fn open(dir: &TempDir, names: &str, rules: Vec<Rule>) -> Result<Arc<Access>, Invalid> {
        let htpasswd = dir.path().join("htpasswd");
        std::fs::write(&htpasswd, names).unwrap();
        Access::open(Config { htpasswd: Some(htpasswd), unrecorded: false, rules })
    }

    #[tokio::test]
    async fn everybody_may_do_what_a_rule_says_and_no_more() {
        use Action::{Catalog, Create, Delete, Pull, Push};
        let dir = TempDir::new().unwrap();
        let names = [line("ann", "a"), line("bob", "b"), line("root", "r")].concat();
        let rules = vec![
            rule("open/.*", &["anonymous"], &[Pull]),
            rule("team/.*", &["*"], &[Pull]),
            rule("team/app", &["ann"], &[Push]),
            rule("team/.*", &["bob"], &[Create]),
            rule(".*", &["root"], &[Pull, Push, Delete, Catalog]),
        ];
        let access = open(&dir, &names, rules).unwrap();
        let server = Server::start(Service::guarded(Memory::default(), Rules::default(), Some(access.clone()))).await;
        let ask = async |user: &str, method: &str, path: &str, body: Bytes| {
            let password = &user[..user.len().min(1)];
            let given = basic(user, password);
            let headers = [("authorization", given.as_str())];
            server.send(method, path, if user.is_empty() { &[] } else { &headers }, body).await
        };
        let push = async |user: &str, repository: &str, tag: &str, config: &str| {
            let digest = super::super::manifests::digest_of(Algorithm::Sha256, config.as_bytes());
            let path = format!("/v2/{repository}/blobs/uploads/?digest={digest}");
            let blob = ask(user, "POST", &path, Bytes::copy_from_slice(config.as_bytes())).await.status;
            if blob != 201 {
                return blob;
            }
            let body = serde_json::to_vec(&image(&digest, &[])).unwrap();
            ask(user, "PUT", &format!("/v2/{repository}/manifests/{tag}"), body.into()).await.status
        };
        for (user, repository, tag, config, status) in [
            ("root", "open/x", "1", "{}", 201),
            ("", "open/x", "1", "{}", 401),
            ("ann", "open/x", "1", "{}", 403),
            ("ann", "team/app", "1", "{}", 201),
            ("ann", "team/app", "1", "{ }", 201),
            ("ann", "team/other", "1", "{}", 403),
            ("bob", "team/other", "1", "{}", 201),
            ("bob", "team/other", "1", "{}", 201),
            ("bob", "team/other", "1", "{ }", 403),
            ("bob", "team/other", "2", "{ }", 201),
            ("bob", "team/app", "1", "{}", 403),
            ("bob", "xteam/app", "1", "{}", 403),
        ] {
            assert_eq!(push(user, repository, tag, config).await, status, "{user} {repository}:{tag}");
        }
        for (user, method, path, status) in [
            ("", "GET", "/v2/", 401),
            ("ann", "GET", "/v2/", 200),
            ("", "GET", "/v2/open/x/manifests/1", 200),
            ("", "GET", "/v2/team/app/manifests/1", 401),
            ("bob", "GET", "/v2/team/app/manifests/1", 200),
            ("bob", "GET", "/v2/team/app/tags/list", 200),
            ("bob", "GET", "/v2/other/manifests/1", 403),
            ("bob", "DELETE", "/v2/team/other/manifests/1", 403),
            ("ann", "GET", "/v2/_catalog", 403),
            ("root", "GET", "/v2/_catalog", 200),
            ("root", "DELETE", "/v2/team/other/manifests/1", 202),
        ] {
            let answer = ask(user, method, path, Bytes::new()).await;
            assert_eq!(answer.status, status, "{user} {method} {path}");
            let code = match status {
                401 => "UNAUTHORIZED",
                403 => "DENIED",
                _ => continue,
            };
            assert_eq!(
                (answer.code().as_str(), answer.headers.contains_key("www-authenticate")),
                (code, status == 401)
            );
        }
        // A blob of a repository that one may not read is not mounted, also where no repository is named.
        let secret = super::super::manifests::digest_of(Algorithm::Sha256, b"secret");
        let path = format!("/v2/private/blobs/uploads/?digest={secret}");
        assert_eq!(ask("root", "POST", &path, Bytes::from_static(b"secret")).await.status, 201);
        for (user, from, status) in [("ann", "&from=private", 202), ("ann", "", 202), ("root", "&from=private", 201)] {
            let path = format!("/v2/team/app/blobs/uploads/?mount={secret}{from}");
            assert_eq!(ask(user, "POST", &path, Bytes::new()).await.status, status, "{user} {from}");
        }
        for given in [basic("ann", "x"), basic("eve", "e"), "Basic ?".into(), "Bearer x".into(), "x".into()] {
            let answer = server.send("GET", "/v2/open/x/manifests/1", &[("authorization", &given)], "").await;
            assert_eq!((answer.status, answer.code().as_str()), (401, "UNAUTHORIZED"), "{given}");
        }
        let empty = basic("", "");
        let answer = server.send("GET", "/v2/open/x/manifests/1", &[("authorization", &empty)], "").await;
        assert_eq!(answer.status, 200, "what clients without a name send");

        // The file is read again; what does not fit is refused.
        let path = dir.path().join("htpasswd");
        assert!(!access.reload().unwrap());
        std::fs::write(&path, "ann:plain\n").unwrap();
        assert!(matches!(access.reload(), Err(Invalid::Line(_, 1))));
        assert_eq!(ask("ann", "GET", "/v2/", Bytes::new()).await.status, 200);
        std::fs::write(&path, line("ann", "new")).unwrap();
        assert!(access.reload().unwrap());
        assert_eq!(ask("ann", "GET", "/v2/", Bytes::new()).await.status, 401, "with the old password");
    }

    #[test]
    fn rules_that_cannot_be_are_named() {
        let dir = TempDir::new().unwrap();
        assert!(matches!(open(&dir, "", vec![rule("(", &[], &[])]), Err(Invalid::Pattern(..))));
        assert!(matches!(open(&dir, "x", Vec::new()), Err(Invalid::Line(_, 1))));
        let nowhere = Config { htpasswd: Some("/nowhere/x".into()), unrecorded: false, rules: Vec::new() };
        assert!(matches!(Access::open(nowhere), Err(Invalid::Read(..))));
        assert!(bcrypt::verify("x", NOBODY).is_ok(), "a hash that can be compared with");
    }
}
