//! The pool of network slots: which numbers are free, which slots are ready, which are lent out.
//!
//! One background task keeps [`NetConfig::spares`] slots ready. A slot that comes back is deleted, not reused;
//! its number is free once that is done. No lock is held across an await. Slots that are being made or deleted
//! are owned by tasks that finish whether or not anybody still waits, so no number is ever lost.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore, oneshot};
use torpor_api::http::Slots;

use super::links::Links;
use super::slot::{self, Slot, on_own_thread};
use super::{NetConfig, NetError, connect, rules};
use crate::machine::hypervisor::ConnectError;

/// Slots that are made or deleted at the same time.
const PARALLEL: usize = 4;
/// Longest wait for the guest's kernel to answer a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long the refill rests after a failure, so that a broken host is not hammered.
const REFILL_REST: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct State {
    free: BTreeSet<u16>,
    spares: Vec<Slot>,
    /// Slots on their way to `spares` or `free`.
    in_motion: usize,
    /// Starts under way; while there is a spare left, the refill takes no CPU from them.
    held: usize,
    closing: bool,
}

struct Shared {
    config: NetConfig,
    state: Mutex<State>,
    /// A number or a spare has become available, or something has stopped moving.
    changed: Notify,
    /// A spare was taken.
    wanted: Notify,
    permits: Semaphore,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn create(self: &Arc<Self>, number: u16) -> Result<Slot, NetError> {
        let shared = self.clone();
        let _permit = self.permits.acquire().await;
        on_own_thread(number, move || slot::create(&shared.config, number)).await
    }

    async fn remove(self: &Arc<Self>, number: u16) -> Result<(), NetError> {
        let shared = self.clone();
        let _permit = self.permits.acquire().await;
        on_own_thread(number, move || slot::remove(&shared.config, number)).await
    }

    /// Delete a slot in the background; its number is free after that.
    fn scrub(self: &Arc<Self>, number: u16, tap: Option<OwnedFd>) {
        self.state().in_motion += 1;
        let shared = self.clone();
        tokio::spawn(async move {
            // Closing the last descriptor of a tap takes milliseconds, and nothing may wait for it.
            let closed = tokio::task::spawn_blocking(move || drop(tap)).await;
            debug_assert!(closed.is_ok(), "closing a tap panicked");
            if let Err(error) = shared.remove(number).await {
                // The next creation under this number removes what is left, or fails and says so.
                tracing::warn!(error = crate::execution::chain(&error), "slot not removed");
            }
            shared.settle(|state| {
                state.free.insert(number);
            });
        });
    }

    /// A slot that was being made is there, and nobody waits for it: a spare, unless the pool is closing.
    fn arrived(self: &Arc<Self>, slot: Slot) {
        if self.state().closing {
            self.scrub(slot.number, slot.tap);
            self.settle(|_| {});
        } else {
            self.settle(|state| state.spares.push(slot));
        }
    }

    /// Something that was in motion has come to rest.
    fn settle(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        state.in_motion -= 1;
        change(&mut state);
        drop(state);
        self.changed.notify_waiters();
        self.wanted.notify_one();
    }
}

/// All slots of this host. Dropping it ends the refill and leaves the slots as they are.
pub struct SlotPool {
    shared: Arc<Shared>,
    refill: tokio::task::AbortHandle,
}

impl Drop for SlotPool {
    fn drop(&mut self) {
        self.refill.abort();
    }
}

/// See [`SlotPool::hold_refill`].
pub struct RefillHold(Arc<Shared>);

impl Drop for RefillHold {
    fn drop(&mut self) {
        self.0.state().held -= 1;
        self.0.wanted.notify_one();
    }
}

enum Next {
    Ready(Slot),
    Make(u16),
    Wait,
}

impl SlotPool {
    /// Set the host up, remove every slot that is not `in_use`, and begin to fill the pool.
    ///
    /// # Errors
    /// The host takes no rules, or does not forward.
    pub async fn start(config: NetConfig, in_use: &BTreeSet<u16>) -> Result<Self, NetError> {
        let (host, kept) = (config.clone(), in_use.clone());
        on_own_thread(0, move || set_up_host(&host, &kept)).await?;
        let free = (0..config.max_slots).filter(|number| !in_use.contains(number));
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                free: free.collect(),
                ..State::default()
            }),
            config,
            changed: Notify::new(),
            wanted: Notify::new(),
            permits: Semaphore::new(PARALLEL),
        });
        let refill = tokio::spawn(refill(shared.clone())).abort_handle();
        Ok(Self { shared, refill })
    }

    /// A slot for one execution: a ready one, else a new one. Waits only for slots that are being deleted when
    /// there are no others.
    ///
    /// # Errors
    /// [`NetError::Exhausted`] when every slot carries a machine; else a slot could not be made.
    pub async fn acquire(&self) -> Result<SlotLease, NetError> {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.next()? {
                Next::Ready(slot) => {
                    self.shared.wanted.notify_one();
                    return Ok(self.lease(slot));
                }
                Next::Make(number) => return Ok(self.lease(self.make(number).await?)),
                Next::Wait => changed.await,
            }
        }
    }

    /// Keep the refill from competing with a start, for as long as there are spares and this lives.
    #[must_use]
    pub fn hold_refill(&self) -> RefillHold {
        self.shared.state().held += 1;
        RefillHold(self.shared.clone())
    }

    /// The slot of a machine that runs already; its number was `in_use` at the start.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn adopt(&self, number: u16) -> Result<SlotLease, NetError> {
        Ok(self.lease(slot::adopt(&self.shared.config, number)?))
    }

    /// Give back a number that was `in_use` at the start and carries nothing.
    pub fn discard(&self, number: u16) {
        self.shared.scrub(number, None);
    }

    /// Number of slots that are ready to be taken.
    #[must_use]
    pub fn spares(&self) -> usize {
        self.shared.state().spares.len()
    }

    /// How many there are; of those that are lent out, `parked` are of machines that sleep.
    #[must_use]
    pub fn counts(&self, parked: u64) -> Slots {
        let state = self.shared.state();
        Slots {
            ready: state.spares.len() as u64,
            wanted: self.shared.config.spares as u64,
            parked,
            free: state.free.len() as u64,
            most: self.shared.config.max_slots.into(),
        }
    }

    /// Wait until the pool is full and nothing moves.
    pub async fn settled(&self) {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = self.shared.state();
                let full =
                    state.closing || state.free.is_empty() || state.spares.len() >= self.shared.config.spares;
                if state.in_motion == 0 && full {
                    return;
                }
            }
            changed.await;
        }
    }

    /// Delete every slot that is not lent out, and wait for those that are being deleted.
    pub async fn close(&self) {
        let spares = {
            let mut state = self.shared.state();
            state.closing = true;
            std::mem::take(&mut state.spares)
        };
        for slot in spares {
            self.shared.scrub(slot.number, slot.tap);
        }
        self.settled().await;
    }

    fn next(&self) -> Result<Next, NetError> {
        let mut state = self.shared.state();
        if let Some(slot) = state.spares.pop() {
            return Ok(Next::Ready(slot));
        }
        if let Some(number) = state.free.pop_first() {
            state.in_motion += 1;
            return Ok(Next::Make(number));
        }
        if state.in_motion > 0 {
            return Ok(Next::Wait);
        }
        Err(NetError::Exhausted {
            max_slots: self.shared.config.max_slots,
        })
    }

    /// Make a slot whose number is in motion. One that nobody waits for any more becomes a spare.
    async fn make(&self, number: u16) -> Result<Slot, NetError> {
        let (done, made) = oneshot::channel();
        let shared = self.shared.clone();
        tokio::spawn(async move {
            match shared.create(number).await {
                Ok(slot) => match done.send(Ok(slot)) {
                    Err(Ok(unwanted)) => shared.arrived(unwanted),
                    _ => shared.settle(|_| {}),
                },
                Err(error) => {
                    shared.settle(|state| {
                        state.free.insert(number);
                    });
                    let _ = done.send(Err(error));
                }
            }
        });
        made.await.map_err(|_| NetError::Lost { number })?
    }

    fn lease(&self, slot: Slot) -> SlotLease {
        SlotLease {
            number: slot.number,
            netns: slot.netns,
            tap: Mutex::new(slot.tap),
            shared: self.shared.clone(),
            kept: AtomicBool::new(false),
        }
    }
}

/// A slot that carries one execution, or waits parked for a machine's next one. Until [`SlotLease::keep`],
/// dropping it gives the slot back.
pub struct SlotLease {
    number: u16,
    netns: Arc<File>,
    /// Absent in an adopted slot, whose VMM has the only one, and after a release.
    tap: Mutex<Option<OwnedFd>>,
    shared: Arc<Shared>,
    kept: AtomicBool,
}

impl Drop for SlotLease {
    fn drop(&mut self) {
        if !*self.kept.get_mut() {
            let tap = self.tap().take();
            self.shared.scrub(self.number, tap);
        }
    }
}

impl SlotLease {
    /// The slot's number.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.number
    }

    /// A machine runs in it: the slot outlives this value, and torpord, until [`SlotLease::release`].
    pub fn keep(&self) {
        self.kept.store(true, Ordering::Release);
    }

    /// No machine runs in it: dropping the last holder of this value gives the slot back.
    pub fn unkeep(&self) {
        self.kept.store(false, Ordering::Release);
    }

    /// Give a kept slot back to be deleted, though others may still hold the lease for a connect under way.
    pub fn release(&self) {
        if self.kept.load(Ordering::Acquire) {
            let tap = self.tap().take();
            self.shared.scrub(self.number, tap);
        }
    }

    /// Bytes that went through the slot's uplink both ways, which is what the guest and the world outside exchanged:
    /// the proxy's connections are made inside the slot.
    #[must_use]
    pub fn uplink_bytes(&self) -> u64 {
        let statistics = format!("/sys/class/net/{}/statistics", super::uplink_name(self.number));
        let read = |name: &str| {
            let text = std::fs::read_to_string(format!("{statistics}/{name}")).ok()?;
            text.trim().parse::<u64>().ok()
        };
        let both = [read("rx_bytes"), read("tx_bytes")];
        both.into_iter().flatten().fold(0, u64::saturating_add)
    }

    /// Another descriptor of the tap, for a VMM. The slot's own keeps the tap when that VMM is gone.
    #[must_use]
    pub fn tap_for_vmm(&self) -> Option<OwnedFd> {
        self.tap().as_ref().and_then(|tap| tap.try_clone().ok())
    }

    /// Whether the slot can carry another execution of the same machine.
    #[must_use]
    pub fn has_tap(&self) -> bool {
        self.tap().is_some()
    }

    fn tap(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.tap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection to a port of the guest, made inside the slot.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(&self, port: u16) -> Result<TcpStream, ConnectError> {
        let attempt = connect::connect(self.netns.clone(), port);
        match tokio::time::timeout(CONNECT_DEADLINE, attempt).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Err(ConnectError::Refused { port })
            }
            Ok(Err(error)) => Err(ConnectError::Unreachable {
                port,
                message: error.to_string(),
            }),
            Err(_) => Err(ConnectError::TimedOut { port }),
        }
    }
}

async fn refill(shared: Arc<Shared>) {
    loop {
        let number = {
            let mut state = shared.state();
            let full = state.closing || state.spares.len() >= shared.config.spares;
            let held = state.held > 0 && !state.spares.is_empty();
            let number = if full || held {
                None
            } else {
                state.free.pop_first()
            };
            state.in_motion += usize::from(number.is_some());
            number
        };
        let Some(number) = number else {
            shared.wanted.notified().await;
            continue;
        };
        // In a task of its own, so that ending the refill loses no number.
        let worker = shared.clone();
        let made = tokio::spawn(async move {
            let made = worker.create(number).await;
            let ok = made.is_ok();
            match made {
                Ok(slot) => worker.arrived(slot),
                Err(error) => {
                    tracing::warn!(error = crate::execution::chain(&error), "no spare slot made");
                    worker.settle(|state| {
                        state.free.insert(number);
                    });
                }
            }
            ok
        });
        if !made.await.unwrap_or(false) {
            tokio::time::sleep(REFILL_REST).await;
        }
    }
}

fn set_up_host(config: &NetConfig, in_use: &BTreeSet<u16>) -> Result<(), NetError> {
    let host = |operation| move |source| NetError::Host { operation, source };
    std::fs::create_dir_all(&config.netns_dir).map_err(host("make the directory of namespaces"))?;
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(host("turn forwarding on"))?;
    rules::apply("the host", &rules::host_rules())?;
    let links = slot::runtime(0)?.block_on(async {
        let links = Links::open().map_err(host("open rtnetlink"))?;
        links.names().await.map_err(|source| NetError::Netlink {
            number: 0,
            operation: "list links",
            source: Box::new(source),
        })
    })?;
    let entries = std::fs::read_dir(&config.netns_dir).map_err(host("list namespaces"))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let by_netns = names.filter_map(|name| name.strip_prefix("torpor-")?.parse().ok());
    let by_link = links
        .iter()
        .filter_map(|name| name.strip_prefix(rules::UPLINK_NAME_PREFIX)?.parse().ok());
    let known: BTreeSet<u16> = by_netns.chain(by_link).collect();
    for number in known.difference(in_use) {
        slot::remove(config, *number)?;
    }
    Ok(())
}
