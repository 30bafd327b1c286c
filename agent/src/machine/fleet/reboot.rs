//! Rebooting a machine, with another shape if one is asked for: its memory is given up, its disk stays.

use super::super::driver::PauseOrder;
use super::super::error::MachineError;
use super::Fleet;
use serde_json::json;
use torpor_api::http::ResumeFrom;
use torpor_api::{ErrorCode, MachineId};

/// What changes of a machine's shape; nothing by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reshape {
    /// Number of vCPUs.
    pub vcpus: Option<u8>,
    /// Guest memory in MiB.
    pub mem_mib: Option<u32>,
    /// Size of the disk in MiB; only ever larger.
    pub disk_mib: Option<u32>,
}

impl Fleet {
    /// Boot the machine from its disk, whatever it is doing now; answered when its guest answers. A running guest's
    /// file systems are brought to rest first, as for a pause.
    ///
    /// Not to be dropped half way.
    ///
    /// # Errors
    /// Those of a pause and of a boot; a machine whose boot fails is stopped.
    pub async fn reboot(&self, id: &MachineId, change: Reshape) -> Result<(), MachineError> {
        match self.pause(id, PauseOrder::by("api")).await {
            Ok(()) => {}
            // It is off already.
            Err(error) if error.code == ErrorCode::MachineNotReady => {}
            Err(error) => return Err(error),
        }
        if change != Reshape::default() {
            let detail =
                json!({ "vcpus": change.vcpus, "mem_mib": change.mem_mib, "disk_mib": change.disk_mib });
            let event = self.event(id, "machine.reshaped", "api", detail);
            self.shared.store.reshape(id.clone(), change, event).await?;
        }
        self.resume(id, ResumeFrom::Disk).await
    }
}
