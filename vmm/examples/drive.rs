//! Boots, freezes, persists, kills and restores a machine by hand, and prints what it took.
//!
//! `drive VMM KERNEL ROOTFS [MEM_MIB] [VCPUS] [CYCLES] [EXTRA CMDLINE]`

#![allow(
    clippy::expect_used,
    reason = "a tool for the hand ends where something fails"
)]

#[path = "../tests/kvm/driver.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod driver;
#[path = "../tests/kvm/sys.rs"]
mod sys;

use driver::{Machine, Vmm};
use std::path::PathBuf;
use std::time::Instant;
use torpor_api::vmm::{Request, Shape};

const SCRIPT: &str = "n=0; while :; do n=$((n+1)); echo $n > /n; sync; echo tick $n.; sleep 0.2; done";

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut path = |what: &str| PathBuf::from(arguments.next().unwrap_or_else(|| panic!("no {what}")));
    let (program, kernel, rootfs) = (path("VMM"), path("KERNEL"), path("ROOTFS"));
    let mut number = |default: u32| {
        arguments
            .next()
            .map_or(default, |text| text.parse().expect("a number"))
    };
    let (mem_mib, vcpus, cycles) = (number(256), number(1), number(2));
    let extra = arguments.next().unwrap_or_default();
    let dir = tempfile::tempdir().expect("directory");
    let shape = Shape {
        vcpus: u8::try_from(vcpus).expect("vCPUs"),
        mem_mib,
    };
    let machine = Machine::create(dir.path(), &kernel, &rootfs, shape);
    let cmdline =
        format!("console=ttyS0 reboot=k panic=-1 root=/dev/vda rw {extra} init=/bin/sh -- -c \"{SCRIPT}\"");
    let started = Instant::now();
    let mut vmm = Vmm::start(&program, &machine);
    println!("prepared after {:?}", started.elapsed());
    vmm.boot(&machine, &cmdline);
    let mut tick = machine.wait_tick_after(1);
    println!("guest at tick {tick} after {:?}", started.elapsed());
    for generation in 1..=u64::from(cycles) {
        let freeze_us = vmm.freeze();
        let frozen_at = machine.last_tick();
        let stats = vmm.persist(&machine, "memory.img", generation);
        println!("freeze {freeze_us} us at tick {frozen_at:?}; {stats:?}");
        vmm.kill();
        vmm = Vmm::start(&program, &machine);
        let started = Instant::now();
        let trace = vmm
            .restore(&machine, "memory.img", generation, false)
            .expect("restore");
        println!("{trace:?}, answered after {:?}", started.elapsed());
        tick = machine.wait_tick_after(frozen_at.unwrap_or(tick));
        println!("guest at tick {tick} after {:?}", started.elapsed());
        vmm.call(Request::FirstByte, Vec::new()).expect("first byte");
        println!("{:?}", vmm.call(Request::Status, Vec::new()).expect("status"));
    }
    vmm.kill();
    print!("{}", machine.console());
}
