//! Whole machines under KVM: run in the virtual host (`scripts/test --kvm`), where `/dev/kvm` is a real one.
//!
//! Kernel, root disk and VMM are taken from where the package puts them, or from `TORPOR_TEST_KERNEL`,
//! `TORPOR_TEST_ROOTFS` and `TORPOR_TEST_VMM`.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "the driver of these tests panics where a test has to fail"
)]

#[path = "kvm/driver.rs"]
mod driver;
#[path = "kvm/sys.rs"]
mod sys;

/// Named so that runners without KVM can leave them out.
mod kvm {
    use super::driver::{Machine, Vmm};
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::path::PathBuf;
    use torpor_api::vmm::{
        Event, ExitReason, FdRole, Reply, Request, RestoreTrace, Shape, VmmErrorCode, VmmState,
    };
    use torpor_vmm::image::{self, Expected, ImageLayout, PageSource};

    const MEM_MIB: u32 = 128;
    /// Writes to disk and memory all the time, and counts.
    const BUSY: &str = "n=0; while :; do n=$((n+1)); dd if=/dev/urandom of=/f$((n%3)) bs=64k count=4 conv=fsync \
        2>/dev/null; x=$x$n; echo tick $n.; done";
    const CALM: &str = "n=0; while :; do n=$((n+1)); echo tick $n.; sleep 0.1; done";

    fn path(variable: &str, default: &str) -> PathBuf {
        std::env::var_os(variable).map_or_else(|| default.into(), PathBuf::from)
    }

    struct Bench {
        machine: Machine,
        program: PathBuf,
        _dir: tempfile::TempDir,
    }

    impl Bench {
        fn new(vcpus: u8) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let kernel = path("TORPOR_TEST_KERNEL", "/usr/share/torpor/templates/base/vmlinux");
            let rootfs = path(
                "TORPOR_TEST_ROOTFS",
                "/usr/share/torpor/templates/base/rootfs.ext4",
            );
            let shape = Shape {
                vcpus,
                mem_mib: MEM_MIB,
            };
            Self {
                machine: Machine::create(dir.path(), &kernel, &rootfs, shape),
                program: path("TORPOR_TEST_VMM", "/usr/libexec/torpor/torpor-vmm"),
                _dir: dir,
            }
        }

        fn start(&self) -> Vmm {
            Vmm::start(&self.program, &self.machine)
        }

        fn boot(&self, script: &str) -> Vmm {
            let mut vmm = self.start();
            let options = "console=ttyS0 reboot=k panic=-1 pci=off loglevel=6 root=/dev/vda rw init=/bin/sh";
            vmm.boot(&self.machine, &format!("{options} -- -c \"{script}\""));
            vmm
        }

        fn restore(&self, generation: u64) -> Vmm {
            self.restore_traced(generation).0
        }

        fn restore_traced(&self, generation: u64) -> (Vmm, RestoreTrace) {
            let mut vmm = self.start();
            let trace = vmm
                .restore(&self.machine, "memory.img", generation, false)
                .unwrap();
            println!("generation {generation}: {trace:?}");
            (vmm, trace)
        }

        fn tick(&self) -> u64 {
            self.machine.last_tick().unwrap_or(0)
        }

        fn image(&self) -> File {
            self.machine.open("memory.img")
        }

        /// Guest memory as the image file alone tells it.
        fn reconstruct(&self, generation: u64) -> Vec<u8> {
            let header = image::read_header(&self.image()).unwrap();
            let expected = Expected {
                generation,
                disk_generation: header.disk_generation,
                n_vcpus: self.machine.shape.vcpus,
                mem_bytes: u64::from(MEM_MIB) << 20,
                host: header.host,
            };
            let image = image::open(self.image(), self.machine.image_base(), &expected).unwrap();
            let mut bytes = vec![0; (MEM_MIB as usize) << 20];
            image.file.read(0, &mut bytes).unwrap();
            bytes
        }

        fn dump(&self, vmm: &mut Vmm) -> Vec<u8> {
            let name = "dump";
            let _ = std::fs::remove_file(self.machine.dir.join(name));
            let dumped = vmm.call(
                Request::Dump,
                vec![(FdRole::Dump, self.machine.open(name).into())],
            );
            assert_eq!(dumped, Ok(Reply::Done));
            std::fs::read(self.machine.dir.join(name)).unwrap()
        }

        /// A byte of every page, as far as the pages tell.
        fn damage_all_pages(&self) {
            let layout = ImageLayout::new(u64::from(MEM_MIB) << 20);
            let image = self.image();
            for page in 0..layout.n_pages() {
                let (mut byte, offset) = ([0], layout.page_offset(page) + 99);
                image.read_exact_at(&mut byte, offset).unwrap();
                if byte != [0] {
                    image.write_all_at(&[!byte[0]], offset).unwrap();
                }
            }
        }

        /// Persist a frozen machine before and check the image against a dump taken after: both of one instant.
        fn persist_and_compare(&self, vmm: &mut Vmm, generation: u64) {
            let stats = vmm.persist(&self.machine, "memory.img", generation);
            println!("{stats:?}");
            assert_eq!(stats.disk_generation, self.machine.disk_generation());
            let dump = self.dump(vmm);
            let image = self.reconstruct(generation);
            let different = dump
                .chunks(4096)
                .zip(image.chunks(4096))
                .filter(|(a, b)| a != b)
                .count();
            assert_eq!(
                (dump.len(), different),
                (image.len(), 0),
                "pages differ in generation {generation}"
            );
        }
    }

    /// A machine with one vCPU that ticks, frozen and written as generation 1.
    fn calm_and_persisted() -> (Bench, Vmm) {
        let bench = Bench::new(1);
        let mut vmm = bench.boot(CALM);
        bench.machine.wait_tick_after(1);
        vmm.freeze();
        vmm.persist(&bench.machine, "memory.img", 1);
        (bench, vmm)
    }

    /// A first image, one that is rewritten in place, and one to which the freeze comes before the copy is done.
    #[test]
    fn an_image_that_was_begun_while_its_machine_was_busy_equals_a_full_dump() {
        let bench = Bench::new(2);
        let mut vmm = bench.boot(BUSY);
        bench.machine.wait_tick_after(1);
        for generation in 1..=3 {
            let image = vec![(FdRole::Image, bench.image().into())];
            assert_eq!(vmm.call(Request::PreCopy, image), Ok(Reply::Done));
            if generation < 3 {
                bench.machine.wait_tick_after(bench.tick() + 1);
            }
            vmm.freeze();
            bench.persist_and_compare(&mut vmm, generation);
            assert!(image::read_header(&bench.image()).unwrap().valid);
            if generation == 2 {
                vmm.kill();
                vmm = bench.restore(2);
            } else {
                vmm.run();
            }
            bench.machine.wait_tick_after(bench.tick());
        }
        vmm.kill();
    }

    #[test]
    fn every_image_of_a_busy_machine_equals_a_full_dump_byte_for_byte() {
        let bench = Bench::new(2);
        let mut vmm = bench.boot(BUSY);
        bench.machine.wait_tick_after(1);
        let mut n_unwatched = 0;
        for generation in 1..=6 {
            vmm.freeze();
            bench.persist_and_compare(&mut vmm, generation);
            let tick = bench.tick();
            if generation == 2 {
                // The same process goes on with the image that it has just written.
                assert!(!vmm.run().0);
            } else {
                vmm.kill();
                let (restored, trace) = bench.restore_traced(generation);
                vmm = restored;
                // What is watched is checked before it is mapped.
                n_unwatched += u32::from(trace.checked_us > trace.populated_us);
            }
            bench.machine.wait_tick_after(tick + 1);
            vmm.call(Request::FirstByte, Vec::new()).unwrap();
        }
        assert!(
            (1..=3).contains(&n_unwatched),
            "{n_unwatched} restores were unwatched"
        );
        vmm.kill();
    }

    /// A machine whose first image is somebody else's, too.
    #[test]
    fn an_image_over_another_equals_a_full_dump_and_is_smaller() {
        let bench = Bench::new(2);
        let mut vmm = bench.boot(BUSY);
        bench.machine.wait_tick_after(1);
        vmm.freeze();
        let whole = vmm.persist(&bench.machine, "memory.base", 1);
        vmm.kill();
        let mut vmm = bench.start();
        vmm.restore(&bench.machine, "memory.base", 1, true).unwrap();
        for generation in 2..=5 {
            bench.machine.wait_tick_after(bench.tick() + 1);
            vmm.freeze();
            bench.persist_and_compare(&mut vmm, generation);
            let header = image::read_header(&bench.image()).unwrap();
            assert!(header.base.is_some(), "generation {generation} has no base");
            if generation == 3 {
                vmm.run();
            } else {
                vmm.kill();
                vmm = bench.restore(generation);
            }
        }
        let held = bench.image().metadata().unwrap().blocks() * 512 / 4096;
        println!("{} pages over {}", held, whole.written_pages);
        assert!(held < whole.written_pages * 3 / 4);
        vmm.kill();
    }

    #[test]
    fn a_wake_in_the_middle_of_a_persist_wins_and_costs_nothing() {
        let bench = Bench::new(1);
        let mut vmm = bench.boot(BUSY);
        bench.machine.wait_tick_after(1);
        let mut generation = 0;
        for _ in 0..3 {
            vmm.freeze();
            generation += 1;
            vmm.begin_persist(&bench.machine, "memory.img", generation);
            let tick = bench.tick();
            let (cancelled, run_us) = vmm.run();
            println!("run after {run_us} us");
            assert!(cancelled);
            bench.machine.wait_tick_after(tick + 1);
        }
        vmm.freeze();
        bench.persist_and_compare(&mut vmm, generation + 1);
        let tick = bench.tick();
        vmm.kill();
        let vmm = bench.restore(generation + 1);
        bench.machine.wait_tick_after(tick);
        vmm.kill();
    }

    #[test]
    fn a_dozing_machine_holds_little_and_goes_on_with_all_its_memory() {
        let bench = Bench::new(2);
        let mut vmm = bench.boot(BUSY);
        bench.machine.wait_tick_after(1);
        for generation in 1..=4 {
            vmm.freeze();
            bench.persist_and_compare(&mut vmm, generation);
            let (held, dump) = (vmm.anonymous_kib(), bench.dump(&mut vmm));
            let other = vmm.doze(&bench.machine, "memory.img", generation + 1);
            assert_eq!(other.unwrap_err().code, VmmErrorCode::BadRequest);
            vmm.doze(&bench.machine, "memory.img", generation).unwrap();
            println!("{held} KiB, dozing {} KiB", vmm.anonymous_kib());
            assert!(vmm.anonymous_kib() < held / 2);
            for request in [Request::Freeze, Request::Run, Request::Persist { generation: 9 }] {
                let fds = bench.machine.image("memory.img");
                assert_eq!(vmm.call(request, fds).unwrap_err().code, VmmErrorCode::BadRequest);
            }
            if generation % 2 == 0 {
                assert!(
                    bench.dump(&mut vmm) == dump,
                    "memory of generation {generation} differs"
                );
            }
            let tick = bench.tick();
            assert!(matches!(
                vmm.call(Request::Resume, Vec::new()),
                Ok(Reply::Ran { .. })
            ));
            bench.machine.wait_tick_after(tick + 1);
        }
        vmm.kill();
    }

    #[test]
    fn a_machine_whose_image_is_damaged_or_has_left_the_page_cache_dozes_no_further() {
        let (bench, mut vmm) = calm_and_persisted();
        vmm.doze(&bench.machine, "memory.img", 1).unwrap();
        let image = bench.image();
        image.sync_all().unwrap();
        nix::fcntl::posix_fadvise(&image, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        let error = vmm.call(Request::Resume, Vec::new()).unwrap_err();
        assert!(error.message.contains("page cache"), "{error}");
        vmm.kill();

        let mut vmm = bench.restore(1);
        vmm.freeze();
        vmm.persist(&bench.machine, "memory.img", 2);
        bench.damage_all_pages();
        let error = vmm.doze(&bench.machine, "memory.img", 2).unwrap_err();
        assert_eq!(error.code, VmmErrorCode::ImageCorrupt, "{error}");
        for request in [Request::Resume, Request::Run] {
            assert_eq!(
                vmm.call(request, Vec::new()).unwrap_err().code,
                VmmErrorCode::BadRequest
            );
        }
        vmm.kill();
    }

    #[test]
    fn a_page_that_fails_its_checksum_ends_the_vmm_and_is_never_seen() {
        let (bench, vmm) = calm_and_persisted();
        let tick = bench.tick();
        vmm.kill();
        bench.damage_all_pages();
        let mut vmm = bench.start();
        // What is mapped ahead is checked before the guest runs: all of a first image. Else a touch ends the VMM.
        match vmm.restore(&bench.machine, "memory.img", 1, false) {
            Err(refused) => {
                println!("{refused}");
                assert_eq!(refused.code, VmmErrorCode::ImageCorrupt);
                vmm.kill();
            }
            Ok(_) => {
                let event = vmm.event();
                assert!(
                    matches!(
                        &event,
                        Event::Exited {
                            reason: ExitReason::Memory { .. }
                        }
                    ),
                    "{event:?}"
                );
                assert_eq!(vmm.wait(), Some(3));
            }
        }
        assert_eq!(bench.tick(), tick);
    }

    #[test]
    fn a_fork_gets_a_new_identity_and_a_wake_does_not() {
        let (bench, vmm) = calm_and_persisted();
        vmm.kill();
        let told = |text: &str| text.contains("virtual machine fork").then_some(());
        let mut vmm = bench.restore(1);
        bench.machine.wait_tick_after(bench.tick() + 2);
        assert_eq!(told(&bench.machine.console()), None);
        vmm.freeze();
        vmm.persist(&bench.machine, "memory.img", 2);
        vmm.kill();
        let mut vmm = bench.start();
        vmm.restore(&bench.machine, "memory.img", 2, true).unwrap();
        bench.machine.wait_console("the kernel to reseed", told);
        vmm.kill();
    }

    #[test]
    fn an_image_is_refused_by_another_shape_generation_or_disk() {
        let bench = Bench::new(1);
        let mut vmm = bench.boot(BUSY);
        bench.machine.wait_tick_after(1);
        vmm.freeze();
        let persisted_over = vmm.persist(&bench.machine, "memory.img", 1).disk_generation;
        vmm.kill();
        let code = |result: Result<_, torpor_api::vmm::VmmError>| {
            let error = result.unwrap_err();
            println!("{error}");
            error.code
        };
        let mut vmm = bench.start();
        assert_eq!(
            code(vmm.restore(&bench.machine, "memory.img", 2, false)),
            VmmErrorCode::ImageCorrupt
        );
        vmm.kill();
        let mut other = Machine {
            shape: Shape {
                vcpus: 2,
                mem_mib: MEM_MIB,
            },
            ..bench.machine.twin()
        };
        let mut vmm = Vmm::start(&bench.program, &other);
        assert_eq!(
            code(vmm.restore(&other, "memory.img", 1, false)),
            VmmErrorCode::ImageIncompatible
        );
        vmm.kill();
        // The guest goes on and writes: the old memory no longer fits its disk.
        let tick = bench.tick();
        let vmm = bench.restore(1);
        bench.machine.wait_tick_after(tick + 1);
        vmm.kill();
        other = bench.machine.twin();
        let mut vmm = Vmm::start(&bench.program, &other);
        let over_newer_disk = vmm.restore_over(&other, "memory.img", 1, persisted_over, false);
        assert_eq!(code(over_newer_disk), VmmErrorCode::ImageCorrupt);
        vmm.kill();
    }

    #[test]
    fn a_guest_that_resets_itself_is_reported_and_ends_the_process() {
        let bench = Bench::new(1);
        // The end of PID 1 is a panic, and a panic a reset.
        let mut vmm = bench.boot("echo tick 1.");
        match vmm.event() {
            Event::Exited { reason } => assert_eq!(reason, ExitReason::Reboot),
            other => panic!("{other:?}"),
        }
        assert_eq!(vmm.wait(), Some(0));
    }

    #[test]
    fn requests_out_of_order_are_refused_and_change_nothing() {
        let bench = Bench::new(1);
        let mut vmm = bench.start();
        for request in [Request::Freeze, Request::Run, Request::Resume, Request::FirstByte] {
            assert_eq!(
                vmm.call(request, Vec::new()).unwrap_err().code,
                VmmErrorCode::BadRequest
            );
        }
        let again = vmm.call(
            Request::Prepare {
                shape: bench.machine.shape,
            },
            Vec::new(),
        );
        assert_eq!(again.unwrap_err().code, VmmErrorCode::BadRequest);
        match vmm.call(Request::Status, Vec::new()) {
            Ok(Reply::Status { state, shape, .. }) => {
                assert_eq!((state, shape), (VmmState::Blank, Some(bench.machine.shape)));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(vmm.call(Request::Quit, Vec::new()), Ok(Reply::Done));
        assert_eq!(vmm.wait(), Some(0));
    }

    #[test]
    fn no_core_dump_can_hold_guest_memory() {
        let bench = Bench::new(1);
        let vmm = bench.start();
        let limits = vmm.limits();
        let of_cores = limits.lines().find(|line| line.starts_with("Max core file size"));
        let words: Vec<_> = of_cores.unwrap().split_whitespace().collect();
        assert_eq!(words[4..6], ["0", "0"], "{limits}");
        vmm.kill();
    }
}
