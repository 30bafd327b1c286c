//! The way into a running machine, shut while it pauses.
//!
//! Owns which execution requests may use right now, and how many use it. Entering takes one short lock and
//! no task switch, so a request to a running machine costs nothing of the lifecycle. The driver is the only one
//! that opens and shuts; [`Gate::drain`] shuts in the same instant in which it finds nobody inside, so no
//! request is caught in a freeze unless it outlasts the driver's patience.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use torpor_api::activity::{ActivityPolicy, ActivitySource};
use torpor_api::vmm::ExitReason;
use torpor_proxy::Activity;

use super::hypervisor::Execution;

/// The gate of one machine.
#[derive(Default)]
pub struct Gate {
    open: Mutex<Option<Arc<Epoch>>>,
    activity: Arc<Activity>,
    seen_unix_ms: [AtomicU64; ActivitySource::ALL.len()],
    awake_since_unix_ms: AtomicU64,
    at_work: Arc<AtomicUsize>,
}

/// One execution's time behind the gate.
pub struct Epoch {
    /// The execution.
    pub execution: Arc<dyn Execution>,
    /// Cancelled when the execution is over.
    pub over: CancellationToken,
    exited: watch::Receiver<Option<ExitReason>>,
    inside: AtomicUsize,
    left: Notify,
    answered: Notify,
    was_answered: AtomicBool,
}

impl Epoch {
    /// The time of this execution, with nobody inside yet.
    #[must_use]
    pub fn of(execution: Arc<dyn Execution>) -> Arc<Self> {
        Arc::new(Self {
            exited: execution.exited(),
            execution,
            over: CancellationToken::new(),
            inside: AtomicUsize::new(0),
            left: Notify::new(),
            answered: Notify::new(),
            was_answered: AtomicBool::new(false),
        })
    }

    /// The first response byte of a request that woke the machine is out; `true` for the first of them.
    pub fn tell_answered(&self) -> bool {
        self.answered.notify_one();
        !self.was_answered.swap(true, Ordering::AcqRel)
    }

    /// Wait for that, or for the execution's end.
    pub async fn answered(&self) {
        tokio::select! {
            () = self.answered.notified() => {}
            () = self.over.cancelled() => {}
        }
    }
}

/// A command runs in the guest on somebody's behalf, until this is dropped.
pub struct AtWork(Arc<AtomicUsize>);

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Somebody is inside, until this is dropped.
pub struct Pass(Arc<Epoch>);

impl Pass {
    /// The execution that the holder may use.
    #[must_use]
    pub fn epoch(&self) -> &Arc<Epoch> {
        &self.0
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.0.inside.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.left.notify_waiters();
        }
    }
}

impl Gate {
    /// Let requests in to this execution.
    pub fn open(&self, epoch: &Arc<Epoch>, now_unix_ms: u64) {
        self.awake_since_unix_ms.store(now_unix_ms, Ordering::Release);
        *self.lock() = Some(Arc::clone(epoch));
    }

    /// Let nobody in any more.
    pub fn shut(&self) {
        self.lock().take();
    }

    /// Go in, if the gate is open.
    #[must_use]
    pub fn enter(&self, source: ActivitySource, now_unix_ms: u64) -> Option<Pass> {
        let pass = self.enter_quietly()?;
        self.touch(source, now_unix_ms);
        Some(pass)
    }

    /// Go in without counting as activity, if the gate is open.
    #[must_use]
    pub fn enter_quietly(&self) -> Option<Pass> {
        let open = self.lock();
        // The driver may not have heard yet; it will before it hears of whoever is turned away here.
        let epoch = open.as_ref().filter(|epoch| epoch.exited.borrow().is_none())?;
        epoch.inside.fetch_add(1, Ordering::AcqRel);
        Some(Pass(Arc::clone(epoch)))
    }

    /// Wait until nobody is inside, and shut in that instant.
    pub async fn drain(&self) {
        loop {
            let epoch = {
                let mut open = self.lock();
                match open.as_ref() {
                    Some(epoch) if epoch.inside.load(Ordering::Acquire) > 0 => Arc::clone(epoch),
                    Some(_) | None => {
                        open.take();
                        return;
                    }
                }
            };
            let left = epoch.left.notified();
            if epoch.inside.load(Ordering::Acquire) > 0 {
                left.await;
            }
        }
    }

    /// Activity from this source was seen.
    pub fn touch(&self, source: ActivitySource, now_unix_ms: u64) {
        self.seen(source).fetch_max(now_unix_ms, Ordering::AcqRel);
    }

    /// Count now as the last use by every source: what was before torpord started is not known.
    pub fn touch_all(&self, now_unix_ms: u64) {
        for source in ActivitySource::ALL {
            self.touch(source, now_unix_ms);
        }
    }

    /// When activity from this source was last seen, in Unix time in milliseconds; 0 if never.
    #[must_use]
    pub fn last_seen_unix_ms(&self, source: ActivitySource) -> u64 {
        self.seen(source).load(Ordering::Acquire)
    }

    /// When the machine was last used, by what this policy counts; 0 if never.
    #[must_use]
    pub fn last_used_unix_ms(&self, policy: &ActivityPolicy) -> u64 {
        let counted = ActivitySource::ALL
            .into_iter()
            .filter(|source| policy.counts(*source));
        counted
            .map(|source| self.last_seen_unix_ms(source))
            .max()
            .unwrap_or(0)
    }

    /// Since when the machine is awake.
    #[must_use]
    pub fn awake_since_unix_ms(&self) -> u64 {
        self.awake_since_unix_ms.load(Ordering::Acquire)
    }

    fn seen(&self, source: ActivitySource) -> &AtomicU64 {
        let [proxy, sessions, outbound, cpu] = &self.seen_unix_ms;
        match source {
            ActivitySource::Proxy => proxy,
            ActivitySource::Sessions => sessions,
            ActivitySource::Outbound => outbound,
            ActivitySource::Cpu => cpu,
        }
    }

    /// Where payload bytes of this machine are counted.
    #[must_use]
    pub fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// Count a command in the guest as activity until the value is dropped.
    #[must_use]
    pub fn at_work(&self) -> AtWork {
        self.at_work.fetch_add(1, Ordering::AcqRel);
        AtWork(Arc::clone(&self.at_work))
    }

    /// Whether a command runs in the guest on somebody's behalf.
    #[must_use]
    pub fn is_at_work(&self) -> bool {
        self.at_work.load(Ordering::Acquire) > 0
    }

    /// Nobody is inside, and no command runs in the guest on somebody's behalf.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let is_empty = |epoch: &Arc<Epoch>| epoch.inside.load(Ordering::Acquire) == 0;
        self.lock().as_ref().is_some_and(is_empty) && !self.is_at_work()
    }

    /// The execution that requests may use, if any.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Epoch>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Epoch>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
