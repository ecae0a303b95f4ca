//! Digests, names and tags: what parses is written as it was read.
#![no_main]

use gateway::registry::{Reference, Repository, Session, Tag};
use libfuzzer_sys::fuzz_target;
use peer_proto::{Digest, Namespace, PeerId};

fuzz_target!(|text: &str| {
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Ok(namespace) = text.parse::<Namespace>() {
        assert_eq!(namespace.as_str(), text);
    }
    if let Ok(repository) = text.parse::<Repository>() {
        assert_eq!(repository.as_str(), text);
        assert!(!text.contains("..") && !text.contains("//"));
    }
    if let Ok(tag) = text.parse::<Tag>() {
        assert_eq!(tag.as_str(), text);
    }
    if let Ok(session) = text.parse::<Session>() {
        assert!(session.to_string().parse::<Session>().is_ok_and(|again| again == session));
    }
    let _ = text.parse::<PeerId>();
    let _ = text.parse::<Reference>();
});
