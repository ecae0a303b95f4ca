//! The whole system with real clients: docker, podman, buildah and skopeo push to a proxy and pull from agents.
//!
//! These tests need root, Debian's docker.io, podman, buildah, skopeo and curl, and the distribution specification's conformance
//! suite; `ci/test` installs them and runs all of this with the release build. Each test starts Shoal on free ports below a
//! folder of its own.

mod access;
mod clients;
mod cluster;
mod conformance;
mod faults;
mod image;
mod mirror;
mod ports;
mod tools;
