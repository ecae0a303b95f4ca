//! containerd's own `config.toml`: where its CRI plugin looks for registries' `hosts.toml`.

use super::document;
use thiserror::Error;
use toml_edit::{DocumentMut, Item, value};

/// The folder that a file without one is given.
pub(super) const CERTS_DIR: &str = "/etc/containerd/certs.d";
/// Most other files that one may import.
const IMPORTS_MAX: usize = 64;

/// Why a file was not understood or edited.
#[derive(Debug, Error)]
pub(super) enum Error {
    #[error(transparent)]
    Document(#[from] document::Error),
    #[error(
        "has version {0}, and versions 1 to 4 are known here: name the folder of hosts.toml files with --certs-dir"
    )]
    Version(i64),
    #[error(
        "has registry.mirrors, beside which containerd refuses config_path: move them to hosts.toml files, and take them out here"
    )]
    Mirrors,
    #[error("imports more than {IMPORTS_MAX} files: name the folder of hosts.toml files with --certs-dir")]
    Imports,
}

/// What a file says about registries.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Facts {
    /// The folders of `hosts.toml` files, in the order they are looked at; none where it does not say.
    pub(super) certs_dirs: Vec<String>,
    /// Whether it says anything of the plugin: what it says then stands in the place of what an earlier file said.
    pub(super) has_plugin: bool,
    /// Patterns of further files.
    pub(super) imports: Vec<String>,
}

/// Reads a file.
pub(super) fn read(text: Option<&str>) -> Result<Facts, Error> {
    let document = document::parse(text)?;
    let [plugins, plugin, registry] = section(&document)?;
    let at = |path: &[&str]| document::item(document.as_table(), path);
    let texts = |item: &Item| -> Vec<String> {
        item.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
    };
    let mirrors = at(&[plugins, plugin, registry, "mirrors"]).and_then(Item::as_table_like);
    if mirrors.is_some_and(|mirrors| !mirrors.is_empty()) {
        return Err(Error::Mirrors);
    }
    let path = at(&[plugins, plugin, registry, "config_path"]).and_then(Item::as_str).unwrap_or_default();
    let imports = at(&["imports"]).map(texts).unwrap_or_default();
    if imports.len() > IMPORTS_MAX {
        return Err(Error::Imports);
    }
    Ok(Facts {
        certs_dirs: path.split(':').filter(|dir| !dir.is_empty()).map(str::to_owned).collect(),
        has_plugin: at(&[plugins, plugin]).is_some(),
        imports,
    })
}

/// The file with [`CERTS_DIR`] for its folder.
pub(super) fn edit(text: Option<&str>) -> Result<String, Error> {
    let mut document = document::parse(text)?;
    if document.is_empty() {
        // The oldest version that both containerd 1 and 2 read.
        document.insert("version", value(2));
    }
    let section = section(&document)?;
    document::set(document::table(document.as_table_mut(), &section)?, "config_path", CERTS_DIR);
    Ok(document.to_string())
}

/// The path of the table, by the file's version.
fn section(document: &DocumentMut) -> Result<[&'static str; 3], Error> {
    let plugin = match document.get("version").and_then(Item::as_integer).unwrap_or(1) {
        // A file with nothing in it has none either, and is given a version when it is written.
        1 if document.is_empty() => "io.containerd.grpc.v1.cri",
        1 => "cri",
        2 => "io.containerd.grpc.v1.cri",
        3 | 4 => "io.containerd.cri.v1.images",
        version => return Err(Error::Version(version)),
    };
    Ok(["plugins", plugin, "registry"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_set_where_each_version_has_it() {
        for (before, after) in [
            (
                "",
                "version = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n",
            ),
            ("oom_score = 0\n", "oom_score = 0\n\n[plugins.cri.registry]\nconfig_path = \"/etc/containerd/certs.d\"\n"),
            (
                "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    # ours\n    sandbox_image = \"p\"\n\n    [plugins.\"io.containerd.grpc.v1.cri\".registry]\n      config_path = \"\" # none\n\n[debug]\n  level = \"info\"\n",
                "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    # ours\n    sandbox_image = \"p\"\n\n    [plugins.\"io.containerd.grpc.v1.cri\".registry]\n      config_path = \"/etc/containerd/certs.d\" # none\n\n[debug]\n  level = \"info\"\n",
            ),
            (
                "version = 3\n\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'\n\n[debug]\nlevel = ''\n",
                "version = 3\n\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'\n\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/etc/containerd/certs.d\"\n\n[debug]\nlevel = ''\n",
            ),
        ] {
            let once = edit(Some(before)).unwrap();
            assert_eq!(once, after);
            assert_eq!(edit(Some(&once)).unwrap(), once);
            assert_eq!(read(Some(&once)).unwrap().certs_dirs, [CERTS_DIR]);
        }
    }

    #[test]
    fn a_file_is_read() {
        let facts = read(Some(
            "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/a:/b'\n",
        ));
        let wanted = Facts {
            certs_dirs: vec!["/a".into(), "/b".into()],
            has_plugin: true,
            imports: vec!["/etc/containerd/conf.d/*.toml".into()],
        };
        assert_eq!(facts.unwrap(), wanted);
        assert_eq!(read(None).unwrap(), Facts { certs_dirs: vec![], has_plugin: false, imports: vec![] });
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let mirrors =
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = []\n";
        assert!(matches!(read(Some(mirrors)), Err(Error::Mirrors)));
        assert!(matches!(read(Some("version = 9\n")), Err(Error::Version(9))));
        assert!(matches!(edit(Some("[")), Err(Error::Document(_))));
    }
}
