//! OCI images made for the tests: layers of random bytes in uncompressed tars, written as an OCI image layout.

use crate::tools::run;
use anyhow::{Context, Result, ensure};
use peer_proto::{Algorithm, Digest, LayoutBuilder};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// An image on disk, as `skopeo` and `podman` read it: `oci:DIR:t`.
pub(crate) struct Image {
    pub(crate) dir: PathBuf,
    pub(crate) manifest: Digest,
    pub(crate) layers: Vec<(Digest, u64)>,
}

impl Image {
    /// An image with a layer for each of `sizes` (bytes of its one file); the same `seed` gives the same image.
    pub(crate) fn make(dir: &Path, sizes: &[u64], seed: u64) -> Result<Self> {
        fs::create_dir_all(dir.join("blobs/sha256"))?;
        let mut random = Random(seed | 1);
        let mut layers = Vec::new();
        for (i, size) in sizes.iter().enumerate() {
            layers.push(layer(dir, &format!("layer{i}.bin"), *size, &mut random)?);
        }
        let diffs: Vec<_> = layers.iter().map(|(digest, _)| digest.to_string()).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diffs},
        });
        let (config, config_len) = json(dir, &config)?;
        let listed = layers.iter().map(|(digest, size)| {
            serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest.to_string(), "size": size,
            })
        });
        let listed: Vec<_> = listed.collect();
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let (manifest, manifest_len) = json(
            dir,
            &serde_json::json!({
                "schemaVersion": 2, "mediaType": media_type, "layers": listed,
                "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.to_string(), "size": config_len},
            }),
        )?;
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
            "mediaType": media_type, "digest": manifest.to_string(), "size": manifest_len,
            "annotations": {"org.opencontainers.image.ref.name": "t"},
        }]});
        fs::write(dir.join("index.json"), index.to_string())?;
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(Self { dir: dir.to_owned(), manifest, layers })
    }

    /// The image as skopeo names it.
    pub(crate) fn oci(&self) -> String {
        format!("oci:{}:t", self.dir.display())
    }

    /// The image as an archive that docker and podman load, named `name`: its file, beside the image's folder.
    pub(crate) fn archive(&self, name: &str) -> Result<String> {
        let file = self.dir.with_extension("archive").display().to_string();
        run("skopeo", &["copy", "-q", &self.oci(), &format!("docker-archive:{file}:{name}")])?;
        Ok(file)
    }

    /// Bytes of all its layers.
    pub(crate) fn size(&self) -> u64 {
        self.layers.iter().map(|(_, size)| size).sum()
    }

    /// An error where the OCI layout (or anything with its folder `blobs`) in `dir` has not every byte of the image.
    pub(crate) fn compare(&self, dir: &Path) -> Result<()> {
        for digest in self.layers.iter().map(|(digest, _)| digest).chain([&self.manifest]) {
            let pulled = blob(dir, digest);
            let bytes = fs::read(&pulled).with_context(|| pulled.display().to_string())?;
            ensure!(bytes == fs::read(self.blob(digest))?, "{} differs from what was pushed", pulled.display());
        }
        Ok(())
    }

    /// The file of a blob.
    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        blob(&self.dir, digest)
    }
}

/// The file of a blob in an OCI layout (or in skopeo's `oci:` copy of one).
pub(crate) fn blob(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join("blobs").join(digest.algorithm().name()).join(digest.hex())
}

fn json(dir: &Path, value: &serde_json::Value) -> Result<(Digest, u64)> {
    let bytes = value.to_string();
    let mut hash = LayoutBuilder::new(Algorithm::Sha256);
    hash.update(bytes.as_bytes())?;
    let digest = *hash.finish().digest();
    fs::write(blob(dir, &digest), &bytes)?;
    Ok((digest, bytes.len() as u64))
}

fn layer(dir: &Path, name: &str, size: u64, random: &mut Random) -> Result<(Digest, u64)> {
    let temporary = dir.join("layer.tmp");
    let mut out = BufWriter::with_capacity(1 << 20, File::create(&temporary)?);
    let mut hash = LayoutBuilder::new(Algorithm::Sha256);
    let mut put = |bytes: &[u8]| -> Result<()> {
        hash.update(bytes)?;
        Ok(out.write_all(bytes)?)
    };
    put(&tar_header(name, size))?;
    let mut chunk = vec![0; 1 << 20];
    let mut left = size;
    while left > 0 {
        chunk.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
        let take = left.min(chunk.len() as u64);
        put(&chunk[..usize::try_from(take)?])?;
        left -= take;
    }
    let padding = (512 - size % 512) % 512;
    put(&vec![0; usize::try_from(padding)? + 1024])?;
    out.flush()?;
    let digest = *hash.finish().digest();
    fs::rename(temporary, blob(dir, &digest))?;
    Ok((digest, 512 + size + padding + 1024))
}

/// A ustar header of a regular file.
fn tar_header(name: &str, size: u64) -> [u8; 512] {
    let mut header = [0; 512];
    let mut set = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    set(0, name);
    set(100, "0000644");
    set(108, "0000000");
    set(116, "0000000");
    set(124, &format!("{size:011o}"));
    set(136, "00000000000");
    set(148, "        ");
    set(156, "0");
    set(257, "ustar");
    set(263, "00");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// xorshift64: cheap, incompressible enough, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
