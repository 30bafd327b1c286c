//! How often somebody may guess.
//!
//! One bucket of failures for every pair of client address and machine name: a guesser runs dry, while others
//! behind the same address still get in to their own machines. A credential is not even looked at while its
//! bucket is empty. Memory is bounded: the table is swept when full, and the fullest buckets are forgotten.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Failures in a row before anybody has to wait. An SSH client with many keys fails several times per login.
const BURST: u32 = 30;
/// One failure is forgotten in this time.
const REFILL: Duration = Duration::from_secs(2);
/// Most buckets.
const MAX_BUCKETS: usize = 4096;
/// Names are cut to this many bytes.
const MAX_NAME_BYTES: usize = 64;

type Key = (IpAddr, String);

struct Bucket {
    failures: u32,
    since: Instant,
}

/// All buckets.
#[derive(Default)]
pub(crate) struct Limiter(Mutex<HashMap<Key, Bucket>>);

impl Limiter {
    /// Whether somebody at this address may try to get into this machine now.
    pub(crate) fn allows(&self, address: IpAddr, machine: &str) -> bool {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match buckets.get_mut(&key(address, machine)) {
            Some(bucket) => {
                bucket.refill(Instant::now());
                bucket.failures < BURST
            }
            None => true,
        }
    }

    /// They tried, and failed.
    pub(crate) fn failed(&self, address: IpAddr, machine: &str) {
        let now = Instant::now();
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MAX_BUCKETS {
            sweep(&mut buckets, now);
        }
        let bucket = buckets.entry(key(address, machine)).or_insert(Bucket {
            failures: 0,
            since: now,
        });
        bucket.refill(now);
        bucket.failures = bucket.failures.saturating_add(1).min(BURST);
    }
}

impl Bucket {
    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.since);
        let forgotten = u32::try_from(elapsed.as_millis() / REFILL.as_millis()).unwrap_or(u32::MAX);
        self.failures = self.failures.saturating_sub(forgotten);
        if self.failures == 0 {
            self.since = now;
        } else {
            self.since += REFILL.saturating_mul(forgotten);
        }
    }
}

/// Forgets who has no failures any more; if that is nobody, those with the fewest.
fn sweep(buckets: &mut HashMap<Key, Bucket>, now: Instant) {
    buckets.retain(|_, bucket| {
        bucket.refill(now);
        bucket.failures > 0
    });
    let mut floor = 1;
    while buckets.len() >= MAX_BUCKETS {
        floor += 1;
        buckets.retain(|_, bucket| bucket.failures >= floor);
    }
}

fn key(address: IpAddr, machine: &str) -> Key {
    let mut end = machine.len().min(MAX_NAME_BYTES);
    while !machine.is_char_boundary(end) {
        end -= 1;
    }
    (address, machine.get(..end).unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const HOME: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[tokio::test(start_paused = true)]
    async fn a_guesser_runs_dry_and_recovers_with_time() {
        let limiter = Limiter::default();
        for _ in 0..BURST {
            assert!(limiter.allows(HOME, "web"));
            limiter.failed(HOME, "web");
        }
        assert!(!limiter.allows(HOME, "web"));
        tokio::time::advance(REFILL).await;
        assert!(limiter.allows(HOME, "web"));
        limiter.failed(HOME, "web");
        assert!(!limiter.allows(HOME, "web"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_guesser_locks_nobody_else_out() {
        let limiter = Limiter::default();
        for _ in 0..2 * BURST {
            limiter.failed(HOME, "web");
        }
        assert!(limiter.allows(HOME, "other"));
        assert!(limiter.allows(IpAddr::V4(Ipv4Addr::BROADCAST), "web"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_stays_bounded_whoever_knocks() {
        let limiter = Limiter::default();
        for n in 0..3 * MAX_BUCKETS {
            limiter.failed(HOME, &format!("machine-{n}"));
        }
        assert!(limiter.0.lock().unwrap().len() <= MAX_BUCKETS);
    }
}
