//! Wake filters, and how long wakes take.

use super::super::error::MachineError;
use super::Fleet;
use crate::edge::filter::{self, Asked};
use serde_json::json;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use torpor_api::http::{WakeAnswer, WakeFilter};
use torpor_api::{ErrorCode, MachineId};

const KEPT_WAKES: usize = 64;

/// Durations of this host's last wakes.
#[derive(Default)]
pub(in super::super) struct WakeTimes(Mutex<VecDeque<Duration>>);

impl WakeTimes {
    fn add(&self, took: Duration) {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if times.len() == KEPT_WAKES {
            times.pop_front();
        }
        times.push_back(took);
    }

    fn median(&self) -> Option<Duration> {
        let times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut times: Vec<Duration> = times.iter().copied().collect();
        times.sort_unstable();
        times.get(times.len() / 2).copied()
    }
}

impl Fleet {
    /// The machine's wake filter.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn wake_filter(&self, id: &MachineId) -> Result<WakeFilter, MachineError> {
        let found = self.shared.filters.of(&self.shared.store, id).await?;
        Ok(found.map(|filter| (*filter).clone()).unwrap_or_default())
    }

    /// Say which requests never wake the machine.
    ///
    /// # Errors
    /// A rule makes no sense, or the store refuses.
    pub async fn set_wake_filter(&self, id: &MachineId, filter: WakeFilter) -> Result<(), MachineError> {
        if let Some(flaw) = filter::flaw(&filter) {
            return Err(MachineError::new(ErrorCode::InvalidRequest, flaw));
        }
        let event = self.event(
            id,
            "machine.wake_filter_set",
            "api",
            json!({ "n_rules": filter.rules.len() }),
        );
        let shared = &self.shared;
        shared
            .store
            .set_wake_filter(id.clone(), filter.clone(), event)
            .await?;
        Ok(shared.filters.changed(&shared.store, id, filter).await?)
    }

    /// What a request is answered instead of waking the machine, if it sleeps and its filter says so.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn filtered(
        &self,
        id: &MachineId,
        asked: Asked<'_>,
    ) -> Result<Option<WakeAnswer>, MachineError> {
        let shared = &self.shared;
        let answer = shared.filters.answer(&shared.store, id, asked).await?;
        if answer.is_none() {
            return Ok(None);
        }
        let live = shared
            .registry
            .find(id)
            .and_then(|handle| handle.live.borrow().state);
        let sleeps = live.is_none_or(super::entry::is_asleep);
        Ok(answer.filter(|_| sleeps))
    }

    /// A wake took so long.
    pub fn count_wake(&self, took: Duration) {
        self.shared.wake_times.add(took);
    }

    /// How long a wake takes on this host, by the last ones.
    #[must_use]
    pub fn usual_wake(&self) -> Option<Duration> {
        self.shared.wake_times.median()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_wake_is_the_median_of_the_last_ones() {
        let times = WakeTimes::default();
        assert_eq!(times.median(), None);
        times.add(Duration::from_secs(100));
        for ms in 0..u64::try_from(KEPT_WAKES).unwrap() {
            times.add(Duration::from_millis(ms));
        }
        assert_eq!(times.median(), Some(Duration::from_millis(32)));
    }
}
