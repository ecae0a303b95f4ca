//! Names of objects: paths of sound components, the same for every store.

use crate::Error;

/// Longest name in bytes: what the strictest object store takes.
pub const NAME_LEN_MAX: usize = 1024;
/// Longest component in bytes: what file systems take.
const COMPONENT_LEN_MAX: usize = 255;

/// Checks a name: 1 to [`NAME_LEN_MAX`] bytes, no control characters, components of 1 to 255 bytes divided by `/`, none of
/// them `.` or `..`. So no name can leave a store's tree.
pub fn check(name: &str) -> Result<(), Error> {
    let component = |part: &str| !matches!(part, "" | "." | "..") && part.len() <= COMPONENT_LEN_MAX;
    let sound = name.len() <= NAME_LEN_MAX && !name.chars().any(char::is_control) && name.split('/').all(component);
    if sound { Ok(()) } else { Err(Error::Invalid(format!("{:?} is no name for an object", shortened(name)))) }
}

/// Checks the beginning of names: as a name, except that it may be empty and its last component incomplete.
pub(crate) fn check_prefix(prefix: &str) -> Result<(), Error> {
    let full = prefix.rsplit_once('/').map_or("", |(full, _)| full);
    if prefix.contains('/') {
        check(full)?;
    }
    let sound = prefix.len() <= NAME_LEN_MAX && !prefix.chars().any(char::is_control);
    if sound { Ok(()) } else { Err(Error::Invalid(format!("{:?} begins no name", shortened(prefix)))) }
}

fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_tree() {
        for good in ["a", "a/b", ".hidden", "a..b/c", "repo:tag", &"x".repeat(255)] {
            assert!(check(good).is_ok(), "{good}");
        }
        let deep = "x/".repeat(512) + "x";
        for bad in ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", "a\0b", "a\nb", &"x".repeat(256), &deep] {
            assert!(matches!(check(bad), Err(Error::Invalid(_))), "{bad}");
        }
    }

    #[test]
    fn prefixes_may_be_incomplete() {
        for good in ["", "a", "a/", "a/b", "a/.", ".."] {
            assert!(check_prefix(good).is_ok(), "{good}");
        }
        for bad in ["/", "../", "a/../b", "a//b", "\0"] {
            assert!(check_prefix(bad).is_err(), "{bad}");
        }
    }
}
