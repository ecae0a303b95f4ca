//! The whole command on real files below a root of its own.

use crate::cli::{Cli, Command};
use clap::Parser as _;
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::Path,
};
use tempfile::TempDir;

const RUNTIMES: [&str; 4] = ["containerd", "docker", "podman", "crio"];
const HUB: &[&str] = &["--upstream", "docker.io", "--upstream", "r.example:5000"];

/// A root with these files.
fn root(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        put(&dir, name, text);
    }
    dir
}

fn put(root: &TempDir, name: &str, text: &str) {
    let path = root.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn get(root: &TempDir, name: &str) -> String {
    fs::read_to_string(root.path().join(name)).unwrap()
}

/// `shoal setup RUNTIME --root ROOT ARGS`.
fn asked(root: &TempDir, runtime: &str, args: &[&str]) -> anyhow::Result<String> {
    let dir = root.path().display().to_string();
    let line = [&["shoal", "setup", runtime, "--root", &dir], args].concat();
    let Command::Setup(command) = Cli::try_parse_from(line)?.command else { panic!("not setup") };
    let mut said = String::new();
    command.carry_out(false, &mut |text| {
        said.push_str(text);
        Ok(())
    })?;
    Ok(said)
}

fn setup(root: &TempDir, runtime: &str, args: &[&str]) -> anyhow::Result<String> {
    let upstreams = if runtime == "docker" { &[] } else { HUB };
    asked(root, runtime, &[&["--yes"], upstreams, args].concat())
}

/// Everything below a folder: folders, texts and permissions.
fn tree(dir: &Path) -> BTreeMap<String, (u32, String)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().display().to_string();
            let mode = path.symlink_metadata().unwrap().mode();
            if path.is_dir() && !path.is_symlink() {
                found.insert(name, (mode, String::new()));
                folders.push(path);
            } else {
                found.insert(name, (mode, fs::read_to_string(&path).unwrap_or_default()));
            }
        }
    }
    found
}

/// What may be on a host before; some of it never together with some of the rest.
const BEFORE: [(&str, &str); 9] = [
    (
        "etc/docker/daemon.json",
        "{\n  \"log-driver\": \"journald\",\n  \"registry-mirrors\": [\"https://m.example\"]\n}",
    ),
    ("etc/containerd/config.toml", "# ours\nversion = 3\n\n[debug]\nlevel = 'info'\n"),
    (
        "etc/containerd/certs.d/docker.io/hosts.toml",
        "server = \"https://registry-1.docker.io\"\n\n[host.\"https://c.example\"]\n",
    ),
    ("etc/containerd/certs.d/r.example:5000/hosts.toml", ""),
    ("etc/containerd/certs.d/_default/hosts.toml", "# nothing"),
    (
        "etc/containers/registries.conf",
        "[[registry]]\nlocation = \"docker.io\"\n[[registry.mirror]]\nlocation = \"c.example\"\n",
    ),
    ("etc/containers/registries.conf.d/50-shoal.conf", "# by hand\n"),
    ("etc/containers/registries.conf.d/90-late.conf", "[[registry]]\nlocation = \"quay.io\"\n"),
    ("etc/shoal/agent.toml", "[listen]\nregistry = \"0.0.0.0:5000\"\n[[upstreams]]\nname = \"docker.io\"\n"),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_second_run_changes_nothing_and_undo_puts_everything_back(
        there in prop::collection::vec(any::<bool>(), BEFORE.len()),
        runtime in prop::sample::select(&RUNTIMES[..]),
        default in any::<bool>(),
        elsewhere in any::<bool>(),
    ) {
        let files: Vec<_> = BEFORE.into_iter().zip(there).filter_map(|(file, there)| there.then_some(file)).collect();
        let root = root(&files);
        let before = tree(root.path());
        let mut args = Vec::new();
        args.extend((default && runtime == "containerd").then_some("--default"));
        args.extend(elsewhere.then_some("--agent=10.0.0.1:16000"));
        setup(&root, runtime, &args).unwrap();
        let after = tree(root.path());
        prop_assert_ne!(&after, &before);
        let again = setup(&root, runtime, &args).unwrap();
        prop_assert!(again.starts_with("nothing to change: ") && again.contains(root.path().to_str().unwrap()), "{}", again);
        prop_assert_eq!(&tree(root.path()), &after);
        // Other arguments leave nothing of the first behind.
        setup(&root, runtime, &["--agent=other.example:1"]).unwrap();
        setup(&root, runtime, &args).unwrap();
        prop_assert_eq!(&tree(root.path()), &after);
        setup(&root, runtime, &["--undo"]).unwrap();
        prop_assert_eq!(&tree(root.path()), &before);
        setup(&root, runtime, &["--undo"]).unwrap();
        prop_assert_eq!(&tree(root.path()), &before);
    }
}

#[test]
fn the_files_are_as_the_runtimes_want_them() {
    let root = root(&[(
        "etc/shoal/agent.toml",
        "[mirror]\nown_names = [\"our.example\"]\n[[upstreams]]\nname = \"docker.io\"\n",
    )]);
    for runtime in ["containerd", "docker", "podman"] {
        asked(&root, runtime, &["--yes"]).unwrap();
    }
    let host = "[host.\"http://127.0.0.1:16000\"]\ncapabilities = [\"pull\", \"resolve\"]\ndial_timeout = \"1s\"\n";
    assert!(get(&root, "etc/containerd/certs.d/docker.io/hosts.toml").ends_with(host));
    assert!(get(&root, "etc/containerd/config.toml").ends_with("config_path = \"/etc/containerd/certs.d\"\n"));
    assert!(get(&root, "etc/docker/daemon.json").contains("\"registry-mirrors\": [\"http://127.0.0.1:16000\"]"));
    assert!(get(&root, "etc/containers/registries.conf.d/50-shoal.conf").contains("\"127.0.0.1:16000/docker.io\""));
    assert!(root.path().join("etc/containerd/certs.d/our.example/hosts.toml").exists());
    // CRI-O reads what podman reads.
    let before = tree(root.path());
    asked(&root, "crio", &["--yes"]).unwrap();
    assert_eq!(tree(root.path()), before);
}

#[test]
fn an_agent_with_tls_is_trusted_by_every_runtime() {
    let pem = "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n";
    let root = root(&[("etc/shoal/ca.pem", pem)]);
    let args = ["--agent", "a.example:16000", "--ca", "/etc/shoal/ca.pem"];
    for runtime in ["containerd", "docker", "podman"] {
        setup(&root, runtime, &args).unwrap();
    }
    assert!(get(&root, "etc/containerd/certs.d/docker.io/hosts.toml").contains("ca = \"/etc/shoal/ca.pem\""));
    assert_eq!(get(&root, "etc/docker/certs.d/a.example:16000/ca.crt"), pem);
    assert_eq!(get(&root, "etc/containers/certs.d/a.example:16000/ca.crt"), pem);
    assert!(!get(&root, "etc/docker/daemon.json").contains("insecure"));
    for (ca, why) in [("ca.pem", "whole path"), ("/none.pem", "not there")] {
        let error = setup(&root, "docker", &["--ca", ca]).unwrap_err();
        assert!(format!("{error:#}").contains(why), "{error:#}");
    }
}

#[test]
fn nothing_is_written_unasked() {
    let root = root(&[]);
    let said = asked(&root, "docker", &["--dry-run"]).unwrap();
    let at = root.path().display();
    assert_eq!(
        said,
        format!(
            "--- /dev/null\n+++ {at}/etc/docker/daemon.json\n@@ -0,0 +1,3 @@\n+{{\n\
             +  \"registry-mirrors\": [\"http://127.0.0.1:16000\"]\n+}}\n"
        )
    );
    // Tests have no terminal that anybody would answer on, or nobody who does.
    if !std::io::IsTerminal::is_terminal(&std::io::stdin()) {
        let error = asked(&root, "docker", &[]).unwrap_err();
        assert!(error.to_string().contains("--yes"), "{error}");
    }
    assert!(tree(root.path()).is_empty());
    let error = asked(&root, "podman", &["--yes"]).unwrap_err();
    assert!(error.to_string().contains("name one with --upstream"), "{error}");
    let error = asked(&root, "podman", &["--yes", "--upstream", "a/b"]).unwrap_err();
    assert!(error.to_string().contains("is not a registry's host"), "{error}");
}

#[test]
fn a_file_that_is_not_understood_stops_all_before_the_first_byte() {
    for (runtime, name, text, why) in [
        ("docker", "etc/docker/daemon.json", "{,}", "is not a JSON object"),
        ("containerd", "etc/containerd/config.toml", "version = 7\n", "versions 1 to 4"),
        ("containerd", "etc/containerd/certs.d/r.example_5000_/hosts.toml", "host = [", "is not TOML"),
        ("containerd", "etc/containerd/certs.d/docker.io/ca.crt", "pem", "has certificates"),
        ("podman", "etc/containers/registries.conf", "[registries.search]\nregistries = []\n", "version 1"),
        ("crio", "etc/containers/registries.conf.d/10.conf", "[[registry]", "is not TOML"),
        ("docker", "etc/shoal/setup/docker.json", "{", "record of an earlier setup"),
        ("docker", "etc/shoal/agent.toml", "port = 1", "unknown field"),
        ("docker", "etc/docker/daemon.json.before-shoal", "old", ""),
    ] {
        let root = root(&[(name, text), ("etc/docker/other.json", "")]);
        if why.is_empty() {
            put(&root, "etc/docker/daemon.json", "{}");
        }
        let before = tree(root.path());
        let error = format!("{:#}", setup(&root, runtime, &[]).unwrap_err());
        assert!(error.contains(why) && error.contains(&root.path().display().to_string()), "{error}");
        assert_eq!(tree(root.path()), before, "{error}");
    }
}

#[test]
fn what_others_write_is_kept_and_where_they_wrote_over_us_undo_asks() {
    let root = root(&[("etc/docker/daemon.json", "{\n  \"debug\": true,\n  \"ipv6\": true\n}\n")]);
    let (daemon, kept) = ("etc/docker/daemon.json", "etc/docker/daemon.json.before-shoal");
    let edit = |from: &str, to: &str| put(&root, daemon, &get(&root, daemon).replace(from, to));
    setup(&root, "docker", &[]).unwrap();
    edit("\"ipv6\": true", "\"ipv6\": false,\n  \"live-restore\": true");
    setup(&root, "docker", &["--agent=127.0.0.1:5"]).unwrap();
    let now = get(&root, daemon);
    assert!(now.contains("[\"http://127.0.0.1:5\"]") && now.contains("live-restore"), "{now}");
    assert_eq!(get(&root, kept), "{\n  \"debug\": true,\n  \"ipv6\": true\n}\n");

    edit("http://127.0.0.1:5", "http://127.0.0.1:6");
    let before = tree(root.path());
    for args in [&["--undo"][..], &[]] {
        let error = format!("{:#}", setup(&root, "docker", args).unwrap_err());
        assert!(error.contains("--force") && error.contains("changed by others"), "{error}");
        assert_eq!(tree(root.path()), before);
    }
    edit("http://127.0.0.1:6", "http://127.0.0.1:5");
    setup(&root, "docker", &["--undo"]).unwrap();
    let wanted = "{\n  \"debug\": true,\n  \"ipv6\": false,\n  \"live-restore\": true\n}\n";
    assert_eq!(get(&root, daemon), wanted);
    assert!(root.path().join(kept).exists(), "what was put back is not the backup");
}

#[test]
fn force_goes_on_from_the_file_as_it_is_and_back_to_the_file_as_it_was() {
    let before = "{\n  \"registry-mirrors\": [\"https://m.example\"]\n}\n";
    let root = root(&[("etc/docker/daemon.json", before)]);
    setup(&root, "docker", &[]).unwrap();
    put(&root, "etc/docker/daemon.json", "{\"registry-mirrors\": [\"https://n.example\"]}");
    setup(&root, "docker", &["--force"]).unwrap();
    let both = "{\"registry-mirrors\": [\"http://127.0.0.1:16000\", \"https://n.example\"]}";
    assert_eq!(get(&root, "etc/docker/daemon.json"), both);
    put(&root, "etc/docker/daemon.json", "{\"registry-mirrors\": []}");
    setup(&root, "docker", &["--undo", "--force"]).unwrap();
    assert_eq!(get(&root, "etc/docker/daemon.json"), "{\"registry-mirrors\": [\"https://n.example\"]}");
}

#[test]
fn a_run_that_broke_off_is_finished_or_taken_back_by_the_next() {
    let root = root(&[("etc/containerd/config.toml", "version = 2\n")]);
    let before = tree(root.path());
    setup(&root, "containerd", &[]).unwrap();
    let after = tree(root.path());
    let half = |root: &TempDir| {
        put(root, "etc/containerd/config.toml", "version = 2\n");
        fs::remove_file(root.path().join("etc/containerd/certs.d/docker.io/hosts.toml")).unwrap();
    };
    half(&root);
    setup(&root, "containerd", &[]).unwrap();
    assert_eq!(tree(root.path()), after);
    half(&root);
    setup(&root, "containerd", &["--undo"]).unwrap();
    assert_eq!(tree(root.path()), before);
}

#[test]
fn what_is_no_longer_named_is_taken_back() {
    let root = root(&[]);
    setup(&root, "containerd", &["--default"]).unwrap();
    asked(&root, "containerd", &["--yes", "--upstream", "ghcr.io"]).unwrap();
    assert_eq!(fs::read_dir(root.path().join("etc/containerd/certs.d")).unwrap().count(), 1);
    assert!(get(&root, "etc/containerd/certs.d/ghcr.io/hosts.toml").contains("127.0.0.1:16000"));
}

#[test]
fn containerd_is_told_where_it_looks() {
    // The import has the last word on the plugin, the folder that is there is the registry's.
    let import = "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/a:/b'\n";
    let root = root(&[
        ("etc/containerd/config.toml", "version = 3\nimports = ['conf.d/*.toml']\n"),
        ("etc/containerd/conf.d/cri.toml", import),
        ("b/docker.io/hosts.toml", "server = \"https://x.example\"\n"),
    ]);
    setup(&root, "containerd", &[]).unwrap();
    assert_eq!(get(&root, "etc/containerd/conf.d/cri.toml"), import);
    assert_eq!(get(&root, "etc/containerd/config.toml"), "version = 3\nimports = ['conf.d/*.toml']\n");
    assert!(get(&root, "b/docker.io/hosts.toml").starts_with("server = \"https://x.example\"\n\n[host.\"http"));
    assert!(get(&root, "a/r.example_5000_/hosts.toml").contains("\n[host.\"http"));
    setup(&root, "containerd", &["--undo"]).unwrap();

    setup(&root, "containerd", &["--certs-dir", "/etc/docker/certs.d"]).unwrap();
    assert!(get(&root, "etc/docker/certs.d/docker.io/hosts.toml").contains("\n[host.\"http"));
}

#[test]
fn links_are_written_through_and_permissions_kept() {
    let root = root(&[("usr/lib/docker/daemon.json", "{}\n")]);
    let target = root.path().join("usr/lib/docker/daemon.json");
    fs::set_permissions(&target, fs::Permissions::from_mode(0o640)).unwrap();
    fs::create_dir_all(root.path().join("etc/docker")).unwrap();
    symlink("/usr/lib/docker/daemon.json", root.path().join("etc/docker/daemon.json")).unwrap();
    let before = tree(root.path());
    setup(&root, "docker", &[]).unwrap();
    assert!(fs::read_to_string(&target).unwrap().contains("registry-mirrors"));
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(&target), mode(&root.path().join("etc/docker/daemon.json.before-shoal"))), (0o640, 0o640));
    assert_eq!(mode(&root.path().join("etc/shoal/setup/docker.json")), 0o600);
    setup(&root, "docker", &["--undo"]).unwrap();
    assert_eq!(tree(root.path()), before);
}
