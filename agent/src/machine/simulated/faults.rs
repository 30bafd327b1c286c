//! Faults by point: the next call that reaches a point is held there, fails there or loses its VMM there.

use super::super::hypervisor::HypervisorError;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Semaphore;
use torpor_api::ErrorCode;

/// Where a fault can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Point {
    /// Before a booted guest answers.
    Boot,
    /// Before an image is read.
    Restore,
    /// Before the vCPUs are stopped.
    Freeze,
    /// While the image is being written.
    Persist,
    /// After the image is durable, before that is answered.
    Persisted,
    /// Before a guest is set free.
    Run,
    /// Before a VMM is ended.
    Quit,
    /// Before files are removed.
    DeleteFiles,
    /// Before a snapshot's files are put in place.
    StageSnapshot,
    /// Before a snapshot is made durable.
    CommitSnapshot,
    /// Before a snapshot is removed.
    DeleteSnapshot,
    /// Before a machine's files are made from a snapshot.
    CloneSnapshot,
}

/// What happens there.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The call fails with this code.
    Fail(ErrorCode),
    /// The VMM dies.
    Die,
    /// The call waits.
    Wait(Hold),
}

/// Holds one call; the test sees it arrive and lets it go.
#[derive(Debug, Clone)]
pub struct Hold {
    arrived: Arc<Semaphore>,
    released: Arc<Semaphore>,
}

impl Default for Hold {
    fn default() -> Self {
        Self {
            arrived: Arc::new(Semaphore::new(0)),
            released: Arc::new(Semaphore::new(0)),
        }
    }
}

impl Hold {
    /// Wait until a call is held.
    pub async fn arrived(&self) {
        if let Ok(permit) = self.arrived.acquire().await {
            permit.forget();
        }
    }

    /// Let it go.
    pub fn release(&self) {
        self.released.add_permits(1);
    }

    async fn pass(&self) {
        self.arrived.add_permits(1);
        if let Ok(permit) = self.released.acquire().await {
            permit.forget();
        }
    }
}

/// The faults that are still to come.
#[derive(Debug, Default)]
pub struct Faults(Mutex<HashMap<Point, VecDeque<Fault>>>);

impl Faults {
    /// The next call that reaches `point` and finds no earlier fault there gets this one.
    pub fn at(&self, point: Point, fault: Fault) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(point)
            .or_default()
            .push_back(fault);
    }

    /// The next call that reaches `point` is held there.
    #[must_use]
    pub fn hold(&self, point: Point) -> Hold {
        let hold = Hold::default();
        self.at(point, Fault::Wait(hold.clone()));
        hold
    }

    /// Number of faults that nobody has met yet.
    #[must_use]
    pub fn n_left(&self) -> usize {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(VecDeque::len)
            .sum()
    }

    /// Forget them.
    pub fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    pub(super) fn take(&self, point: Point) -> Option<Fault> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_mut(&point)?
            .pop_front()
    }

    /// For calls without a VMM that could die.
    pub(super) async fn reach(&self, point: Point) -> Result<(), HypervisorError> {
        match self.take(point) {
            None => Ok(()),
            Some(Fault::Wait(hold)) => {
                hold.pass().await;
                Ok(())
            }
            Some(Fault::Fail(code)) => Err(HypervisorError::new(code, format!("injected at {point:?}"))),
            Some(Fault::Die) => Err(HypervisorError::new(
                ErrorCode::ResumeFailed,
                format!("the VMM died at {point:?}"),
            )),
        }
    }

    /// For calls of an execution; `true` if its VMM dies here.
    pub(super) async fn reach_alive(&self, point: Point) -> Result<bool, HypervisorError> {
        match self.take(point) {
            Some(Fault::Die) => Ok(true),
            None => Ok(false),
            Some(Fault::Wait(hold)) => {
                hold.pass().await;
                Ok(false)
            }
            Some(Fault::Fail(code)) => Err(HypervisorError::new(code, format!("injected at {point:?}"))),
        }
    }
}
