//! Writing a frozen machine to its image.
//!
//! Runs on one thread that only reads guest memory, so that a wake need not wait for it: it looks at the cancel
//! flag between chunks and leaves the header invalid. Every chunk is copied out first, and checksum and file get
//! the copy, so that even a page torn by a guest that runs again is stored with its own checksum; it is present
//! in memory, and so is never read back.
//!
//! Order on disk: room is reserved; the valid flag is cleared, durably; pages, holes, checksums and state are
//! written; all of it is made durable; the valid flag is set, durably.

mod plan;
mod room;

pub use plan::Plan;

use self::room::Room;

use super::file::page_checksum;
use super::{Extent, Header, HeaderError, HostSignature, ImageFile, ImageLayout, PageError, PageSource};
use super::{VMSTATE_CAPACITY, encode_working_set};
use crate::layout::{PAGE_BYTES, PAGE_SIZE};
use crate::memory::Ram;
use crate::pages::pieces;
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use torpor_api::vmm::PersistStats;

/// Pages handled between two looks at the cancel flag: somebody waits for the processor when it is set.
pub(super) const CHUNK_PAGES: u64 = 64;

/// Why there is no new image.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// A run ended it.
    #[error("persist was cancelled by a run")]
    Cancelled,
    /// The file system has no room.
    #[error("no room for the image: cannot {operation}")]
    DiskFull {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Reading or writing failed.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A page that was never touched can't be taken over from the image that it is in.
    #[error("cannot take over untouched pages")]
    Source(#[from] PageError),
    /// The state does not fit.
    #[error("machine state of {len} bytes is over the limit of {VMSTATE_CAPACITY}")]
    StateTooLarge {
        /// Its length.
        len: usize,
    },
    /// The header can't be made.
    #[error("cannot encode the image header")]
    Header(#[from] HeaderError),
}

fn failed(operation: &'static str) -> impl Fn(io::Error) -> PersistError {
    move |source| match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => PersistError::DiskFull { operation, source },
        _ => PersistError::Io { operation, source },
    }
}

/// What goes into an image beside memory.
#[derive(Debug, Clone)]
pub struct Contents {
    /// Generation that the image gets.
    pub generation: u64,
    /// Generation of the disk at the freeze.
    pub disk_generation: u64,
    /// Number of vCPUs.
    pub n_vcpus: u8,
    /// Encoded state.
    pub vmstate: Vec<u8>,
    /// Working set.
    pub working_set: Vec<Extent>,
    /// This host.
    pub host: HostSignature,
}

/// Brings the disk's cached writes to its file and returns that, to be made durable; called once memory is written
/// and before the image is marked valid. It may run beside a guest that was woken, and so must be short.
pub type FlushDisk = Box<dyn FnOnce() -> io::Result<Option<File>> + Send>;

/// A persist, or the copying ahead of one, ready to run on a thread.
pub struct Persist {
    /// The machine's memory: frozen, for a persist.
    pub ram: Arc<Ram>,
    /// Where to write.
    pub target: File,
    /// What the target holds, with its checksums. Shared with the filling of missing pages if it is their file.
    pub baseline: Arc<ImageFile>,
    /// Where untouched pages are, if not in the target.
    pub source: Option<Arc<ImageFile>>,
    /// The target holds nothing of use yet: the baseline is all its base, or all zeros.
    pub fresh: bool,
    /// The rest of the image.
    pub contents: Contents,
    /// Set to end it.
    pub cancel: Arc<AtomicBool>,
    /// The disk, for a persist.
    pub flush_disk: Option<FlushDisk>,
}

/// How a persist sees whether to go on.
pub(super) fn check_cancel(cancel: &AtomicBool) -> Result<(), PersistError> {
    if cancel.load(Ordering::Acquire) {
        Err(PersistError::Cancelled)
    } else {
        Ok(())
    }
}

impl Persist {
    /// Write the image.
    ///
    /// # Errors
    /// The file then holds no valid image, or, if the error came before anything was written, still the old one.
    pub fn run(mut self) -> Result<PersistStats, PersistError> {
        let started = Instant::now();
        if self.contents.vmstate.len() as u64 > VMSTATE_CAPACITY {
            return Err(PersistError::StateTooLarge {
                len: self.contents.vmstate.len(),
            });
        }
        let flush_disk = self.flush_disk.take();
        let (plan, written_bytes) = self.write(|layout, plan| self.replace(layout, plan, flush_disk))?;
        Ok(PersistStats {
            generation: self.contents.generation,
            disk_generation: self.contents.disk_generation,
            present_pages: plan.present_pages,
            written_pages: plan.written_pages(),
            zero_pages: plan.zero_pages,
            written_bytes,
            pre_copied_bytes: 0,
            durable_us: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
        })
    }

    /// Write what a guest that runs has changed so far; how many bytes. The image is not valid after it, but the next
    /// persist finds there what has not changed since. A page is copied first, so that its checksum is of what is
    /// written, whatever the guest does meanwhile.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn pre_copy(self) -> Result<u64, PersistError> {
        let ahead = |layout, plan: &Plan| {
            let (_, written_bytes) = self.write_memory(layout, plan, &[])?;
            self.target
                .sync_data()
                .map_err(failed("make what was copied ahead durable"))?;
            Ok(written_bytes)
        };
        self.write(ahead).map(|(_, written_bytes)| written_bytes)
    }

    /// Plan, reserve, and write by `replace`; the plan and how many bytes were written.
    fn write(
        &self,
        replace: impl FnOnce(ImageLayout, &Plan) -> Result<u64, PersistError>,
    ) -> Result<(Plan, u64), PersistError> {
        check_cancel(&self.cancel)?;
        let layout = self.baseline.layout();
        let plan = Plan::make(
            &self.ram,
            &self.baseline,
            self.source.as_deref(),
            self.fresh && self.baseline.base().is_none(),
            &self.cancel,
        )?;
        let replaced = self.reserve(layout, &plan).and_then(|()| {
            let replaced = replace(layout, &plan);
            match &replaced {
                Ok(_) => self.baseline.trust(),
                Err(PersistError::Cancelled) => {}
                Err(_) => self.baseline.suspect(),
            }
            replaced
        });
        if self.fresh && matches!(&replaced, Err(error) if !matches!(error, PersistError::Cancelled)) {
            self.empty_target();
        }
        Ok((plan, replaced?))
    }

    /// Give up the old image and write memory and checksums; the new header, not valid yet, and how many bytes.
    fn write_memory(
        &self,
        layout: ImageLayout,
        plan: &Plan,
        working_set: &[u8],
    ) -> Result<(Header, u64), PersistError> {
        check_cancel(&self.cancel)?;
        let header = self.header(working_set)?;
        self.write_header(&header)?;
        self.target.sync_data().map_err(failed("clear the valid flag"))?;
        let n_pages_bytes = self.write_pages(plan)? + self.take_over(plan)?;
        self.punch_holes(layout, plan)?;
        let n_table_bytes = self
            .baseline
            .write_table(&self.target)
            .map_err(failed("write checksums"))?;
        Ok((header, n_pages_bytes + n_table_bytes))
    }

    /// Give up the old image and write the new one; how many bytes.
    fn replace(
        &self,
        layout: ImageLayout,
        plan: &Plan,
        flush_disk: Option<FlushDisk>,
    ) -> Result<u64, PersistError> {
        let working_set = encode_working_set(&self.contents.working_set);
        let (mut header, mut written_bytes) = self.write_memory(layout, plan, &working_set)?;
        for (bytes, offset, operation) in [
            (
                &self.contents.vmstate,
                layout.vmstate_offset(),
                "write the machine state",
            ),
            (&working_set, layout.working_set_offset(), "write the working set"),
        ] {
            self.target
                .write_all_at(bytes, offset)
                .map_err(failed(operation))?;
            written_bytes += bytes.len() as u64;
        }
        check_cancel(&self.cancel)?;
        let disk = flush_disk.map_or(Ok(None), |flush| flush());
        let disk = disk.map_err(failed("flush the disk"))?;
        check_cancel(&self.cancel)?;
        if let Some(disk) = disk {
            disk.sync_data().map_err(failed("make the disk durable"))?;
        }
        check_cancel(&self.cancel)?;
        self.target
            .sync_data()
            .map_err(failed("make the image durable"))?;
        check_cancel(&self.cancel)?;
        header.valid = true;
        let page = header.encode()?;
        self.target
            .write_all_at(&page, 0)
            .map_err(failed("set the valid flag"))?;
        self.target.sync_data().map_err(failed("set the valid flag"))?;
        Ok(written_bytes + 2 * page.len() as u64)
    }

    /// A first image that failed holds nothing of use, and the next one begins anew.
    fn empty_target(&self) {
        if let Err(error) = self.target.set_len(0) {
            tracing::warn!(%error, "cannot empty an image that was not finished");
        }
    }

    fn header(&self, working_set: &[u8]) -> Result<Header, PersistError> {
        let contents = &self.contents;
        Ok(Header {
            valid: false,
            generation: contents.generation,
            disk_generation: contents.disk_generation,
            mem_bytes: self.ram.layout().len_bytes(),
            n_vcpus: contents.n_vcpus.into(),
            vmstate_len: u32::try_from(contents.vmstate.len()).unwrap_or(u32::MAX),
            vmstate_crc: crc32c::crc32c(&contents.vmstate),
            working_set_len: u32::try_from(working_set.len()).unwrap_or(u32::MAX),
            base: self.baseline.base_name(),
            host: contents.host.clone(),
        })
    }

    fn write_header(&self, header: &Header) -> Result<(), PersistError> {
        let page = header.encode()?;
        self.target
            .write_all_at(&page, 0)
            .map_err(failed("clear the valid flag"))
    }

    /// Have all room before the old image is given up.
    fn reserve(&self, layout: ImageLayout, plan: &Plan) -> Result<(), PersistError> {
        if self.fresh {
            // Whatever the file held is not this machine's: no hole may show it.
            self.target.set_len(0).map_err(failed("truncate the image"))?;
        }
        self.target
            .set_len(layout.file_len(self.baseline.base().is_some()))
            .map_err(failed("size the image"))?;
        let mut room = Room::in_file(&self.target);
        let reserved = self.reserve_all(&mut room, layout, plan);
        // A cancelled one keeps it: the next one will want it, and the guest is waiting.
        if matches!(&reserved, Err(error) if !matches!(error, PersistError::Cancelled)) {
            room.give_back();
        }
        reserved
    }

    fn reserve_all(&self, room: &mut Room<'_>, layout: ImageLayout, plan: &Plan) -> Result<(), PersistError> {
        let vmstate_end = layout.vmstate_offset() + self.contents.vmstate.len() as u64;
        room.reserve(0..vmstate_end.next_multiple_of(PAGE_BYTES))?;
        room.reserve(layout.checksums_offset()..layout.data_offset())?;
        for pages in plan.write.iter().chain(&plan.take_over) {
            check_cancel(&self.cancel)?;
            room.reserve(layout.page_offset(pages.start)..layout.page_offset(pages.end))?;
        }
        Ok(())
    }

    fn write_pages(&self, plan: &Plan) -> Result<u64, PersistError> {
        let mut buffer = vec![0; PAGE_SIZE * usize::try_from(CHUNK_PAGES).unwrap_or(1)];
        let layout = self.baseline.layout();
        let mut written_bytes = 0;
        for run in &plan.write {
            for pages in pieces(run.clone(), CHUNK_PAGES) {
                check_cancel(&self.cancel)?;
                let len = PAGE_SIZE * usize::try_from(pages.end - pages.start).unwrap_or(0);
                let content = &mut buffer[..len];
                self.content(plan, pages.clone(), content)?;
                for (page, bytes) in pages.clone().zip(content.chunks_exact(PAGE_SIZE)) {
                    let sum = page_checksum(bytes);
                    self.baseline
                        .set_checksum(page, sum)
                        .map_err(failed("note a checksum"))?;
                }
                let offset = layout.page_offset(pages.start);
                self.target
                    .write_all_at(content, offset)
                    .map_err(failed("write guest memory"))?;
                self.baseline.hold(pages).map_err(failed("note a page"))?;
                written_bytes += content.len() as u64;
            }
        }
        Ok(written_bytes)
    }

    /// Pages of the base that are to be in the image, too. The guest may be given one meanwhile: from the base, until it is
    /// written.
    fn take_over(&self, plan: &Plan) -> Result<u64, PersistError> {
        let layout = self.baseline.layout();
        let mut written_bytes = 0;
        for pages in &plan.take_over {
            check_cancel(&self.cancel)?;
            let mut content = vec![0; PAGE_SIZE * usize::try_from(pages.end - pages.start).unwrap_or(0)];
            self.baseline.read(pages.start, &mut content)?;
            self.target
                .write_all_at(&content, layout.page_offset(pages.start))
                .map_err(failed("write pages of the base"))?;
            let held = self.baseline.hold_for_now(pages.clone());
            held.map_err(failed("note a page"))?;
            written_bytes += content.len() as u64;
        }
        Ok(written_bytes)
    }

    /// Pages are written from memory if they are present, or else from the image that still has them.
    fn content(&self, plan: &Plan, pages: Range<u64>, buffer: &mut [u8]) -> Result<(), PersistError> {
        for (page, bytes) in pages.zip(buffer.chunks_exact_mut(PAGE_SIZE)) {
            match &self.source {
                Some(source) if !plan.is_present(page) => source.read(page, bytes)?,
                _ => self.ram.copy_out(page, bytes),
            }
        }
        Ok(())
    }

    fn punch_holes(&self, layout: ImageLayout, plan: &Plan) -> Result<(), PersistError> {
        for pages in &plan.punch {
            check_cancel(&self.cancel)?;
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let bytes = layout.page_offset(pages.start)..layout.page_offset(pages.end);
            match fallocate_range(&self.target, flags, &bytes) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => self.write_zeros(&bytes)?,
                result => result.map_err(failed("free zero pages of the image"))?,
            }
            for page in pages.clone() {
                let sum = super::file::zero_checksum();
                self.baseline
                    .set_checksum(page, sum)
                    .map_err(failed("note a checksum"))?;
            }
            self.baseline.hold(pages.clone()).map_err(failed("note a page"))?;
        }
        Ok(())
    }

    fn write_zeros(&self, bytes: &Range<u64>) -> Result<(), PersistError> {
        for offset in (bytes.start..bytes.end).step_by(PAGE_SIZE) {
            self.target
                .write_all_at(&[0; PAGE_SIZE], offset)
                .map_err(failed("zero pages of the image"))?;
        }
        Ok(())
    }
}

fn fallocate_range(file: &File, flags: FallocateFlags, bytes: &Range<u64>) -> io::Result<()> {
    let too_far = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let offset = i64::try_from(bytes.start).map_err(too_far)?;
    let len = i64::try_from(bytes.end - bytes.start).map_err(too_far)?;
    loop {
        match fallocate(file, flags, offset, len) {
            Err(nix::errno::Errno::EINTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests;
