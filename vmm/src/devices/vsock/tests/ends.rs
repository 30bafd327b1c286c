//! How connections end, and what is refused.

use std::io::{Read, Write};
use std::net::Shutdown;

use torpor_api::vmm::GUEST_CID;

use super::guest::*;
use crate::devices::vsock::packet::*;

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
