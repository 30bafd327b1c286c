//! Time, injected: the wall clock for deadlines that must survive a restart, and a way to wait for it.
//!
//! Leases are wall-clock times, because they are stored and shown. Durations of operations use
//! [`std::time::Instant`] and are not this module's.

use async_trait::async_trait;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Tells the time and waits for it.
#[async_trait]
pub trait Clock: Send + Sync + 'static {
    /// Unix time in milliseconds.
    fn now_unix_ms(&self) -> u64;
    /// Returns at that time or a little later.
    async fn sleep_until_unix_ms(&self, deadline_unix_ms: u64);
}

/// The host's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

/// A wall clock that is stepped forward must not delay a deadline by more than this.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

#[async_trait]
impl Clock for SystemClock {
    fn now_unix_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    async fn sleep_until_unix_ms(&self, deadline_unix_ms: u64) {
        loop {
            let left = Duration::from_millis(deadline_unix_ms.saturating_sub(self.now_unix_ms()));
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(LONGEST_SLEEP)).await;
        }
    }
}

/// A clock that stands still until it is moved.
#[derive(Debug)]
pub struct ManualClock {
    now_unix_ms: tokio::sync::watch::Sender<u64>,
    sleepers: std::sync::Mutex<Vec<u64>>,
    changed: tokio::sync::Notify,
}

impl ManualClock {
    /// A clock that shows this time.
    #[must_use]
    pub fn at(now_unix_ms: u64) -> Self {
        Self {
            now_unix_ms: tokio::sync::watch::Sender::new(now_unix_ms),
            sleepers: std::sync::Mutex::default(),
            changed: tokio::sync::Notify::new(),
        }
    }

    /// Move it forward.
    pub fn advance(&self, by: Duration) {
        let by_ms = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.now_unix_ms
            .send_modify(|now| *now = now.saturating_add(by_ms));
    }

    /// Wait until somebody sleeps until exactly this time.
    pub async fn sleeper_at(&self, deadline_unix_ms: u64) {
        loop {
            let changed = self.changed.notified();
            if self.lock().contains(&deadline_unix_ms) {
                return;
            }
            changed.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        self.sleepers
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn now_unix_ms(&self) -> u64 {
        *self.now_unix_ms.borrow()
    }

    async fn sleep_until_unix_ms(&self, deadline_unix_ms: u64) {
        struct Asleep<'a>(&'a ManualClock, u64);
        impl Drop for Asleep<'_> {
            fn drop(&mut self) {
                let mut sleepers = self.0.lock();
                if let Some(place) = sleepers.iter().position(|deadline| *deadline == self.1) {
                    sleepers.swap_remove(place);
                }
            }
        }
        self.lock().push(deadline_unix_ms);
        let _asleep = Asleep(self, deadline_unix_ms);
        self.changed.notify_waiters();
        let mut now = self.now_unix_ms.subscribe();
        // The sender is `self`, so the wait cannot fail.
        let _ = now.wait_for(|now| *now >= deadline_unix_ms).await;
    }
}
