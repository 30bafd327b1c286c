//! The proxy's way to machines: [`torpor_proxy::Waker`] over the [`Fleet`].
//!
//! Resolves the target, wakes within the bounded wait, connects inside the slot. A request to a machine that runs
//! passes its gate and nothing else. While a request holds its guard, a pause waits a little for it. An upgraded or TCP
//! connection gets a [`line::FleetLine`] instead, because an open connection is no activity.

mod admission;
mod line;

use self::line::FleetLine;
use crate::edge::filter::Asked;
use crate::machine::driver::{WakeReport, Woken};
use crate::machine::error::MachineError;
use crate::machine::fleet::{Fleet, WakeSource};
use crate::machine::gate::Epoch;
use crate::machine::hypervisor::ConnectError;
use crate::store::ServiceRoute;
use async_trait::async_trait;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use torpor_api::http::ServiceKind;
use torpor_api::{ErrorCode, MachineId};
use torpor_proxy::{
    Admission, Connected, FirstByteHook, Line, ListenError, OwnAnswer, Proxy, Shown, Target, Transport,
    Upstream, WakeRefusal, WakeRequest, WakeTrace, Waker,
};

/// The kernel gives up a connection after this; a value that is as large as it takes, 24 days.
const LONGEST_UNACKNOWLEDGED_MS: u32 = 2_073_600_000;

/// The fleet as the proxy sees it.
pub struct FleetWaker(pub Fleet);

#[async_trait]
impl Waker for FleetWaker {
    async fn admit(&self, request: &WakeRequest, shown: &Shown) -> Result<Admission, WakeRefusal> {
        let route = self.route(&request.target).await?;
        admission::admit(&self.0, &route, shown).await
    }

    async fn connect(&self, request: WakeRequest) -> Result<Connected, WakeRefusal> {
        let ServiceRoute {
            machine,
            port,
            wake_deadline_ms,
            ..
        } = self.route(&request.target).await?;
        self.filter(&request, &machine, port).await?;
        let source = match request.transport {
            Transport::Http | Transport::Upgrade => WakeSource::Http,
            Transport::Tcp => WakeSource::Tcp,
        };
        let cause = json!({
            "client": request.client,
            "port": port,
            "method": request.cause.method,
            "path": request.cause.path,
            "user_agent": request.cause.user_agent,
        });
        let bound = wake_deadline_ms.map_or(self.0.settings().wake_timeout, Duration::from_millis);
        let woken = self.0.wake_within(bound, &machine, source, cause).await;
        let woken = woken.map_err(|error| self.with_advice(refusal(error)))?;
        let awake_at = request.accepted_at.elapsed();
        let epoch = Arc::clone(woken.pass.epoch());
        let upstream = if request.held.as_ref() == Some(epoch.execution.id()) {
            Upstream::Held
        } else {
            Upstream::Fresh(connect(&machine, &epoch, port).await?)
        };
        let line = match (&upstream, request.transport) {
            (Upstream::Fresh(stream), Transport::Upgrade | Transport::Tcp) => {
                let from = (source, Some(request.client));
                Some(lasting(&self.0, (stream, &epoch), (&machine, port), from)?)
            }
            (Upstream::Fresh(_) | Upstream::Held, _) => None,
        };
        let mut connected = self.connected(&request, machine, woken, upstream, awake_at);
        connected.line = line;
        Ok(connected)
    }
}

impl FleetWaker {
    async fn route(&self, target: &Target) -> Result<ServiceRoute, WakeRefusal> {
        match target {
            Target::Service { listen_port } => self.0.routes().find(*listen_port).ok_or_else(|| {
                let message = format!("no service is exposed on port {listen_port}");
                WakeRefusal::new(ErrorCode::ServiceNotFound, message)
            }),
            Target::HostName { port, machine } => {
                let id = self.0.resolve(machine).await.map_err(refusal)?;
                // A host name reaches what is exposed, not whatever listens in the guest.
                self.0.routes().of(&id, *port).ok_or_else(|| {
                    let message = format!("machine {id} exposes no service on port {port}");
                    WakeRefusal::new(ErrorCode::ServiceNotFound, message)
                })
            }
        }
    }

    /// What the machine's filter answers, if it sleeps.
    async fn filter(&self, request: &WakeRequest, machine: &MachineId, port: u16) -> Result<(), WakeRefusal> {
        if request.transport == Transport::Tcp {
            return Ok(());
        }
        let asked = Asked {
            path: request.cause.path.as_deref().unwrap_or_default(),
            method: request.cause.method.as_deref().unwrap_or_default(),
            user_agent: request.cause.user_agent.as_deref().unwrap_or_default(),
            source: request.client.ip(),
            port,
        };
        let Some(answer) = self.0.filtered(machine, asked).await.map_err(refusal)? else {
            return Ok(());
        };
        let message = format!("machine {machine} sleeps, and its wake filter answers for it");
        let mut filtered = WakeRefusal::new(ErrorCode::AutoResumeDisabled, message);
        filtered.answer = Some(Box::new(OwnAnswer {
            status: answer.status,
            content_type: answer.content_type,
            body: answer.body,
        }));
        Err(filtered)
    }

    /// When to come again, by how long wakes take here. The seed document fixes it for a wake that was slow or
    /// failed, and for one that is not wanted.
    fn with_advice(&self, mut refusal: WakeRefusal) -> WakeRefusal {
        if matches!(
            refusal.code,
            ErrorCode::CapacityExceeded | ErrorCode::TransitionInProgress | ErrorCode::GuestUnreachable
        ) {
            refusal.retry_after = self.0.usual_wake();
        }
        refusal
    }

    fn connected(
        &self,
        request: &WakeRequest,
        machine: MachineId,
        woken: Woken,
        upstream: Upstream,
        awake_at: Duration,
    ) -> Connected {
        let Woken {
            pass,
            report,
            activity,
        } = woken;
        let epoch = Arc::clone(pass.epoch());
        if report.as_deref().is_some_and(|report| report.stages.is_some()) {
            self.0.count_wake(awake_at);
        }
        let trace = report
            .as_deref()
            .map(|report| trace(report, awake_at, request.accepted_at.elapsed()));
        let on_first_byte = report.map(|report| {
            let stages = trace.iter().flat_map(|trace: &WakeTrace| &trace.stages);
            let stages = stages
                .map(|(name, duration)| (format!("{name}_us"), micros(*duration).into()))
                .collect();
            report_first_byte(self.0.clone(), machine, Arc::clone(&epoch), (report, stages))
        });
        Connected {
            upstream,
            execution: epoch.execution.id().clone(),
            over: epoch.over.clone(),
            activity,
            guard: Some(Box::new(pass)),
            line: None,
            trace,
            on_first_byte,
        }
    }
}

/// Tell the VMM that its working set is complete, and write down what the request felt.
fn report_first_byte(
    fleet: Fleet,
    machine: MachineId,
    epoch: Arc<Epoch>,
    (report, stages): (Arc<WakeReport>, serde_json::Map<String, serde_json::Value>),
) -> FirstByteHook {
    Box::new(move |since_accepted| {
        let is_first = epoch.tell_answered();
        tokio::spawn(async move {
            epoch.execution.first_byte().await;
            let mut detail = json!({ "first_byte_us": micros(since_accepted), "stages": stages });
            let counters = epoch.execution.status().await.ok().map(|status| status.counters);
            if let Some(from) = report.woken_from() {
                // All who waited for one wake share its page faults.
                let of_wake = counters.as_ref().filter(|_| is_first);
                fleet.count_first_byte(from, since_accepted, of_wake);
            }
            if let Some(counters) = counters {
                detail["pages"] = json!({
                    "ahead": counters.pages_filled,
                    "mapped_faults": counters.mapped_faults_first_byte,
                    "uffd_faults": counters.uffd_faults_first_byte,
                });
            }
            fleet
                .record_first_byte(&machine, epoch.execution.id(), detail)
                .await;
        });
    })
}

/// Enter a connection that may outlast pauses. A pause that began meanwhile either finds it or has cut it off.
pub(crate) fn lasting(
    fleet: &Fleet,
    (stream, epoch): (&TcpStream, &Epoch),
    (machine, port): (&MachineId, u16),
    (source, client): (WakeSource, Option<SocketAddr>),
) -> Result<Arc<dyn Line>, WakeRefusal> {
    let unusable = |error: std::io::Error| {
        let message = format!("the connection to machine {machine} broke at once: {error}");
        WakeRefusal::new(ErrorCode::GuestUnreachable, message)
    };
    // A guest that sleeps acknowledges nothing, for as long as it sleeps.
    setsockopt(stream, sockopt::TcpUserTimeout, &LONGEST_UNACKNOWLEDGED_MS)
        .map_err(|errno| unusable(errno.into()))?;
    let socket = stream.as_fd().try_clone_to_owned().map_err(unusable)?;
    let open = fleet.open_line(machine, socket);
    if epoch.over.is_cancelled() {
        return Err(overtaken(machine));
    }
    Ok(Arc::new(FleetLine {
        fleet: fleet.clone(),
        machine: machine.clone(),
        port,
        source,
        client,
        open,
    }))
}

async fn connect(
    machine: &MachineId,
    epoch: &Epoch,
    port: u16,
) -> Result<tokio::net::TcpStream, WakeRefusal> {
    tokio::select! {
        stream = epoch.execution.connect(port) => stream.map_err(|error| match error {
            ConnectError::Refused { .. } | ConnectError::TimedOut { .. } => {
                let message = format!("nothing answers on port {port} of machine {machine}: {error}");
                WakeRefusal::new(ErrorCode::ServiceUnreachable, message)
            }
            ConnectError::Unreachable { .. } => WakeRefusal::new(ErrorCode::GuestUnreachable, error.to_string()),
        }),
        () = epoch.over.cancelled() => Err(overtaken(machine)),
    }
}

fn overtaken(machine: &MachineId) -> WakeRefusal {
    let message = format!("machine {machine} went to sleep or stopped before the connection was made");
    WakeRefusal::new(ErrorCode::ResumeFailed, message)
}

/// The wake's own stages, and what came after them.
fn trace(report: &WakeReport, awake_at: Duration, connected_at: Duration) -> WakeTrace {
    let mut stages = report.stages();
    stages.push(("wake", awake_at));
    stages.push(("connected", connected_at.saturating_sub(awake_at)));
    WakeTrace { stages }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn refusal(error: MachineError) -> WakeRefusal {
    WakeRefusal::new(error.code, error.message)
}

/// The proxy's ports, opened and closed as services come and go.
pub struct ProxyListeners(pub Arc<Proxy>);

#[async_trait]
impl crate::machine::routes::Listeners for ProxyListeners {
    fn open(&self, listen_port: u16, kind: ServiceKind) -> Result<(), MachineError> {
        self.0
            .expose(listen_port, kind)
            .map(drop)
            .map_err(|error: ListenError| {
                MachineError::new(ErrorCode::CapacityExceeded, crate::machine::error::chain(&error))
            })
    }

    async fn close(&self, listen_port: u16) {
        self.0.hide(listen_port).await;
    }
}

#[cfg(test)]
mod tests;
