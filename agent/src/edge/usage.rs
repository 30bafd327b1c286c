//! What grants are used for: counted in memory on the way, written down now and then.
//!
//! A count that a crash takes away is at most as old as the last writing. Each counter hands out what is new since
//! it was last asked, so nothing is written twice.

use crate::store::GrantUsage;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use torpor_api::GrantId;
use torpor_proxy::Activity;

/// The counters of one grant.
#[derive(Default)]
struct Counter {
    first_unix_ms: AtomicU64,
    last_unix_ms: AtomicU64,
    http_requests: AtomicU64,
    websockets: AtomicU64,
    payload: Arc<Activity>,
    written: Mutex<GrantUsage>,
}

/// Counters of the grants that were used since torpord started, or since they were last idle.
#[derive(Default)]
pub(super) struct Usage {
    counters: Mutex<HashMap<GrantId, Arc<Counter>>>,
    used: Notify,
}

/// What a token was taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// A request that does not upgrade.
    Request,
    /// An upgrade.
    Upgrade,
}

impl Usage {
    /// Count a use; the payload that passes is counted where this says.
    pub(super) fn count(&self, grant: &GrantId, what: Use, now_unix_ms: u64) -> Arc<Activity> {
        let counter = {
            let mut counters = self.lock();
            match counters.get(grant) {
                Some(counter) => Arc::clone(counter),
                None => Arc::clone(counters.entry(grant.clone()).or_default()),
            }
        };
        // Only the first one finds a 0.
        let _ = counter
            .first_unix_ms
            .compare_exchange(0, now_unix_ms, Ordering::AcqRel, Ordering::Acquire);
        counter.last_unix_ms.fetch_max(now_unix_ms, Ordering::AcqRel);
        let uses = match what {
            Use::Request => &counter.http_requests,
            Use::Upgrade => &counter.websockets,
        };
        uses.fetch_add(1, Ordering::AcqRel);
        self.used.notify_one();
        Arc::clone(&counter.payload)
    }

    /// Wait until something may be there to be written.
    pub(super) async fn used(&self) {
        self.used.notified().await;
    }

    /// What is new since this was last asked. A counter that nobody holds and that has nothing new is forgotten.
    pub(super) fn take_new(&self) -> Vec<(GrantId, GrantUsage)> {
        let mut newly = Vec::new();
        self.lock().retain(|grant, counter| {
            let in_use = Arc::strong_count(&counter.payload) > 1;
            let new = counter.take_new();
            if new != GrantUsage::default() {
                newly.push((grant.clone(), new));
                return true;
            }
            in_use
        });
        newly
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<GrantId, Arc<Counter>>> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counter {
    fn take_new(&self) -> GrantUsage {
        let some = |at: u64| (at > 0).then_some(at);
        let now = GrantUsage {
            first_unix_ms: some(self.first_unix_ms.load(Ordering::Acquire)),
            last_unix_ms: some(self.last_unix_ms.load(Ordering::Acquire)),
            http_requests: self.http_requests.load(Ordering::Acquire),
            websockets: self.websockets.load(Ordering::Acquire),
            to_guest_bytes: self.payload.to_guest_bytes(),
            from_guest_bytes: self.payload.from_guest_bytes(),
        };
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if now == *written {
            return GrantUsage::default();
        }
        let new = GrantUsage {
            http_requests: now.http_requests.saturating_sub(written.http_requests),
            websockets: now.websockets.saturating_sub(written.websockets),
            to_guest_bytes: now.to_guest_bytes.saturating_sub(written.to_guest_bytes),
            from_guest_bytes: now.from_guest_bytes.saturating_sub(written.from_guest_bytes),
            ..now
        };
        *written = now;
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_use_is_told_once_and_an_idle_counter_is_forgotten() {
        let usage = Usage::default();
        let grant = GrantId::generate();
        drop(usage.count(&grant, Use::Request, 5));
        drop(usage.count(&grant, Use::Upgrade, 9));
        let [(id, new)] = usage.take_new().try_into().unwrap();
        assert_eq!((id, new.http_requests, new.websockets), (grant.clone(), 1, 1));
        assert_eq!((new.first_unix_ms, new.last_unix_ms), (Some(5), Some(9)));
        assert!(usage.take_new().is_empty());
        assert!(usage.lock().is_empty());
        let held = usage.count(&grant, Use::Request, 11);
        assert_eq!(usage.take_new()[0].1.http_requests, 1);
        assert!(usage.take_new().is_empty());
        assert_eq!(usage.lock().len(), 1, "its connection still counts");
        drop(held);
    }
}
