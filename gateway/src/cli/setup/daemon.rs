//! dockerd's `daemon.json`.
//!
//! It is edited as text: everything but the lists that are added to stays as it was written, byte for byte.

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;
use std::fmt;
use thiserror::Error;

/// Why a file was not edited.
#[derive(Debug, Error)]
pub(super) enum Error {
    #[error("is not a JSON object that dockerd would take: {0}")]
    NotJson(String),
    #[error("{0} is not a list of texts: repair it first")]
    NotAList(&'static str),
    #[error("{0} is there twice: take one out first")]
    Twice(&'static str),
}

/// The file with a mirror before all others, and with a registry that is asked over plain HTTP.
pub(super) fn edit(text: Option<&str>, mirror: &str, insecure: Option<&str>) -> Result<String, Error> {
    let text = match text {
        Some(text) if !text.trim().is_empty() => text.to_owned(),
        _ => "{}\n".to_owned(),
    };
    // The last to be added comes first.
    let text = match insecure {
        Some(registry) => add(&text, "insecure-registries", registry)?,
        None => text,
    };
    add(&text, "registry-mirrors", mirror)
}

/// An object's members in the order of the text, their values as they are written.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Gather;

        impl<'de> Visitor<'de> for Gather {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Gather)
    }
}

/// The text with a value at the head of the list of that key.
fn add(text: &str, key: &'static str, value: &str) -> Result<String, Error> {
    let Members(members) = serde_json::from_str(text).map_err(|error| Error::NotJson(error.to_string()))?;
    let quoted = serde_json::Value::from(value).to_string();
    let mut lists = members.iter().filter(|(name, _)| name == key).map(|(_, list)| *list);
    let list = lists.next();
    if lists.next().is_some() {
        return Err(Error::Twice(key));
    }
    // A parsed object begins with its brace, a list with its bracket.
    let (open, item, empty) = match list {
        None => (text.find('{').unwrap_or_default(), format!("\"{key}\": [{quoted}]"), members.is_empty()),
        Some(list) if list.get() == "null" => {
            let start = offset(text, list);
            return Ok(format!("{}[{quoted}]{}", &text[..start], &text[start + 4..]));
        }
        Some(list) => {
            let there: Vec<String> = serde_json::from_str(list.get()).map_err(|_| Error::NotAList(key))?;
            // dockerd itself takes both for the same.
            if there.iter().any(|one| one.trim_end_matches('/') == value.trim_end_matches('/')) {
                return Ok(text.to_owned());
            }
            (offset(text, list), quoted, there.is_empty())
        }
    };
    let (head, tail) = text.split_at(open + 1);
    let rest = tail.trim_start();
    let space = &tail[..tail.len() - rest.len()];
    Ok(match (empty, list) {
        (true, None) => format!("{head}\n  {item}\n{rest}"),
        (true, Some(_)) => format!("{head}{item}{rest}"),
        (false, _) => {
            let between = if space.is_empty() { " " } else { space };
            format!("{head}{space}{item},{between}{rest}")
        }
    })
}

/// Where a value that was borrowed from a text begins in it.
fn offset(text: &str, value: &RawValue) -> usize {
    value.get().as_ptr() as usize - text.as_ptr() as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const AGENT: &str = "http://127.0.0.1:16000";

    #[test]
    fn the_mirror_comes_first_and_the_rest_stays_as_it_is_written() {
        for (before, after) in [
            ("", "{\n  \"registry-mirrors\": [\"http://127.0.0.1:16000\"]\n}\n"),
            ("{ }", "{\n  \"registry-mirrors\": [\"http://127.0.0.1:16000\"]\n}"),
            (
                "{\n\t\"log-driver\": \"journald\",\n\t\"features\": { \"x\": true }\n}\n",
                "{\n\t\"registry-mirrors\": [\"http://127.0.0.1:16000\"],\n\t\"log-driver\": \"journald\",\n\t\"features\": { \"x\": true }\n}\n",
            ),
            ("{\"debug\":true}", "{\"registry-mirrors\": [\"http://127.0.0.1:16000\"], \"debug\":true}"),
            ("{\"registry-mirrors\": [ ]}", "{\"registry-mirrors\": [\"http://127.0.0.1:16000\"]}"),
            ("{\"registry-mirrors\": null}", "{\"registry-mirrors\": [\"http://127.0.0.1:16000\"]}"),
            (
                "{\n  \"registry-mirrors\": [\n    \"https://a\"\n  ]\n}",
                "{\n  \"registry-mirrors\": [\n    \"http://127.0.0.1:16000\",\n    \"https://a\"\n  ]\n}",
            ),
            (
                "{\"registry-mirrors\": [\"http://127.0.0.1:16000/\"]}",
                "{\"registry-mirrors\": [\"http://127.0.0.1:16000/\"]}",
            ),
        ] {
            assert_eq!(edit(Some(before), AGENT, None).unwrap(), after);
            assert_eq!(edit(Some(after), AGENT, None).unwrap(), after);
        }
    }

    #[test]
    fn plain_http_to_another_host_is_allowed_by_name() {
        let after =
            edit(Some("{\"insecure-registries\": [\"old:1\"]}"), "http://10.0.0.1:5", Some("10.0.0.1:5")).unwrap();
        assert_eq!(
            after,
            "{\"registry-mirrors\": [\"http://10.0.0.1:5\"], \"insecure-registries\": [\"10.0.0.1:5\", \"old:1\"]}"
        );
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, wanted) in [
            ("{", "is not a JSON object"),
            ("[]", "is not a JSON object"),
            ("{} {}", "is not a JSON object"),
            ("{\"registry-mirrors\": \"http://a\"}", "registry-mirrors is not a list"),
            ("{\"registry-mirrors\": [1]}", "registry-mirrors is not a list"),
            ("{\"registry-mirrors\": [], \"registry-mirrors\": []}", "registry-mirrors is there twice"),
        ] {
            let error = edit(Some(text), AGENT, None).unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{text}: {error}");
        }
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[ -~äö\n]{0,9}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("[a-z\"{}\\[\\]]{0,5}", inner), 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_object_keeps_its_members_and_is_edited_once(
            members in prop::collection::vec(("[a-z\"{}\\[\\]:,]{0,6}", json()), 0..5),
            mirrors in prop::option::of(prop::collection::vec("[a-z:/]{0,8}", 0..3)),
            pretty in any::<bool>(),
        ) {
            let mut object: serde_json::Map<String, Value> = members.into_iter().collect();
            object.extend(mirrors.map(|mirrors| ("registry-mirrors".to_owned(), json!(mirrors))));
            let before = Value::Object(object.clone());
            let text = if pretty { serde_json::to_string_pretty(&before).unwrap() } else { before.to_string() };
            let once = edit(Some(&text), AGENT, None).unwrap();
            prop_assert_eq!(&edit(Some(&once), AGENT, None).unwrap(), &once);
            let mut after: Value = serde_json::from_str(&once).unwrap();
            let list = after["registry-mirrors"].as_array_mut().unwrap();
            prop_assert_eq!(list.remove(0), Value::from(AGENT));
            if !object.contains_key("registry-mirrors") {
                after.as_object_mut().unwrap().remove("registry-mirrors");
            }
            prop_assert_eq!(after, before);
        }
    }
}
