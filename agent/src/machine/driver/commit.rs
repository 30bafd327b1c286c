//! What a driver commits: transitions, their events, and failures.
//!
//! A commit that the store refuses never changes what the machine does: it is tried again as long as there is
//! a driver, and the newest one counts.

use super::super::error::MachineError;
use super::super::state::{Committed, Event};
use super::operation::Outcome;
use super::{Driver, PauseOrder};
use crate::store::{LeaseChange, NewEvent, StoreError, Transition};
use serde_json::json;
use std::time::Duration;
use torpor_api::http::LastError;

/// What traffic woke answers before the wake is committed, if it does so within this time: the commit and what it sets off
/// would compete with the guest for processor and disk.
const FIRST_ANSWER: Duration = Duration::from_millis(250);

impl Driver {
    pub(super) async fn commit_running(&mut self, event: Option<Event>) {
        let Some(epoch) = self.epoch.clone() else {
            return;
        };
        let is_woken = matches!(event, Some(Event::Restored | Event::Ran)) && self.failure.is_none();
        if is_woken && self.wake.first_port().is_some() && !self.waiters.need_commit() {
            let _ = tokio::time::timeout(FIRST_ANSWER, epoch.answered()).await;
        }
        if event == Some(Event::Restored)
            && let Some(report) = &self.report
        {
            self.shared.telemetry.woken(report);
        }
        let execution = epoch.execution.id().clone();
        let failure = self.failure.clone();
        // A lease that could not be carried out keeps its deadline; the timer comes back to it.
        let (kind, lease) = match event {
            Some(Event::Booted) => ("machine.started", LeaseChange::Restart),
            Some(Event::Restored) => ("machine.woken", LeaseChange::Restart),
            Some(_) if failure.is_some() => ("machine.pause_failed", LeaseChange::KeepOrStart),
            Some(_) if self.wake.actor != "recovery" => ("machine.pause_cancelled", LeaseChange::Restart),
            Some(_) | None => ("machine.adopted", LeaseChange::KeepOrStart),
        };
        let actor = if failure.is_some() {
            self.pause.actor
        } else {
            self.wake.actor
        };
        let mut transition = self.transition(Committed::Running, actor);
        transition.execution = Some(execution);
        transition.lease = lease;
        transition.counts_wake = event == Some(Event::Restored);
        let detail = match &failure {
            Some(error) => json!({ "code": error.code, "message": error.message }),
            None => {
                json!({
                    "cause": self.wake.cause,
                    "stages": self.report.as_ref().map(|report| report.to_json()),
                    "previous_execution_id": self.row.last_execution,
                })
            }
        };
        transition.last_error = failure.map(|error| self.last_error(&error));
        self.commit(transition, kind, detail).await;
    }

    pub(super) fn pause_transition(&mut self) -> Transition {
        let mut transition = self.transition(Committed::Paused, self.pause.actor);
        transition.only_if_deadline_unix_ms = self.pause.only_if_deadline_unix_ms;
        transition.image_generation = self.persisted.map(|stats| stats.generation);
        transition.counts_pause = true;
        let detail = json!({
            "quiesce_us": self.freeze.quiesce_us,
            "freeze_us": self.freeze.freeze_us,
            "persist": self.persisted,
        });
        transition.event = Some(self.event(&transition, "machine.paused", detail));
        transition
    }

    /// The VMM went away, and the image on disk is what is left.
    pub(super) async fn commit_found_image(&mut self) {
        let mut transition = self.transition(Committed::Paused, "recovery");
        transition.image_generation = Some(self.image_found);
        transition.end_reason = "lost";
        let kind = match &self.failure {
            Some(error) => {
                transition.last_error = Some(self.last_error(error));
                "machine.memory_rolled_back"
            }
            None if self
                .persisted
                .is_some_and(|stats| stats.generation == self.image_found) =>
            {
                transition.counts_pause = true;
                "machine.paused"
            }
            None => "machine.memory_rolled_back",
        };
        let detail = json!({ "image_generation": self.image_found, "error": self.failure.as_ref().map(|e| &e.message) });
        self.commit(transition, kind, detail).await;
    }

    pub(super) async fn commit_refused(&mut self) {
        let mut transition = self.transition(Committed::Refused, self.wake.actor);
        transition.last_error = self.failure.as_ref().map(|error| self.last_error(error));
        let detail = json!({ "error": self.failure.as_ref().map(|error| &error.message) });
        self.commit(transition, "machine.image_refused", detail).await;
    }

    pub(super) async fn commit_stopped(&mut self, event: Option<Event>) {
        let (kind, reason, actor) = match event {
            Some(Event::ShutDown) => ("machine.stopped", "shutdown", "guest"),
            Some(Event::BootFailed) => ("machine.boot_failed", "boot_failed", self.wake.actor),
            Some(_) | None => ("machine.memory_lost", "lost", "recovery"),
        };
        let mut transition = self.transition(Committed::Stopped, actor);
        transition.end_reason = reason;
        transition.last_error = self.failure.as_ref().map(|error| self.last_error(error));
        let detail = json!({ "reason": reason, "error": self.failure.as_ref().map(|error| &error.message) });
        self.commit(transition, kind, detail).await;
    }

    pub(super) async fn commit_before_boot(&mut self, event: Option<Event>) {
        let rebooted = event == Some(Event::Rebooted);
        let (kind, reason) = if rebooted {
            ("machine.rebooted", "reboot")
        } else {
            ("machine.memory_given_up", "given_up")
        };
        let mut transition = self.transition(Committed::Stopped, self.wake.actor);
        transition.end_reason = reason;
        self.commit(transition, kind, json!({ "cause": self.wake.cause }))
            .await;
    }

    /// Commit that the deletion begins, so that a restart finishes it.
    ///
    /// A store that takes nothing, for want of space say, must not keep a machine from going: its files are what
    /// takes the space. Only a lease that was moved meanwhile does.
    pub(super) async fn commit_deleting(&mut self, order: PauseOrder) -> Result<(), MachineError> {
        if order.only_if_deadline_unix_ms.is_none() && order.only_if_expired_at_unix_ms.is_none() {
            self.put_aside_commit();
        }
        self.await_overtaken().await;
        self.uncommitted = None;
        self.pause = order;
        let mut transition = self.transition(Committed::Deleting, order.actor);
        transition.only_if_deadline_unix_ms = order.only_if_deadline_unix_ms;
        transition.only_if_expired_at_unix_ms = order.only_if_expired_at_unix_ms;
        let last_used_unix_ms = self.row.last_used_unix_ms;
        match self.shared.store.commit(self.id.clone(), transition).await {
            Ok(row) => {
                self.row = row;
                // A deletion is no use; why it happened is told by the last one.
                self.row.last_used_unix_ms = last_used_unix_ms;
                Ok(())
            }
            Err(error @ StoreError::LeaseMoved { .. }) => Err(error.into()),
            Err(error) => {
                tracing::warn!(machine_id = %self.id, %error, "deletion goes on uncommitted");
                Ok(())
            }
        }
    }

    pub(super) async fn record_failure(&mut self, kind: &'static str) {
        let Some(error) = self.failure.clone() else { return };
        let last_error = self.last_error(&error);
        self.remember(Some(last_error.clone()));
        self.row.last_error = Some(last_error.clone());
        let event = NewEvent {
            at_unix_ms: last_error.at_unix_ms,
            machine: self.id.clone(),
            execution: None,
            kind,
            actor: self.wake.actor,
            detail: json!({ "code": error.code, "message": error.message, "cause": self.wake.cause }),
        };
        if let Err(error) = self
            .shared
            .store
            .record_failure(self.id.clone(), last_error, event)
            .await
        {
            tracing::warn!(machine_id = %self.id, %error, "failure not recorded");
        }
    }

    pub(super) async fn retry_commit(&mut self) {
        if let Some(transition) = self.uncommitted.take() {
            self.store(transition).await;
        }
        self.settle_and_go_on().await;
    }

    /// Wait for a commit that was overtaken, so that the next one builds on it.
    pub(super) async fn await_overtaken(&mut self) {
        let Some(operation) = self.overtaken.take() else {
            return;
        };
        if let Outcome::PauseCommitted(committed) = operation.future.await
            && let Ok(row) = *committed
        {
            self.row = row;
        }
    }

    pub(super) fn remember(&self, last_error: Option<LastError>) {
        self.live.send_if_modified(|live| {
            live.last_error = last_error;
            true
        });
    }

    async fn commit(&mut self, mut transition: Transition, kind: &'static str, detail: serde_json::Value) {
        transition.event = Some(self.event(&transition, kind, detail));
        self.remember(transition.last_error.clone());
        self.store(transition).await;
    }

    async fn store(&mut self, mut transition: Transition) {
        self.await_overtaken().await;
        transition.generation = self.row.generation;
        self.uncommitted = None;
        match self
            .shared
            .store
            .commit(self.id.clone(), transition.clone())
            .await
        {
            Ok(row) => {
                self.row = row;
                self.shared.leases_changed.notify_one();
                self.shared.retention_changed.notify_one();
            }
            Err(error) => {
                tracing::error!(machine_id = %self.id, %error, to = transition.to.as_str(), "not committed yet");
                self.uncommitted = Some(transition);
            }
        }
    }

    fn transition(&self, to: Committed, actor: &'static str) -> Transition {
        Transition::new(self.row.generation, to, actor, self.shared.clock.now_unix_ms())
    }

    fn event(&self, transition: &Transition, kind: &'static str, detail: serde_json::Value) -> NewEvent {
        NewEvent {
            at_unix_ms: transition.at_unix_ms,
            machine: self.id.clone(),
            execution: transition
                .execution
                .clone()
                .or_else(|| self.row.execution.clone()),
            kind,
            actor: transition.actor,
            detail,
        }
    }

    fn last_error(&self, error: &MachineError) -> LastError {
        LastError {
            code: error.code,
            message: error.message.clone(),
            at_unix_ms: self.shared.clock.now_unix_ms(),
        }
    }
}
