//! Bytes both ways.

use std::io::{Read, Write};
use std::net::Shutdown;

use super::guest::*;
use crate::devices::vsock::packet::*;

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
fn a_guest_that_only_sends_is_told_of_its_credit() {
    const TOTAL: u32 = 1 << 20;
    let mut guest = Guest::new();
    let (mut client, connection) = guest.connected();
    let reading = std::thread::spawn(move || {
        let mut received = vec![0; usize::try_from(TOTAL).unwrap()];
        client.read_exact(&mut received).unwrap();
        assert!(received == pattern(received.len(), 3));
        client
    });
    let to_send = pattern(usize::try_from(TOTAL).unwrap(), 3);
    let (mut sent, mut host_fwd) = (0_u32, 0_u32);
    for chunk in to_send.chunks(4096) {
        let len = u32::try_from(chunk.len()).unwrap();
        while sent + len - host_fwd > 256 << 10 {
            let update = guest.expect(OP_CREDIT_UPDATE);
            assert!(update.fwd_cnt > host_fwd && update.fwd_cnt <= sent);
            host_fwd = update.fwd_cnt;
        }
        guest.reply(&connection, OP_RW, 0, chunk);
        sent += len;
    }
    reading.join().unwrap();
    guest.assert_idle();
}
