//! The guest's side of vsock: its packets, its buffers, and the reset event.

use std::sync::atomic::{AtomicBool, Ordering};

use torpor_api::vmm::GUEST_CID;

use super::connection::{self, Phase};
use super::packet::{
    HEADER_BYTES, HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST,
    OP_RW, OP_SHUTDOWN, TYPE_STREAM,
};
use super::{EVENT, MAX_CONTROL, RX, ResetEvent, TX, Vsock};
use crate::devices::mmio::Queues;
use crate::devices::queue::{Buffers, Chain, QueueError};

/// Packets per turn and direction.
const BUDGET: usize = 128;
/// Largest payload of a packet.
const MAX_PAYLOAD_BYTES: usize = 64 << 10;

/// What is next for the guest.
enum Work {
    Control(Header),
    Connection(u64),
}

impl Vsock {
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
    pub(super) fn pump_tx(
        &mut self,
        queues: &mut Queues<'_>,
        pause: &AtomicBool,
    ) -> Result<bool, QueueError> {
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
    pub(super) fn pump_rx(
        &mut self,
        queues: &mut Queues<'_>,
        pause: &AtomicBool,
    ) -> Result<bool, QueueError> {
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
            // The client's first bytes are often there already.
            connection.queued = true;
            self.ready.push_back(token);
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
                } else if connection.phase == Phase::Established && !connection.credit_asked {
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
    pub(super) fn pump_event(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        let memory = queues.memory;
        if self.reset_event == ResetEvent::Due {
            let mut buffer = queues.queues[EVENT].next(memory)?;
            if buffer.is_none() && queues.queues[EVENT].listen(memory)? {
                // It came between the look and the request for a kick.
                buffer = queues.queues[EVENT].next(memory)?;
            }
            let Some(chain) = buffer else { return Ok(()) };
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
