//! RAM that is filled from a hibernation image when it is touched.
//!
//! One thread reads page faults from userfaultfd and fills a window of pages around each; the working set is put in
//! place in bulk before the vCPUs run ([`super::prefetch`]). A page is copied in only after its checksum was found right. If
//! it can't be read or is wrong, the failure callback is called and must not return in production: the vCPU
//! that waits for the page never goes on (fail closed).
//!
//! userfaultfd's remove events are not asked for: nothing but [`Ram::discard`] removes pages, and it excludes a
//! fill by a lock. So a page that was given back can't come back from the image, and no discard waits for this
//! thread.
//!
//! The windows filled by faults until the first response byte left are recorded here, for the working set
//! ([`super::recording`]).

use super::{MemoryError, PageBitmap, Ram};
use crate::image::{Extent, ImageView, PageError, PageSource, is_zero};
use crate::layout::{PAGE_BYTES, PAGE_SIZE};
use crate::pages::runs_by;
use crate::sys::process::as_fd;
use crate::sys::uffd::{Filled, Uffd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// Pages filled around a fault once the working set is recorded.
pub const WINDOW_PAGES: u64 = 16;
/// The same before: what is filled beside the page that was touched makes later wakes slower.
pub const RECORDED_WINDOW_PAGES: u64 = 4;

/// The view of the image is taken down when no fault came for so long: it takes as long as checking a thousand pages, and the guest
/// has better use for the processor until it has answered.
const VIEW_QUIET_MS: u16 = 1000;

/// A page that can't be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// Reading or checking the image failed.
    #[error("cannot fill guest pages {first}..{end}")]
    Source {
        /// First page.
        first: u64,
        /// End.
        end: u64,
        /// Why.
        #[source]
        source: PageError,
    },
    /// userfaultfd failed.
    #[error("cannot place guest pages {first}..{end}")]
    Place {
        /// First page.
        first: u64,
        /// End.
        end: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Reading events failed.
    #[error("cannot read page faults")]
    Events(#[source] std::io::Error),
    /// A fault where no RAM is.
    #[error("page fault at {address:#x}, which is not guest memory")]
    Stray {
        /// Host address.
        address: u64,
    },
}

impl FillError {
    /// These pages can't be read.
    pub(super) fn source(pages: &Range<u64>) -> impl Fn(PageError) -> Self + Copy {
        let (first, end) = (pages.start, pages.end);
        move |source| Self::Source { first, end, source }
    }

    /// These pages can't be put in place.
    pub(super) fn place(pages: &Range<u64>) -> impl Fn(std::io::Error) -> Self + Copy {
        let (first, end) = (pages.start, pages.end);
        move |source| Self::Place { first, end, source }
    }
}

/// Called when a page can't be given to the guest.
pub type FailureSink = Box<dyn Fn(FillError) + Send>;

/// How much was filled, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FillCounts {
    /// Faults served through userfaultfd.
    pub faults: u64,
    /// Those of them before the first response byte.
    pub faults_first_byte: u64,
    /// Pages of the mapped image that the kernel had to bring before the first response byte.
    pub mapped_faults_first_byte: u64,
    /// Pages filled or mapped.
    pub pages: u64,
}

#[derive(Debug, Default)]
struct FillCounters {
    faults: AtomicU64,
    faults_first_byte: AtomicU64,
    mapped_faults_first_byte: AtomicU64,
    pages: AtomicU64,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) ram: Arc<Ram>,
    pub(super) uffd: Uffd,
    pub(super) source: Arc<dyn PageSource>,
    pub(super) filled: PageBitmap,
    recorded: Mutex<Option<Vec<Range<u64>>>>,
    /// What the working set was checked by, until nothing has faulted for a while.
    view: Mutex<Option<Arc<ImageView>>>,
    /// Pages under which the image was mapped, in parts that are in one file each.
    pub(super) mapped: OnceLock<Vec<Range<u64>>>,
    /// Pages that were put in place before anybody touched them, in order.
    pub(super) ahead: OnceLock<Vec<Range<u64>>>,
    /// The working set that stays, if it was put in place unwatched.
    pub(super) kept: OnceLock<Vec<Extent>>,
    counters: FillCounters,
}

/// The filling of one RAM.
#[derive(Debug)]
pub struct LazyMemory {
    pub(super) shared: Arc<Shared>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl LazyMemory {
    /// Register mapped, untouched RAM and start the thread.
    ///
    /// # Errors
    /// userfaultfd or the thread could not be had.
    pub fn start(
        ram: Arc<Ram>,
        uffd: Uffd,
        source: Arc<dyn PageSource>,
        on_failure: FailureSink,
    ) -> Result<Self, MemoryError> {
        let register = |source| MemoryError::Uffd {
            operation: "register guest memory",
            source,
        };
        uffd.register(ram.hva(0), ram.layout().len_bytes())
            .map_err(register)?;
        let shared = Arc::new(Shared {
            filled: PageBitmap::new(ram.layout().n_pages()),
            ram,
            uffd,
            source,
            recorded: Mutex::new(Some(Vec::new())),
            view: Mutex::default(),
            mapped: OnceLock::new(),
            ahead: OnceLock::new(),
            kept: OnceLock::new(),
            counters: FillCounters::default(),
        });
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MemoryError::Thread)?;
        let thread_stop = stop.try_clone().map_err(MemoryError::Thread)?;
        let served = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("page-faults".to_owned())
            .spawn(move || {
                if let Err(error) = served.serve(&thread_stop) {
                    on_failure(error);
                }
            })
            .map_err(MemoryError::Thread)?;
        Ok(Self {
            shared,
            stop,
            thread: Some(thread),
        })
    }

    /// So far.
    #[must_use]
    pub fn counts(&self) -> FillCounts {
        let counters = &self.shared.counters;
        FillCounts {
            faults: counters.faults.load(Ordering::Relaxed),
            faults_first_byte: counters.faults_first_byte.load(Ordering::Relaxed),
            mapped_faults_first_byte: counters.mapped_faults_first_byte.load(Ordering::Relaxed),
            pages: counters.pages.load(Ordering::Relaxed),
        }
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        let stopped = self.stop.write(1).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| stopped) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn serve(&self, stop: &EventFd) -> Result<(), FillError> {
        let mut addresses = Vec::new();
        let mut buffer = Vec::new();
        let mut patience = PollTimeout::from(VIEW_QUIET_MS);
        loop {
            addresses.clear();
            self.uffd.read_faults(&mut addresses).map_err(FillError::Events)?;
            if addresses.is_empty() {
                match wait(&self.uffd, stop, patience).map_err(|e| FillError::Events(e.into()))? {
                    Awaited::Fault => {}
                    Awaited::Quiet => {
                        // Set by the prefetch, at its end.
                        if self.ahead.get().is_some() {
                            self.view().take();
                            patience = PollTimeout::NONE;
                        }
                    }
                    Awaited::Stop => return Ok(()),
                }
                continue;
            }
            // Not before: its pages would be touched while a wake waits for this thread to start.
            buffer.resize(PAGE_SIZE * usize::try_from(WINDOW_PAGES).unwrap_or(1), 0);
            for &address in &addresses {
                self.serve_fault(address, &mut buffer)?;
            }
        }
    }

    fn serve_fault(&self, address: u64, buffer: &mut [u8]) -> Result<(), FillError> {
        let page = self.ram.page_of(address).ok_or(FillError::Stray { address })?;
        self.counters.faults.fetch_add(1, Ordering::Relaxed);
        let size = if self.is_recording() {
            RECORDED_WINDOW_PAGES
        } else {
            WINDOW_PAGES
        };
        let start = page / size * size;
        let window = start..(start + size).min(self.ram.layout().n_pages());
        // Before the fill: it lets the guest go on, and the first response byte must not overtake the record.
        if window.clone().any(|page| self.kind(page) == Kind::InImage) {
            self.record(&window);
        }
        self.fill(window, buffer)?;
        // Another vCPU's fault may have brought the page between this fault and now: nobody else wakes it.
        self.uffd
            .wake(self.ram.hva(page * PAGE_BYTES), PAGE_BYTES)
            .map_err(FillError::place(&(page..page + 1)))
    }

    pub(super) fn view(&self) -> MutexGuard<'_, Option<Arc<ImageView>>> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recorded(&self) -> MutexGuard<'_, Option<Vec<Range<u64>>>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_recording(&self) -> bool {
        self.recorded().is_some()
    }

    fn record(&self, window: &Range<u64>) {
        if let Some(windows) = self.recorded().as_mut() {
            windows.push(window.clone());
        }
    }

    /// Windows filled by faults since the restore; from here on nothing is recorded, and the counts up to the first
    /// byte stand. Nothing if that was done before.
    pub(super) fn stop_recording(&self) -> Option<Vec<Range<u64>>> {
        let windows = self.recorded().take()?;
        let faults = self.counters.faults.load(Ordering::Relaxed);
        self.counters.faults_first_byte.store(faults, Ordering::Relaxed);
        Some(windows)
    }

    pub(super) fn note_mapped_faults(&self, n_pages: u64) {
        self.counters
            .mapped_faults_first_byte
            .store(n_pages, Ordering::Relaxed);
    }

    pub(super) fn count_pages(&self, n_pages: u64) {
        self.counters.pages.fetch_add(n_pages, Ordering::Relaxed);
    }

    /// Fill the missing pages of a range that fits the buffer.
    pub(super) fn fill(&self, pages: Range<u64>, buffer: &mut [u8]) -> Result<u64, FillError> {
        let _no_discard = self.ram.fill.lock().unwrap_or_else(PoisonError::into_inner);
        let mut n_filled = 0;
        for (run, kind) in runs_by(pages, |page| self.kind(page)) {
            match kind {
                Kind::Filled => {}
                // May be present: it was touched again after it was given back.
                Kind::Discarded => self.place_zeros(run)?,
                Kind::InImage => {
                    let n_pages = run.end - run.start;
                    self.count_pages(n_pages);
                    self.fill_from_source(run, buffer)?;
                    n_filled += n_pages;
                }
            }
        }
        Ok(n_filled)
    }

    pub(super) fn kind(&self, page: u64) -> Kind {
        // The kernel serves what was mapped, after it was given back, too: userfaultfd refuses to place anything there.
        if self.ram.is_mapped(page) {
            Kind::Filled
        } else if self.ram.is_discarded(page) {
            Kind::Discarded
        } else if self.filled.get(page) {
            Kind::Filled
        } else {
            Kind::InImage
        }
    }

    fn fill_from_source(&self, pages: Range<u64>, buffer: &mut [u8]) -> Result<(), FillError> {
        let len = usize::try_from(pages.end - pages.start)
            .unwrap_or(usize::MAX)
            .saturating_mul(PAGE_SIZE);
        let buffer = &mut buffer[..len];
        self.source
            .read(pages.start, buffer)
            .map_err(FillError::source(&pages))?;
        let mut page = pages.start;
        for run in runs(buffer) {
            let end = page + (run.bytes.len() / PAGE_SIZE) as u64;
            if run.zero {
                self.place_zeros(page..end)?;
            } else {
                self.place(page..end, Some(run.bytes))?;
            }
            page = end;
        }
        self.filled.set(pages);
        Ok(())
    }

    pub(super) fn place_zeros(&self, pages: Range<u64>) -> Result<(), FillError> {
        self.place(pages, None)
    }

    /// Put data, or zeros, at pages of which some may be present already; those keep what they have.
    pub(super) fn place(&self, pages: Range<u64>, data: Option<&[u8]>) -> Result<(), FillError> {
        let failed = FillError::place(&pages);
        let start = self.ram.hva(pages.start * PAGE_BYTES);
        let len = (pages.end - pages.start) * PAGE_BYTES;
        let mut done = 0;
        while done < len {
            let filled = match data {
                Some(data) => {
                    let from = usize::try_from(done).unwrap_or(usize::MAX).min(data.len());
                    self.uffd.copy(start + done, &data[from..])
                }
                None => self.uffd.zero(start + done, len - done),
            };
            match filled.map_err(failed)? {
                Filled::All => break,
                Filled::UpToPresent(n) => done += n + PAGE_BYTES,
                Filled::Retry(n) => done += n,
            }
        }
        Ok(())
    }
}

/// What a page needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Filled,
    Discarded,
    InImage,
}

pub(super) struct Run<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) zero: bool,
}

/// Runs of pages that are all zero, or all not.
pub(super) fn runs(mut rest: &[u8]) -> impl Iterator<Item = Run<'_>> {
    std::iter::from_fn(move || {
        let zero = is_zero(rest.get(..PAGE_SIZE)?);
        let n_same = rest
            .chunks_exact(PAGE_SIZE)
            .take_while(|page| is_zero(page) == zero)
            .count();
        let (bytes, after) = rest.split_at(n_same * PAGE_SIZE);
        rest = after;
        Some(Run { bytes, zero })
    })
}

/// What came first.
enum Awaited {
    Fault,
    Quiet,
    Stop,
}

/// Wait for a fault, or for so long that none came.
fn wait(uffd: &Uffd, stop: &EventFd, patience: PollTimeout) -> nix::Result<Awaited> {
    let mut fds = [
        PollFd::new(uffd.as_fd(), PollFlags::POLLIN),
        PollFd::new(as_fd(stop), PollFlags::POLLIN),
    ];
    match poll(&mut fds, patience) {
        Ok(0) => Ok(Awaited::Quiet),
        Ok(_) if fds[1].any().unwrap_or(false) => Ok(Awaited::Stop),
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(Awaited::Fault),
        Err(error) => Err(error),
    }
}
