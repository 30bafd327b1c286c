//! Services: which port of the proxy leads to which port of which machine.

use super::events::{self, NewEvent};
use super::rows::{
    self, MachineRow, ServiceRow, get, parse, service_auth, service_auth_text, service_kind,
    service_kind_text,
};
use super::{Store, StoreError, sql};
use crate::machine::state::Committed;
use rusqlite::{Connection, OptionalExtension, params};
use torpor_api::http::{PatchService, ServiceAuth, ServiceKind, ServiceSpec};
use torpor_api::{ErrorCode, MachineId, limits};

/// Ports of the proxy that services are given.
pub const SERVICE_PORTS: std::ops::RangeInclusive<u16> = 20_000..=29_999;

/// Where a port of the proxy leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRoute {
    /// Port of the proxy.
    pub listen_port: u16,
    /// The machine.
    pub machine: MachineId,
    /// Port in the guest.
    pub port: u16,
    /// What it speaks.
    pub kind: ServiceKind,
    /// What a request must show.
    pub auth: ServiceAuth,
    /// Longest wait of a request for a wake in milliseconds, if it is not the host's own.
    pub wake_deadline_ms: Option<u64>,
}

impl ServiceRoute {
    /// The route of a machine's service.
    #[must_use]
    pub fn of(machine: &MachineId, service: &ServiceRow) -> Self {
        Self {
            listen_port: service.listen_port,
            machine: machine.clone(),
            port: service.port,
            kind: service.kind,
            auth: service.auth,
            wake_deadline_ms: service.wake_deadline_ms,
        }
    }
}

pub(super) fn service_name(spec: &ServiceSpec) -> String {
    spec.name
        .as_ref()
        .map_or_else(|| format!("port-{}", spec.port), ToString::to_string)
}

pub(super) fn insert(
    connection: &Connection,
    machine: &MachineId,
    spec: &ServiceSpec,
) -> Result<(), StoreError> {
    let listen_port = free_port(connection)?;
    connection
        .prepare_cached(
            "INSERT INTO services (machine_id, name, port, kind, listen_port, auth, wake_deadline_ms) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )
        .and_then(|mut statement| {
            let kind = service_kind_text(spec.kind);
            statement.execute(params![
                machine.as_str(),
                service_name(spec),
                spec.port,
                kind,
                listen_port,
                service_auth_text(spec.auth),
                spec.wake_deadline_ms
            ])
        })
        .map_err(sql("expose a service"))?;
    Ok(())
}

/// The port after the highest one, so that a port just given up is not somebody else's at once; at the end of the
/// range, the lowest gap.
fn free_port(connection: &Connection) -> Result<u16, StoreError> {
    let operation = sql("find a free port");
    let highest: Option<u16> = connection
        .query_row("SELECT max(listen_port) FROM services", [], |row| row.get(0))
        .map_err(&operation)?;
    match highest {
        None => return Ok(*SERVICE_PORTS.start()),
        Some(port) if port < *SERVICE_PORTS.end() => return Ok(port + 1),
        Some(_) => {}
    }
    let taken_first: bool = connection
        .query_row(
            "SELECT EXISTS (SELECT 1 FROM services WHERE listen_port = ?1)",
            [SERVICE_PORTS.start()],
            |row| row.get(0),
        )
        .map_err(&operation)?;
    if !taken_first {
        return Ok(*SERVICE_PORTS.start());
    }
    connection
        .query_row(
            "SELECT s.listen_port + 1 FROM services s WHERE s.listen_port < ?1 AND NOT EXISTS \
             (SELECT 1 FROM services t WHERE t.listen_port = s.listen_port + 1) ORDER BY 1 LIMIT 1",
            [SERVICE_PORTS.end()],
            |row| row.get(0),
        )
        .optional()
        .map_err(&operation)?
        .ok_or(StoreError::NoListenPort)
}

impl Store {
    /// Expose a service. The same name, port and kind again answers what there is.
    ///
    /// # Errors
    /// The name has another port or kind, the machine is gone, or bounds are reached.
    pub async fn expose(
        &self,
        machine: MachineId,
        spec: ServiceSpec,
        event: NewEvent,
    ) -> Result<ServiceRow, StoreError> {
        self.write("expose a service", move |tx| {
            let name = service_name(&spec);
            let row = existing(tx, &machine)?;
            // Its ports are being closed.
            if row.committed == Committed::Deleting {
                return Err(StoreError::NoMachine {
                    id: machine.to_string(),
                });
            }
            if let Some(service) = find(&row, &name) {
                let same = service.port == spec.port
                    && service.kind == spec.kind
                    && service.auth == spec.auth
                    && service.wake_deadline_ms == spec.wake_deadline_ms;
                return if same {
                    Ok(service)
                } else {
                    Err(StoreError::ServiceTaken { name })
                };
            }
            if row.services.len() >= limits::MAX_SERVICES {
                return Err(StoreError::TooManyServices {
                    limit: limits::MAX_SERVICES,
                });
            }
            insert(tx, &machine, &spec)?;
            events::insert(tx, &event)?;
            let row = existing(tx, &machine)?;
            find(&row, &name).ok_or(StoreError::NoListenPort)
        })
        .await
    }

    /// Take a service away; answers the one that was there.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn unexpose(
        &self,
        machine: MachineId,
        name: String,
        event: NewEvent,
    ) -> Result<Option<ServiceRow>, StoreError> {
        self.write("remove a service", move |tx| {
            let service = find(&existing(tx, &machine)?, &name);
            if service.is_some() {
                tx.execute(
                    "DELETE FROM services WHERE machine_id = ?1 AND name = ?2",
                    [machine.as_str(), &name],
                )
                .map_err(sql("remove a service"))?;
                events::insert(tx, &event)?;
            }
            Ok(service)
        })
        .await
    }

    /// Change what is given of a service that has this name, or else this port; answers it as it is then.
    ///
    /// # Errors
    /// There is none, or the change makes no sense for what it speaks.
    pub async fn patch_service(
        &self,
        machine: MachineId,
        name: String,
        patch: PatchService,
        event: NewEvent,
    ) -> Result<ServiceRow, StoreError> {
        self.write("change a service", move |tx| {
            let row = existing(tx, &machine)?;
            let service = find(&row, &name)
                .or_else(|| {
                    row.services
                        .iter()
                        .find(|service| service.port.to_string() == name)
                        .cloned()
                })
                .ok_or_else(|| StoreError::Refused {
                    code: ErrorCode::ServiceNotFound,
                    reason: format!("machine {machine} exposes no such service"),
                })?;
            if service.kind == ServiceKind::Tcp && patch.auth.is_some_and(|auth| auth != ServiceAuth::None) {
                return Err(StoreError::Refused {
                    code: ErrorCode::InvalidRequest,
                    reason: "a TCP service has no place for a token".to_owned(),
                });
            }
            tx.execute(
                "UPDATE services SET auth = coalesce(?3, auth), wake_deadline_ms = \
                 CASE WHEN ?4 IS NULL THEN wake_deadline_ms WHEN ?4 = 0 THEN NULL ELSE ?4 END \
                 WHERE machine_id = ?1 AND name = ?2",
                params![
                    machine.as_str(),
                    service.name,
                    patch.auth.map(service_auth_text),
                    patch.wake_deadline_ms
                ],
            )
            .map_err(sql("change a service"))?;
            events::insert(tx, &event)?;
            find(&existing(tx, &machine)?, &service.name).ok_or(StoreError::NoListenPort)
        })
        .await
    }

    /// Every route there is, for the proxy's listeners at start.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn routes(&self) -> Result<Vec<ServiceRoute>, StoreError> {
        self.read("read routes", |tx| {
            let operation = sql("read routes");
            let mut statement = tx
                .prepare_cached(
                    "SELECT listen_port, machine_id, port, kind, auth, wake_deadline_ms FROM services \
                     ORDER BY listen_port",
                )
                .map_err(&operation)?;
            let mut found = statement.query([]).map_err(&operation)?;
            let mut routes = Vec::new();
            while let Some(row) = found.next().map_err(&operation)? {
                routes.push(ServiceRoute {
                    listen_port: get(row, "listen_port")?,
                    machine: parse(&get::<String>(row, "machine_id")?, "machine_id")?,
                    port: get(row, "port")?,
                    kind: service_kind(&get::<String>(row, "kind")?)?,
                    auth: service_auth(&get::<String>(row, "auth")?)?,
                    wake_deadline_ms: get(row, "wake_deadline_ms")?,
                });
            }
            Ok(routes)
        })
        .await
    }
}

fn existing(connection: &Connection, machine: &MachineId) -> Result<MachineRow, StoreError> {
    rows::machine(connection, machine)?.ok_or_else(|| StoreError::NoMachine {
        id: machine.to_string(),
    })
}

fn find(row: &MachineRow, name: &str) -> Option<ServiceRow> {
    row.services.iter().find(|service| service.name == name).cloned()
}
