//! Programs the tests run: the clients of real users.

use anyhow::{Context, Result, bail, ensure};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Runs a command to its end; its output, or an error with everything it said.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<String> {
    run_with(&[], program, args)
}

/// The same with more in its environment.
pub(crate) fn run_with(env: &[(&str, &str)], program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).envs(env.iter().copied()).stdin(Stdio::null());
    let out = command.output().with_context(|| format!("run {program}"))?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(
        out.status.success(),
        "{program} {}: {}\n{said}{}",
        args.join(" "),
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(said)
}

/// A client that `ci/test` builds or installs: where it put it.
pub(crate) fn tool(name: &str) -> Result<String> {
    let folder = std::env::var_os("SHOAL_TOOLS").context("SHOAL_TOOLS names no folder of clients: run ci/test")?;
    let path = PathBuf::from(folder).join(name);
    ensure!(path.exists(), "no {}: run ci/test", path.display());
    Ok(path.display().to_string())
}

/// An error unless a client failed because of who it said it was.
pub(crate) fn refused<T>(outcome: Result<T>, what: &str) -> Result<()> {
    let Err(error) = outcome else { bail!("{what} was not refused") };
    let said = format!("{error:#}").to_lowercase();
    // In the words of all these clients, some of which find by themselves that they have no name to give.
    let known = [
        "401",
        "403",
        "unauthorized",
        "not authorized",
        "denied",
        "no basic auth",
        "credential not found",
        "authentication required",
        "invalid username",
    ];
    ensure!(known.iter().any(|word| said.contains(word)), "{what} failed, but was not refused: {said}");
    Ok(())
}

/// Asks `done` again and again until it says yes; an error after `limit`.
pub(crate) fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) -> Result<()> {
    let started = Instant::now();
    while !done() {
        ensure!(started.elapsed() < limit, "waited {limit:?} for {what}");
        std::thread::yield_now();
        std::thread::park_timeout(Duration::from_millis(20));
    }
    Ok(())
}

/// A Docker engine of the test's own: no bridge, no rules, everything below one folder.
pub(crate) struct Docker {
    engine: Child,
    host: String,
    config: String,
}

impl Docker {
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        Self::start_with(dir, &[])
    }

    /// The same, with more arguments.
    pub(crate) fn start_with(dir: &Path, more: &[&str]) -> Result<Self> {
        let at = |name: &str| dir.join(name).display().to_string();
        let host = format!("unix://{}", at("docker.sock"));
        let log = std::fs::File::create(dir.join("dockerd.log"))?;
        let engine = Command::new("dockerd")
            .args(["--data-root", &at("root"), "--exec-root", &at("exec"), "-H", &host, "--pidfile", &at("pid")])
            .args(["--bridge=none", "--iptables=false"])
            .args(more)
            .args(["--containerd-namespace", "shoal-e2e", "--containerd-plugins-namespace", "shoal-e2e-plugins"])
            .stdout(log.try_clone()?)
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .context("start dockerd: install docker.io and run as root")?;
        let docker = Self { engine, host, config: at("client") };
        wait_for("dockerd", Duration::from_secs(60), || docker.run(&["info"]).is_ok())?;
        Ok(docker)
    }

    pub(crate) fn run(&self, args: &[&str]) -> Result<String> {
        // Debian's client: a newer one in front of it on the PATH may refuse its engine's API version.
        let client = if Path::new("/usr/bin/docker").exists() { "/usr/bin/docker" } else { "docker" };
        // Who is logged in where is the test's own as well.
        run(client, &[&["--config", &self.config, "-H", &self.host], args].concat())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        terminate(&mut self.engine, Duration::from_secs(20));
    }
}

/// SIGTERM, then SIGKILL after `grace`.
pub(crate) fn terminate(child: &mut Child, grace: Duration) {
    let pid = child.id().to_string();
    if run("kill", &["-TERM", &pid]).is_ok() {
        let ended = wait_for("the process to end", grace, || matches!(child.try_wait(), Ok(Some(_))));
        if ended.is_ok() {
            return;
        }
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// The podman of a test: storage of its own below `dir`, no registry configuration of the machine.
pub(crate) struct Podman {
    root: PathBuf,
    run_root: PathBuf,
}

impl Podman {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { root: dir.join("containers"), run_root: dir.join("containers-run") }
    }

    /// `podman ARGS`.
    pub(crate) fn podman(&self, args: &[&str]) -> Result<String> {
        self.with("podman", args)
    }

    /// `buildah ARGS` on the same storage.
    pub(crate) fn buildah(&self, args: &[&str]) -> Result<String> {
        self.with("buildah", args)
    }

    /// Either, with a home whose configuration is read.
    pub(crate) fn at_home(&self, home: &str, program: &str, args: &[&str]) -> Result<String> {
        self.with_env(&[("HOME", home)], program, args)
    }

    fn with(&self, program: &str, args: &[&str]) -> Result<String> {
        self.with_env(&[], program, args)
    }

    fn with_env(&self, env: &[(&str, &str)], program: &str, args: &[&str]) -> Result<String> {
        let (root, run_root) = (self.root.display().to_string(), self.run_root.display().to_string());
        // Who is logged in where is the test's own as well.
        let names = self.root.with_extension("auth.json");
        if !names.exists() {
            std::fs::create_dir_all(names.parent().context("no folder")?)?;
            std::fs::write(&names, "{}")?;
        }
        let names = names.display().to_string();
        run_with(
            &[&[("REGISTRY_AUTH_FILE", names.as_str())], env].concat(),
            program,
            &[&["--root", &root, "--runroot", &run_root, "--storage-driver", "vfs"], args].concat(),
        )
    }
}
