//! The whole system with real clients: docker, podman, buildah, skopeo, containerd, crane, regctl, oras and those of Python and
//! Rust push to a proxy and pull from agents.
//!
//! These tests need root, Debian's docker.io, podman, buildah, skopeo and curl, and what `ci/clients` installs into the folder
//! that `SHOAL_TOOLS` names; `ci/test` sees to it and runs all of this with the release build. Each test starts Shoal on free
//! ports below a folder of its own.

mod access;
mod clients;
mod cluster;
mod conformance;
mod containerd;
mod copiers;
mod cut;
mod faults;
mod image;
mod limits;
mod mirror;
mod oci_client;
mod ports;
mod preheat;
mod python;
mod setup;
mod tools;
