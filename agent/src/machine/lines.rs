//! Connections that clients keep open to machines, awake or asleep.
//!
//! An entry lives as long as a connection to the machine does, with or without a driver. Its token says whether the
//! guest's end of those connections still exists: a pause that keeps the network slot keeps it, whatever loses the
//! guest's memory cancels it. Sockets are known by a descriptor of their own, only to ask what is unacknowledged.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use torpor_api::MachineId;

/// The kernel tells nobody that a peer acknowledged, so it is asked, ever less often: 127 ms in all.
const SETTLE_WAITS_MS: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];

/// The open connections of one machine.
#[derive(Default)]
pub struct Lines {
    over: CancellationToken,
    sockets: Mutex<Sockets>,
}

#[derive(Default)]
struct Sockets {
    next: u64,
    open: HashMap<u64, OwnedFd>,
}

impl Lines {
    /// Cancelled when the guest's end of the connections is gone.
    #[must_use]
    pub fn over(&self) -> &CancellationToken {
        &self.over
    }

    /// No connection is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sockets().open.is_empty()
    }

    /// Wait a little until the guest has all that was sent to it: what it has not when it freezes comes late.
    pub async fn settle(&self) {
        for wait_ms in SETTLE_WAITS_MS {
            if !self.is_unacknowledged() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        }
    }

    fn is_unacknowledged(&self) -> bool {
        let sockets = self.sockets();
        let waits = |fd: &OwnedFd| crate::net::unacknowledged_bytes(fd.as_fd()).is_ok_and(|left| left > 0);
        sockets.open.values().any(waits)
    }

    fn sockets(&self) -> MutexGuard<'_, Sockets> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The open connections of all machines.
#[derive(Default)]
pub struct LineBook {
    machines: Mutex<HashMap<MachineId, Arc<Lines>>>,
}

/// One open connection; its drop closes it here.
pub struct OpenLine {
    book: Arc<LineBook>,
    machine: MachineId,
    lines: Arc<Lines>,
    key: u64,
    on_last: Box<dyn Fn() + Send + Sync>,
}

impl LineBook {
    /// Enter a connection; `on_last` runs when the machine's last one closes.
    pub fn open(
        self: &Arc<Self>,
        machine: &MachineId,
        socket: OwnedFd,
        on_last: impl Fn() + Send + Sync + 'static,
    ) -> OpenLine {
        let mut machines = self.machines();
        let lines = match machines.get(machine) {
            Some(lines) if !lines.over.is_cancelled() => Arc::clone(lines),
            Some(_) | None => {
                let lines = Arc::new(Lines::default());
                machines.insert(machine.clone(), Arc::clone(&lines));
                lines
            }
        };
        let key = {
            let mut sockets = lines.sockets();
            sockets.next += 1;
            let key = sockets.next;
            sockets.open.insert(key, socket);
            key
        };
        OpenLine {
            book: Arc::clone(self),
            machine: machine.clone(),
            lines,
            key,
            on_last: Box::new(on_last),
        }
    }

    /// The machine's connections, if any is open.
    #[must_use]
    pub fn of(&self, machine: &MachineId) -> Option<Arc<Lines>> {
        self.machines()
            .get(machine)
            .filter(|lines| !lines.over.is_cancelled())
            .cloned()
    }

    /// The guest's end of the machine's connections is gone.
    pub fn lose(&self, machine: &MachineId) {
        let lost = self.machines().remove(machine);
        if let Some(lines) = lost {
            lines.over.cancel();
        }
    }

    fn machines(&self) -> MutexGuard<'_, HashMap<MachineId, Arc<Lines>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenLine {
    /// The machine's connections, this one among them.
    #[must_use]
    pub fn lines(&self) -> &Arc<Lines> {
        &self.lines
    }
}

impl Drop for OpenLine {
    fn drop(&mut self) {
        let was_last = {
            let mut machines = self.book.machines();
            self.lines.sockets().open.remove(&self.key);
            let is_last = self.lines.is_empty();
            let is_known = machines
                .get(&self.machine)
                .is_some_and(|known| Arc::ptr_eq(known, &self.lines));
            if is_last && is_known {
                machines.remove(&self.machine);
            }
            is_last && is_known
        };
        if was_last {
            (self.on_last)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn socket() -> OwnedFd {
        std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into()
    }

    #[test]
    fn the_last_connection_says_so_and_a_lost_machine_begins_anew() {
        let (book, machine) = (Arc::new(LineBook::default()), MachineId::generate());
        let n_last = Arc::new(AtomicUsize::new(0));
        let open = || {
            let n_last = Arc::clone(&n_last);
            book.open(&machine, socket(), move || {
                n_last.fetch_add(1, Ordering::SeqCst);
            })
        };
        let (first, second) = (open(), open());
        assert!(Arc::ptr_eq(first.lines(), second.lines()));
        drop(first);
        assert_eq!(n_last.load(Ordering::SeqCst), 0);
        book.lose(&machine);
        assert!(second.lines().over().is_cancelled());
        let third = open();
        assert!(!third.lines().over().is_cancelled());
        drop(second);
        assert_eq!(
            n_last.load(Ordering::SeqCst),
            0,
            "those of a lost guest count for nothing"
        );
        drop(third);
        assert_eq!(n_last.load(Ordering::SeqCst), 1);
        assert!(book.of(&machine).is_none());
    }
}
