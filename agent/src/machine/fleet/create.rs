//! Creating a machine: all of it or nothing.

use super::super::driver::{Command, Need, PauseOrder, WakeOrder};
use super::super::error::MachineError;
use super::super::hypervisor::MachineSpec;
use super::super::state::Committed;
use super::{Fleet, cut};
use crate::store::{Created, Idempotency, NewMachine, ServiceRoute};
use std::sync::Arc;
use torpor_api::http::{CreateMachine, WakePolicy};
use torpor_api::{ErrorCode, LeaseAction, MachineId};

/// A validated create call.
#[derive(Debug, Clone)]
pub struct CreateOrder {
    /// The body.
    pub body: CreateMachine,
    /// The Idempotency-Key, if one was sent.
    pub idempotency: Option<Idempotency>,
}

impl Fleet {
    /// Make a machine and boot it; answers its ID when the guest answers and its execution is committed.
    ///
    /// # Errors
    /// Whatever failed; nothing of the machine is left then.
    pub async fn create(&self, order: CreateOrder) -> Result<MachineId, MachineError> {
        let new = self.prepare(&order).await?;
        let id = new.spec.id.clone();
        let id = match self.shared.store.create_machine(new).await? {
            Created::New => {
                if let Err(error) = self.listen(&id).await {
                    return self.roll_back(&id, error).await;
                }
                id
            }
            // Whatever became of it since is not this call's to change.
            Created::Before(id) if self.look(&id).await?.0.committed != Committed::Creating => return Ok(id),
            Created::Before(id) => id,
        };
        let wake = WakeOrder {
            need: Need::Machine,
            ..WakeOrder::by("api")
        };
        match self.send(&id, |reply| Command::Wake(wake.clone(), reply)).await {
            Ok(_) => Ok(id),
            Err(error) => self.roll_back(&id, error).await,
        }
    }

    async fn roll_back(&self, id: &MachineId, error: MachineError) -> Result<MachineId, MachineError> {
        if let Err(kept) = self.delete(id, PauseOrder::by("api")).await
            && kept.code != ErrorCode::MachineNotFound
        {
            tracing::error!(machine_id = %id, error = %kept, "half-made machine not removed yet");
        }
        Err(error)
    }

    async fn prepare(&self, order: &CreateOrder) -> Result<NewMachine, MachineError> {
        let body = &order.body;
        let template = self
            .shared
            .hypervisor
            .template(&body.template)
            .await
            .ok_or_else(|| {
                MachineError::new(
                    ErrorCode::TemplateNotFound,
                    format!("no template {}", cut(&body.template)),
                )
            })?;
        let disk_mib = body.disk_mib.unwrap_or(template.disk_mib);
        if disk_mib < template.disk_mib {
            let message = format!(
                "disk_mib {disk_mib} is below the template's {}",
                template.disk_mib
            );
            return Err(MachineError::new(ErrorCode::InvalidRequest, message));
        }
        if Arc::clone(&self.shared.memory).available_permits()
            < usize::try_from(body.mem_mib).unwrap_or(usize::MAX)
        {
            let message = format!("the host has no {} MiB of memory to give", body.mem_mib);
            return Err(MachineError::new(ErrorCode::CapacityExceeded, message));
        }
        let id = MachineId::generate();
        let destroys = body
            .lease
            .is_some_and(|lease| lease.action == LeaseAction::Destroy);
        let default = if destroys {
            WakePolicy::OFF
        } else {
            WakePolicy::default()
        };
        let detail = serde_json::json!({ "name": body.name, "template": body.template });
        Ok(NewMachine {
            event: self.event(&id, "machine.created", "api", detail),
            spec: MachineSpec {
                id,
                template: template.name,
                template_digest: template.digest,
                vcpus: body.vcpus,
                mem_mib: body.mem_mib,
                disk_mib,
            },
            name: body.name.clone(),
            lease: body.lease,
            wake: body.wake.unwrap_or(default),
            services: body.services.clone(),
            metadata: body.metadata.clone(),
            env: body.env.clone(),
            cwd: body.cwd.clone(),
            idempotency: order.idempotency.clone(),
        })
    }

    async fn listen(&self, id: &MachineId) -> Result<(), MachineError> {
        let Some(row) = self.shared.store.machine(id).await? else {
            return Ok(());
        };
        for service in row.services {
            self.shared.routes.open(ServiceRoute::of(id, &service))?;
        }
        Ok(())
    }
}
