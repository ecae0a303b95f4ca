//! Who may do what in which repository: names from passwords, tokens and client certificates, rights from rules.
//!
//! Without rules everybody may do everything. With them, nobody may do what no rule says. A client without a name is told how to
//! give one (401) where a name could help it; one with a name that is not enough is refused (403). A token brings its own rights:
//! those that its issuer gave its holder, which for our own tokens are those of the rules.

pub mod credentials;
pub mod endpoint;
#[cfg(test)]
mod flows;
pub mod key_files;
pub mod keys;
mod passwords;
pub mod scope;
pub mod token;
mod tokens;

pub use tokens::Config as TokenConfig;

use self::{
    credentials::Credentials,
    endpoint::TOKEN_PATH,
    passwords::Passwords,
    scope::{CATALOG, REGISTRY, REPOSITORY},
    token::{Fault, Grant},
    tokens::Tokens,
};
use super::{
    error::{Code, Error},
    name::Repository,
    service::text,
};
use crate::http::{self, server::Peer};
use hyper::{
    header::{self, HeaderValue},
    http::request::Parts,
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use regex::Regex;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};
use tokio::sync::watch;

/// How often the files of names and keys are looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);
/// Longest pattern of a repository once compiled, bytes.
const REGEX_SIZE_MAX: usize = 1 << 20;
/// Asks for a name and a password.
const BASIC: HeaderValue = HeaderValue::from_static("Basic realm=\"shoal\"");
/// What the names of client certificates begin with in rules.
const CERTIFICATE: &str = "cert:";

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

impl Action {
    /// As tokens have it.
    const fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "push",
            Self::Create => "create",
            Self::Delete => "delete",
            Self::Catalog => "catalog",
        }
    }
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
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Tokens that are taken, and issued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<TokenConfig>,
}

/// One rule.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// A regular expression that the whole name of a repository has to match.
    pub repository: String,
    /// Names; `cert:NAME` for a client certificate's, `*` for everybody with a name, `anonymous` for everybody.
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
    /// A key of `[access.tokens]`.
    #[error("tokens.{0}: {1}")]
    Token(&'static str, String),
    /// The keys of tokens.
    #[error("keys of tokens: {0}")]
    Keys(#[from] key_files::Error),
}

/// Access control of one role.
pub struct Access {
    strict: bool,
    rules: Vec<(Regex, Rule)>,
    passwords: Option<Passwords>,
    tokens: Option<Tokens>,
    figures: Figures,
}

#[derive(Default)]
struct Figures {
    refused: Family<Why, Counter>,
    issued: Counter,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Why {
    why: &'static str,
}

/// Who asks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Who {
    /// Somebody who gave no name.
    Nobody,
    /// Somebody whose password was right.
    Name(String),
    /// Whoever has a certificate with these names, each as rules have it; at least one.
    Certificate(Vec<String>),
    /// Whoever has a token.
    Bearer(Bearer),
}

/// What a token says of its holder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Bearer {
    name: String,
    access: Vec<Grant>,
}

impl Bearer {
    fn may(&self, kind: &str, name: &str, action: &str) -> bool {
        let about = |grant: &&Grant| grant.kind == kind && grant.name == name;
        self.access.iter().filter(about).any(|grant| grant.actions.iter().any(|one| one == action || one == "*"))
    }
}

impl Who {
    /// What tokens and refusals call it; empty for nobody.
    fn name(&self) -> &str {
        match self {
            Self::Nobody => "",
            Self::Name(name) | Self::Bearer(Bearer { name, .. }) => name,
            Self::Certificate(names) => names.first().map_or("", String::as_str),
        }
    }

    fn is_among(&self, users: &BTreeSet<String>) -> bool {
        users.contains("anonymous")
            || match self {
                Self::Nobody | Self::Bearer(_) => false,
                Self::Name(name) => users.contains("*") || users.contains(name),
                Self::Certificate(names) => users.contains("*") || names.iter().any(|name| users.contains(name)),
            }
    }
}

/// Why nobody knows who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Unknown {
    Header,
    Password,
    Token(Fault),
}

impl Unknown {
    const fn message(self) -> &'static str {
        match self {
            Self::Header => "the Authorization header must be one, Basic or Bearer",
            Self::Password => "name or password is wrong",
            Self::Token(_) => "the token is not taken: get another",
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Password => "password",
            Self::Token(fault) => fault.name(),
        }
    }
}

/// What a request needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Need<'a> {
    /// A name, where names are known: clients learn so that they may give one.
    Name,
    /// The list of repositories.
    Catalog,
    /// One of these in a repository.
    Any(&'a Repository, &'static [Action]),
}

impl Need<'_> {
    /// The scope of a token that would do, `from` being mounted from.
    fn scope(self, from: Option<&Repository>) -> Option<String> {
        let (repository, actions) = match self {
            Self::Name => return None,
            Self::Catalog => return Some(format!("{REGISTRY}:{CATALOG}:*")),
            Self::Any(repository, actions) => (repository, actions),
        };
        let actions = match actions {
            [Action::Delete, ..] => "delete",
            [Action::Pull, ..] => "pull",
            // As push, create is asked for: the client knows no such word.
            _ => "pull,push",
        };
        let scope = format!("{REPOSITORY}:{repository}:{actions}");
        Some(match from {
            Some(from) if from != repository => format!("{scope} {REPOSITORY}:{from}:pull"),
            _ => scope,
        })
    }
}

impl Access {
    /// Reads the rules and the files of names and keys. Blocks.
    pub fn open(config: Config) -> Result<Arc<Self>, Invalid> {
        let rules = config.rules.into_iter().map(|rule| {
            let pattern =
                regex::RegexBuilder::new(&format!("^(?:{})$", rule.repository)).size_limit(REGEX_SIZE_MAX).build();
            match pattern {
                Ok(pattern) => Ok((pattern, rule)),
                Err(error) => Err(Invalid::Pattern(rule.repository, error.into())),
            }
        });
        Ok(Arc::new(Self {
            strict: !config.unrecorded,
            rules: rules.collect::<Result<_, _>>()?,
            passwords: config.htpasswd.map(Passwords::open).transpose()?,
            tokens: config.tokens.map(Tokens::open).transpose()?,
            figures: Figures::default(),
        }))
    }

    /// Adds its figures to a role's.
    pub fn register(&self, registry: &mut Registry) {
        let Figures { refused, issued } = &self.figures;
        registry.register("access_refused", "Credentials that were refused, by what was wrong", refused.clone());
        registry.register("access_tokens_issued", "Tokens issued", issued.clone());
    }

    /// Whether only content with a record in a repository is that repository's.
    pub fn is_strict(&self) -> bool {
        self.strict
    }

    /// Whether it issues tokens.
    pub fn issues_tokens(&self) -> bool {
        self.tokens.as_ref().is_some_and(Tokens::are_issued)
    }

    /// Reads the files of names and keys again and takes what is new; whether there was anything. Blocks.
    pub fn reload(&self) -> Result<bool, Invalid> {
        let names = self.passwords.as_ref().map_or(Ok(false), Passwords::reload);
        let keys = self.tokens.as_ref().map_or(Ok(false), Tokens::reload);
        Ok(names? | keys?)
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
                Ok(Ok(true)) => tracing::info!("names, passwords and keys reloaded"),
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "reload names and keys; those before stay in force"),
                Err(error) => tracing::warn!(%error, "reload names and keys"),
            }
        }
    }

    /// Who asks: by the request's `Authorization`, or else by the connection's certificate.
    async fn identify(&self, parts: &Parts) -> Result<Who, Unknown> {
        match Credentials::of(&parts.headers) {
            Ok(Some(given)) => self.prove(given).await,
            Ok(None) => Ok(certified(parts)),
            Err(_) => Err(self.count(Unknown::Header)),
        }
    }

    /// Whose credentials these are.
    async fn prove(&self, given: Credentials) -> Result<Who, Unknown> {
        match (given, &self.passwords, &self.tokens) {
            (Credentials::Basic { name, password }, Some(passwords), _) => {
                if !passwords.is_right(&name, password).await {
                    return Err(self.count(Unknown::Password));
                }
                Ok(Who::Name(name))
            }
            (Credentials::Basic { .. }, None, _) => Err(self.count(Unknown::Password)),
            (Credentials::Bearer(text), _, Some(tokens)) => match tokens.verify(&text) {
                Ok(claims) => Ok(Who::Bearer(Bearer { name: claims.sub, access: claims.access.unwrap_or_default() })),
                Err(fault) => Err(self.count(Unknown::Token(fault))),
            },
            (Credentials::Bearer(_), _, None) => Err(self.count(Unknown::Header)),
        }
    }

    fn count(&self, why: Unknown) -> Unknown {
        self.figures.refused.get_or_create(&Why { why: why.name() }).inc();
        why
    }

    /// Who asks, where what they ask for is allowed. 401 or 403 where it is not; `from` is a repository that is mounted from.
    pub(super) async fn admit(&self, parts: &Parts, need: Need<'_>, from: Option<&Repository>) -> Result<Who, Error> {
        let who = self.identify(parts).await.map_err(|why| {
            let error = matches!(why, Unknown::Token(_)).then_some("invalid_token");
            self.challenge(parts, need.scope(from), error, why.message())
        })?;
        let may = match need {
            Need::Name => self.is_known(&who) || !self.knows_names(),
            Need::Catalog => self.may_list(&who),
            Need::Any(repository, actions) => actions.iter().any(|action| self.allows(&who, repository, *action)),
        };
        if may {
            return Ok(who);
        }
        let challenge = |error, message| self.challenge(parts, need.scope(from), error, message);
        Err(match &who {
            // The client may have asked for a token of less.
            Who::Bearer(_) => challenge(Some("insufficient_scope"), "the token does not allow this"),
            Who::Nobody | Who::Certificate(_) if self.knows_names() => {
                challenge(None, "this needs a name and a password, or a token")
            }
            Who::Nobody => Error::new(Code::Denied, "this needs a client certificate"),
            Who::Name(_) | Who::Certificate(_) => {
                Error::new(Code::Denied, format!("{} may not do this here", who.name()))
            }
        })
    }

    /// Whether a client can give a name in a request.
    fn knows_names(&self) -> bool {
        self.passwords.is_some() || self.tokens.is_some()
    }

    /// Whether there is nothing to gain from another name. A certificate that no rule speaks of is none.
    fn is_known(&self, who: &Who) -> bool {
        match who {
            Who::Nobody => false,
            Who::Name(_) | Who::Bearer(_) => true,
            Who::Certificate(_) => {
                self.rules.iter().any(|(_, rule)| !rule.users.contains("anonymous") && who.is_among(&rule.users))
            }
        }
    }

    /// Whether somebody may do something in a repository.
    pub(super) fn allows(&self, who: &Who, repository: &Repository, action: Action) -> bool {
        let ruled = self.rules.iter().any(|(pattern, rule)| {
            rule.actions.contains(&action) && who.is_among(&rule.users) && pattern.is_match(repository.as_str())
        });
        ruled || matches!(who, Who::Bearer(bearer) if bearer.may(REPOSITORY, repository.as_str(), action.name()))
    }

    /// Whether somebody may list the repositories.
    fn may_list(&self, who: &Who) -> bool {
        let ruled = |rule: &Rule| rule.actions.contains(&Action::Catalog) && who.is_among(&rule.users);
        self.rules.iter().any(|(_, rule)| ruled(rule))
            || matches!(who, Who::Bearer(bearer) if bearer.may(REGISTRY, CATALOG, "*"))
    }

    /// Those of the actions asked for that somebody may do in a repository. Whoever asks to push and may only create may create.
    fn granted(&self, who: &Who, repository: &Repository, asked: &[&str]) -> Vec<&'static str> {
        let asks = |word: &str| asked.contains(&word) || asked.contains(&"*");
        let may = |action| self.allows(who, repository, action);
        let mut granted = Vec::new();
        if asks("pull") && may(Action::Pull) {
            granted.push("pull");
        }
        if asks("push") && may(Action::Push) {
            granted.push("push");
        } else if (asks("push") || asks("create")) && (may(Action::Create) || may(Action::Push)) {
            granted.push("create");
        }
        if asks("delete") && may(Action::Delete) {
            granted.push("delete");
        }
        granted
    }

    /// 401, with what a client needs to do better: where it gets a token, or else that a name and a password will do.
    fn challenge(
        &self,
        parts: &Parts,
        scope: Option<String>,
        error: Option<&'static str>,
        message: &'static str,
    ) -> Error {
        let bearer = self.tokens.as_ref().and_then(|tokens| {
            let realm = match tokens.realm() {
                Some(realm) => realm.to_owned(),
                None => format!("{}{TOKEN_PATH}", http::called(parts)?),
            };
            let mut value = format!("Bearer realm=\"{realm}\",service=\"{}\"", tokens.service());
            for (name, text) in [("scope", scope.as_deref()), ("error", error)] {
                value.extend(text.map(|text| format!(",{name}=\"{text}\"")));
            }
            text(value).ok()
        });
        Error::new(Code::Unauthorized, message).header(header::WWW_AUTHENTICATE, bearer.unwrap_or(BASIC))
    }
}

/// Whom the connection's certificate names.
fn certified(parts: &Parts) -> Who {
    let names = parts.extensions.get::<Peer>().map_or(&[][..], |peer| &peer.names);
    match names {
        [] => Who::Nobody,
        names => Who::Certificate(names.iter().map(|name| format!("{CERTIFICATE}{name}")).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Rules, Service,
        harness::{Server, image},
        memory::Memory,
    };
    use super::*;
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use bytes::Bytes;
    use peer_proto::Algorithm;
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
        Access::open(Config { htpasswd: Some(htpasswd), unrecorded: false, rules, tokens: None })
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
        let nowhere =
            Config { htpasswd: Some("/nowhere/x".into()), unrecorded: false, rules: Vec::new(), tokens: None };
        assert!(matches!(Access::open(nowhere), Err(Invalid::Read(..))));
    }
}
