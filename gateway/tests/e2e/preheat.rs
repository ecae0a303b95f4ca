//! Preheat of hosts, by the command that a person would run.

use crate::{
    clients::{pull_and_compare, push},
    cluster::{Cluster, More, metric, shoal},
    image::Image,
    tools::{run, wait_for},
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    process::{Command, Stdio},
    time::Duration,
};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn preheat(cluster: &Cluster, args: &[&str]) -> Result<(bool, String, String)> {
    let proxy = cluster.proxy.addr.as_str();
    let out = Command::new(shoal()).args(["preheat", "--proxy", proxy]).args(args).stdin(Stdio::null()).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Ok((out.status.success(), text(&out.stdout), text(&out.stderr)))
}

fn progress(cluster: &Cluster, id: &str) -> Result<Value> {
    let url = format!("http://{}/proxy/v1/registry/prefetch/{id}", cluster.proxy.addr);
    Ok(serde_json::from_str(&run("curl", &["-sf", &url])?)?)
}

/// Bytes that an agent has received from its peers.
fn received(cluster: &Cluster, k: usize) -> f64 {
    metric(&cluster.agents[k].api, "shoal_peer_received_bytes_total").unwrap_or(0.0)
}

/// Three agents, of which two have the label that is asked for. One of the two is killed in mid-way and comes back, the tracker
/// forgets everything, and in the end it is told, and true, that both hold the image, and a blob that goes is missed.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn hosts_with_a_label_hold_an_image_and_prove_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[60 * MIB, 3 * MIB, 1000], 21)?;
    let tracker = "[tracker]\ninterval_preheat = \"200ms\"\ninterval_leeching = \"2s\"\ninterval_seeding = \"5s\"\n\
                   silence_max = \"20s\"\n";
    let texts = [("tracker", tracker), ("agent", "[limits]\npeer_in = \"8MiB/s\"\n")];
    let mut cluster = Cluster::start_with(dir.path(), 3, &More { texts: &texts, scheme: "http" })?;
    let config_dir = cluster.dir().to_owned();
    for (k, labels) in [(0, r#"["gpu", "zone=a"]"#), (1, r#"["gpu", "zone=b"]"#), (2, r#"["zone=b"]"#)] {
        let path = config_dir.join(format!("agent{k}.toml"));
        let text = std::fs::read_to_string(&path)?;
        std::fs::write(&path, format!("{text}[agent]\nlabels = {labels}\n"))?;
        cluster.agents[k].kill()?;
        cluster.agents[k].start(&config_dir)?;
        cluster.agents[k].ready()?;
    }
    push(&image, &format!("{}/lib/app:1", cluster.proxy.addr))?;

    let (begun, id, said) = preheat(&cluster, &["lib/app:1", "--label", "gpu"])?;
    ensure!(begun && said.contains(&format!("--id {id} --wait")), "{said}");
    wait_for("a good part to arrive", PATIENCE, || received(&cluster, 0) > 30e6 && received(&cluster, 1) > 30e6)?;
    let (over, told, said) = preheat(&cluster, &["--id", &id])?;
    ensure!(!over && told == "0 of 2 hosts hold all layers", "{told}\n{said}");
    cluster.agents[0].kill()?;
    cluster.tracker.kill()?;
    cluster.tracker.start(&config_dir)?;
    cluster.tracker.ready()?;
    cluster.agents[0].start(&config_dir)?;
    let (proven, told, said) = preheat(&cluster, &["--id", &id, "--wait", "--timeout", "90s"])?;
    ensure!(proven && told == "2 of 2 hosts hold all layers", "{told}\n{said}");
    let again = received(&cluster, 0);
    // Of 66 MB it had received 30, some of that in pieces that were not whole yet.
    ensure!(again < 50e6, "the agent that was killed fetched {again} bytes after its restart");
    ensure!(received(&cluster, 2) == 0.0, "a host without the label was preheated");
    let told = progress(&cluster, &id)?;
    ensure!(told["proven"] == true && told["message"] == "2 of 2 hosts hold all layers", "{told}");
    // Three layers, the configuration, and the manifest.
    ensure!(told["blobs"] == 5 && told["bytes_held"].as_u64() == told["bytes"].as_u64().map(|one| 2 * one), "{told}");

    // A pull brings nothing any more.
    let before = received(&cluster, 1);
    pull_and_compare(&format!("{}/lib/app:1", cluster.agents[1].addr), &image, &dir.path().join("pulled"))?;
    ensure!(received(&cluster, 1) == before, "the pull brought something");

    // What is evicted is missed, though it was there.
    let (layer, _) = image.layers[1];
    run("curl", &["-sf", "-X", "DELETE", &format!("http://{}/blobs/{layer}", cluster.agents[1].api)])?;
    wait_for("the host to miss the layer", PATIENCE, || {
        progress(&cluster, &id).is_ok_and(|told| told["holding"] == 1 && told["failed"] == 1)
    })?;
    let (proven, told, said) = preheat(&cluster, &["--id", &id, "--wait"])?;
    ensure!(!proven && told == "1 of 2 hosts hold all layers", "{told}");
    ensure!(said.contains("1 of 5 blobs were evicted after they had come"), "{said}");

    let (proven, told, said) = preheat(&cluster, &["lib/app:1", "--label", "tpu", "--wait"])?;
    ensure!(!proven && told == "0 of 0 hosts hold all layers" && said.contains("no host that is known"), "{said}");
    let (begun, _, said) = preheat(&cluster, &["lib/none:1", "--agents"])?;
    ensure!(!begun && said.contains("failed to get tag"), "{said}");
    let (proven, told, said) = preheat(&cluster, &["lib/app:1", "--agents", "--wait"])?;
    ensure!(proven && told == "3 of 3 hosts hold all layers", "{told}\n{said}");
    let (begun, told, _) = preheat(&cluster, &["lib/app:1"])?;
    ensure!(begun && told == "lib/app:1 is on its way to the origins", "{told}");
    Ok(())
}

/// What Harbor's driver for Kraken sends: a look at the health, then a notification of its own making for each image, with the
/// media type of Docker's manifests whatever the image is.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn harbor_preheats_by_its_kraken_driver() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[3 * MIB], 22)?;
    let cluster = Cluster::start(dir.path(), 0)?;
    push(&image, &format!("{}/lib/app:1", cluster.proxy.addr))?;
    let proxy = format!("http://{}", cluster.proxy.addr);
    run("curl", &["-sf", &format!("{proxy}/health")])?;
    let event = serde_json::json!({ "events": [{
        "id": "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f0", "timestamp": "2026-01-01T00:00:00.000000000Z", "action": "push",
        "target": {
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "digest": image.manifest.to_string(),
            "repository": "lib/app", "url": format!("{proxy}/v2/lib/app/manifests/1"), "tag": "1",
        },
        "request": {}, "actor": {}, "source": {},
    }] });
    let (notify, body) = (format!("{proxy}/registry/notifications"), event.to_string());
    run("curl", &["-sf", "-X", "POST", "-H", "Content-Type: application/json", "-d", &body, &notify])?;
    let begun = metric(&cluster.proxy.addr, "shoal_proxy_preheats_total").context("the preheat was not counted")?;
    ensure!(begun == 1.0, "{begun} preheats");
    Ok(())
}
