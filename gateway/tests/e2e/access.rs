//! A registry that speaks TLS and asks for names.

use crate::{
    clients::loaded,
    cluster::{Cluster, More, shoal},
    image::Image,
    tools::{Docker, Podman, refused, run},
};
use anyhow::{Context as _, Result, ensure};
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

/// A cluster that asks for names: a proxy and an agent where ann may push and pull below `lib/` and bob may pull.
pub(crate) struct Named {
    pub(crate) cluster: Cluster,
    /// An image that is not there yet.
    pub(crate) image: Image,
    pub(crate) dir: tempfile::TempDir,
}

/// Starts one that speaks `http` or `https`.
pub(crate) fn named(scheme: &'static str) -> Result<Named> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[9 << 20, 1000], 21)?;
    let names = dir.path().join("htpasswd");
    fs::write(&names, HTPASSWD)?;
    let tls = if scheme == "https" { tls(dir.path())? } else { String::new() };
    let text = format!("{tls}[access]\nhtpasswd = {names:?}\n{RULES}");
    let more = More { texts: &[("proxy", &text), ("agent", &text)], scheme };
    let cluster = Cluster::start_with(dir.path(), 1, &more)?;
    Ok(Named { cluster, image, dir })
}

/// The same over plain HTTP where names are only asked for by the proxy, which gives tokens for them; the agent
/// passes requests for tokens on to it and knows its public key.
pub(crate) fn named_by_tokens() -> Result<Named> {
    let dir = tempfile::tempdir()?;
    let image = Image::make(&dir.path().join("image"), &[9 << 20, 1000], 24)?;
    let (names, key, jwks) = (dir.path().join("htpasswd"), dir.path().join("key.pem"), dir.path().join("jwks.json"));
    fs::write(&names, HTPASSWD)?;
    fs::write(&jwks, run(&shoal().display().to_string(), &["token-key", "new", &key.display().to_string()])?)?;
    let proxy = format!("[access]\nhtpasswd = {names:?}\n{RULES}[access.tokens]\nsigning_keys = {key:?}\n");
    // Within `[cluster]`, where the text before it ends. crane takes no token from another loopback address than the registry's.
    let agent = format!("proxy = \"PROXY\"\n[access]\n{RULES}[access.tokens]\ntrusted_keys = {jwks:?}\n");
    let more = More { texts: &[("proxy", &proxy), ("agent", &agent)], scheme: "http" };
    let cluster = Cluster::start_with(dir.path(), 1, &more)?;
    Ok(Named { cluster, image, dir })
}

fn tls(dir: &Path) -> Result<String> {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()])?;
    let (certificate, key) = (dir.join("tls.crt"), dir.join("tls.key"));
    fs::write(&certificate, made.cert.pem())?;
    fs::write(&key, made.signing_key.serialize_pem())?;
    Ok(format!("[tls]\ncertificate = {certificate:?}\nkey = {key:?}\n"))
}

/// A client's certificate and key in one folder, and the authority that signed it, which is itself.
fn client_certificate(dir: &Path, name: &str) -> Result<()> {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = rcgen::CertifiedIssuer::self_signed(params.clone(), rcgen::KeyPair::generate()?)?;
    let key = rcgen::KeyPair::generate()?;
    params.is_ca = rcgen::IsCa::NoCa;
    fs::create_dir_all(dir)?;
    fs::write(dir.join("client.cert"), params.signed_by(&key, &authority)?.pem())?;
    fs::write(dir.join("client.key"), key.serialize_pem())?;
    fs::write(dir.join("clients.pem"), authority.pem())?;
    Ok(())
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn tokens_of_the_proxy_open_agents_that_cannot_make_any() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    let image = Image::make(&dir.path().join("image"), &[3 << 20, 1000], 23)?;
    let names = dir.path().join("htpasswd");
    fs::write(&names, HTPASSWD)?;
    let text = format!("{}[access]\nhtpasswd = {names:?}\n{RULES}", tls(dir.path())?);
    client_certificate(&dir.path().join("certs"), "host")?;
    let text = text.replace("[access]", &format!("client_ca = {:?}\n[access]", at("certs/clients.pem")));
    let by_certificate = "[[access.rules]]\nrepository = \"lib/.*\"\nusers = [\"cert:host\"]\nactions = [\"pull\"]\n";
    let keys = run(&shoal().display().to_string(), &["token-key", "new", &at("key.pem")])?;
    fs::write(dir.path().join("jwks.json"), keys)?;
    let proxy = format!("{text}{by_certificate}[access.tokens]\nsigning_keys = {:?}\n", at("key.pem"));
    // Agents have neither names and passwords nor a key to sign with.
    let (head, rules) = text.split_once("[access]").context("no such section")?;
    let rules = rules.lines().filter(|line| !line.starts_with("htpasswd")).collect::<Vec<_>>().join("\n");
    let agent = format!(
        "{head}[access]\n{rules}\n{by_certificate}[access.tokens]\ntrusted_keys = {:?}\nrealm = \"https://PROXY/token\"\n",
        at("jwks.json")
    );
    let more = More { texts: &[("proxy", &proxy), ("agent", &agent)], scheme: "https" };
    let cluster = Cluster::start_with(dir.path(), 1, &more)?;
    let (proxy, agent) = (&cluster.proxy.addr, &cluster.agents[0].addr);

    let push = |name: &str| {
        let to = format!("docker://{proxy}/lib/app:1");
        run("skopeo", &["copy", "-q", "--dest-tls-verify=false", "--dest-creds", name, &image.oci(), &to])
    };
    ensure!(push("bob:pw").is_err() && push("eve:pw").is_err() && push("ann:wrong").is_err(), "a stranger pushed");
    push("ann:secret")?;
    let pull = |args: &[&str], from: &str| {
        let (from, to) = (format!("docker://{from}/lib/app:1"), format!("dir:{}", at("out")));
        run("skopeo", &[&["copy", "-q", "--src-tls-verify=false"], args, &[&from, &to]].concat())
    };
    for from in [proxy, agent] {
        pull(&["--src-creds", "bob:pw"], from)?;
        pull(&["--src-no-creds", "--src-cert-dir", &at("certs")], from)?;
        ensure!(pull(&["--src-no-creds"], from).is_err(), "somebody without a name pulled from {from}");
        ensure!(
            pull(&["--src-creds", "bob:wrong"], from).is_err(),
            "somebody with a wrong password pulled from {from}"
        );
    }

    // dockerd, by its own way: it logs in, pushes and pulls.
    let engine = Docker::start(dir.path())?;
    let own = at("docker");
    let docker = |args: &[&str]| engine.run(&[&["--config", own.as_str()], args].concat());
    let archive = at("image.tar");
    run("skopeo", &["copy", "-q", &image.oci(), &format!("docker-archive:{archive}:lib/app:1")])?;
    docker(&["load", "-qi", &archive])?;
    ensure!(docker(&["login", "-u", "ann", "-p", "wrong", proxy]).is_err(), "docker logged in with a wrong password");
    docker(&["login", "-u", "ann", "-p", "secret", proxy])?;
    docker(&["tag", "lib/app:1", &format!("{proxy}/lib/docker:1")])?;
    docker(&["push", "-q", &format!("{proxy}/lib/docker:1")])?;
    for from in [proxy, agent] {
        let tag = format!("{from}/lib/docker:1");
        docker(&["login", "-u", "bob", "-p", "pw", from])?;
        docker(&["pull", "-q", &tag])?;
        docker(&["logout", from])?;
        docker(&["image", "rm", "-f", &tag])?;
        ensure!(docker(&["pull", "-q", &tag]).is_err(), "docker pulled from {from} after it logged out");
    }
    Ok(())
}

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn names_decide_who_pushes_and_who_pulls_over_tls() -> Result<()> {
    let Named { cluster, image, dir } = named("https")?;
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

/// Who has logged in pushes and pulls; who has not, or only with bob's name, is refused.
#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn docker_podman_and_buildah_log_in() -> Result<()> {
    let Named { cluster, image, dir } = named("http")?;
    let (proxy, agent) = (&cluster.proxy.addr, &cluster.agents[0].addr);
    let archive = image.archive("lib/app:1")?;
    let tls = "--tls-verify=false";

    let docker = Docker::start(dir.path())?;
    let id = loaded(&docker, &archive)?;
    let there = format!("{proxy}/lib/docker:1");
    docker.run(&["tag", "lib/app:1", &there])?;
    refused(docker.run(&["push", "-q", &there]), "a push by docker without a name")?;
    refused(docker.run(&["login", "-u", "ann", "-p", "wrong", proxy]), "a login by docker with a wrong password")?;
    docker.run(&["login", "-u", "bob", "-p", "pw", proxy])?;
    refused(docker.run(&["push", "-q", &there]), "a push by bob")?;
    docker.run(&["login", "-u", "ann", "-p", "secret", proxy])?;
    docker.run(&["push", "-q", &there])?;
    docker.run(&["image", "prune", "-af"])?;
    let here = format!("{agent}/lib/docker:1");
    refused(docker.run(&["pull", "-q", &here]), "a pull by docker where it had not logged in")?;
    docker.run(&["login", "-u", "bob", "-p", "pw", agent])?;
    docker.run(&["pull", "-q", &here])?;
    ensure!(docker.run(&["image", "inspect", "-f", "{{.Id}}", &here])?.trim() == id, "docker pulled another image");

    let podman = Podman::new(dir.path());
    podman.podman(&["load", "-q", "-i", &archive])?;
    for (name, client) in
        [("podman", Podman::podman as fn(&Podman, &[&str]) -> Result<String>), ("buildah", Podman::buildah)]
    {
        let (there, here) = (format!("docker://{proxy}/lib/{name}:1"), format!("{agent}/lib/{name}:1"));
        let push = ["push", "-q", tls, &id, &there];
        refused(client(&podman, &push), &format!("a push by {name} without a name"))?;
        let wrong = ["login", tls, "-u", "ann", "-p", "wrong", proxy];
        refused(client(&podman, &wrong), &format!("a login by {name} with a wrong password"))?;
        client(&podman, &["login", tls, "-u", "ann", "-p", "secret", proxy])?;
        client(&podman, &push)?;
        client(&podman, &["logout", proxy])?;

        let fresh = Podman::new(&dir.path().join(name));
        refused(client(&fresh, &["pull", "-q", tls, &here]), &format!("a pull by {name} without a name"))?;
        client(&fresh, &["login", tls, "-u", "bob", "-p", "pw", agent])?;
        let pulled = client(&fresh, &["pull", "-q", tls, &here])?;
        ensure!(id.ends_with(pulled.trim()), "{name} pulled {pulled} for {id}");
    }
    Ok(())
}
