//! A TOML file that is edited and keeps its comments, its order and its spaces.

use thiserror::Error;
use toml_edit::{DocumentMut, Item, Table, TableLike, Value};

/// Why a file was not edited.
#[derive(Debug, Error)]
pub(super) enum Error {
    #[error("is not TOML: {0}")]
    Syntax(String),
    #[error("has a form that cannot be kept, such as lines that end in CR LF: rewrite it with plain line ends first")]
    Form,
    #[error("{0} is not a table: repair it first")]
    Shape(String),
}

/// The document of a text; an empty one where there is none.
pub(super) fn parse(text: Option<&str>) -> Result<DocumentMut, Error> {
    let text = text.unwrap_or_default();
    let document: DocumentMut = text.parse().map_err(|error: toml_edit::TomlError| {
        let at = error.span().map_or(0, |span| text[..span.start.min(text.len())].lines().count());
        Error::Syntax(format!("line {}: {}", at.max(1), error.message()))
    })?;
    let written = document.to_string();
    let kept = written == text || written.strip_suffix('\n') == Some(text);
    if kept { Ok(document) } else { Err(Error::Form) }
}

/// The table below another by this path, made where it is not there.
pub(super) fn table<'a>(mut at: &'a mut Table, path: &[&str]) -> Result<&'a mut dyn TableLike, Error> {
    let (last, above) = path.split_last().ok_or_else(|| Error::Shape(String::new()))?;
    for name in above {
        let item = at.entry(name).or_insert_with(|| {
            let mut table = Table::new();
            table.set_implicit(true);
            Item::Table(table)
        });
        at = item.as_table_mut().ok_or_else(|| Error::Shape((*name).to_owned()))?;
    }
    let item = at.entry(last).or_insert_with(|| Item::Table(Table::new()));
    item.as_table_like_mut().ok_or_else(|| Error::Shape((*last).to_owned()))
}

/// Gives a key a value, with the comment and the spaces of its old one, or with its neighbours' indentation.
pub(super) fn set(table: &mut dyn TableLike, name: &str, new: impl Into<Value>) {
    let mut new = new.into();
    if let Some(old) = table.get_mut(name).and_then(Item::as_value_mut) {
        *new.decor_mut() = old.decor().clone();
        *old = new;
        return;
    }
    let above = table.iter().filter(|(_, item)| item.is_value()).last().map(|(name, _)| name.to_owned());
    let prefix = above.and_then(|name| table.key(&name)?.leaf_decor().prefix()?.as_str().map(str::to_owned));
    table.insert(name, toml_edit::value(new));
    if let Some(prefix) = prefix
        && let Some(mut key) = table.key_mut(name)
    {
        let indent = prefix.rsplit('\n').next().unwrap_or_default();
        key.leaf_decor_mut().set_prefix(indent);
    }
}

/// The item below another by this path.
pub(super) fn item<'a>(at: &'a Table, path: &[&str]) -> Option<&'a Item> {
    let (first, rest) = path.split_first()?;
    let mut item = at.get(first)?;
    for name in rest {
        item = item.as_table_like()?.get(name)?;
    }
    Some(item)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_kept_is_refused() {
        assert!(matches!(parse(Some("a = 1\r\nb = 2\r\n")), Err(Error::Form)));
        let error = parse(Some("a = 1\nb = \n")).unwrap_err().to_string();
        assert!(error.starts_with("is not TOML: line 2: "), "{error}");
        assert_eq!(parse(Some("a = 1")).unwrap().to_string(), "a = 1\n");
        assert_eq!(parse(Some("# only\n")).unwrap().to_string(), "# only\n");
    }

    #[test]
    fn values_keep_comments_and_indentation() {
        let mut document = parse(Some("[a]\n  # one\n  x = 1 # two\n")).unwrap();
        let a = table(document.as_table_mut(), &["a"]).unwrap();
        set(a, "x", 2);
        set(a, "y", "z");
        assert_eq!(document.to_string(), "[a]\n  # one\n  x = 2 # two\n  y = \"z\"\n");
    }

    #[test]
    fn tables_are_found_and_made() {
        let mut document = parse(Some("[a.b]\nx = 1\n")).unwrap();
        set(table(document.as_table_mut(), &["a", "b"]).unwrap(), "y", 2);
        set(table(document.as_table_mut(), &["a", "c.d"]).unwrap(), "z", 3);
        assert_eq!(document.to_string(), "[a.b]\nx = 1\ny = 2\n\n[a.\"c.d\"]\nz = 3\n");
        assert!(item(document.as_table(), &["a", "c.d", "z"]).is_some());
        assert!(matches!(table(document.as_table_mut(), &["a", "b", "x", "q"]), Err(Error::Shape(_))));
    }
}
