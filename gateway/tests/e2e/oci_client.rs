//! The registry client of Rust, the common one that pushes by chunks with `Content-Range`.

use crate::{
    access::{Named, named},
    tools::refused,
};
use anyhow::{Context, Result, bail, ensure};
use futures_util::TryStreamExt;
use oci_client::{
    Client, Reference,
    client::{BlobResponse, ClientConfig, ClientProtocol, Config, ImageLayer},
    manifest::{IMAGE_CONFIG_MEDIA_TYPE, IMAGE_LAYER_MEDIA_TYPE},
    secrets::RegistryAuth,
};
use std::fs;

#[test]
#[ignore = "needs root and real clients: run ci/test"]
fn oci_client_pushes_by_chunks_and_pulls_wholes_and_parts_by_name() -> Result<()> {
    // It makes a TLS client also where it speaks none, and wants to be told with which ciphers.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let Named { cluster, image, dir: _dir } = named("http")?;
    let layer = fs::read(image.blob(&image.layers[0].0))?;
    let digest = image.layers[0].0.to_string();
    let at = |host: &str, repository: &str| Reference::with_tag(host.into(), repository.into(), "1".into());
    let (proxy, agent) = (&cluster.proxy.addr, &cluster.agents[0].addr);
    let there = at(proxy, "lib/rust");
    let here = at(agent, "lib/rust");
    let name = |name: &str, password: &str| RegistryAuth::Basic(name.into(), password.into());
    // What a client once learned of a registry it keeps: somebody else is another client.
    let client = || Client::new(ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() });
    let layers = [ImageLayer::new(layer.clone(), IMAGE_LAYER_MEDIA_TYPE.into(), None)];
    let config = || Config::new(&b"{}"[..], IMAGE_CONFIG_MEDIA_TYPE.into(), None);
    let kinds = || vec![IMAGE_LAYER_MEDIA_TYPE];

    tokio::runtime::Runtime::new()?.block_on(async {
        for stranger in [RegistryAuth::Anonymous, name("bob", "pw"), name("ann", "wrong")] {
            let pushed = client().push(&there, &layers, config(), &stranger, None).await;
            refused(pushed.map_err(Into::into), &format!("a push by {stranger:?}"))?;
        }
        let ann = client();
        ann.push(&there, &layers, config(), &name("ann", "secret"), None).await.context("push")?;
        ann.mount_blob(&at(proxy, "lib/mounted"), &there, &digest).await.context("mount")?;
        ensure!(ann.blob_exists(&at(proxy, "lib/mounted"), &digest).await?, "what was mounted is not there");
        let tags = ann.list_tags(&there, &name("ann", "secret"), None, None).await?.tags;
        ensure!(tags == ["1"], "listed {tags:?}");

        for stranger in [RegistryAuth::Anonymous, name("bob", "wrong")] {
            let pulled = client().pull(&here, &stranger, kinds()).await;
            refused(pulled.map_err(Into::into), &format!("a pull by {stranger:?}"))?;
        }
        let bob = client();
        bob.store_auth_if_needed(here.resolve_registry(), &name("bob", "pw")).await;
        // A part of a layer that has not arrived.
        let (from, length) = (5_000_000, 1_234_567);
        let part = bob.pull_blob_stream_partial(&here, digest.as_str(), from as u64, Some(length as u64)).await?;
        let BlobResponse::Partial(part) = part else { bail!("a part was answered with the whole") };
        let part = part.try_fold(Vec::new(), |mut all, some| async move {
            all.extend_from_slice(&some);
            Ok(all)
        });
        ensure!(part.await? == layer[from..from + length], "the part differs");
        let pulled = bob.pull(&here, &name("bob", "pw"), kinds()).await.context("pull")?;
        ensure!(pulled.layers.len() == 1 && pulled.layers[0].data == layer, "the layer differs");
        ensure!(pulled.config.data == b"{}"[..], "the configuration differs");
        Ok(())
    })
}
