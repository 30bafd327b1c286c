//! What this torpord has counted and timed since it started, for Prometheus.
//!
//! The events table tells of each wake and pause; this tells of all of them, at the price of a few atomic additions each.
//! Names and units follow <https://prometheus.io/docs/practices/naming/>, the text is `OpenMetrics` 1.0.

use super::driver::WakeReport;
use super::error::MachineError;
use super::fleet::{Fleet, status_counts};
use super::hypervisor::{FreezeTrace, WokenFrom};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::collections::BTreeMap;
use std::time::Duration;
use torpor_api::ErrorCode;
use torpor_api::http::Pools;
use torpor_api::vmm::{Counters, PersistStats};

/// Upper bounds in seconds: from the floor of a wake to the default patience of whoever waits for one.
const WAKE_BOUNDS: [f64; 14] = [
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0,
];
/// For what is a part of a wake, or a freeze.
const STEP_BOUNDS: [f64; 12] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

/// One label of a family.
macro_rules! label {
    ($name:ident, $field:ident) => {
        #[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
        struct $name {
            $field: &'static str,
        }
    };
}
label!(Origin, from);
label!(Stage, stage);
label!(Code, code);
label!(Kind, kind);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Status {
    status: String,
}

type Timed<L> = Family<L, Histogram, fn() -> Histogram>;

fn wakes() -> Histogram {
    Histogram::new(WAKE_BOUNDS)
}

fn steps() -> Histogram {
    Histogram::new(STEP_BOUNDS)
}

/// Counters and histograms of one torpord.
pub struct Telemetry {
    registry: Registry,
    woken: Timed<Origin>,
    stages: Timed<Stage>,
    first_bytes: Timed<Origin>,
    page_faults: Family<Kind, Counter>,
    failed_wakes: Family<Code, Counter>,
    freezes: Histogram,
    durable: Histogram,
    written_bytes: Counter,
    failed_pauses: Family<Code, Counter>,
}

impl Default for Telemetry {
    fn default() -> Self {
        let mut all = Self {
            registry: Registry::with_prefix("torpor"),
            woken: Family::new_with_constructor(wakes),
            stages: Family::new_with_constructor(steps),
            first_bytes: Family::new_with_constructor(wakes),
            page_faults: Family::default(),
            failed_wakes: Family::default(),
            freezes: steps(),
            durable: wakes(),
            written_bytes: Counter::default(),
            failed_pauses: Family::default(),
        };
        all.register();
        all
    }
}

impl Telemetry {
    fn register(&mut self) {
        let registry = &mut self.registry;
        let seconds = || Unit::Seconds;
        let help = "From the first wish for the machine to its guest running with clock and entropy set";
        registry.register_with_unit("wake", help, seconds(), self.woken.clone());
        let help = "Parts of that, named as in the Server-Timing header";
        registry.register_with_unit("wake_stage", help, seconds(), self.stages.clone());
        let help =
            "From a request's arrival to the first byte of its answer, of requests that woke a machine";
        registry.register_with_unit("wake_first_byte", help, seconds(), self.first_bytes.clone());
        let help = "Page faults of guests between their wake and the first byte";
        registry.register("wake_page_faults", help, self.page_faults.clone());
        let help = "Wakes that failed, by error code";
        registry.register("wake_failures", help, self.failed_wakes.clone());
        let help = "How long a guest stood still for its pause";
        registry.register_with_unit("freeze", help, seconds(), self.freezes.clone());
        let help = "From the end of the freeze to memory durable on disk, of pauses";
        registry.register_with_unit("pause_durable", help, seconds(), self.durable.clone());
        let help = "Written to memory images by pauses, and ahead of them";
        registry.register_with_unit("image_written", help, Unit::Bytes, self.written_bytes.clone());
        let help = "Pauses that failed, by error code; the machine ran on";
        registry.register("pause_failures", help, self.failed_pauses.clone());
    }

    /// A machine was restored.
    pub(super) fn woken(&self, report: &WakeReport) {
        let took = report.decided + report.running;
        if let Some(from) = report.woken_from() {
            self.woken
                .get_or_create(&Origin::of(from))
                .observe(took.as_secs_f64());
        }
        for (stage, took) in report.stages() {
            self.stages
                .get_or_create(&Stage { stage })
                .observe(took.as_secs_f64());
        }
    }

    fn first_byte(&self, from: WokenFrom, took: Duration, counters: Option<&Counters>) {
        self.first_bytes
            .get_or_create(&Origin::of(from))
            .observe(took.as_secs_f64());
        let Some(counters) = counters else { return };
        for (kind, n_faults) in [
            ("uffd", counters.uffd_faults_first_byte),
            ("mapped", counters.mapped_faults_first_byte),
        ] {
            self.page_faults.get_or_create(&Kind { kind }).inc_by(n_faults);
        }
    }

    pub(super) fn wake_failed(&self, code: ErrorCode) {
        let code = code.as_str();
        self.failed_wakes.get_or_create(&Code { code }).inc();
    }

    pub(super) fn paused(&self, freeze: &FreezeTrace, persisted: Option<&PersistStats>) {
        self.freezes
            .observe(Duration::from_micros(freeze.freeze_us).as_secs_f64());
        if let Some(stats) = persisted {
            self.durable
                .observe(Duration::from_micros(stats.durable_us).as_secs_f64());
            self.written_bytes
                .inc_by(stats.written_bytes + stats.pre_copied_bytes);
        }
    }

    pub(super) fn pause_failed(&self, code: ErrorCode) {
        let code = code.as_str();
        self.failed_pauses.get_or_create(&Code { code }).inc();
    }
}

impl Origin {
    fn of(woken_from: WokenFrom) -> Self {
        Self {
            from: woken_from.as_str(),
        }
    }
}

impl Fleet {
    /// A request that woke its machine is being answered, so long after its arrival. The counters come with one request of each
    /// wake, unless the VMM went away meanwhile.
    pub fn count_first_byte(&self, from: WokenFrom, took: Duration, counters: Option<&Counters>) {
        self.shared.telemetry.first_byte(from, took, counters);
    }

    /// All of it as text, with what there is right now.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn telemetry(&self) -> Result<String, MachineError> {
        let now = now(status_counts(self).await?, &self.shared.hypervisor.pools());
        let mut text = String::new();
        let encoded = text::encode_registry(&mut text, &self.shared.telemetry.registry)
            .and_then(|()| text::encode_registry(&mut text, &now))
            .and_then(|()| text::encode_eof(&mut text));
        encoded.map_err(|error| MachineError::new(ErrorCode::Internal, error.to_string()))?;
        Ok(text)
    }
}

fn now(machines: BTreeMap<String, u64>, pools: &Pools) -> Registry {
    let mut registry = Registry::with_prefix("torpor");
    let by_status: Family<Status, Gauge> = Family::default();
    for (status, n) in machines {
        by_status.get_or_create(&Status { status }).set(signed(n));
    }
    registry.register("machines", "Machines, by status", by_status);
    let mut kinds = |name: &str, help: &str, counts: &[(&'static str, u64)]| {
        let family: Family<Kind, Gauge> = Family::default();
        for (kind, n) in counts {
            family.get_or_create(&Kind { kind }).set(signed(*n));
        }
        registry.register(name, help, family);
    };
    let blanks = pools.blank_vmms.iter();
    let (ready, wanted) = blanks.fold((0, 0), |(ready, wanted), shape| {
        (ready + shape.ready, wanted + shape.wanted)
    });
    kinds(
        "blank_vmms",
        "Prepared VMMs of all shapes, and how many there should be",
        &[("ready", ready), ("wanted", wanted)],
    );
    let slots = &pools.slots;
    kinds(
        "network_slots",
        "Network slots",
        &[
            ("ready", slots.ready),
            ("parked", slots.parked),
            ("free", slots.free),
        ],
    );
    let sleepers = &pools.sleepers;
    kinds(
        "sleepers",
        "Machines that sleep and keep their VMM",
        &[("resident", sleepers.resident), ("dozing", sleepers.dozing)],
    );
    registry
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
