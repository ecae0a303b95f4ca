//! crane, regctl and oras: they copy images between folders and registries, each with a registry client of its own.

use crate::{
    access::{Named, named, named_by_tokens},
    clients::push,
    cluster::Dev,
    cut::Cutter,
    image::Image,
    tools::{refused, run, run_with, tool},
};
use anyhow::{Result, ensure};
use std::{fs, path::Path};

const MIB: u64 = 1 << 20;

/// Copies `image` to the proxy and from the agent, as people with names do, and finds that without a name there is nothing.
///
/// `push` and `pull` are told who to be: `NAME:PASSWORD`, or nobody.
fn copy_both_ways(
    named: &Named,
    repository: &str,
    push: impl Fn(&str, Option<&str>) -> Result<String>,
    pull: impl Fn(&str, Option<&str>, &Path) -> Result<String>,
) -> Result<()> {
    let into = |name: &str| named.dir.path().join(format!("{repository}-{name}").replace('/', "-"));
    let to = format!("{}/{repository}:1", named.cluster.proxy.addr);
    for stranger in [None, Some("bob:pw"), Some("ann:wrong")] {
        refused(push(&to, stranger), &format!("a push by {stranger:?}"))?;
    }
    push(&to, Some("ann:secret"))?;
    for (k, host) in [&named.cluster.agents[0].addr, &named.cluster.proxy.addr].into_iter().enumerate() {
        let from = format!("{host}/{repository}:1");
        pull(&from, Some("bob:pw"), &into(&k.to_string()))?;
        named.image.compare(&into(&k.to_string()))?;
        // Also now that the agent has it all.
        for stranger in [None, Some("bob:wrong")] {
            refused(pull(&from, stranger, &into("stranger")), &format!("a pull by {stranger:?} from {from}"))?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn crane_regctl_and_oras_push_and_pull_by_name() -> Result<()> {
    push_and_pull(&named("http")?)
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn crane_regctl_and_oras_push_and_pull_by_token() -> Result<()> {
    push_and_pull(&named_by_tokens()?)
}

fn push_and_pull(named: &Named) -> Result<()> {
    let layout = named.image.dir.display().to_string();
    let source = format!("{layout}:t");

    let crane = |host: &str, name: Option<&str>, args: &[&str]| {
        let config = tempfile::tempdir()?;
        let env = [("DOCKER_CONFIG", config.path().to_str().unwrap_or_default())];
        let host = host.split('/').next().unwrap_or_default();
        if let Some((name, password)) = name.and_then(|name| name.split_once(':')) {
            run_with(&env, &tool("crane")?, &["auth", "login", host, "-u", name, "-p", password])?;
        }
        run_with(&env, &tool("crane")?, args)
    };
    copy_both_ways(
        named,
        "lib/crane",
        |to, name| crane(to, name, &["push", &layout, to]),
        |from, name, into| crane(from, name, &["pull", "--format=oci", from, &into.display().to_string()]),
    )?;

    let regctl = |at: &str, name: Option<&str>, from: &str, to: &str| {
        let config = tempfile::tempdir()?;
        let config = config.path().join("regctl.json").display().to_string();
        let env = [("REGCTL_CONFIG", config.as_str())];
        let mut host = format!("reg={},tls=disabled", at.split('/').next().unwrap_or_default());
        if let Some((name, password)) = name.and_then(|name| name.split_once(':')) {
            host.push_str(&format!(",user={name},pass={password}"));
        }
        run_with(&env, &tool("regctl")?, &["--host", &host, "image", "copy", from, to])
    };
    copy_both_ways(
        named,
        "lib/regctl",
        |to, name| regctl(to, name, &format!("ocidir://{source}"), to),
        |from, name, into| regctl(from, name, from, &format!("ocidir://{}:t", into.display())),
    )?;

    let none = named.dir.path().join("none.json").display().to_string();
    fs::write(&none, "{}")?;
    let oras = |side: &str, name: Option<&str>, args: &[&str]| {
        let [user, password, config, plain] =
            ["username", "password", "registry-config", "plain-http"].map(|flag| format!("--{side}-{flag}"));
        let mut all = vec!["cp", "--no-tty", &plain, &config, &none];
        if let Some((name, secret)) = name.and_then(|name| name.split_once(':')) {
            all.extend([&user, name, &password, secret]);
        }
        run(&tool("oras")?, &[&all, args].concat())
    };
    copy_both_ways(
        named,
        "lib/oras",
        |to, name| oras("to", name, &["--from-oci-layout", &source, to]),
        |from, name, into| oras("from", name, &["--to-oci-layout", from, &format!("{}:t", into.display())]),
    )
}

/// An artifact that refers to an image is found through an agent, by the referrers API and by the client's own walk.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn oras_attaches_at_the_proxy_and_discovers_at_an_agent() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[100_000], 41)?;
    let dev = Dev::start(dir.path())?;
    let (there, here) = (format!("{}/lib/app:1", dev.proxy()), format!("{}/lib/app:1", dev.agent(0)));
    push(&image, &there)?;
    let statement = dir.path().join("statement.txt");
    fs::write(&statement, "signed\n")?;
    let oras = tool("oras")?;
    let file = format!("{}:text/plain", statement.display());
    let attach =
        ["attach", "--no-tty", "--plain-http", "--disable-path-validation", "--artifact-type", "test/statement"];
    run(&oras, &[&attach[..], &[&there, &file]].concat())?;

    let found = run(&oras, &["discover", "--plain-http", "--format", "json", &here])?;
    let found: serde_json::Value = serde_json::from_str(&found)?;
    let referrer = &found["referrers"][0];
    ensure!(referrer["artifactType"] == "test/statement", "found {found}");
    let digest = referrer["digest"].as_str().unwrap_or_default();
    let into = dir.path().join("pulled");
    let from = format!("{}/lib/app@{digest}", dev.agent(1));
    run(
        &oras,
        &["pull", "--no-tty", "--plain-http", "--allow-path-traversal", "-o", &into.display().to_string(), &from],
    )?;
    ensure!(fs::read(&statement)? == b"signed\n", "another statement arrived");
    dev.process.stop()
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn regctl_goes_on_where_its_connection_was_cut() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[40 * MIB], 42)?;
    let dev = Dev::start(dir.path())?;
    push(&image, &format!("{}/lib/app:1", dev.proxy()))?;
    // Through the agent while the blob arrives, and from the proxy.
    for (k, host) in [dev.agent(0), dev.proxy()].into_iter().enumerate() {
        let cutter = Cutter::start(&host, 15 * MIB, 2)?;
        let into = dir.path().join(format!("pulled{k}"));
        let (from, to) = (format!("{}/lib/app:1", cutter.addr()), format!("ocidir://{}:t", into.display()));
        let host = format!("reg={},tls=disabled", cutter.addr());
        run(&tool("regctl")?, &["--host", &host, "image", "copy", &from, &to])?;
        image.compare(&into)?;
        cutter.check(&image)?;
    }
    dev.process.stop()
}
