//! Which services a role is made of: the only place that knows roles, and the only one where things are wired.

pub mod dev;

use crate::{
    admin::{Admin, Check, Front, Metrics, signals},
    agent, client,
    client::cluster::{CALLING, Cluster, PROBING},
    config::{self, HostPort, Raw, Role},
    http::{self, Client, Service},
    index, origin, proxy, registry, retry, tracker,
    upstream::{Names, Upstreams},
};
use anyhow::Context as _;
use backends::{Naming, Router};
use peer_proto::announce;
use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

/// Longest wait for the engine's threads to show that they turn.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a proxy or an index bears with origins that cannot be reached before it says so.
const ORIGINS_PATIENCE: Duration = Duration::from_secs(10);
/// Longest wait of a proxy's reader for a blob that an origin has to fetch from its backend first.
const PROXY_REFRESH_WAIT: Duration = Duration::from_secs(15 * 60);
/// Longest wait for the retry queue's work under way at the end; what is cut is tried again at the next start.
const QUEUE_DRAIN: Duration = Duration::from_secs(5);
/// Anywhere outside: what a route is looked up for, never sent to. An address kept free for documentation.
const OUTSIDE: &str = "192.0.2.1:9";

/// Runs one role until it is told to stop.
pub fn run(role: Role, raw: &Raw) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let mut node = Node::new();
        match role {
            Role::Agent => node.agent(raw.agent()?).await?,
            Role::Origin => node.origin(raw.origin()?).await?,
            Role::Tracker => node.tracker(raw.tracker()?).await?,
            Role::Proxy => node.proxy(raw.proxy()?).await?,
            Role::Index => node.index(raw.index()?).await?,
        }
        node.until_told(raw.drain.get()).await
    })
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    raise_descriptor_limit();
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// Takes all descriptors the system lets us have: shells and service managers start processes with few.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "raise the limit of open descriptors");
    }
}

/// What runs in this process.
pub(crate) struct Node {
    stop: watch::Sender<bool>,
    /// Listeners' servers: they let requests under way end.
    servers: JoinSet<()>,
    /// Loops in the background.
    loops: JoinSet<()>,
    queues: Vec<retry::Queue>,
    engines: Vec<engine::Handle>,
    http: Client,
    /// The certificate of the listeners that follow.
    tls: Option<Arc<http::Tls>>,
    /// The same for registries, which ask clients for theirs where that is wanted: others know no names to do anything with.
    registry_tls: Option<Arc<http::Tls>>,
    /// Who may do what at the registries that follow.
    access: Option<Arc<registry::Access>>,
    drain: Duration,
}

impl Node {
    pub(crate) fn new() -> Self {
        Self {
            stop: watch::Sender::new(false),
            servers: JoinSet::new(),
            loops: JoinSet::new(),
            queues: Vec::new(),
            engines: Vec::new(),
            http: Client::default(),
            tls: None,
            registry_tls: None,
            access: None,
            drain: Duration::ZERO,
        }
    }

    /// Serves until a signal comes, then ends what is under way.
    async fn until_told(mut self, drain: Duration) -> anyhow::Result<()> {
        let mut signals = signals::Signals::take()?;
        self.drain = drain;
        signals::ready();
        let signal = signals.stop().await;
        tracing::info!(signal, "stopping");
        signals::stopping();
        tokio::select! {
            () = self.end() => Ok(()),
            signal = signals.stop() => anyhow::bail!("{signal} again: stopped at once"),
        }
    }

    /// Requests first, then what works for them, then what they read.
    pub(crate) async fn end(mut self) {
        self.stop.send_replace(true);
        while self.servers.join_next().await.is_some() {}
        while self.loops.join_next().await.is_some() {}
        for queue in self.queues {
            queue.close(QUEUE_DRAIN).await;
        }
        let drain = self.drain;
        futures_util::future::join_all(self.engines.iter().map(|engine| engine.shutdown(drain))).await;
    }

    fn serve<S: Service>(&mut self, role: Role, what: &'static str, listener: TcpListener, service: Arc<Front<S>>) {
        self.serve_with(self.tls.clone(), role, what, listener, service);
    }

    fn serve_registry<S: Service>(&mut self, role: Role, listener: TcpListener, service: Arc<Front<S>>) {
        self.serve_with(self.registry_tls.clone(), role, "registry", listener, service);
    }

    fn serve_with<S: Service>(
        &mut self,
        tls: Option<Arc<http::Tls>>,
        role: Role,
        what: &'static str,
        listener: TcpListener,
        service: Arc<Front<S>>,
    ) {
        match listener.local_addr() {
            Ok(addr) => tracing::info!(%role, %addr, "serving {what}"),
            Err(error) => tracing::warn!(%role, %error, "serving {what}"),
        }
        let serving = http::server::serve_with(listener, tls, service, self.stop.subscribe(), self.drain);
        self.servers.spawn(serving);
    }

    /// What all roles have in common.
    fn prepare(&mut self, common: &config::Common) -> anyhow::Result<()> {
        self.drain = common.drain;
        self.http = match &common.ca {
            Some(ca) => Client::secure(http::tls::trusting(ca).context("cluster.ca")?),
            None => Client::default(),
        };
        let open = |files: http::tls::Files| http::Tls::open(files).context("tls");
        self.registry_tls = common.tls.clone().map(open).transpose()?;
        self.tls = match &common.tls {
            Some(files) if files.client_ca.is_some() => Some(open(files.asking_nobody())?),
            _ => self.registry_tls.clone(),
        };
        let asking =
            self.registry_tls.as_ref().filter(|_| common.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some()));
        for tls in self.tls.iter().chain(asking) {
            self.loops.spawn(tls.clone().watch(self.stop.subscribe()));
        }
        self.access = common.access.clone().map(registry::Access::open).transpose().context("access")?;
        if let Some(access) = &self.access {
            self.loops.spawn(access.clone().watch(self.stop.subscribe()));
        }
        Ok(())
    }

    /// Tags and records at these indexes, as this role's access control has them.
    fn tags(&self, index: &client::Index) -> registry::Tags {
        registry::Tags::new(index.clone()).recorded(self.access.as_ref().is_some_and(|access| access.is_strict()))
    }

    fn engine(&mut self, mut config: engine::Config, near: &[HostPort]) -> anyhow::Result<engine::Handle> {
        if config.advertise.is_none() && config.listen.ip().is_unspecified() && config.listen.port() != 0 {
            config.advertise = Some(advertised(config.listen, near)?);
        }
        let (dir, listen) = (config.data_dir.clone(), config.listen);
        let engine =
            engine::start(config).with_context(|| format!("start the engine in {} on {listen}", dir.display()))?;
        tracing::info!(id = %engine.id(), addr = %engine.peer_addr(), "serving peers");
        self.engines.push(engine.clone());
        Ok(engine)
    }

    fn origins(
        &self,
        origins: &[HostPort],
        replicas: usize,
        rules: client::health::Rules,
    ) -> anyhow::Result<Arc<Cluster>> {
        let cluster = Cluster::new(origins, None, replicas, rules, &self.http).context("cluster.origins")?;
        Ok(Arc::new(cluster))
    }

    pub(crate) async fn agent(&mut self, config: config::Agent) -> anyhow::Result<()> {
        self.prepare(&config.common)?;
        let registry_listener = listen(config.registry).await?;
        let api_listener = listen(config.api).await?;
        let preload = agent::Preload::new(config.preload, local(&registry_listener)?, self.tls.is_some());
        let engine = self.engine(config.engine, &config.trackers)?;
        let trackers = client::Tracker::new(&config.trackers, self.http.clone()).context("cluster.trackers")?;
        let index = client::Index::new(config.indexes, self.http.clone());
        let mut sources: Vec<Arc<dyn agent::fallback::Source>> = Vec::new();
        if !config.origins.is_empty() {
            let cluster = self.origins(&config.origins, config.replicas.get(), CALLING)?;
            sources.push(Arc::new(client::Origins::of(cluster, Duration::ZERO)));
        }
        if !config.common.upstreams.is_empty() {
            match upstreams(&config.common).await {
                Ok(upstreams) => sources.push(Arc::new(upstreams)),
                // Origins fetch from them all the same; their credentials need not be on every host.
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(error, "this agent cannot ask upstreams itself while no origin is reached");
                }
            }
        }
        let downloads =
            agent::Downloads::new(engine.clone(), trackers.clone(), config.download, sources).plain(self.tls.is_none());
        let content = agent::registry::Store::new(downloads.clone(), self.tags(&index));
        let names = Names::new(&config.common.upstreams, &config.common.mirror);
        let rules = registry::Rules { names, ..registry::Rules::default() };
        let images = registry::Service::guarded(content, rules, self.access.clone());
        let figures = agent::announcer::Figures::default();

        let mut metrics = Metrics::new(Role::Agent);
        metrics.engine(engine.clone());
        downloads.register(metrics.registry());
        figures.register(metrics.registry());
        images.register(metrics.registry());
        let preheat = agent::Preheat::new(downloads.clone(), trackers.clone(), engine.peer_addr(), config.labels);
        preheat.register(metrics.registry());
        let ready = vec![engine_check(&engine), tracker_check(&trackers), index_check(&index)];
        let admin = Admin::new(Role::Agent, metrics, vec![engine_check(&engine)], ready);
        let api = agent::Api::new(downloads, index, preload);
        let images = registry::Relay::new(images, config.proxy.map(|proxy| (proxy, self.http.clone())));
        self.serve_registry(Role::Agent, registry_listener, admin.front(images, registry::class));
        self.serve(Role::Agent, "blobs", api_listener, admin.front(api, agent::api::class));

        let node =
            announce::Node { id: engine.id(), addr: engine.peer_addr(), zone: config.zone.into(), origin: false };
        self.loops.spawn(agent::announcer::run(engine, trackers, node, figures, self.stop.subscribe()));
        self.loops.spawn(preheat.run(self.stop.subscribe()));
        Ok(())
    }

    pub(crate) async fn origin(&mut self, config: config::Origin) -> anyhow::Result<()> {
        self.prepare(&config.common)?;
        let listener = listen(config.api).await?;
        let others: Vec<HostPort> = config.origins.iter().filter(|origin| **origin != config.this).cloned().collect();
        let engine = self.engine(config.engine, &others)?;
        let queue =
            retry::Queue::open(&config.common.data_dir.join("retry.db"), config.retry).context("retry queue")?;
        self.queues.push(queue.clone());
        let backends = open_backends(&config.backends, Naming::ShardedDockerBlob).await?;
        let upstreams = upstreams(&config.common).await?;
        let place = origin::Place {
            this: config.this,
            origins: config.origins,
            replicas: config.replicas.get(),
            zone: config.zone,
            plain: self.tls.is_none(),
        };
        let service = origin::Service::start(
            config.origin,
            place,
            engine.clone(),
            backends,
            upstreams,
            queue.clone(),
            &self.http,
        )
        .await?;

        let mut metrics = Metrics::new(Role::Origin);
        metrics.engine(engine.clone());
        service.register(metrics.registry());
        metrics.registry().register_collector(Box::new(queue));
        let ready = Check::new("origin", {
            let service = service.clone();
            move || {
                let service = service.clone();
                async move { service.readiness().await }
            }
        });
        let admin = Admin::new(Role::Origin, metrics, vec![engine_check(&engine)], vec![engine_check(&engine), ready]);
        self.serve(Role::Origin, "blobs", listener, admin.front(service.clone(), origin::class));
        let stop = self.stop.subscribe();
        self.loops.spawn(async move { service.run(stop).await });
        Ok(())
    }

    pub(crate) async fn tracker(&mut self, config: config::TrackerRole) -> anyhow::Result<()> {
        self.prepare(&config.common)?;
        let listener = listen(config.api).await?;
        let cluster = self.origins(&config.origins, config.replicas.get(), PROBING)?;
        let tracker = tracker::Tracker::new(&config, cluster.clone());
        let mut metrics = Metrics::new(Role::Tracker);
        tracker.register(metrics.registry());
        let ready = vec![origins_check(client::Origins::of(cluster, Duration::ZERO))];
        let admin = Admin::new(Role::Tracker, metrics, Vec::new(), ready);
        self.serve(Role::Tracker, "announces", listener, admin.front(tracker.clone(), tracker::class));
        self.loops.spawn(tracker.run(self.stop.subscribe()));
        Ok(())
    }

    pub(crate) async fn proxy(&mut self, config: config::Proxy) -> anyhow::Result<()> {
        self.prepare(&config.common)?;
        let listener = listen(config.registry).await?;
        let cluster = self.origins(&config.origins, config.replicas.get(), PROBING)?;
        let origins = client::Origins::of(cluster.clone(), ORIGINS_PATIENCE);
        let index = client::Index::new(config.indexes, self.http.clone());
        let store = proxy::Store::new(origins.clone(), self.tags(&index), PROXY_REFRESH_WAIT);
        let names = Names::new(&config.common.upstreams, &config.common.mirror);
        let rules = registry::Rules { sparse: config.sparse_indexes, names };
        let images = registry::Service::guarded(store, rules, self.access.clone());
        let mut metrics = Metrics::new(Role::Proxy);
        images.register(metrics.registry());
        let ready = vec![origins_check(origins), index_check(&index)];
        let hosts = match &*config.trackers {
            [] => proxy::Hosts::default(),
            trackers => {
                let trackers = client::Tracker::new(trackers, self.http.clone()).context("cluster.trackers")?;
                proxy::Hosts::new(trackers)
            }
        };
        let hosts = Arc::new(hosts);
        let proxy = proxy::Proxy::new(images, proxy::Limits::default(), hosts.clone());
        proxy.register(metrics.registry());
        let admin = Admin::new(Role::Proxy, metrics, Vec::new(), ready);
        let stop = self.stop.subscribe();
        self.loops.spawn(async move { hosts.run(stop).await });
        self.serve_registry(Role::Proxy, listener, admin.front(proxy, proxy::class));
        self.loops.spawn(cluster.watch(self.stop.subscribe()));
        Ok(())
    }

    pub(crate) async fn index(&mut self, config: config::IndexRole) -> anyhow::Result<()> {
        self.prepare(&config.common)?;
        let listener = listen(config.api).await?;
        let router = {
            let config = config.index.clone();
            tokio::task::spawn_blocking(move || config.router()).await?.context("backends")?
        };
        let cluster = self.origins(&config.origins, config.replicas.get(), CALLING)?;
        let origins = client::Origins::of(cluster, ORIGINS_PATIENCE);
        let upstreams = upstreams(&config.common).await?;
        let service = match config.index.collect.clone() {
            Some(collect) => {
                index::Service::collecting(router, &config.index, upstreams, config.origins, origins, collect)
            }
            None => {
                let dependencies: Option<Arc<dyn index::Dependencies>> = match config.index.check_dependencies {
                    true => Some(Arc::new(index::OfOrigins::new(origins, config.index.sparse_indexes))),
                    false => None,
                };
                index::Service::new(router, &config.index, upstreams, config.origins, dependencies)
            }
        };
        let ready = Check::new("index", {
            let service = service.clone();
            move || {
                let service = service.clone();
                async move { service.readiness().await }
            }
        });
        let mut metrics = Metrics::new(Role::Index);
        service.register(metrics.registry());
        let admin = Admin::new(Role::Index, metrics, Vec::new(), vec![ready]);
        self.serve(Role::Index, "tags", listener, admin.front(service.clone(), index::class));
        let stop = self.stop.subscribe();
        self.loops.spawn(async move { service.run(stop).await });
        Ok(())
    }
}

async fn listen(addr: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr).await.with_context(|| format!("listen on {addr}"))
}

/// How this host reaches a listener of ours.
fn local(listener: &TcpListener) -> anyhow::Result<String> {
    let mut addr = listener.local_addr()?;
    if addr.ip().is_unspecified() {
        addr.set_ip(if addr.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    Ok(addr.to_string())
}

async fn open_backends(routes: &[backends::RouteConfig], naming: Naming) -> anyhow::Result<Router> {
    let routes = routes.to_vec();
    tokio::task::spawn_blocking(move || Router::open(&routes, naming)).await?.context("backends")
}

async fn upstreams(common: &config::Common) -> anyhow::Result<Upstreams> {
    let (configs, fallback) = (common.upstreams.clone(), common.mirror.default_upstream.clone());
    let opened = tokio::task::spawn_blocking(move || Upstreams::open(&configs, fallback.as_deref()));
    opened.await?.context("upstreams")
}

/// The address that others reach us at: that of the route to one of them, or of the route outside.
fn advertised(listen: SocketAddr, near: &[HostPort]) -> anyhow::Result<SocketAddr> {
    let route = |to: &str| -> std::io::Result<SocketAddr> {
        let socket = UdpSocket::bind((listen.ip(), 0))?;
        // Sends nothing: it only has the kernel choose the way.
        socket.connect(to)?;
        socket.local_addr()
    };
    let mut last = None;
    for to in near.iter().map(HostPort::as_str).chain([OUTSIDE]) {
        match route(to) {
            Ok(addr) => return Ok(SocketAddr::new(addr.ip(), listen.port())),
            Err(error) => last = Some(error),
        }
    }
    let error = last.map(|error| error.to_string()).unwrap_or_default();
    anyhow::bail!("peer.advertise: the address that others reach us at cannot be found ({error}); set it")
}

fn engine_check(engine: &engine::Handle) -> Check {
    let engine = engine.clone();
    Check::new("engine", move || {
        let engine = engine.clone();
        async move { engine.probe(PROBE_TIMEOUT).await.map_err(|error| error.to_string()) }
    })
}

fn tracker_check(trackers: &client::Tracker) -> Check {
    let trackers = trackers.clone();
    Check::new("tracker", move || {
        let trackers = trackers.clone();
        async move { trackers.readiness().await.map_err(|error| error.to_string()) }
    })
}

fn index_check(index: &client::Index) -> Check {
    let index = index.clone();
    Check::new("index", move || {
        let index = index.clone();
        async move { index.readiness().await.map_err(|error| error.to_string()) }
    })
}

fn origins_check(origins: client::Origins) -> Check {
    Check::new("origins", move || {
        let origins = origins.clone();
        async move { origins.readiness().await.map_err(|error| error.to_string()) }
    })
}
