//! Key files and key pairs: made from the operating system's randomness, kept for root alone.

use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::ssh_key::{HashAlg, LineEnding, PrivateKey, PublicKey};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Longest public key line in bytes; RSA keys of 16,384 bits fit.
const MAX_PUBLIC_KEY_BYTES: usize = 16 << 10;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or made.
    #[error("cannot {operation} the key file {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file or text holds no key.
    #[error("{what} is no key that can be used")]
    Malformed {
        /// Which one.
        what: String,
        /// Why not.
        #[source]
        source: russh::keys::ssh_key::Error,
    },
    /// The text is too long for a key.
    #[error("a public key of {0} bytes is too long")]
    TooLong(usize),
}

/// The ed25519 key in this file; made if there is none. A file that is there and damaged is an error: clients
/// remember host keys.
///
/// # Errors
/// See [`KeyError`].
pub fn load_or_create_key(path: &Path, comment: &str) -> Result<PrivateKey, KeyError> {
    let failed = |operation| {
        move |source| KeyError::File {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    match std::fs::read(path) {
        Ok(text) => PrivateKey::from_openssh(&text).map_err(malformed(path.display().to_string())),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let pair = KeyPair::generate(comment)?;
            save(path, pair.private_key.as_bytes()).map_err(failed("make"))?;
            Ok(pair.key)
        }
        Err(error) => Err(failed("read")(error)),
    }
}

/// Durable and whole, or not there; readable for root only.
fn save(path: &Path, text: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or_else(|| Path::new("/"));
    // Temporary files are made with mode 0600.
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(text)?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path).map_err(|error| error.error)?;
    std::fs::File::open(dir)?.sync_all()
}

/// A new ed25519 key pair in the forms that clients take.
#[derive(Clone)]
pub struct KeyPair {
    /// In OpenSSH's private key format.
    pub private_key: String,
    /// Public half.
    pub public: PublicKeyText,
    key: PrivateKey,
}

impl KeyPair {
    /// A new one.
    ///
    /// # Errors
    /// The key has no text, which is a defect.
    pub fn generate(comment: &str) -> Result<Self, KeyError> {
        let broken = || malformed("a new key".to_owned());
        let pair = Ed25519Keypair::from_seed(&rand::random());
        let key = PrivateKey::new(KeypairData::from(pair), comment).map_err(broken())?;
        let text = key.to_openssh(LineEnding::LF).map_err(broken())?;
        Ok(Self {
            private_key: text.to_string(),
            public: PublicKeyText::of(key.public_key())?,
            key,
        })
    }
}

/// A public key as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKeyText {
    /// `ssh-ed25519 AAAA… comment`, rewritten: nothing of a hostile line but the key and its comment is left.
    pub line: String,
    /// The key's algorithm, `ssh-ed25519`.
    pub algorithm: String,
    /// The key alone, in base64.
    pub base64: String,
    /// `SHA256:` and the digest, as `ssh-keygen -l` prints it.
    pub fingerprint: String,
}

impl PublicKeyText {
    /// The key in a line of an `authorized_keys` or `.pub` file.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(line: &str) -> Result<Self, KeyError> {
        if line.len() > MAX_PUBLIC_KEY_BYTES {
            return Err(KeyError::TooLong(line.len()));
        }
        let key = PublicKey::from_openssh(line.trim()).map_err(malformed("the public key".to_owned()))?;
        Self::of(&key)
    }

    /// This key.
    ///
    /// # Errors
    /// It has no text, which is a defect.
    pub fn of(key: &PublicKey) -> Result<Self, KeyError> {
        let line = key.to_openssh().map_err(malformed("the public key".to_owned()))?;
        let mut parts = line.split(' ');
        Ok(Self {
            algorithm: parts.next().unwrap_or_default().to_owned(),
            base64: parts.next().unwrap_or_default().to_owned(),
            fingerprint: fingerprint(key),
            line,
        })
    }
}

/// `SHA256:` and the digest.
pub(crate) fn fingerprint(key: &PublicKey) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

fn malformed(what: String) -> impl FnOnce(russh::keys::ssh_key::Error) -> KeyError {
    move |source| KeyError::Malformed { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_file_is_made_once_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let first = load_or_create_key(&path, "test").unwrap();
        let second = load_or_create_key(&path, "test").unwrap();
        assert_eq!(fingerprint(first.public_key()), fingerprint(second.public_key()));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_key_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "not a key").unwrap();
        assert!(matches!(
            load_or_create_key(&path, "test"),
            Err(KeyError::Malformed { .. })
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"not a key");
    }

    #[test]
    fn a_public_key_line_survives_a_round_trip_and_anything_else_is_refused() {
        let pair = KeyPair::generate("me@here").unwrap();
        assert_eq!(PublicKeyText::parse(&pair.public.line).unwrap(), pair.public);
        assert!(pair.public.line.ends_with(" me@here"));
        for bad in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 AAAA",
            &pair.private_key,
            &"x".repeat(20_000),
        ] {
            assert!(PublicKeyText::parse(bad).is_err(), "{bad:.40}");
        }
    }
}
