//! Ordinary use: every client pushes and pulls, blobs move without a registry, a restart keeps what was pushed.

use crate::{
    cluster::{Dev, metric, shoal},
    cut::Cutter,
    image::Image,
    tools::{Docker, Podman, run},
};
use anyhow::{Result, ensure};
use std::{fs, path::Path, thread};

const MIB: u64 = 1 << 20;

/// Copies an image into a folder with skopeo and compares every byte that arrived with what was pushed.
pub(crate) fn pull_and_compare(from: &str, image: &Image, into: &Path) -> Result<()> {
    let to = format!("oci:{}:t", into.display());
    run("skopeo", &["copy", "-q", "--preserve-digests", "--src-tls-verify=false", &format!("docker://{from}"), &to])?;
    image.compare(into)?;
    fs::remove_dir_all(into)?;
    Ok(())
}

pub(crate) fn push(image: &Image, to: &str) -> Result<()> {
    run(
        "skopeo",
        &["copy", "-q", "--preserve-digests", "--dest-tls-verify=false", &image.oci(), &format!("docker://{to}")],
    )?;
    Ok(())
}

/// Has docker take an archive's one image; its id.
pub(crate) fn loaded(docker: &Docker, archive: &str) -> Result<String> {
    docker.run(&["load", "-qi", archive])?;
    Ok(docker.run(&["image", "inspect", "-f", "{{.Id}}", "lib/app:1"])?.trim().to_owned())
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn skopeo_pushes_and_every_agent_serves_also_after_a_restart() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[5 * MIB, 20 * MIB + 77, 1000, 0], 1)?;
    let dev = Dev::start(dir.path())?;
    push(&image, &format!("{}/lib/app:1", dev.proxy()))?;
    for k in 0..3 {
        pull_and_compare(&format!("{}/lib/app:1", dev.agent(k)), &image, &dir.path().join("pulled"))?;
    }
    let base = dev.base;
    dev.process.stop()?;
    let dev = Dev::at(dir.path(), base)?;
    for from in [dev.proxy(), dev.agent(0), dev.agent(2)] {
        pull_and_compare(&format!("{from}/lib/app:1"), &image, &dir.path().join("pulled"))?;
    }

    // A tag can be moved, and the next pull sees it.
    let moved = Image::make(&dir.path().join("moved"), &[3 * MIB], 2)?;
    push(&moved, &format!("{}/lib/app:1", dev.proxy()))?;
    pull_and_compare(&format!("{}/lib/app:1", dev.agent(1)), &moved, &dir.path().join("pulled"))?;
    dev.process.stop()
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn docker_podman_and_buildah_push_and_pull() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[2 * MIB, 9 * MIB + 1, 300], 3)?;
    let dev = Dev::start(dir.path())?;

    let docker = Docker::start(dir.path())?;
    let archive = image.archive("lib/app:1")?;
    let id = loaded(&docker, &archive)?;
    let pushed = format!("{}/docker/app:1", dev.proxy());
    docker.run(&["tag", "lib/app:1", &pushed])?;
    docker.run(&["push", "-q", &pushed])?;
    for k in 0..3 {
        docker.run(&["image", "prune", "-af"])?;
        let pulled = format!("{}/docker/app:1", dev.agent(k));
        docker.run(&["pull", "-q", &pulled])?;
        ensure!(
            docker.run(&["image", "inspect", "-f", "{{.Id}}", &pulled])?.trim() == id,
            "agent {k} gave docker another image"
        );
    }

    let podman = Podman::new(dir.path());
    podman.podman(&["load", "-q", "-i", &archive])?;
    let id = podman.podman(&["images", "-q", "--no-trunc"])?.trim().to_owned();
    for (k, push) in [(0, Podman::podman as fn(&Podman, &[&str]) -> Result<String>), (1, Podman::buildah)] {
        let to = format!("docker://{}/podman/app:{k}", dev.proxy());
        push(&podman, &["push", "-q", "--tls-verify=false", &id, &to])?;
    }
    let fresh = Podman::new(&dir.path().join("fresh"));
    let pulled = fresh.podman(&["pull", "-q", "--tls-verify=false", &format!("{}/podman/app:0", dev.agent(1))])?;
    ensure!(id.ends_with(pulled.trim()), "podman pulled {pulled} for {id}");
    let fresh = Podman::new(&dir.path().join("fresh-too"));
    let pulled = fresh.buildah(&["pull", "-q", "--tls-verify=false", &format!("{}/podman/app:1", dev.agent(2))])?;
    ensure!(id.ends_with(pulled.trim()), "buildah pulled {pulled} for {id}");
    dev.process.stop()
}

/// A connection that is cut in mid-layer costs docker its five seconds of patience and not the layer again.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn docker_goes_on_where_its_connection_was_cut() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[40 * MIB], 6)?;
    let dev = Dev::start(dir.path())?;
    push(&image, &format!("{}/lib/app:1", dev.proxy()))?;
    let docker = Docker::start(dir.path())?;
    let id = loaded(&docker, &image.archive("lib/app:1")?)?;
    docker.run(&["image", "prune", "-af"])?;
    // Through the agent while the blob arrives.
    let cutter = Cutter::start(&dev.agent(0), 25 * MIB, 1)?;
    let from = format!("{}/lib/app:1", cutter.addr());
    docker.run(&["pull", "-q", &from])?;
    ensure!(docker.run(&["image", "inspect", "-f", "{{.Id}}", &from])?.trim() == id, "docker pulled another image");
    cutter.check(&image)?;
    dev.process.stop()
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn blobs_move_without_a_registry() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[7 * MIB + 5], 4)?;
    let (digest, size) = image.layers[0];
    let file = image.blob(&digest).display().to_string();
    let dev = Dev::start(dir.path())?;

    // By Kraken's blob API, as its users' scripts do.
    let uploads = format!("http://{}/namespace/some%2Fns/blobs/{digest}/uploads", dev.origin(0));
    let head = run("curl", &["-sfi", "-X", "POST", &uploads])?;
    let location =
        head.lines().find_map(|line| line.to_lowercase().strip_prefix("location:").map(|v| v.trim().to_owned()));
    let Some(id) = location else { anyhow::bail!("no Location in {head}") };
    let one = format!("{uploads}/{id}");
    let range = format!("Content-Range: 0-{size}");
    run("curl", &["-sf", "-X", "PATCH", "-H", &range, "--data-binary", &format!("@{file}"), &one])?;
    run("curl", &["-sf", "-X", "PUT", &one])?;
    let got = dir.path().join("got").display().to_string();
    for k in 0..3 {
        run("curl", &["-sf", "-o", &got, &format!("http://{}/namespace/some%2Fns/blobs/{digest}", dev.agent_api(k))])?;
        ensure!(fs::read(&got)? == fs::read(&file)?, "agent {k}");
    }
    let unknown = format!("http://{}/namespace/some%2Fns/blobs/sha256:{}", dev.agent_api(0), "0".repeat(64));
    let code = run("curl", &["-s", "-o", "/dev/null", "-w", "%{http_code}", &unknown])?;
    ensure!(code == "404", "unknown blob answered {code}");

    // By the command line.
    let binary = shoal().display().to_string();
    let put = run(&binary, &["blob", "put", &file, "--origin", &dev.origin(1)])?;
    ensure!(put.contains(&digest.to_string()), "put said {put}");
    let out = dir.path().join("out").display().to_string();
    run(&binary, &["blob", "get", &digest.to_string(), "-o", &out, "--agent", &dev.agent_api(1)])?;
    ensure!(fs::read(&out)? == fs::read(&file)?, "blob get");
    dev.process.stop()
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn three_agents_at_once_cost_the_origins_about_one_copy() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[512 * MIB], 5)?;
    let dev = Dev::start(dir.path())?;
    push(&image, &format!("{}/lib/big:1", dev.proxy()))?;
    let sent = || -> Result<f64> {
        let both = [
            metric(&dev.origin(0), "shoal_peer_sent_bytes_total")?,
            metric(&dev.origin(1), "shoal_peer_sent_bytes_total")?,
        ];
        Ok(both.iter().sum())
    };
    let before = sent()?;
    thread::scope(|scope| -> Result<()> {
        let pulls = [0, 1, 2].map(|k| {
            let (dev, image, into) = (&dev, &image, dir.path().join(format!("pulled{k}")));
            scope.spawn(move || pull_and_compare(&format!("{}/lib/big:1", dev.agent(k)), image, &into))
        });
        pulls.into_iter().try_for_each(|pull| pull.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let copies = (sent()? - before) / image.layers[0].1 as f64;
    println!("the origins sent {copies:.2} copies for three agents");
    ensure!((0.9..=1.2).contains(&copies), "the origins sent {copies:.2} copies for three agents");
    dev.process.stop()
}
