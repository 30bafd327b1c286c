//! virtio-vsock: connections from host programs to ports of the guest.
//!
//! Runs on the I/O thread. A client connects to the unix socket and writes `CONNECT <port>\n`; when the guest
//! accepts it reads `OK <host port>\n` and then the guest's bytes. A client that comes before the guest's driver,
//! or before the guest has digested a restore, is held, not refused. The guest can't connect to the host.
//!
//! Invariants: at most [`MAX_CONNECTIONS`]; at most `BUF_ALLOC` bytes kept per connection; answers to the guest
//! are bounded by not reading its packets while [`MAX_CONTROL`] of them wait. Nothing is watched that nobody would
//! act on, so the thread never spins. Connections do not survive a restore: the guest gets a transport reset,
//! and no connection is made before it has taken that in, because it would be torn down with the old ones.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use torpor_api::vmm::GUEST_CID;

use self::connection::{Connection, Greeting, Phase};
use self::packet::{
    HEADER_BYTES, HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST,
    OP_RW, OP_SHUTDOWN, TYPE_STREAM,
};
use super::mmio::{Model, Queues, VirtioDevice};
use super::queue::{Buffers, Chain, QueueError};
use super::sys;

mod connection;
mod packet;
#[cfg(test)]
mod tests;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// Most connections at a time; further clients wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 1024;
/// Most answers that wait for the guest's buffers before its packets are left unread.
const MAX_CONTROL: usize = 256;
/// Packets per turn and direction.
const BUDGET: usize = 128;
/// Largest payload of a packet.
const MAX_PAYLOAD_BYTES: usize = 64 << 10;
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

/// What is next for the guest.
enum Work {
    Control(Header),
    Connection(u64),
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
            Phase::Requested => {
                let reset = connection.header(OP_RST, 0);
                self.control.push_back(reset);
                return self.remove(token);
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

    /// One packet of the guest.
    fn on_packet(&mut self, header: &Header, payload: Buffers<'_>) {
        if header.dst_cid != HOST_CID || header.src_cid != GUEST_CID {
            return;
        }
        let token = self.by_host_port.get(&header.dst_port).copied();
        let connection = token
            .and_then(|token| self.connections.get_mut(&token))
            .filter(|connection| {
                connection.guest_port == header.src_port
                    && header.socket_type == TYPE_STREAM
                    && matches!(connection.phase, Phase::Requested | Phase::Established)
            });
        let (Some(token), Some(connection)) = (token, connection) else {
            return self.refuse(header);
        };
        connection.update_credit(header);
        let phase = connection.phase;
        let fine = match (header.op, phase) {
            (OP_RESPONSE, Phase::Requested) => connection.accept().is_ok(),
            (OP_RW, Phase::Established) => {
                let fine = connection.write_from(payload);
                connection.flush();
                fine
            }
            (OP_SHUTDOWN, Phase::Established) => {
                connection.guest_shutdown(header.flags);
                connection.flush();
                true
            }
            (OP_CREDIT_UPDATE, Phase::Established) => true,
            (OP_CREDIT_REQUEST, Phase::Established) => {
                let update = connection.header(OP_CREDIT_UPDATE, 0);
                self.control.push_back(update);
                true
            }
            (OP_RST, _) => {
                self.by_host_port.remove(&header.dst_port);
                if connection.has_output() {
                    connection.phase = Phase::Draining;
                    return self.watch(token);
                }
                return self.remove(token);
            }
            _ => false,
        };
        if fine {
            self.settle(token);
        } else {
            let reset = connection.header(OP_RST, 0);
            self.control.push_back(reset);
            self.remove(token);
        }
    }

    /// Answers a packet of no connection, or a request for one.
    fn refuse(&mut self, header: &Header) {
        if header.op != OP_RST {
            self.control.push_back(Header {
                src_cid: HOST_CID,
                dst_cid: GUEST_CID,
                src_port: header.dst_port,
                dst_port: header.src_port,
                socket_type: header.socket_type,
                op: OP_RST,
                ..Header::default()
            });
        }
    }

    /// Takes the guest's packets; true if any are left.
    fn pump_tx(&mut self, queues: &mut Queues<'_>, pause: &AtomicBool) -> Result<bool, QueueError> {
        let memory = queues.memory;
        let mut more = true;
        for _ in 0..BUDGET {
            if pause.load(Ordering::Acquire) || self.control.len() >= MAX_CONTROL {
                break;
            }
            let Some(mut chain) = queues.queues[TX].next(memory)? else {
                if queues.queues[TX].listen(memory)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head;
            let header = chain.readable.read_array().ok_or(QueueError::Short { head })?;
            let header = Header::decode(&header);
            let payload = usize::try_from(header.len_bytes)
                .ok()
                .filter(|&len| len <= MAX_PAYLOAD_BYTES);
            let payload = payload.and_then(|len| chain.readable.take_front(len));
            self.on_packet(&header, payload.ok_or(QueueError::Short { head })?);
            queues.queues[TX].complete(memory, head, 0)?;
        }
        queues.notify(TX)?;
        Ok(more)
    }

    fn next_work(&mut self) -> Option<Work> {
        if let Some(header) = self.control.pop_front() {
            return Some(Work::Control(header));
        }
        if self.reset_event == ResetEvent::None
            && let Some(token) = self.held.pop_front()
        {
            return Some(Work::Connection(token));
        }
        self.ready.pop_front().map(Work::Connection)
    }

    fn put_back(&mut self, work: Work) {
        match work {
            Work::Control(header) => self.control.push_front(header),
            Work::Connection(token) => match self.connections.get(&token).map(|c| c.phase) {
                Some(Phase::Held) => self.held.push_front(token),
                Some(_) => self.ready.push_front(token),
                None => {}
            },
        }
    }

    /// Fills the guest's buffers; true if there is more to fill them with and they are not full.
    fn pump_rx(&mut self, queues: &mut Queues<'_>, pause: &AtomicBool) -> Result<bool, QueueError> {
        let memory = queues.memory;
        let mut more = true;
        for _ in 0..BUDGET {
            if pause.load(Ordering::Acquire) {
                break;
            }
            let Some(work) = self.next_work() else {
                more = false;
                break;
            };
            let Some(chain) = queues.queues[RX].next(memory)? else {
                self.put_back(work);
                if queues.queues[RX].listen(memory)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head;
            match self.fill(work, chain)? {
                Some(n_bytes) => queues.queues[RX].complete(memory, head, n_bytes)?,
                None => queues.queues[RX].undo(),
            }
        }
        queues.notify(RX)?;
        Ok(more)
    }

    /// Writes one packet; `None` if there was none after all.
    fn fill(&mut self, work: Work, mut chain: Chain<'_>) -> Result<Option<usize>, QueueError> {
        let head = chain.head;
        let header_room = chain
            .writable
            .take_front(HEADER_BYTES)
            .ok_or(QueueError::Short { head })?;
        let token = match work {
            Work::Control(header) => {
                header_room.copy_from(&header.encode());
                return Ok(Some(HEADER_BYTES));
            }
            Work::Connection(token) => token,
        };
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(None);
        };
        if connection.phase == Phase::Held {
            connection.phase = Phase::Requested;
            header_room.copy_from(&connection.header(OP_REQUEST, 0).encode());
            self.watch(token);
            return Ok(Some(HEADER_BYTES));
        }
        let n_bytes = self.fill_data(token, &header_room, chain.writable, head)?;
        Ok(n_bytes.map(|n_bytes| HEADER_BYTES + n_bytes))
    }

    fn fill_data(
        &mut self,
        token: u64,
        header_room: &Buffers<'_>,
        mut room: Buffers<'_>,
        head: u16,
    ) -> Result<Option<usize>, QueueError> {
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(None);
        };
        connection.queued = false;
        let n_bytes = room.len().min(connection.credit()).min(MAX_PAYLOAD_BYTES);
        if room.len() == 0 {
            return Err(QueueError::Short { head });
        }
        if !connection.may_read() || n_bytes == 0 {
            self.settle(token);
            return Ok(None);
        }
        let room = room.take_front(n_bytes).ok_or(QueueError::Short { head })?;
        let read = connection.read_into(&room);
        match read {
            Ok(0) => connection.in_closed = true,
            Ok(n_bytes) => {
                let mut header = connection.header(OP_RW, 0);
                header.len_bytes = u32::try_from(n_bytes).unwrap_or(0);
                header_room.copy_from(&header.encode());
                if connection.credit() > 0 {
                    connection.queued = true;
                    self.ready.push_back(token);
                } else if !connection.credit_asked {
                    connection.credit_asked = true;
                    let ask = connection.header(OP_CREDIT_REQUEST, 0);
                    self.control.push_back(ask);
                }
                self.settle(token);
                return Ok(Some(n_bytes));
            }
            Err(error) if connection::is_transient(&error) => {}
            Err(_) => {
                connection.in_closed = true;
                connection.close_out();
            }
        }
        self.settle(token);
        Ok(None)
    }

    /// Tells the guest of the restore, and finds out when it has taken that in.
    fn pump_event(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        let memory = queues.memory;
        if self.reset_event == ResetEvent::Due {
            let Some(chain) = queues.queues[EVENT].next(memory)? else {
                queues.queues[EVENT].listen(memory)?;
                return Ok(());
            };
            // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET is 0.
            let n_bytes = chain.writable.copy_from(&0_u32.to_le_bytes());
            let driver_index = queues.queues[EVENT].driver_index(memory)?;
            queues.queues[EVENT].complete(memory, chain.head, n_bytes)?;
            self.reset_event = ResetEvent::Told { driver_index };
            queues.notify(EVENT)?;
        }
        if let ResetEvent::Told { driver_index } = self.reset_event
            && queues.queues[EVENT].listen_past(memory, driver_index)?
        {
            self.reset_event = ResetEvent::None;
        }
        Ok(())
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
            .filter(|(_, connection)| !matches!(connection.phase, Phase::Greeting | Phase::Held))
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
