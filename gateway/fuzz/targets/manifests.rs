//! Manifests and indexes, typed and not.
#![no_main]

use gateway::registry::manifest::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let types = [
        None,
        Some("application/vnd.oci.image.manifest.v1+json"),
        Some("application/vnd.oci.image.index.v1+json"),
        Some("application/vnd.docker.distribution.manifest.v2+json"),
    ];
    for content_type in types {
        if let Ok(manifest) = Manifest::parse_typed(data, content_type) {
            assert!(manifest.references().count() <= data.len());
        }
    }
});
