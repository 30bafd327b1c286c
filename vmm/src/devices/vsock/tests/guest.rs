//! A guest with a vsock driver, and what clients do.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use torpor_api::vmm::GUEST_CID;

use crate::devices::testing::{BUFFERS, Machine, Ring, VSOCK, readable, start, writable};
use crate::devices::vsock::packet::*;
use crate::devices::vsock::{EVENT, RX, TX};

pub(super) const RX_SLOT_BYTES: u32 = 4096 + 44;
pub(super) const RX_SLOTS: u64 = 32;
pub(super) const TX_SLOTS: u64 = 64;
pub(super) const SLOT_STRIDE: u64 = 0x2000;
pub(super) const TX_BUFFERS: u64 = BUFFERS + RX_SLOTS * SLOT_STRIDE;
pub(super) const EVENT_BUFFERS: u64 = TX_BUFFERS + TX_SLOTS * SLOT_STRIDE;
pub(super) const PORT: u32 = 1024;

/// A guest with one port that matters.
pub(super) struct Guest {
    pub(super) machine: Machine,
    pub(super) rings: Vec<Ring>,
    pub(super) inbox: VecDeque<(Header, Vec<u8>)>,
    pub(super) sent_slots: u64,
    pub(super) busy_slots: u64,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Guest {
    pub(super) fn new() -> Self {
        Self::on(Machine::new())
    }

    /// Brings the driver up with receive and event buffers posted.
    pub(super) fn on(machine: Machine) -> Self {
        let rings = start(&machine, VSOCK);
        let mut guest = Self {
            machine,
            rings,
            inbox: VecDeque::new(),
            sent_slots: 0,
            busy_slots: 0,
            buf_alloc: 64 << 10,
            fwd_cnt: 0,
        };
        guest.post_event_buffers(8);
        for slot in 0..RX_SLOTS {
            guest.rings[RX].push(
                &guest.machine,
                &[writable(BUFFERS + slot * SLOT_STRIDE, RX_SLOT_BYTES)],
            );
        }
        guest.rings[RX].kick(&guest.machine);
        guest
    }

    pub(super) fn post_event_buffers(&mut self, n_buffers: u64) {
        for i in 0..n_buffers {
            self.rings[EVENT].push(&self.machine, &[writable(EVENT_BUFFERS + 8 * i, 4)]);
        }
        self.rings[EVENT].kick(&self.machine);
    }

    pub(super) fn restored(mut self) -> Self {
        self.machine = self.machine.into_restored();
        self
    }

    /// Moves what the device did into the inbox; true if it did something.
    pub(super) fn pump(&mut self) -> bool {
        let mut any = false;
        while self.rings[TX].poll_used(&self.machine).is_some() {
            self.busy_slots -= 1;
            any = true;
        }
        while let Some((head, len)) = self.rings[RX].poll_used(&self.machine) {
            let gpa = BUFFERS + u64::from(head) % RX_SLOTS * SLOT_STRIDE;
            let bytes = self.machine.bytes(gpa, usize::try_from(len).unwrap());
            let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(
                usize::try_from(header.len_bytes).unwrap(),
                bytes.len() - HEADER_BYTES
            );
            self.inbox.push_back((header, bytes[HEADER_BYTES..].to_vec()));
            // Rings and slots have sizes that divide, so descriptors keep their buffers.
            self.rings[RX].push(&self.machine, &[writable(gpa, RX_SLOT_BYTES)]);
            self.rings[RX].kick(&self.machine);
            any = true;
        }
        any
    }

    pub(super) fn wait(&mut self) {
        if !self.pump() {
            self.machine.wait_interrupt(VSOCK);
        }
    }

    /// The next packet.
    pub(super) fn next(&mut self) -> (Header, Vec<u8>) {
        loop {
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            self.wait();
        }
    }

    pub(super) fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.next();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    pub(super) fn send(&mut self, header: &Header, payload: &[u8]) {
        while self.busy_slots == TX_SLOTS {
            self.wait();
        }
        let gpa = TX_BUFFERS + self.sent_slots % TX_SLOTS * SLOT_STRIDE;
        self.sent_slots += 1;
        self.busy_slots += 1;
        self.machine.fill(gpa, &header.encode());
        self.machine.fill(gpa + 44, payload);
        let len = u32::try_from(payload.len()).unwrap();
        self.rings[TX].push(&self.machine, &[readable(gpa, 44 + len)]);
        self.rings[TX].kick(&self.machine);
    }

    /// A packet of the connection that `from_host` is of.
    pub(super) fn reply(&mut self, from_host: &Header, op: u16, flags: u32, payload: &[u8]) {
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: from_host.dst_port,
            dst_port: from_host.src_port,
            len_bytes: u32::try_from(payload.len()).unwrap(),
            socket_type: TYPE_STREAM,
            op,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        };
        self.send(&header, payload);
    }

    /// A client that is through, and a header of its connection.
    pub(super) fn connected(&mut self) -> (UnixStream, Header) {
        let mut client = self.machine.connect_vsock();
        client.write_all(format!("CONNECT {PORT}\n").as_bytes()).unwrap();
        let request = self.expect(OP_REQUEST);
        assert_eq!(
            (request.src_cid, request.dst_cid, request.dst_port),
            (HOST_CID, GUEST_CID, PORT)
        );
        self.reply(&request, OP_RESPONSE, 0, &[]);
        assert_eq!(read_line(&mut client), format!("OK {}\n", request.src_port));
        (client, request)
    }

    /// Waits until nothing is ready for the device thread: what spins would be ready for ever.
    pub(super) fn assert_idle(&mut self) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        for _ in 0..100_000 {
            self.pump();
            let epoll = std::sync::Arc::clone(&self.machine.set.io_epoll);
            let mut fds = [PollFd::new(epoll.0.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::ZERO).unwrap() == 0 {
                return;
            }
            std::thread::yield_now();
        }
        panic!("the device thread spins");
    }
}

pub(super) fn read_line(client: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        client.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

pub(super) fn assert_closed(client: &mut UnixStream) {
    match client.read(&mut [0; 16]) {
        Ok(n_bytes) => assert_eq!(n_bytes, 0),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

pub(super) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}
