//! `/v1/machines/{id}/processes` and `…/metrics`: what runs in a machine and what it uses. Lists and figures do not
//! wake.

use super::answer::NoContent;
use super::describe::{Description, Taken};
use super::error::Failure;
use super::extract::{Json as Body, Named, OptionalJson, Path, Query};
use crate::inside::Inside;
use crate::machine::fleet::{Fleet, WakeSource};
use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use serde::Deserialize;
use serde_json::json;
use torpor_api::guest::WindowSize;
use torpor_api::http::{KillProcess, Logs, Metrics, ProcessList, WriteStdin};
use utoipa::{IntoParams, PartialSchema};

/// The process that `{pid}` names.
pub(super) struct Pid(pub(super) u32);

impl FromRequestParts<Fleet> for Pid {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, fleet: &Fleet) -> Result<Self, Failure> {
        let Path(names) = Path::<Vec<(String, String)>>::from_request_parts(parts, fleet).await?;
        let text = names
            .into_iter()
            .find(|(key, _)| key == "pid")
            .map(|(_, text)| text);
        let pid = text.and_then(|text| text.parse().ok());
        pid.map(Self)
            .ok_or_else(|| Failure::invalid("the PID is no number"))
    }
}

impl Taken for Pid {
    fn describe(into: &mut Description) {
        into.in_path = vec![json!(String::schema()), json!(u32::schema())];
    }
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct From {
    #[serde(default)]
    after: u64,
}

pub(super) fn inside(fleet: &Fleet, Named(id): Named) -> Inside {
    fleet.inside(id, WakeSource::Api)
}

pub(super) async fn list(State(fleet): State<Fleet>, id: Named) -> Result<Json<ProcessList>, Failure> {
    let processes = inside(&fleet, id).processes().await?;
    Ok(Json(ProcessList { processes }))
}

pub(super) async fn logs(
    State(fleet): State<Fleet>,
    id: Named,
    Pid(pid): Pid,
    Query(from): Query<From>,
) -> Result<Json<Logs>, Failure> {
    let logs = inside(&fleet, id).logs(pid, from.after).await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Json(Logs {
        stdout: text(&logs.stdout),
        stderr: text(&logs.stderr),
        output: text(&logs.output),
        begin: logs.begin,
        end: logs.end,
        exit_code: logs.exit_code,
        timed_out: logs.timed_out,
    }))
}

pub(super) async fn stdin(
    State(fleet): State<Fleet>,
    id: Named,
    Pid(pid): Pid,
    Body(write): Body<WriteStdin>,
) -> Result<NoContent, Failure> {
    let inside = inside(&fleet, id);
    inside
        .write_stdin(pid, write.data.as_bytes(), write.close)
        .await?;
    Ok(NoContent)
}

pub(super) async fn kill(
    State(fleet): State<Fleet>,
    id: Named,
    Pid(pid): Pid,
    OptionalJson(kill): OptionalJson<KillProcess>,
) -> Result<NoContent, Failure> {
    inside(&fleet, id).kill(pid, kill.signal).await?;
    Ok(NoContent)
}

pub(super) async fn resize(
    State(fleet): State<Fleet>,
    id: Named,
    Pid(pid): Pid,
    Body(size): Body<WindowSize>,
) -> Result<NoContent, Failure> {
    inside(&fleet, id).resize(pid, size).await?;
    Ok(NoContent)
}

pub(super) async fn metrics(State(fleet): State<Fleet>, id: Named) -> Result<Json<Metrics>, Failure> {
    let used = inside(&fleet, id).metrics().await?;
    Ok(Json(Metrics {
        at_unix_ms: fleet.now_unix_ms(),
        cpu_percent: percent(
            used.interval_busy_us,
            used.interval_us.saturating_mul(u64::from(used.cpus)),
        ),
        cpus: used.cpus,
        cpu_busy_us: used.cpu_busy_us,
        mem_used_bytes: used.mem_used_bytes,
        mem_total_bytes: used.mem_total_bytes,
        disk_used_bytes: used.disk_used_bytes,
        disk_total_bytes: used.disk_total_bytes,
        net_rx_bytes: used.net_rx_bytes,
        net_tx_bytes: used.net_tx_bytes,
    }))
}

/// Ticks are counted a little late, so that a share may come out above the whole.
fn percent(part: u64, whole: u64) -> f64 {
    let permyriad = part.saturating_mul(10_000) / whole.max(1);
    f64::from(u16::try_from(permyriad.min(10_000)).unwrap_or(10_000)) / 100.0
}
