//! A cluster that mirrors another registry, which asks for names and goes away.

use crate::{
    access::HTPASSWD,
    clients::pull_and_compare,
    cluster::{Cluster, More},
    image::Image,
    tools::{Podman, run},
};
use anyhow::{Result, ensure};
use std::fs;

const RULES: &str = "[[access.rules]]\nrepository = \".*\"\nusers = [\"ann\"]\nactions = [\"pull\", \"push\"]\n";

/// The name by which the cluster knows its upstream.
pub(crate) const UPSTREAM: &str = "up.example";

/// A cluster that mirrors another one, which asks for names, by `ns`, by prefix and by default.
pub(crate) struct Mirrored {
    pub(crate) upstream: Cluster,
    pub(crate) cluster: Cluster,
    /// What the upstream has as `lib/app:1`.
    pub(crate) image: Image,
    pub(crate) dir: tempfile::TempDir,
}

/// Starts both, the mirroring one with some agents.
pub(crate) fn mirrored(agents: usize) -> Result<Mirrored> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[3 << 20, 1000], 31)?;
    let (names, password) = (dir.path().join("htpasswd"), dir.path().join("password"));
    fs::write(&names, HTPASSWD)?;
    fs::write(&password, "secret\n")?;
    let there = dir.path().join("there");
    fs::create_dir(&there)?;
    let text = format!("[access]\nhtpasswd = {names:?}\n{RULES}");
    let more = More { texts: &[("proxy", &text)], scheme: "http" };
    let upstream = Cluster::start_with(&there, 0, &more)?;
    let to = format!("docker://{}/lib/app:1", upstream.proxy.addr);
    run(
        "skopeo",
        &[
            "copy",
            "-q",
            "--preserve-digests",
            "--dest-tls-verify=false",
            "--dest-creds",
            "ann:secret",
            &image.oci(),
            &to,
        ],
    )?;

    let here = dir.path().join("here");
    fs::create_dir(&here)?;
    let text = format!(
        "[mirror]\ndefault_upstream = {UPSTREAM:?}\n[[upstreams]]\nname = {UPSTREAM:?}\nurls = [\"http://{}\"]\n\
         credentials = {{ kind = \"basic\", username = \"ann\", password_file = {password:?} }}\n",
        upstream.proxy.addr
    );
    let more = More { texts: &["proxy", "agent", "index", "origin"].map(|role| (role, text.as_str())), scheme: "http" };
    let cluster = Cluster::start_with(&here, agents, &more)?;
    Ok(Mirrored { upstream, cluster, image, dir })
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn a_registry_with_names_is_mirrored_under_all_its_names_and_outlived() -> Result<()> {
    let Mirrored { mut upstream, cluster, image, dir } = mirrored(2)?;
    let (first, second) = (&cluster.agents[0].addr, &cluster.agents[1].addr);
    let code = |url: &str| run("curl", &["-s", "-o", "/dev/null", "-w", "%{http_code}", url]);

    // As podman, CRI-O and buildah name it; as dockerd does.
    pull_and_compare(&format!("{first}/up.example/lib/app:1"), &image, &dir.path().join("pulled"))?;
    pull_and_compare(&format!("{first}/lib/app:1"), &image, &dir.path().join("pulled"))?;
    // As containerd does.
    for (query, expected) in [("?ns=up.example", "200"), ("?ns=evil.example", "404"), ("", "200")] {
        let got = code(&format!("http://{first}/v2/lib/app/manifests/1{query}"))?;
        ensure!(got == expected, "{query} answered {got}");
    }
    let podman = Podman::new(dir.path());
    podman.podman(&["pull", "-q", "--tls-verify=false", &format!("{first}/up.example/lib/app:1")])?;

    // With the upstream gone, an agent that has none of it serves it.
    upstream.proxy.kill()?;
    pull_and_compare(&format!("{second}/up.example/lib/app:1"), &image, &dir.path().join("pulled"))?;
    let got = code(&format!("http://{second}/v2/lib/none/manifests/1?ns=up.example"))?;
    ensure!(got == "503", "an upstream that is gone knows of what it was never asked for: {got}");
    Ok(())
}
