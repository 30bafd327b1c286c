//! What a guest uses, and who in it asks for it to stay awake. Neither wakes it.

use super::{About, Inside, failed};
use crate::guest_client::usage::GuestMetrics;
use crate::machine::error::MachineError;
use torpor_api::guest::HoldState;

impl Inside {
    /// Usage figures; does not wake.
    ///
    /// # Errors
    /// `machine_not_ready` if the machine does not run, or `guest_unreachable`.
    pub async fn metrics(&self) -> Result<GuestMetrics, MachineError> {
        let presence = self.presence_if_awake().await?;
        let asked = async { presence.guest.metrics().await.map_err(failed(About::Process)) };
        presence.during(asked).await
    }

    /// The hold that guest code has on the machine; does not wake.
    ///
    /// # Errors
    /// `machine_not_ready` if the machine does not run, or `guest_unreachable`.
    pub async fn hold(&self) -> Result<Option<HoldState>, MachineError> {
        let presence = self.presence_if_awake().await?;
        let asked = async { presence.guest.hold().await.map_err(failed(About::Process)) };
        presence.during(asked).await
    }
}
