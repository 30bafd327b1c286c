//! What belongs to a machine and not to an execution: lease, wake switches, services.

use super::super::error::MachineError;
use super::super::usage;
use super::Fleet;
use crate::store::{MachineRow, ServiceRoute, ServiceRow, StoreError};
use serde_json::json;
use std::collections::BTreeMap;
use torpor_api::activity::{ActivityPolicy, ActivitySign, ActivitySource, PatchActivity};
use torpor_api::http::{PatchService, PatchWake, ServiceSpec, WakePolicy};
use torpor_api::{ErrorCode, LeaseAction, LeasePolicy, MachineId};

/// Which combinations of lease and wake switches an API lets its users have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyRule {
    /// A lease that destroys goes with no wake switch.
    DestroyOrWake,
    /// Any: a wake switch matters until the lease destroys.
    Any,
}

impl PolicyRule {
    fn check(self) -> fn(&MachineRow) -> Result<(), StoreError> {
        match self {
            Self::DestroyOrWake => check_row,
            Self::Any => |_| Ok(()),
        }
    }
}

/// A machine that destroys itself cannot be woken: an alias that routes to it would lead nowhere.
///
/// # Errors
/// `auto_resume_needs_pause`.
pub fn check_lease_and_wake(lease: Option<LeasePolicy>, wake: WakePolicy) -> Result<(), MachineError> {
    let destroys = lease.is_some_and(|lease| lease.action == LeaseAction::Destroy);
    if destroys && wake != WakePolicy::OFF {
        let message = "a lease with action 'destroy' and a wake switch that is on exclude each other";
        return Err(MachineError::new(ErrorCode::AutoResumeNeedsPause, message));
    }
    Ok(())
}

fn check_row(row: &MachineRow) -> Result<(), StoreError> {
    check_lease_and_wake(row.lease, row.wake).map_err(|error| StoreError::Refused {
        code: error.code,
        reason: error.message,
    })
}

impl Fleet {
    /// Set or take away the lease; an awake machine gets a whole window from now.
    ///
    /// # Errors
    /// The lease does not go with the wake switches, or the store refuses.
    pub async fn set_lease(
        &self,
        id: &MachineId,
        lease: Option<LeasePolicy>,
        rule: PolicyRule,
    ) -> Result<(), MachineError> {
        let event = self.event(id, "machine.lease_set", "api", json!({ "lease": lease }));
        self.shared
            .store
            .set_lease(id.clone(), lease, event, rule.check())
            .await?;
        self.shared.leases_changed.notify_one();
        Ok(())
    }

    /// Say how long the machine is kept while it is not awake; for ever if `None`.
    ///
    /// # Errors
    /// The machine is gone, or the store refuses.
    pub async fn set_retention(&self, id: &MachineId, seconds: Option<u64>) -> Result<(), MachineError> {
        let detail = json!({ "retention_seconds": seconds });
        let event = self.event(id, "machine.retention_set", "api", detail);
        self.shared
            .store
            .set_retention(id.clone(), seconds, event)
            .await?;
        self.shared.retention_changed.notify_one();
        Ok(())
    }

    /// Change the wake switches that are given.
    ///
    /// # Errors
    /// They do not go with the lease, or the store refuses.
    pub async fn patch_wake(
        &self,
        id: &MachineId,
        patch: PatchWake,
        rule: PolicyRule,
    ) -> Result<(), MachineError> {
        let event = self.event(id, "machine.wake_changed", "api", json!({ "wake": patch }));
        self.shared
            .store
            .patch_wake(id.clone(), patch, event, rule.check())
            .await?;
        Ok(())
    }

    /// Change what counts as use of the machine.
    ///
    /// # Errors
    /// The machine is gone, or the store refuses.
    pub async fn patch_activity(
        &self,
        id: &MachineId,
        patch: PatchActivity,
    ) -> Result<ActivityPolicy, MachineError> {
        let event = self.event(id, "machine.activity_set", "api", json!({ "activity": patch }));
        Ok(self.shared.store.patch_activity(id.clone(), patch, event).await?)
    }

    /// When each source of activity was seen in this run, the last one first.
    #[must_use]
    pub fn activity_of(&self, id: &MachineId, policy: &ActivityPolicy) -> Vec<ActivitySign> {
        let Some(handle) = self.shared.registry.find(id) else {
            return Vec::new();
        };
        let now = self.now_unix_ms();
        let seen = |source| match handle.gate.last_seen_unix_ms(source) {
            0 => None,
            at_unix_ms => Some(ActivitySign {
                source,
                counts: policy.counts(source),
                ago_ms: now.saturating_sub(at_unix_ms),
            }),
        };
        let mut signs: Vec<ActivitySign> = ActivitySource::ALL.into_iter().filter_map(seen).collect();
        signs.sort_by_key(|sign| sign.ago_ms);
        signs
    }

    /// What is left of the machine's least time awake.
    #[must_use]
    pub fn min_awake_remaining_ms(&self, id: &MachineId, policy: &ActivityPolicy) -> Option<u64> {
        let until = usage::awake_until(self, id, policy);
        let left_ms = until.saturating_sub(self.now_unix_ms());
        (left_ms > 0).then_some(left_ms)
    }

    /// Replace the machine's metadata.
    ///
    /// # Errors
    /// The machine is gone, or the store refuses.
    pub async fn set_metadata(
        &self,
        id: &MachineId,
        metadata: BTreeMap<String, String>,
    ) -> Result<(), MachineError> {
        let event = self.event(id, "machine.metadata_set", "api", json!({ "metadata": metadata }));
        self.shared
            .store
            .set_metadata(id.clone(), metadata, event)
            .await?;
        Ok(())
    }

    /// Expose a service.
    ///
    /// # Errors
    /// Its name is taken, no port is free or the port cannot be bound.
    pub async fn expose(&self, id: &MachineId, spec: ServiceSpec) -> Result<ServiceRow, MachineError> {
        let event = self.event(id, "service.exposed", "api", json!(spec));
        let service = self.shared.store.expose(id.clone(), spec, event).await?;
        let opened = self.shared.routes.open(ServiceRoute::of(id, &service));
        if let Err(error) = opened {
            let event = self.event(id, "service.removed", "api", json!({ "error": error.message }));
            self.shared
                .store
                .unexpose(id.clone(), service.name, event)
                .await?;
            return Err(error);
        }
        Ok(service)
    }

    /// Change who may reach a service, and how long it waits for a wake. `service` is its name or its port.
    ///
    /// # Errors
    /// The machine has none of this name, or the store refuses.
    pub async fn patch_service(
        &self,
        id: &MachineId,
        service: &str,
        patch: PatchService,
    ) -> Result<ServiceRow, MachineError> {
        let event = self.event(
            id,
            "service.changed",
            "api",
            json!({ "service": service, "change": patch }),
        );
        let row = self
            .shared
            .store
            .patch_service(id.clone(), service.to_owned(), patch, event)
            .await?;
        self.shared.routes.open(ServiceRoute::of(id, &row))?;
        Ok(row)
    }

    /// Take a service away.
    ///
    /// # Errors
    /// The machine has none of this name.
    pub async fn unexpose(&self, id: &MachineId, name: &str) -> Result<(), MachineError> {
        let event = self.event(id, "service.removed", "api", json!({ "name": name }));
        let Some(service) = self
            .shared
            .store
            .unexpose(id.clone(), name.to_owned(), event)
            .await?
        else {
            let message = format!("machine {id} exposes no service {}", super::cut(name));
            return Err(MachineError::new(ErrorCode::ServiceNotFound, message));
        };
        self.shared.routes.close(service.listen_port).await;
        Ok(())
    }
}
