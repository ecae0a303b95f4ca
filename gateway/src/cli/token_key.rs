//! `shoal token-key`: keys that sign the registry's tokens.

use super::say;
use crate::registry::access::{
    key_files::Paths,
    keys::{Algorithm, Private},
};
use anyhow::Context as _;
use clap::{Subcommand, ValueEnum};
use std::{
    fs::OpenOptions,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// `shoal token-key`
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a key in a new file that its owner alone can read, and print its public half
    New {
        /// The file, such as keys/2026-11.pem: of the keys in a folder, the last by name signs
        file: PathBuf,
        /// How it signs
        #[arg(long, value_enum, default_value_t = Kind::Es256)]
        algorithm: Kind,
    },
    /// Print the public halves of private keys as a JSON Web Key Set, for trusted_keys
    Public {
        /// A private key, or a folder of them
        path: PathBuf,
    },
}

/// How a key signs.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Kind {
    /// ECDSA on P-256
    Es256,
    /// Ed25519
    Eddsa,
}

impl Command {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::New { file, algorithm } => {
                let algorithm = match algorithm {
                    Kind::Es256 => Algorithm::Es256,
                    Kind::Eddsa => Algorithm::EdDsa,
                };
                write(&file, &Private::generate(algorithm)?).with_context(|| file.display().to_string())?;
                say(&public(&file)?)
            }
            Self::Public { path } => say(&public(&path)?),
        }
    }
}

/// Never over another key: tokens that it signed are still about.
fn write(file: &Path, pem: &str) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
    file.write_all(pem.as_bytes())?;
    file.sync_all()
}

fn public(path: &Path) -> anyhow::Result<String> {
    let paths = Paths { signing: Some(path.to_owned()), trusted: None };
    Ok(format!("{}\n", paths.read()?.parse()?.jwks()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::access::keys::parse_public;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn keys_are_made_once_for_their_owner_alone() {
        let dir = tempfile::TempDir::new().unwrap();
        for (name, algorithm) in [("1.pem", Kind::Es256), ("2.pem", Kind::Eddsa)] {
            let file = dir.path().join(name);
            let new = || Command::New { file: file.clone(), algorithm };
            new().run().unwrap();
            assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
            let text = std::fs::read(&file).unwrap();
            assert!(new().run().is_err(), "not over the first");
            assert_eq!(std::fs::read(&file).unwrap(), text);
            Private::parse(&text).unwrap();
        }
        assert_eq!(parse_public(public(dir.path()).unwrap().as_bytes()).unwrap().len(), 2);
        assert!(Command::Public { path: dir.path().join("none") }.run().is_err());
    }
}
