//! Memory is tested in this process, without KVM: its own threads fault.

use super::lazy::{FillCounts, FillError, LazyMemory};
use super::prefetch::Placement;
use super::{GuestMemory, PageBitmap, Ram};
use crate::image::{Extent, ImageView, PageError, PageSource};
use crate::layout::{PAGE_BYTES, PAGE_SIZE, RamLayout};
use crate::sys::uffd::Uffd;
use proptest::prelude::*;
use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};

/// Page `n` holds its number, but every fourth is zero, and one is broken.
#[derive(Debug, Default)]
struct Numbered {
    broken: Option<u64>,
    zero: bool,
    file: Option<File>,
    read: Mutex<Vec<Range<u64>>>,
}

fn numbered(page: u64) -> u64 {
    if page.is_multiple_of(4) { 0 } else { page }
}

impl PageSource for Numbered {
    fn read(&self, first: u64, buffer: &mut [u8]) -> Result<(), PageError> {
        let end = first + (buffer.len() / PAGE_SIZE) as u64;
        self.read.lock().unwrap().push(first..end);
        if let Some(page) = self.broken.filter(|page| (first..end).contains(page)) {
            return Err(PageError::Checksum {
                page,
                found: 1,
                wanted: 2,
            });
        }
        for (bytes, page) in buffer.chunks_exact_mut(PAGE_SIZE).zip(first..) {
            bytes.fill(0);
            if !self.zero {
                bytes[..8].copy_from_slice(&numbered(page).to_le_bytes());
            }
        }
        Ok(())
    }
    fn will_need(&self, _: Range<u64>) {}
    fn may_be_zero(&self, page: u64) -> Result<bool, PageError> {
        Ok(self.zero || numbered(page) == 0)
    }
    fn same_file_end(&self, pages: &Range<u64>) -> u64 {
        pages.end
    }
    fn view(&self) -> Option<ImageView> {
        None
    }
    fn check<'a>(&self, _: Range<u64>, _: &'a ImageView) -> Result<&'a [u8], PageError> {
        unreachable!("there is no view")
    }
    fn verify(&self, first: u64, content: &[u8]) -> Result<(), PageError> {
        for (bytes, page) in content.chunks_exact(PAGE_SIZE).zip(first..) {
            let found = u64::from_le_bytes(*bytes.first_chunk().unwrap());
            if found != numbered(page) || self.broken == Some(page) {
                return Err(PageError::Checksum {
                    page,
                    found: 1,
                    wanted: 2,
                });
            }
        }
        Ok(())
    }
    fn n_on_disk(&self, _: Range<u64>) -> u64 {
        0
    }
    fn file(&self, first: u64) -> Option<(BorrowedFd<'_>, u64)> {
        let file = self.file.as_ref()?;
        Some((file.as_fd(), first * PAGE_BYTES))
    }
}

struct Lazy {
    lazy: LazyMemory,
    source: Arc<Numbered>,
    memory: GuestMemory,
    ram: Arc<Ram>,
    failures: Receiver<FillError>,
}

fn lazy(mem_mib: u32, broken: Option<u64>) -> Lazy {
    lazy_from(
        mem_mib,
        Numbered {
            broken,
            ..Numbered::default()
        },
    )
}

/// With a file of the same contents, to be mapped.
fn mappable(mem_mib: u32) -> Lazy {
    lazy_from(
        mem_mib,
        Numbered {
            file: Some(numbered_file(mem_mib)),
            ..Numbered::default()
        },
    )
}

fn numbered_file(mem_mib: u32) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(u64::from(mem_mib) << 20).unwrap();
    for page in 0..8192 {
        let number = numbered(page);
        if number != 0 {
            file.write_all_at(&number.to_le_bytes(), page * PAGE_BYTES)
                .unwrap();
        }
    }
    file
}

fn lazy_from(mem_mib: u32, source: Numbered) -> Lazy {
    let ram = Arc::new(Ram::reserve(RamLayout::new(mem_mib).unwrap()).unwrap());
    ram.map().unwrap();
    let source = Arc::new(source);
    let (sender, failures) = channel();
    let on_failure = Box::new(move |error| sender.send(error).unwrap());
    let uffd = Uffd::open().unwrap();
    let lazy = LazyMemory::start(
        Arc::clone(&ram),
        uffd,
        Arc::clone(&source) as Arc<dyn PageSource>,
        on_failure,
    )
    .unwrap();
    Lazy {
        lazy,
        source,
        memory: ram.guest_memory().unwrap(),
        ram,
        failures,
    }
}

fn number_at(memory: &GuestMemory, page: u64) -> u64 {
    memory.read_obj(GuestAddress(page * PAGE_BYTES)).unwrap()
}

#[test]
fn every_page_is_filled_with_its_own_content_when_touched() {
    let guest = lazy(128, None);
    for page in [5, 4, 0, 1000, 32_767, 17, 16] {
        assert_eq!(number_at(&guest.memory, page), numbered(page), "page {page}");
    }
    let counts = guest.lazy.counts();
    assert_eq!(
        (counts.faults, counts.pages),
        (5, 20),
        "one fault per window of 4"
    );
    // The window's other pages may still be on their way; the thread ends after them.
    drop(guest.lazy);
    let present = guest.ram.own_pages().unwrap();
    assert_eq!(
        present.iter().map(|range| range.end - range.start).sum::<u64>(),
        20
    );
}

#[test]
fn after_the_first_byte_more_is_filled_around_a_fault() {
    let guest = lazy(128, None);
    guest.lazy.take_working_set(true).unwrap();
    for page in [5, 4, 0, 15, 1000] {
        assert_eq!(number_at(&guest.memory, page), numbered(page), "page {page}");
    }
    let counts = guest.lazy.counts();
    assert_eq!(
        (counts.faults, counts.pages),
        (2, 32),
        "one fault per window of 16"
    );
}

#[test]
fn a_page_is_read_once_however_many_threads_touch_it() {
    let guest = lazy(128, None);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for page in 0..2048 {
                    assert_eq!(number_at(&guest.memory, page), numbered(page));
                }
            });
        }
    });
    let mut seen = HashSet::new();
    for page in guest.source.read.lock().unwrap().iter().flat_map(Clone::clone) {
        assert!(seen.insert(page), "page {page} was read twice");
    }
}

#[test]
fn a_broken_page_is_reported_and_its_reader_never_goes_on() {
    let guest = lazy(128, Some(100));
    let (sender, went_on) = channel();
    std::thread::scope(|scope| {
        let memory = &guest.memory;
        scope.spawn(move || sender.send(number_at(memory, 100)).unwrap());
        let failure = guest.failures.recv().unwrap();
        assert!(matches!(
            failure,
            FillError::Source {
                source: PageError::Checksum { page: 100, .. },
                ..
            }
        ));
        assert!(
            went_on.try_recv().is_err(),
            "the reader saw a page that failed its check"
        );
        // Closing userfaultfd lets the reader end; in production the process ends instead.
        drop(guest.lazy);
    });
}

#[test]
fn a_prefetched_working_set_raises_no_fault() {
    let guest = lazy(128, None);
    let extents: Vec<_> = [0..16, 48..64, 16..48, 5000..5300]
        .into_iter()
        .filter_map(Extent::new)
        .collect();
    assert_eq!(
        guest
            .lazy
            .prefetch(&extents, Placement::Copied, true)
            .unwrap()
            .n_pages,
        364
    );
    for page in (0..64).chain(5000..5300) {
        assert_eq!(number_at(&guest.memory, page), numbered(page));
    }
    let expected = FillCounts {
        pages: 364,
        ..FillCounts::default()
    };
    assert_eq!(guest.lazy.counts(), expected);
}

#[test]
fn a_prefetch_of_a_broken_page_fails() {
    let guest = lazy(128, Some(7));
    let extent = Extent::new(0..16).unwrap();
    assert!(matches!(
        guest.lazy.prefetch(&[extent], Placement::Copied, true),
        Err(FillError::Source { .. })
    ));
}

#[test]
fn a_mapped_working_set_raises_no_fault_and_is_the_files_until_it_is_written() {
    let guest = mappable(128);
    let extents: Vec<_> = [0..16, 100..116, 5000..5300]
        .into_iter()
        .filter_map(Extent::new)
        .collect();
    assert_eq!(
        guest
            .lazy
            .prefetch(&extents, Placement::Mapped, true)
            .unwrap()
            .n_pages,
        332
    );
    for page in (0..16).chain(100..116).chain(5000..5300) {
        assert_eq!(number_at(&guest.memory, page), numbered(page), "page {page}");
    }
    assert_eq!((guest.lazy.counts().faults, guest.lazy.counts().pages), (0, 332));
    assert_eq!(guest.ram.own_pages().unwrap(), []);

    let address = GuestAddress(5001 * PAGE_BYTES);
    guest.memory.write_obj(7u64, address).unwrap();
    assert_eq!(number_at(&guest.memory, 5001), 7);
    assert_eq!(
        guest.ram.own_pages().unwrap(),
        std::iter::once(5001..5002).collect::<Vec<_>>()
    );
    let mut kept = [0; 8];
    let file = guest.source.file.as_ref().unwrap();
    file.read_exact_at(&mut kept, 5001 * PAGE_BYTES).unwrap();
    assert_eq!(u64::from_le_bytes(kept), 5001);
    // Between and behind the mapped pages a touch is a fault as ever.
    assert_eq!(number_at(&guest.memory, 17), 17);
    assert_eq!(guest.lazy.counts().faults, 1);
}

#[test]
fn pages_that_will_be_written_are_the_guests_own_before_it_runs() {
    let guest = mappable(128);
    let extents = [extent(100..104), extent(104..108).with_written(true)];
    guest.lazy.prefetch(&extents, Placement::Mapped, true).unwrap();
    assert_eq!(
        guest.ram.own_pages().unwrap(),
        std::iter::once(104..108).collect::<Vec<_>>()
    );
    assert_eq!(number_at(&guest.memory, 105), 105);
}

#[test]
fn a_broken_page_is_not_mapped() {
    let guest = lazy_from(
        128,
        Numbered {
            broken: Some(7),
            file: Some(tempfile::tempfile().unwrap()),
            ..Numbered::default()
        },
    );
    let extent = Extent::new(0..16).unwrap();
    assert!(matches!(
        guest.lazy.prefetch(&[extent], Placement::Mapped, true),
        Err(FillError::Source { .. })
    ));
    assert!(!guest.ram.is_mapped(6));
}

#[test]
fn a_mapped_page_that_was_given_back_is_zero_and_keeps_its_neighbours() {
    let guest = mappable(128);
    let extent = Extent::new(32..48).unwrap();
    guest.lazy.prefetch(&[extent], Placement::Mapped, true).unwrap();
    guest
        .memory
        .write_obj(9u64, GuestAddress(34 * PAGE_BYTES))
        .unwrap();
    guest.ram.discard(33 * PAGE_BYTES, 2 * PAGE_BYTES);
    let seen: Vec<_> = (32..36).map(|page| number_at(&guest.memory, page)).collect();
    assert_eq!(seen, [0, 0, 0, 35]);
}

fn extent(pages: Range<u64>) -> Extent {
    Extent::new(pages).unwrap()
}

#[test]
fn windows_filled_before_the_first_byte_are_tentative_in_the_next_set() {
    let guest = lazy(128, None);
    number_at(&guest.memory, 100);
    number_at(&guest.memory, 3);
    let set = guest.lazy.take_working_set(true).unwrap().unwrap();
    number_at(&guest.memory, 5000);
    let expected = [0..4, 100..104].map(|pages| extent(pages).with_tentative(true));
    assert_eq!(set, expected);
    assert_eq!(guest.lazy.take_working_set(true).unwrap(), None);
    let counts = guest.lazy.counts();
    assert_eq!(
        (counts.faults, counts.faults_first_byte, counts.pages),
        (3, 2, 24)
    );
}

#[test]
fn the_next_set_has_what_was_ahead_and_of_the_tentative_pages_those_that_were_touched() {
    let guest = mappable(128);
    let extents = [
        extent(0..8).with_tentative(true),
        extent(8..16),
        extent(64..96).with_tentative(true),
    ];
    guest.lazy.prefetch(&extents, Placement::Mapped, true).unwrap();
    number_at(&guest.memory, 9);
    number_at(&guest.memory, 70);
    let written = GuestAddress(80 * PAGE_BYTES);
    guest.memory.write_obj(7u64, written).unwrap();
    let set = guest.lazy.take_working_set(true).unwrap().unwrap();
    let expected = [extent(8..16), extent(70..71), extent(80..81).with_written(true)];
    assert_eq!(set, expected);
    let counts = guest.lazy.counts();
    assert_eq!((counts.faults, counts.mapped_faults_first_byte), (0, 2));
}

#[test]
fn an_unwatched_set_raises_no_fault_and_stays_what_it_is() {
    let guest = mappable(128);
    let extents = [
        extent(8..16),
        extent(16..20).with_written(true),
        extent(30..32).with_tentative(true),
    ];
    guest.lazy.prefetch(&extents, Placement::Unwatched, true).unwrap();
    let own = |ranges: &[Range<u64>]| assert_eq!(guest.ram.own_pages().unwrap(), ranges);
    own(std::slice::from_ref(&(16..20)));
    for page in 8..32 {
        assert_eq!(number_at(&guest.memory, page), numbered(page), "page {page}");
    }
    assert_eq!(guest.lazy.counts().faults, 0);
    for written in [18, 25] {
        let at = GuestAddress(written * PAGE_BYTES);
        guest.memory.write_obj(7u64, at).unwrap();
    }
    own(&[16..20, 25..26]);
    assert_eq!(number_at(&guest.memory, 101), 101);
    let set = guest.lazy.take_working_set(true).unwrap().unwrap();
    let found = extent(100..104).with_tentative(true);
    assert_eq!(set, [&extents[..], &[found]].concat());
    let counts = guest.lazy.counts();
    // Those of the set, what lies between, and the window.
    assert_eq!(
        (counts.faults, counts.mapped_faults_first_byte, counts.pages),
        (1, 1, 28)
    );
}

#[test]
fn an_unwatched_run_that_answered_nobody_leaves_the_set_alone() {
    let guest = mappable(128);
    let extents = [extent(8..16)];
    guest.lazy.prefetch(&extents, Placement::Unwatched, true).unwrap();
    number_at(&guest.memory, 100);
    assert_eq!(guest.lazy.take_working_set(false).unwrap().unwrap(), extents);
}

#[test]
fn a_long_run_of_zeros_in_an_unwatched_set_is_not_mapped() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(128 << 20).unwrap();
    let guest = lazy_from(
        128,
        Numbered {
            file: Some(file),
            zero: true,
            ..Numbered::default()
        },
    );
    let extents = [extent(0..64)];
    guest.lazy.prefetch(&extents, Placement::Unwatched, true).unwrap();
    assert!((0..64).all(|page| !guest.ram.is_mapped(page)));
    assert_eq!((number_at(&guest.memory, 9), guest.lazy.counts().faults), (0, 0));
}

#[test]
fn a_broken_page_of_an_unwatched_set_is_found_before_the_guest_runs() {
    for to_write in [false, true] {
        let guest = lazy_from(
            128,
            Numbered {
                broken: Some(7),
                file: Some(numbered_file(128)),
                ..Numbered::default()
            },
        );
        let extents = [extent(0..16).with_written(to_write)];
        assert!(matches!(
            guest.lazy.prefetch(&extents, Placement::Unwatched, true),
            Err(FillError::Source { .. })
        ));
    }
}

#[test]
fn a_fault_beside_mapped_pages_that_were_given_back_is_served() {
    let guest = mappable(128);
    let extents: Vec<_> = Extent::new(400..402).into_iter().collect();
    guest.lazy.prefetch(&extents, Placement::Mapped, true).unwrap();
    // Both of the mapping and of what userfaultfd fills.
    guest.ram.discard(401 * PAGE_BYTES, 2 * PAGE_BYTES);
    assert_eq!(number_at(&guest.memory, 403), 403);
    assert_eq!(number_at(&guest.memory, 402), 0);
    assert_eq!(number_at(&guest.memory, 401), 0);
    drop(guest.lazy);
    assert!(guest.failures.try_recv().is_err());
}

#[test]
fn a_discarded_page_is_zero_and_never_comes_back_from_the_image() {
    let guest = lazy(128, None);
    assert_eq!(number_at(&guest.memory, 33), 33);
    guest.ram.discard(32 * PAGE_BYTES, 8 * PAGE_BYTES);
    // Also pages that were never filled.
    guest.ram.discard(64 * PAGE_BYTES, PAGE_BYTES);
    for page in 32..40 {
        assert_eq!(number_at(&guest.memory, page), 0, "page {page}");
    }
    assert_eq!(number_at(&guest.memory, 64), 0);
    assert_eq!(
        (number_at(&guest.memory, 41), number_at(&guest.memory, 65)),
        (41, 65)
    );
    guest
        .memory
        .write_obj(7u64, GuestAddress(33 * PAGE_BYTES))
        .unwrap();
    assert_eq!(number_at(&guest.memory, 33), 7);
}

#[test]
fn what_a_guest_gives_back_is_cut_to_whole_pages_of_its_ram() {
    let guest = lazy(128, None);
    let end = 128 << 20;
    for (gpa, len) in [
        (u64::MAX, 4096),
        (end, 4096),
        (end - 4096, 8192),
        (1, 4096),
        (4096, 4095),
        (0, u64::MAX),
    ] {
        guest.ram.discard(gpa, len);
    }
    assert!((0..guest.ram.layout().n_pages()).all(|page| !guest.ram.is_discarded(page)));
    guest.ram.discard(1, 8191);
    assert!(guest.ram.is_discarded(1) && !guest.ram.is_discarded(0) && !guest.ram.is_discarded(2));
}

#[test]
fn discards_and_faults_at_once_lose_nothing_that_was_kept() {
    let guest = lazy(128, None);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for page in (1..4096).step_by(2) {
                guest.ram.discard(page * PAGE_BYTES, PAGE_BYTES);
            }
        });
        for page in (0..4096).step_by(2) {
            assert_eq!(number_at(&guest.memory, page), numbered(page));
        }
    });
    assert!(
        (1..4096)
            .step_by(2)
            .all(|page| number_at(&guest.memory, page) == 0)
    );
}

#[test]
fn memory_of_a_fresh_boot_is_zero_and_absent_until_touched() {
    let ram = Ram::reserve(RamLayout::new(4096).unwrap()).unwrap();
    ram.map().unwrap();
    assert_eq!(ram.own_pages().unwrap(), []);
    let memory = ram.guest_memory().unwrap();
    memory.write_obj(1u8, GuestAddress(4 << 30)).unwrap();
    let mut page = [1; PAGE_SIZE];
    ram.copy_out((3 << 30) / PAGE_BYTES, &mut page);
    assert_eq!((page[0], page[1]), (1, 0));
}

proptest! {
    #[test]
    fn a_bitmap_holds_what_was_set_in_it(ranges in prop::collection::vec((0u64..500, 0u64..200), 0..10)) {
        let bitmap = PageBitmap::new(600);
        let mut model = HashSet::new();
        for (start, len) in ranges {
            bitmap.set(start..start + len);
            model.extend(start..start + len);
        }
        for page in 0..600 {
            prop_assert_eq!(bitmap.get(page), model.contains(&page));
        }
    }
}

#[test]
fn present_pages_are_told_once_however_scattered_they_are() {
    for n_kinds in [600, 5000] {
        let Lazy { lazy, ram, .. } = mappable(128);
        let extent = Extent::new(0..3 * n_kinds + 64).unwrap();
        lazy.prefetch(&[extent], Placement::Mapped, false).unwrap();
        // Of three pages one is the guest's own, one the file's, and one was not touched.
        for page in (1..3 * n_kinds).step_by(3) {
            ram.populate(page..page + 1, true).unwrap();
            ram.populate(page + 1..page + 2, false).unwrap();
        }
        let told = ram.present_pages().unwrap();
        let overlap = told
            .windows(2)
            .find(|pair| pair[1].pages.start < pair[0].pages.end);
        assert_eq!(overlap, None);
        let own: Vec<_> = ram.own_pages().unwrap().into_iter().flatten().collect();
        assert_eq!(own, (1..3 * n_kinds).step_by(3).collect::<Vec<_>>());
    }
}
