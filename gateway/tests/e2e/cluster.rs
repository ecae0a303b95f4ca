//! Shoal itself, started as a user starts it.

use crate::{
    ports,
    tools::{run, terminate, wait_for},
};
use anyhow::{Context, Result, ensure};
use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// Longest wait for a role to answer its readiness check.
const READY: Duration = Duration::from_secs(60);

/// The binary under test: the release build where `SHOAL_BIN` names one.
pub(crate) fn shoal() -> PathBuf {
    std::env::var_os("SHOAL_BIN").map_or_else(|| env!("CARGO_BIN_EXE_shoal").into(), PathBuf::from)
}

/// A running `shoal`; SIGTERM at the end of the test.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    pub(crate) fn start(log: PathBuf, args: &[&str]) -> Result<Self> {
        let out = File::options().create(true).append(true).open(&log)?;
        let child = Command::new(shoal())
            .args(args)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .context("start shoal")?;
        Ok(Self { child, log })
    }

    /// As the kernel's OOM killer would.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// As an operator would; an error where it does not end by itself, and cleanly.
    pub(crate) fn stop(mut self) -> Result<()> {
        run("kill", &["-TERM", &self.child.id().to_string()])?;
        wait_for("shoal to end after SIGTERM", Duration::from_secs(30), || {
            matches!(self.child.try_wait(), Ok(Some(_)))
        })?;
        let status = self.child.wait()?;
        ensure!(status.success(), "shoal ended with {status}\n{}", self.said());
        Ok(())
    }

    /// Its log so far.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Until `url` answers 200.
    pub(crate) fn ready(&mut self, url: &str) -> Result<()> {
        let mut dead = false;
        let answered = wait_for(url, READY, || {
            dead = !self.running();
            dead || run("curl", &["-sfk", "-o", "/dev/null", url]).is_ok()
        });
        ensure!(!dead, "shoal ended at its start:\n{}", self.said());
        answered.with_context(|| self.said())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        terminate(&mut self.child, Duration::from_secs(10));
        if std::thread::panicking() {
            eprintln!("---- {}\n{}", self.log.display(), self.said());
        }
    }
}

/// The ports of `shoal dev` with three agents, from its base.
const DEV_PORTS: [u16; 16] = [0, 1, 2, 3, 4, 11, 12, 1000, 1001, 1002, 2000, 2001, 2002, 3000, 3001, 3002];

/// `shoal dev` on ports of its own.
pub(crate) struct Dev {
    pub(crate) process: Process,
    pub(crate) base: u16,
}

impl Dev {
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        Self::at(dir, ports::free(&DEV_PORTS)?)
    }

    /// On the ports from `base`: as after a restart.
    pub(crate) fn at(dir: &Path, base: u16) -> Result<Self> {
        let (data, port) = (dir.join("data").display().to_string(), base.to_string());
        let mut process = Process::start(dir.join("dev.log"), &["dev", "--data-dir", &data, "--base-port", &port])?;
        for port in [base, base + 2, base + 12, base + 3, base + 4, base + 1000, base + 2000, base + 3000] {
            process.ready(&format!("http://127.0.0.1:{port}/readiness"))?;
        }
        Ok(Self { process, base })
    }

    /// `host:port` of the proxy's registry.
    pub(crate) fn proxy(&self) -> String {
        format!("127.0.0.1:{}", self.base)
    }

    /// `host:port` of an agent's registry, 0 to 2.
    pub(crate) fn agent(&self, k: u16) -> String {
        format!("127.0.0.1:{}", self.base + 1000 * (k + 1))
    }

    /// `host:port` of an agent's blob API.
    pub(crate) fn agent_api(&self, k: u16) -> String {
        format!("127.0.0.1:{}", self.base + 1000 * (k + 1) + 2)
    }

    /// `host:port` of an origin's blob API, 0 or 1.
    pub(crate) fn origin(&self, k: u16) -> String {
        format!("127.0.0.1:{}", self.base + 2 + 10 * k)
    }
}

/// The value of a metric, summed over its series.
pub(crate) fn metric(host: &str, name: &str) -> Result<f64> {
    let page = run("curl", &["-sf", &format!("http://{host}/metrics")])?;
    let of_name = |line: &&str| line.starts_with(name) && line[name.len()..].starts_with([' ', '{']);
    let values = page.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    let values: Vec<f64> = values.collect();
    ensure!(!values.is_empty(), "no metric {name} at {host}:\n{page}");
    Ok(values.iter().sum())
}

/// Every role a process of its own, configured by files, as on a real cluster.
pub(crate) struct Cluster {
    dir: PathBuf,
    pub(crate) origins: Vec<Member>,
    pub(crate) agents: Vec<Member>,
    pub(crate) tracker: Member,
    pub(crate) index: Member,
    pub(crate) proxy: Member,
}

/// What some roles have in their configurations besides.
pub(crate) struct More<'a> {
    /// A role and its text, in which `PROXY` stands for the proxy's `host:port`.
    pub(crate) texts: &'a [(&'a str, &'a str)],
    /// What their listeners speak with it.
    pub(crate) scheme: &'static str,
}

impl More<'_> {
    fn of(&self, role: &str) -> Option<&str> {
        self.texts.iter().find(|(one, _)| *one == role).map(|(_, text)| *text)
    }
}

/// One process of a [`Cluster`].
pub(crate) struct Member {
    role: &'static str,
    scheme: &'static str,
    name: String,
    /// `host:port` of the listener that answers health checks: the registry of proxies and agents, the API of the others.
    pub(crate) addr: String,
    /// `host:port` of the blob API, where the role has one.
    pub(crate) api: String,
    /// None while it is killed.
    process: Option<Process>,
}

impl Cluster {
    /// Two origins, a tracker, an index, a proxy and `agents` agents.
    pub(crate) fn start(dir: &Path, agents: usize) -> Result<Self> {
        Self::start_with(dir, agents, &More { texts: &[], scheme: "http" })
    }

    /// The same, with more in some roles' configurations.
    pub(crate) fn start_with(dir: &Path, agents: usize, more: &More<'_>) -> Result<Self> {
        let local = || Ok::<_, anyhow::Error>(format!("127.0.0.1:{}", ports::free(&[0])?));
        let origins = [local()?, local()?];
        let (tracker, index, proxy) = (local()?, local()?, local()?);
        let root = dir.join("backend").display().to_string();
        let cluster = format!(
            "[cluster]\norigins = {origins:?}\ntrackers = [{tracker:?}]\nindexes = [{index:?}]\nreplicas = 2\n"
        );
        let backends = format!("[[backends]]\nstore = {{ kind = \"fs\", root = {root:?} }}\n");
        let more_of = |role| more.of(role).unwrap_or_default().replace("PROXY", &proxy);
        let member = |role, name: &str, addr: &str, api: &str| Member {
            role,
            scheme: if more.of(role).is_some() { more.scheme } else { "http" },
            name: name.to_owned(),
            addr: addr.to_owned(),
            api: api.to_owned(),
            process: None,
        };
        let mut this = Self {
            dir: dir.to_owned(),
            origins: Vec::new(),
            agents: Vec::new(),
            tracker: member("tracker", "tracker", &tracker, &tracker),
            index: member("index", "index", &index, &index),
            proxy: member("proxy", "proxy", &proxy, &proxy),
        };
        for (k, addr) in origins.iter().enumerate() {
            let name = format!("origin{k}");
            let peer = local()?;
            let own = cluster.replace("[cluster]", &format!("[cluster]\nthis = {addr:?}"));
            let data = dir.join(&name).display().to_string();
            let text = format!(
                "data_dir = {data:?}\n[listen]\napi = {addr:?}\n[peer]\nlisten = {peer:?}\n{own}{}{backends}",
                more_of("origin")
            );
            std::fs::write(dir.join(format!("{name}.toml")), text)?;
            this.origins.push(member("origin", &name, addr, addr));
        }
        let data = dir.join("index").display().to_string();
        let text = format!("data_dir = {data:?}\n[listen]\napi = {index:?}\n{cluster}{}{backends}", more_of("index"));
        std::fs::write(dir.join("index.toml"), text)?;
        std::fs::write(
            dir.join("tracker.toml"),
            format!("[listen]\napi = {tracker:?}\n{cluster}{}", more_of("tracker")),
        )?;
        std::fs::write(
            dir.join("proxy.toml"),
            format!("[listen]\nregistry = {proxy:?}\n{cluster}{}", more_of("proxy")),
        )?;
        for k in 0..agents {
            let name = format!("agent{k}");
            let (registry, api, peer) = (local()?, local()?, local()?);
            let data = dir.join(&name).display().to_string();
            let text = format!(
                "data_dir = {data:?}\n[listen]\nregistry = {registry:?}\napi = {api:?}\n[peer]\nlisten = {peer:?}\n{cluster}{}",
                more_of("agent")
            );
            std::fs::write(dir.join(format!("{name}.toml")), text)?;
            this.agents.push(member("agent", &name, &registry, &api));
        }
        let dir = this.dir.clone();
        for member in this.members() {
            member.start(&dir)?;
        }
        for member in this.members() {
            member.ready()?;
        }
        Ok(this)
    }

    fn members(&mut self) -> impl Iterator<Item = &mut Member> {
        let others = [&mut self.tracker, &mut self.index, &mut self.proxy];
        self.origins.iter_mut().chain(others).chain(&mut self.agents)
    }

    /// Where configurations, data and logs are.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Member {
    /// Starts it, or starts it again.
    pub(crate) fn start(&mut self, dir: &Path) -> Result<()> {
        let config = dir.join(format!("{}.toml", self.name)).display().to_string();
        let log = dir.join(format!("{}.log", self.name));
        self.process = Some(Process::start(log, &[self.role, "--config", &config])?);
        Ok(())
    }

    /// Until it says it is ready.
    pub(crate) fn ready(&mut self) -> Result<()> {
        let url = format!("{}://{}/readiness", self.scheme, self.addr);
        self.process.as_mut().context("not started")?.ready(&url)
    }

    /// Its process, while there is one.
    pub(crate) fn pid(&self) -> Result<u32> {
        Ok(self.process.as_ref().context("not started")?.child.id())
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.process.take().context("not started")?.kill()
    }
}
