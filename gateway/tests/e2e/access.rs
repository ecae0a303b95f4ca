//! A registry that speaks TLS and asks for names.

use crate::{
    cluster::{Cluster, More},
    image::Image,
    tools::run,
};
use anyhow::{Result, ensure};
use std::{fs, path::Path};

/// bcrypt, cost 5: `secret` and `pw`.
pub(crate) const HTPASSWD: &str = "ann:$2y$05$2Za74pYsYYn.UKz76af2luyQy.bI7MvnodHjevHEkR1b4Iz59DY/2\n\
                        bob:$2y$05$VUAYbk4bIr2O7y1h9tablefcD/Sn3cSE.eg1DfppvD/w.SobeyuZq\n";

const RULES: &str = r#"
[[access.rules]]
repository = "lib/.*"
users = ["ann"]
actions = ["pull", "push"]
[[access.rules]]
repository = "lib/.*"
users = ["bob"]
actions = ["pull"]
"#;

fn config(dir: &Path) -> Result<String> {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()])?;
    let (certificate, key, names) = (dir.join("tls.crt"), dir.join("tls.key"), dir.join("htpasswd"));
    fs::write(&certificate, made.cert.pem())?;
    fs::write(&key, made.signing_key.serialize_pem())?;
    fs::write(&names, HTPASSWD)?;
    Ok(format!("[tls]\ncertificate = {certificate:?}\nkey = {key:?}\n[access]\nhtpasswd = {names:?}\n{RULES}"))
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn names_decide_who_pushes_and_who_pulls_over_tls() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[3 << 20, 1000], 21)?;
    let text = config(dir.path())?;
    let more = More { roles: &["proxy", "agent"], text: &text, scheme: "https" };
    let cluster = Cluster::start_with(dir.path(), 1, &more)?;
    let (proxy, agent) = (&cluster.proxy.addr, &cluster.agents[0].addr);

    let push = |name: &str, tag: &str| {
        let to = format!("docker://{proxy}/lib/app:{tag}");
        run("skopeo", &["copy", "-q", "--dest-tls-verify=false", "--dest-creds", name, &image.oci(), &to])
    };
    push("ann:secret", "1")?;
    for stranger in ["bob:pw", "ann:wrong", "eve:pw"] {
        ensure!(push(stranger, "2").is_err(), "{stranger} pushed");
    }

    let pull = |creds: &[&str], from: &str| {
        let (from, to) = (format!("docker://{from}/lib/app:1"), format!("dir:{}", dir.path().join("out").display()));
        run("skopeo", &[&["copy", "-q", "--src-tls-verify=false"], creds, &[&from, &to]].concat())
    };
    for from in [proxy, agent] {
        pull(&["--src-creds", "bob:pw"], from)?;
        // Also now that the agent has it all.
        ensure!(pull(&[], from).is_err(), "somebody without a name pulled from {from}");
        ensure!(pull(&["--src-creds", "eve:pw"], from).is_err(), "somebody unknown pulled from {from}");
    }
    Ok(())
}
