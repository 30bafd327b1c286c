//! Network: packets both ways over a datagram socket in place of the tap.

use torpor_api::vmm::GUEST_MAC;

use super::{HEADER_BYTES, RX, TX};
use crate::devices::testing::{BUFFERS, Machine, NET, Ring, readable, start, writable};

fn net() -> (Machine, Vec<Ring>) {
    let machine = Machine::new();
    machine
        .wire
        .set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    let rings = start(&machine, NET);
    (machine, rings)
}

fn packet(len: usize, seed: u8) -> Vec<u8> {
    let mut packet = vec![0; HEADER_BYTES];
    packet.extend((0..len).map(|i| i.to_le_bytes()[0].wrapping_add(seed)));
    packet
}

#[test]
fn the_configuration_has_the_mac_and_the_mtu() {
    let (machine, _) = net();
    let mut config = [0; 12];
    machine.set.mmio_read(
        crate::devices::MMIO_BASE + crate::devices::MMIO_STRIDE + 0x100,
        &mut config,
    );
    assert_eq!(config[..6], GUEST_MAC);
    assert_eq!(config[10..], 1500_u16.to_le_bytes());
}

#[test]
fn a_packet_of_the_guest_reaches_the_wire_from_scattered_buffers() {
    let (machine, mut rings) = net();
    let sent = packet(1000, 3);
    machine.fill(BUFFERS, &sent[..700]);
    machine.fill(BUFFERS + 0x1000, &sent[700..]);
    rings[TX].push(
        &machine,
        &[readable(BUFFERS, 700), readable(BUFFERS + 0x1000, 312)],
    );
    rings[TX].kick(&machine);
    rings[TX].wait_used(&machine);
    let mut received = [0; 2000];
    let len = machine.wire.recv(&mut received).unwrap();
    assert_eq!(received[..len], sent);
    assert_eq!(machine.set.counters().net_tx_bytes, 1000);
}

#[test]
fn a_packet_from_the_wire_is_merged_over_buffers() {
    let (machine, mut rings) = net();
    for i in 0..4 {
        rings[RX].push(&machine, &[writable(BUFFERS + 0x1000 * i, 512)]);
    }
    rings[RX].kick(&machine);
    let mut sent = packet(1200, 9);
    machine.wire.send(&sent).unwrap();
    sent[10..12].copy_from_slice(&3_u16.to_le_bytes());
    let mut received = Vec::new();
    for _ in 0..3 {
        let (head, len) = rings[RX].wait_used(&machine);
        received.extend(machine.bytes(BUFFERS + 0x1000 * u64::from(head), usize::try_from(len).unwrap()));
    }
    assert_eq!(received, sent);
    assert_eq!(machine.set.counters().net_rx_bytes, 1200);
}

#[test]
fn packets_wait_for_buffers_one_by_one_and_none_is_lost() {
    let (machine, mut rings) = net();
    for seed in 0..50 {
        machine.wire.send(&packet(100, seed)).unwrap();
    }
    for seed in 0..50 {
        rings[RX].push(&machine, &[writable(BUFFERS, 2048)]);
        rings[RX].kick(&machine);
        let (_, len) = rings[RX].wait_used(&machine);
        let received = machine.bytes(BUFFERS, usize::try_from(len).unwrap());
        assert_eq!(received[HEADER_BYTES..], packet(100, seed)[HEADER_BYTES..]);
    }
}

#[test]
fn a_packet_waits_until_there_are_enough_buffers_for_all_of_it() {
    let (mut machine, mut rings) = net();
    machine.wire.send(&packet(1000, 1)).unwrap();
    for i in 0..3 {
        rings[RX].push(&machine, &[writable(BUFFERS + 0x1000 * i, 300)]);
        rings[RX].kick(&machine);
        machine.settle();
        assert_eq!(
            rings[RX].poll_used(&machine),
            None,
            "delivered into {} buffers",
            i + 1
        );
    }
    rings[RX].push(&machine, &[writable(BUFFERS + 0x3000, 300)]);
    rings[RX].kick(&machine);
    let lens: Vec<_> = (0..4).map(|_| rings[RX].wait_used(&machine).1).collect();
    assert_eq!(lens, [300, 300, 300, 112]);
}

#[test]
fn packets_that_are_none_are_dropped_and_the_queue_goes_on() {
    let (machine, mut rings) = net();
    for len in [0, 1, 12, 200_000] {
        rings[TX].push(&machine, &[readable(BUFFERS, len)]);
        rings[TX].kick(&machine);
        rings[TX].wait_used(&machine);
    }
    machine.fill(BUFFERS, &packet(10, 4));
    rings[TX].push(&machine, &[readable(BUFFERS, 22)]);
    rings[TX].kick(&machine);
    rings[TX].wait_used(&machine);
    let mut received = [0; 100];
    assert_eq!(machine.wire.recv(&mut received).unwrap(), 22);
    assert!(!machine.needs_reset(NET));
}

#[test]
fn both_directions_go_on_after_a_restore() {
    let (mut machine, mut rings) = net();
    machine.set.freeze();
    machine.fill(BUFFERS, &packet(64, 8));
    rings[TX].push(&machine, &[readable(BUFFERS, 76)]);
    rings[TX].kick(&machine);
    rings[RX].push(&machine, &[writable(BUFFERS + 0x1000, 2048)]);
    rings[RX].kick(&machine);
    let machine = machine.into_restored();
    let mut received = [0; 100];
    assert_eq!(machine.wire.recv(&mut received).unwrap(), 76);
    rings[TX].wait_used(&machine);
    machine.wire.send(&packet(30, 1)).unwrap();
    assert_eq!(rings[RX].wait_used(&machine).1, 42);
}

#[test]
fn a_receive_buffer_without_room_for_the_header_needs_a_reset() {
    let (machine, mut rings) = net();
    rings[RX].push(&machine, &[writable(BUFFERS, 4)]);
    rings[RX].kick(&machine);
    machine.wire.send(&packet(30, 1)).unwrap();
    machine.wait_interrupt(NET);
    assert!(machine.needs_reset(NET));
}
