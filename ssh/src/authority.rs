//! Short-lived user certificates: whoever holds one may enter one machine as one user until it expires.
//!
//! The machine stands in an extension of our own, because OpenSSH refuses a certificate with a critical option that
//! it does not know, while the login name is the user in the guest. The key ID says the same for people who look
//! at `sshd`-like logs. Revocation is the backend's: a certificate names the access that it was made for.

use crate::keys::{PublicKeyText, fingerprint};
use russh::keys::ssh_key::certificate::{Builder, CertType};
use russh::keys::ssh_key::{Certificate, PrivateKey, PublicKey};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Extension that names the machine.
const MACHINE_EXTENSION: &str = "machine@torpor";
/// Extension that names the access.
const ACCESS_EXTENSION: &str = "access@torpor";
/// Clocks of this host and of whoever looks at the certificate may differ by so much.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// Why a certificate is not made or not taken.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The public key, the user or the lifetime is not usable.
    #[error("cannot make a certificate for this key and user")]
    Build(#[source] russh::keys::ssh_key::Error),
    /// The key is no key.
    #[error(transparent)]
    Key(#[from] crate::keys::KeyError),
    /// Another authority signed it, or nobody did, or not for now.
    #[error("the certificate is not valid here and now")]
    NotOurs(#[source] Option<russh::keys::ssh_key::Error>),
    /// It is not for a user, names no machine, or has limits that this gateway does not know.
    #[error("the certificate is not one for a machine")]
    NotForAMachine,
    /// It does not allow this user name.
    #[error("the certificate is not for this user")]
    WrongUser,
}

/// What a certificate is to say.
#[derive(Debug, Clone)]
pub struct CertificateOrder<'a> {
    /// Line of the user's public key.
    pub public_key: &'a str,
    /// Machine ID.
    pub machine: &'a str,
    /// User in the guest.
    pub user: &'a str,
    /// Names the access, so that it can be taken back.
    pub access_id: &'a str,
    /// From now.
    pub lifetime: Duration,
}

/// What a valid certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Machine ID, not validated.
    pub machine: String,
    /// User in the guest.
    pub user: String,
    /// The access that it was made for.
    pub access_id: String,
}

/// Signs and checks user certificates.
pub struct Authority {
    key: PrivateKey,
}

impl Authority {
    /// The authority with this key.
    #[must_use]
    pub fn new(key: PrivateKey) -> Self {
        Self { key }
    }

    /// A certificate as a line for a `-cert.pub` file, and when it expires.
    ///
    /// # Errors
    /// See [`CertificateError`].
    pub fn certify(&self, order: &CertificateOrder<'_>) -> Result<(String, SystemTime), CertificateError> {
        let text = PublicKeyText::parse(order.public_key)?;
        let key = PublicKey::from_openssh(&text.line).map_err(CertificateError::Build)?;
        // Whole seconds, which is all that a certificate can say.
        let now_s = unix_s(SystemTime::now());
        let expires_s = now_s.saturating_add(order.lifetime.as_secs());
        let nonce: [u8; Builder::RECOMMENDED_NONCE_SIZE] = rand::random();
        let certificate = (|| {
            let valid_from = now_s.saturating_sub(CLOCK_SKEW.as_secs());
            let mut builder = Builder::new(nonce, key.key_data().clone(), valid_from, expires_s)?;
            builder.serial(rand::random())?;
            builder.cert_type(CertType::User)?;
            builder.key_id(format!("torpor {} {}", order.machine, order.access_id))?;
            builder.valid_principal(order.user)?;
            builder.extension("permit-pty", "")?;
            builder.extension("permit-port-forwarding", "")?;
            builder.extension(ACCESS_EXTENSION, order.access_id)?;
            builder.extension(MACHINE_EXTENSION, order.machine)?;
            builder.sign(&self.key)?.to_openssh()
        })();
        let line = certificate.map_err(CertificateError::Build)?;
        Ok((line, UNIX_EPOCH + Duration::from_secs(expires_s)))
    }

    /// What a certificate says to somebody who logs in with this user name, if it is ours and valid now.
    ///
    /// # Errors
    /// See [`CertificateError`].
    pub fn check(&self, certificate: &Certificate, user: &str) -> Result<Claims, CertificateError> {
        let ours = self.key.public_key().fingerprint(russh::keys::HashAlg::Sha256);
        certificate
            .validate_at(unix_s(SystemTime::now()), [&ours])
            .map_err(|error| CertificateError::NotOurs(Some(error)))?;
        // An empty list would allow everybody, and a limit that is not understood must not be ignored.
        let is_plain = certificate.cert_type() == CertType::User && certificate.critical_options().is_empty();
        if !is_plain {
            return Err(CertificateError::NotForAMachine);
        }
        if !certificate.valid_principals().iter().any(|name| name == user) {
            return Err(CertificateError::WrongUser);
        }
        let extension = |name: &str| certificate.extensions().get(name).cloned();
        match (extension(MACHINE_EXTENSION), extension(ACCESS_EXTENSION)) {
            (Some(machine), Some(access_id)) => Ok(Claims {
                machine,
                user: user.to_owned(),
                access_id,
            }),
            _ => Err(CertificateError::NotForAMachine),
        }
    }

    /// Fingerprint of the authority's own key.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        fingerprint(self.key.public_key())
    }
}

fn unix_s(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{KeyPair, load_or_create_key};

    fn authority() -> Authority {
        let dir = tempfile::tempdir().unwrap();
        Authority::new(load_or_create_key(&dir.path().join("ca"), "ca").unwrap())
    }

    fn certify(authority: &Authority, lifetime: Duration) -> Certificate {
        let order = CertificateOrder {
            public_key: &KeyPair::generate("me").unwrap().public.line,
            machine: "mch_x",
            user: "root",
            access_id: "acc_1",
            lifetime,
        };
        Certificate::from_openssh(&authority.certify(&order).unwrap().0).unwrap()
    }

    #[test]
    fn a_certificate_says_what_was_ordered() {
        let authority = authority();
        let certificate = certify(&authority, Duration::from_secs(60));
        let claims = authority.check(&certificate, "root").unwrap();
        assert_eq!(
            (
                claims.machine.as_str(),
                claims.user.as_str(),
                claims.access_id.as_str()
            ),
            ("mch_x", "root", "acc_1")
        );
    }

    #[test]
    fn other_users_other_authorities_and_expired_certificates_are_refused() {
        let ours = authority();
        let certificate = certify(&ours, Duration::from_secs(60));
        assert!(matches!(
            ours.check(&certificate, "dev"),
            Err(CertificateError::WrongUser)
        ));
        assert!(matches!(
            authority().check(&certificate, "root"),
            Err(CertificateError::NotOurs(_))
        ));
        let expired = certify(&ours, Duration::ZERO);
        assert!(matches!(
            ours.check(&expired, "root"),
            Err(CertificateError::NotOurs(_))
        ));
    }

    #[test]
    fn a_certificate_that_names_no_machine_is_refused() {
        let authority = authority();
        let key = KeyPair::generate("me").unwrap();
        let key = PublicKey::from_openssh(&key.public.line).unwrap();
        let now = unix_s(SystemTime::now());
        let mut builder = Builder::new([7; 16], key.key_data().clone(), now - 1, now + 60).unwrap();
        builder.cert_type(CertType::User).unwrap();
        builder.valid_principal("root").unwrap();
        let certificate = builder.sign(&authority.key).unwrap();
        assert!(matches!(
            authority.check(&certificate, "root"),
            Err(CertificateError::NotForAMachine)
        ));
    }
}
