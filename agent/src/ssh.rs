//! SSH for machines: their keys, registered keys, certificates, and the gateway's way to the fleet.
//!
//! Owns what is kept of it under the state directory (host key, key of the user authority) and the operations that
//! every API shares, as methods of [`Fleet`]. A machine's own key is made when it is first asked for.
//!
//! Not its job: the protocol (`torpor-ssh`), what a login may wake (the fleet).

mod backend;
mod guest;

pub use backend::FleetBackend;

use crate::api::Token;
use crate::machine::error::{MachineError, chain};
use crate::machine::fleet::Fleet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};
use tokio::net::TcpListener;
use torpor_api::http::{
    MachineSshKey, NewSshKey, SshAccess, SshAccessRequest, SshGateway, SshKey, SshKeyList,
};
use torpor_api::{AccessId, ErrorCode, MachineId, SshKeyId};
use torpor_ssh::{
    Authority, CertificateError, CertificateOrder, Gateway, GatewayConfig, GatewayError, KeyError, KeyPair,
    PublicKeyText, Refusal, load_or_create_key,
};

/// Most SSH clients at a time.
const MAX_CONNECTIONS: usize = 1024;
/// Longest name of a registered key in bytes.
const MAX_NAME_BYTES: usize = 128;
/// Shortest and longest life of a certificate in minutes.
const ACCESS_MINUTES: std::ops::RangeInclusive<u32> = 1..=60;
/// Letters and digits of a machine's password, without those that look alike: 32 of them are 5 bits each.
const PASSWORD_ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
const PASSWORD_LEN: usize = 26;

/// Why there is no gateway.
#[derive(Debug, thiserror::Error)]
pub enum SshError {
    /// A key file.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The listener.
    #[error(transparent)]
    Gateway(#[from] GatewayError),
}

/// What is known of the gateway to everybody else.
pub struct Door {
    authority: Arc<Authority>,
    host_key: PublicKeyText,
    host: String,
    port: u16,
}

impl Door {
    fn known_host(&self) -> String {
        format!("{} {}", self.host_key.algorithm, self.host_key.base64)
    }
}

/// Listen on this address, with keys kept in this directory, and tell the fleet.
///
/// # Errors
/// A key file is damaged, or the address cannot be bound.
pub async fn start(
    fleet: &Fleet,
    listen: SocketAddr,
    host: String,
    state_dir: &Path,
    token: Option<Token>,
) -> Result<Gateway, SshError> {
    let bound = TcpListener::bind(listen).await;
    start_on(fleet, (bound, listen), host, state_dir, token)
}

/// Likewise, on a socket that listens at this address already, or why there is none.
///
/// # Errors
/// As of [`start`].
pub fn start_on(
    fleet: &Fleet,
    (listener, listen): (std::io::Result<TcpListener>, SocketAddr),
    host: String,
    state_dir: &Path,
    token: Option<Token>,
) -> Result<Gateway, SshError> {
    let listener = listener.map_err(|source| GatewayError::Bind {
        address: listen,
        source,
    })?;
    let host_key = load_or_create_key(&state_dir.join("ssh_host_ed25519_key"), "torpor")?;
    let authority_key = load_or_create_key(&state_dir.join("ssh_user_ca_key"), "torpor-user-ca")?;
    let authority = Arc::new(Authority::new(authority_key));
    let public_key = PublicKeyText::of(host_key.public_key())?;
    let config = GatewayConfig {
        listen,
        host_key,
        authority: Arc::clone(&authority),
        max_connections: MAX_CONNECTIONS,
    };
    let backend = FleetBackend::new(fleet.clone(), token);
    let gateway = Gateway::start_on(listener, config, Arc::new(backend))?;
    fleet.attach_ssh(Door {
        authority,
        host_key: public_key,
        host,
        port: gateway.address().port(),
    });
    Ok(gateway)
}

impl Fleet {
    /// Where the SSH gateway is.
    ///
    /// # Errors
    /// `ssh_disabled`.
    pub fn ssh_gateway(&self) -> Result<SshGateway, MachineError> {
        let door = self.open_door()?;
        Ok(SshGateway {
            host: door.host.clone(),
            port: door.port,
            host_key: door.known_host(),
        })
    }

    /// The machine's own key and password, made if there are none yet.
    ///
    /// # Errors
    /// There is no such machine, or the store refuses.
    pub async fn machine_ssh_key(&self, id: &MachineId) -> Result<MachineSshKey, MachineError> {
        if let Some(key) = self.store().find_machine_ssh_key(id.clone()).await? {
            return Ok(key);
        }
        let new = new_machine_key(id)?;
        Ok(self.store().machine_ssh_key(id.clone(), new, false).await?)
    }

    /// Another key and password for the machine; the old ones open it no more.
    ///
    /// # Errors
    /// There is no such machine, or the store refuses.
    pub async fn rotate_machine_ssh_key(&self, id: &MachineId) -> Result<MachineSshKey, MachineError> {
        let new = new_machine_key(id)?;
        Ok(self.store().machine_ssh_key(id.clone(), new, true).await?)
    }

    /// Register a key that opens every machine.
    ///
    /// # Errors
    /// It is no key, or there are too many.
    pub async fn add_ssh_key(&self, new: NewSshKey) -> Result<SshKey, MachineError> {
        let public = PublicKeyText::parse(&new.public_key).map_err(|error| bad_key(&error))?;
        let comment = public.line.splitn(3, ' ').nth(2).unwrap_or_default().to_owned();
        let name = new.name.unwrap_or(comment);
        check_name(&name)?;
        let key = SshKey {
            id: SshKeyId::generate(),
            name,
            public_key: public.line,
            fingerprint: public.fingerprint,
            created_unix_ms: self.now_unix_ms(),
        };
        Ok(self.store().add_ssh_key(key).await?)
    }

    /// All registered keys.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn ssh_keys(&self) -> Result<SshKeyList, MachineError> {
        Ok(SshKeyList {
            ssh_keys: self.store().ssh_keys().await?,
        })
    }

    /// A registered key.
    ///
    /// # Errors
    /// There is none of this ID.
    pub async fn ssh_key(&self, id: &str) -> Result<SshKey, MachineError> {
        let found = self.store().ssh_key(key_id(id)?).await?;
        found.ok_or_else(|| no_key(id))
    }

    /// Rename a registered key.
    ///
    /// # Errors
    /// There is none of this ID.
    pub async fn rename_ssh_key(&self, id: &str, name: String) -> Result<SshKey, MachineError> {
        check_name(&name)?;
        let renamed = self.store().rename_ssh_key(key_id(id)?, name).await?;
        renamed.ok_or_else(|| no_key(id))
    }

    /// Forget a registered key.
    ///
    /// # Errors
    /// There is none of this ID.
    pub async fn remove_ssh_key(&self, id: &str) -> Result<(), MachineError> {
        if self.store().remove_ssh_key(key_id(id)?).await? {
            Ok(())
        } else {
            Err(no_key(id))
        }
    }

    /// A certificate with which the owner of a key may enter this machine for a while.
    ///
    /// # Errors
    /// `ssh_disabled`, or the request makes no sense.
    pub async fn grant_ssh_access(
        &self,
        id: &MachineId,
        request: SshAccessRequest,
    ) -> Result<SshAccess, MachineError> {
        let door = Arc::clone(self.open_door()?);
        if !ACCESS_MINUTES.contains(&request.expires_in_minutes) {
            return Err(invalid(format!(
                "expires_in_minutes is {}, and has to be {} to {}",
                request.expires_in_minutes,
                ACCESS_MINUTES.start(),
                ACCESS_MINUTES.end()
            )));
        }
        check_user(&request.user)?;
        let access_id = AccessId::generate();
        let order = CertificateOrder {
            public_key: &request.public_key,
            machine: id.as_str(),
            user: &request.user,
            access_id: access_id.as_str(),
            lifetime: Duration::from_secs(u64::from(request.expires_in_minutes) * 60),
        };
        let (certificate, expires) = door.authority.certify(&order).map_err(|error| match error {
            CertificateError::Key(error) => bad_key(&error),
            error => MachineError::new(ErrorCode::Internal, chain(&error)),
        })?;
        let expires = expires.duration_since(UNIX_EPOCH).unwrap_or_default();
        let expires_unix_ms = u64::try_from(expires.as_millis()).unwrap_or(u64::MAX);
        self.store()
            .add_ssh_access(
                access_id.clone(),
                id.clone(),
                request.user.clone(),
                (self.now_unix_ms(), expires_unix_ms),
            )
            .await?;
        Ok(SshAccess {
            access_id,
            certificate,
            command: format!("ssh -p {} {}@{}", door.port, request.user, door.host),
            host: door.host.clone(),
            port: door.port,
            user: request.user,
            expires_unix_ms,
            host_key: door.known_host(),
        })
    }

    fn open_door(&self) -> Result<&Arc<Door>, MachineError> {
        self.ssh_door()
            .ok_or_else(|| MachineError::new(ErrorCode::SshDisabled, "torpord has no SSH gateway"))
    }
}

fn new_machine_key(id: &MachineId) -> Result<MachineSshKey, MachineError> {
    let pair = KeyPair::generate(id.as_str())
        .map_err(|error| MachineError::new(ErrorCode::Internal, chain(&error)))?;
    let random: [u8; PASSWORD_LEN] = rand::random();
    let letter = |byte: &u8| PASSWORD_ALPHABET.get(usize::from(byte & 31)).copied();
    Ok(MachineSshKey {
        private_key: pair.private_key,
        public_key: pair.public.line,
        fingerprint: pair.public.fingerprint,
        password: random.iter().filter_map(letter).map(char::from).collect(),
    })
}

fn check_name(name: &str) -> Result<(), MachineError> {
    if name.len() <= MAX_NAME_BYTES && !name.contains(char::is_control) {
        return Ok(());
    }
    Err(invalid(format!(
        "a key's name is at most {MAX_NAME_BYTES} bytes of printable text"
    )))
}

fn check_user(user: &str) -> Result<(), MachineError> {
    let is_user = (1..=32).contains(&user.len())
        && !user.starts_with('-')
        && user
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if is_user {
        return Ok(());
    }
    Err(invalid("user is not a user name (1-32 of a-z0-9._-)".to_owned()))
}

fn bad_key(error: &KeyError) -> MachineError {
    invalid(format!(
        "public_key is not an OpenSSH public key: {}",
        chain(error)
    ))
}

fn refusal(error: MachineError) -> Refusal {
    Refusal::new(error.code, error.message)
}

fn invalid(message: String) -> MachineError {
    MachineError::new(ErrorCode::InvalidRequest, message)
}

fn key_id(text: &str) -> Result<SshKeyId, MachineError> {
    text.parse().map_err(|_| no_key(text))
}

fn no_key(text: &str) -> MachineError {
    let text: String = text.chars().take(64).collect();
    MachineError::new(
        ErrorCode::SshKeyNotFound,
        format!("no registered SSH key {text:?}"),
    )
}

#[cfg(test)]
mod tests;
