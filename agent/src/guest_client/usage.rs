//! What the guest uses, and what keeps it awake.

use torpor_api::guest::{GuestRequest, GuestResponse, HoldState};

use super::{GuestClient, GuestClientError, unexpected};

/// What the guest uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestMetrics {
    /// Busy share of all CPUs since boot, in microseconds of CPU time.
    pub cpu_busy_us: u64,
    /// Number of CPUs.
    pub cpus: u32,
    /// Length of the interval since the question before, in microseconds.
    pub interval_us: u64,
    /// Busy share of all CPUs in that interval, in microseconds of CPU time.
    pub interval_busy_us: u64,
    /// Memory in use, in bytes.
    pub mem_used_bytes: u64,
    /// Memory in all, in bytes.
    pub mem_total_bytes: u64,
    /// Root file system in use, in bytes.
    pub disk_used_bytes: u64,
    /// Root file system in all, in bytes.
    pub disk_total_bytes: u64,
    /// Received since boot, in bytes.
    pub net_rx_bytes: u64,
    /// Sent since boot, in bytes.
    pub net_tx_bytes: u64,
}

impl GuestClient {
    /// Usage figures.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn metrics(&self) -> Result<GuestMetrics, GuestClientError> {
        match self.call("metrics", &GuestRequest::Metrics).await? {
            GuestResponse::Metrics {
                cpu_busy_us,
                mem_used_bytes,
                mem_total_bytes,
                disk_used_bytes,
                disk_total_bytes,
                cpus,
                interval_us,
                interval_busy_us,
                net_rx_bytes,
                net_tx_bytes,
            } => Ok(GuestMetrics {
                cpu_busy_us,
                cpus,
                interval_us,
                interval_busy_us,
                mem_used_bytes,
                mem_total_bytes,
                disk_used_bytes,
                disk_total_bytes,
                net_rx_bytes,
                net_tx_bytes,
            }),
            other => Err(unexpected("metrics", &other)),
        }
    }

    /// Who in the guest asks for it to stay awake.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn hold(&self) -> Result<Option<HoldState>, GuestClientError> {
        match self.call("hold", &GuestRequest::HoldState).await? {
            GuestResponse::Held { hold } => Ok(hold),
            other => Err(unexpected("hold", &other)),
        }
    }
}
