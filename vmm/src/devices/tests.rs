//! All devices together: damage in any ring, and pauses under load.

use proptest::prelude::*;

use super::testing::{BUFFERS, Machine, readable, start, writable};

/// A descriptor that is wrong in some way, or not.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let gpa = prop_oneof![
        4 => (0_u64..64).prop_map(|page| BUFFERS + page * 4096),
        1 => 0_u64..0x80_0000,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0_u32..5000, 1 => any::<u32>()];
    (gpa, len, 0_u16..8, prop_oneof![8 => 0_u16..16, 1 => any::<u16>()])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn damaged_rings_never_panic_or_hang(
        device in 0_u64..5,
        queue: prop::sample::Index,
        descriptors in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(0_u16..18, 1..16),
        payload in prop::collection::vec(any::<u8>(), 4096),
        index: Option<u16>,
    ) {
        let mut machine = Machine::new();
        let mut rings = start(&machine, device);
        let ring = queue.get(&rings).clone();
        let ring = &mut rings[usize::try_from(ring.index).unwrap()];
        for page in 0..64 {
            machine.fill(BUFFERS + page * 4096, &payload);
        }
        for (i, &(gpa, len, flags, next)) in (0..).zip(&descriptors) {
            ring.write_desc(&machine, i, gpa, len, flags, next);
        }
        for head in heads {
            ring.push_head(&machine, head);
        }
        if let Some(index) = index {
            machine.fill(ring.avail + 2, &index.to_le_bytes());
        }
        machine.write32(device, 0x50, ring.index);
        machine.settle();
        // Whatever became of it, a reset makes the device new.
        start(&machine, device);
        prop_assert!(!machine.needs_reset(device));
    }
}

#[test]
fn a_thousand_freezes_under_load_lose_nothing() {
    let mut machine = Machine::new();
    let mut ring = start(&machine, super::testing::RNG).remove(0);
    for _ in 0..1000 {
        let head = ring.push(&machine, &[writable(BUFFERS, 16)]);
        ring.kick(&machine);
        machine.set.freeze();
        machine.set.thaw();
        assert_eq!(ring.wait_used(&machine), (head, 16));
    }
}

#[test]
fn requests_that_come_just_as_the_device_stops_looking_are_served() {
    // Each request is made the instant the one before is done, which is when the device asks for kicks again.
    for device in [super::testing::BLK, super::testing::RNG] {
        let machine = Machine::new();
        let mut ring = start(&machine, device).remove(0);
        machine.fill(BUFFERS, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let name = writable(BUFFERS + 64, 21);
        let chain = [readable(BUFFERS, 16), name];
        for _ in 0..60_000 {
            ring.push(&machine, &chain);
            ring.kick(&machine);
            let mut n_looks = 0;
            while ring.poll_used(&machine).is_none() {
                n_looks += 1;
                if n_looks > 1000 {
                    ring.wait_used(&machine);
                    break;
                }
            }
        }
    }
}

#[test]
fn a_frozen_set_does_not_touch_memory() {
    let mut machine = Machine::new();
    let mut ring = start(&machine, super::testing::RNG).remove(0);
    machine.settle();
    machine.set.freeze();
    ring.push(&machine, &[writable(BUFFERS, 64)]);
    ring.kick(&machine);
    let _client = machine.connect_vsock();
    machine.wire.send(&[0; 100]).unwrap();
    assert_eq!(machine.bytes(BUFFERS, 64), vec![0; 64]);
    assert_eq!(ring.poll_used(&machine), None);
    machine.set.thaw();
    assert_eq!(ring.wait_used(&machine).1, 64);
}
