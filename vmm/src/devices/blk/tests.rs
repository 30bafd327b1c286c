//! Disk: data, ranges, generations, damage.

use proptest::prelude::*;

use super::{S_IOERR, S_OK, S_UNSUPP, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES};
use crate::devices::testing::{
    BASE_BYTES, BLK, BUFFERS, Buffer, DISK_BYTES, F_INDIRECT, F_NEXT, F_WRITE, Machine, Ring, base_byte,
    readable, start, writable,
};

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

fn header(machine: &Machine, kind: u32, sector: u64) -> Buffer {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    machine.fill(HEADER, &bytes);
    machine.fill(STATUS, &[0xaa]);
    readable(HEADER, 16)
}

/// Does a request and returns its status.
fn request(machine: &Machine, ring: &mut Ring, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
    let mut chain = vec![header(machine, kind, sector)];
    chain.extend(data);
    chain.push(writable(STATUS, 1));
    ring.push(machine, &chain);
    ring.kick(machine);
    ring.wait_used(machine);
    machine.bytes(STATUS, 1)[0]
}

fn write(machine: &Machine, ring: &mut Ring, sector: u64, data: &[u8]) -> u8 {
    machine.fill(DATA, data);
    request(
        machine,
        ring,
        T_OUT,
        sector,
        &[readable(DATA, u32::try_from(data.len()).unwrap())],
    )
}

fn read(machine: &Machine, ring: &mut Ring, sector: u64, len: usize) -> Vec<u8> {
    machine.fill(DATA, &vec![0xee; len]);
    let data = writable(DATA, u32::try_from(len).unwrap());
    assert_eq!(request(machine, ring, T_IN, sector, &[data]), S_OK);
    machine.bytes(DATA, len)
}

fn range(machine: &Machine, ring: &mut Ring, kind: u32, sector: u64, n_sectors: u32, flags: u32) -> u8 {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(n_sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    machine.fill(DATA, &bytes);
    request(machine, ring, kind, 0, &[readable(DATA, 16)])
}

fn disk() -> (Machine, Ring) {
    let machine = Machine::new();
    let ring = start(&machine, BLK).remove(0);
    (machine, ring)
}

#[test]
fn the_base_is_read_through_and_past_it_are_zeros() {
    let (machine, mut ring) = disk();
    assert_eq!(u64::from(machine.read32(BLK, 0x100)) * 512, DISK_BYTES);
    let expected: Vec<u8> = (5 * 512..9 * 512).map(base_byte).collect();
    assert_eq!(read(&machine, &mut ring, 5, 2048), expected);
    assert_eq!(
        read(&machine, &mut ring, BASE_BYTES / 512 + 3, 4096),
        vec![0; 4096]
    );
}

#[test]
fn writes_are_read_back_also_after_a_restore_and_do_not_touch_the_base() {
    let (machine, mut ring) = disk();
    assert_eq!(write(&machine, &mut ring, 7, &[0x77; 1536]), S_OK);
    let machine = machine.into_restored();
    assert_eq!(read(&machine, &mut ring, 7, 1536), vec![0x77; 1536]);
    assert_eq!(
        read(&machine, &mut ring, 10, 512),
        (5120..5632).map(base_byte).collect::<Vec<_>>()
    );
    let base = std::fs::read(machine.dir.path().join("base")).unwrap();
    assert_eq!(base, (0..BASE_BYTES).map(base_byte).collect::<Vec<_>>());
}

#[test]
fn data_may_be_scattered_and_its_header_and_status_too() {
    let (machine, mut ring) = disk();
    header(&machine, T_OUT, 3);
    machine.fill(DATA, &[1; 300]);
    machine.fill(DATA + 0x2000, &[2; 724]);
    let chain = [
        readable(HEADER, 5),
        readable(HEADER + 5, 11),
        readable(DATA, 300),
        readable(DATA + 0x2000, 0),
        readable(DATA + 0x2000, 724),
        writable(STATUS, 1),
    ];
    ring.push(&machine, &chain);
    ring.kick(&machine);
    assert_eq!(ring.wait_used(&machine).1, 1);
    assert_eq!(machine.bytes(STATUS, 1), [S_OK]);
    assert_eq!(
        read(&machine, &mut ring, 3, 1024),
        [vec![1; 300], vec![2; 724]].concat()
    );
}

#[test]
fn the_used_length_of_a_read_counts_data_and_status() {
    let (machine, mut ring) = disk();
    let head = header(&machine, T_IN, 0);
    ring.push(&machine, &[head, writable(DATA, 1024), writable(STATUS, 1)]);
    ring.kick(&machine);
    assert_eq!(ring.wait_used(&machine).1, 1025);
}

#[test]
fn requests_past_the_end_or_of_odd_length_fail_and_the_next_one_works() {
    let (machine, mut ring) = disk();
    let sectors = DISK_BYTES / 512;
    for (sector, len) in [
        (sectors, 512),
        (sectors - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 100),
    ] {
        assert_eq!(
            request(&machine, &mut ring, T_IN, sector, &[writable(DATA, len)]),
            S_IOERR
        );
        assert_eq!(
            request(&machine, &mut ring, T_OUT, sector, &[readable(DATA, len)]),
            S_IOERR
        );
    }
    assert_eq!(
        request(&machine, &mut ring, T_IN, 0, &[writable(DATA, 5 << 20)]),
        S_IOERR
    );
    assert_eq!(range(&machine, &mut ring, T_DISCARD, sectors, 1, 0), S_IOERR);
    assert_eq!(range(&machine, &mut ring, T_DISCARD, 0, u32::MAX, 0), S_IOERR);
    assert_eq!(
        range(&machine, &mut ring, T_WRITE_ZEROES, u64::MAX, 2, 0),
        S_IOERR
    );
    assert_eq!(
        machine.set.disk_generation(),
        0,
        "a refused write raised the generation"
    );
    assert_eq!(write(&machine, &mut ring, sectors - 1, &[9; 512]), S_OK);
}

#[test]
fn unknown_requests_are_unsupported_and_the_disk_has_a_name() {
    let (machine, mut ring) = disk();
    assert_eq!(request(&machine, &mut ring, 99, 0, &[]), S_UNSUPP);
    assert_eq!(range(&machine, &mut ring, T_DISCARD, 0, 1, 1), S_UNSUPP);
    assert_eq!(
        request(&machine, &mut ring, T_GET_ID, 0, &[writable(DATA, 20)]),
        S_OK
    );
    assert_eq!(&machine.bytes(DATA, 11), b"torpor-disk");
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_not_as_the_base() {
    let (machine, mut ring) = disk();
    assert_eq!(write(&machine, &mut ring, 0, &[5; 4096]), S_OK);
    assert_eq!(range(&machine, &mut ring, T_DISCARD, 0, 256, 0), S_OK);
    assert_eq!(range(&machine, &mut ring, T_WRITE_ZEROES, 300, 3, 0), S_OK);
    assert_eq!(range(&machine, &mut ring, T_WRITE_ZEROES, 310, 3, 1), S_OK);
    for (sector, len) in [(0, 256 * 512), (300, 3 * 512), (310, 3 * 512)] {
        assert_eq!(read(&machine, &mut ring, sector, len), vec![0; len]);
    }
    assert_eq!(
        read(&machine, &mut ring, 299, 512),
        (299 * 512..300 * 512).map(base_byte).collect::<Vec<_>>()
    );
    assert_eq!(
        read(&machine, &mut ring, 303, 512),
        (303 * 512..304 * 512).map(base_byte).collect::<Vec<_>>()
    );
}

#[test]
fn the_generation_rises_once_between_freezes_and_before_the_first_change_only() {
    let (machine, mut ring) = disk();
    let path = machine.dir.path().join("disk.gen");
    read(&machine, &mut ring, 0, 512);
    assert_eq!(request(&machine, &mut ring, T_FLUSH, 0, &[]), S_OK);
    assert_eq!(
        (machine.set.disk_generation(), std::fs::read(&path).unwrap().len()),
        (0, 0)
    );
    for _ in 0..3 {
        assert_eq!(write(&machine, &mut ring, 0, &[1; 512]), S_OK);
    }
    assert_eq!(machine.set.disk_generation(), 1);
    let mut expected = 1_u64.to_le_bytes().to_vec();
    expected.extend(crc32c::crc32c(&1_u64.to_le_bytes()).to_le_bytes());
    expected.extend([0; 4]);
    assert_eq!(std::fs::read(&path).unwrap(), expected);
    let machine = machine.into_restored();
    read(&machine, &mut ring, 0, 512);
    assert_eq!(machine.set.disk_generation(), 1);
    assert_eq!(range(&machine, &mut ring, T_DISCARD, 0, 1, 0), S_OK);
    assert_eq!(machine.set.disk_generation(), 2);
}

#[test]
fn the_generation_rises_again_with_the_first_change_after_every_freeze() {
    let (mut machine, mut ring) = disk();
    assert_eq!(write(&machine, &mut ring, 0, &[1; 512]), S_OK);
    assert_eq!(machine.set.disk_generation(), 1);
    machine.set.freeze();
    machine.set.thaw();
    read(&machine, &mut ring, 0, 512);
    machine.set.freeze();
    assert_eq!(machine.set.disk_generation(), 1, "it rose without a change");
    machine.set.thaw();
    for _ in 0..2 {
        assert_eq!(write(&machine, &mut ring, 0, &[2; 512]), S_OK);
    }
    assert_eq!(machine.set.disk_generation(), 2);
    let file = std::fs::read(machine.dir.path().join("disk.gen")).unwrap();
    assert_eq!(file[..8], 2_u64.to_le_bytes());
}

#[test]
fn a_generation_that_was_written_but_is_not_durable_is_raised_again() {
    // Takes writes and has no fdatasync.
    let null = crate::devices::testing::open(std::path::Path::new("/dev/null"));
    let mut generation = super::Generation::read(null).unwrap();
    assert!(generation.raise().is_err());
    assert_eq!(generation.value(), 1);
    assert!(generation.raise().is_err(), "it passed as durable");
    assert_eq!(generation.value(), 2);
}

#[test]
fn a_damaged_generation_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gen");
    for bytes in [vec![1; 16], vec![0; 16], vec![0; 3]] {
        std::fs::write(&path, &bytes).unwrap();
        assert!(
            super::Generation::read(crate::devices::testing::open(&path)).is_err(),
            "{bytes:?}"
        );
    }
}

#[test]
fn a_write_fails_when_the_generation_cannot_be_raised() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gen");
    std::fs::write(&path, b"").unwrap();
    let mut generation = super::Generation::read(std::fs::File::open(&path).unwrap()).unwrap();
    assert!(generation.raise().is_err(), "a read-only file was raised");
    assert_eq!(generation.value(), 0);
}

#[test]
fn an_indirect_chain_works() {
    let (machine, mut ring) = disk();
    header(&machine, T_IN, 1);
    let table = DATA + 0x10_0000;
    let parts = [
        (HEADER, 16_u32, F_NEXT, 1_u16),
        (DATA, 512, F_NEXT | F_WRITE, 2),
        (STATUS, 1, F_WRITE, 0),
    ];
    for (i, (gpa, len, flags, next)) in (0_u64..).zip(parts) {
        let mut bytes = gpa.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        machine.fill(table + 16 * i, &bytes);
    }
    ring.write_desc(&machine, 0, table, 48, F_INDIRECT, 0);
    ring.push_head(&machine, 0);
    ring.kick(&machine);
    assert_eq!(ring.wait_used(&machine).1, 513);
    assert_eq!(
        machine.bytes(DATA, 512),
        (512..1024).map(base_byte).collect::<Vec<_>>()
    );
}

/// Pushes one descriptor chain by hand and expects the device to give up.
fn breaks(describe: impl FnOnce(&Machine, &Ring)) {
    let (machine, mut ring) = disk();
    header(&machine, T_IN, 0);
    describe(&machine, &ring);
    ring.push_head(&machine, 0);
    machine.write32(BLK, 0x50, 0);
    machine.wait_interrupt(BLK);
    assert!(machine.needs_reset(BLK));
    assert_eq!(ring.poll_used(&machine), None);
}

#[test]
fn hostile_chains_need_a_reset() {
    // A loop; next out of the table; out of memory; wrapping; readable after writable; no status; no header.
    breaks(|machine, ring| {
        ring.write_desc(machine, 0, HEADER, 16, F_NEXT, 1);
        ring.write_desc(machine, 1, DATA, 16, F_NEXT, 0);
    });
    breaks(|machine, ring| ring.write_desc(machine, 0, HEADER, 16, F_NEXT, 4000));
    breaks(|machine, ring| {
        // Would be a good request if its end were one.
        ring.write_desc(machine, 0, HEADER, 16, F_NEXT, 1);
        ring.write_desc(machine, 1, DATA, 513, F_NEXT | F_WRITE, 4000);
    });
    breaks(|machine, ring| ring.write_desc(machine, 0, u64::MAX - 8, 16, F_WRITE, 0));
    breaks(|machine, ring| ring.write_desc(machine, 0, 1 << 40, 16, 0, 0));
    breaks(|machine, ring| ring.write_desc(machine, 0, DATA, u32::MAX, F_WRITE, 0));
    breaks(|machine, ring| {
        ring.write_desc(machine, 0, DATA, 16, F_NEXT | F_WRITE, 1);
        ring.write_desc(machine, 1, HEADER, 16, 0, 0);
    });
    breaks(|machine, ring| ring.write_desc(machine, 0, HEADER, 16, 0, 0));
    breaks(|machine, ring| ring.write_desc(machine, 0, STATUS, 1, F_WRITE, 0));
    breaks(|machine, ring| ring.write_desc(machine, 0, DATA, 0, 0, 0));
    breaks(|machine, ring| ring.write_desc(machine, 0, DATA, 17, F_INDIRECT, 0));
    breaks(|machine, ring| ring.write_desc(machine, 0, DATA, 0, F_INDIRECT, 0));
    breaks(|machine, ring| {
        // An indirect table that names itself.
        ring.write_desc(machine, 0, ring.desc, 16, F_INDIRECT, 0);
    });
}

#[test]
fn requests_left_in_the_ring_are_done_after_a_restore() {
    let (mut machine, mut ring) = disk();
    machine.set.freeze();
    machine.fill(DATA, &[0x42; 512]);
    let head = header(&machine, T_OUT, 20);
    ring.push(&machine, &[head, readable(DATA, 512), writable(STATUS, 1)]);
    ring.kick(&machine);
    assert_eq!(ring.poll_used(&machine), None, "a frozen device took a request");
    let machine = machine.into_restored();
    ring.wait_used(&machine);
    assert_eq!(machine.bytes(STATUS, 1), [S_OK]);
    assert_eq!(read(&machine, &mut ring, 20, 512), vec![0x42; 512]);
}

#[test]
fn requests_of_a_cancelled_pause_are_done_at_the_thaw() {
    let (mut machine, mut ring) = disk();
    machine.set.freeze();
    let head = header(&machine, T_IN, 0);
    ring.push(&machine, &[head, writable(DATA, 512), writable(STATUS, 1)]);
    ring.kick(&machine);
    machine.set.flush_disk().unwrap();
    machine.set.thaw();
    assert_eq!(ring.wait_used(&machine).1, 513);
}

#[test]
fn a_flush_of_a_pause_may_come_when_the_guest_runs_again_and_has_its_writes() {
    let (mut machine, mut ring) = disk();
    assert_eq!(write(&machine, &mut ring, 7, &[0x77; 512]), S_OK);
    machine.set.freeze();
    let flush = machine.set.disk_flush();
    machine.set.thaw();
    assert_eq!(write(&machine, &mut ring, 8, &[0x88; 512]), S_OK);
    let overlay = std::thread::spawn(flush).join().unwrap().unwrap().unwrap();
    overlay.sync_data().unwrap();
    // Whoever opens the files now sees them as after a power cut.
    let open = |name: &str| crate::devices::testing::open(&machine.dir.path().join(name));
    let twin = super::Disk::open(open("base"), open("overlay")).unwrap();
    let mut bytes = [0; 1024];
    twin.read_to_slice(&mut bytes, 7 * 512);
    assert_eq!(bytes, [[0x77; 512], [0x88; 512]].concat()[..]);
}

#[test]
fn an_overlay_smaller_than_its_base_is_refused() {
    let file = tempfile::tempfile().unwrap();
    assert!(super::create_overlay(4096, file.try_clone().unwrap(), 2048).is_err());
    assert!(super::create_overlay(0, file, 1000).is_err());
}

#[derive(Debug, Clone)]
enum Op {
    Write { sector: u64, n_sectors: u64, byte: u8 },
    Zero { kind: u32, sector: u64, n_sectors: u64 },
    Read { sector: u64, n_sectors: u64 },
    Flush,
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let place = || (0..DISK_BYTES / 512, 1_u64..200).prop_map(|(s, n)| (s, n.min(DISK_BYTES / 512 - s)));
    let op = prop_oneof![
        4 => (place(), any::<u8>()).prop_map(|((sector, n_sectors), byte)| Op::Write { sector, n_sectors, byte }),
        2 => (place(), prop_oneof![Just(T_DISCARD), Just(T_WRITE_ZEROES)])
            .prop_map(|((sector, n_sectors), kind)| Op::Zero { kind, sector, n_sectors }),
        2 => place().prop_map(|(sector, n_sectors)| Op::Read { sector, n_sectors }),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ];
    prop::collection::vec(op, 1..40)
}

fn span(sector: u64, n_sectors: u64) -> std::ops::Range<usize> {
    let start = usize::try_from(sector * 512).unwrap();
    start..start + usize::try_from(n_sectors * 512).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn random_requests_leave_the_disk_as_the_model_has_it(ops in ops()) {
        let (mut machine, mut ring) = disk();
        let mut model: Vec<u8> = (0..BASE_BYTES).map(base_byte).collect();
        model.resize(usize::try_from(DISK_BYTES).unwrap(), 0);
        for op in ops {
            match op {
                Op::Write { sector, n_sectors, byte } => {
                    let data: Vec<u8> = (0..n_sectors * 512).map(|i| base_byte(i).wrapping_add(byte)).collect();
                    prop_assert_eq!(write(&machine, &mut ring, sector, &data), S_OK);
                    model[span(sector, n_sectors)].copy_from_slice(&data);
                }
                Op::Zero { kind, sector, n_sectors } => {
                    let n = u32::try_from(n_sectors).unwrap();
                    prop_assert_eq!(range(&machine, &mut ring, kind, sector, n, 0), S_OK);
                    model[span(sector, n_sectors)].fill(0);
                }
                Op::Read { sector, n_sectors } => {
                    let span = span(sector, n_sectors);
                    let data = read(&machine, &mut ring, sector, span.len());
                    prop_assert!(data == model[span], "read of sector {} differs", sector);
                }
                Op::Flush => prop_assert_eq!(request(&machine, &mut ring, T_FLUSH, 0, &[]), S_OK),
                Op::Reopen => machine = machine.into_restored(),
            }
        }
        machine = machine.into_restored();
        for sector in (0..DISK_BYTES / 512).step_by(1024) {
            let span = span(sector, 1024);
            let data = read(&machine, &mut ring, sector, span.len());
            prop_assert!(data == model[span], "1024 sectors at {} differ", sector);
        }
    }
}
