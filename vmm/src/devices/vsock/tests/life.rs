//! Clients before the driver, pauses, restores, too many of them, and damage.

use std::io::{Read, Write};

use proptest::prelude::*;
use torpor_api::vmm::GUEST_CID;

use super::guest::*;
use crate::devices::testing::{BUFFERS, Machine, VSOCK, readable, start, writable};
use crate::devices::vsock::packet::*;
use crate::devices::vsock::{EVENT, MAX_CONNECTIONS, MAX_CONTROL, RX, TX};

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
fn a_restored_guest_that_had_no_connection_is_asked_at_once() {
    let mut guest = Guest::new();
    guest.machine.set.freeze();
    let mut guest = guest.restored();
    let mut client = guest.machine.connect_vsock();
    client.write_all(b"CONNECT 1024\n").unwrap();
    let request = guest.expect(OP_REQUEST);
    guest.reply(&request, OP_RESPONSE, 0, &[]);
    assert!(read_line(&mut client).starts_with("OK "));
}

#[test]
fn what_a_client_sends_ahead_follows_its_request_up_to_the_early_credit() {
    let mut guest = Guest::new();
    let mut client = guest.machine.connect_vsock();
    let mut sent = b"CONNECT 1024\n".to_vec();
    sent.extend((0..10_000_u32).map(|i| i.to_le_bytes()[0]));
    client.write_all(&sent).unwrap();
    let request = guest.expect(OP_REQUEST);
    let mut got = Vec::new();
    while got.len() < 4096 {
        let (header, bytes) = guest.next();
        assert_eq!(header.op, OP_RW);
        got.extend(bytes);
    }
    assert_eq!(got.len(), 4096);
    guest.assert_idle();
    assert!(guest.inbox.is_empty(), "past the early credit: {:?}", guest.inbox);
    guest.reply(&request, OP_RESPONSE, 0, &[]);
    assert!(read_line(&mut client).starts_with("OK "));
    while got.len() < 10_000 {
        let (header, bytes) = guest.next();
        assert_eq!(header.op, OP_RW);
        got.extend(bytes);
    }
    assert_eq!(got, sent[13..]);
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
        if n_taken < MAX_CONTROL {
            rings[TX].wait_used(&machine);
            n_taken += 1;
        } else {
            break;
        }
    }
    assert_eq!(
        machine.set.vsock.with_model(|vsock| vsock.control.len()),
        Some(MAX_CONTROL)
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
