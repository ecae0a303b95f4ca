//! The rules of ARCHITECTURE.md that a program can check.

#![allow(clippy::unwrap_used, reason = "a test's helpers")]

use std::{collections::BTreeMap, fs, path::Path, process::Command};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Every Rust file of a workspace member, with its text.
fn sources(member: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(member).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push((
                    path.strip_prefix(root()).unwrap().display().to_string(),
                    fs::read_to_string(&path).unwrap(),
                ));
            }
        }
    }
    found
}

#[test]
fn crates_depend_on_each_other_as_drawn() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let out = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let names: Vec<_> = packages.iter().map(|package| package["name"].as_str().unwrap()).collect();
    let mut drawn: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    drawn.insert("peer-proto", vec![]);
    drawn.insert("engine", vec!["peer-proto"]);
    drawn.insert("backends", vec![]);
    drawn.insert("gateway", vec!["backends", "engine", "peer-proto"]);
    drawn.insert("shoal-bench", vec!["engine", "peer-proto"]);
    drawn.insert("shoal-fuzz", vec!["gateway", "peer-proto"]);
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let dependencies = package["dependencies"].as_array().unwrap();
        let mut ours: Vec<_> = dependencies
            .iter()
            .filter(|dependency| dependency["kind"].is_null())
            .filter_map(|dependency| names.iter().find(|other| **other == dependency["name"]).copied())
            .collect();
        ours.sort_unstable();
        assert_eq!(drawn.get(name), Some(&ours), "{name}");
    }
}

#[test]
fn unsafe_code_has_one_place() {
    for member in ["peer-proto", "backends", "gateway", "bench"] {
        let entry = if member == "bench" { "main.rs" } else { "lib.rs" };
        let text = fs::read_to_string(root().join(member).join("src").join(entry)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{member} does not forbid unsafe code");
    }
    for (path, text) in sources("engine") {
        let unsafe_lines = text.lines().filter(|line| {
            let code = line.split("//").next().unwrap_or("");
            code.contains("unsafe {") || code.contains("unsafe impl") || code.contains("unsafe fn")
        });
        assert!(path.starts_with("engine/src/raw") || unsafe_lines.count() == 0, "{path} has unsafe code");
    }
}

#[test]
fn the_cores_have_no_clock_and_no_io() {
    let text = fs::read_to_string(root().join("peer-proto/src/lib.rs")).unwrap();
    assert!(text.contains("#![no_std]"));
    for (path, text) in sources("peer-proto") {
        let code = text.split("#[cfg(test)]").next().unwrap_or("");
        assert!(!code.contains("extern crate std"), "{path} asks for std");
    }
}

#[test]
fn the_engine_knows_no_http_and_backends_know_no_digests() {
    for (path, text) in sources("engine") {
        assert!(!text.contains("hyper") && !text.contains("manifest_"), "{path} speaks of HTTP or manifests");
    }
    for (path, text) in sources("backends") {
        assert!(!text.contains("Digest"), "{path} speaks of digests");
    }
}

#[test]
fn nothing_is_left_to_do() {
    for member in ["peer-proto", "engine", "backends", "gateway", "bench"] {
        for (path, text) in sources(member) {
            for word in ["todo!", "unimplemented!", "FIXME", "TODO: ", "XXX"] {
                assert!(!text.contains(word), "{path} has {word}");
            }
        }
    }
}
