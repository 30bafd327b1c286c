//! Signed URLs: grants made, listed, revoked, and counted.

use super::super::error::MachineError;
use super::Fleet;
use crate::edge::token::Claims;
use crate::store::{GrantRow, GrantUsage, ServiceRow};
use serde_json::json;
use std::collections::HashMap;
use std::time::Duration;
use torpor_api::http::{
    CreateGrant, EdgeKey, EdgeKeyList, Grant, GrantStatus, GrantTransport, IssuedGrant, ServiceKind,
};
use torpor_api::{ErrorCode, GrantId, MachineId, limits};

/// Use of grants is written down at most this long after it was counted.
const WRITE_AFTER: Duration = Duration::from_secs(5);

impl Fleet {
    /// A signed URL for the HTTP service on this port of the machine. It stays good over pauses and wakes.
    ///
    /// # Errors
    /// There is no such service, the validity is out of bounds, or the store refuses.
    pub async fn issue_grant(
        &self,
        id: &MachineId,
        port: u16,
        order: CreateGrant,
    ) -> Result<IssuedGrant, MachineError> {
        let seconds = order
            .expires_in_seconds
            .unwrap_or(limits::DEFAULT_EDGE_TOKEN_SECONDS);
        let bounds = limits::EDGE_TOKEN_SECONDS;
        if !bounds.contains(&seconds) {
            let message = format!(
                "expires_in_seconds is {seconds}, and has to be {} to {}",
                bounds.start(),
                bounds.end()
            );
            return Err(MachineError::new(ErrorCode::InvalidRequest, message));
        }
        let service = self.http_service(id, port).await?;
        let issued_unix_ms = self.now_unix_ms();
        let row = GrantRow {
            id: GrantId::generate(),
            machine: id.clone(),
            port,
            transport: order.transport,
            issued_unix_ms,
            expires_unix_ms: issued_unix_ms.saturating_add(seconds.saturating_mul(1000)),
            revoked_unix_ms: None,
            usage: GrantUsage::default(),
        };
        let claims = Claims {
            grant: row.id.clone(),
            machine: id.clone(),
            port,
            transport: order.transport,
            expires_unix_ms: row.expires_unix_ms,
        };
        let token = self
            .shared
            .edge
            .sign(&self.shared.store, &claims, issued_unix_ms)
            .await?;
        let detail = json!({ "grant": row.id, "port": port, "expires_unix_ms": row.expires_unix_ms });
        let event = self.event(id, "grant.issued", "api", detail);
        self.shared.store.insert_grant(row.clone(), event).await?;
        let base = self.show_service(service).url;
        let websocket_base = base.replacen("http", "ws", 1);
        let with_token = |base: &str| format!("{base}/?edge_token={token}");
        Ok(IssuedGrant {
            url: (order.transport != GrantTransport::Websocket).then(|| with_token(&base)),
            websocket_url: (order.transport != GrantTransport::Http).then(|| with_token(&websocket_base)),
            grant: self.show_grant(row),
            token,
        })
    }

    /// Grants of a machine, newest first, of one port if given.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn grants(&self, id: &MachineId, port: Option<u16>) -> Result<Vec<Grant>, MachineError> {
        self.write_grant_usage().await;
        let rows = self.shared.store.grants(id.clone(), port).await?;
        Ok(rows.into_iter().map(|row| self.show_grant(row)).collect())
    }

    /// Take a grant back: its token is refused from now on.
    ///
    /// # Errors
    /// The machine has no such grant, or the store refuses.
    pub async fn revoke_grant(&self, id: &MachineId, grant: &GrantId) -> Result<Grant, MachineError> {
        self.write_grant_usage().await;
        let event = self.event(id, "grant.revoked", "api", json!({ "grant": grant }));
        let row = self
            .shared
            .store
            .revoke_grant(id.clone(), grant.clone(), event)
            .await?;
        let now = self.now_unix_ms();
        let edge = &self.shared.edge;
        edge.forbid(&self.shared.store, grant.clone(), row.expires_unix_ms, now)
            .await?;
        Ok(self.show_grant(row))
    }

    /// The keys that sign edge tokens or still vouch for some.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn edge_keys(&self) -> Result<EdgeKeyList, MachineError> {
        let keys = self
            .shared
            .edge
            .keys(&self.shared.store, self.now_unix_ms())
            .await?;
        let keys = keys
            .into_iter()
            .enumerate()
            .map(|(n, (id, created_unix_ms))| EdgeKey {
                id,
                created_unix_ms,
                signs: n == 0,
            });
        Ok(EdgeKeyList { keys: keys.collect() })
    }

    /// Sign with a new key from now on.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn rotate_edge_key(&self, revoke_earlier: bool) -> Result<EdgeKeyList, MachineError> {
        let edge = &self.shared.edge;
        edge.rotate(&self.shared.store, revoke_earlier, self.now_unix_ms())
            .await?;
        self.edge_keys().await
    }

    /// Write the use of grants down for as long as the process lives.
    pub async fn keep_grant_usage(self) {
        let halted = self.shared.halted.clone();
        let writing = async {
            loop {
                self.shared.edge.used().await;
                // What is used more often is written once.
                tokio::time::sleep(WRITE_AFTER).await;
                self.write_grant_usage().await;
            }
        };
        halted.run_until_cancelled(writing).await;
        self.write_grant_usage().await;
    }

    async fn write_grant_usage(&self) {
        let newly = self.shared.edge.take_new_usage();
        if newly.is_empty() {
            return;
        }
        let mut sums: HashMap<GrantId, GrantUsage> = HashMap::new();
        for (grant, usage) in newly {
            let sum = sums.entry(grant).or_default();
            *sum = sum.and(usage);
        }
        if let Err(error) = self.shared.store.count_grants(sums.into_iter().collect()).await {
            tracing::warn!(%error, "use of grants not written down");
        }
    }

    async fn http_service(&self, id: &MachineId, port: u16) -> Result<ServiceRow, MachineError> {
        let row = self
            .shared
            .store
            .machine(id)
            .await?
            .ok_or_else(|| MachineError::not_found(id))?;
        row.services
            .into_iter()
            .find(|service| service.port == port && service.kind == ServiceKind::Http)
            .ok_or_else(|| {
                let message = format!("machine {id} exposes no HTTP service on port {port}");
                MachineError::new(ErrorCode::ServiceNotFound, message)
            })
    }

    fn show_grant(&self, row: GrantRow) -> Grant {
        let status = if row.revoked_unix_ms.is_some() {
            GrantStatus::Revoked
        } else if row.expires_unix_ms <= self.now_unix_ms() {
            GrantStatus::Expired
        } else {
            GrantStatus::Active
        };
        let usage = row.usage;
        Grant {
            id: row.id,
            machine_id: row.machine,
            port: row.port,
            transport: row.transport,
            status,
            issued_unix_ms: row.issued_unix_ms,
            expires_unix_ms: row.expires_unix_ms,
            revoked_unix_ms: row.revoked_unix_ms,
            first_used_unix_ms: usage.first_unix_ms,
            last_used_unix_ms: usage.last_unix_ms,
            use_count: usage.http_requests.saturating_add(usage.websockets),
            http_request_count: usage.http_requests,
            websocket_connection_count: usage.websockets,
            bytes_in_count: usage.to_guest_bytes,
            bytes_out_count: usage.from_guest_bytes,
        }
    }
}
