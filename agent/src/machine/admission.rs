//! Host memory of machines that run: who has how much, and who is next.
//!
//! Every boot and restore takes a [`Reservation`] first. Who does not fit waits in one line, first come, first served:
//! a small machine does not overtake a large one, or the large one would wait for ever. A machine that is found running
//! takes its memory whether or not it fits, because it has it already.
//!
//! Not its job: how long anybody waits ([`Patience`] is the caller's), and who is put to sleep to make room
//! ([`super::room`]).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;
use torpor_api::MachineId;

/// The memory of one host.
pub struct Admission {
    budget_mib: u64,
    books: Mutex<Books>,
    /// The line grew, or memory was given back.
    changed: Notify,
}

#[derive(Default)]
struct Books {
    taken_mib: u64,
    line: VecDeque<Waiting>,
    next_ticket: u64,
    /// Taken together with that of others, and not called for yet.
    ahead: HashMap<MachineId, Reservation>,
}

struct Waiting {
    ticket: u64,
    machines: Vec<MachineId>,
    mem_mib: u64,
    admitted: oneshot::Sender<()>,
}

/// The host will never have so much, or had not in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// More than the whole host may give.
    #[error("{mem_mib} MiB are more than the {budget_mib} MiB that machines of this host may use together")]
    TooLarge {
        /// Asked for.
        mem_mib: u64,
        /// The whole budget.
        budget_mib: u64,
    },
    /// Nobody gave enough back in time.
    #[error("the host had no {mem_mib} MiB of memory to give within the wait")]
    Full {
        /// Asked for.
        mem_mib: u64,
    },
}

/// Memory of the host, given back when this is dropped.
pub struct Reservation {
    admission: Arc<Admission>,
    mem_mib: u64,
}

impl Reservation {
    /// Whether it is exactly so much.
    #[must_use]
    pub fn is_of(&self, mem_mib: u32) -> bool {
        self.mem_mib == u64::from(mem_mib)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.admission.give_back(self.mem_mib);
    }
}

/// How long a boot or a restore may wait for memory; whoever joins the wait may prolong it.
#[derive(Clone)]
pub struct Patience(Arc<watch::Sender<Instant>>);

impl Patience {
    /// So long from now.
    #[must_use]
    pub fn of(wait: Duration) -> Self {
        Self(Arc::new(watch::Sender::new(Instant::now() + wait)))
    }

    /// Wait at least so long from now.
    pub fn prolong(&self, wait: Duration) {
        let until = Instant::now() + wait;
        self.0.send_modify(|end| *end = until.max(*end));
    }

    async fn end(&self) {
        loop {
            let end = *self.0.borrow();
            tokio::time::sleep_until(end).await;
            if *self.0.borrow() <= end {
                return;
            }
        }
    }
}

/// A place in the line; leaving it gives back what came meanwhile.
struct Place<'a> {
    admission: &'a Arc<Admission>,
    ticket: u64,
    mem_mib: u64,
    admitted: oneshot::Receiver<()>,
}

impl Place<'_> {
    /// The reservation, once the line has come to this place.
    async fn reached(mut self) -> Option<Reservation> {
        (&mut self.admitted).await.ok()?;
        let reservation = Reservation {
            admission: Arc::clone(self.admission),
            mem_mib: self.mem_mib,
        };
        // Nothing is left for the place to give back.
        self.mem_mib = 0;
        Some(reservation)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.mem_mib > 0 {
            self.admission.leave(self.ticket, self.mem_mib);
        }
    }
}

impl Admission {
    /// A host with so much memory for machines.
    #[must_use]
    pub fn new(budget_mib: u32) -> Arc<Self> {
        Arc::new(Self {
            budget_mib: budget_mib.into(),
            books: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Memory for a machine that is about to run; what was reserved ahead for it comes first.
    ///
    /// # Errors
    /// It can never be had, or was not within the caller's patience.
    pub async fn reserve(
        self: &Arc<Self>,
        machine: &MachineId,
        mem_mib: u32,
        patience: &Patience,
    ) -> Result<Reservation, NotAdmitted> {
        let ahead = self.books().ahead.remove(machine);
        match ahead {
            Some(reservation) if reservation.is_of(mem_mib) => Ok(reservation),
            Some(_) | None => self.wait(vec![machine.clone()], mem_mib.into(), patience).await,
        }
    }

    /// Memory for machines that come together or not at all; each calls for its own with [`Admission::reserve`].
    ///
    /// # Errors
    /// Likewise.
    pub async fn reserve_ahead(
        self: &Arc<Self>,
        machines: &[MachineId],
        mem_mib_each: u32,
        patience: &Patience,
    ) -> Result<Ahead, NotAdmitted> {
        let n_machines = u64::try_from(machines.len()).unwrap_or(u64::MAX);
        let mem_mib = n_machines.saturating_mul(mem_mib_each.into());
        let mut whole = self.wait(machines.to_vec(), mem_mib, patience).await?;
        let mut books = self.books();
        for machine in machines {
            whole.mem_mib -= u64::from(mem_mib_each);
            let part = Reservation {
                admission: Arc::clone(self),
                mem_mib: mem_mib_each.into(),
            };
            books.ahead.insert(machine.clone(), part);
        }
        drop(books);
        Ok(Ahead {
            admission: Arc::clone(self),
            machines: machines.to_vec(),
        })
    }

    /// Memory that a machine has already.
    #[must_use]
    pub fn take(self: &Arc<Self>, mem_mib: u32) -> Reservation {
        self.books().taken_mib += u64::from(mem_mib);
        Reservation {
            admission: Arc::clone(self),
            mem_mib: mem_mib.into(),
        }
    }

    /// Whether so much can ever be had.
    ///
    /// # Errors
    /// [`NotAdmitted::TooLarge`].
    pub fn check(&self, mem_mib: u64) -> Result<(), NotAdmitted> {
        if mem_mib > self.budget_mib {
            return Err(NotAdmitted::TooLarge {
                mem_mib,
                budget_mib: self.budget_mib,
            });
        }
        Ok(())
    }

    /// Whether this machine waits for memory.
    #[must_use]
    pub fn is_waiting(&self, machine: &MachineId) -> bool {
        let books = self.books();
        books
            .line
            .iter()
            .any(|waiting| waiting.machines.contains(machine))
    }

    /// What the first in line lacks in MiB; 0 if nobody waits.
    #[must_use]
    pub fn shortfall_mib(&self) -> u64 {
        let books = self.books();
        let free = self.budget_mib.saturating_sub(books.taken_mib);
        books
            .line
            .front()
            .map_or(0, |first| first.mem_mib.saturating_sub(free))
    }

    /// Wait until the line grows or memory is given back.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    async fn wait(
        self: &Arc<Self>,
        machines: Vec<MachineId>,
        mem_mib: u64,
        patience: &Patience,
    ) -> Result<Reservation, NotAdmitted> {
        self.check(mem_mib)?;
        let place = self.line_up(machines, mem_mib);
        tokio::select! {
            biased;
            reservation = place.reached() => reservation.ok_or(NotAdmitted::Full { mem_mib }),
            () = patience.end() => Err(NotAdmitted::Full { mem_mib }),
        }
    }

    fn line_up(self: &Arc<Self>, machines: Vec<MachineId>, mem_mib: u64) -> Place<'_> {
        let (admitted, tell) = oneshot::channel();
        let mut books = self.books();
        let ticket = books.next_ticket;
        books.next_ticket += 1;
        books.line.push_back(Waiting {
            ticket,
            machines,
            mem_mib,
            admitted,
        });
        self.admit_first(&mut books);
        drop(books);
        self.changed.notify_one();
        Place {
            admission: self,
            ticket,
            mem_mib,
            admitted: tell,
        }
    }

    /// Somebody gave up; what it was given meanwhile goes to the next.
    fn leave(&self, ticket: u64, mem_mib: u64) {
        let mut books = self.books();
        let before = books.line.len();
        books.line.retain(|waiting| waiting.ticket != ticket);
        if books.line.len() == before {
            books.taken_mib = books.taken_mib.saturating_sub(mem_mib);
        }
        self.admit_first(&mut books);
    }

    fn give_back(&self, mem_mib: u64) {
        let mut books = self.books();
        books.taken_mib = books.taken_mib.saturating_sub(mem_mib);
        self.admit_first(&mut books);
        drop(books);
        self.changed.notify_one();
    }

    /// Admit from the front for as long as the first one fits.
    fn admit_first(&self, books: &mut Books) {
        while let Some(first) = books.line.front() {
            let fits = books.taken_mib.saturating_add(first.mem_mib) <= self.budget_mib;
            if !fits {
                return;
            }
            if let Some(first) = books.line.pop_front() {
                books.taken_mib += first.mem_mib;
                // A place that is gone takes itself out of the line, so this one is there.
                let _ = first.admitted.send(());
            }
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory reserved ahead; what nobody called for is given back when this is dropped.
pub struct Ahead {
    admission: Arc<Admission>,
    machines: Vec<MachineId>,
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let left: Vec<Reservation> = {
            let mut books = self.admission.books();
            self.machines
                .iter()
                .filter_map(|machine| books.ahead.remove(machine))
                .collect()
        };
        // Each takes the books to give itself back.
        drop(left);
    }
}

#[cfg(test)]
mod tests;
