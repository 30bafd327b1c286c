//! Images are written from and read back into memory of this process; no KVM is needed.

use super::{Contents, FlushDisk, Persist, PersistError};
use crate::image::{
    self, Base, Expected, Extent, HostSignature, ImageFile, ImageLayout, OpenError, OpenImage, PageSource,
};
use crate::layout::{PAGE_BYTES, PAGE_SIZE, RamLayout};
use crate::memory::lazy::LazyMemory;
use crate::memory::{GuestMemory, Ram};
use crate::sys::uffd::Uffd;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use torpor_api::vmm::PersistStats;
use vm_memory::{Bytes, GuestAddress};

mod layers;
mod life;

const MEM_MIB: u32 = 128;
const MEM_BYTES: u64 = 128 << 20;

fn host() -> HostSignature {
    HostSignature::new("x86_64", "Test", 1, 2, 3, b"features")
}

fn expected(generation: u64) -> Expected {
    Expected {
        generation,
        disk_generation: 5,
        n_vcpus: 2,
        mem_bytes: MEM_BYTES,
        host: host(),
    }
}

/// A guest without vCPUs.
struct Guest {
    memory: GuestMemory,
    backing: Option<LazyMemory>,
    ram: Arc<Ram>,
    baseline: Option<Arc<ImageFile>>,
    source: Option<Arc<ImageFile>>,
    /// What a new image is to lie over.
    base: Option<Arc<ImageFile>>,
}

impl Guest {
    fn boot() -> Self {
        let ram = Arc::new(Ram::reserve(RamLayout::new(MEM_MIB).unwrap()).unwrap());
        ram.map().unwrap();
        Self {
            memory: ram.guest_memory().unwrap(),
            backing: None,
            ram,
            baseline: None,
            source: None,
            base: None,
        }
    }

    fn restore(file: &File, generation: u64) -> Self {
        Self::restore_over(file, None, generation)
    }

    fn restore_over(file: &File, base: Option<&File>, generation: u64) -> Self {
        let base = base.map(|base| base.try_clone().unwrap());
        let OpenImage { file, vmstate, .. } =
            image::open(file.try_clone().unwrap(), base, &expected(generation)).unwrap();
        assert_eq!(vmstate, generation.to_le_bytes());
        let mut guest = Self::boot();
        let file = Arc::new(file);
        let source = Arc::clone(&file) as Arc<dyn PageSource>;
        // A panic would end the thread alone, and whoever waits for the page would wait for ever.
        let fail = Box::new(|error| {
            eprintln!("{error:?}");
            std::process::abort();
        });
        guest.backing =
            Some(LazyMemory::start(Arc::clone(&guest.ram), Uffd::open().unwrap(), source, fail).unwrap());
        guest.baseline = Some(Arc::clone(&file));
        guest.source = Some(file);
        guest
    }

    /// From here on somebody else has the image, too, and the next one is a new file over it or over what it lies over.
    fn share(&mut self) {
        let image = self.baseline.as_ref().unwrap();
        self.base = Some(Arc::clone(image.base().unwrap_or(image)));
    }

    fn write(&self, page: u64, value: u64) {
        let bytes: Vec<u8> = if value == 0 {
            vec![0; PAGE_SIZE]
        } else {
            (0..PAGE_SIZE as u64 / 8)
                .flat_map(|i| (value ^ i).to_le_bytes())
                .collect()
        };
        self.memory
            .write_slice(&bytes, GuestAddress(page * PAGE_BYTES))
            .unwrap();
    }

    fn discard(&self, page: u64) {
        self.ram.discard(page * PAGE_BYTES, PAGE_BYTES);
    }

    fn job(&self, file: &File, generation: u64, flush_disk: FlushDisk, cancel: bool) -> Persist {
        let same = self
            .baseline
            .as_ref()
            .is_some_and(|b| b.is_same_file(file).unwrap());
        let layout = ImageLayout::new(MEM_BYTES);
        let base = || {
            self.base
                .as_ref()
                .and_then(|base| Base::new(Arc::clone(base)).unwrap())
        };
        let empty = || Arc::new(ImageFile::empty(file.try_clone().unwrap(), layout, base()).unwrap());
        Persist {
            ram: Arc::clone(&self.ram),
            target: file.try_clone().unwrap(),
            baseline: if same {
                self.baseline.clone().unwrap()
            } else {
                empty()
            },
            source: self.source.clone().filter(|_| !same),
            fresh: !same,
            contents: Contents {
                generation,
                disk_generation: 5,
                n_vcpus: 2,
                vmstate: generation.to_le_bytes().to_vec(),
                working_set: Extent::new(0..16).into_iter().collect(),
                host: host(),
            },
            cancel: Arc::new(AtomicBool::new(cancel)),
            flush_disk: Some(flush_disk),
        }
    }

    fn persist(&mut self, file: &File, generation: u64) -> PersistStats {
        let job = self.job(file, generation, Box::new(|| Ok(None)), false);
        self.baseline = Some(Arc::clone(&job.baseline));
        job.run().unwrap()
    }

    fn pre_copy(&mut self, file: &File) -> u64 {
        let job = self.job(file, 0, Box::new(|| Ok(None)), false);
        self.baseline = Some(Arc::clone(&job.baseline));
        job.pre_copy().unwrap()
    }

    fn page(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_SIZE];
        self.ram.copy_out(page, &mut bytes);
        bytes
    }

    fn dump(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(MEM_BYTES).unwrap()];
        self.ram.copy_out(0, &mut bytes);
        bytes
    }
}

/// Memory as the image file alone tells it.
fn reconstruct(file: &File, generation: u64) -> Vec<u8> {
    reconstruct_over(file, None, generation)
}

fn reconstruct_over(file: &File, base: Option<&File>, generation: u64) -> Vec<u8> {
    let base = base.map(|base| base.try_clone().unwrap());
    let image = image::open(file.try_clone().unwrap(), base, &expected(generation)).unwrap();
    let mut bytes = vec![0; usize::try_from(MEM_BYTES).unwrap()];
    image.file.read(0, &mut bytes).unwrap();
    bytes
}

fn image_file() -> File {
    tempfile::tempfile().unwrap()
}

#[test]
fn a_first_image_holds_the_pages_that_are_not_zero_and_no_others() {
    let mut guest = Guest::boot();
    for page in 100..200 {
        guest.write(page, if page % 10 == 0 { 0 } else { page });
    }
    let file = image_file();
    let stats = guest.persist(&file, 1);
    assert_eq!(
        (stats.present_pages, stats.written_pages, stats.zero_pages),
        (100, 90, 10)
    );
    assert!(reconstruct(&file, 1) == guest.dump());
    let data_blocks = 90 * 8;
    let metadata_blocks = ImageLayout::new(MEM_BYTES).data_offset() / 512;
    assert!(
        file.metadata().unwrap().blocks() < data_blocks + metadata_blocks,
        "zero pages take room"
    );
}

#[test]
fn a_wake_that_only_reads_writes_no_page() {
    let mut guest = Guest::boot();
    (0..64).for_each(|page| guest.write(page, page + 1));
    let file = image_file();
    guest.persist(&file, 1);
    let mut woken = Guest::restore(&file, 1);
    assert!(woken.page(3) == guest.page(3));
    let stats = woken.persist(&file, 2);
    assert_eq!((stats.present_pages, stats.written_pages), (4, 0));
    assert!(reconstruct(&file, 2) == guest.dump());
}

#[test]
fn an_image_tells_where_its_data_is_if_that_is_not_too_much() {
    let mut guest = Guest::boot();
    for page in [0, 1, 2, 5000, 5001] {
        guest.write(page, page + 1);
    }
    let file = image_file();
    guest.persist(&file, 1);
    let image = image::open(file, None, &expected(1)).unwrap().file;
    let expected = [0..3, 5000..5002].map(|pages| Extent::new(pages).unwrap());
    assert_eq!(image.data_extents(5).unwrap().unwrap(), expected);
    assert!(image.data_extents(4).unwrap().is_none());
}

#[test]
fn pages_that_were_given_back_are_holes_in_the_next_image() {
    let mut guest = Guest::boot();
    (0..1024).for_each(|page| guest.write(page, page + 1));
    let file = image_file();
    guest.persist(&file, 1);
    let before = file.metadata().unwrap().blocks();
    let mut woken = Guest::restore(&file, 1);
    woken.page(0);
    (0..512).for_each(|page| woken.discard(page));
    woken.write(7, 77);
    woken.persist(&file, 2);
    let after = file.metadata().unwrap().blocks();
    assert!(after + 500 * 8 <= before, "{before} blocks became {after}");
    let image = reconstruct(&file, 2);
    assert!(image[..PAGE_SIZE * 7].iter().all(|byte| *byte == 0));
    assert!(image == woken.dump());
}

#[test]
fn a_cancelled_persist_leaves_no_valid_image_and_the_next_one_is_right() {
    let mut guest = Guest::boot();
    (0..600).for_each(|page| guest.write(page, page + 1));
    let file = image_file();
    guest.persist(&file, 1);
    let mut woken = Guest::restore(&file, 1);
    (0..300).for_each(|page| woken.write(page, page + 1000));
    // The flush is the last step before the image is marked valid: everything else is written by then.
    let mut job = woken.job(&file, 2, Box::new(|| Ok(None)), false);
    let cancel = Arc::clone(&job.cancel);
    job.flush_disk = Some(Box::new(move || {
        cancel.store(true, std::sync::atomic::Ordering::Release);
        Ok(None)
    }));
    assert!(matches!(job.run(), Err(PersistError::Cancelled)));
    assert!(matches!(
        image::open(file.try_clone().unwrap(), None, &expected(2)),
        Err(OpenError::Incomplete)
    ));
    (100..200).for_each(|page| woken.write(page, page + 5000));
    (0..50).for_each(|page| woken.discard(page));
    woken.persist(&file, 3);
    assert!(reconstruct(&file, 3) == woken.dump());
}

#[test]
fn what_was_copied_ahead_is_not_written_again_and_is_no_image_by_itself() {
    let mut guest = Guest::boot();
    (0..600).for_each(|page| guest.write(page, page + 1));
    let file = image_file();
    assert!(guest.pre_copy(&file) >= 600 * PAGE_BYTES);
    assert!(matches!(
        image::open(file.try_clone().unwrap(), None, &expected(0)),
        Err(OpenError::Incomplete)
    ));
    (0..20).for_each(|page| guest.write(page, page + 1000));
    let stats = guest.persist(&file, 1);
    assert_eq!((stats.present_pages, stats.written_pages), (600, 20));
    assert!(reconstruct(&file, 1) == guest.dump());

    let mut woken = Guest::restore(&file, 1);
    (0..64).for_each(|page| woken.write(page, page + 5000));
    (64..70).for_each(|page| woken.discard(page));
    woken.pre_copy(&file);
    woken.write(3, 3);
    woken.write(66, 66);
    assert_eq!(woken.persist(&file, 2).written_pages, 2);
    assert!(reconstruct(&file, 2) == woken.dump());
}

#[test]
fn a_persist_that_is_cancelled_before_it_writes_leaves_the_old_image() {
    let mut guest = Guest::boot();
    guest.write(1, 1);
    let file = image_file();
    guest.persist(&file, 1);
    let before = guest.dump();
    guest.write(1, 2);
    let job = guest.job(&file, 2, Box::new(|| Ok(None)), true);
    assert!(matches!(job.run(), Err(PersistError::Cancelled)));
    assert!(reconstruct(&file, 1) == before);
}

#[test]
fn a_persist_that_is_cancelled_in_its_flush_does_not_make_the_disk_durable() {
    let guest = Guest::boot();
    guest.write(1, 1);
    let file = image_file();
    // It has no fdatasync: trying would be another error than a cancellation.
    let null = File::options().write(true).open("/dev/null").unwrap();
    let same = null.try_clone().unwrap();
    let job = guest.job(&file, 1, Box::new(move || Ok(Some(same))), false);
    assert!(matches!(
        job.run(),
        Err(PersistError::Io {
            operation: "make the disk durable",
            ..
        })
    ));
    let mut job = guest.job(&file, 2, Box::new(|| Ok(None)), false);
    let cancel = Arc::clone(&job.cancel);
    job.flush_disk = Some(Box::new(move || {
        cancel.store(true, std::sync::atomic::Ordering::Release);
        Ok(Some(null))
    }));
    assert!(matches!(job.run(), Err(PersistError::Cancelled)));
}

#[test]
fn a_disk_that_cannot_be_flushed_leaves_no_valid_image() {
    let guest = Guest::boot();
    guest.write(1, 1);
    let file = image_file();
    let job = guest.job(
        &file,
        1,
        Box::new(|| Err(io::Error::from_raw_os_error(libc::EIO))),
        false,
    );
    assert!(matches!(
        job.run(),
        Err(PersistError::Io {
            operation: "flush the disk",
            ..
        })
    ));
    // It was to be the machine's first: nothing of it is kept.
    assert_eq!(file.metadata().unwrap().blocks(), 0);
    assert!(image::open(file, None, &expected(1)).is_err());
}

#[test]
fn after_a_failed_persist_nothing_that_it_wrote_is_taken_to_be_on_the_disk() {
    let mut guest = Guest::boot();
    (0..600).for_each(|page| guest.write(page, page + 1));
    let file = image_file();
    guest.persist(&file, 1);
    let mut woken = Guest::restore(&file, 1);
    (0..16).for_each(|page| woken.write(page, page + 1000));
    let failing = || Err(io::Error::from_raw_os_error(libc::EIO));
    assert!(woken.job(&file, 2, Box::new(failing), false).run().is_err());
    assert!(matches!(
        image::open(file.try_clone().unwrap(), None, &expected(2)),
        Err(OpenError::Incomplete)
    ));
    // What a lost write looks like: the new page reads back from the page cache, the table of checksums no more.
    file.write_all_at(&[0; 64], ImageLayout::new(MEM_BYTES).checksums_offset())
        .unwrap();
    let stats = woken.persist(&file, 3);
    assert_eq!((stats.present_pages, stats.written_pages), (16, 16));
    assert!(reconstruct(&file, 3) == woken.dump());
    let stats = woken.persist(&file, 4);
    assert_eq!(
        stats.written_pages, 0,
        "a file that is good again is suspected still"
    );
}

#[test]
fn a_fork_takes_untouched_pages_over_into_its_own_image() {
    let mut parent = Guest::boot();
    (0..600).for_each(|page| parent.write(page, page + 1));
    let parents = image_file();
    parent.persist(&parents, 1);
    let mut child = Guest::restore(&parents, 1);
    child.write(5, 12_345);
    child.discard(6);
    let own = image_file();
    child.persist(&own, 2);
    assert!(reconstruct(&own, 2) == child.dump());
    assert!(
        reconstruct(&parents, 1) == parent.dump(),
        "the parent's image changed"
    );
    child.write(7, 999);
    let stats = child.persist(&own, 3);
    assert_eq!(stats.written_pages, 1);
    assert!(reconstruct(&own, 3) == child.dump());
}

#[test]
fn a_file_that_held_something_else_shows_none_of_it() {
    let file = image_file();
    file.set_len(300 << 20).unwrap();
    let layout = ImageLayout::new(MEM_BYTES);
    file.write_all_at(b"an older life", layout.page_offset(9))
        .unwrap();
    let mut guest = Guest::boot();
    guest.write(1, 1);
    guest.persist(&file, 1);
    assert!(reconstruct(&file, 1) == guest.dump());
}

#[test]
fn what_does_not_fit_the_prepared_vm_is_refused() {
    let mut guest = Guest::boot();
    guest.write(1, 1);
    let file = image_file();
    guest.persist(&file, 4);
    let open = |change: &dyn Fn(&mut Expected)| {
        let mut wanted = expected(4);
        change(&mut wanted);
        image::open(file.try_clone().unwrap(), None, &wanted).map(|_| ())
    };
    assert!(open(&|_| ()).is_ok());
    assert!(matches!(
        open(&|e| e.generation = 3),
        Err(OpenError::Generation { .. })
    ));
    assert!(matches!(
        open(&|e| e.disk_generation = 6),
        Err(OpenError::DiskGeneration { .. })
    ));
    for error in [
        open(&|e| e.n_vcpus = 1),
        open(&|e| e.mem_bytes *= 2),
        open(&|e| e.host.kernel = "9.9".to_owned()),
        open(&|e| e.host.features ^= 1),
    ] {
        assert!(error.unwrap_err().is_incompatible());
    }
    file.set_len(1 << 20).unwrap();
    assert!(matches!(open(&|_| ()), Err(OpenError::Length { .. })));
}

#[test]
fn damage_of_the_state_or_of_a_page_is_found() {
    let mut guest = Guest::boot();
    guest.write(300, 1);
    let file = image_file();
    guest.persist(&file, 1);
    let layout = ImageLayout::new(MEM_BYTES);
    let damage = |offset: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    };
    damage(layout.page_offset(300) + 4095);
    let image = image::open(file.try_clone().unwrap(), None, &expected(1)).unwrap();
    let mut page = vec![0; PAGE_SIZE];
    assert!(image.file.read(300, &mut page).is_err());
    assert!(image.file.read(301, &mut page).is_ok());
    damage(layout.page_offset(300) + 4095);
    damage(layout.checksums_offset() + 4 * 301);
    let image = image::open(file.try_clone().unwrap(), None, &expected(1)).unwrap();
    assert!(image.file.read(300, &mut page).is_ok());
    assert!(
        image.file.read(301, &mut page).is_err(),
        "a hole whose checksum is damaged passed"
    );
    damage(layout.vmstate_offset());
    assert!(matches!(
        image::open(file.try_clone().unwrap(), None, &expected(1)),
        Err(OpenError::StateChecksum { .. })
    ));
}

/// The limit is the process's, so the test runs itself again as a process of its own.
#[test]
fn a_full_disk_is_told_apart_from_a_broken_one() {
    const NAME: &str = "image::persist::tests::a_full_disk_is_told_apart_from_a_broken_one";
    if std::env::var_os("TORPOR_TEST_CHILD").is_none() {
        let program = std::env::current_exe().unwrap();
        let run = std::process::Command::new(program)
            .args(["--exact", NAME])
            .env("TORPOR_TEST_CHILD", "1")
            .output();
        let run = run.unwrap();
        let text = String::from_utf8_lossy(&run.stdout).into_owned();
        assert!(run.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    use nix::sys::resource::{Resource, setrlimit};
    use nix::sys::signal::{SigSet, Signal};
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    signals.thread_block().unwrap();
    let guest = Guest::boot();
    guest.write(1, 1);
    let file = image_file();
    setrlimit(Resource::RLIMIT_FSIZE, 1 << 20, 1 << 20).unwrap();
    let error = guest
        .job(&file, 1, Box::new(|| Ok(None)), false)
        .run()
        .unwrap_err();
    assert!(matches!(error, PersistError::DiskFull { .. }), "{error:?}");
}
