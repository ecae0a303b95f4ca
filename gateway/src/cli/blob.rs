//! `shoal blob`: single blobs from and to files.

use crate::{
    cli::{Trust, say},
    client::origin::{self, Origin, Reach},
    config::HostPort,
    http::{self, Body, Client, encode_segment},
};
use anyhow::{Context as _, anyhow, bail, ensure};
use bytes::Bytes;
use clap::{Args, Subcommand};
use http_body_util::BodyExt as _;
use hyper::{StatusCode, body::Incoming, header};
use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use peer_proto::{Digest, Namespace, chain::Hasher};
use std::{
    fs::{self, File},
    io::{self, IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Bytes read from a file at a time.
const READ_LEN: usize = 1 << 20;
/// Reads ahead of the network.
const READS_AHEAD: usize = 4;
/// Tries in a row that move no byte.
const TRIES: u32 = 5;
/// The pause before another try, times the tries in a row that moved nothing.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest wait for an agent to know what a blob looks like: it may come from a slow backend first.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20 * 60);
/// Longest wait for the next bytes.
const BODY_TIMEOUT: Duration = Duration::from_secs(6 * 60);
/// Longest error text that is read, bytes.
const TEXT_LEN_MAX: usize = 4 << 10;

/// What to do with a blob.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Upload a file to an origin and print its digest
    Put(Put),
    /// Download a blob from an agent into a file, verified
    Get(Get),
}

/// `shoal blob put`
#[derive(Debug, Args)]
pub struct Put {
    /// The file
    file: PathBuf,
    /// The namespace, which decides the backend
    #[arg(long, default_value = "default", value_name = "NAME")]
    namespace: Namespace,
    /// An origin's API; any of the cluster
    #[arg(long, default_value = "127.0.0.1:15002", value_name = "HOST:PORT")]
    origin: HostPort,
    #[command(flatten)]
    trust: Trust,
}

/// `shoal blob get`
#[derive(Debug, Args)]
pub struct Get {
    /// The blob: sha256:<hex>
    digest: Digest,
    /// The file; appears under this name once it is whole and verified
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// The namespace it was put into
    #[arg(long, default_value = "default", value_name = "NAME")]
    namespace: Namespace,
    /// An agent's API
    #[arg(long, default_value = "127.0.0.1:16002", value_name = "HOST:PORT")]
    agent: HostPort,
    #[command(flatten)]
    trust: Trust,
}

impl Command {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        match self {
            Self::Put(put) => runtime.block_on(put.run()),
            Self::Get(get) => runtime.block_on(get.run()),
        }
    }
}

impl Put {
    async fn run(self) -> anyhow::Result<()> {
        let client = self.trust.client()?;
        let size = fs::metadata(&self.file).with_context(|| self.file.display().to_string())?.len();
        let progress = Progress::start("hash", size);
        let digest = {
            let (file, progress) = (self.file.clone(), progress.clone());
            tokio::task::spawn_blocking(move || hash(&file, size, &progress)).await??
        };
        progress.end();
        let origin = Origin::new(self.origin.clone(), client);
        match origin.stat(&self.namespace, &digest, Reach::Everywhere).await {
            Ok(_) => eprintln!("{digest} is there already"),
            Err(origin::Error::NotFound) => self.upload(&origin, &digest, size).await?,
            Err(error) => return Err(error).context("ask whether the blob is there"),
        }
        say(&format!("{digest}\n"))
    }

    async fn upload(&self, origin: &Origin, digest: &Digest, size: u64) -> anyhow::Result<()> {
        let id = origin.start(&self.namespace, digest.algorithm(), Some(size)).await.context("open an upload")?.id;
        let progress = Progress::start("put", size);
        let (mut at, mut tries) = (0, 0);
        while at < size {
            progress.at(at);
            let body = file_body(&self.file, at, size, progress.clone())?;
            match origin.append(&self.namespace, &id, Some(at), Some(size - at), body).await {
                Ok(has) => at = has,
                Err(error) => {
                    tries += 1;
                    if tries == TRIES || !(error.elsewhere() || matches!(error, origin::Error::Body)) {
                        return Err(error).context("upload");
                    }
                    tokio::time::sleep(PAUSE * tries).await;
                    let has = origin.status(&self.namespace, &id).await.context("ask for the upload's state")?.size;
                    if has > at {
                        (at, tries) = (has, 0);
                    }
                }
            }
        }
        progress.end();
        origin.commit(&self.namespace, &id, digest).await.context("commit the upload")
    }
}

fn hash(file: &Path, size: u64, progress: &Progress) -> anyhow::Result<Digest> {
    let mut hasher = Hasher::new(peer_proto::Algorithm::Sha256);
    feed(File::open(file)?, size, |bytes| {
        hasher.update(bytes);
        progress.add(bytes.len() as u64);
    })?;
    Ok(hasher.finish())
}

/// Reads exactly `len` bytes.
fn feed(mut file: File, len: u64, mut take: impl FnMut(&[u8])) -> anyhow::Result<()> {
    let mut buffer = vec![0; READ_LEN];
    let mut left = len;
    while left > 0 {
        let most = usize::try_from(left).map_or(READ_LEN, |left| left.min(READ_LEN));
        let read = file.read(&mut buffer[..most])?;
        ensure!(read > 0, "file became shorter while it was read");
        take(&buffer[..read]);
        left -= read as u64;
    }
    Ok(())
}

/// The bytes of a file from `at` to `end`, read on a thread of their own.
fn file_body(path: &Path, at: u64, end: u64, progress: Progress) -> anyhow::Result<Body> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(at))?;
    let (to, from) = mpsc::channel::<io::Result<Bytes>>(READS_AHEAD);
    tokio::task::spawn_blocking(move || {
        let mut left = end - at;
        while left > 0 {
            let most = usize::try_from(left).map_or(READ_LEN, |left| left.min(READ_LEN));
            let mut buffer = vec![0; most];
            let read = match file.read(&mut buffer) {
                Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "file became shorter while it was read")),
                Ok(read) => {
                    buffer.truncate(read);
                    left -= read as u64;
                    Ok(Bytes::from(buffer))
                }
                Err(error) => Err(error),
            };
            let broke = read.is_err();
            // Nobody listens once the request has failed.
            if to.blocking_send(read).is_err() || broke {
                return;
            }
        }
    });
    Ok(http::stream(futures_util::stream::unfold((from, progress), |(mut from, progress)| async move {
        let bytes = from.recv().await?;
        if let Ok(bytes) = &bytes {
            progress.add(bytes.len() as u64);
        }
        Some((bytes, (from, progress)))
    })))
}

/// A download under way: what is in the partial file so far, hashed.
struct Partial {
    file: File,
    path: PathBuf,
    len: u64,
    hasher: Hasher,
}

impl Partial {
    /// Takes up what an earlier run left, or starts anew. The name carries the digest, so that nothing else is taken for it.
    fn open(output: &Path, digest: &Digest) -> anyhow::Result<Self> {
        let name = output.file_name().ok_or_else(|| anyhow!("{} is not a file name", output.display()))?;
        let path = output.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), &digest.hex()[..16]));
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = file.with_context(|| path.display().to_string())?;
        file.try_lock().map_err(|error| anyhow!("{}: {error}; is it being downloaded already?", path.display()))?;
        let mut hasher = Hasher::new(digest.algorithm());
        let len = file.metadata()?.len();
        feed(file.try_clone()?, len, |bytes| hasher.update(bytes))?;
        file.seek(SeekFrom::Start(len))?;
        Ok(Self { file, path, len, hasher })
    }

    fn take(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.file.write_all(bytes).with_context(|| self.path.display().to_string())?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Checks the digest and gives the file its name. A wrong file is removed, so that the next run starts anew.
    fn finish(self, output: &Path, digest: &Digest) -> anyhow::Result<()> {
        let actual = self.hasher.finish();
        if actual != *digest {
            fs::remove_file(&self.path)?;
            bail!("what was downloaded has digest {actual}");
        }
        self.file.sync_all()?;
        fs::rename(&self.path, output)
            .with_context(|| format!("rename {} to {}", self.path.display(), output.display()))
    }
}

/// Why a try ended.
enum Broke {
    /// Another try may succeed.
    Again(anyhow::Error),
    /// It will not.
    Never(anyhow::Error),
}

impl Get {
    async fn run(self) -> anyhow::Result<()> {
        let client = self.trust.client()?;
        let mut partial = Partial::open(&self.output, &self.digest)?;
        let mut progress = None;
        let mut tries = 0;
        loop {
            let before = partial.len;
            match self.fetch(&client, &mut partial, &mut progress).await {
                Ok(()) => break,
                Err(Broke::Never(error)) => return Err(error),
                Err(Broke::Again(error)) => {
                    tries = if partial.len > before { 0 } else { tries + 1 };
                    if tries == TRIES {
                        return Err(error);
                    }
                    tracing::debug!(%error, "download broke off; trying again");
                    tokio::time::sleep(PAUSE * tries).await;
                }
            }
        }
        if let Some(progress) = progress {
            progress.end();
        }
        partial.finish(&self.output, &self.digest)
    }

    /// One request for what is missing.
    async fn fetch(
        &self,
        client: &Client,
        partial: &mut Partial,
        progress: &mut Option<Progress>,
    ) -> Result<(), Broke> {
        let never = |error: anyhow::Error| Broke::Never(error);
        let path = format!("/namespace/{}/blobs/{}", encode_segment(self.namespace.as_str()), self.digest);
        let uri = format!("http://{}{path}", self.agent).parse().map_err(|error| never(anyhow!("{error}")))?;
        let request = Client::request(hyper::Method::GET, uri);
        let range = format!("bytes={}-", partial.len);
        let request = if partial.len > 0 { request.header(header::RANGE, range) } else { request };
        let request = request.body(http::empty()).map_err(|error| never(error.into()))?;
        let answer = client.send(request, HEAD_TIMEOUT).await.map_err(|error| Broke::Again(error.into()))?;
        let left: Option<u64> = (answer.headers().get(header::CONTENT_LENGTH))
            .and_then(|length| length.to_str().ok())
            .and_then(|length| length.parse().ok());
        match answer.status() {
            StatusCode::OK if partial.len == 0 => {}
            StatusCode::PARTIAL_CONTENT => {}
            // Nothing is missing.
            StatusCode::RANGE_NOT_SATISFIABLE if partial.len > 0 => return Ok(()),
            status => return Err(self.refused(status, answer.into_body()).await),
        }
        let left = left.ok_or_else(|| never(anyhow!("{}: answer without a length", self.agent)))?;
        let progress = progress.get_or_insert_with(|| Progress::start("get", partial.len + left));
        progress.at(partial.len);
        let end = partial.len + left;
        let mut body = answer.into_body();
        while partial.len < end {
            let frame = match tokio::time::timeout(BODY_TIMEOUT, body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => return Err(Broke::Again(error.into())),
                Ok(None) => return Err(Broke::Again(anyhow!("{}: body ended early", self.agent))),
                Err(_) => return Err(Broke::Again(anyhow!("{}: no bytes for {BODY_TIMEOUT:?}", self.agent))),
            };
            if let Ok(bytes) = frame.into_data() {
                partial.take(&bytes).map_err(never)?;
                progress.add(bytes.len() as u64);
            }
        }
        Ok(())
    }

    async fn refused(&self, status: StatusCode, body: Incoming) -> Broke {
        let text = match http::read_body(body, TEXT_LEN_MAX).await {
            Ok(text) => String::from_utf8_lossy(&text).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        let error = anyhow!("{}: {status}: {text}", self.agent);
        if status == StatusCode::SERVICE_UNAVAILABLE { Broke::Again(error) } else { Broke::Never(error) }
    }
}

/// A bar on a terminal; elsewhere one line at the end.
#[derive(Clone)]
struct Progress {
    what: &'static str,
    bar: Option<ProgressBar>,
    started: Instant,
    total: u64,
}

impl Progress {
    fn start(what: &'static str, total: u64) -> Self {
        let style = ProgressStyle::with_template("{msg:>4} {bar:30} {bytes:>10}/{total_bytes} {bytes_per_sec} {eta}");
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_message(what);
            if let Ok(style) = style {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        Self { what, bar, started: Instant::now(), total }
    }

    fn at(&self, position: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
        }
    }

    fn add(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn end(&self) {
        match &self.bar {
            Some(bar) => bar.finish(),
            None => {
                eprintln!("{}: {} in {}", self.what, HumanBytes(self.total), HumanDuration(self.started.elapsed()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        http::{Request, Response, Service},
        registry::range,
    };
    use futures_util::StreamExt as _;
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    };
    use tokio::{net::TcpListener, sync::watch};

    /// Serves one blob over HTTP, breaking each body off after so many bytes.
    struct Blob {
        bytes: Bytes,
        most: usize,
        sent: AtomicU64,
    }

    impl Service for Blob {
        async fn answer(self: Arc<Self>, request: Request) -> Response {
            let total = self.bytes.len() as u64;
            let spec = request.headers().get(header::RANGE).map(|value| range::parse(value.to_str().unwrap()));
            let range = match spec {
                None => 0..total,
                Some(spec) => match spec.unwrap().unwrap()[0].resolve(total) {
                    Some(range) => range,
                    None => return http::status(StatusCode::RANGE_NOT_SATISFIABLE),
                },
            };
            let part = self.bytes.slice(range.start as usize..range.end as usize);
            let cut = part.slice(..part.len().min(self.most));
            self.sent.fetch_add(cut.len() as u64, Relaxed);
            let short = cut.len() < part.len();
            let broke = futures_util::stream::iter(short.then_some(())).then(|()| async {
                // Lets what came before out first.
                tokio::task::yield_now().await;
                Err(io::Error::other("broke off"))
            });
            let frames = futures_util::stream::iter([Ok(cut)]).chain(broke);
            let mut response = Response::new(http::stream(frames));
            response.headers_mut().insert(header::CONTENT_LENGTH, (range.end - range.start).into());
            if range.start > 0 {
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            }
            response
        }
    }

    async fn serve(bytes: Vec<u8>, most: usize) -> (Arc<Blob>, HostPort, watch::Sender<bool>) {
        let blob = Arc::new(Blob { bytes: bytes.into(), most, sent: AtomicU64::new(0) });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().into();
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(http::serve(listener, blob.clone(), stopped, Duration::from_secs(1)));
        (blob, addr, stop)
    }

    fn digest_of(bytes: &[u8]) -> Digest {
        let mut hasher = Hasher::new(peer_proto::Algorithm::Sha256);
        hasher.update(bytes);
        hasher.finish()
    }

    fn get(digest: Digest, output: &Path, agent: &HostPort) -> Get {
        Get {
            digest,
            output: output.into(),
            namespace: "n".parse().unwrap(),
            agent: agent.clone(),
            trust: Trust::default(),
        }
    }

    #[tokio::test]
    async fn a_role_with_a_certificate_is_asked_over_tls() {
        let dir = tempfile::tempdir().unwrap();
        let files = http::tls::Files::new(dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let signed = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        fs::write(&files.certificate, signed.cert.pem()).unwrap();
        fs::write(&files.key, signed.signing_key.serialize_pem()).unwrap();
        let bytes = vec![3; 5000];
        let digest = digest_of(&bytes);
        let blob = Arc::new(Blob { bytes: bytes.clone().into(), most: 10_000, sent: AtomicU64::new(0) });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let agent = listener.local_addr().unwrap().into();
        let (_stop, stopped) = watch::channel(false);
        let tls = http::tls::Tls::open(files.clone()).unwrap();
        tokio::spawn(http::server::serve_with(listener, Some(tls), blob, stopped, Duration::ZERO));

        let output = dir.path().join("out");
        let trust = Trust { ca: Some(files.certificate) };
        Get { trust, ..get(digest, &output, &agent) }.run().await.unwrap();
        assert_eq!(fs::read(&output).unwrap(), bytes);
        let trust = Trust { ca: Some("/nowhere/ca.pem".into()) };
        let error = Get { trust, ..get(digest, &output, &agent) }.run().await.unwrap_err();
        assert_eq!(error.to_string(), "--ca");
    }

    #[tokio::test]
    async fn a_download_goes_on_where_it_broke_off() {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let digest = digest_of(&bytes);
        let (blob, agent, _stop) = serve(bytes.clone(), 30_000).await;
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        get(digest, &output, &agent).run().await.unwrap();
        assert_eq!(fs::read(&output).unwrap(), bytes);
        assert_eq!(blob.sent.load(Relaxed), 100_000, "no byte was sent twice");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the file itself is left");
    }

    #[tokio::test]
    async fn wrong_bytes_never_get_the_name() {
        let (_blob, agent, _stop) = serve(b"something else".to_vec(), 1000).await;
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        let error = get(digest_of(b"something"), &output, &agent).run().await.unwrap_err();
        assert!(error.to_string().contains("what was downloaded has digest"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn an_earlier_partial_is_taken_up() {
        let bytes = vec![7; 5000];
        let digest = digest_of(&bytes);
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        let mut partial = Partial::open(&output, &digest).unwrap();
        partial.take(&bytes[..2000]).unwrap();
        drop(partial);
        let (blob, agent, _stop) = serve(bytes.clone(), 10_000).await;
        get(digest, &output, &agent).run().await.unwrap();
        assert_eq!((fs::read(&output).unwrap(), blob.sent.load(Relaxed)), (bytes, 3000));
    }
}
