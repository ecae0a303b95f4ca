//! What setup wrote, so that it can be told from what others wrote, and taken back.
//!
//! A runtime's record holds each file as it was before setup's first change and as setup left it. From both follows how the file
//! would look today had setup never been there ([`Entry::without`]): as before where nobody else has written to it, and else by a
//! merge of three texts, which keeps what others wrote meanwhile. Every run plans from that text, so a second one changes nothing,
//! one with other arguments leaves nothing of the first behind, and undoing is planning nothing.

use super::root::{self, Access, Root};
use serde::{Deserialize, Serialize};
use similar::TextMerge;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// The folder of all records.
const DIR: &str = "/etc/shoal/setup";
/// The only version of the file's form.
const VERSION: u32 = 1;

/// Why a record cannot be used.
#[derive(Debug, Error)]
pub(super) enum Error {
    #[error(transparent)]
    File(#[from] root::Error),
    #[error(
        "{path} cannot be read as the record of an earlier setup ({why}): move it away; then setup takes the files as they are"
    )]
    Damaged { path: PathBuf, why: String },
    #[error("{path} was written by another version of this command: use that version's --undo first")]
    Version { path: PathBuf },
}

/// Others have changed what setup wrote, in the same lines.
#[derive(PartialEq, Eq, Debug, Error)]
#[error("was changed by others in the lines that setup wrote")]
pub(super) struct Changed;

/// All that setup wrote for one runtime.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    version: u32,
    /// Folders that were made, each before those below it.
    dirs: BTreeSet<PathBuf>,
    pub(super) files: Vec<Entry>,
}

/// One file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    /// Where it is, below the root.
    pub(super) path: PathBuf,
    /// Its text without setup's change; none where there was no file.
    pub(super) before: Option<String>,
    /// Its text with it.
    pub(super) after: String,
}

impl Entry {
    /// The file's text today without setup's change; none where there would be no file.
    pub(super) fn without(&self, now: Option<&str>) -> Result<Option<String>, Changed> {
        let Some(now) = now else { return Ok(None) };
        if now == self.after || self.before.as_deref() == Some(now) {
            return Ok(self.before.clone());
        }
        let before = self.before.as_deref().unwrap_or_default();
        let merge = TextMerge::from_lines(self.after.as_str(), now, before);
        if merge.is_conflicted() {
            return Err(Changed);
        }
        let merged = merge.to_string();
        if self.before.is_none() && merged.trim().is_empty() {
            return Ok(None);
        }
        if is_sound(&self.path, &merged) { Ok(Some(merged)) } else { Err(Changed) }
    }
}

/// Whether a merged text is still of its file's form.
fn is_sound(path: &Path, text: &str) -> bool {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => serde_json::from_str::<serde_json::Value>(text).is_ok(),
        Some("toml" | "conf") => toml::from_str::<toml::Table>(text).is_ok(),
        _ => true,
    }
}

impl Record {
    /// An empty one.
    pub(super) fn new() -> Self {
        Self { version: VERSION, dirs: BTreeSet::new(), files: Vec::new() }
    }

    fn path(name: &str) -> PathBuf {
        Path::new(DIR).join(format!("{name}.json"))
    }

    /// What was written for a runtime; an empty one where nothing was.
    pub(super) fn load(root: &Root, name: &str) -> Result<Self, Error> {
        let path = Self::path(name);
        let Some(text) = root.read(&path)? else { return Ok(Self::new()) };
        let damaged = |error: serde_json::Error| Error::Damaged { path: root.shown(&path), why: error.to_string() };
        let record: Self = serde_json::from_str(&text).map_err(damaged)?;
        if record.version == VERSION { Ok(record) } else { Err(Error::Version { path: root.shown(&path) }) }
    }

    /// Puts it in the place of the last; what it notes may be written then.
    pub(super) fn save(&mut self, root: &Root, name: &str) -> Result<(), Error> {
        let path = Self::path(name);
        let files = self.files.iter().map(|entry| &*entry.path);
        for file in files.chain([&*path]) {
            self.dirs.extend(root.missing_dirs(file)?);
        }
        let damaged = |error: serde_json::Error| Error::Damaged { path: root.shown(&path), why: error.to_string() };
        let text = serde_json::to_string_pretty(self).map_err(damaged)?;
        Ok(root.write(&path, &text, Access::Private)?)
    }

    /// Takes folders that are of no use any more away, and puts what is left in the place of the last record; an empty one goes.
    pub(super) fn settle(&mut self, root: &Root, name: &str) -> Result<(), Error> {
        if self.files.is_empty() {
            root.remove(&Self::path(name))?;
        }
        for dir in std::mem::take(&mut self.dirs).into_iter().rev() {
            if !root.remove_empty(&dir)? {
                self.dirs.insert(dir);
            }
        }
        if self.files.is_empty() { Ok(()) } else { self.save(root, name) }
    }

    /// The entry of a file that was written.
    pub(super) fn entry(&self, path: &Path) -> Option<&Entry> {
        self.files.iter().find(|entry| entry.path == path)
    }

    /// The same, with other files.
    pub(super) fn with(&self, files: Vec<Entry>) -> Self {
        Self { version: self.version, dirs: self.dirs.clone(), files }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(before: Option<&str>, after: &str) -> Entry {
        let before = before.map(str::to_owned);
        Entry { path: "/etc/docker/daemon.json".into(), before, after: after.into() }
    }

    #[test]
    fn a_file_without_setup_is_as_before_and_keeps_what_others_wrote() {
        let before = "{\n  \"a\": 1,\n  \"b\": 2\n}\n";
        let after = "{\n  \"registry-mirrors\": [\"http://m\"],\n  \"a\": 1,\n  \"b\": 2\n}\n";
        let entry = entry(Some(before), after);
        assert_eq!(entry.without(Some(after)).unwrap().as_deref(), Some(before));
        assert_eq!(entry.without(Some(before)).unwrap().as_deref(), Some(before), "setup broke off before it wrote");
        assert_eq!(entry.without(None).unwrap(), None, "others removed it");
        let foreign = after.replace("2\n", "3,\n  \"c\": 4\n");
        let merged = entry.without(Some(&foreign)).unwrap();
        assert_eq!(merged.as_deref(), Some("{\n  \"a\": 1,\n  \"b\": 3,\n  \"c\": 4\n}\n"));
        let clash = after.replace("http://m", "http://other");
        assert_eq!(entry.without(Some(&clash)), Err(Changed));
        assert_eq!(entry.without(Some("{")), Err(Changed));
    }

    #[test]
    fn a_file_that_setup_made_is_gone_without_it() {
        let entry = entry(None, "{\n  \"registry-mirrors\": []\n}\n");
        assert_eq!(entry.without(Some(&entry.after)).unwrap(), None);
        assert_eq!(entry.without(Some("{\n  \"x\": 1\n}\n")), Err(Changed));
    }

    #[test]
    fn a_record_is_kept_and_goes_with_its_folders() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().to_owned());
        assert_eq!(Record::load(&root, "docker").unwrap(), Record::new());
        let mut record = Record::new().with(vec![entry(None, "{}")]);
        record.save(&root, "docker").unwrap();
        assert_eq!(Record::load(&root, "docker").unwrap(), record);
        record.with(Vec::new()).settle(&root, "docker").unwrap();
        assert!(root.names(Path::new("/")).unwrap().is_empty());

        for (text, damaged) in [("{", true), ("{\"version\":2,\"dirs\":[],\"files\":[]}", false)] {
            root.write(&Record::path("docker"), text, Access::Private).unwrap();
            let error = Record::load(&root, "docker").unwrap_err();
            assert_eq!(matches!(error, Error::Damaged { .. }), damaged, "{error}");
        }
    }
}
