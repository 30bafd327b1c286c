//! Registers: the driver's steps in order, and nothing else.

use proptest::prelude::*;

use crate::devices::testing::{BALLOON, BLK, BUFFERS, MEMORY_BYTES, Machine, RNG, start, writable};
use crate::devices::{DevicesState, MMIO_BASE, MMIO_STRIDE};

#[test]
fn five_devices_say_who_they_are() {
    let machine = Machine::new();
    let infos = machine.set.mmio_devices();
    let found: Vec<_> = infos.iter().map(|info| (info.gpa, info.gsi, info.id)).collect();
    assert_eq!(
        found,
        [
            (0xd000_0000, 5, 2),
            (0xd000_1000, 6, 1),
            (0xd000_2000, 7, 19),
            (0xd000_3000, 8, 4),
            (0xd000_4000, 9, 5)
        ]
    );
    for (device, info) in (0..).zip(infos) {
        assert_eq!(machine.read32(device, 0), 0x7472_6976);
        assert_eq!(machine.read32(device, 4), 2);
        assert_eq!(machine.read32(device, 8), info.id);
    }
}

#[test]
fn features_that_are_not_offered_or_without_version_1_are_refused() {
    let machine = Machine::new();
    for (low, high) in [(0, 0), (1 << 20, 1), (0, 3)] {
        machine.write32(RNG, 0x70, 0);
        machine.write32(RNG, 0x70, 3);
        machine.write32(RNG, 0x24, 0);
        machine.write32(RNG, 0x20, low);
        machine.write32(RNG, 0x24, 1);
        machine.write32(RNG, 0x20, high);
        machine.write32(RNG, 0x70, 11);
        assert_eq!(machine.status(RNG), 3, "features {low:#x} {high:#x}");
        machine.write32(RNG, 0x70, 15);
        assert_eq!(machine.status(RNG), 3, "a driver ran without features");
    }
}

#[test]
fn rings_outside_of_memory_do_not_get_ready() {
    let machine = Machine::new();
    start(&machine, RNG);
    machine.write32(RNG, 0x70, 0);
    machine.write32(RNG, 0x70, 3);
    machine.write32(RNG, 0x24, 1);
    machine.write32(RNG, 0x20, 1);
    machine.write32(RNG, 0x70, 11);
    let end = u32::try_from(MEMORY_BYTES).unwrap();
    for used in [end - 16, end, u32::MAX - 3] {
        machine.write32(RNG, 0x80, 0x1000);
        machine.write32(RNG, 0x90, 0x2000);
        machine.write32(RNG, 0xa0, used);
        machine.write32(RNG, 0x44, 1);
        assert_eq!(machine.read32(RNG, 0x44), 0, "used ring at {used:#x}");
    }
}

#[test]
fn a_running_driver_cannot_move_its_rings() {
    let machine = Machine::new();
    let mut ring = start(&machine, RNG).remove(0);
    machine.write32(RNG, 0x30, 0);
    machine.write32(RNG, 0x44, 0);
    machine.write32(RNG, 0x80, 0x7000);
    assert_eq!(machine.read32(RNG, 0x44), 1);
    ring.push(&machine, &[writable(BUFFERS, 8)]);
    ring.kick(&machine);
    assert_eq!(ring.wait_used(&machine).1, 8);
}

#[test]
fn a_reset_makes_a_broken_device_usable_again() {
    let mut machine = Machine::new();
    let mut ring = start(&machine, RNG).remove(0);
    ring.push_head(&machine, 9999);
    machine.write32(RNG, 0x50, 0);
    machine.wait_interrupt(RNG);
    assert!(machine.needs_reset(RNG));
    machine.settle();
    let mut ring = start(&machine, RNG).remove(0);
    assert!(!machine.needs_reset(RNG));
    ring.push(&machine, &[writable(BUFFERS, 8)]);
    ring.kick(&machine);
    assert_eq!(ring.wait_used(&machine).1, 8);
}

#[test]
fn odd_widths_and_addresses_read_as_zero() {
    let machine = Machine::new();
    let mut data = [0xff; 8];
    machine.set.mmio_read(MMIO_BASE, &mut data);
    assert_eq!(data, [0; 8]);
    let mut word = [0xff; 4];
    machine.set.mmio_read(MMIO_BASE + 5 * MMIO_STRIDE, &mut word);
    assert_eq!(word, [0; 4]);
    machine.set.mmio_write(0, &word);
    machine.set.mmio_write(u64::MAX, &word);
    machine.set.mmio_write(MMIO_BASE + 0x70, &[1]);
    assert_eq!(machine.status(BLK), 0);
    let mut capacity = [0xff; 16];
    machine.set.mmio_read(MMIO_BASE + 0xfff, &mut capacity);
    assert_eq!(capacity, [0; 16]);
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let machine = Machine::new();
    start(&machine, BALLOON);
    start(&machine, RNG);
    let refused = |change: &dyn Fn(&mut DevicesState)| {
        let mut other = Machine::over(machine.memory.clone(), machine.dir.clone());
        let mut state = machine.set.save();
        change(&mut state);
        assert!(other.set.restore(&state).is_err());
    };
    refused(&|state| {
        state.transports.pop();
    });
    refused(&|state| state.transports.swap(0, 1));
    refused(&|state| state.transports[3].status = 0x4000_0000);
    refused(&|state| state.transports[3].driver_features = u64::MAX);
    refused(&|state| state.transports[3].driver_features = 0);
    refused(&|state| state.transports[3].status &= !8);
    refused(&|state| {
        state.transports[4]
            .queues
            .swap_remove(0)
            .clone_into(&mut state.transports[3].queues[0])
    });
    refused(&|state| state.transports[4].queues.clear());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn random_register_accesses_never_panic_or_hang(
        writes in prop::collection::vec((0_u64..5, 0_u64..0x140, any::<u32>(), any::<bool>()), 1..200)
    ) {
        let mut machine = Machine::new();
        for (device, offset, value, step) in writes {
            if step {
                // On its way to a running device now and then, or random writes would not get there.
                start(&machine, device);
            }
            machine.write32(device, offset & !3, value);
            machine.read32(device, offset);
        }
        machine.settle();
    }

    #[test]
    fn random_state_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400), at in 0_usize..400, byte: u8) {
        if let Ok(state) = postcard::from_bytes::<DevicesState>(&bytes) {
            let mut machine = Machine::new();
            let _refused = machine.set.restore(&state);
        }
        let machine = Machine::new();
        start(&machine, RNG);
        start(&machine, BLK);
        let mut bytes = postcard::to_stdvec(&machine.set.save()).unwrap();
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(state) = postcard::from_bytes::<DevicesState>(&bytes) {
            let mut other = Machine::over(machine.memory.clone(), machine.dir.clone());
            if other.set.restore(&state).is_ok() {
                other.set.resume_after_restore();
                other.settle();
            }
        }
    }
}
