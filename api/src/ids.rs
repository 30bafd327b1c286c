//! Identities: every ID that reaches a file name, a host name or a URL is checked here first.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a text is not an ID or a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Wrong prefix, length or alphabet for a generated ID.
    #[error("{text:?} is not a {kind} ID (expected {kind}_ and {ID_RANDOM_LEN} of a-z2-7)")]
    BadId {
        /// The prefix that was expected.
        kind: &'static str,
        /// The rejected text, cut to 64 characters.
        text: String,
    },
    /// A label that a user chose is not usable in a host name and a file name.
    #[error("{text:?} is not a name (1-{MAX_NAME_LEN} of a-z0-9-, beginning with a letter, not ending in -)")]
    BadName {
        /// The rejected text, cut to 64 characters.
        text: String,
    },
}

const ID_RANDOM_LEN: usize = 20;
const MAX_NAME_LEN: usize = 40;
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

fn random_suffix() -> String {
    let bytes: [u8; ID_RANDOM_LEN] = rand::random();
    bytes
        .iter()
        .map(|b| char::from(ALPHABET[usize::from(b & 31)]))
        .collect()
}

fn cut(text: &str) -> String {
    text.chars().take(64).collect()
}

macro_rules! generated_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A new ID with 100 random bits.
            #[must_use]
            pub fn generate() -> Self {
                Self(format!(concat!($prefix, "_{}"), random_suffix()))
            }
            /// The ID as it is written everywhere.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let ok = text.strip_prefix(concat!($prefix, "_")).is_some_and(|random| {
                    random.len() == ID_RANDOM_LEN && random.bytes().all(|b| ALPHABET.contains(&b))
                });
                if ok { Ok(Self(text.to_owned())) } else { Err(IdError::BadId { kind: $prefix, text: cut(text) }) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

generated_id!(
    /// The permanent identity of a machine.
    MachineId, "mch");
generated_id!(
    /// One run of a machine in one VMM process; an alias of its machine for ever after.
    ExecutionId, "exe");
generated_id!(
    /// A named, immutable, forkable snapshot.
    SnapshotId, "snap");
generated_id!(
    /// Leave to use one service through a signed URL.
    GrantId, "pvg");
generated_id!(
    /// A registered SSH key.
    SshKeyId, "sshkey");
generated_id!(
    /// Somebody's right to enter a machine by SSH for a while.
    AccessId, "acc");

/// Prefixes under which machines and snapshots are known outside, each with those that stand for them inside: an
/// instance and a snapshot of the Morph API, and an execution or the memory of one in the Nullspace API.
const SPELLINGS: &[(&str, &[&str])] = &[
    ("morphvm_", &["mch_"]),
    ("mch_", &["mch_", "exe_"]),
    ("snap_", &["snap_", "exe_"]),
    ("snapshot_", &["snap_"]),
];

/// The IDs that this text may stand for, itself first if it is one of ours.
#[must_use]
pub fn spellings(text: &str) -> Vec<String> {
    let inside = SPELLINGS
        .iter()
        .find_map(|(outside, inside)| text.strip_prefix(outside).map(|rest| (rest, inside)));
    match inside {
        Some((rest, inside)) => inside.iter().map(|prefix| format!("{prefix}{rest}")).collect(),
        None => vec![text.to_owned()],
    }
}

/// An optional unique label that a user gives to a machine or template; safe in a host name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineName(String);

impl MachineName {
    /// The name as the user wrote it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for MachineName {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let ok = text.len() <= MAX_NAME_LEN
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && text.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
            && !text.ends_with('-');
        if ok {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError::BadName { text: cut(text) })
        }
    }
}

impl TryFrom<String> for MachineName {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<MachineName> for String {
    fn from(name: MachineName) -> String {
        name.0
    }
}

impl fmt::Display for MachineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn generated_ids_parse_and_differ() {
        let (a, b) = (MachineId::generate(), MachineId::generate());
        assert_ne!(a, b);
        assert_eq!(a.as_str().parse::<MachineId>(), Ok(a.clone()));
        assert!(a.as_str().parse::<ExecutionId>().is_err());
    }

    #[test]
    fn traversal_and_case_are_no_names() {
        for bad in [
            "",
            "..",
            "a/b",
            "A",
            "-a",
            "a-",
            "1a",
            "a.b",
            "a_b",
            "é",
            "a\0",
            &"a".repeat(41),
        ] {
            assert!(bad.parse::<MachineName>().is_err(), "{bad:?} was accepted");
        }
        assert!("web-1".parse::<MachineName>().is_ok());
    }

    #[test]
    fn ids_of_the_facades_lead_to_machines_and_executions() {
        assert_eq!(spellings("morphvm_x"), ["mch_x"]);
        assert_eq!(spellings("mch_x"), ["mch_x", "exe_x"]);
        assert_eq!(spellings("snap_x"), ["snap_x", "exe_x"]);
        assert_eq!(spellings("snapshot_x"), ["snap_x"]);
        assert_eq!(spellings("exe_x"), ["exe_x"]);
        assert_eq!(spellings("web"), ["web"]);
    }

    proptest! {
        #[test]
        fn no_accepted_text_leaves_its_directory(text in ".{0,60}") {
            if text.parse::<MachineName>().is_ok() || text.parse::<MachineId>().is_ok() {
                prop_assert!(!text.contains(['/', '.', '\0', ' ']));
            }
        }
    }
}
