//! The edge's memory: keys of tokens, revoked grants, counters, the API's own token.
//!
//! One [`Edge`] per fleet. Keys and revocations are copies of what the store has, so that a request needs no query;
//! whoever changes them changes the store first. Not its job: HTTP, which the proxy does, and who may make grants.

pub mod filter;
pub mod token;
mod usage;

pub use usage::Use;

use crate::api::Token;
use crate::store::{EdgeKeyRow, GrantUsage, Store, StoreError};
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use token::{Claims, TokenError};
use tokio::sync::OnceCell;
use torpor_api::http::GrantTransport;
use torpor_api::{ErrorCode, GrantId, MachineId, limits};
use torpor_proxy::Activity;

const SECRET_BYTES: usize = 32;

/// A token that is not taken, as the client gets to see it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Untaken {
    /// Stable code.
    pub code: ErrorCode,
    /// Why not.
    pub message: String,
}

/// What a token must be good for.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// The machine.
    pub machine: &'a MachineId,
    /// Port in the guest.
    pub port: u16,
    /// Request or upgrade.
    pub what: Use,
}

#[derive(Default)]
struct Known {
    /// Newest first.
    keys: Vec<EdgeKeyRow>,
    /// With the time after which it need not be remembered.
    revoked: HashMap<GrantId, u64>,
}

/// See the module.
#[derive(Default)]
pub struct Edge {
    known: OnceCell<RwLock<Known>>,
    usage: usage::Usage,
    api_token: OnceLock<Token>,
}

impl Edge {
    /// Say what services with `auth: api_key` take. Only the first one counts; without one nothing is taken.
    pub fn set_api_token(&self, token: Token) {
        let _ = self.api_token.set(token);
    }

    /// Whether this is the API's token.
    #[must_use]
    pub fn is_api_token(&self, sent: &[u8]) -> bool {
        self.api_token.get().is_some_and(|token| token.is(sent))
    }

    /// Sign a token.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn sign(&self, store: &Store, claims: &Claims, now_unix_ms: u64) -> Result<String, StoreError> {
        let known = self.known(store, now_unix_ms).await?;
        let known = known.read().unwrap_or_else(PoisonError::into_inner);
        let key = known.keys.first().ok_or(StoreError::Closed)?;
        Ok(token::sign(&key.id, &key.secret, claims))
    }

    /// What the token says, if it is to be taken for this.
    ///
    /// # Errors
    /// It is not, or the store refuses.
    pub async fn take(
        &self,
        store: &Store,
        sent: &str,
        scope: Scope<'_>,
        now_unix_ms: u64,
    ) -> Result<Claims, Untaken> {
        let known = self.known(store, now_unix_ms).await.map_err(|error| Untaken {
            code: error.code(),
            message: crate::machine::error::chain(&error),
        })?;
        let known = known.read().unwrap_or_else(PoisonError::into_inner);
        let claims = token::verify(sent, |id| {
            let key = known.keys.iter().find(|key| key.id == id)?;
            Some(key.secret.as_slice())
        })
        .map_err(|error: TokenError| Untaken {
            code: ErrorCode::EdgeTokenInvalid,
            message: format!("the edge token is not taken: {error}"),
        })?;
        let no = |code, message: String| Err(Untaken { code, message });
        if known.revoked.contains_key(&claims.grant) {
            return no(
                ErrorCode::EdgeTokenInvalid,
                format!("grant {} was revoked", claims.grant),
            );
        }
        if claims.expires_unix_ms <= now_unix_ms {
            return no(
                ErrorCode::EdgeTokenExpired,
                format!("grant {} has expired", claims.grant),
            );
        }
        let transport_fits = match (claims.transport, scope.what) {
            (GrantTransport::Any, _)
            | (GrantTransport::Http, Use::Request)
            | (GrantTransport::Websocket, Use::Upgrade) => true,
            (GrantTransport::Http, Use::Upgrade) | (GrantTransport::Websocket, Use::Request) => false,
        };
        if !transport_fits || (&claims.machine, claims.port) != (scope.machine, scope.port) {
            let message = "the edge token is for another machine, port or transport".to_owned();
            return no(ErrorCode::EdgeTokenScopeMismatch, message);
        }
        Ok(claims)
    }

    /// Count a use of a grant; payload is counted where this says.
    #[must_use]
    pub fn count(&self, grant: &GrantId, what: Use, now_unix_ms: u64) -> Arc<Activity> {
        self.usage.count(grant, what, now_unix_ms)
    }

    /// Wait until a grant is used.
    pub async fn used(&self) {
        self.usage.used().await;
    }

    /// What was counted and not told yet.
    #[must_use]
    pub fn take_new_usage(&self) -> Vec<(GrantId, GrantUsage)> {
        self.usage.take_new()
    }

    /// Refuse the tokens of this grant from now on.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn forbid(
        &self,
        store: &Store,
        grant: GrantId,
        expires_unix_ms: u64,
        now_unix_ms: u64,
    ) -> Result<(), StoreError> {
        let known = self.known(store, now_unix_ms).await?;
        let mut known = known.write().unwrap_or_else(PoisonError::into_inner);
        known.revoked.retain(|_, until| *until > now_unix_ms);
        known.revoked.insert(grant, expires_unix_ms);
        Ok(())
    }

    /// The keys, newest first, without their secrets.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn keys(&self, store: &Store, now_unix_ms: u64) -> Result<Vec<(String, u64)>, StoreError> {
        let known = self.known(store, now_unix_ms).await?;
        let known = known.read().unwrap_or_else(PoisonError::into_inner);
        Ok(known
            .keys
            .iter()
            .map(|key| (key.id.clone(), key.created_unix_ms))
            .collect())
    }

    /// Sign with a new key from now on. Earlier keys vouch for their tokens until those have expired, or no longer.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn rotate(
        &self,
        store: &Store,
        revoke_earlier: bool,
        now_unix_ms: u64,
    ) -> Result<(), StoreError> {
        let known = self.known(store, now_unix_ms).await?;
        let drop_before = if revoke_earlier {
            u64::MAX >> 1
        } else {
            now_unix_ms.saturating_sub(limits::EDGE_TOKEN_SECONDS.end().saturating_mul(1000))
        };
        let keys = store.rotate_edge_key(new_key(now_unix_ms), drop_before).await?;
        known.write().unwrap_or_else(PoisonError::into_inner).keys = keys;
        Ok(())
    }

    async fn known(&self, store: &Store, now_unix_ms: u64) -> Result<&RwLock<Known>, StoreError> {
        self.known
            .get_or_try_init(|| async {
                let mut keys = store.edge_keys().await?;
                if keys.is_empty() {
                    keys = store.edge_keys_or(new_key(now_unix_ms)).await?;
                }
                let revoked = store.revoked_grants(now_unix_ms).await?.into_iter().collect();
                Ok(RwLock::new(Known { keys, revoked }))
            })
            .await
    }
}

fn new_key(now_unix_ms: u64) -> EdgeKeyRow {
    EdgeKeyRow {
        id: format!("k{:012x}", rand::random::<u64>() >> 16),
        secret: rand::random::<[u8; SECRET_BYTES]>().to_vec(),
        created_unix_ms: now_unix_ms,
    }
}
