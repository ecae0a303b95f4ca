//! Which files each runtime reads, and what they say already.

use super::{
    Containerd, Plan, Target, View,
    agent::Agent,
    config_toml::{self, CERTS_DIR},
    daemon, hosts,
    registries::{self, Mirrored},
};
use crate::config::Raw;
use anyhow::{Context as _, ensure};
use std::path::{Path, PathBuf};

/// The folder of all registries that have none of their own.
const DEFAULT: &str = "_default";
/// dockerd's configuration.
const DAEMON: &str = "/etc/docker/daemon.json";
/// The configuration of podman and its kin, and the folder of its drop-ins.
const REGISTRIES: (&str, &str) = ("/etc/containers/registries.conf", "/etc/containers/registries.conf.d");
/// What root's podman reads in the place of both, where it is there.
const ROOTS_OWN: &str = "/root/.config/containers/registries.conf";
/// The registry that dockerd asks mirrors for.
const HUB: &str = "docker.io";

/// `hosts.toml` for each registry, and `config.toml` where it names no folder for them.
pub(super) fn containerd(
    view: &View<'_>,
    options: &Containerd,
    agent: &Agent,
    mirrored: &[Mirrored],
    notes: Vec<String>,
) -> anyhow::Result<Plan> {
    let mut plan = Plan { targets: Vec::new(), notes };
    let roots = match &options.certs_dir {
        Some(dir) => vec![dir.clone()],
        None => {
            let (dirs, config) = certs_dirs(view, &options.containerd_config)?;
            plan.targets.extend(config);
            dirs
        }
    };
    let names = mirrored.iter().map(|one| one.name.as_str()).chain(options.default.then_some(DEFAULT));
    for name in names {
        let dir = folder(view, &roots, name)?;
        let path = dir.join("hosts.toml");
        if view.read(&path)?.is_none_or(|text| text.trim().is_empty()) {
            let files = view.root.names(&dir)?;
            let certificates = files.iter().any(|file| [".crt", ".cert", ".key"].iter().any(|end| file.ends_with(end)));
            ensure!(
                !certificates,
                "{} has certificates, which containerd reads only where there is no hosts.toml: write one there that names them \
                 (ca = [..], client = [..]), then run this again",
                view.root.shown(&dir).display()
            );
        }
        plan.targets.push(view.edited(&path, |text| hosts::edit(text, agent))?);
    }
    Ok(plan)
}

/// The folders of `hosts.toml` files, and the file that has to be changed to say so.
fn certs_dirs(view: &View<'_>, config: &Path) -> anyhow::Result<(Vec<PathBuf>, Option<Target>)> {
    let read = |path: &Path| -> anyhow::Result<config_toml::Facts> {
        let text = view.read(path)?;
        config_toml::read(text.as_deref()).with_context(|| view.root.shown(path).display().to_string())
    };
    let main = read(config)?;
    // Of several files that speak of the plugin the last one counts.
    let (mut last, mut at) = (main.certs_dirs, config.to_owned());
    for path in imported(view, config, &main.imports)? {
        let facts = read(&path)?;
        if facts.has_plugin {
            (last, at) = (facts.certs_dirs, path);
        }
    }
    if !last.is_empty() {
        return Ok((last.into_iter().map(PathBuf::from).collect(), None));
    }
    let target = view.edited(&at, config_toml::edit)?;
    Ok((vec![CERTS_DIR.into()], Some(target)))
}

/// The files that patterns name: paths, with one `*` in their last component at most, relative ones to the file itself.
fn imported(view: &View<'_>, config: &Path, patterns: &[String]) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for pattern in patterns {
        let whole = config.parent().unwrap_or(config).join(pattern);
        let (Some(dir), Some(last)) = (whole.parent(), whole.file_name().and_then(|name| name.to_str())) else {
            continue;
        };
        match last.split_once('*') {
            None => found.push(whole),
            Some((head, tail)) => {
                let fits =
                    |name: &String| name.len() >= last.len() - 1 && name.starts_with(head) && name.ends_with(tail);
                found.extend(view.root.names(dir)?.iter().filter(|name| fits(name)).map(|name| dir.join(name)));
            }
        }
    }
    Ok(found)
}

/// The folder where containerd finds a registry's file: the first that is there, else the first that it would look at.
fn folder(view: &View<'_>, roots: &[PathBuf], registry: &str) -> anyhow::Result<PathBuf> {
    let all: Vec<PathBuf> =
        roots.iter().flat_map(|root| hosts::folders(registry).into_iter().map(move |name| root.join(name))).collect();
    for dir in &all {
        if view.root.resolve(dir)?.is_dir() {
            return Ok(dir.clone());
        }
    }
    all.into_iter().next().context("no folder for hosts.toml files: name one with --certs-dir")
}

/// `daemon.json`.
pub(super) fn docker(view: &View<'_>, agent: &Agent, raw: Option<&Raw>) -> anyhow::Result<Plan> {
    let mut plan = Plan::default();
    if let Some(raw) = raw
        && raw.mirror.default_upstream.as_deref() != Some(HUB)
    {
        plan.notes.push(format!(
            "dockerd asks its mirrors for {HUB} alone, and without saying so: the agent needs [mirror] default_upstream = \"{HUB}\", \
             which its configuration does not have"
        ));
    }
    let insecure = (!agent.tls && !agent.is_loopback()).then(|| agent.addr.as_str());
    plan.targets.push(view.edited(Path::new(DAEMON), |text| daemon::edit(text, &agent.url(), insecure))?);
    plan.targets.extend(authority(view, agent, "/etc/docker/certs.d")?);
    Ok(plan)
}

/// The drop-in of `registries.conf`.
pub(super) fn containers(
    view: &View<'_>,
    agent: &Agent,
    mirrored: &[Mirrored],
    notes: Vec<String>,
) -> anyhow::Result<Plan> {
    let mut plan = Plan { targets: Vec::new(), notes };
    let (main, dir) = (Path::new(REGISTRIES.0), Path::new(REGISTRIES.1));
    let ours = dir.join(registries::NAME);
    let names = view.root.names(dir)?;
    let drop_ins = names.iter().filter(|name| name.ends_with(".conf") && *name != registries::NAME);
    let files = std::iter::once(main.to_owned()).chain(drop_ins.map(|name| dir.join(name)));
    let mut before = Vec::new();
    for path in files {
        let Some(text) = view.read(&path)? else { continue };
        let shown = view.root.shown(&path).display().to_string();
        let entries = registries::entries(&text).with_context(|| shown.clone())?;
        for (prefix, entry) in entries {
            if mirrored.iter().all(|one| one.name != prefix) {
                continue;
            }
            if path != main && path > ours {
                plan.notes
                    .push(format!("{shown} has an entry for {prefix} that stands over this one: take it out there"));
            } else {
                plan.notes.push(format!(
                    "the entry for {prefix} in {shown} is taken over; later changes there have no effect"
                ));
                before.push((prefix, entry));
            }
        }
    }
    if view.root.resolve(Path::new(ROOTS_OWN))?.exists() {
        plan.notes
            .push(format!("{ROOTS_OWN} is there: podman run by root reads it in the place of all of {}", REGISTRIES.1));
    }
    if view.read(&ours)?.is_some() {
        let shown = view.root.shown(&ours).display().to_string();
        plan.notes.push(format!("{shown} is there and was not written by setup: all of it is replaced"));
    }
    plan.targets.push(view.edited(&ours, |_| registries::drop_in(mirrored, agent, &before))?);
    plan.targets.extend(authority(view, agent, "/etc/containers/certs.d")?);
    Ok(plan)
}

/// The agent's authorities where docker and podman look for those of one registry.
fn authority(view: &View<'_>, agent: &Agent, certs_dir: &str) -> anyhow::Result<Option<Target>> {
    let Some(ca) = &agent.ca else { return Ok(None) };
    let text = view.root.read(ca)?.with_context(|| format!("{}: not there", view.root.shown(ca).display()))?;
    Ok(Some(Target { path: Path::new(certs_dir).join(agent.addr.as_str()).join("ca.crt"), text }))
}
