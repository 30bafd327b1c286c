//! vsock against a guest's driver written to the specification: data, credit, ends, restores, damage.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::packet::*;
use super::{EVENT, MAX_CONNECTIONS, RX, TX};
use crate::devices::testing::{BUFFERS, Machine, Ring, VSOCK, readable, start, writable};
use torpor_api::vmm::GUEST_CID;

const RX_SLOT_BYTES: u32 = 4096 + 44;
const RX_SLOTS: u64 = 32;
const TX_SLOTS: u64 = 64;
const SLOT_STRIDE: u64 = 0x2000;
const TX_BUFFERS: u64 = BUFFERS + RX_SLOTS * SLOT_STRIDE;
const EVENT_BUFFERS: u64 = TX_BUFFERS + TX_SLOTS * SLOT_STRIDE;
const PORT: u32 = 1024;

/// A guest with one port that matters.
struct Guest {
    machine: Machine,
    rings: Vec<Ring>,
    inbox: VecDeque<(Header, Vec<u8>)>,
    sent_slots: u64,
    busy_slots: u64,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Guest {
    fn new() -> Self {
        Self::on(Machine::new())
    }

    /// Brings the driver up with receive and event buffers posted.
    fn on(machine: Machine) -> Self {
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

    fn post_event_buffers(&mut self, n_buffers: u64) {
        for i in 0..n_buffers {
            self.rings[EVENT].push(&self.machine, &[writable(EVENT_BUFFERS + 8 * i, 4)]);
        }
        self.rings[EVENT].kick(&self.machine);
    }

    fn restored(mut self) -> Self {
        self.machine = self.machine.into_restored();
        self
    }

    /// Moves what the device did into the inbox; true if it did something.
    fn pump(&mut self) -> bool {
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

    fn wait(&mut self) {
        if !self.pump() {
            self.machine.wait_interrupt(VSOCK);
        }
    }

    /// The next packet.
    fn next(&mut self) -> (Header, Vec<u8>) {
        loop {
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            self.wait();
        }
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.next();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn send(&mut self, header: &Header, payload: &[u8]) {
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
    fn reply(&mut self, from_host: &Header, op: u16, flags: u32, payload: &[u8]) {
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
    fn connected(&mut self) -> (UnixStream, Header) {
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
    fn assert_idle(&mut self) {
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

fn read_line(client: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        client.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn assert_closed(client: &mut UnixStream) {
    match client.read(&mut [0; 16]) {
        Ok(n_bytes) => assert_eq!(n_bytes, 0),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[test]
fn headers_survive_the_ring() {
    let header = Header {
        src_cid: 1 << 40,
        dst_cid: 3,
        src_port: 4,
        dst_port: 5,
        len_bytes: 6,
        socket_type: 7,
        op: 8,
        flags: 9,
        buf_alloc: 10,
        fwd_cnt: 11,
    };
    assert_eq!(Header::decode(&header.encode()), header);
    assert_eq!(header.encode()[28..32], [7, 0, 8, 0]);
}

#[test]
fn bytes_go_both_ways() {
    let mut guest = Guest::new();
    let (mut client, connection) = guest.connected();
    client.write_all(b"ping").unwrap();
    let (header, payload) = guest.next();
    assert_eq!((header.op, payload.as_slice()), (OP_RW, &b"ping"[..]));
    guest.reply(&connection, OP_RW, 0, b"pong!");
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong!");
    guest.assert_idle();
}

#[test]
fn bytes_right_after_the_greeting_are_not_lost() {
    let mut guest = Guest::new();
    let mut client = guest.machine.connect_vsock();
    client.write_all(b"CONNECT 1024\nhello").unwrap();
    let request = guest.expect(OP_REQUEST);
    guest.reply(&request, OP_RESPONSE, 0, &[]);
    assert_eq!(guest.next().1, b"hello");
}

#[test]
fn nonsense_instead_of_a_greeting_is_hung_up_on() {
    let mut guest = Guest::new();
    for greeting in [
        "HELLO\n",
        "CONNECT \n",
        "CONNECT x\n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "\n",
    ] {
        let mut client = guest.machine.connect_vsock();
        client.write_all(greeting.as_bytes()).unwrap();
        assert_closed(&mut client);
    }
    let mut client = guest.machine.connect_vsock();
    client.write_all(&[b'9'; 32]).unwrap();
    assert_closed(&mut client);
    drop(guest.machine.connect_vsock());
    guest.assert_idle();
    assert!(guest.inbox.is_empty(), "the guest heard of it: {:?}", guest.inbox);
}

#[test]
fn ten_mebibytes_both_ways_with_little_credit() {
    const TOTAL: usize = 10 << 20;
    let mut guest = Guest::new();
    guest.buf_alloc = 5000;
    let (mut client, connection) = guest.connected();
    let mut writer = client.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        writer.write_all(&pattern(TOTAL, 1)).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let reading = std::thread::spawn(move || {
        let mut received = Vec::new();
        client.read_to_end(&mut received).unwrap();
        assert!(
            received == pattern(TOTAL, 2),
            "{} bytes arrived at the host, not the same",
            received.len()
        );
    });
    let to_send = pattern(TOTAL, 2);
    let (mut sent, mut host_fwd, mut host_closed) = (0_u32, 0_u32, false);
    let mut received = Vec::new();
    while !host_closed || usize::try_from(sent).unwrap() < TOTAL {
        let from = usize::try_from(sent).unwrap();
        let credit = usize::try_from((256 << 10) - sent.wrapping_sub(host_fwd)).unwrap();
        let len = credit.min(4000).min(TOTAL - from);
        if len > 0 && guest.busy_slots < TX_SLOTS {
            guest.reply(&connection, OP_RW, 0, &to_send[from..from + len]);
            sent += u32::try_from(len).unwrap();
            if from + len == TOTAL {
                guest.reply(&connection, OP_SHUTDOWN, SHUTDOWN_SEND, &[]);
            }
            guest.pump();
        } else if guest.inbox.is_empty() {
            guest.wait();
        }
        while let Some((header, payload)) = guest.inbox.pop_front() {
            host_fwd = header.fwd_cnt;
            match header.op {
                OP_RW => {
                    let in_flight = received.len() + payload.len() - usize::try_from(guest.fwd_cnt).unwrap();
                    assert!(
                        in_flight <= 5000,
                        "the host exceeded the guest's credit: {in_flight}"
                    );
                    received.extend(payload);
                }
                OP_CREDIT_REQUEST => {
                    guest.fwd_cnt = u32::try_from(received.len()).unwrap();
                    guest.reply(&connection, OP_CREDIT_UPDATE, 0, &[]);
                }
                OP_SHUTDOWN => {
                    host_closed = header.flags & SHUTDOWN_SEND != 0;
                }
                OP_CREDIT_UPDATE => {}
                op => panic!("unexpected {op}"),
            }
        }
    }
    assert!(
        received == pattern(TOTAL, 1),
        "{} bytes arrived in the guest, not the same",
        received.len()
    );
    writing.join().unwrap();
    reading.join().unwrap();
}

#[test]
fn a_client_that_ends_its_half_still_gets_the_answer() {
    let mut guest = Guest::new();
    let (mut client, connection) = guest.connected();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.next().1, b"question");
    assert_eq!(guest.expect(OP_SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.assert_idle();
    guest.reply(&connection, OP_RW, 0, b"answer");
    guest.reply(&connection, OP_SHUTDOWN, SHUTDOWN_BOTH, &[]);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    guest.expect(OP_RST);
    guest.assert_idle();
}

#[test]
fn a_client_that_closes_is_reported_and_forgotten_after_the_guests_reset() {
    let mut guest = Guest::new();
    let (mut client, connection) = guest.connected();
    client.write_all(b"last words").unwrap();
    drop(client);
    assert_eq!(guest.next().1, b"last words");
    let mut closed = 0;
    while closed != SHUTDOWN_BOTH {
        closed |= guest.expect(OP_SHUTDOWN).flags;
    }
    guest.assert_idle();
    guest.reply(&connection, OP_RST, 0, &[]);
    guest.reply(&connection, OP_RW, 0, b"?");
    guest.expect(OP_RST);
    assert_eq!(
        guest
            .machine
            .set
            .vsock
            .with_model(|vsock| vsock.connections.len()),
        Some(0)
    );
}

#[test]
fn a_closed_client_without_credit_does_not_make_the_thread_spin() {
    let mut guest = Guest::new();
    guest.buf_alloc = 10;
    let (mut client, connection) = guest.connected();
    client.write_all(&[7; 100]).unwrap();
    drop(client);
    assert_eq!(guest.next().1, [7; 10]);
    guest.expect(OP_CREDIT_REQUEST);
    guest.assert_idle();
    guest.reply(&connection, OP_RW, 0, b"to nobody");
    assert_eq!(guest.expect(OP_SHUTDOWN).flags, SHUTDOWN_RECEIVE);
    guest.assert_idle();
    guest.buf_alloc = 1000;
    guest.reply(&connection, OP_CREDIT_UPDATE, 0, &[]);
    let mut rest = Vec::new();
    loop {
        match guest.next() {
            (Header { op: OP_RW, .. }, payload) => rest.extend(payload),
            (
                Header {
                    op: OP_SHUTDOWN,
                    flags,
                    ..
                },
                _,
            ) => {
                assert_eq!(flags, SHUTDOWN_BOTH);
                break;
            }
            (header, _) => panic!("{header:?}"),
        }
    }
    assert_eq!(rest, [7; 90]);
}

#[test]
fn a_guests_reset_closes_the_client_after_what_it_sent() {
    let mut guest = Guest::new();
    let (mut client, connection) = guest.connected();
    let sent = pattern(200 << 10, 5);
    for chunk in sent.chunks(4000) {
        guest.reply(&connection, OP_RW, 0, chunk);
    }
    guest.reply(&connection, OP_RST, 0, &[]);
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
    guest.assert_idle();
}

#[test]
fn a_refused_connect_closes_the_client() {
    let mut guest = Guest::new();
    let mut client = guest.machine.connect_vsock();
    client.write_all(b"CONNECT 9\n").unwrap();
    let request = guest.expect(OP_REQUEST);
    guest.reply(&request, OP_RST, 0, &[]);
    assert_closed(&mut client);
}

#[test]
fn a_guest_that_sends_past_its_credit_loses_the_connection() {
    let mut guest = Guest::new();
    let (client, connection) = guest.connected();
    let mut n_sent = 0;
    while !guest.inbox.iter().any(|(header, _)| header.op == OP_RST) {
        assert!(n_sent < 1000, "4 MiB were taken without credit");
        guest.reply(&connection, OP_RW, 0, &[1; 4000]);
        n_sent += 1;
        guest.pump();
    }
    drop(client);
}

#[test]
fn a_guests_own_connects_and_strays_are_reset_and_other_hosts_ignored() {
    let mut guest = Guest::new();
    let stray = Header {
        src_port: 77,
        dst_port: 78,
        ..Header::default()
    };
    guest.reply(&stray, OP_REQUEST, 0, &[]);
    let reset = guest.expect(OP_RST);
    assert_eq!((reset.src_port, reset.dst_port), (77, 78));
    guest.reply(&stray, OP_RST, 0, &[]);
    let elsewhere = Header {
        src_cid: GUEST_CID,
        dst_cid: 9,
        op: OP_REQUEST,
        socket_type: 1,
        ..stray
    };
    guest.send(&elsewhere, &[]);
    let (_client, _) = guest.connected();
}

#[test]
fn a_client_before_the_driver_is_held() {
    let machine = Machine::new();
    let mut client = machine.connect_vsock();
    client.write_all(b"CONNECT 1024\n").unwrap();
    let mut guest = Guest::on(machine);
    let request = guest.expect(OP_REQUEST);
    guest.reply(&request, OP_RESPONSE, 0, &[]);
    assert!(read_line(&mut client).starts_with("OK "));
}

#[test]
fn a_held_client_that_leaves_is_not_announced() {
    let machine = Machine::new();
    let mut client = machine.connect_vsock();
    client.write_all(b"CONNECT 1024\n").unwrap();
    while machine.set.vsock.with_model(|vsock| vsock.held.len()) != Some(1) {
        std::thread::yield_now();
    }
    drop(client);
    while machine.set.vsock.with_model(|vsock| vsock.connections.len()) != Some(0) {
        std::thread::yield_now();
    }
    let mut guest = Guest::on(machine);
    let (_second, request) = guest.connected();
    assert_eq!(request.op, OP_REQUEST);
}

#[test]
fn connections_go_on_after_a_cancelled_pause() {
    let mut guest = Guest::new();
    let (mut client, connection) = guest.connected();
    guest.machine.set.freeze();
    client.write_all(b"meanwhile").unwrap();
    guest.reply(&connection, OP_RW, 0, b"and back");
    guest.machine.set.flush_disk().unwrap();
    guest.machine.set.thaw();
    assert_eq!(guest.next().1, b"meanwhile");
    let mut answer = [0; 8];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"and back");
}

#[test]
fn a_restored_guest_hears_of_the_reset_before_any_new_connection() {
    let mut guest = Guest::new();
    let (mut old_client, old) = guest.connected();
    guest.machine.set.freeze();
    guest.reply(&old, OP_RW, 0, b"never read");
    let mut guest = guest.restored();
    assert_closed(&mut old_client);
    let mut client = guest.machine.connect_vsock();
    client.write_all(b"CONNECT 1024\n").unwrap();
    let (head, len) = guest.rings[EVENT].wait_used(&guest.machine);
    assert_eq!(
        (len, guest.machine.bytes(EVENT_BUFFERS + 8 * u64::from(head), 4)),
        (4, vec![0; 4])
    );
    let reset = guest.expect(OP_RST);
    assert_eq!((reset.src_port, reset.dst_port), (old.src_port, old.dst_port));
    while guest.machine.set.vsock.with_model(|vsock| vsock.held.len()) != Some(1) {
        std::thread::yield_now();
    }
    guest.assert_idle();
    assert!(
        guest.inbox.is_empty(),
        "asked before it took the reset in: {:?}",
        guest.inbox
    );
    guest.post_event_buffers(1);
    let request = guest.expect(OP_REQUEST);
    assert_ne!(request.src_port, old.src_port);
    guest.reply(&request, OP_RESPONSE, 0, &[]);
    assert!(read_line(&mut client).starts_with("OK "));
}

#[test]
fn more_clients_than_connections_wait_their_turn() {
    let guest = Guest::new();
    let clients: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| guest.machine.connect_vsock())
        .collect();
    let count = || {
        guest
            .machine
            .set
            .vsock
            .with_model(|vsock| vsock.connections.len())
    };
    while count() != Some(MAX_CONNECTIONS) {
        std::thread::yield_now();
    }
    let mut late = guest.machine.connect_vsock();
    late.write_all(b"CONNECT 1024\n").unwrap();
    let mut guest = guest;
    guest.assert_idle();
    drop(clients);
    let request = guest.expect(OP_REQUEST);
    guest.reply(&request, OP_RESPONSE, 0, &[]);
    assert!(read_line(&mut late).starts_with("OK "));
}

#[test]
fn a_guest_that_never_reads_its_answers_is_not_answered_without_bound() {
    let machine = Machine::new();
    let mut rings = start(&machine, VSOCK);
    let stray = Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        op: OP_RW,
        socket_type: 1,
        ..Header::default()
    };
    machine.fill(TX_BUFFERS, &stray.encode());
    // No receive buffers: 256 answers wait, then the device leaves the guest's packets where they are.
    let mut n_taken = 0;
    for _ in 0..1000 {
        rings[TX].push(&machine, &[readable(TX_BUFFERS, 44)]);
        rings[TX].kick(&machine);
        if n_taken < super::MAX_CONTROL {
            rings[TX].wait_used(&machine);
            n_taken += 1;
        } else {
            break;
        }
    }
    assert_eq!(
        machine.set.vsock.with_model(|vsock| vsock.control.len()),
        Some(super::MAX_CONTROL)
    );
    for i in 0..100 {
        rings[RX].push(&machine, &[writable(BUFFERS + i * SLOT_STRIDE, RX_SLOT_BYTES)]);
    }
    rings[RX].kick(&machine);
    rings[TX].wait_used(&machine);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn random_packets_never_panic_or_hang(
        packets in prop::collection::vec(
            (0_u16..9, any::<u32>(), any::<u32>(), any::<u32>(), 0_u32..6000, 0_usize..3000, any::<bool>()),
            1..60
        )
    ) {
        let mut guest = Guest::new();
        let (mut client, connection) = guest.connected();
        client.write_all(b"something to read").unwrap();
        for (op, flags, buf_alloc, fwd_cnt, len_bytes, n_bytes, honest) in packets {
            guest.pump();
            if guest.machine.needs_reset(VSOCK) {
                break;
            }
            let len_bytes = if honest { u32::try_from(n_bytes).unwrap() } else { len_bytes };
            let header = Header {
                src_cid: GUEST_CID,
                dst_cid: HOST_CID,
                src_port: connection.dst_port,
                dst_port: if flags & 4 == 0 { connection.src_port } else { flags },
                len_bytes,
                socket_type: TYPE_STREAM,
                op,
                flags: flags & 3,
                buf_alloc,
                fwd_cnt,
            };
            guest.send(&header, &vec![1; n_bytes]);
            while guest.busy_slots > 0 && !guest.machine.needs_reset(VSOCK) {
                guest.wait();
            }
        }
        guest.machine.settle();
        let machine = guest.machine;
        let mut guest = Guest::on(machine);
        guest.connected();
    }
}
