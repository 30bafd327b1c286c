//! Balloon: what the guest gives back is discarded, whole pages of memory only.

use crate::devices::testing::{BALLOON, BUFFERS, MEMORY_BYTES, Machine, readable, start, writable};

#[test]
fn inflated_pages_are_discarded_in_runs() {
    let machine = Machine::new();
    let mut rings = start(&machine, BALLOON);
    let pfns: Vec<u8> = [0x1000_u32, 0x1001, 0x1002, 0x1010]
        .iter()
        .flat_map(|pfn| pfn.to_le_bytes())
        .collect();
    machine.fill(BUFFERS, &pfns);
    rings[0].push(&machine, &[readable(BUFFERS, 16)]);
    rings[0].kick(&machine);
    rings[0].wait_used(&machine);
    assert_eq!(
        *machine.discarded.lock().unwrap(),
        [(0x100_0000, 0x3000), (0x101_0000, 0x1000)]
    );
    rings[1].push(&machine, &[readable(BUFFERS, 16)]);
    rings[1].kick(&machine);
    rings[1].wait_used(&machine);
    assert_eq!(
        machine.discarded.lock().unwrap().len(),
        2,
        "deflating discards nothing"
    );
}

#[test]
fn pages_outside_of_memory_are_not_discarded() {
    let machine = Machine::new();
    let mut rings = start(&machine, BALLOON);
    let end = u32::try_from(MEMORY_BYTES / 4096).unwrap();
    let pfns: Vec<u8> = [end, u32::MAX, end - 1]
        .iter()
        .flat_map(|pfn| pfn.to_le_bytes())
        .collect();
    machine.fill(BUFFERS, &pfns);
    rings[0].push(&machine, &[readable(BUFFERS, 12)]);
    rings[0].kick(&machine);
    rings[0].wait_used(&machine);
    assert_eq!(
        *machine.discarded.lock().unwrap(),
        [(u64::from(end - 1) * 4096, 4096)]
    );
}

#[test]
fn reported_ranges_are_discarded_without_their_ragged_edges() {
    let machine = Machine::new();
    let mut rings = start(&machine, BALLOON);
    rings[2].push(
        &machine,
        &[
            writable(BUFFERS, 0x20_0000),
            writable(BUFFERS + 0x30_0100, 0x2000),
        ],
    );
    rings[2].kick(&machine);
    rings[2].wait_used(&machine);
    assert_eq!(
        *machine.discarded.lock().unwrap(),
        [(BUFFERS, 0x20_0000), (BUFFERS + 0x30_1000, 0x1000)]
    );
}

#[test]
fn the_guest_sees_a_new_target_and_its_answer_survives_a_restore() {
    let machine = Machine::new();
    start(&machine, BALLOON);
    let generation = machine.read32(BALLOON, 0xfc);
    machine.set.set_balloon_target(77);
    machine.wait_interrupt(BALLOON);
    assert_ne!(machine.read32(BALLOON, 0xfc), generation);
    assert_eq!(machine.read32(BALLOON, 0x100), 77);
    machine.write32(BALLOON, 0x104, 76);
    let machine = machine.into_restored();
    assert_eq!(machine.read32(BALLOON, 0x100), 77);
    assert_eq!(machine.read32(BALLOON, 0x104), 76);
}
