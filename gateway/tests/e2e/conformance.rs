//! The distribution specification's own suite against a proxy, and its read-only part against an agent.

use crate::{
    clients::push,
    cluster::{Cluster, Dev, More},
    image::Image,
    tools::tool,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

/// What the suite counted.
#[derive(Debug)]
struct Counted {
    pass: u32,
    skip: u32,
    /// Failures, and errors of the suite itself.
    bad: u32,
}

/// Runs the suite in its `dev` version, every API and data set on but `off`. An error where anything fails.
fn conform(registry: &str, results: &Path, settings: &[(&str, &str)], off: &[&str]) -> Result<Counted> {
    fs::create_dir_all(results)?;
    let mut command = Command::new(tool("conformance")?);
    command
        .stdin(Stdio::null())
        .env("OCI_REGISTRY", registry)
        .env("OCI_TLS", "disabled")
        .env("OCI_VERSION", "dev")
        .env("OCI_REPO1", "conformance/one")
        .env("OCI_REPO2", "conformance/two")
        .env("OCI_RESULTS_DIR", results)
        .envs(settings.iter().copied())
        .envs(off.iter().map(|name| (*name, "false")));
    let out = command.output().context("run the conformance suite")?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let bad = |line: &&str| line.contains("FAIL") || line.contains("Error") || line.contains(": Skip");
    let failed = || {
        let lines: Vec<&str> = said.lines().filter(bad).take(50).collect();
        format!("{}\n{}", lines.join("\n"), String::from_utf8_lossy(&out.stderr))
    };
    let counted = counted(&said).with_context(failed)?;
    ensure!(counted.bad == 0, failed());
    // Without pushes the suite falls over its own result file, once it has tested and reported everything.
    ensure!(out.status.success() || off.contains(&"OCI_API_PUSH"), failed());
    Ok(counted)
}

/// The sums at the end of the suite's report: lines like `Pass.....:  654`.
fn counted(said: &str) -> Result<Counted> {
    let count = |name: &str| -> Result<u32> {
        let line = said.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(".."));
        let number = line.with_context(|| format!("no sum of {name} in the report"))?;
        Ok(number.trim_start_matches(['.', ':', ' ']).trim().parse()?)
    };
    Ok(Counted { pass: count("Pass")?, skip: count("Skip")?, bad: count("FAIL")? + count("Error")? })
}

#[test]
#[ignore = "needs the conformance suite: run ci/test"]
fn conformance_of_proxy_and_agent() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dev = Dev::start(dir.path())?;
    let counted = conform(&dev.proxy(), &dir.path().join("proxy"), &[], &[])?;
    println!("proxy: {counted:?}");
    ensure!(counted.pass > 900 && counted.skip == 0, "{counted:?}");

    let image = Image::make(&dir.path().join("image"), &[3 << 20, 1000], 11)?;
    push(&image, &format!("{}/conformance/one:read", dev.proxy()))?;
    let (manifest, layer) = (image.manifest.to_string(), image.layers[0].0.to_string());
    let settings = [
        ("OCI_RO_DATA_TAGS", "read"),
        ("OCI_RO_DATA_MANIFESTS", &manifest),
        ("OCI_RO_DATA_BLOBS", &layer),
        ("OCI_RO_DATA_REFERRERS", &manifest),
    ];
    let off = [
        "OCI_API_PUSH",
        "OCI_API_BLOBS_DELETE",
        "OCI_API_BLOBS_UPLOAD_CANCEL",
        "OCI_API_MANIFESTS_DELETE",
        "OCI_API_TAGS_DELETE",
        // Of content it has not made itself, the suite never looks at the header it then misses; our own tests do.
        "OCI_API_MANIFESTS_DIGEST_HEADER",
    ];
    let counted = conform(&dev.agent(1), &dir.path().join("agent"), &settings, &off)?;
    println!("agent: {counted:?}");
    ensure!(counted.pass > 5 && counted.skip == 0, "{counted:?}");
    dev.process.stop()
}

#[test]
#[ignore = "needs the conformance suite: run ci/test"]
fn conformance_of_a_proxy_that_takes_sparse_manifests() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let lenient = "[index]\nsparse_indexes = true\ncheck_dependencies = false\n";
    let cluster =
        Cluster::start_with(dir.path(), 0, &More { texts: &[("proxy", lenient), ("index", lenient)], scheme: "http" })?;
    let sparse = [("OCI_DATA_SPARSE", "true"), ("OCI_FILTER_TEST", "OCI Conformance Test/sparse")];
    let counted = conform(&cluster.proxy.addr, &dir.path().join("results"), &sparse, &[])?;
    ensure!(counted.pass > 10 && counted.skip == 0, "{counted:?}");
    Ok(())
}
