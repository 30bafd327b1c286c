//! Machines as users see them: the committed row, overlaid with what the driver shows. Never wakes.

use super::super::driver::Live;
use super::super::error::MachineError;
use super::super::registry::Handle;
use super::super::state::Committed;
use super::{Fleet, status_of};
use crate::store::{MachineFilter, MachineRow, ServiceRow};
use futures_util::future::join_all;
use std::collections::BTreeMap;
use std::time::Duration;
use torpor_api::http::{Machine, MachineRetention, MachineStatus, Service, ServiceKind};
use torpor_api::{Lease, LeaseMode, MachineId};

/// A read waits this long for the row to follow the machine, and shows what there is after it.
const LONGEST_COMMIT: Duration = Duration::from_secs(2);

/// Which machines are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineQuery {
    /// By what is stored of them.
    pub filter: MachineFilter,
    /// By what they are doing; anything if empty.
    pub statuses: Vec<MachineStatus>,
}

impl MachineQuery {
    fn shows(&self, status: MachineStatus) -> bool {
        self.statuses.is_empty() || self.statuses.contains(&status)
    }
}

impl Fleet {
    /// Wait until rows and events have followed this machine, or all of them, as they are now; not for long.
    pub async fn caught_up(&self, machine: Option<&MachineId>) {
        let handles: Vec<Handle> = match machine {
            Some(id) => self.shared.registry.find(id).into_iter().collect(),
            None => self
                .shared
                .registry
                .all()
                .into_iter()
                .map(|(_, handle)| handle)
                .collect(),
        };
        // A driver that has left has committed what it had to.
        let committed = handles.into_iter().map(|mut handle| async move {
            let _ = handle.live.wait_for(|live| !live.committing).await;
        });
        let _ = tokio::time::timeout(LONGEST_COMMIT, join_all(committed)).await;
    }

    /// The machine as it is now.
    ///
    /// # Errors
    /// `machine_not_found`, or the store refuses.
    pub async fn view(&self, id: &MachineId) -> Result<Machine, MachineError> {
        self.caught_up(Some(id)).await;
        let handle = self.shared.registry.find(id);
        let row = self
            .shared
            .store
            .machine(id)
            .await?
            .ok_or_else(|| MachineError::not_found(id))?;
        Ok(self.show(row, handle.as_ref()))
    }

    /// A page of the machines that the query asks for, oldest first.
    ///
    /// # Errors
    /// `after` is no machine, or the store refuses.
    pub async fn list(
        &self,
        query: &MachineQuery,
        after: Option<MachineId>,
        limit: u32,
    ) -> Result<Vec<Machine>, MachineError> {
        self.caught_up(None).await;
        let handles: BTreeMap<MachineId, Handle> = self.shared.registry.all().into_iter().collect();
        let wanted = usize::try_from(limit).unwrap_or(usize::MAX);
        let (mut after, mut machines) = (after, Vec::new());
        // What drivers show is not in the store, so a page there can hold less than a page here.
        loop {
            let filter = query.filter.clone();
            let rows = self.shared.store.list(filter, after, limit).await?;
            let last_page = rows.len() < wanted;
            after = rows.last().map(|row| row.spec.id.clone());
            let shown = rows.into_iter().map(|row| {
                let handle = handles.get(&row.spec.id);
                self.show(row, handle)
            });
            machines.extend(shown.filter(|machine| query.shows(machine.status)));
            if last_page || machines.len() >= wanted {
                machines.truncate(wanted);
                return Ok(machines);
            }
        }
    }

    /// A service as users see it.
    #[must_use]
    pub fn show_service(&self, service: ServiceRow) -> Service {
        let scheme = match service.kind {
            ServiceKind::Http if self.shared.settings.service_tls => "https",
            ServiceKind::Http => "http",
            ServiceKind::Tcp => "tcp",
        };
        Service {
            url: format!(
                "{scheme}://{}:{}",
                self.shared.settings.service_host, service.listen_port
            ),
            name: service.name,
            port: service.port,
            kind: service.kind,
            auth: service.auth,
            wake_deadline_ms: service.wake_deadline_ms,
            listen_port: service.listen_port,
        }
    }

    fn show(&self, row: MachineRow, handle: Option<&Handle>) -> Machine {
        let live = handle.map(|handle| handle.live.borrow().clone());
        let status = status_of(&row, live.as_ref());
        let awake = matches!(status, MachineStatus::Running | MachineStatus::Pausing);
        Machine {
            status,
            lease: self.show_lease(&row, handle, awake),
            retention: self.show_retention(&row, status),
            activity: row.activity,
            execution_id: row.execution.filter(|_| awake),
            last_execution_id: row.last_execution,
            last_error: live.and_then(|live| live.last_error).or(row.last_error),
            services: row
                .services
                .into_iter()
                .map(|service| self.show_service(service))
                .collect(),
            id: row.spec.id,
            name: row.name,
            template: row.spec.template,
            snapshot_id: row.snapshot,
            vcpus: row.spec.vcpus,
            mem_mib: row.spec.mem_mib,
            disk_mib: row.spec.disk_mib,
            created_unix_ms: row.created_unix_ms,
            since_unix_ms: row.last_used_unix_ms,
            wake: row.wake,
            metadata: row.metadata,
            env: row.env,
            cwd: row.cwd,
            pauses: row.pauses,
            wakes: row.wakes,
        }
    }

    fn show_retention(&self, row: &MachineRow, status: MachineStatus) -> Option<MachineRetention> {
        let at_rest = matches!(status, MachineStatus::Paused | MachineStatus::Stopped);
        let expires_unix_ms = row.expires_unix_ms.filter(|_| at_rest);
        Some(MachineRetention {
            seconds: row.retention_seconds?,
            expires_unix_ms,
            remaining_ms: expires_unix_ms.map(|expires| expires.saturating_sub(self.now_unix_ms())),
        })
    }

    /// A sliding deadline slides in memory and is written down when it would have passed.
    fn show_lease(&self, row: &MachineRow, handle: Option<&Handle>, awake: bool) -> Option<Lease> {
        let policy = row.lease?;
        let slid = handle
            .filter(|_| policy.mode == LeaseMode::Sliding)
            .map_or(0, |handle| {
                handle
                    .gate
                    .last_used_unix_ms(&row.activity)
                    .saturating_add(policy.seconds.saturating_mul(1000))
            });
        let deadline_unix_ms = row
            .deadline_unix_ms
            .filter(|_| awake)
            .map(|deadline| deadline.max(slid));
        Some(Lease {
            policy,
            deadline_unix_ms,
            remaining_ms: deadline_unix_ms.map(|deadline| deadline.saturating_sub(self.now_unix_ms())),
        })
    }
}

/// Machines by what users see: the rows' counts, corrected by what drivers show.
///
/// # Errors
/// The store refuses.
pub async fn status_counts(fleet: &Fleet) -> Result<BTreeMap<String, u64>, MachineError> {
    let live: Vec<Live> = fleet
        .shared
        .registry
        .all()
        .into_iter()
        .map(|(_, handle)| handle.live.borrow().clone())
        .collect();
    let mut asleep = fleet.shared.store.counts().await?;
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    let name = |status: MachineStatus| {
        serde_json::to_value(status)
            .ok()
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default()
    };
    for committed in Committed::ALL {
        let shown = match committed {
            // What runs has a driver, which is asked below.
            Committed::Running | Committed::Creating | Committed::Deleting => continue,
            Committed::Paused | Committed::Refused => MachineStatus::Paused,
            Committed::Stopped => MachineStatus::Stopped,
        };
        *counts.entry(name(shown)).or_default() += asleep.remove(committed.as_str()).unwrap_or(0);
    }
    for state in live.into_iter().filter_map(|live| live.state) {
        let status = state.status();
        if !matches!(status, MachineStatus::Paused | MachineStatus::Stopped) {
            *counts.entry(name(status)).or_default() += 1;
        }
    }
    Ok(counts)
}
