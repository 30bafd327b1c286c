//! Entropy device: buffers get random bytes, within bounds.

use crate::devices::testing::{BUFFERS, Machine, RNG, start, writable};

#[test]
fn a_buffer_is_filled_with_random_bytes() {
    let machine = Machine::new();
    let mut ring = start(&machine, RNG).remove(0);
    ring.push(&machine, &[writable(BUFFERS, 32), writable(BUFFERS + 4096, 32)]);
    ring.kick(&machine);
    assert_eq!(ring.wait_used(&machine).1, 64);
    let (first, second) = (machine.bytes(BUFFERS, 32), machine.bytes(BUFFERS + 4096, 32));
    assert_ne!(first, vec![0; 32]);
    assert_ne!(first, second);
}

#[test]
fn a_request_of_a_whole_memory_gets_64_kib() {
    let machine = Machine::new();
    let mut ring = start(&machine, RNG).remove(0);
    ring.push(&machine, &[writable(BUFFERS, 8 << 20)]);
    ring.kick(&machine);
    assert_eq!(ring.wait_used(&machine).1, 64 << 10);
    assert_eq!(machine.bytes(BUFFERS + (64 << 10), 64), vec![0; 64]);
}

#[test]
fn more_requests_than_the_ring_holds_are_all_served() {
    let machine = Machine::new();
    let mut ring = start(&machine, RNG).remove(0);
    for _ in 0..300 {
        let head = ring.push(&machine, &[writable(BUFFERS, 16)]);
        ring.kick(&machine);
        assert_eq!(ring.wait_used(&machine), (head, 16));
    }
}
