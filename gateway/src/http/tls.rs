//! TLS: a listener's certificate, read again when its files change, the certificates that our client trusts, and the names of
//! those that clients come with.
//!
//! Files are looked at by their content from time to time: that sees through the way in which orchestrators swap them, by links
//! to directories. A pair that does not fit is refused and the one before stays in force.

use rustls::{
    ClientConfig, RootCertStore, ServerConfig, ServerConnection,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier},
};
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{net::TcpStream, sync::watch};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use x509_parser::extensions::GeneralName;

/// How often the files are looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);
/// Longest wait for a client's part of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most names of a client's certificate that are looked at.
const NAMES_MAX: usize = 16;
/// Longest of them, bytes.
const NAME_LEN_MAX: usize = 512;
/// The name of HTTP/2 among the protocols that a client may choose.
pub(super) const H2: &[u8] = b"h2";

/// `[tls]`: the files of a certificate, in PEM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// The certificate, and those between it and its authority, in this order.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities of clients' certificates: with it, clients are asked for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<PathBuf>,
    /// Whether clients may come without; they may unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_auth: Option<ClientAuth>,
}

/// Whether clients have to have a certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientAuth {
    /// They may come without.
    Optional,
    /// They may not.
    Required,
}

impl Files {
    /// A certificate alone: clients are asked for none.
    pub fn new(certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { certificate: certificate.into(), key: key.into(), client_ca: None, client_auth: None }
    }

    /// The same without asking clients for theirs.
    #[must_use]
    pub fn asking_nobody(&self) -> Self {
        Self::new(&self.certificate, &self.key)
    }
}

/// Why there is no certificate to use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
    /// A file is not PEM of what it should be.
    #[error("{path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The certificate and the key do not fit, or cannot be used.
    #[error("{0}")]
    Unfit(#[from] rustls::Error),
    /// Clients have to have a certificate, and none is good.
    #[error("client_auth needs client_ca: the authorities whose certificates are good")]
    Nobody,
}

/// The certificate of a role's listeners.
pub struct Tls {
    files: Files,
    current: Mutex<Current>,
}

/// What the files held: the certificate, its key, the clients' authorities.
type Seen = (Vec<u8>, Vec<u8>, Option<Vec<u8>>);

struct Current {
    /// What the files held when they were looked at last, good or not.
    seen: Seen,
    config: Arc<ServerConfig>,
}

impl Tls {
    /// Reads the files. Blocks.
    pub fn open(files: Files) -> Result<Arc<Self>, Error> {
        let seen = read(&files)?;
        let config = server(&files, &seen)?;
        Ok(Arc::new(Self { files, current: Mutex::new(Current { seen, config }) }))
    }

    /// Reads the files again and takes what is new; whether there was anything. Blocks.
    pub fn reload(&self) -> Result<bool, Error> {
        let seen = read(&self.files)?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.seen == seen {
            return Ok(false);
        }
        current.seen = seen;
        current.config = server(&self.files, &current.seen)?;
        Ok(true)
    }

    /// Reloads from time to time until `stop` is true.
    pub async fn watch(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(RELOAD_INTERVAL) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            let tls = self.clone();
            match tokio::task::spawn_blocking(move || tls.reload()).await {
                Ok(Ok(true)) => tracing::info!(certificate = %self.files.certificate.display(), "certificate reloaded"),
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "reload the certificate; the one before stays in force"),
                Err(error) => tracing::warn!(%error, "reload the certificate"),
            }
        }
    }

    /// A client's connection made secure; none where the client fails or takes too long.
    pub(super) async fn accept(&self, socket: TcpStream) -> Option<TlsStream<TcpStream>> {
        let config = self.current.lock().unwrap_or_else(PoisonError::into_inner).config.clone();
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(socket)).await {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(error)) => {
                tracing::debug!(%error, "TLS handshake");
                None
            }
            Err(_) => {
                tracing::debug!("no TLS handshake within {HANDSHAKE_TIMEOUT:?}");
                None
            }
        }
    }
}

fn read(files: &Files) -> Result<Seen, Error> {
    if files.client_auth.is_some() && files.client_ca.is_none() {
        return Err(Error::Nobody);
    }
    let read = |path: &Path| std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source });
    Ok((read(&files.certificate)?, read(&files.key)?, files.client_ca.as_deref().map(read).transpose()?))
}

fn server(files: &Files, (certificate, key, authorities): &Seen) -> Result<Arc<ServerConfig>, Error> {
    let chain = certificates(&files.certificate, certificate)?;
    let key = PrivateKeyDer::from_pem_slice(key);
    let key = key.map_err(|error| Error::Parse { path: files.key.clone(), message: error.to_string() })?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let mut config = match files.client_ca.as_deref().zip(authorities.as_deref()) {
        None => builder.with_no_client_auth(),
        Some((path, pem)) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(path, pem)?), provider);
            let verifier = match files.client_auth {
                Some(ClientAuth::Required) => verifier,
                Some(ClientAuth::Optional) | None => verifier.allow_unauthenticated(),
            };
            let unfit =
                |error: VerifierBuilderError| Error::Parse { path: path.to_owned(), message: error.to_string() };
            builder.with_client_cert_verifier(verifier.build().map_err(unfit)?)
        }
    }
    .with_single_cert(chain, key)?;
    if files.client_ca.is_some() {
        // A certificate is looked at with each connection, not remembered from one that was.
        config.session_storage = Arc::new(NoServerSessionStorage {});
    }
    config.alpn_protocols = vec![H2.to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let parse = |message: String| Error::Parse { path: path.to_owned(), message };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let chain = chain.map_err(|error| parse(error.to_string()))?;
    if chain.is_empty() { Err(parse("no certificate in it".into())) } else { Ok(chain) }
}

/// What a client needs to trust the authorities of a PEM file, and no others. Blocks.
pub fn trusting(path: &Path) -> Result<ClientConfig, Error> {
    let pem = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let roots = roots(path, &pem)?;
    Ok(builder.with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth())
}

fn roots(path: &Path, pem: &[u8]) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(path, pem)? {
        roots.add(authority).map_err(|error| Error::Parse { path: path.to_owned(), message: error.to_string() })?;
    }
    Ok(roots)
}

/// The names of the certificate that a client has shown; none without.
pub(super) fn peer_names(connection: &ServerConnection) -> Vec<String> {
    connection.peer_certificates().and_then(<[_]>::first).map(|first| names(first)).unwrap_or_default()
}

/// What a certificate, in DER, calls its holder: its alternative names that are addresses of resources, hosts or mail, in its own
/// order; where it has none of these, the common name of its subject. Names that nobody could write into a rule are left out.
pub fn names(der: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(der) else { return Vec::new() };
    let mut names: Vec<&str> = Vec::new();
    if let Ok(Some(alternative)) = certificate.subject_alternative_name() {
        names.extend(alternative.value.general_names.iter().filter_map(|name| match name {
            GeneralName::URI(name) | GeneralName::DNSName(name) | GeneralName::RFC822Name(name) => Some(*name),
            _ => None,
        }));
    }
    if names.is_empty() {
        names.extend(certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok()).take(1));
    }
    let sound = |name: &&str| (1..=NAME_LEN_MAX).contains(&name.len()) && !name.chars().any(char::is_control);
    names.into_iter().filter(sound).take(NAMES_MAX).map(ToOwned::to_owned).collect()
}

/// What a client needs to trust whom the system trusts, and the authorities of a PEM file. Blocks.
pub fn trusting_system(also: Option<&Path>) -> Result<ClientConfig, Error> {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::warn!(%error, "read the system's certificates");
    }
    // The system may hold some that are not of the form that is asked for today: the others serve.
    roots.add_parsable_certificates(system.certs);
    if let Some(path) = also {
        let pem = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        for authority in certificates(path, &pem)? {
            roots.add(authority)?;
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    Ok(builder.with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::http::{self, Body, Client, Request, Response, Service, server::Peer};
    use hyper::{StatusCode, Version};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
    };
    use rustls::pki_types::ServerName;
    use tempfile::TempDir;
    use tokio::{io::AsyncReadExt, net::TcpListener};

    /// Answers with the version it was asked in.
    struct Echo;

    impl Service for Echo {
        async fn answer(self: Arc<Self>, request: Request) -> Response {
            http::text(StatusCode::OK, format!("{:?} {}", request.version(), request.uri().path()))
        }
    }

    /// An authority; its certificates for 127.0.0.1 go into files.
    struct Authority {
        issuer: CertifiedIssuer<'static, KeyPair>,
    }

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
        }

        fn issue(&self, files: &Files, ca: &Path) {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
            let certificate = params.signed_by(&key, &self.issuer).unwrap();
            std::fs::write(&files.certificate, certificate.pem()).unwrap();
            std::fs::write(&files.key, key.serialize_pem()).unwrap();
            std::fs::write(ca, self.issuer.pem()).unwrap();
        }
    }

    /// A server's side of TLS, with its authority's file.
    pub(in crate::http) fn issued(dir: &TempDir) -> (Arc<Tls>, PathBuf) {
        let files = Files::new(dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let ca = dir.path().join("ca.pem");
        Authority::new().issue(&files, &ca);
        (Tls::open(files).unwrap(), ca)
    }

    /// A connection of HTTP/2; none where it is refused.
    pub(in crate::http) async fn two(
        addr: std::net::SocketAddr,
        mut config: ClientConfig,
    ) -> Option<hyper::client::conn::http2::SendRequest<Body>> {
        config.alpn_protocols = vec![H2.to_vec()];
        let socket = TcpStream::connect(addr).await.ok()?;
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let socket = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await.ok()?;
        let io = TokioIo::new(socket);
        let (send, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.ok()?;
        tokio::spawn(connection);
        Some(send)
    }

    async fn get(client: &Client, addr: std::net::SocketAddr) -> Result<String, http::client::Error> {
        let answer = client.get(format!("http://{addr}/x").parse().unwrap(), Duration::from_secs(10)).await?;
        let body = http::read_body(answer.into_body(), 1000).await.unwrap();
        Ok(String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn both_versions_are_served_and_new_certificates_taken() {
        let dir = TempDir::new().unwrap();
        let files = Files::new(dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let ca = dir.path().join("ca.pem");
        Authority::new().issue(&files, &ca);
        let tls = Tls::open(files.clone()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let serving = http::server::serve_with(listener, Some(tls.clone()), Arc::new(Echo), stopped, Duration::ZERO);
        let server = tokio::spawn(serving);

        let first = Client::secure(trusting(&ca).unwrap());
        assert_eq!(get(&first, addr).await.unwrap(), "HTTP/1.1 /x", "http addresses are made https");
        assert!(get(&Client::default(), addr).await.is_err(), "nothing is said without TLS");

        let mut h2 = trusting(&ca).unwrap();
        h2.alpn_protocols = vec![H2.to_vec()];
        let socket = TcpStream::connect(addr).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let socket = tokio_rustls::TlsConnector::from(Arc::new(h2)).connect(name, socket).await.unwrap();
        let (mut send, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket)).await.unwrap();
        let connection = tokio::spawn(connection);
        let request = Client::request(hyper::Method::GET, format!("https://{addr}/y").parse().unwrap());
        let answer = send.send_request(request.body(http::empty()).unwrap()).await.unwrap();
        assert_eq!((answer.version(), answer.status()), (Version::HTTP_2, StatusCode::OK));
        assert_eq!(http::read_body(answer.into_body(), 100).await.unwrap(), "HTTP/2.0 /y");
        drop(send);
        connection.await.unwrap().unwrap();

        // Files that do not fit are refused once; what was in force stays.
        assert!(!tls.reload().unwrap());
        std::fs::write(&files.key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(matches!(tls.reload(), Err(Error::Unfit(_))));
        let again = Client::secure(trusting(&ca).unwrap());
        assert!(get(&again, addr).await.is_ok());
        std::fs::write(&files.certificate, "nothing").unwrap();
        assert!(matches!(tls.reload(), Err(Error::Parse { .. })));

        Authority::new().issue(&files, &ca);
        assert!(tls.reload().unwrap());
        let second = Client::secure(trusting(&ca).unwrap());
        assert!(get(&second, addr).await.is_ok(), "another authority's");
        assert!(get(&first, addr).await.is_ok(), "a connection from before goes on");

        // Whoever says nothing of TLS is let go.
        let mut plain = TcpStream::connect(addr).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut plain, b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        plain.read_to_end(&mut answer).await.unwrap();
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
        stop.send_replace(true);
        server.await.unwrap();
    }

    /// Answers with the names of the client's certificate.
    struct Names;

    impl Service for Names {
        async fn answer(self: Arc<Self>, request: Request) -> Response {
            let names = request.extensions().get::<Peer>().map(|peer| peer.names.join(" ")).unwrap_or_default();
            http::text(StatusCode::OK, format!("{:?} {names}", request.version()))
        }
    }

    /// What a client with this certificate is told, in each version of HTTP; none where it is not let in.
    async fn told(
        addr: std::net::SocketAddr,
        ca: &Path,
        own: Option<(CertificateDer<'static>, KeyPair)>,
    ) -> Vec<Option<String>> {
        let mut config = trusting(ca).unwrap();
        if let Some((certificate, key)) = own {
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
            let builder = builder.with_safe_default_protocol_versions().unwrap();
            let pem = std::fs::read(ca).unwrap();
            let roots = roots(ca, &pem).unwrap();
            config = builder.with_root_certificates(roots).with_client_auth_cert(vec![certificate], key).unwrap();
        }
        let one = get(&Client::secure(config.clone()), addr).await.ok();
        let two = async {
            let mut send = two(addr, config).await?;
            let request = Client::request(hyper::Method::GET, format!("https://{addr}/").parse().unwrap());
            let answer = send.send_request(request.body(http::empty()).unwrap()).await.ok()?;
            let body = http::read_body(answer.into_body(), 1000).await.ok()?;
            Some(String::from_utf8(body.to_vec()).unwrap())
        };
        vec![one, two.await]
    }

    fn client_certificate(
        authority: &Authority,
        names: &[SanType],
        common: &str,
    ) -> (CertificateDer<'static>, KeyPair) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.to_vec();
        params.distinguished_name.push(DnType::CommonName, common);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority.issuer).unwrap();
        (certificate.der().clone(), key)
    }

    #[tokio::test]
    async fn clients_are_known_by_their_certificates() {
        let dir = TempDir::new().unwrap();
        let mut files = Files::new(dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let (ca, clients) = (dir.path().join("ca.pem"), dir.path().join("clients.pem"));
        Authority::new().issue(&files, &ca);
        let (ours, others) = (Authority::new(), Authority::new());
        std::fs::write(&clients, ours.issuer.pem()).unwrap();
        files.client_auth = Some(ClientAuth::Optional);
        assert!(matches!(Tls::open(files.clone()), Err(Error::Nobody)));
        files.client_ca = Some(clients.clone());
        let (stop, stopped) = watch::channel(false);
        let serve = async |auth| {
            let tls = Tls::open(Files { client_auth: auth, ..files.clone() }).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap();
            let (tls, stopped) = (tls, stopped.clone());
            tokio::spawn(http::server::serve_with(
                listener,
                Some(tls.clone()),
                Arc::new(Names),
                stopped,
                Duration::ZERO,
            ));
            (tls, addr)
        };
        let (tls, optional) = serve(None).await;
        let (_, required) = serve(Some(ClientAuth::Required)).await;
        let text = |text: &str| text.try_into().unwrap();
        let uri = SanType::URI(text("spiffe://a/b"));
        let dns = SanType::DnsName(text("host.example"));
        let mail = SanType::Rfc822Name(text("ann@example.com"));
        let address = SanType::IpAddress([127, 0, 0, 1].into());
        let both = |names: &str| ["HTTP/1.1", "HTTP/2.0"].map(|version| Some(format!("{version} {names}"))).to_vec();
        let nothing = vec![None, None];
        let issue = |names: &[SanType], common| Some(client_certificate(&ours, names, common));
        for (own, names) in [
            (issue(&[uri.clone(), dns, mail], "ann"), "spiffe://a/b host.example ann@example.com"),
            (issue(&[], "ann"), "ann"),
            (issue(&[address], "ann"), "ann"),
            (issue(&[], "a\nb"), ""),
            (issue(&[SanType::URI(text(&"x".repeat(NAME_LEN_MAX + 1))), uri.clone()], "ann"), "spiffe://a/b"),
        ] {
            let again = own.as_ref().map(|(der, key)| (der.clone(), KeyPair::from_pem(&key.serialize_pem()).unwrap()));
            assert_eq!(told(optional, &ca, own).await, both(names));
            assert_eq!(told(required, &ca, again).await, both(names));
        }
        assert_eq!(told(optional, &ca, None).await, both(""));
        assert_eq!(told(required, &ca, None).await, nothing);
        let stranger = || Some(client_certificate(&others, std::slice::from_ref(&uri), "ann"));
        assert_eq!(told(optional, &ca, stranger()).await, nothing, "one that our authorities have not signed");
        assert_eq!(told(required, &ca, stranger()).await, nothing);

        std::fs::write(&clients, "nothing").unwrap();
        assert!(matches!(tls.reload(), Err(Error::Parse { .. })));
        assert_eq!(told(optional, &ca, stranger()).await, nothing, "those before stay in force");
        std::fs::write(&clients, others.issuer.pem()).unwrap();
        assert!(tls.reload().unwrap());
        assert_eq!(told(optional, &ca, stranger()).await, both("spiffe://a/b"));
        assert_eq!(told(optional, &ca, issue(&[], "ann")).await, nothing);
        stop.send_replace(true);
        assert!(names(b"").is_empty() && names(&[0x30, 0x80]).is_empty());
    }

    #[test]
    fn files_that_are_not_there_are_named() {
        let files = Files::new("/nowhere/cert.pem", "/nowhere/key.pem");
        let error = Tls::open(files).err().unwrap().to_string();
        assert!(error.starts_with("/nowhere/cert.pem: "), "{error}");
        assert!(trusting(Path::new("/nowhere/ca.pem")).is_err());
    }
}
