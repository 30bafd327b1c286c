//! `GET /v1/machines/{id}/metrics`: what the guest uses now. Does not wake; nobody asleep uses anything.

use super::super::error::Failure;
use super::super::extract::Named;
use super::time::iso;
use crate::machine::fleet::{Fleet, WakeSource};
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use torpor_api::ErrorCode;
use utoipa::ToSchema;

/// Nothing that the SDK does not know may be in it.
#[derive(Serialize, ToSchema)]
pub(super) struct Metrics {
    timestamp: String,
    cpu_percent: f64,
    cpu_count: u32,
    mem_used_bytes: u64,
    mem_total_bytes: u64,
    disk_used_bytes: u64,
    disk_total_bytes: u64,
    network_rx_bytes: u64,
    network_tx_bytes: u64,
}

fn percent(busy_us: u64, interval_us: u64) -> f64 {
    // Tenths are all that anybody reads.
    let tenths = busy_us.saturating_mul(1000).checked_div(interval_us).unwrap_or(0);
    f64::from(u32::try_from(tenths).unwrap_or(u32::MAX)) / 10.0
}

pub(super) async fn show(
    State(fleet): State<Fleet>,
    Named(id): Named,
) -> Result<Json<Vec<Metrics>>, Failure> {
    let metrics = match fleet.inside(id, WakeSource::Api).metrics().await {
        Ok(metrics) => metrics,
        Err(error) if error.code == ErrorCode::MachineNotReady => return Ok(Json(Vec::new())),
        Err(error) => return Err(error.into()),
    };
    Ok(Json(vec![Metrics {
        timestamp: iso(fleet.now_unix_ms()),
        cpu_percent: percent(metrics.interval_busy_us, metrics.interval_us),
        cpu_count: metrics.cpus,
        mem_used_bytes: metrics.mem_used_bytes,
        mem_total_bytes: metrics.mem_total_bytes,
        disk_used_bytes: metrics.disk_used_bytes,
        disk_total_bytes: metrics.disk_total_bytes,
        network_rx_bytes: metrics.net_rx_bytes,
        network_tx_bytes: metrics.net_tx_bytes,
    }]))
}
