//! `shoal setup`: has a container runtime ask this host's agent first.
//!
//! What each file has to say is decided by functions from text to text ([`hosts`], [`config_toml`], [`daemon`], [`registries`]). This
//! module and [`runtime`] read, show the difference, ask, and write: first the backups, then the [`record`] of what is about to be
//! written, then the files, so that a run that breaks off is made whole or taken back by the next.

mod agent;
mod config_toml;
mod daemon;
mod document;
mod hosts;
mod record;
mod registries;
mod root;
mod runtime;

use super::say;
use crate::{
    config::{HostPort, Raw},
    upstream,
};
use agent::Agent;
use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand};
use record::{Entry, Record};
use registries::Mirrored;
use root::{Access, Root};
use similar::{ChangeTag, TextDiff};
use std::{
    fmt::Write as _,
    io::{self, BufRead as _, IsTerminal as _},
    path::{Path, PathBuf},
};

/// The agent's configuration that is read where none is named.
const CONFIG: &str = "/etc/shoal/agent.toml";
/// Lines shown around each change.
const CONTEXT: usize = 3;
/// What is added to the name of a file to name its backup.
const BACKUP: &str = ".before-shoal";

/// Which runtime to set up.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// hosts.toml for each upstream, and config_path in config.toml
    Containerd(Containerd),
    /// registry-mirrors in daemon.json, which dockerd uses for docker.io alone
    Docker(Docker),
    /// A drop-in of registries.conf, for buildah and skopeo as well
    Podman(Containers),
    /// The same drop-in as podman's: there is one for both
    Crio(Containers),
}

/// `shoal setup containerd`
#[derive(Debug, Args)]
pub(super) struct Containerd {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    upstreams: Upstreams,
    /// Ask the agent for every registry that has no hosts.toml of its own; it answers 404 for those it does not mirror
    #[arg(long)]
    default: bool,
    /// The folder of hosts.toml files, whoever reads it (such as /etc/docker/certs.d for dockerd with containerd's image store);
    /// config.toml is left alone then
    #[arg(long, value_name = "DIR")]
    certs_dir: Option<PathBuf>,
    /// containerd's own configuration
    #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
    containerd_config: PathBuf,
}

/// `shoal setup docker`
#[derive(Debug, Args)]
pub(super) struct Docker {
    #[command(flatten)]
    common: Common,
}

/// `shoal setup podman` and `shoal setup crio`
#[derive(Debug, Args)]
pub(super) struct Containers {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    upstreams: Upstreams,
}

/// What is the same for every runtime.
#[derive(Debug, Args)]
struct Common {
    /// The agent's registry; as its configuration says unless given, 127.0.0.1:16000 without one
    #[arg(long, value_name = "HOST:PORT")]
    agent: Option<HostPort>,
    /// Speak TLS with the agent, and trust the authorities in this file (PEM), a path below --root
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The agent's configuration file; /etc/shoal/agent.toml below --root unless given, where it is there
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where all paths begin: for the root of an image that is being built
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Write without asking
    #[arg(long, short)]
    yes: bool,
    /// Show what would be written, and stop
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    /// Take back what setup wrote; what others wrote to the same files since stays
    #[arg(long)]
    undo: bool,
    /// Where others changed the very lines that setup wrote: take the file as it is; with --undo, as it was before setup
    #[arg(long)]
    force: bool,
}

/// Which registries the agent is asked for.
#[derive(Debug, Args)]
struct Upstreams {
    /// A registry to ask the agent for, such as docker.io; repeat for each, as those of an earlier run that are not named again are
    /// taken back. All [[upstreams]] and own_names of the agent's configuration
    /// unless given
    #[arg(long = "upstream", value_name = "NAME")]
    names: Vec<String>,
}

/// What a runtime's files have to say.
#[derive(Debug, Default)]
struct Plan {
    targets: Vec<Target>,
    /// What the user should know before the answer.
    notes: Vec<String>,
}

/// One file's text with setup's change.
#[derive(Debug)]
struct Target {
    path: PathBuf,
    text: String,
}

/// The files as they would be had setup never been there.
struct View<'a> {
    root: &'a Root,
    record: &'a Record,
    undo: bool,
    force: bool,
}

/// One file that changes.
#[derive(Debug)]
struct Step {
    path: PathBuf,
    now: Option<String>,
    then: Option<String>,
}

impl Command {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let coloured = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        self.carry_out(coloured, &mut |text| say(text))
    }

    /// Does it; `say` is told what people are to read.
    fn carry_out(&self, coloured: bool, say: &mut dyn FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let common = match self {
            Self::Containerd(containerd) => &containerd.common,
            Self::Docker(docker) => &docker.common,
            Self::Podman(containers) | Self::Crio(containers) => &containers.common,
        };
        let name = match self {
            Self::Containerd(_) => "containerd",
            Self::Docker(_) => "docker",
            Self::Podman(_) | Self::Crio(_) => "containers",
        };
        let root = Root::new(common.root.clone());
        let record = Record::load(&root, name)?;
        let view = View { root: &root, record: &record, undo: common.undo, force: common.force };
        let plan = if common.undo { Plan::default() } else { self.plan(&view)? };
        let targets: Vec<PathBuf> = plan.targets.iter().map(|target| root.shown(&target.path)).collect();
        let (steps, mut next) = view.steps(plan.targets)?;
        for note in plan.notes {
            eprintln!("note: {note}");
        }
        if steps.is_empty() {
            if next != record && !common.dry_run {
                next.settle(&root, name)?;
            }
            let there: Vec<String> = targets.iter().map(|path| path.display().to_string()).collect();
            return say(&match there.as_slice() {
                [] if common.undo => "nothing to undo\n".to_owned(),
                [] => "nothing to change\n".to_owned(),
                [one] => format!("nothing to change: {one} says it already\n"),
                all => format!("nothing to change: {} say it already\n", all.join(", ")),
            });
        }
        say(&diff(&root, &steps, coloured)?)?;
        if common.dry_run {
            return Ok(());
        }
        if !common.yes {
            confirm(&steps)?;
        }
        write(&root, name, &steps, &record, next)?;
        for step in &steps {
            let what = if step.then.is_some() { "wrote" } else { "removed" };
            say(&format!("{what} {}\n", root.shown(&step.path).display()))?;
        }
        match self.reload(&steps) {
            Some(command) => say(&format!("to have it take effect: {command}\n")),
            None => say("it takes effect with the next pull\n"),
        }
    }

    fn plan(&self, view: &View<'_>) -> anyhow::Result<Plan> {
        match self {
            Self::Containerd(containerd) => {
                let raw = containerd.common.raw(view.root)?;
                let agent = containerd.common.agent(view.root, raw.as_ref())?;
                let (mirrored, notes) = containerd.upstreams.mirrored(raw.as_ref(), containerd.default)?;
                runtime::containerd(view, containerd, &agent, &mirrored, notes)
            }
            Self::Docker(docker) => {
                let raw = docker.common.raw(view.root)?;
                let agent = docker.common.agent(view.root, raw.as_ref())?;
                runtime::docker(view, &agent, raw.as_ref())
            }
            Self::Podman(containers) | Self::Crio(containers) => {
                let raw = containers.common.raw(view.root)?;
                let agent = containers.common.agent(view.root, raw.as_ref())?;
                let (mirrored, notes) = containers.upstreams.mirrored(raw.as_ref(), false)?;
                runtime::containers(view, &agent, &mirrored, notes)
            }
        }
    }

    /// What has to be done for the runtime to see the change; nothing where it reads the files at each pull.
    fn reload(&self, steps: &[Step]) -> Option<&'static str> {
        match self {
            Self::Containerd(containerd) => {
                let restart = steps.iter().any(|step| step.path.file_name().is_none_or(|name| name != "hosts.toml"));
                (restart && containerd.certs_dir.is_none()).then_some("systemctl restart containerd")
            }
            Self::Docker(_) => Some("systemctl reload docker"),
            Self::Podman(_) => None,
            Self::Crio(_) => Some("systemctl reload crio"),
        }
    }
}

impl Common {
    /// The agent's configuration; none where none is named and none is at its usual place.
    fn raw(&self, root: &Root) -> anyhow::Result<Option<Raw>> {
        if let Some(path) = &self.config {
            return Ok(Some(Raw::read(path)?));
        }
        let usual = root.resolve(Path::new(CONFIG))?;
        Ok(if usual.exists() { Some(Raw::read(&usual)?) } else { None })
    }

    fn agent(&self, root: &Root, raw: Option<&Raw>) -> anyhow::Result<Agent> {
        if let Some(ca) = &self.ca {
            ensure!(
                ca.is_absolute(),
                "--ca {}: give the whole path, as the runtime reads the file itself",
                ca.display()
            );
            let text = root.read(ca)?.with_context(|| format!("--ca {}: not there", root.shown(ca).display()))?;
            ensure!(text.contains("-----BEGIN CERTIFICATE-----"), "--ca {}: has no certificate (PEM)", ca.display());
        }
        Ok(Agent::new(self.agent.clone(), self.ca.clone(), raw))
    }
}

impl Upstreams {
    /// The registries by their names, with what is to be said about them.
    fn mirrored(&self, raw: Option<&Raw>, none_is_fine: bool) -> anyhow::Result<(Vec<Mirrored>, Vec<String>)> {
        let known = raw.map(|raw| raw.upstreams.as_slice()).unwrap_or_default();
        let own = raw.map(|raw| raw.mirror.own_names.as_slice()).unwrap_or_default();
        let all = known.iter().map(|config| &config.name).chain(own);
        let names: Vec<&String> = if self.names.is_empty() { all.collect() } else { self.names.iter().collect() };
        let (mut mirrored, mut notes): (Vec<Mirrored>, Vec<String>) = (Vec::new(), Vec::new());
        for name in names {
            let config = known.iter().find(|config| config.name == *name);
            if config.is_none() && !own.contains(name) && raw.is_some() {
                notes.push(format!(
                    "the agent's configuration has no [[upstreams]] entry for {name}: until it has one, the agent answers 404"
                ));
            }
            let config = config.cloned().unwrap_or_else(|| upstream::Config::named(name));
            let problems = config.problems();
            let wrong = problems.iter().find(|(key, _)| matches!(*key, "upstreams.name" | "upstreams.prefix"));
            if let Some((_, why)) = wrong {
                bail!("upstream {name}: {why}");
            }
            if mirrored.iter().all(|one| one.name != *name) {
                let prefix = (!own.contains(name)).then(|| config.prefix());
                mirrored.push(Mirrored { name: name.clone(), prefix });
            }
        }
        ensure!(
            none_is_fine || !mirrored.is_empty(),
            "no registry to ask the agent for: name one with --upstream, or give the agent's file with [[upstreams]] by --config"
        );
        Ok((mirrored, notes))
    }
}

impl View<'_> {
    /// A file's text without setup's change.
    fn read(&self, path: &Path) -> anyhow::Result<Option<String>> {
        let now = self.root.read(path)?;
        let Some(entry) = self.record.entry(path) else { return Ok(now) };
        match entry.without(now.as_deref()) {
            Ok(text) => Ok(text),
            Err(_) if self.force && self.undo => Ok(entry.before.clone()),
            Err(_) if self.force => Ok(now),
            Err(changed) => {
                let shown = self.root.shown(path);
                let hint = if self.undo {
                    format!(
                        "take setup's lines out by hand, or put the file back as it was before setup with --undo --force{}",
                        {
                            let backup = backup(&shown);
                            if entry.before.is_some() { format!(" ({})", backup.display()) } else { String::new() }
                        }
                    )
                } else {
                    "--force takes it as it is for the file that setup starts from".to_owned()
                };
                Err(anyhow::Error::new(changed).context(format!("{}: {hint}", shown.display())))
            }
        }
    }

    /// A file with an edit, which must be at rest when it is made again.
    fn edited<E>(&self, path: &Path, edit: impl Fn(Option<&str>) -> Result<String, E>) -> anyhow::Result<Target>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let before = self.read(path)?;
        let context = || self.root.shown(path).display().to_string();
        let text = edit(before.as_deref()).with_context(context)?;
        let again = edit(Some(&text)).with_context(context)?;
        ensure!(text == again, "{}: has a form that cannot be edited safely: edit it by hand", context());
        Ok(Target { path: path.to_owned(), text })
    }

    /// What changes, and the record of it.
    fn steps(&self, targets: Vec<Target>) -> anyhow::Result<(Vec<Step>, Record)> {
        let (mut steps, mut entries) = (Vec::new(), Vec::new());
        // What is not wanted any more is put back.
        let wanted = |path: &Path| targets.iter().any(|target| target.path == path);
        let left: Vec<_> = self.record.files.iter().filter(|entry| !wanted(&entry.path)).collect();
        for entry in left {
            steps.extend(self.step(&entry.path, self.read(&entry.path)?)?);
        }
        for Target { path, text } in targets {
            let before = self.read(&path)?;
            steps.extend(self.step(&path, Some(text.clone()))?);
            // A file that says it all without us is none of ours.
            if before.as_ref() != Some(&text) {
                entries.push(Entry { path, before, after: text });
            }
        }
        Ok((steps, self.record.with(entries)))
    }

    fn step(&self, path: &Path, then: Option<String>) -> anyhow::Result<Option<Step>> {
        let now = self.root.read(path)?;
        Ok((now != then).then(|| Step { path: path.to_owned(), now, then }))
    }
}

fn backup(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(BACKUP);
    name.into()
}

/// The steps as a unified difference.
fn diff(root: &Root, steps: &[Step], coloured: bool) -> anyhow::Result<String> {
    let mut text = String::new();
    let paint = |colour: &'static str| if coloured { colour } else { "" };
    let reset = paint("\x1b[0m");
    for Step { path, now, then } in steps {
        let shown = root.shown(path).display().to_string();
        let side = |text: &Option<String>| if text.is_some() { shown.clone() } else { "/dev/null".to_owned() };
        writeln!(text, "{}--- {}\n+++ {}{reset}", paint("\x1b[1m"), side(now), side(then))?;
        let diff = TextDiff::from_lines(now.as_deref().unwrap_or_default(), then.as_deref().unwrap_or_default());
        for hunk in diff.unified_diff().context_radius(CONTEXT).iter_hunks() {
            writeln!(text, "{}{}{reset}", paint("\x1b[36m"), hunk.header())?;
            for change in hunk.iter_changes() {
                let colour = match change.tag() {
                    ChangeTag::Equal => "",
                    ChangeTag::Delete => paint("\x1b[31m"),
                    ChangeTag::Insert => paint("\x1b[32m"),
                };
                let end = if colour.is_empty() { "" } else { reset };
                writeln!(text, "{colour}{}{}{end}", change.tag(), change.value().trim_end_matches('\n'))?;
                if change.missing_newline() {
                    writeln!(text, "\\ No newline at end of file")?;
                }
            }
        }
    }
    Ok(text)
}

/// Asks on the terminal; an error unless the answer is yes.
fn confirm(steps: &[Step]) -> anyhow::Result<()> {
    ensure!(
        io::stdin().is_terminal(),
        "nothing was changed, as there is no terminal to ask on: --yes goes on without asking"
    );
    eprint!("{}? [y/N] ", asked(steps));
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).context("read the answer")?;
    ensure!(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"), "nothing was changed");
    Ok(())
}

/// What is asked: to write files, to remove them, or both.
fn asked(steps: &[Step]) -> String {
    let removed = steps.iter().filter(|step| step.then.is_none()).count();
    let what = match (steps.len() - removed, removed) {
        (_, 0) => "write",
        (0, _) => "remove",
        _ => "write and remove",
    };
    if let [_] = steps { format!("{what} this file") } else { format!("{what} these {} files", steps.len()) }
}

/// Carries the steps out.
fn write(root: &Root, name: &str, steps: &[Step], record: &Record, next: Record) -> anyhow::Result<()> {
    for Step { path, now, .. } in steps {
        ensure!(root.read(path)? == *now, "{} was changed meanwhile: run this again", root.shown(path).display());
    }
    // The first text of each file is kept beside it, for people.
    let fresh = next.files.iter().filter(|entry| record.entry(&entry.path).is_none());
    let fresh: Vec<_> = fresh.filter_map(|entry| Some((&entry.path, entry.before.as_ref()?))).collect();
    for (path, before) in &fresh {
        let there = root.read(&backup(path))?;
        ensure!(
            there.is_none_or(|there| there == **before),
            "{} is there from an earlier time: move it away first",
            root.shown(&backup(path)).display()
        );
    }
    for (path, before) in fresh {
        root.copy_of(&backup(path), before, path)?;
    }
    // Until all is written, the record knows of all that may have been.
    let gone = record.files.iter().filter(|entry| next.entry(&entry.path).is_none());
    let mut both = next.with([next.files.clone(), gone.cloned().collect()].concat());
    both.save(root, name)?;
    for Step { path, then, .. } in steps {
        match then {
            Some(text) => root.write(path, text, Access::Kept)?,
            None => root.remove(path)?,
        }
    }
    for entry in record.files.iter().filter(|entry| next.entry(&entry.path).is_none()) {
        let kept = backup(&entry.path);
        let there = root.read(&kept)?;
        if there.is_some() && there == root.read(&entry.path)? {
            root.remove(&kept)?;
        } else if there.is_some() {
            eprintln!("note: {} stays: it is not what was put back", root.shown(&kept).display());
        }
    }
    Ok(both.with(next.files).settle(root, name)?)
}

#[cfg(test)]
mod tests;
