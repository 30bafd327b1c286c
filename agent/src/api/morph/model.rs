//! The instance and the snapshot object. The SDK refuses `null` where a field may only be missing, and fractions of seconds.

use super::dialect::{instance_id, snapshot_id};
use serde::Serialize;
use std::collections::BTreeMap;
use torpor_api::http::{self, Machine, MachineStatus, ServiceAuth, ServiceKind, SnapshotStatus};
use torpor_api::{Lease, LeaseAction};
use utoipa::ToSchema;

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    Pending,
    Ready,
    Paused,
    Saving,
    Error,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Spec {
    pub(super) vcpus: u8,
    /// MiB.
    pub(super) memory: u32,
    /// MiB.
    pub(super) disk_size: u32,
}

#[derive(Debug, Serialize, ToSchema)]
struct Refs {
    snapshot_id: String,
    image_id: String,
}

#[derive(Debug, Serialize, ToSchema)]
struct HttpService {
    name: String,
    port: u16,
    url: String,
    auth_mode: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
struct Networking {
    internal_ip: Option<String>,
    http_services: Vec<HttpService>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
struct Ttl {
    ttl_seconds: Option<u64>,
    ttl_expire_at: Option<u64>,
    ttl_action: Option<&'static str>,
}

#[derive(Debug, Serialize, ToSchema)]
struct WakeOn {
    wake_on_ssh: bool,
    wake_on_http: bool,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Instance {
    id: String,
    object: &'static str,
    /// Unix time in seconds.
    created: u64,
    status: Status,
    spec: Spec,
    refs: Refs,
    networking: Networking,
    ttl: Ttl,
    wake_on: WakeOn,
    metadata: BTreeMap<String, String>,
}

fn status(machine: &Machine) -> Status {
    match machine.status {
        MachineStatus::Starting | MachineStatus::Waking => Status::Pending,
        MachineStatus::Running => Status::Ready,
        MachineStatus::Pausing => Status::Saving,
        MachineStatus::Paused => Status::Paused,
        // Shut down inside, it comes back by a resume as a paused one does.
        MachineStatus::Stopped if machine.last_error.is_none() => Status::Paused,
        MachineStatus::Stopped | MachineStatus::Deleting => Status::Error,
    }
}

fn ttl(lease: Option<&Lease>) -> Ttl {
    lease.map_or_else(Ttl::default, |lease| Ttl {
        ttl_seconds: Some(lease.policy.seconds),
        ttl_expire_at: lease.deadline_unix_ms.map(|deadline| deadline.div_ceil(1000)),
        ttl_action: Some(match lease.policy.action {
            LeaseAction::Pause => "pause",
            LeaseAction::Destroy => "stop",
        }),
    })
}

impl From<Machine> for Instance {
    fn from(machine: Machine) -> Self {
        let services = machine.services.iter();
        let services = services.filter(|service| service.kind == ServiceKind::Http);
        Self {
            id: instance_id(&machine.id),
            object: "instance",
            created: machine.created_unix_ms / 1000,
            status: status(&machine),
            spec: Spec {
                vcpus: machine.vcpus,
                memory: machine.mem_mib,
                disk_size: machine.disk_mib,
            },
            networking: Networking {
                internal_ip: Some("172.31.0.2".to_owned()),
                http_services: services
                    .map(|service| HttpService {
                        name: service.name.clone(),
                        port: service.port,
                        url: service.url.clone(),
                        auth_mode: match service.auth {
                            ServiceAuth::None => "none",
                            ServiceAuth::ApiKey => "api_key",
                            ServiceAuth::Token => "token",
                        },
                    })
                    .collect(),
            },
            ttl: ttl(machine.lease.as_ref()),
            wake_on: WakeOn {
                wake_on_ssh: machine.wake.ssh,
                wake_on_http: machine.wake.http,
            },
            refs: Refs {
                snapshot_id: machine
                    .snapshot_id
                    .as_ref()
                    .map_or_else(|| machine.template.clone(), snapshot_id),
                image_id: machine.template,
            },
            metadata: machine.metadata,
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum SnapshotState {
    Pending,
    Ready,
    Deleting,
}

#[derive(Debug, Serialize, ToSchema)]
struct SnapshotRefs {
    image_id: String,
}

#[derive(Debug, Serialize, ToSchema)]
struct SnapshotTtl {
    ttl_seconds: Option<u64>,
    ttl_expire_at: Option<u64>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Snapshot {
    id: String,
    object: &'static str,
    /// Unix time in seconds.
    created: u64,
    status: SnapshotState,
    spec: Spec,
    refs: SnapshotRefs,
    digest: Option<String>,
    metadata: BTreeMap<String, String>,
    ttl: SnapshotTtl,
}

impl From<http::Snapshot> for Snapshot {
    fn from(snapshot: http::Snapshot) -> Self {
        Self {
            id: snapshot_id(&snapshot.id),
            object: "snapshot",
            created: snapshot.created_unix_ms / 1000,
            status: match snapshot.status {
                SnapshotStatus::Creating => SnapshotState::Pending,
                SnapshotStatus::Ready => SnapshotState::Ready,
                SnapshotStatus::Deleting => SnapshotState::Deleting,
            },
            spec: Spec {
                vcpus: snapshot.vcpus,
                memory: snapshot.mem_mib,
                disk_size: snapshot.disk_mib,
            },
            refs: SnapshotRefs {
                image_id: snapshot.template,
            },
            digest: snapshot.digest,
            metadata: snapshot.metadata,
            ttl: SnapshotTtl {
                ttl_seconds: snapshot.retention.map(|retention| retention.seconds),
                ttl_expire_at: snapshot
                    .retention
                    .map(|retention| retention.expires_unix_ms.div_ceil(1000)),
            },
        }
    }
}
