//! Images whole: a manifest and everything that it and its manifests name.

use super::{
    content::{Content, Failure},
    name::Repository,
    service::Service,
};
use peer_proto::Digest;
use std::collections::{BTreeMap, VecDeque};

/// Most manifests of one image, indexes within indexes included.
const MANIFESTS_MAX: usize = 1024;
/// Most blobs of one image.
const BLOBS_MAX: usize = 16_384;

impl<C: Content> Service<C> {
    /// The configurations and layers of an image by digest, with their sizes as the manifests tell them; of every platform that
    /// is here. Layers kept elsewhere are left out.
    pub(crate) async fn image_blobs(
        &self,
        repository: &Repository,
        manifest: &Digest,
    ) -> Result<BTreeMap<Digest, u64>, Failure> {
        let too_large = || Failure::Internal(format!("image has over {MANIFESTS_MAX} manifests or {BLOBS_MAX} blobs"));
        let mut manifests = vec![*manifest];
        let mut queue = VecDeque::from([*manifest]);
        let mut blobs = BTreeMap::new();
        while let Some(digest) = queue.pop_front() {
            let loaded = match self.load(repository, &digest).await {
                // Not every platform of an index need be here.
                Err(Failure::Unknown) if digest != *manifest => continue,
                loaded => loaded?.1,
            };
            for one in loaded.config.iter().chain(&loaded.layers).filter(|one| !one.is_elsewhere()) {
                if let Ok(digest) = one.digest.parse() {
                    blobs.insert(digest, one.size);
                }
            }
            for digest in loaded.manifests.iter().filter_map(|one| one.digest.parse().ok()) {
                if !manifests.contains(&digest) {
                    manifests.push(digest);
                    queue.push_back(digest);
                }
            }
            if manifests.len() > MANIFESTS_MAX || blobs.len() > BLOBS_MAX {
                return Err(too_large());
            }
        }
        Ok(blobs)
    }
}
