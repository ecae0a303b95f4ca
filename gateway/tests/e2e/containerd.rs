//! containerd 2.4 and its `ctr`: the transfer service, its parallel ranges, mirrors named in hosts.toml.

use crate::{
    access::{Named, named, named_by_tokens},
    clients::push,
    cluster::{Cluster, Dev, Member, metric},
    cut::Cutter,
    image::Image,
    mirror::{Mirrored, UPSTREAM, mirrored},
    tools::{refused, run, terminate, tool, wait_for},
};
use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

const MIB: u64 = 1 << 20;

/// How its transfer service fetches a layer.
#[derive(Clone, Copy)]
pub(crate) enum Fetch {
    /// By one request, and one more after each break.
    Whole,
    /// By open-ended ranges, four at once, each of which is dropped after its 4 MiB.
    Ranges,
}

impl Fetch {
    const fn config(self) -> &'static str {
        match self {
            Self::Whole => "max_concurrent_downloads = 3",
            Self::Ranges => "max_concurrent_downloads = 4\nconcurrent_layer_fetch_buffer = 4194304",
        }
    }
}

/// A containerd of the test's own: nothing of it is outside one folder, and it runs no containers.
pub(crate) struct Containerd {
    daemon: Child,
    socket: String,
    dir: PathBuf,
}

impl Containerd {
    pub(crate) fn start(dir: &Path, fetch: Fetch) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let at = |name: &str| dir.join(name).display().to_string();
        let (root, state, socket, rpc, opt) = (at("root"), at("state"), at("ctd.sock"), at("ctd.ttrpc"), at("opt"));
        let config = format!(
            "version = 3\nroot = {root:?}\nstate = {state:?}\n\
             disabled_plugins = [\"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\", \
             \"io.containerd.grpc.v1.cri\", \"io.containerd.nri.v1.nri\"]\n\
             [grpc]\naddress = {socket:?}\n[ttrpc]\naddress = {rpc:?}\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = {opt:?}\n\
             [plugins.\"io.containerd.transfer.v1.local\"]\n{}\n",
            fetch.config()
        );
        fs::write(dir.join("config.toml"), config)?;
        let log = File::create(dir.join("containerd.log"))?;
        let daemon = Command::new(tool("containerd")?)
            .args(["--config", &at("config.toml")])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start containerd")?;
        let this = Self { daemon, socket, dir: dir.to_owned() };
        wait_for("containerd", Duration::from_secs(60), || this.ctr(&["version"]).is_ok())
            .with_context(|| this.said())?;
        Ok(this)
    }

    fn ctr(&self, args: &[&str]) -> Result<String> {
        run(&tool("ctr")?, &[&["-a", &self.socket], args].concat())
    }

    pub(crate) fn pull(&self, from: &str, more: &[&str]) -> Result<()> {
        self.ctr(&[&["images", "pull"], more, &[from]].concat()).with_context(|| self.said())?;
        Ok(())
    }

    /// Where it keeps blobs, in the shape of an OCI layout.
    pub(crate) fn content(&self) -> PathBuf {
        self.dir.join("root/io.containerd.content.v1.content")
    }

    fn said(&self) -> String {
        fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        terminate(&mut self.daemon, Duration::from_secs(20));
    }
}

/// What an agent holds that a download might leave behind.
#[derive(Debug)]
struct Held {
    downloads: f64,
    requests: f64,
    partial_blobs: f64,
    buffers: f64,
    /// Without those of whole blobs, which stay open to be served, up to a bound of the store's.
    descriptors: f64,
}

impl Held {
    fn by(agent: &Member) -> Result<Self> {
        let of = |name| metric(&agent.api, name);
        let open = fs::read_dir(format!("/proc/{}/fd", agent.pid()?))?.count();
        Ok(Self {
            downloads: of("shoal_downloads_active")?,
            requests: of("shoal_http_requests_active")?,
            partial_blobs: of("shoal_store_partial_blobs")?,
            buffers: of("shoal_buffers_lent_bytes")?,
            descriptors: f64::from(u32::try_from(open)?) - of("shoal_store_open_blobs")?,
        })
    }

    fn no_more_than(&self, before: &Self) -> bool {
        self.downloads <= before.downloads
            && self.requests <= before.requests
            && self.partial_blobs <= before.partial_blobs
            && self.buffers <= before.buffers
            && self.descriptors <= before.descriptors
    }
}

/// Bytes that the origins have sent: to peers, and in answers to those that peers could not serve in time.
fn sent(cluster: &Cluster) -> Result<f64> {
    let names = ["shoal_peer_sent_bytes_total", "shoal_http_response_bytes_total"];
    let of = |origin: &Member| names.iter().map(|name| metric(&origin.api, name)).sum::<Result<f64>>();
    cluster.origins.iter().map(of).sum()
}

/// Four ranges at once, each given up after 4 MiB of what may be the rest of the blob, on a blob that is not there yet.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn containerd_pulls_by_parallel_ranges_and_they_cost_one_blob() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let small = Image::make(&dir.path().join("small"), &[5 * MIB, 1000], 51)?;
    let big = Image::make(&dir.path().join("big"), &[150 * MIB + 3, 30 * MIB], 52)?;
    let cluster = Cluster::start(dir.path(), 1)?;
    push(&small, &format!("{}/lib/app:small", cluster.proxy.addr))?;
    push(&big, &format!("{}/lib/app:big", cluster.proxy.addr))?;
    let agent = &cluster.agents[0];
    let from = |tag| format!("{}/lib/app:{tag}", agent.addr);

    // The first pull makes the connections to peers and services that stay.
    let containerd = Containerd::start(&dir.path().join("first"), Fetch::Ranges)?;
    containerd.pull(&from("small"), &["--plain-http"])?;
    small.compare(&containerd.content())?;
    drop(containerd);
    let (held, before) = (Held::by(agent)?, sent(&cluster)?);

    let containerd = Containerd::start(&dir.path().join("second"), Fetch::Ranges)?;
    containerd.pull(&from("big"), &["--plain-http"])?;
    big.compare(&containerd.content())?;
    let requests = metric(&agent.api, "shoal_http_requests_total")?;
    ensure!(requests > 40.0, "{requests} requests for 180 MiB: these were no ranges of 4 MiB");
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let copies = (sent(&cluster)? - before) / big.size() as f64;
    println!("the origins sent {copies:.3} of the image, in {requests} requests");
    ensure!((0.99..=1.1).contains(&copies), "the origins sent {copies:.3} of the image");
    drop(containerd);

    let mut now = Held::by(agent)?;
    let back = wait_for("the agent to let go of everything", Duration::from_secs(30), || {
        if let Ok(held) = Held::by(agent) {
            now = held;
        }
        now.no_more_than(&held)
    });
    back.with_context(|| format!("before {held:?}, now {now:?}"))
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn containerd_mirrors_by_hosts_toml_and_outlives_the_upstream() -> Result<()> {
    let Mirrored { mut upstream, cluster, image, dir } = mirrored(2)?;
    let hosts = dir.path().join("certs.d");
    let (first, second) = (&cluster.agents[0].addr, &cluster.agents[1].addr);
    let reference = format!("{UPSTREAM}/lib/app:1");
    // With the agent as the last host too, it is the agent or nobody.
    let through = |agent: &str| -> Result<String> {
        let of_upstream = hosts.join(UPSTREAM);
        fs::create_dir_all(&of_upstream)?;
        let text =
            format!("server = \"http://{agent}\"\n[host.\"http://{agent}\"]\ncapabilities = [\"pull\", \"resolve\"]\n");
        fs::write(of_upstream.join("hosts.toml"), text)?;
        Ok(hosts.display().to_string())
    };
    for fetch in [Fetch::Whole, Fetch::Ranges] {
        let into = tempfile::tempdir()?;
        let containerd = Containerd::start(into.path(), fetch)?;
        containerd.pull(&reference, &["--hosts-dir", &through(first)?])?;
        image.compare(&containerd.content())?;
    }
    upstream.proxy.kill()?;
    let into = tempfile::tempdir()?;
    let containerd = Containerd::start(into.path(), Fetch::Whole)?;
    containerd.pull(&reference, &["--hosts-dir", &through(second)?])?;
    image.compare(&containerd.content())
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn containerd_pushes_and_pulls_by_name() -> Result<()> {
    push_and_pull(&named("http")?)
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn containerd_pushes_and_pulls_by_token() -> Result<()> {
    push_and_pull(&named_by_tokens()?)
}

fn push_and_pull(Named { cluster, image, dir }: &Named) -> Result<()> {
    let containerd = Containerd::start(&dir.path().join("first"), Fetch::Whole)?;
    let there = format!("{}/lib/app:1", cluster.proxy.addr);
    let archive = dir.path().join("image.tar").display().to_string();
    run("tar", &["-C", &image.dir.display().to_string(), "-cf", &archive, "."])?;
    containerd.ctr(&["images", "import", "--index-name", &there, &archive])?;
    containerd.ctr(&["images", "list", "-q"])?;
    let push = |more: &[&str]| containerd.ctr(&[&["images", "push", "--plain-http"], more, &[&there]].concat());
    for stranger in [&[][..], &["-u", "bob:pw"], &["-u", "ann:wrong"]] {
        refused(push(stranger), &format!("a push as {stranger:?}"))?;
    }
    push(&["-u", "ann:secret"])?;
    drop(containerd);

    let here = format!("{}/lib/app:1", cluster.agents[0].addr);
    for fetch in [Fetch::Whole, Fetch::Ranges] {
        let into = tempfile::tempdir()?;
        let containerd = Containerd::start(into.path(), fetch)?;
        for stranger in [&["--plain-http"][..], &["--plain-http", "-u", "bob:wrong"]] {
            refused(containerd.pull(&here, stranger), &format!("a pull as {stranger:?}"))?;
        }
        containerd.pull(&here, &["--plain-http", "-u", "bob:pw"])?;
        image.compare(&containerd.content())?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn containerd_goes_on_where_its_connections_were_cut() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[60 * MIB], 53)?;
    let dev = Dev::start(dir.path())?;
    push(&image, &format!("{}/lib/app:1", dev.proxy()))?;
    // From the proxy, and through agents while the blob arrives.
    for (k, host) in [dev.proxy(), dev.agent(0)].into_iter().enumerate() {
        let cutter = Cutter::start(&host, 13 * MIB, 3)?;
        let containerd = Containerd::start(&dir.path().join(k.to_string()), Fetch::Whole)?;
        containerd.pull(&format!("{}/lib/app:1", cutter.addr()), &["--plain-http"])?;
        image.compare(&containerd.content())?;
        cutter.check(&image)?;
    }
    dev.process.stop()
}
