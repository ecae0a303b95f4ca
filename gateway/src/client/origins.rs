//! The origins as one service: asks the owner of a blob, the next one where that fails, and waits a little where all do.

use super::{
    cluster::{self, Cluster, Member},
    health::Rules,
    origin::{Error, Opened, Origin, PeerContext, Reach},
    transfer::Blob,
};
use crate::{
    config::HostPort,
    http::{self, Body, Client},
    registry::range::Spec,
};
use bytes::Bytes;
use peer_proto::{Algorithm, Digest, Layout, Namespace, chain};
use std::{
    collections::HashMap,
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// First wait before all origins are asked again; doubles up to [`ROUND_PAUSE_MAX`].
const ROUND_PAUSE: Duration = Duration::from_millis(100);
/// Longest such wait.
const ROUND_PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long an origin's peer context is believed.
const PEER_TTL: Duration = Duration::from_secs(10);
/// Longest address of a session, bytes.
const SESSION_LEN_MAX: usize = 512;

/// A client of all origins of a cluster. Cheap to clone; clones share connections and what is known of the origins' health.
#[derive(Clone)]
pub struct Origins {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: Arc<Cluster>,
    patience: Duration,
    /// Where the next upload begins.
    turn: AtomicUsize,
    /// Peer contexts and when they were asked for. Bounded by the number of origins.
    peers: Mutex<HashMap<Member, (Instant, PeerContext)>>,
}

/// An upload under way: at which origin, under which id. As text, any other client of the same cluster can go on with it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Session {
    id: String,
    addr: HostPort,
}

impl Session {
    /// Its id at its origin.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its origin.
    pub fn origin(&self) -> &HostPort {
        &self.addr
    }
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}~{}", self.id, self.addr)
    }
}

impl Origins {
    /// A client of `origins`, of which `replicas` keep each blob. `patience` is the longest wait while none of them can be
    /// reached or all are too busy.
    pub fn new(
        origins: &[HostPort],
        replicas: usize,
        rules: Rules,
        patience: Duration,
        http: &Client,
    ) -> Result<Self, cluster::Error> {
        Cluster::new(origins, None, replicas, rules, http).map(|cluster| Self::of(Arc::new(cluster), patience))
    }

    /// A client of a cluster that others look at too.
    pub fn of(cluster: Arc<Cluster>, patience: Duration) -> Self {
        // Clients that start together should not all begin at the same origin.
        let turn = usize::from(uuid::Uuid::new_v4().into_bytes()[0]);
        let peers = Mutex::new(HashMap::new());
        Self { inner: Arc::new(Inner { cluster, patience, turn: AtomicUsize::new(turn), peers }) }
    }

    /// Probes the origins until `stop` is true: for roles that run for long and are few.
    pub async fn watch(self, stop: watch::Receiver<bool>) {
        self.inner.cluster.clone().watch(stop).await;
    }

    /// Whether any origin can do its work.
    pub async fn readiness(&self) -> Result<(), Error> {
        self.each(self.cluster().anybody(self.turn()), Duration::ZERO, |origin| async move { origin.readiness().await })
            .await
    }

    /// The owners of a blob as the ring has them, healthy ones only, in order.
    pub fn locations(&self, digest: &Digest) -> Vec<HostPort> {
        let owners = self.cluster().owners(digest);
        owners.into_iter().map(|member| self.cluster().origin(member).addr().clone()).collect()
    }

    /// Bytes of a blob, which an origin or the backend holds.
    pub async fn stat(&self, namespace: &Namespace, digest: &Digest) -> Result<u64, Error> {
        let ask = |origin: Origin| async move { origin.stat(namespace, digest, Reach::Everywhere).await };
        self.each(self.cluster().candidates(digest), self.inner.patience, ask).await
    }

    /// Opens a blob, or a range of it, which is cut at the blob's end. Waits at most `wait` while the blob is on its way from the
    /// backend, then [`Error::Pending`].
    pub async fn open(
        &self,
        namespace: &Namespace,
        digest: &Digest,
        range: Option<Spec>,
        wait: Duration,
    ) -> Result<Blob, Error> {
        let until = Instant::now() + wait;
        let mut holder = None;
        let mut pause = ROUND_PAUSE;
        loop {
            let mut candidates = self.cluster().candidates(digest);
            candidates.sort_by_key(|member| Some(*member) != holder);
            let ask = |origin: Origin| async move { origin.get(namespace, digest, range, Reach::Everywhere).await };
            match self.each_from(candidates, self.inner.patience, ask).await {
                Ok((from, opened)) => {
                    return Ok(Blob::new(self.clone(), namespace.clone(), *digest, from, opened));
                }
                Err(Error::Pending) if Instant::now() < until => {}
                Err(error) => return Err(error),
            }
            if holder.is_some() {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(ROUND_PAUSE_MAX);
            }
            // An origin holds a layout request until the blob is there: better than asking again and again. Whoever answers it has
            // the blob, while the one asked first may be without the room to fetch it.
            holder = Some(self.layout_from(namespace, digest, until).await?.0);
        }
    }

    /// All of a short blob, its digest checked.
    pub async fn read(
        &self,
        namespace: &Namespace,
        digest: &Digest,
        len_max: usize,
        wait: Duration,
    ) -> Result<Bytes, Error> {
        let mut blob = self.open(namespace, digest, None, wait).await?;
        let len = usize::try_from(blob.total()).ok().filter(|len| *len <= len_max);
        let len = len.ok_or_else(|| Error::TooLong { has: blob.total(), most: len_max as u64 })?;
        let mut bytes = Vec::with_capacity(len);
        while let Some(part) = blob.next().await {
            bytes.extend_from_slice(&part?);
        }
        let actual = digest_of(digest.algorithm(), &bytes);
        if actual != *digest {
            return Err(Error::Mismatch(format!("content has digest {actual}, expected {digest}")));
        }
        Ok(bytes.into())
    }

    /// A blob's layout. Waits while it is on its way from the backend: as long as one origin holds the request
    /// ([`super::origin::LAYOUT_HOLD`]), and again until `wait` is over; then [`Error::Pending`].
    pub async fn layout(&self, namespace: &Namespace, digest: &Digest, wait: Duration) -> Result<Layout, Error> {
        self.layout_from(namespace, digest, Instant::now() + wait).await.map(|(_, layout)| layout)
    }

    async fn layout_from(
        &self,
        namespace: &Namespace,
        digest: &Digest,
        until: Instant,
    ) -> Result<(Member, Layout), Error> {
        loop {
            let ask = |origin: Origin| async move { origin.layout(namespace, digest).await };
            match self.each_from(self.cluster().candidates(digest), self.inner.patience, ask).await {
                Err(Error::Pending) if Instant::now() < until => {}
                answer => return answer,
            }
        }
    }

    /// A blob's Kraken metainfo, as JSON; [`Error::Pending`] while the blob is on its way from the backend.
    pub async fn metainfo(&self, namespace: &Namespace, digest: &Digest) -> Result<Bytes, Error> {
        let ask = |origin: Origin| async move { origin.metainfo(namespace, digest).await };
        self.each(self.cluster().candidates(digest), self.inner.patience, ask).await
    }

    /// Has the origins fetch a blob from the backend. [`Error::Pending`] where that has begun.
    pub async fn prefetch(&self, namespace: &Namespace, digest: &Digest) -> Result<(), Error> {
        let ask = |origin: Origin| async move { origin.prefetch(namespace, digest).await };
        self.each(self.cluster().candidates(digest), self.inner.patience, ask).await
    }

    /// How peers reach the blob's owners. Those that do not answer are left out; contexts are kept for some seconds.
    pub async fn peers(&self, digest: &Digest) -> Vec<PeerContext> {
        let owners = self.cluster().owners(digest);
        let contexts = owners.into_iter().map(|member| self.peer(member));
        futures_util::future::join_all(contexts).await.into_iter().flatten().collect()
    }

    async fn peer(&self, member: Member) -> Option<PeerContext> {
        let known = self.peers_known().get(&member).cloned();
        if let Some((asked, context)) = &known
            && asked.elapsed() < PEER_TTL
        {
            return Some(context.clone());
        }
        match self.cluster().origin(member).peer().await {
            Ok(context) => {
                self.cluster().passed(member);
                self.peers_known().insert(member, (Instant::now(), context.clone()));
                Some(context)
            }
            Err(error) => {
                tracing::debug!(%error, "ask an origin for its peer address");
                self.judge(member, &error);
                known.map(|(_, context)| context)
            }
        }
    }

    fn peers_known(&self) -> std::sync::MutexGuard<'_, HashMap<Member, (Instant, PeerContext)>> {
        self.inner.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens an upload at any origin that takes it. Where the digest is known, at its owner.
    pub async fn start(
        &self,
        namespace: &Namespace,
        algorithm: Algorithm,
        size: Option<u64>,
        digest: Option<&Digest>,
    ) -> Result<Session, Error> {
        let candidates = match digest {
            Some(digest) => self.cluster().candidates(digest),
            None => self.cluster().anybody(self.turn()),
        };
        let open = |origin: Origin| async move {
            let status = origin.start(namespace, algorithm, size).await?;
            Ok(Session { id: status.id, addr: origin.addr().clone() })
        };
        self.each(candidates, self.inner.patience, open).await
    }

    /// The session of this text, as [`Session`]'s `Display` wrote it. Only origins of this cluster are believed.
    pub fn session(&self, text: &str) -> Result<Session, Error> {
        let parts = text.split_once('~').filter(|(id, _)| text.len() <= SESSION_LEN_MAX && !id.is_empty());
        let (id, addr) = parts.ok_or(Error::UploadUnknown)?;
        let member = self.cluster().find(addr).ok_or(Error::UploadUnknown)?;
        Ok(Session { id: id.to_owned(), addr: self.cluster().origin(member).addr().clone() })
    }

    /// Adds bytes to an upload where it ends, which must be at `offset` where that is given; `length` of them where that is
    /// known. Tells the size it then has. Whatever breaks off, what arrived is kept, and [`Self::status`] tells how much that is.
    pub async fn append(
        &self,
        namespace: &Namespace,
        session: &Session,
        offset: Option<u64>,
        length: Option<u64>,
        body: Body,
    ) -> Result<u64, Error> {
        let (member, origin) = self.at(session)?;
        let answer = origin.append(namespace, &session.id, offset, length, body).await;
        self.told(member, answer)
    }

    /// Bytes an upload has.
    pub async fn status(&self, namespace: &Namespace, session: &Session) -> Result<u64, Error> {
        let ask = |origin: Origin| async move { origin.status(namespace, &session.id).await };
        self.each(vec![self.at(session)?.0], self.inner.patience, ask).await.map(|status| status.size)
    }

    /// Closes an upload under its digest. Once this returns, the blob is durable on an owner, every owner that could be reached
    /// holds it, and its way to the others and to the backend is assured.
    pub async fn commit(&self, namespace: &Namespace, session: &Session, digest: &Digest) -> Result<(), Error> {
        let (member, origin) = self.at(session)?;
        let answer = origin.commit(namespace, &session.id, digest).await;
        self.told(member, answer)
    }

    /// Drops an upload.
    pub async fn cancel(&self, namespace: &Namespace, session: &Session) -> Result<(), Error> {
        let (member, origin) = self.at(session)?;
        let answer = origin.cancel(namespace, &session.id).await;
        self.told(member, answer)
    }

    /// Stores a short blob, at the next origin where one fails.
    pub async fn put(&self, namespace: &Namespace, digest: &Digest, bytes: Bytes) -> Result<(), Error> {
        let store = |origin: Origin| {
            let bytes = bytes.clone();
            async move {
                let length = bytes.len() as u64;
                let id = origin.start(namespace, digest.algorithm(), Some(length)).await?.id;
                origin.append(namespace, &id, Some(0), Some(length), http::full(bytes)).await?;
                origin.commit(namespace, &id, digest).await
            }
        };
        self.each(self.cluster().candidates(digest), self.inner.patience, store).await
    }

    /// Takes a blob that the origins hold into another namespace: assures its way to that namespace's backend. False where no
    /// origin holds it.
    pub async fn link(&self, namespace: &Namespace, digest: &Digest) -> Result<bool, Error> {
        let mut failure = None;
        for member in self.cluster().owners(digest) {
            match self.told(member, self.cluster().origin(member).link(namespace, digest).await) {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or(Ok(false), Err)
    }

    /// Has no origin store, fetch or copy a blob that is to be deleted, until [`Self::unmark`]. With one origin out of reach, or
    /// one whose work still needs the blob, none is marked.
    pub async fn mark(&self, digest: &Digest) -> Result<(), Error> {
        let marked = self.all(|origin| async move { origin.mark(digest).await }).await;
        if marked.is_err() {
            // One that is out of reach forgets by itself.
            drop(self.unmark(digest).await);
        }
        marked
    }

    /// Takes [`Self::mark`] back.
    pub async fn unmark(&self, digest: &Digest) -> Result<(), Error> {
        self.all(|origin| async move { origin.unmark(digest).await }).await
    }

    /// Deletes a marked blob from all origins and from the namespace's backend. What an error leaves is to be deleted again.
    pub async fn discard(&self, namespace: &Namespace, digest: &Digest) -> Result<(), Error> {
        self.all(|origin| async move { origin.discard(namespace, digest).await }).await
    }

    /// Calls every origin; the first error where there is any.
    async fn all<F: Future<Output = Result<(), Error>>>(&self, call: impl Fn(Origin) -> F) -> Result<(), Error> {
        let calls = (0..self.cluster().members().len()).map(|member| {
            let called = call(self.cluster().origin(member).clone());
            async move { self.told(member, called.await) }
        });
        futures_util::future::join_all(calls).await.into_iter().collect()
    }

    pub(super) async fn open_rest(
        &self,
        namespace: &Namespace,
        digest: &Digest,
        rest: Range<u64>,
        broken: Member,
    ) -> Result<(Member, Opened), Error> {
        self.cluster().failed(broken);
        let mut candidates = self.cluster().candidates(digest);
        // The one that broke off comes last, however healthy it looks.
        candidates.sort_by_key(|member| *member == broken);
        let rest = Some(Spec::Between(rest.start, rest.end.saturating_sub(1)));
        let ask = |origin: Origin| async move { origin.get(namespace, digest, rest, Reach::Everywhere).await };
        self.each_from(candidates, self.inner.patience, ask).await
    }

    pub(super) fn name(&self, member: Member) -> String {
        self.cluster().origin(member).addr().to_string()
    }

    /// The origins and their health, as this client knows it.
    pub fn cluster(&self) -> &Cluster {
        &self.inner.cluster
    }

    fn turn(&self) -> usize {
        self.inner.turn.fetch_add(1, Ordering::Relaxed)
    }

    fn at(&self, session: &Session) -> Result<(Member, &Origin), Error> {
        let member = self.cluster().find(session.addr.as_str()).ok_or(Error::UploadUnknown)?;
        Ok((member, self.cluster().origin(member)))
    }

    async fn each<T, F>(
        &self,
        candidates: Vec<Member>,
        patience: Duration,
        ask: impl Fn(Origin) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        self.each_from(candidates, patience, ask).await.map(|(_, answer)| answer)
    }

    /// Asks one after the other until one gives an answer that no other would better. Begins again, after a pause, while nobody
    /// was reached or had time and `patience` lasts.
    async fn each_from<T, F>(
        &self,
        candidates: Vec<Member>,
        patience: Duration,
        ask: impl Fn(Origin) -> F,
    ) -> Result<(Member, T), Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let until = Instant::now() + patience;
        let mut pause = ROUND_PAUSE;
        loop {
            let mut failure: Option<Error> = None;
            for member in &candidates {
                match self.told(*member, ask(self.cluster().origin(*member).clone()).await) {
                    Ok(answer) => return Ok((*member, answer)),
                    Err(error) if error.elsewhere() => {
                        // A refusal says more than a broken connection.
                        if failure.as_ref().is_none_or(Error::later) {
                            failure = Some(error);
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
            let failure = failure.unwrap_or_else(|| Error::Unreachable("no origin to ask".into()));
            if !failure.later() || Instant::now() + pause > until {
                return Err(failure);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(ROUND_PAUSE_MAX);
        }
    }

    /// Learns from how a call went.
    fn told<T>(&self, member: Member, answer: Result<T, Error>) -> Result<T, Error> {
        match &answer {
            Ok(_) => self.cluster().passed(member),
            Err(error) => self.judge(member, error),
        }
        answer
    }

    fn judge(&self, member: Member, error: &Error) {
        match error {
            Error::Unreachable(_) => self.cluster().failed(member),
            Error::Body => {}
            _ => self.cluster().passed(member),
        }
    }
}

fn digest_of(algorithm: Algorithm, bytes: &[u8]) -> Digest {
    let mut hasher = chain::Hasher::new(algorithm);
    hasher.update(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::cluster::CALLING;

    fn origins(addrs: &[&str]) -> Result<Origins, cluster::Error> {
        let addrs: Vec<HostPort> = addrs.iter().map(|addr| addr.parse().unwrap()).collect();
        Origins::new(&addrs, 2, CALLING, Duration::ZERO, &Client::default())
    }

    #[test]
    fn sessions_are_texts_that_name_only_our_own_origins() {
        let origins = origins(&["a:1", "[::1]:2"]).unwrap();
        for text in ["0f-1~a:1", "0f-1~[::1]:2"] {
            assert_eq!(origins.session(text).unwrap().to_string(), text);
        }
        let long = format!("{}~a:1", "x".repeat(600));
        for bad in ["", "~", "~a:1", "0f~b:1", "0f", "0f~a:1~a:1", "0f~a:1/x", &long] {
            assert_eq!(origins.session(bad), Err(Error::UploadUnknown), "{bad}");
        }
    }

    #[test]
    fn clusters_that_cannot_be() {
        assert_eq!(origins(&[]).err(), Some(cluster::Error::Empty));
        assert!(matches!(origins(&["a:1", "a:1"]), Err(cluster::Error::Ring(_))));
    }

    #[tokio::test]
    async fn an_origin_that_is_gone_is_asked_last_and_nobody_waits_without_patience() {
        // Ports that nobody listens on: bound once, then free again.
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let (one, other) = (free(), free());
        let origins = origins(&[&one, &other]).unwrap();
        let digest = digest_of(Algorithm::Sha256, b"x");
        let namespace = "lib/app".parse().unwrap();
        let before = origins.locations(&digest);
        assert_eq!(before.len(), 2);
        assert!(matches!(origins.stat(&namespace, &digest).await, Err(Error::Unreachable(_))));
        assert_eq!(origins.locations(&digest), before, "with all down, health says nothing");
    }
}
