//! Which store keeps what: a list of namespaces and stores, the first match wins, as Kraken's `backends`.

use crate::{
    Backend, Error, Fs, FsConfig, Limited, LimitsConfig, Memory, MemoryConfig, Named, Naming, RetriesConfig, Retrying,
};
use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use std::{fmt, sync::Arc};

/// Longest compiled namespace expression, bytes.
const REGEX_SIZE_MAX: usize = 1 << 20;
/// What a store is asked for to see whether it answers.
const PROBE: &str = "shoal-readiness-probe";

/// One store and the namespaces it keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteConfig {
    /// A regular expression that finds a match anywhere in the namespaces kept here; the default matches all.
    #[serde(default = "all_namespaces")]
    pub namespace: String,
    /// How names become paths. Where it is missing: what the role that asks usually has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub naming: Option<Naming>,
    /// The role is ready only while this store answers.
    #[serde(default)]
    pub must_ready: bool,
    /// The store.
    pub store: StoreConfig,
    /// What it may be asked to do.
    #[serde(default)]
    pub limits: LimitsConfig,
    /// How its failures are retried.
    #[serde(default)]
    pub retries: RetriesConfig,
}

fn all_namespaces() -> String {
    ".*".to_owned()
}

impl RouteConfig {
    /// All namespaces in this store, the rest as by default.
    pub fn all(store: StoreConfig) -> Self {
        Self {
            namespace: all_namespaces(),
            naming: None,
            must_ready: false,
            store,
            limits: LimitsConfig::default(),
            retries: RetriesConfig::default(),
        }
    }
}

/// A store's kind and place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StoreConfig {
    /// A directory tree.
    Fs(FsConfig),
    /// Memory.
    Memory(MemoryConfig),
}

impl StoreConfig {
    /// Opens the store itself, without limits or retries. Blocks on the file system.
    pub fn open(&self) -> Result<Arc<dyn Backend>, Error> {
        Ok(match self {
            Self::Fs(config) => Arc::new(Fs::open(config)?),
            Self::Memory(config) => Arc::new(Memory::new(config.clone())),
        })
    }
}

/// One store and the namespaces it keeps, ready for use. Cheap to clone.
#[derive(Clone)]
pub struct Route {
    namespace: Regex,
    naming: Naming,
    must_ready: bool,
    store: Arc<dyn Backend>,
    paths: Arc<dyn Backend>,
}

impl Route {
    /// A route to a store at hand: `paths` takes paths, as a bare store does.
    pub fn new(namespace: &str, naming: Naming, must_ready: bool, paths: Arc<dyn Backend>) -> Result<Self, Error> {
        let namespace = RegexBuilder::new(namespace).size_limit(REGEX_SIZE_MAX).build();
        let namespace = namespace.map_err(|error| Error::Invalid(format!("namespace: {error}")))?;
        let store = Arc::new(Named::new(naming, paths.clone()));
        Ok(Self { namespace, naming, must_ready, store, paths })
    }

    /// Opens the store of a configuration. Blocks on the file system.
    pub fn open(config: &RouteConfig, naming: Naming) -> Result<Self, Error> {
        let limited = Limited::new(config.store.open()?, &config.limits);
        let retrying = Retrying::new(Arc::new(limited), config.retries.clone());
        Self::new(&config.namespace, config.naming.unwrap_or(naming), config.must_ready, Arc::new(retrying))
    }

    /// Whether the namespace is one that this route would keep, if no earlier one did.
    pub fn keeps(&self, namespace: &str) -> bool {
        self.namespace.is_match(namespace)
    }

    /// The store by the names of its naming: what most callers want.
    pub fn store(&self) -> &Arc<dyn Backend> {
        &self.store
    }

    /// The same store by paths.
    pub fn paths(&self) -> &Arc<dyn Backend> {
        &self.paths
    }

    /// How names become paths.
    pub fn naming(&self) -> Naming {
        self.naming
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("namespace", &self.namespace.as_str()).field("naming", &self.naming).finish()
    }
}

/// Stores by namespace.
#[derive(Clone, Debug, Default)]
pub struct Router {
    routes: Arc<[Route]>,
}

impl Router {
    /// Routes in the order they are tried.
    pub fn new(routes: Vec<Route>) -> Self {
        Self { routes: routes.into() }
    }

    /// Opens every store; `naming` where a configuration names none. Blocks on the file system.
    pub fn open(routes: &[RouteConfig], naming: Naming) -> Result<Self, Error> {
        let routes: Result<Vec<_>, _> = routes.iter().map(|config| Route::open(config, naming)).collect();
        Ok(Self::new(routes?))
    }

    /// The first route that keeps the namespace.
    pub fn find(&self, namespace: &str) -> Option<&Route> {
        self.routes.iter().find(|route| route.keeps(namespace))
    }

    /// All routes, in order.
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// Whether every store that must be ready answers; that it knows nothing of the object asked for is an answer.
    pub async fn ready(&self) -> Result<(), Error> {
        for route in self.routes.iter().filter(|route| route.must_ready) {
            match route.paths.stat(PROBE).await {
                Ok(_) | Err(Error::NotFound) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FaultConfig, Faulty, conformance};
    use serde_json::json;

    #[tokio::test]
    async fn a_configured_store_conforms_and_the_first_match_wins() {
        let dir = tempfile::tempdir().unwrap();
        let config = json!([
            { "namespace": "^lib/", "naming": "identity", "store": { "kind": "fs", "root": dir.path().join("lib") } },
            { "store": { "kind": "memory" }, "limits": { "concurrency": 3 }, "retries": { "tries": 1 } },
        ]);
        let config: Vec<RouteConfig> = serde_json::from_value(config).unwrap();
        let router = Router::open(&config, Naming::ShardedDockerBlob).unwrap();
        let lib = router.find("lib/app").unwrap();
        assert_eq!(lib.naming(), Naming::Identity);
        conformance::all(lib.store().clone()).await;
        let other = router.find("my/lib/app").unwrap();
        other.store().write("sha256:abcd", "x".into()).await.unwrap();
        assert_eq!(other.paths().stat("docker/registry/v2/blobs/sha256/ab/abcd/data").await.unwrap(), 1);
        assert!(matches!(lib.store().stat("sha256:abcd").await, Err(Error::NotFound)));
        router.ready().await.unwrap();
    }

    #[test]
    fn wrong_configurations_are_refused() {
        for wrong in [
            json!({ "store": { "kind": "tape" } }),
            json!({ "store": { "kind": "fs" } }),
            json!({ "store": { "kind": "fs", "root": "/x", "rot": 1 } }),
            json!({ "store": { "kind": "memory", "bytes_max": 0 } }),
            json!({ "store": { "kind": "memory" }, "limits": { "read_bits": 1 } }),
            json!({ "store": { "kind": "memory" }, "nmespace": "x" }),
        ] {
            assert!(serde_json::from_value::<RouteConfig>(wrong.clone()).is_err(), "{wrong}");
        }
        let bad =
            RouteConfig { namespace: "(".into(), ..RouteConfig::all(StoreConfig::Memory(MemoryConfig::default())) };
        assert!(matches!(Router::open(&[bad], Naming::Identity), Err(Error::Invalid(_))));
    }

    #[test]
    fn configurations_print_as_they_parse() {
        let config = RouteConfig::all(StoreConfig::Fs(FsConfig { root: "/var/lib/shoal".into() }));
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<RouteConfig>(&text).unwrap(), config);
    }

    #[tokio::test]
    async fn readiness_is_that_of_the_stores_that_must() {
        let store = Arc::new(Faulty::new(Arc::new(Memory::default()), FaultConfig::default()));
        let must = Router::new(vec![Route::new(".*", Naming::Identity, true, store.clone()).unwrap()]);
        let may = Router::new(vec![Route::new(".*", Naming::Identity, false, store.clone()).unwrap()]);
        must.ready().await.unwrap();
        store.set_down(true);
        assert!(must.ready().await.is_err());
        may.ready().await.unwrap();
    }
}
