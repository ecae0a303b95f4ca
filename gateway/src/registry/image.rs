//! Images whole: a manifest and everything that it and its manifests name.

use super::{
    content::{Content, Failure},
    name::Repository,
    service::Service,
};
use peer_proto::Digest;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Most manifests of one image, indexes within indexes included.
const MANIFESTS_MAX: usize = 1024;
/// Most blobs of one image.
const BLOBS_MAX: usize = 16_384;

/// What an image is made of, by digest and with sizes in bytes; of every platform that is here.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Image {
    /// Its manifests, indexes included.
    pub(crate) manifests: BTreeMap<Digest, u64>,
    /// Its configurations and layers, as the manifests tell their sizes. Layers kept elsewhere are left out.
    pub(crate) blobs: BTreeMap<Digest, u64>,
}

impl<C: Content> Service<C> {
    /// What an image is made of.
    pub(crate) async fn image(&self, repository: &Repository, manifest: &Digest) -> Result<Image, Failure> {
        let too_large = || Failure::Internal(format!("image has over {MANIFESTS_MAX} manifests or {BLOBS_MAX} blobs"));
        let mut seen = BTreeSet::from([*manifest]);
        let mut queue = VecDeque::from([*manifest]);
        let Image { mut manifests, mut blobs } = Image::default();
        while let Some(digest) = queue.pop_front() {
            let loaded = match self.load(repository, &digest).await {
                // Not every platform of an index need be here.
                Err(Failure::Unknown) if digest != *manifest => continue,
                loaded => loaded?,
            };
            let (bytes, loaded) = loaded;
            manifests.insert(digest, bytes.len() as u64);
            for one in loaded.config.iter().chain(&loaded.layers).filter(|one| !one.is_elsewhere()) {
                if let Ok(digest) = one.digest.parse() {
                    blobs.insert(digest, one.size);
                }
            }
            for digest in loaded.manifests.iter().filter_map(|one| one.digest.parse().ok()) {
                if seen.insert(digest) {
                    queue.push_back(digest);
                }
            }
            if seen.len() > MANIFESTS_MAX || blobs.len() > BLOBS_MAX {
                return Err(too_large());
            }
        }
        Ok(Image { manifests, blobs })
    }
}
