//! A device thread: an epoll loop that can be parked.
//!
//! Threads are made in the blank VMM and start parked. [`Worker::freeze`] sets the pause flag, which the devices
//! look at between two requests, rings the doorbell and waits for the acknowledgement: from then on the thread
//! touches neither guest memory nor any backend until [`Worker::thaw`]. What became ready in between is still
//! ready in the epoll set; virtqueues are looked at unasked, because a kick may have been taken before the pause.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags, EpollTimeout};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[cfg(test)]
mod tests;

/// The doorbell's token; the devices' are below.
const DOORBELL: u64 = u64::MAX;
const EVENTS_PER_WAIT: usize = 64;

/// What a thread does when something is ready.
pub(crate) trait Reactor: Send + 'static {
    /// The descriptor registered as `token` is ready.
    fn on_ready(&mut self, token: u64, flags: EpollFlags, pause: &AtomicBool);
    /// After a pause: look at every virtqueue.
    fn on_thaw(&mut self, pause: &AtomicBool);
}

enum Command {
    Freeze(SyncSender<()>),
    Thaw,
}

/// Handle of a device thread; ends it when dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    commands: Option<Sender<Command>>,
    doorbell: EventFd,
    pause: Arc<AtomicBool>,
    parked: bool,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a parked thread.
    pub(crate) fn spawn(name: &str, epoll: Arc<Epoll>, reactor: impl Reactor) -> io::Result<Self> {
        let doorbell = EventFd::new(EFD_NONBLOCK)?;
        epoll.add(
            doorbell_fd(&doorbell),
            EpollEvent::new(EpollFlags::EPOLLIN, DOORBELL),
        )?;
        let (commands, receiver) = mpsc::channel();
        let pause = Arc::new(AtomicBool::new(true));
        let turn = Loop {
            epoll,
            receiver,
            doorbell: doorbell.try_clone()?,
            pause: Arc::clone(&pause),
            reactor,
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || turn.run())?;
        Ok(Self {
            commands: Some(commands),
            doorbell,
            pause,
            parked: true,
            thread: Some(thread),
        })
    }

    /// Parks the thread; when this returns it is still.
    pub(crate) fn freeze(&mut self) {
        if self.parked {
            return;
        }
        self.pause.store(true, Ordering::Release);
        let (done, acknowledged) = mpsc::sync_channel(1);
        self.send(Command::Freeze(done));
        // An error means the thread is gone, which is as still as it gets.
        let _gone = acknowledged.recv();
        self.parked = true;
    }

    /// Lets it run.
    pub(crate) fn thaw(&mut self) {
        if self.parked {
            self.pause.store(false, Ordering::Release);
            self.send(Command::Thaw);
            self.parked = false;
        }
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands
            && commands.send(command).is_err()
        {
            tracing::error!("device thread is gone");
        }
        ring(&self.doorbell);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.pause.store(true, Ordering::Release);
        self.commands = None;
        ring(&self.doorbell);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("device thread panicked");
        }
    }
}

/// Writes an eventfd; a full counter is as good.
pub(crate) fn ring(event: &EventFd) {
    if let Err(error) = event.write(1) {
        tracing::debug!(%error, "eventfd is full");
    }
}

/// Empties an eventfd; empty is as good.
pub(crate) fn silence(event: &EventFd) {
    let _was_empty = event.read();
}

/// An eventfd as epoll wants it.
pub(crate) fn doorbell_fd(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    super::sys::borrow(event)
}

struct Loop<R> {
    epoll: Arc<Epoll>,
    receiver: Receiver<Command>,
    doorbell: EventFd,
    pause: Arc<AtomicBool>,
    reactor: R,
}

impl<R: Reactor> Loop<R> {
    fn run(mut self) {
        if self.park().is_none() {
            return;
        }
        let mut events = [EpollEvent::empty(); EVENTS_PER_WAIT];
        loop {
            let n_events = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(n_events) => n_events,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "cannot wait for devices");
                    return;
                }
            };
            for event in &events[..n_events] {
                if event.data() == DOORBELL {
                    if self.answer_doorbell().is_none() {
                        return;
                    }
                } else if !self.pause.load(Ordering::Acquire) {
                    self.reactor.on_ready(event.data(), event.events(), &self.pause);
                }
            }
        }
    }

    fn answer_doorbell(&mut self) -> Option<()> {
        silence(&self.doorbell);
        loop {
            match self.receiver.try_recv() {
                Ok(Command::Freeze(done)) => {
                    let _asker_gone = done.send(());
                    self.park()?;
                }
                Ok(Command::Thaw) => self.reactor.on_thaw(&self.pause),
                Err(mpsc::TryRecvError::Empty) => return Some(()),
                Err(mpsc::TryRecvError::Disconnected) => return None,
            }
        }
    }

    /// Waits for a thaw; `None` at the end.
    fn park(&mut self) -> Option<()> {
        loop {
            match self.receiver.recv() {
                Ok(Command::Thaw) => {
                    self.reactor.on_thaw(&self.pause);
                    return Some(());
                }
                Ok(Command::Freeze(done)) => {
                    let _asker_gone = done.send(());
                }
                Err(_) => return None,
            }
        }
    }
}
