//! Creating a machine: all of it or nothing.

use super::super::driver::{Command, First, Need, PauseOrder, WakeOrder};
use super::super::error::MachineError;
use super::super::hypervisor::MachineSpec;
use super::super::state::Committed;
use super::{Fleet, cut};
use crate::store::{Created, Idempotency, NewMachine, ServiceRoute, SnapshotRow};
use std::collections::BTreeMap;
use torpor_api::http::{CreateMachine, ExecRequest, SnapshotStatus, WakePolicy};
use torpor_api::{ErrorCode, LeaseAction, MachineId, SnapshotId};

/// A validated create call.
#[derive(Debug, Clone)]
pub struct CreateOrder {
    /// The body.
    pub body: CreateMachine,
    /// The Idempotency-Key, if one was sent.
    pub idempotency: Option<Idempotency>,
}

/// Who gets to see a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    /// Whoever asks.
    Everybody,
    /// Nobody: it lives for the length of one call.
    Nobody,
}

/// What a new machine begins as.
#[derive(Debug, Clone)]
pub(super) struct Source {
    /// Its identity and its shape.
    pub(super) spec: MachineSpec,
    /// The snapshot that it goes on from; otherwise it boots.
    pub(super) snapshot: Option<SnapshotId>,
    /// Environment of its commands, below what the call says.
    env: BTreeMap<String, String>,
    /// Their working directory, if the call says none.
    cwd: Option<String>,
    /// What runs in it from the start.
    entrypoint: Vec<String>,
}

impl Source {
    /// The shape is the snapshot's; a field that says otherwise is refused.
    pub(super) fn of_snapshot(body: &CreateMachine, row: SnapshotRow) -> Result<Self, MachineError> {
        if row.status != SnapshotStatus::Ready {
            let message = format!("snapshot {} is being taken", row.id);
            return Err(MachineError::new(ErrorCode::TransitionInProgress, message));
        }
        let (default, spec) = (CreateMachine::default(), &row.spec);
        let says_otherwise = [
            (
                "template",
                body.template != default.template && body.template != spec.template,
            ),
            ("vcpus", body.vcpus != default.vcpus && body.vcpus != spec.vcpus),
            (
                "mem_mib",
                body.mem_mib != default.mem_mib && body.mem_mib != spec.mem_mib,
            ),
            (
                "disk_mib",
                body.disk_mib.is_some_and(|disk_mib| disk_mib != spec.disk_mib),
            ),
        ];
        if let Some((field, _)) = says_otherwise.into_iter().find(|(_, differs)| *differs) {
            let message = format!(
                "{field} is not that of snapshot {}, and cannot be changed",
                row.id
            );
            return Err(MachineError::new(ErrorCode::InvalidRequest, message));
        }
        Ok(Self {
            spec: MachineSpec {
                id: MachineId::generate(),
                ..row.spec
            },
            snapshot: Some(row.id),
            env: BTreeMap::new(),
            cwd: None,
            entrypoint: Vec::new(),
        })
    }
}

impl Fleet {
    /// Make a machine, which boots or goes on from a snapshot; answers its ID when the guest answers and its execution
    /// is committed.
    ///
    /// # Errors
    /// Whatever failed; nothing of the machine is left then.
    pub async fn create(&self, order: CreateOrder) -> Result<MachineId, MachineError> {
        let source = match &order.body.snapshot {
            Some(text) => {
                let mut source = Source::of_snapshot(&order.body, self.snapshot_row(text).await?)?;
                if let Some(template) = self.shared.hypervisor.template(&source.spec.template).await {
                    (source.env, source.cwd) = (template.env, template.cwd);
                }
                source
            }
            None => self.source_of_template(&order.body).await?,
        };
        self.create_of(order, source, Shown::Everybody).await
    }

    pub(super) async fn create_of(
        &self,
        order: CreateOrder,
        source: Source,
        shown: Shown,
    ) -> Result<MachineId, MachineError> {
        self.shared.memory.check(source.spec.mem_mib.into())?;
        let (snapshot, spec) = (source.snapshot.clone(), source.spec.clone());
        let entrypoint = source.entrypoint.clone();
        let new = self.prepare(&order, source, shown);
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
        let first = match snapshot {
            Some(snapshot) => First::GoOn(snapshot),
            None => self.first_of(&spec).await,
        };
        let wake = WakeOrder {
            need: Need::Machine,
            first: first.clone(),
            ..WakeOrder::by("api")
        };
        let started = self.send(&id, |reply| Command::Wake(wake.clone(), reply)).await;
        self.started(spec, first, started.is_ok()).await;
        match started {
            Ok(_) => self.begin(&id, entrypoint).await,
            Err(error) => self.roll_back(&id, error).await,
        }
    }

    /// Run what the template says in the new machine. One that cannot be started is told of, and the machine stays.
    async fn begin(&self, id: &MachineId, entrypoint: Vec<String>) -> Result<MachineId, MachineError> {
        if !entrypoint.is_empty() {
            let request = ExecRequest {
                argv: entrypoint,
                background: true,
                ..ExecRequest::default()
            };
            let (kind, detail) = match self.exec(id, request).await {
                Ok(result) => (
                    "machine.entrypoint_started",
                    serde_json::json!({ "pid": result.pid }),
                ),
                Err(error) => (
                    "machine.entrypoint_failed",
                    serde_json::json!({ "code": error.code, "message": error.message }),
                ),
            };
            let event = self.event(id, kind, "api", detail);
            if let Err(error) = self.shared.store.append_event(event).await {
                tracing::warn!(machine_id = %id, %error, "entrypoint not written down");
            }
        }
        Ok(id.clone())
    }

    /// What a create leaves to be done with the snapshot that it used or made.
    async fn started(&self, spec: MachineSpec, first: First, created: bool) {
        match first {
            First::Boot => {}
            First::BootAndKeep(snapshot) => self.keep_warm(spec, snapshot, created),
            First::GoOn(snapshot) | First::Warm(snapshot) => {
                let used = self.shared.store.use_snapshot(snapshot, self.now_unix_ms()).await;
                if let Err(error) = used {
                    tracing::warn!(%error, "use of a snapshot not written down");
                }
                self.shared.retention_changed.notify_one();
            }
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

    pub(super) async fn source_of_template(&self, body: &CreateMachine) -> Result<Source, MachineError> {
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
        Ok(Source {
            spec: MachineSpec {
                id: MachineId::generate(),
                template: template.name,
                template_digest: template.digest,
                vcpus: body.vcpus,
                mem_mib: body.mem_mib,
                disk_mib,
            },
            snapshot: None,
            env: template.env,
            cwd: template.cwd,
            entrypoint: template.entrypoint,
        })
    }

    fn prepare(&self, order: &CreateOrder, source: Source, shown: Shown) -> NewMachine {
        let body = &order.body;
        let mut env = source.env;
        env.extend(body.env.clone());
        let destroys = body
            .lease
            .is_some_and(|lease| lease.action == LeaseAction::Destroy);
        let default = if destroys {
            WakePolicy::OFF
        } else {
            WakePolicy::default()
        };
        let detail = serde_json::json!({
            "name": body.name,
            "template": source.spec.template,
            "snapshot_id": source.snapshot,
        });
        NewMachine {
            event: self.event(&source.spec.id, "machine.created", "api", detail),
            spec: source.spec,
            name: body.name.clone(),
            lease: body.lease,
            wake: body.wake.unwrap_or(default),
            activity: body.activity.unwrap_or_default(),
            retention_seconds: body.retention_seconds,
            services: body.services.clone(),
            metadata: body.metadata.clone(),
            env,
            cwd: body.cwd.clone().or(source.cwd),
            snapshot: source.snapshot,
            hidden: shown == Shown::Nobody,
            idempotency: order.idempotency.clone(),
        }
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
