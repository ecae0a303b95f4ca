//! Who we are to an upstream: a name and a password, or a token of its identity service, from where operators keep them.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt, process::Command, sync::Mutex};

/// How long what was read, or what a helper said, is used again.
const KEPT: Duration = Duration::from_secs(60);
/// Longest wait for a helper.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest file of secrets, bytes.
const FILE_LEN_MAX: u64 = 1 << 20;
/// The key of Docker Hub in files and helpers of docker's.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// The name that stands for "the secret is an identity token".
const TOKEN_NAME: &str = "<token>";

/// Where the credentials for one upstream are.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Config {
    /// Nowhere: we are nobody.
    #[default]
    None,
    /// A name, and a password in a file or in the environment.
    Basic {
        /// The name.
        username: String,
        /// A file whose first line is the password; read again from time to time.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        password_file: Option<PathBuf>,
        /// The environment variable that is the password.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        password_env: Option<String>,
    },
    /// A `config.json` as `docker login` writes it, with the helpers that it names.
    DockerConfig {
        /// The file.
        file: PathBuf,
    },
    /// A docker credential helper.
    Helper {
        /// The program: a path, or what follows `docker-credential-` in its name.
        program: String,
    },
}

impl Config {
    /// What is wrong with it.
    pub(super) fn problem(&self) -> Option<String> {
        match self {
            Self::Basic { password_file, password_env, .. } if password_file.is_some() == password_env.is_some() => {
                Some("set one of password_file and password_env".into())
            }
            Self::Basic { username, .. } if username.is_empty() || username.contains(':') => {
                Some(format!("{username:?} is no user name"))
            }
            Self::Helper { program } if program.is_empty() => Some("name the helper's program".into()),
            _ => None,
        }
    }
}

/// What proves who we are.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Secret {
    /// For Basic authorization, and for tokens.
    Password { username: String, password: String },
    /// For tokens alone.
    Identity(String),
}

impl Secret {
    fn of(username: &str, secret: &str) -> Option<Self> {
        match username {
            "" => None,
            TOKEN_NAME => Some(Self::Identity(secret.to_owned())),
            username => Some(Self::Password { username: username.to_owned(), password: secret.to_owned() }),
        }
    }

    /// The header for Basic authorization.
    pub(super) fn basic(&self) -> Option<String> {
        match self {
            Self::Password { username, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
            }
            Self::Identity(_) => None,
        }
    }
}

/// Why a secret cannot be had. Never says any of it.
#[derive(Debug, thiserror::Error)]
#[error("credentials: {0}")]
pub(super) struct Error(String);

/// The credentials for one upstream.
pub(super) struct Credentials {
    config: Config,
    /// How docker calls the upstream.
    keys: Vec<String>,
    kept: Mutex<Option<(Instant, Option<Secret>)>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: BTreeMap<String, Auth>,
    creds_store: String,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answered {
    username: String,
    secret: String,
}

impl Credentials {
    pub(super) fn new(config: Config, name: &str) -> Self {
        let hub = (name == "docker.io").then(|| DOCKER_HUB_KEY.to_owned());
        let keys = hub.into_iter().chain([name.to_owned(), format!("https://{name}")]).collect();
        Self { config, keys, kept: Mutex::default() }
    }

    /// The secret; none where we are nobody.
    pub(super) async fn secret(&self) -> Result<Option<Secret>, Error> {
        let mut kept = self.kept.lock().await;
        if let Some((since, secret)) = &*kept
            && since.elapsed() < KEPT
        {
            return Ok(secret.clone());
        }
        let secret = self.look().await?;
        *kept = Some((Instant::now(), secret.clone()));
        Ok(secret)
    }

    /// Has the next call look again: what was kept is refused.
    pub(super) async fn forget(&self) {
        *self.kept.lock().await = None;
    }

    async fn look(&self) -> Result<Option<Secret>, Error> {
        match &self.config {
            Config::None => Ok(None),
            Config::Basic { username, password_file: Some(file), .. } => {
                let text = read(file.clone()).await?;
                Ok(Secret::of(username, text.lines().next().unwrap_or_default().trim_end()))
            }
            Config::Basic { username, password_env, .. } => {
                let variable = password_env.as_deref().unwrap_or_default();
                let password = std::env::var(variable).map_err(|error| Error(format!("{variable}: {error}")))?;
                Ok(Secret::of(username, &password))
            }
            Config::DockerConfig { file } => {
                let text = read(file.clone()).await?;
                let config: DockerConfig =
                    serde_json::from_str(&text).map_err(|error| Error(format!("{}: {error}", file.display())))?;
                self.of_docker(&config).await
            }
            Config::Helper { program } => self.ask(program).await,
        }
    }

    async fn of_docker(&self, config: &DockerConfig) -> Result<Option<Secret>, Error> {
        if let Some(helper) = self.keys.iter().find_map(|key| config.cred_helpers.get(key)) {
            return self.ask(helper).await;
        }
        let auth = self.keys.iter().find_map(|key| config.auths.get(key));
        match auth {
            Some(auth) if !auth.identitytoken.is_empty() => Ok(Some(Secret::Identity(auth.identitytoken.clone()))),
            Some(auth) if !auth.auth.is_empty() => {
                let decoded = STANDARD.decode(auth.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
                let parts = decoded.as_deref().and_then(|text| text.trim_end_matches('\0').split_once(':'));
                let (name, password) =
                    parts.ok_or_else(|| Error("auth is not base64 of a name and a password".into()))?;
                Ok(Secret::of(name, password))
            }
            Some(auth) if !auth.username.is_empty() => Ok(Secret::of(&auth.username, &auth.password)),
            _ if !config.creds_store.is_empty() => self.ask(&config.creds_store).await,
            _ => Ok(None),
        }
    }

    /// Asks a helper by each name that the upstream may have there.
    async fn ask(&self, program: &str) -> Result<Option<Secret>, Error> {
        let program = if program.contains('/') { program.to_owned() } else { format!("docker-credential-{program}") };
        for key in &self.keys {
            let asking = tokio::time::timeout(HELPER_TIMEOUT, run(&program, key)).await;
            let asked = asking.map_err(|_| Error(format!("{program}: no answer within {HELPER_TIMEOUT:?}")))?;
            if let Some(answer) = asked? {
                return Ok(Secret::of(&answer.username, &answer.secret));
            }
        }
        Ok(None)
    }
}

/// What a helper says of a registry; none where it knows nothing.
async fn run(program: &str, key: &str) -> Result<Option<Answered>, Error> {
    let failed = |error: std::io::Error| Error(format!("{program}: {error}"));
    let mut helper = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = helper.stdin.take() {
        match stdin.write_all(format!("{key}\n").as_bytes()).await {
            // It may know what to say without.
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(failed(error)),
            _ => {}
        }
    }
    let out = helper.wait_with_output().await.map_err(failed)?;
    if !out.status.success() {
        // The protocol's only way to say that there is none, and it says so on its standard output.
        let said = String::from_utf8_lossy(&out.stdout);
        let unknown = said.contains("credentials not found") || said.contains("no credentials");
        return if unknown { Ok(None) } else { Err(Error(format!("{program} get: {}", out.status))) };
    }
    let answer = serde_json::from_slice(&out.stdout);
    // The error's text could hold a piece of the secret.
    answer.map(Some).map_err(|_| Error(format!("{program} get: not the JSON of a credential helper")))
}

async fn read(path: PathBuf) -> Result<String, Error> {
    let read = tokio::task::spawn_blocking(move || {
        let failed = |error: std::io::Error| Error(format!("{}: {error}", path.display()));
        if std::fs::metadata(&path).map_err(failed)?.len() > FILE_LEN_MAX {
            return Err(Error(format!("{}: longer than {FILE_LEN_MAX} bytes", path.display())));
        }
        std::fs::read_to_string(&path).map_err(failed)
    });
    read.await.unwrap_or_else(|error| Err(Error(error.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::TempDir;

    fn password(username: &str, password: &str) -> Option<Secret> {
        Secret::of(username, password)
    }

    async fn secret(config: Config, name: &str) -> Option<Secret> {
        Credentials::new(config, name).secret().await.unwrap()
    }

    #[tokio::test]
    async fn secrets_come_from_where_operators_keep_them() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("password");
        std::fs::write(&file, "secret\n").unwrap();
        let basic = Config::Basic { username: "ann".into(), password_file: Some(file), password_env: None };
        assert!(secret(basic, "r.example").await == password("ann", "secret"));
        assert!(secret(Config::None, "r.example").await.is_none());

        let helper = dir.path().join("helper");
        let script = "#!/bin/sh\nread key\ncase $key in\n  known.example) echo '{\"ServerURL\":\"\",\"Username\":\"bob\",\"Secret\":\"pw\"}';;\n  \
                      token.example) echo '{\"Username\":\"<token>\",\"Secret\":\"refresh\"}';;\n  \
                      *) echo 'credentials not found in native keychain'; exit 1;;\nesac\n";
        std::fs::write(&helper, script).unwrap();
        std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
        let program = helper.display().to_string();
        let helper = || Config::Helper { program: program.clone() };
        assert!(secret(helper(), "known.example").await == password("bob", "pw"));
        assert!(secret(helper(), "token.example").await == Some(Secret::Identity("refresh".into())));
        assert!(secret(helper(), "other.example").await.is_none());
        let missing = Credentials::new(Config::Helper { program: "/nowhere/helper".into() }, "x");
        assert!(missing.secret().await.is_err());

        let file = dir.path().join("config.json");
        let auth = STANDARD.encode("ann:a:b");
        let config = serde_json::json!({
            "auths": {
                "https://index.docker.io/v1/": { "auth": auth },
                "plain.example": { "username": "u", "password": "p" },
                "identity.example": { "auth": auth, "identitytoken": "refresh" },
            },
            "credHelpers": { "known.example": program },
        });
        std::fs::write(&file, config.to_string()).unwrap();
        for (name, expected) in [
            ("docker.io", password("ann", "a:b")),
            ("plain.example", password("u", "p")),
            ("identity.example", Some(Secret::Identity("refresh".into()))),
            ("known.example", password("bob", "pw")),
            ("other.example", None),
        ] {
            assert!(secret(Config::DockerConfig { file: file.clone() }, name).await == expected, "{name}");
        }
    }
}
