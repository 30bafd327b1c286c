//! Connections that outlast pauses: the proxy's [`Line`] over the fleet.

use super::{refusal, report_first_byte};
use crate::machine::fleet::{Fleet, WakeSource};
use crate::machine::lines::OpenLine;
use async_trait::async_trait;
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use torpor_api::{ErrorCode, MachineId};
use torpor_proxy::{Awake, Guard, Line, WakeRefusal};

/// One open connection to one machine.
pub(super) struct FleetLine {
    pub(super) fleet: Fleet,
    pub(super) machine: MachineId,
    pub(super) port: u16,
    pub(super) source: WakeSource,
    pub(super) client: Option<SocketAddr>,
    pub(super) open: OpenLine,
}

#[async_trait]
impl Line for FleetLine {
    async fn awake(&self) -> Result<Awake, WakeRefusal> {
        if let Some(pass) = self.fleet.enter(&self.machine) {
            return Ok(Awake {
                guard: Box::new(pass),
                on_first_byte: None,
            });
        }
        let cause = json!({ "client": self.client, "port": self.port, "operation": "open connection" });
        let woken = self
            .fleet
            .wake(&self.machine, self.source, cause)
            .await
            .map_err(refusal)?;
        if self.over().is_cancelled() {
            let message = format!(
                "machine {} lost the memory that the connection led to",
                self.machine
            );
            return Err(WakeRefusal::new(ErrorCode::UpstreamClosed, message));
        }
        let epoch = Arc::clone(woken.pass.epoch());
        let on_first_byte = woken.report.map(|report| {
            let told = (report, serde_json::Map::new());
            report_first_byte(self.fleet.clone(), self.machine.clone(), epoch, told)
        });
        Ok(Awake {
            guard: Box::new(woken.pass),
            on_first_byte,
        })
    }

    fn enter_quietly(&self) -> Option<Guard> {
        let pass = self.fleet.enter_quietly(&self.machine)?;
        Some(Box::new(pass))
    }

    fn over(&self) -> &CancellationToken {
        self.open.lines().over()
    }
}
