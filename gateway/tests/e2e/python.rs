//! The registry clients of Python: oras and python-dxf.

use crate::{
    access::{Named, named},
    tools::{refused, run_with, tool},
};
use anyhow::{Result, ensure};
use std::fs;

/// Pushes and pulls files with the `oras` package. Arguments: push or pull, a reference, a name and its password, a file or a folder.
const ORAS: &str = r#"
import sys, oras.client
verb, reference, name, password, path = sys.argv[1:]
client = oras.client.OrasClient(hostname=reference.split("/")[0], insecure=True, auth_backend="basic")
client.auth.set_basic_auth(name, password)
if verb == "push":
    client.push(target=reference, files=[path], disable_path_validation=True, do_chunked=False)
elif verb == "push-chunked":
    client.push(target=reference, files=[path], disable_path_validation=True, do_chunked=True, chunk_size=1 << 20)
else:
    client.pull(target=reference, outdir=path)
"#;

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn python_oras_pushes_and_pulls_by_name() -> Result<()> {
    let Named { cluster, image, dir } = named("http")?;
    let file = image.blob(&image.layers[0].0).display().to_string();
    let oras = |args: &[&str]| run_with(&[], &tool("python/bin/python3")?, &[&["-c", ORAS], args].concat());
    let into = dir.path().join("pulled");
    for verb in ["push", "push-chunked"] {
        let there = format!("{}/lib/{verb}:1", cluster.proxy.addr);
        for (name, password) in [("bob", "pw"), ("ann", "wrong")] {
            refused(oras(&[verb, &there, name, password, &file]), &format!("a {verb} by {name}:{password}"))?;
        }
        oras(&[verb, &there, "ann", "secret", &file])?;
        let here = format!("{}/lib/{verb}:1", cluster.agents[0].addr);
        let out = into.display().to_string();
        refused(oras(&["pull", &here, "bob", "wrong", &out]), "a pull with a wrong password")?;
        oras(&["pull", &here, "bob", "pw", &out])?;
        let pulled: Vec<_> = fs::read_dir(&into)?.collect::<Result<_, _>>()?;
        ensure!(pulled.len() == 1, "pulled {pulled:?}");
        ensure!(fs::read(pulled[0].path())? == fs::read(&file)?, "{} differs from {file}", pulled[0].path().display());
        fs::remove_dir_all(&into)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn dxf_pushes_and_pulls_by_name() -> Result<()> {
    let Named { cluster, image, dir } = named("https")?;
    let (digest, _) = image.layers[0];
    let (digest, file) = (digest.to_string(), image.blob(&digest).display().to_string());
    let certificate = dir.path().join("tls.crt").display().to_string();
    // It tells its password to nobody in the clear.
    let dxf = |host: &str, (name, password): (&str, &str), args: &[&str]| {
        let env = [
            ("DXF_HOST", host),
            ("DXF_TLSVERIFY", certificate.as_str()),
            ("DXF_USERNAME", name),
            ("DXF_PASSWORD", password),
        ];
        run_with(&env, &tool("python/bin/dxf")?, args)
    };
    let (proxy, agent) = (&cluster.proxy.addr, &cluster.agents[0].addr);
    let (ann, bob) = (("ann", "secret"), ("bob", "pw"));
    for stranger in [bob, ("ann", "wrong")] {
        refused(dxf(proxy, stranger, &["push-blob", "lib/dxf", &file]), &format!("a push by {stranger:?}"))?;
    }
    let said = dxf(proxy, ann, &["push-blob", "lib/dxf", &file, "@latest"])?;
    ensure!(said.contains(&digest), "dxf pushed {said} for {digest}");
    let listed = dxf(proxy, bob, &["list-aliases", "lib/dxf"])?;
    ensure!(listed.trim() == "latest", "listed {listed}");
    refused(dxf(agent, ("bob", "wrong"), &["blob-size", "lib/dxf", "@latest"]), "a wrong password")?;
    for (k, name) in [digest.as_str(), "@latest"].into_iter().enumerate() {
        let script = format!("\"$0\" pull-blob lib/dxf {name} > \"$1\"");
        let out = dir.path().join(k.to_string()).display().to_string();
        let env = [
            ("DXF_HOST", agent.as_str()),
            ("DXF_TLSVERIFY", certificate.as_str()),
            ("DXF_USERNAME", "bob"),
            ("DXF_PASSWORD", "pw"),
        ];
        run_with(&env, "sh", &["-c", &script, &tool("python/bin/dxf")?, &out])?;
        ensure!(fs::read(&out)? == fs::read(&file)?, "{name} differs");
    }
    Ok(())
}
