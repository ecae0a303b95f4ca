//! Separate processes, and what happens to pulls when they are killed.

use crate::{
    clients::{pull_and_compare, push},
    cluster::{Cluster, Member, metric},
    image::Image,
    tools::{run, wait_for},
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{Seek, SeekFrom},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;

/// `curl` of a blob from an agent's blob API, in the background.
fn pull(api: &str, digest: &peer_proto::Digest, into: &Path) -> Result<Child> {
    let url = format!("http://{api}/namespace/lib%2Fbig/blobs/{digest}");
    let child = Command::new("curl")
        .args(["-sf", "--max-time", "120", "-o"])
        .arg(into)
        .arg(url)
        .stdin(Stdio::null())
        .spawn()?;
    Ok(child)
}

/// Pieces an agent has proven so far.
fn progress(addr: &str) -> f64 {
    metric(addr, "shoal_peer_received_bytes_total").unwrap_or(0.0)
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn separate_processes_push_and_pull() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[3 * MIB, 17 * MIB + 3], 11)?;
    let cluster = Cluster::start(dir.path(), 2)?;
    push(&image, &format!("{}/lib/app:1", cluster.proxy.addr))?;
    for agent in &cluster.agents {
        pull_and_compare(&format!("{}/lib/app:1", agent.addr), &image, &dir.path().join("pulled"))?;
    }
    Ok(())
}

/// 1 GB on three agents; in mid-pull two agents and an origin are killed with SIGKILL, and started again.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn pulls_survive_kill_nine_of_agents_and_an_origin() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[1000 * MIB], 12)?;
    let (digest, size) = image.layers[0];
    let mut cluster = Cluster::start(dir.path(), 3)?;
    push(&image, &format!("{}/lib/big:1", cluster.proxy.addr))?;

    let into: Vec<_> = (0..3).map(|k| dir.path().join(format!("pulled{k}"))).collect();
    let mut pulls: Vec<Child> =
        (0..3).map(|k| pull(&cluster.agents[k].api, &digest, &into[k])).collect::<Result<_>>()?;
    for k in 0..3 {
        let api = cluster.agents[k].api.clone();
        wait_for("a good part to arrive", Duration::from_secs(60), || progress(&api) > 200.0 * 1e6)?;
    }
    let config_dir = cluster.dir().to_owned();
    cluster.origins[0].kill()?;
    for k in [0, 1] {
        cluster.agents[k].kill()?;
    }
    for k in [0, 1] {
        // Their clients are cut, as with any server killed; they ask again, and the agent goes on at the piece.
        ensure!(!pulls[k].wait()?.success(), "a client of a killed agent saw a clean end");
        cluster.agents[k].start(&config_dir)?;
        cluster.agents[k].ready()?;
        pulls[k] = pull(&cluster.agents[k].api, &digest, &into[k])?;
    }
    cluster.origins[0].start(&config_dir)?;
    for (k, pull) in pulls.iter_mut().enumerate() {
        ensure!(pull.wait()?.success(), "pull {k} failed");
        let sum = run("sha256sum", &[&into[k].display().to_string()])?;
        ensure!(sum.starts_with(&digest.hex()), "agent {k} gave {sum}");
        ensure!(fs::metadata(&into[k])?.len() == size);
    }
    for k in [0, 1] {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let again = progress(&cluster.agents[k].api) / size as f64;
        // It had a fifth; what was on its way when it died, and what the endgame asks for twice, comes again.
        ensure!(again < 0.9, "agent {k} fetched {again:.2} of the blob after its restart");
    }
    Ok(())
}

/// Every origin is down when a pull starts and comes back: the pull waits, and succeeds.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn a_pull_waits_for_the_origins() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[5 * MIB], 13)?;
    let (digest, _) = image.layers[0];
    let mut cluster = Cluster::start(dir.path(), 1)?;
    push(&image, &format!("{}/lib/big:1", cluster.proxy.addr))?;
    cluster.origins.iter_mut().try_for_each(|origin| origin.kill())?;
    let into = dir.path().join("pulled");
    let mut pull = pull(&cluster.agents[0].api, &digest, &into)?;
    let started = Instant::now();
    wait_for("two seconds to pass", Duration::from_secs(5), || started.elapsed() > Duration::from_secs(2))?;
    ensure!(pull.try_wait()?.is_none(), "the pull did not wait");
    let config_dir = cluster.dir().to_owned();
    cluster.origins.iter_mut().try_for_each(|origin| origin.start(&config_dir))?;
    ensure!(pull.wait()?.success(), "the pull failed");
    ensure!(fs::read(&into)? == fs::read(image.blob(&digest))?);
    Ok(())
}

/// The only seeder goes away in mid-pull and is back a second later.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn a_seeder_gone_for_a_second_costs_about_that() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[600 * MIB], 14)?;
    let (digest, _) = image.layers[0];
    let mut cluster = Cluster::start(dir.path(), 2)?;
    push(&image, &format!("{}/lib/big:1", cluster.proxy.addr))?;

    // The undisturbed time first, on the other agent, and with one origin for both.
    cluster.origins[1].kill()?;
    let started = Instant::now();
    ensure!(pull(&cluster.agents[0].api, &digest, &dir.path().join("first"))?.wait()?.success());
    let undisturbed = started.elapsed();
    cluster.agents[0].kill()?;

    let started = Instant::now();
    let mut second = pull(&cluster.agents[1].api, &digest, &dir.path().join("second"))?;
    let api = cluster.agents[1].api.clone();
    wait_for("a few pieces to arrive", Duration::from_secs(30), || progress(&api) > 20.0 * 1e6)?;
    cluster.origins[0].kill()?;
    let gone = Instant::now();
    wait_for("a second to pass", Duration::from_secs(5), || gone.elapsed() > Duration::from_secs(1))?;
    let config_dir = cluster.dir().to_owned();
    cluster.origins[0].start(&config_dir)?;
    cluster.origins[0].ready()?;
    let away = gone.elapsed();
    ensure!(second.wait()?.success());
    let lost = started.elapsed().saturating_sub(undisturbed).saturating_sub(away);
    println!("undisturbed {undisturbed:?}, seeder away {away:?}, lost beyond that {lost:?}");
    // A shared machine's noise on top of the two seconds promised.
    ensure!(lost < Duration::from_secs(4), "lost {lost:?} beyond the time the seeder was away");
    let sum = run("sha256sum", &[&dir.path().join("second").display().to_string()])?;
    ensure!(sum.starts_with(&digest.hex()), "pulled {sum}");
    Ok(())
}

/// The origins are killed with SIGKILL in the middle of a chunk: the session goes on at the byte where it stood.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn a_push_goes_on_after_the_origins_were_killed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[96 * MIB], 16)?;
    let (digest, size) = image.layers[0];
    let blob = image.blob(&digest);
    let mut cluster = Cluster::start(dir.path(), 1)?;
    let proxy = format!("http://{}", cluster.proxy.addr);
    let header = |head: &str, name: &str| {
        let value =
            |line: &str| Some(line.split_once(": ").filter(|(key, _)| key.eq_ignore_ascii_case(name))?.1.to_owned());
        head.lines().find_map(value).with_context(|| format!("no {name} in {head}"))
    };
    let head = run("curl", &["-sfi", "-X", "POST", "-d", "", &format!("{proxy}/v2/lib/big/blobs/uploads/")])?;
    let session = format!("{proxy}{}", header(&head, "location")?);

    let mut patch = Command::new("curl")
        .args(["-sf", "-X", "PATCH", "--limit-rate", "20M", "-H", "Content-Type: application/octet-stream", "-T"])
        .args([&blob.display().to_string(), &session])
        .stdin(Stdio::null())
        .spawn()?;
    let arrived = |cluster: &Cluster| -> f64 {
        let of = |origin: &Member| metric(&origin.api, "shoal_origin_upload_bytes_total").unwrap_or(0.0);
        cluster.origins.iter().map(of).sum()
    };
    wait_for("a good part to arrive", Duration::from_secs(60), || arrived(&cluster) > 30.0 * 1e6)?;
    cluster.origins.iter_mut().try_for_each(|origin| origin.kill())?;
    ensure!(!patch.wait()?.success(), "the client saw a clean end");
    let config_dir = cluster.dir().to_owned();
    cluster.origins.iter_mut().try_for_each(|origin| origin.start(&config_dir))?;
    cluster.origins.iter_mut().try_for_each(|origin| origin.ready())?;

    let stands = run("curl", &["-sfi", &session])?;
    let range = header(&stands, "range")?;
    let last: u64 = range.split_once('-').context("no range")?.1.parse()?;
    ensure!(last > 8 * MIB && last < size, "it stands at {last} of {size}");
    let mut rest = fs::File::open(&blob)?;
    rest.seek(SeekFrom::Start(last + 1))?;
    let rest_file = dir.path().join("rest");
    std::io::copy(&mut rest, &mut fs::File::create(&rest_file)?)?;
    let (data, range) = (format!("@{}", rest_file.display()), format!("Content-Range: {}-{}", last + 1, size - 1));
    run("curl", &["-sf", "-X", "PATCH", "-H", &range, "--data-binary", &data, &session])?;
    run("curl", &["-sf", "-X", "PUT", "-d", "", &format!("{session}?digest={digest}")])?;
    let into = dir.path().join("pulled");
    ensure!(pull(&cluster.agents[0].api, &digest, &into)?.wait()?.success());
    ensure!(fs::read(&into)? == fs::read(&blob)?);
    Ok(())
}

/// The tracker is killed in mid-pull and stays away: the pull goes on with the peers it knows, and another one begins without.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn a_pull_outlives_the_tracker() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[400 * MIB], 15)?;
    let (digest, _) = image.layers[0];
    let mut cluster = Cluster::start(dir.path(), 2)?;
    push(&image, &format!("{}/lib/big:1", cluster.proxy.addr))?;
    let mut pulled = pull(&cluster.agents[0].api, &digest, &dir.path().join("pulled"))?;
    let api = cluster.agents[0].api.clone();
    wait_for("a few pieces to arrive", Duration::from_secs(30), || progress(&api) > 10.0 * 1e6)?;
    cluster.tracker.kill()?;
    ensure!(pulled.wait()?.success(), "the pull died with the tracker");
    let into = dir.path().join("without");
    ensure!(pull(&cluster.agents[1].api, &digest, &into)?.wait()?.success(), "no pull begins without the tracker");
    ensure!(fs::read(&into)? == fs::read(image.blob(&digest))?);
    let config_dir = cluster.dir().to_owned();
    cluster.tracker.start(&config_dir)?;
    cluster.tracker.ready()?;
    Ok(())
}
