//! Forks: machines that go on where another one is, and snapshots of templates. Both go through a snapshot and a
//! machine that nobody sees.

use super::super::admission::Patience;
use super::super::driver::PauseOrder;
use super::super::error::MachineError;
use super::create::{Shown, Source};
use super::snapshots::show;
use super::{CreateOrder, Fleet, SnapshotOrder};
use crate::store::{Idempotency, MachineRow, NewEvent, SnapshotPurpose, SnapshotRow};
use torpor_api::http::{
    CreateMachine, CreateSnapshot, ForkMachine, Forked, ServiceSpec, Snapshot, SnapshotStatus, WakePolicy,
};
use torpor_api::{LeaseAction, MachineId, MachineName};

/// A validated call for forks.
#[derive(Debug, Clone, Default)]
pub struct ForkOrder {
    /// The body.
    pub body: ForkMachine,
    /// The Idempotency-Key, if one was sent.
    pub idempotency: Option<Idempotency>,
}

/// A validated call for a snapshot of a template: what a machine of this shape is when it has booted.
#[derive(Debug, Clone)]
pub struct TemplateSnapshotOrder {
    /// Template and shape of the machine, as in a create call; nothing else of it counts.
    pub machine: CreateMachine,
    /// What is said of the snapshot.
    pub snapshot: SnapshotOrder,
}

impl Fleet {
    /// Make machines that go on where this one is, which goes on itself, in whatever state it is: all of them or none.
    ///
    /// Not to be dropped half way.
    ///
    /// # Errors
    /// Those of a snapshot and of a create; none of the forks is left then.
    pub async fn fork(&self, id: &MachineId, order: ForkOrder) -> Result<Forked, MachineError> {
        let key = order.idempotency.iter().map(|key| format!("key {}", key.key));
        let _turns = self.shared.turns.take_all(key).await;
        if let Some(before) = self.forked_before(&order).await? {
            return Ok(before);
        }
        let (row, _) = self.look(id).await?;
        let ids: Vec<MachineId> = (0..order.body.count).map(|_| MachineId::generate()).collect();
        let patience = Patience::of(self.shared.settings.wake_timeout);
        let memory = &self.shared.memory;
        let _ahead = memory.reserve_ahead(&ids, row.spec.mem_mib, &patience).await?;
        let purpose = if order.body.keep_snapshot {
            SnapshotPurpose::User
        } else {
            SnapshotPurpose::Fork
        };
        let snapshot = self.take_snapshot(id, SnapshotOrder::default(), purpose).await?;
        let machines = self.fork_from(&row, &snapshot, (&order, ids)).await;
        if machines.is_err() || !order.body.keep_snapshot {
            // The forks have links to what they need of it.
            let ended = self.end_snapshot(&snapshot.id, "api", None).await;
            if let Err(error) = ended {
                tracing::error!(snapshot_id = %snapshot.id, %error, "snapshot of a fork not removed yet");
            }
        }
        let mut forked = Forked {
            snapshot: order.body.keep_snapshot.then(|| show(snapshot.clone())),
            machines: Vec::new(),
        };
        for machine in machines? {
            let fork = self.view(&machine).await?;
            let detail = serde_json::json!({
                "fork_id": fork.id,
                "fork_execution_id": fork.last_execution_id,
            });
            let event = NewEvent {
                execution: snapshot.execution.clone(),
                ..self.event(id, "machine.forked", "api", detail)
            };
            self.shared.store.append_event(event).await?;
            forked.machines.push(fork);
        }
        Ok(forked)
    }

    /// A snapshot of a machine of this template and shape that has just booted; no machine is left of it.
    ///
    /// Not to be dropped half way.
    ///
    /// # Errors
    /// Those of a create and of a snapshot.
    pub async fn snapshot_template(&self, order: TemplateSnapshotOrder) -> Result<Snapshot, MachineError> {
        if let Some(digest) = &order.snapshot.body.digest
            && let Some(row) = self.shared.store.snapshot_of_digest(digest).await?
            && row.status == SnapshotStatus::Ready
        {
            return Ok(show(row));
        }
        let body = CreateMachine {
            wake: Some(WakePolicy::OFF),
            template: order.machine.template,
            vcpus: order.machine.vcpus,
            mem_mib: order.machine.mem_mib,
            disk_mib: order.machine.disk_mib,
            ..CreateMachine::default()
        };
        let source = self.source_of_template(&body).await?;
        let create = CreateOrder {
            body,
            idempotency: None,
        };
        let id = self.create_of(create, source, Shown::Nobody).await?;
        let taken = self
            .take_snapshot(&id, order.snapshot, SnapshotPurpose::User)
            .await;
        if let Err(error) = self.delete(&id, PauseOrder::by("api")).await {
            tracing::error!(machine_id = %id, %error, "machine of a template's snapshot not removed yet");
        }
        taken.map(show)
    }

    /// What a call with the same key made.
    async fn forked_before(&self, order: &ForkOrder) -> Result<Option<Forked>, MachineError> {
        let mut machines = Vec::new();
        for index in 0..order.body.count {
            let Some(key) = key_of(&order.idempotency, index) else {
                return Ok(None);
            };
            match self.shared.store.machine_of_key(key).await? {
                Some(machine) => machines.push(self.view(&machine).await?),
                None => break,
            }
        }
        let forked = Forked {
            snapshot: None,
            machines,
        };
        Ok((!forked.machines.is_empty()).then_some(forked))
    }

    async fn fork_from(
        &self,
        source: &MachineRow,
        snapshot: &SnapshotRow,
        (order, ids): (&ForkOrder, Vec<MachineId>),
    ) -> Result<Vec<MachineId>, MachineError> {
        let creates = (0..order.body.count).zip(ids).map(|(index, id)| {
            let create = CreateOrder {
                body: body_of(source, &order.body),
                idempotency: key_of(&order.idempotency, index),
            };
            async move {
                let mut source = Source::of_snapshot(&CreateMachine::default(), snapshot.clone())?;
                source.spec.id = id;
                self.create_of(create, source, Shown::Everybody).await
            }
        });
        let created = futures_util::future::join_all(creates).await;
        let (made, failed): (Vec<_>, Vec<_>) = created.into_iter().partition(Result::is_ok);
        let made: Vec<MachineId> = made.into_iter().flatten().collect();
        let Some(error) = failed.into_iter().find_map(Result::err) else {
            return Ok(made);
        };
        for id in made {
            if let Err(kept) = self.delete(&id, PauseOrder::by("api")).await {
                tracing::error!(machine_id = %id, error = %kept, "fork not removed yet");
            }
        }
        Err(error)
    }
}

fn key_of(key: &Option<Idempotency>, index: u32) -> Option<Idempotency> {
    let key = key.as_ref()?;
    Some(Idempotency {
        // No header holds a line break, so no other call has this key.
        key: format!("{}\nfork {index}", key.key),
        body_digest: key.body_digest.clone(),
    })
}

fn body_of(source: &MachineRow, wanted: &ForkMachine) -> CreateMachine {
    let destroys = wanted
        .lease
        .is_some_and(|lease| lease.action == LeaseAction::Destroy);
    let wake = if destroys { WakePolicy::OFF } else { source.wake };
    let services = source.services.iter().map(|service| ServiceSpec {
        name: service.name.parse::<MachineName>().ok(),
        port: service.port,
        kind: service.kind,
        auth: service.auth,
        wake_deadline_ms: service.wake_deadline_ms,
    });
    CreateMachine {
        lease: wanted.lease.or(source.lease),
        wake: Some(wanted.wake.unwrap_or(wake)),
        activity: Some(source.activity),
        retention_seconds: source.retention_seconds,
        services: services.collect(),
        metadata: wanted.metadata.clone().unwrap_or_else(|| source.metadata.clone()),
        env: source.env.clone(),
        cwd: source.cwd.clone(),
        ..CreateMachine::default()
    }
}

impl From<CreateSnapshot> for SnapshotOrder {
    fn from(body: CreateSnapshot) -> Self {
        Self {
            body,
            idempotency: None,
        }
    }
}
