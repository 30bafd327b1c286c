//! Console: output reaches the log, bounded; registers survive a restore.

use std::io::Write;

use super::{BASE_PORT, ConsoleLog, MARKER};
use crate::devices::testing::{Machine, open};

fn print(machine: &Machine, text: &[u8]) {
    for &byte in text {
        machine.set.pio_write(BASE_PORT, &[byte]);
    }
}

#[test]
fn output_reaches_the_log_by_line_and_the_rest_at_a_flush() {
    let mut machine = Machine::new();
    let path = machine.dir.path().join("console.log");
    print(&machine, b"booting\nlogin: ");
    assert_eq!(std::fs::read(&path).unwrap(), b"booting\n");
    machine.set.freeze();
    machine.set.flush_disk().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"booting\nlogin: ");
}

#[test]
fn a_full_log_ends_with_one_marker_and_never_exceeds_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    for _ in 0..3 {
        let mut log = ConsoleLog::new(open(&path), 1000).unwrap();
        for i in 0..100 {
            writeln!(log, "line {i:05}").unwrap();
        }
    }
    let written = std::fs::read(&path).unwrap();
    assert!(written.len() <= 1000);
    assert!(written.len() > 900, "only {} bytes used", written.len());
    assert!(written.ends_with(MARKER));
    assert_eq!(
        written
            .windows(MARKER.len())
            .filter(|window| *window == MARKER)
            .count(),
        1
    );
}

#[test]
fn accesses_of_odd_width_and_other_ports_do_nothing() {
    let machine = Machine::new();
    let mut word = [0; 2];
    machine.set.pio_read(BASE_PORT, &mut word);
    assert_eq!(word, [0xff, 0xff]);
    machine.set.pio_write(BASE_PORT, b"ab");
    machine.set.pio_write(BASE_PORT + 8, b"\n");
    machine.set.pio_write(0, b"\n");
    machine.set.pio_read(u16::MAX, &mut []);
    assert_eq!(
        std::fs::read(machine.dir.path().join("console.log")).unwrap(),
        b""
    );
}

#[test]
fn registers_survive_a_restore_and_the_log_goes_on() {
    let machine = Machine::new();
    machine.set.pio_write(BASE_PORT + 7, &[0x5a]);
    machine.set.pio_write(BASE_PORT + 1, &[0x02]);
    print(&machine, b"before\n");
    let machine = machine.into_restored();
    let mut scratch = [0];
    machine.set.pio_read(BASE_PORT + 7, &mut scratch);
    assert_eq!(scratch, [0x5a]);
    print(&machine, b"after\n");
    assert_eq!(
        std::fs::read(machine.dir.path().join("console.log")).unwrap(),
        b"before\nafter\n"
    );
}

#[test]
fn the_transmitter_interrupt_is_raised() {
    let machine = Machine::new();
    machine.set.pio_write(BASE_PORT + 1, &[0x02]);
    print(&machine, b"x");
    assert!(machine.set.console.line().read().unwrap() >= 1);
}
