//! `shoal setup`: what it writes, as real runtimes read it.

use crate::{
    cluster::shoal,
    containerd::{Containerd, Fetch},
    image::blob,
    mirror::{Mirrored, UPSTREAM, mirrored},
    tools::{Docker, Podman, run_with},
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

/// Runs `shoal setup ARGS --root ROOT`: its exit code, and what it said on both streams.
fn setup(root: &Path, args: &[&str]) -> Result<(i32, String)> {
    let mut command = Command::new(shoal());
    command.arg("setup").args(args).arg("--root").arg(root).stdin(Stdio::null());
    let out = command.output().context("run shoal")?;
    let said = [out.stdout, out.stderr].concat();
    Ok((out.status.code().context("shoal was killed")?, String::from_utf8(said)?))
}

#[test]
fn the_command_shows_writes_and_takes_back() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (root, daemon) = (dir.path(), dir.path().join("etc/docker/daemon.json"));
    fs::create_dir_all(root.join("etc/docker"))?;
    let before = "{\n  \"live-restore\": true\n}\n";
    fs::write(&daemon, before)?;
    let step = |args: &[&str], code: i32, says: &str, file: &str| -> Result<()> {
        let (got, said) = setup(root, args)?;
        ensure!(got == code && said.contains(says), "{args:?} ended with {got}: {said}");
        let text = fs::read_to_string(&daemon)?;
        ensure!(text == file, "{args:?} left {text}");
        Ok(())
    };
    let line = "  \"registry-mirrors\": [\"http://127.0.0.1:16000\"],\n";
    let after = before.replacen("{\n", &format!("{{\n{line}"), 1);
    step(&["docker", "--dry-run"], 0, &format!("+{line}"), before)?;
    step(&["docker"], 1, "--yes goes on without asking", before)?;
    step(&["docker", "--yes"], 0, "systemctl reload docker", &after)?;
    step(&["docker", "--yes"], 0, "nothing to change", &after)?;
    step(&["docker", "--undo", "--yes"], 0, &format!("-{line}"), before)?;
    step(&["docker", "--undo", "--yes"], 0, "nothing to undo", before)?;
    step(&["podman", "--yes"], 1, "name one with --upstream", before)?;
    fs::write(&daemon, "{,}")?;
    step(&["docker", "--yes"], 1, "daemon.json: is not a JSON object", "{,}")?;
    let left: Vec<_> = fs::read_dir(root.join("etc"))?.collect();
    ensure!(left.len() == 1, "more is left than was there: {left:?}");
    Ok(())
}

/// The upstream's name leads nowhere here, and neither does docker.io: what is pulled came through the agent.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn runtimes_pull_by_what_setup_wrote() -> Result<()> {
    let Mirrored { upstream: _upstream, cluster, image, dir } = mirrored(1)?;
    let (root, agent) = (dir.path().join("host"), &cluster.agents[0].addr);
    for runtime in ["containerd", "docker", "podman", "crio"] {
        let upstream = if runtime == "docker" { &[][..] } else { &["--upstream", UPSTREAM] };
        let (code, said) = setup(&root, &[&[runtime, "--yes", "--agent", agent], upstream].concat())?;
        ensure!(code == 0, "{runtime}: {said}");
    }
    let reference = format!("{UPSTREAM}/lib/app:1");

    // What a user has of their own is read in the place of /etc/containers, and has the same form.
    let home = dir.path().join("home");
    fs::create_dir_all(home.join(".config"))?;
    std::os::unix::fs::symlink(root.join("etc/containers"), home.join(".config/containers"))?;
    fs::write(root.join("etc/containers/registries.conf"), "")?;
    let home = home.display().to_string();
    let into = dir.path().join("pulled");
    let to = format!("oci:{}:t", into.display());
    run_with(
        &[("HOME", &home)],
        "skopeo",
        &["copy", "-q", "--preserve-digests", &format!("docker://{reference}"), &to],
    )?;
    ensure!(fs::read(blob(&into, &image.manifest))? == fs::read(image.blob(&image.manifest))?, "manifest differs");
    let podman = Podman::new(dir.path());
    podman.at_home(&home, "podman", &["pull", "-q", &reference])?;
    podman.at_home(&home, "buildah", &["pull", "-q", "--policy", "always", &reference])?;

    let daemon = root.join("etc/docker/daemon.json").display().to_string();
    let docker = Docker::start_with(dir.path(), &["--config-file", &daemon])?;
    docker.run(&["pull", "-q", "lib/app:1"])?;
    let names = docker.run(&["image", "inspect", "-f", "{{.RepoTags}}", "lib/app:1"])?;
    ensure!(names.contains("lib/app:1"), "docker has {names}");

    let containerd = Containerd::start(&dir.path().join("containerd"), Fetch::Whole)?;
    let hosts = root.join("etc/containerd/certs.d").display().to_string();
    containerd.pull(&reference, &["--hosts-dir", &hosts])?;
    image.compare(&containerd.content())
}
