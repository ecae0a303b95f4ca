//! `shoal preheat`: an image to the origins, or to hosts, before anybody pulls it; how far it has come.

use crate::{
    cli::{Trust, say},
    config::{HostPort, Span},
    http::{self, Client},
    preheat::{Id, Label, PROGRESS_LEN_MAX, Progress},
    registry::{Repository, Tag},
};
use anyhow::{Context as _, anyhow, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::Args;
use hyper::{Method, StatusCode, header};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Deserialize;
use std::{
    io::{self, IsTerminal as _},
    time::{Duration, Instant},
};

/// Longest wait for a preheat to begin: the proxy has origins look for every blob first.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(20 * 60);
/// Longest wait for an answer about progress.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(15);
/// How often progress is asked for.
const INTERVAL: Duration = Duration::from_millis(500);
/// Failures to ask in a row before that is given up.
const TRIES: u32 = 20;
/// Failed hosts that are shown.
const FAILURES_SHOWN: usize = 10;
/// The environment variable with the password of `--user`: arguments can be read by everybody on the host.
const PASSWORD: &str = "SHOAL_PASSWORD";

/// `shoal preheat`
#[derive(Debug, Args)]
pub struct Preheat {
    /// The image: REPOSITORY:TAG, as it was pushed to the proxy
    #[arg(required_unless_present = "id", value_parser = image)]
    image: Option<String>,
    /// The proxy's registry
    #[arg(long, default_value = "127.0.0.1:15000", value_name = "HOST:PORT")]
    proxy: HostPort,
    /// To all hosts, not to the origins alone
    #[arg(long)]
    agents: bool,
    /// To the hosts with this label: one of [agent] labels in their configurations
    #[arg(long, value_name = "LABEL")]
    label: Option<Label>,
    /// How long hosts that start meanwhile are told as well, and progress can be asked for
    #[arg(long = "for", default_value = "1h", value_name = "TIME")]
    life: Span,
    /// Ask how far an earlier preheat has come instead of beginning one
    #[arg(long, conflicts_with_all = ["image", "agents", "label"], value_name = "ID")]
    id: Option<Id>,
    /// Wait until every host holds the image or has failed; exit code 0 only if all hold it. For --agents, --label and --id
    #[arg(long)]
    wait: bool,
    /// Longest such wait
    #[arg(long, default_value = "1h", requires = "wait", value_name = "TIME")]
    timeout: Span,
    /// The name for a proxy with access control; its password is taken from the environment, SHOAL_PASSWORD
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    #[command(flatten)]
    trust: Trust,
}

/// `REPOSITORY:TAG`, checked.
fn image(text: &str) -> Result<String, String> {
    let (repository, tag) = text.rsplit_once(':').ok_or("expected REPOSITORY:TAG")?;
    repository.parse::<Repository>().map_err(|error| error.to_string())?;
    tag.parse::<Tag>().map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// What a proxy answers: what is said depends on how it went.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    message: String,
    #[serde(default)]
    id: Option<String>,
}

impl Preheat {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(self.work())
    }

    async fn work(self) -> anyhow::Result<()> {
        // Origins say nothing of how far they are: a code of 0 would be taken for a proof.
        if self.wait && self.id.is_none() && !self.to_hosts() {
            bail!("--wait is for hosts: say --agents or --label as well");
        }
        let client = self.trust.client()?;
        let id = match (&self.id, &self.image) {
            (Some(id), _) => *id,
            (None, Some(image)) => {
                let begun = self.begin(&client, image).await?;
                let Some(id) = begun else {
                    return say(&format!("{image} is on its way to the origins\n"));
                };
                if !self.wait {
                    eprintln!("on its way; see `shoal preheat --id {id} --wait --proxy {}`", self.proxy);
                    return say(&format!("{id}\n"));
                }
                eprintln!("preheat {id}");
                id
            }
            (None, None) => bail!("an image or --id is needed"),
        };
        let progress = if self.wait { self.follow(&client, &id).await? } else { self.progress(&client, &id).await? };
        for failure in progress.failures.iter().take(FAILURES_SHOWN) {
            eprintln!("{}: {}", failure.host, failure.why);
        }
        if progress.failed > FAILURES_SHOWN {
            eprintln!("and {} hosts more", progress.failed - FAILURES_SHOWN);
        }
        say(&format!("{progress}\n"))?;
        match (progress.is_proven(), &progress.label) {
            (true, _) => Ok(()),
            (false, Some(label)) if progress.hosts == 0 => bail!("no host that is known has the label {label}"),
            (false, None) if progress.hosts == 0 => bail!("no host is known"),
            (false, _) if progress.is_over() => bail!("{} hosts failed", progress.failed),
            (false, _) => bail!("{} hosts are not done yet", progress.working + progress.waiting),
        }
    }

    fn to_hosts(&self) -> bool {
        self.agents || self.label.is_some()
    }

    /// Begins; the id, where hosts are preheated.
    async fn begin(&self, client: &Client, image: &str) -> anyhow::Result<Option<Id>> {
        let to = if self.to_hosts() { "agents" } else { "origins" };
        let mut asked = serde_json::json!({ "tag": format!("{}/{image}", self.proxy), "to": to });
        if let Some(label) = &self.label {
            asked["label"] = label.to_string().into();
        }
        asked["ttl_s"] = self.life.get().as_secs().into();
        let body = Some(asked.to_string());
        let answer = self.ask(client, Method::POST, "/proxy/v2/registry/prefetch", body, BEGIN_TIMEOUT).await?;
        let answer: Answer = serde_json::from_slice(&answer).context("answer of the proxy")?;
        match (to, answer.id) {
            ("origins", _) => Ok(None),
            (_, Some(id)) => Ok(Some(id.parse().context("answer of the proxy")?)),
            (_, None) => bail!("{}: took the image, but does not know how to preheat hosts: is it older?", self.proxy),
        }
    }

    async fn progress(&self, client: &Client, id: &Id) -> anyhow::Result<Progress> {
        let path = format!("/proxy/v2/registry/prefetch/{id}");
        let answer = self.ask(client, Method::GET, &path, None, PROGRESS_TIMEOUT).await?;
        serde_json::from_slice(&answer).context("answer of the proxy")
    }

    /// Until every host has said its last word, or the time is over.
    async fn follow(&self, client: &Client, id: &Id) -> anyhow::Result<Progress> {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        let started = Instant::now();
        let mut failures = 0;
        loop {
            match self.progress(client, id).await {
                Ok(progress) => {
                    failures = 0;
                    let all = progress.bytes.saturating_mul(progress.hosts as u64);
                    if let Some(bar) = &bar {
                        bar.set_length(all);
                        bar.set_position(progress.bytes_held);
                        let failed =
                            if progress.failed > 0 { format!(", {} failed", progress.failed) } else { String::new() };
                        let (held, all) = (HumanBytes(progress.bytes_held), HumanBytes(all));
                        bar.set_message(format!(
                            "{}/{} hosts, {held} of {all}{failed}",
                            progress.holding, progress.hosts
                        ));
                    }
                    if progress.is_over() || started.elapsed() >= self.timeout.get() {
                        if let Some(bar) = &bar {
                            bar.finish_and_clear();
                        }
                        return Ok(progress);
                    }
                }
                Err(error) => {
                    failures += 1;
                    if failures == TRIES || started.elapsed() >= self.timeout.get() || error.is::<Refused>() {
                        return Err(error);
                    }
                }
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn ask(
        &self,
        client: &Client,
        method: Method,
        path: &str,
        body: Option<String>,
        timeout: Duration,
    ) -> anyhow::Result<bytes::Bytes> {
        let mut request = Client::request(method, format!("http://{}{path}", self.proxy).parse()?);
        if let Some(user) = &self.user {
            let password = std::env::var(PASSWORD).with_context(|| format!("--user needs {PASSWORD}"))?;
            let basic = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
            request = request.header(header::AUTHORIZATION, basic);
        }
        let request = request.body(body.map_or_else(http::empty, http::full))?;
        let answer = client.send(request, timeout).await?;
        let status = answer.status();
        let read = tokio::time::timeout(timeout, http::read_body(answer.into_body(), 2 * PROGRESS_LEN_MAX)).await;
        let bytes = read.map_err(|_| anyhow!("{}: answer did not end", self.proxy))??;
        if status == StatusCode::OK {
            return Ok(bytes);
        }
        let said = serde_json::from_slice::<Answer>(&bytes).map(|answer| answer.message).unwrap_or_default();
        let said = if said.is_empty() { String::from_utf8_lossy(&bytes).trim().to_owned() } else { said };
        let message = format!("{}: {status}: {said}", self.proxy);
        if status.is_client_error() { Err(Refused(message).into()) } else { Err(anyhow!(message)) }
    }
}

/// Asking again would be in vain.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        preheat: Preheat,
    }

    fn parse(args: &str) -> Result<Preheat, clap::Error> {
        Line::try_parse_from(std::iter::once("preheat").chain(args.split_whitespace())).map(|line| line.preheat)
    }

    #[test]
    fn an_image_or_an_id_is_given() {
        let preheat = parse("lib/app:1 --label zone=a --wait --timeout 5m --for 2h").unwrap();
        assert_eq!((preheat.image.as_deref(), preheat.wait), (Some("lib/app:1"), true));
        assert_eq!((preheat.timeout, preheat.life), (Span::secs(300), Span::secs(7200)));
        assert!(parse("--id 0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f0").unwrap().id.is_some());
        for bad in [
            "",
            "lib/app",
            "Lib/app:1",
            "lib/app:1 --label a,b",
            "lib/app:1 --timeout 1h",
            "--id 7",
            "lib/app:1 --id 0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f0",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn origins_are_not_waited_for() {
        let refused = parse("lib/app:1 --wait").unwrap().work().await.unwrap_err().to_string();
        assert_eq!(refused, "--wait is for hosts: say --agents or --label as well");
    }
}
