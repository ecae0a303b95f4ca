//! Manifests: what kind one is, what it needs, what it refers to. The bytes themselves are kept exactly as they were sent.

use peer_proto::Digest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Longest manifest, bytes. Clients refuse longer ones.
pub const LEN_MAX: usize = 4 << 20;
/// Most things one manifest may name: configuration, layers and manifests.
pub const REFERENCES_MAX: usize = 4096;

/// Deepest nesting of a manifest's JSON; what we skip, a client may recurse into.
pub const DEPTH_MAX: usize = 64;

/// The kinds of manifest there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Docker's image manifest, version 2 schema 2.
    DockerManifest,
    /// Docker's list of manifests.
    DockerList,
    /// OCI's image manifest, also of artifacts.
    OciManifest,
    /// OCI's index of manifests.
    OciIndex,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::DockerManifest, Self::DockerList, Self::OciManifest, Self::OciIndex];

    /// Its media type.
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::DockerManifest => "application/vnd.docker.distribution.manifest.v2+json",
            Self::DockerList => "application/vnd.docker.distribution.manifest.list.v2+json",
            Self::OciManifest => "application/vnd.oci.image.manifest.v1+json",
            Self::OciIndex => "application/vnd.oci.image.index.v1+json",
        }
    }

    /// The kind with this media type; parameters and case aside.
    pub fn from_media_type(text: &str) -> Option<Self> {
        let text = text.split(';').next().unwrap_or("").trim();
        Self::ALL.into_iter().find(|kind| kind.media_type().eq_ignore_ascii_case(text))
    }

    /// Whether it names manifests and no layers.
    pub const fn is_index(self) -> bool {
        matches!(self, Self::DockerList | Self::OciIndex)
    }
}

/// Why bytes are not a manifest we take.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON, or a field of the wrong type.
    #[error("manifest is not valid JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Nested deeper than [`DEPTH_MAX`].
    #[error("manifest is nested deeper than {DEPTH_MAX}")]
    Deep,
    /// Schema 1 and other versions.
    #[error("manifest has schema version {0:?}, expected 2")]
    Schema(Option<u64>),
    /// A media type that is none of ours.
    #[error("manifest type {0:?} is not known")]
    MediaType(String),
    /// What the header says is not what the body says.
    #[error("content type {header:?} is not the manifest's {body:?}")]
    Disagree {
        /// By the `Content-Type`.
        header: String,
        /// By the body.
        body: &'static str,
    },
    /// Layers and manifests in one body could be read as either by different clients.
    #[error("manifest has layers or a configuration as well as manifests")]
    Both,
    /// Neither layers nor manifests, and no media type.
    #[error("manifest has neither a media type nor layers nor manifests")]
    Neither,
    /// An image without a configuration.
    #[error("manifest has no config")]
    NoConfig,
    /// More than [`REFERENCES_MAX`].
    #[error("manifest names {0} things, at most {REFERENCES_MAX} are taken")]
    TooMany(usize),
}

/// Something a manifest names: its type, its digest, its bytes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Its media type.
    pub media_type: String,
    /// Its digest, with any algorithm.
    pub digest: String,
    /// Its bytes.
    pub size: u64,
    /// What kind of artifact it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Notes of its maker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// Other places that have it.
    #[serde(default, skip_serializing)]
    urls: Option<Vec<String>>,
}

impl Descriptor {
    /// Whether a registry need not have it: a layer kept elsewhere, for its licence.
    pub fn is_elsewhere(&self) -> bool {
        let foreign = self.media_type.contains(".nondistributable.") || self.media_type.contains(".foreign.");
        foreign || self.urls.as_ref().is_some_and(|urls| !urls.is_empty())
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: Option<u64>,
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    subject: Option<Descriptor>,
    annotations: Option<BTreeMap<String, String>>,
}

/// A manifest as far as a registry reads it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// Its kind.
    pub kind: Kind,
    /// What kind of artifact it says to be; of an image's configuration where it does not say.
    pub artifact_type: Option<String>,
    /// An image's configuration.
    pub config: Option<Descriptor>,
    /// An image's layers.
    pub layers: Vec<Descriptor>,
    /// An index's manifests.
    pub manifests: Vec<Descriptor>,
    /// The manifest that this one is about.
    pub subject: Option<Descriptor>,
    /// Notes of its maker.
    pub annotations: Option<BTreeMap<String, String>>,
}

impl Manifest {
    /// Reads a manifest. Its kind is what it says, or follows from its shape.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        if depth(bytes) > DEPTH_MAX {
            return Err(Error::Deep);
        }
        let raw: Raw = serde_json::from_slice(bytes)?;
        if raw.schema_version != Some(2) {
            return Err(Error::Schema(raw.schema_version));
        }
        let image = raw.config.is_some() || raw.layers.is_some();
        let index = raw.manifests.is_some();
        if image && index {
            return Err(Error::Both);
        }
        let kind = match raw.media_type {
            Some(text) => {
                Kind::from_media_type(&text).filter(|kind| kind.media_type() == text).ok_or(Error::MediaType(text))?
            }
            None if index => Kind::OciIndex,
            None if image => Kind::OciManifest,
            None => return Err(Error::Neither),
        };
        if (kind.is_index() && image) || (!kind.is_index() && index) {
            return Err(Error::Both);
        }
        if !kind.is_index() && raw.config.is_none() {
            return Err(Error::NoConfig);
        }
        let manifest = Self {
            kind,
            artifact_type: raw.artifact_type.filter(|text| !text.is_empty()),
            config: raw.config,
            layers: raw.layers.unwrap_or_default(),
            manifests: raw.manifests.unwrap_or_default(),
            subject: raw.subject,
            annotations: raw.annotations,
        };
        let named = manifest.references().count();
        if named > REFERENCES_MAX { Err(Error::TooMany(named)) } else { Ok(manifest) }
    }

    /// Reads a manifest that came with a `Content-Type`. Without one, or with one that says nothing, the body decides.
    pub fn parse_typed(bytes: &[u8], content_type: Option<&str>) -> Result<Self, Error> {
        let header = content_type.map(|text| text.split(';').next().unwrap_or("").trim());
        let header = header.filter(|text| !matches!(*text, "" | "application/json" | "application/octet-stream"));
        if let Some(unknown) = header.filter(|text| Kind::from_media_type(text).is_none()) {
            return Err(Error::MediaType(unknown.to_owned()));
        }
        let manifest = Self::parse(bytes)?;
        match header {
            Some(header) if Kind::from_media_type(header) != Some(manifest.kind) => {
                Err(Error::Disagree { header: header.to_owned(), body: manifest.kind.media_type() })
            }
            _ => Ok(manifest),
        }
    }

    /// Everything it needs to be whole: configuration, layers, manifests. Not its subject.
    pub fn references(&self) -> impl Iterator<Item = &Descriptor> {
        self.config.iter().chain(&self.layers).chain(&self.manifests)
    }

    /// How a list of referrers describes it.
    pub fn descriptor(&self, digest: &Digest, size: u64) -> Descriptor {
        let of_config =
            || (!self.kind.is_index()).then(|| self.config.as_ref().map(|config| config.media_type.clone()));
        Descriptor {
            media_type: self.kind.media_type().to_owned(),
            digest: digest.to_string(),
            size,
            artifact_type: self.artifact_type.clone().or_else(|| of_config().flatten()),
            annotations: self.annotations.clone(),
            urls: None,
        }
    }
}

/// The deepest nesting of brackets outside of strings.
fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn descriptor(media_type: &str) -> serde_json::Value {
        json!({"mediaType": media_type, "digest": format!("sha256:{}", "ab".repeat(32)), "size": 7})
    }

    fn parse(value: &serde_json::Value) -> Result<Manifest, Error> {
        Manifest::parse(&serde_json::to_vec(value).unwrap())
    }

    const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    #[test]
    fn kinds_are_said_or_follow_from_the_shape() {
        let (config, layer) = (descriptor(CONFIG), descriptor(LAYER));
        for (kind, body) in [
            (Kind::OciManifest, json!({"schemaVersion": 2, "config": config, "layers": [layer]})),
            (Kind::OciManifest, json!({"schemaVersion": 2, "config": config, "layers": []})),
            (Kind::OciManifest, json!({"schemaVersion": 2, "config": config, "layers": null, "manifests": null})),
            (
                Kind::OciManifest,
                json!({"schemaVersion": 2, "mediaType": Kind::OciManifest.media_type(), "config": config}),
            ),
            (
                Kind::DockerManifest,
                json!({"schemaVersion": 2, "mediaType": Kind::DockerManifest.media_type(), "config": config, "layers": []}),
            ),
            (Kind::OciIndex, json!({"schemaVersion": 2, "manifests": []})),
            (Kind::OciIndex, json!({"schemaVersion": 2, "mediaType": Kind::OciIndex.media_type()})),
            (
                Kind::DockerList,
                json!({"schemaVersion": 2, "mediaType": Kind::DockerList.media_type(), "manifests": [layer], "more": {"x": 1}}),
            ),
        ] {
            assert_eq!(parse(&body).unwrap().kind, kind, "{body}");
        }
    }

    #[test]
    fn what_two_clients_could_read_differently_is_refused() {
        let (config, layer) = (descriptor(CONFIG), descriptor(LAYER));
        for (why, body) in [
            ("neither", json!({"schemaVersion": 2})),
            ("neither", json!({"schemaVersion": 2, "blobs": []})),
            ("schema version Some(1)", json!({"schemaVersion": 1, "config": config, "layers": []})),
            ("schema version None", json!({"config": config, "layers": []})),
            ("as well as", json!({"schemaVersion": 2, "config": config, "layers": [], "manifests": []})),
            ("as well as", json!({"schemaVersion": 2, "layers": [], "manifests": []})),
            ("as well as", json!({"schemaVersion": 2, "mediaType": Kind::OciIndex.media_type(), "config": config})),
            ("as well as", json!({"schemaVersion": 2, "mediaType": Kind::OciManifest.media_type(), "manifests": []})),
            ("no config", json!({"schemaVersion": 2, "layers": [layer]})),
            ("not known", json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.artifact.manifest.v1+json"})),
            (
                "not known",
                json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json; x=1", "manifests": []}),
            ),
            ("not valid JSON", json!({"schemaVersion": "2"})),
            ("not valid JSON", json!({"schemaVersion": 2, "config": config, "layers": [{}]})),
            ("not valid JSON", json!({"schemaVersion": 2, "config": config, "layers": {"0": layer}})),
            ("not valid JSON", json!([])),
            ("4097 things", json!({"schemaVersion": 2, "manifests": vec![layer.clone(); REFERENCES_MAX + 1]})),
        ] {
            let error = parse(&body).unwrap_err().to_string();
            assert!(error.contains(why), "{body}: {error}");
        }
        let twice = br#"{"schemaVersion":2,"manifests":[],"manifests":[]}"#;
        assert!(matches!(Manifest::parse(twice), Err(Error::Json(_))));
        let nested =
            |n: usize| format!(r#"{{"schemaVersion":2,"manifests":[],"x\"[[":{}{}}}"#, "[".repeat(n), "]".repeat(n));
        assert!(Manifest::parse(nested(DEPTH_MAX - 1).as_bytes()).is_ok());
        assert!(matches!(Manifest::parse(nested(DEPTH_MAX).as_bytes()), Err(Error::Deep)));
    }

    #[test]
    fn the_header_must_agree() {
        let body = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": []})).unwrap();
        for header in
            [None, Some(""), Some("application/json"), Some("application/vnd.oci.image.index.v1+json; charset=utf-8")]
        {
            assert_eq!(Manifest::parse_typed(&body, header).unwrap().kind, Kind::OciIndex, "{header:?}");
        }
        let parsed = |header| Manifest::parse_typed(&body, Some(header));
        assert!(matches!(parsed(Kind::DockerList.media_type()), Err(Error::Disagree { .. })));
        assert!(matches!(
            parsed("application/vnd.docker.distribution.manifest.v1+prettyjws"),
            Err(Error::MediaType(_))
        ));
        assert!(matches!(parsed("text/plain"), Err(Error::MediaType(_))));
    }

    #[test]
    fn referrers_are_described_by_type_and_notes() {
        let subject = descriptor(Kind::OciManifest.media_type());
        let digest: Digest = format!("sha256:{}", "cd".repeat(32)).parse().unwrap();
        let with = |artifact_type: serde_json::Value| {
            let body = json!({
                "schemaVersion": 2, "artifactType": artifact_type, "config": descriptor(CONFIG), "layers": [],
                "subject": subject, "annotations": {"k": "v"},
            });
            parse(&body).unwrap()
        };
        let plain = with(json!(null));
        assert_eq!(plain.references().count(), 1, "the subject is no part");
        assert_eq!(plain.subject.as_ref().unwrap().size, 7);
        let described = serde_json::to_value(plain.descriptor(&digest, 99)).unwrap();
        let expected = json!({
            "mediaType": Kind::OciManifest.media_type(), "digest": digest.to_string(), "size": 99,
            "artifactType": CONFIG, "annotations": {"k": "v"},
        });
        assert_eq!(described, expected);
        assert_eq!(with(json!("a/b")).descriptor(&digest, 1).artifact_type.as_deref(), Some("a/b"));
        let index = parse(&json!({"schemaVersion": 2, "manifests": [], "subject": subject})).unwrap();
        assert_eq!(index.descriptor(&digest, 1).artifact_type, None);
    }

    #[test]
    fn layers_kept_elsewhere_are_told_apart() {
        let read = |value| serde_json::from_value::<Descriptor>(value).unwrap();
        assert!(!read(descriptor(LAYER)).is_elsewhere());
        assert!(read(descriptor("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip")).is_elsewhere());
        assert!(read(descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")).is_elsewhere());
        let mut with_urls = descriptor(LAYER);
        with_urls["urls"] = json!(["https://example.com/layer"]);
        assert!(read(with_urls.clone()).is_elsewhere());
        with_urls["urls"] = json!([]);
        assert!(!read(with_urls).is_elsewhere());
    }
}
