//! virtio-vsock: connections from host programs to ports of the guest.
//!
//! Runs on the I/O thread. A client connects to the unix socket and writes `CONNECT <port>\n`; when the guest
//! accepts it reads `OK <host port>\n` and then the guest's bytes. A client that comes before the guest's driver,
//! or before the guest has digested a restore, is held, not refused. The guest can't connect to the host.
//!
//! Invariants: at most [`MAX_CONNECTIONS`]; at most `BUF_ALLOC` bytes kept per connection; answers to the guest
//! are bounded by not reading its packets while [`MAX_CONTROL`] of them wait. Nothing is watched that nobody would
//! act on, so the thread never spins. Connections do not survive a restore: a guest that had any gets a transport reset,
//! and no connection is made before it has taken that in, because it would be torn down with the old ones.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use torpor_api::vmm::GUEST_CID;

use self::connection::{Connection, Greeting, Phase};
use self::packet::{Header, OP_CREDIT_UPDATE, OP_RST, OP_SHUTDOWN};
use super::mmio::{Model, VirtioDevice};
use super::sys;

mod connection;
mod packet;
mod rings;
#[cfg(test)]
mod tests;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// Most connections at a time; further clients wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 1024;
/// Most answers that wait for the guest's buffers before its packets are left unread.
const MAX_CONTROL: usize = 256;
/// Host ports begin here; below are those that mean something.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// How far the guest is with the transport reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ResetEvent {
    /// Connections may be made.
    None,
    /// The guest must be told, and has not given a buffer for it.
    Due,
    /// Told; it gives the buffer back once it has torn its connections down.
    Told { driver_index: u16 },
}

/// The vsock device.
#[derive(Debug)]
pub(crate) struct Vsock {
    epoll: Arc<Epoll>,
    listener: UnixListener,
    listener_token: u64,
    listening: bool,
    connections: HashMap<u64, Connection>,
    by_host_port: HashMap<u32, u64>,
    control: VecDeque<Header>,
    ready: VecDeque<u64>,
    held: VecDeque<u64>,
    reset_event: ResetEvent,
    next_token: u64,
    next_host_port: u32,
}

impl Vsock {
    /// Accepts on `listener`, which is registered as `listener_token`; connections get tokens above it.
    pub(crate) fn new(listener: UnixListener, epoll: Arc<Epoll>, listener_token: u64) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let mut vsock = Self {
            epoll,
            listener,
            listener_token,
            listening: false,
            connections: HashMap::new(),
            by_host_port: HashMap::new(),
            control: VecDeque::new(),
            ready: VecDeque::new(),
            held: VecDeque::new(),
            reset_event: ResetEvent::None,
            next_token: listener_token + 1,
            // Packets of the connections before a restore may still be in the rings: not their ports again.
            next_host_port: FIRST_HOST_PORT + sys::random_u32()? % FIRST_HOST_PORT,
        };
        vsock.watch_listener();
        Ok(vsock)
    }

    /// The guest comes from an image: its connections are gone.
    pub(crate) fn transport_reset(&mut self) {
        self.reset_event = ResetEvent::Due;
    }

    /// Whether the guest may know of a connection.
    pub(crate) fn has_connections(&self) -> bool {
        self.connections.values().any(Connection::is_known)
    }

    fn watch_listener(&mut self) {
        let wanted = self.connections.len() < MAX_CONNECTIONS;
        if wanted == self.listening {
            return;
        }
        let changed = if wanted {
            self.epoll.add(
                &self.listener,
                EpollEvent::new(EpollFlags::EPOLLIN, self.listener_token),
            )
        } else {
            self.epoll.delete(&self.listener)
        };
        match changed {
            Ok(()) => self.listening = wanted,
            Err(error) => tracing::error!(%error, "cannot watch the vsock listener"),
        }
    }

    fn accept(&mut self) {
        while self.connections.len() < MAX_CONNECTIONS {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = stream.set_nonblocking(true) {
                        tracing::warn!(%error, "cannot use a vsock client");
                        continue;
                    }
                    let token = self.next_token;
                    self.next_token += 1;
                    let host_port = self.free_host_port();
                    self.by_host_port.insert(host_port, token);
                    self.connections.insert(token, Connection::new(stream, host_port));
                    self.on_stream(token, EpollFlags::EPOLLIN);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a vsock client");
                    break;
                }
            }
        }
        self.watch_listener();
    }

    fn free_host_port(&mut self) -> u32 {
        loop {
            let port = self.next_host_port;
            self.next_host_port = FIRST_HOST_PORT + (port + 1) % FIRST_HOST_PORT;
            if !self.by_host_port.contains_key(&port) {
                return port;
            }
        }
    }

    /// A client's stream is ready.
    fn on_stream(&mut self, token: u64, flags: EpollFlags) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let hung_up = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        match connection.phase {
            Phase::Greeting => match connection.read_greeting() {
                Greeting::Partial => {}
                Greeting::Port(port) => {
                    connection.guest_port = port;
                    connection.phase = Phase::Held;
                    self.held.push_back(token);
                }
                Greeting::Bad => return self.remove(token),
            },
            Phase::Held => return self.remove(token),
            Phase::Requested if hung_up || flags.contains(EpollFlags::EPOLLRDHUP) => {
                let reset = connection.header(OP_RST, 0);
                self.control.push_back(reset);
                return self.remove(token);
            }
            Phase::Requested => {
                connection.queued = true;
                self.ready.push_back(token);
            }
            Phase::Draining => {
                connection.flush();
                if !connection.has_output() {
                    return self.remove(token);
                }
            }
            Phase::Established => {
                if flags.contains(EpollFlags::EPOLLOUT) {
                    connection.flush();
                }
                if flags.contains(EpollFlags::EPOLLIN) && connection.may_read() && !connection.queued {
                    connection.queued = true;
                    self.ready.push_back(token);
                } else if hung_up && !connection.may_read() {
                    connection.in_closed = true;
                    connection.close_out();
                }
            }
        }
        self.settle(token);
    }

    /// Says to the guest what it must know of a connection, and watches what can happen next.
    fn settle(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if connection.phase == Phase::Established {
            let closed = connection.untold_closed();
            if closed != 0 {
                connection.told_closed = closed;
                let shutdown = connection.header(OP_SHUTDOWN, closed);
                self.control.push_back(shutdown);
            } else if connection.owes_credit_update() {
                let update = connection.header(OP_CREDIT_UPDATE, 0);
                self.control.push_back(update);
            }
            let done = connection.guest_shutdown(0) && !connection.has_output();
            if done {
                let reset = connection.header(OP_RST, 0);
                self.control.push_back(reset);
                return self.remove(token);
            }
        }
        self.watch(token);
    }

    fn watch(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let wanted = connection.interest();
        if wanted == connection.watched {
            return;
        }
        let changed = match (connection.watched, wanted) {
            (None, Some(flags)) => self.epoll.add(&connection.stream, EpollEvent::new(flags, token)),
            (Some(_), Some(flags)) => self
                .epoll
                .modify(&connection.stream, &mut EpollEvent::new(flags, token)),
            (_, None) => self.epoll.delete(&connection.stream),
        };
        connection.watched = wanted;
        if let Err(error) = changed {
            tracing::error!(%error, "cannot watch a vsock client");
            self.remove(token);
        }
    }

    /// Closes the client's stream, which also ends its watch.
    fn remove(&mut self, token: u64) {
        if let Some(connection) = self.connections.remove(&token) {
            if self.by_host_port.get(&connection.host_port) == Some(&token) {
                self.by_host_port.remove(&connection.host_port);
            }
            drop(connection);
            self.watch_listener();
        }
    }
}

impl Model for Vsock {
    const DEVICE_ID: u32 = 19;
    const QUEUE_SIZES: &'static [u16] = &[128, 128, 16];

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        GUEST_CID.to_le_bytes().to_vec()
    }

    /// Clients that the driver does not know of wait for the next one.
    fn reset(&mut self) {
        self.control.clear();
        self.ready.clear();
        self.reset_event = ResetEvent::None;
        let known: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.is_known())
            .map(|(&token, _)| token)
            .collect();
        known.into_iter().for_each(|token| self.remove(token));
    }
}

/// The listener or a client, if `ready` names one, or a queue has something.
pub(crate) fn serve(device: &VirtioDevice<Vsock>, ready: Option<(u64, EpollFlags)>, pause: &AtomicBool) {
    if let Some((token, flags)) = ready {
        device.with_model(|vsock| {
            if token == vsock.listener_token {
                vsock.accept()
            } else {
                vsock.on_stream(token, flags)
            }
        });
    }
    device.serve(|vsock, queues| {
        vsock.pump_event(queues)?;
        let more_tx = vsock.pump_tx(queues, pause)?;
        let more_rx = vsock.pump_rx(queues, pause)?;
        if more_rx || (more_tx && vsock.control.len() < MAX_CONTROL) {
            queues.come_back(RX);
        }
        Ok(())
    });
}
