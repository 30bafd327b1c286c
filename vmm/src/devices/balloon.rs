//! virtio-balloon: memory that the guest gives back.
//!
//! Runs on the I/O thread. Inflated pages and reported free pages are handed to the `discard` callback as
//! page-aligned ranges of guest memory; what that does to them is the memory's business. A page taken back by
//! deflating needs nothing: it is touched again.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use super::mmio::{Model, VirtioDevice};
use super::queue::{Buffers, Drained};
use crate::memory::GuestMemory;

#[cfg(test)]
mod tests;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Linux numbers the queues that exist; statistics and hints do not.
const REPORTING: usize = 2;

const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

const PAGE_BYTES: u64 = 4096;
const BUDGET: usize = 64;
/// Most page numbers in one request; the Linux driver sends 256.
const MAX_PFNS: usize = 4096;

/// Called with the ranges that the guest gave back.
pub type Discard = Arc<dyn Fn(GuestAddress, u64) + Send + Sync>;

/// The balloon.
pub(crate) struct Balloon {
    discard: Discard,
    /// How many pages the guest shall give back.
    pub(crate) target_pages: u32,
    /// How many it says it gave.
    pub(crate) actual_pages: u32,
}

impl Balloon {
    /// An empty balloon.
    pub(crate) fn new(discard: Discard) -> Self {
        Self {
            discard,
            target_pages: 0,
            actual_pages: 0,
        }
    }

    fn inflate(&self, memory: &GuestMemory, buffers: &mut Buffers<'_>) {
        let mut run: Option<(u64, u64)> = None;
        for _ in 0..MAX_PFNS {
            let Some(pfn) = buffers.read_array::<4>().map(u32::from_le_bytes) else {
                break;
            };
            let gpa = u64::from(pfn) * PAGE_BYTES;
            run = match run {
                Some((start, len)) if start + len == gpa => Some((start, len + PAGE_BYTES)),
                Some((start, len)) => {
                    self.discard_range(memory, start, len);
                    Some((gpa, PAGE_BYTES))
                }
                None => Some((gpa, PAGE_BYTES)),
            };
        }
        if let Some((start, len)) = run {
            self.discard_range(memory, start, len);
        }
    }

    /// Discards the whole pages of a range, if all of it is memory.
    fn discard_range(&self, memory: &GuestMemory, gpa: u64, len: u64) {
        let Some(end) = gpa.checked_add(len) else { return };
        let Some(start) = gpa.checked_next_multiple_of(PAGE_BYTES) else {
            return;
        };
        let Some(len) = (end - end % PAGE_BYTES).checked_sub(start).filter(|&len| len > 0) else {
            return;
        };
        let in_memory = usize::try_from(len)
            .is_ok_and(|len| memory.check_range(GuestAddress(start), len, Permissions::ReadWrite));
        if in_memory {
            (self.discard)(GuestAddress(start), len);
        } else {
            tracing::warn!(gpa, len, "balloon pages are not guest memory");
        }
    }
}

impl fmt::Debug for Balloon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balloon")
            .field("target_pages", &self.target_pages)
            .finish_non_exhaustive()
    }
}

impl Model for Balloon {
    const DEVICE_ID: u32 = 5;
    const QUEUE_SIZES: &'static [u16] = &[128, 128, 128];

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn config(&self) -> Vec<u8> {
        [self.target_pages.to_le_bytes(), self.actual_pages.to_le_bytes()].concat()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset == 4
            && let Ok(bytes) = data.try_into()
        {
            self.actual_pages = u32::from_le_bytes(bytes);
        }
    }

    fn reset(&mut self) {
        self.actual_pages = 0;
    }
}

/// Takes what the guest gives back.
pub(crate) fn serve(device: &VirtioDevice<Balloon>, pause: &AtomicBool) {
    device.serve(|balloon, queues| {
        let memory = queues.memory;
        for index in [INFLATE, DEFLATE, REPORTING] {
            let drained = queues.queues[index].drain(memory, pause, BUDGET, |mut chain| {
                match index {
                    INFLATE => balloon.inflate(memory, &mut chain.readable),
                    REPORTING => {
                        for &(gpa, len) in &chain.writable_ranges {
                            balloon.discard_range(memory, gpa, u64::from(len));
                        }
                    }
                    _ => {}
                }
                Ok(0)
            })?;
            if drained == Drained::More {
                queues.come_back(index);
            }
            queues.notify(index)?;
        }
        Ok(())
    });
}
