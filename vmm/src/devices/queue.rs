//! One split virtqueue as the devices use it: chains out of the available ring, completions into the used ring.
//!
//! Everything read here was written by the guest. A [`Chain`] exists only if its descriptors end properly, its
//! readable part comes before its writable part and every byte lies in guest memory, so devices need not check
//! again. A [`QueueError`] means a driver that can't be trusted with more: the transport sets `NEEDS_RESET`.
//! Not its job: who calls it when (the device threads), and what is in the buffers (the devices).

use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestMemory as _, Permissions, VolatileSlice};

use crate::memory::GuestMemory;

/// Most pieces of guest memory in one chain; also what one `readv` takes.
const MAX_PIECES: usize = 1024;

/// Why a queue can't be served any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    /// Ring indices or addresses make no sense.
    #[error("cannot use the virtqueue's rings")]
    Ring(#[source] virtio_queue::Error),
    /// A loop, an index out of the table, a bad indirect table or more than 4 GiB.
    #[error("descriptor chain {head} does not end")]
    Endless {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// Readable after writable.
    #[error("descriptor chain {head} has a readable buffer after a writable one")]
    Order {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// Not RAM.
    #[error("buffer at gpa={gpa:#x} of {len:#x} bytes is not guest memory")]
    Outside {
        /// Where it begins.
        gpa: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// What the device must read or write does not fit.
    #[error("descriptor chain {head} is too short")]
    Short {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// Too many pieces.
    #[error("descriptor chain {head} has more than {MAX_PIECES} pieces")]
    TooManyPieces {
        /// Index of the chain's first descriptor.
        head: u16,
    },
}

/// Pieces of guest memory, in order; never referenced, only copied from and to.
#[derive(Debug, Default)]
pub(crate) struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
}

impl<'m> Buffers<'m> {
    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.slices.iter().map(VolatileSlice::len).sum()
    }

    /// The pieces.
    pub(crate) fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// Splits the first `n_bytes` off; `None`, and nothing changed, if there are fewer.
    pub(crate) fn take_front(&mut self, n_bytes: usize) -> Option<Buffers<'m>> {
        if n_bytes > self.len() {
            return None;
        }
        let mut front = Vec::new();
        let mut left = n_bytes;
        let mut rest = Vec::new();
        for slice in self.slices.drain(..) {
            if left >= slice.len() {
                left -= slice.len();
                front.push(slice);
            } else if left > 0 {
                let (head, tail) = slice.split_at(left).ok()?;
                left = 0;
                front.push(head);
                rest.push(tail);
            } else {
                rest.push(slice);
            }
        }
        self.slices = rest;
        Some(Buffers { slices: front })
    }

    /// Splits the last `n_bytes` off.
    pub(crate) fn take_back(&mut self, n_bytes: usize) -> Option<Buffers<'m>> {
        let keep = self.len().checked_sub(n_bytes)?;
        let front = self.take_front(keep)?;
        Some(std::mem::replace(self, front))
    }

    /// Takes exactly `N` bytes from the front and copies them out.
    pub(crate) fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.take_front(N)?.copy_to(&mut bytes);
        Some(bytes)
    }

    /// Copies out as much as fits; returns how many bytes.
    pub(crate) fn copy_to(&self, out: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            done += slice.copy_to(&mut out[done..]);
        }
        done
    }

    /// Copies in as much as fits; returns how many bytes.
    pub(crate) fn copy_from(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let n_bytes = slice.len().min(data.len() - done);
            slice.copy_from(&data[done..done + n_bytes]);
            done += n_bytes;
        }
        done
    }
}

/// One request of the guest, checked.
#[derive(Debug)]
pub(crate) struct Chain<'m> {
    /// Names the chain in the used ring.
    pub(crate) head: u16,
    /// What the guest wrote.
    pub(crate) readable: Buffers<'m>,
    /// What the device may write.
    pub(crate) writable: Buffers<'m>,
    /// Guest addresses and lengths of the writable buffers.
    pub(crate) writable_ranges: Vec<(u64, u32)>,
}

/// Whether a queue was worked off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drained {
    /// Nothing left; the guest kicks for the next one.
    Empty,
    /// A pause or the budget ended it; nobody will kick.
    More,
}

/// A virtqueue.
#[derive(Debug)]
pub(crate) struct Virtqueue {
    queue: Queue,
}

impl Virtqueue {
    /// An unconfigured queue. `max_size` is a constant of the device: a power of two.
    pub(crate) fn new(max_size: u16) -> Result<Self, QueueError> {
        Ok(Self {
            queue: Queue::new(max_size).map_err(QueueError::Ring)?,
        })
    }

    /// The configuration registers.
    pub(crate) fn registers(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Whether the driver enabled it.
    pub(crate) fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// Enables it if its rings lie in memory.
    pub(crate) fn enable(&mut self, memory: &GuestMemory) -> bool {
        self.queue.set_ready(true);
        let valid = self.queue.avail_ring() != 0 && self.queue.is_valid(memory);
        self.queue.set_ready(valid);
        valid
    }

    /// The next chain, if there is one.
    pub(crate) fn next<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let Some(descriptors) = self.queue.iter(memory).map_err(QueueError::Ring)?.next() else {
            return Ok(None);
        };
        let head = descriptors.head_index();
        let mut chain = Chain {
            head,
            readable: Buffers::default(),
            writable: Buffers::default(),
            writable_ranges: Vec::new(),
        };
        let mut ended = false;
        for descriptor in descriptors {
            ended = !descriptor.has_next();
            let writable = descriptor.is_write_only();
            if !writable && !chain.writable_ranges.is_empty() {
                return Err(QueueError::Order { head });
            }
            if writable {
                chain
                    .writable_ranges
                    .push((descriptor.addr().0, descriptor.len()));
            }
            let buffers = if writable {
                &mut chain.writable
            } else {
                &mut chain.readable
            };
            append(buffers, memory, descriptor.addr(), descriptor.len())?;
            if chain.readable.slices.len() + chain.writable.slices.len() > MAX_PIECES
                || chain.writable_ranges.len() > MAX_PIECES
            {
                return Err(QueueError::TooManyPieces { head });
            }
        }
        if ended {
            Ok(Some(chain))
        } else {
            Err(QueueError::Endless { head })
        }
    }

    /// Gives the chain taken last back to the available ring.
    pub(crate) fn undo(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Position in the available ring, to return to with [`Virtqueue::rewind`].
    pub(crate) fn position(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Gives back every chain taken since `position`.
    pub(crate) fn rewind(&mut self, position: u16) {
        self.queue.set_next_avail(position);
    }

    /// Returns a chain to the guest with `len_bytes` written.
    pub(crate) fn complete(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        len_bytes: usize,
    ) -> Result<(), QueueError> {
        let len_bytes = u32::try_from(len_bytes).unwrap_or(u32::MAX);
        self.queue
            .add_used(memory, head, len_bytes)
            .map_err(QueueError::Ring)
    }

    /// Asks for a kick at the next chain; true if one is there already.
    pub(crate) fn listen(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue.enable_notification(memory).map_err(QueueError::Ring)
    }

    /// The driver's index in the available ring.
    pub(crate) fn driver_index(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        self.queue
            .avail_idx(memory, Ordering::Acquire)
            .map(|idx| idx.0)
            .map_err(QueueError::Ring)
    }

    /// Asks for a kick when the driver adds a chain past `driver_index`, chains before it or not; true if it has.
    pub(crate) fn listen_past(
        &mut self,
        memory: &GuestMemory,
        driver_index: u16,
    ) -> Result<bool, QueueError> {
        let position = self.queue.next_avail();
        self.queue.set_next_avail(driver_index);
        let added = self.listen(memory);
        self.queue.set_next_avail(position);
        added
    }

    /// Whether the guest wants an interrupt for what was completed since the last call.
    pub(crate) fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue.needs_notification(memory).map_err(QueueError::Ring)
    }

    /// Serves chains with `serve`, which returns the bytes written, until none is left, `pause` is set or
    /// `budget` chains are done.
    pub(crate) fn drain<'m>(
        &mut self,
        memory: &'m GuestMemory,
        pause: &AtomicBool,
        budget: usize,
        mut serve: impl FnMut(Chain<'m>) -> Result<usize, QueueError>,
    ) -> Result<Drained, QueueError> {
        let mut n_done = 0;
        let mut n_empty_looks = 0;
        loop {
            if n_done >= budget || pause.load(Ordering::Acquire) {
                return Ok(Drained::More);
            }
            if let Some(chain) = self.next(memory)? {
                let head = chain.head;
                let len_bytes = serve(chain)?;
                self.complete(memory, head, len_bytes)?;
                n_done += 1;
                n_empty_looks = 0;
            } else {
                // A chain that came after the look at the ring and before the request for a kick brings no kick,
                // so there is a second look. A third would find no more than the second.
                n_empty_looks += 1;
                if !self.listen(memory)? || n_empty_looks > 1 {
                    return Ok(Drained::Empty);
                }
            }
        }
    }

    /// For the image.
    pub(crate) fn save(&self) -> SavedQueue {
        let state = self.queue.state();
        SavedQueue {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            next_avail: state.next_avail,
            next_used: state.next_used,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }

    /// From an image; the size must be the device's.
    pub(crate) fn restore(
        max_size: u16,
        saved: &SavedQueue,
        memory: &GuestMemory,
    ) -> Result<Self, QueueError> {
        if saved.max_size != max_size {
            return Err(QueueError::Ring(virtio_queue::Error::InvalidMaxSize));
        }
        let queue = Queue::try_from(QueueState {
            max_size,
            size: saved.size,
            ready: saved.ready,
            event_idx_enabled: saved.event_idx,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        })
        .map_err(QueueError::Ring)?;
        let mut restored = Self { queue };
        if saved.ready && !restored.enable(memory) {
            return Err(QueueError::Ring(virtio_queue::Error::QueueNotReady));
        }
        Ok(restored)
    }
}

/// A virtqueue in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    max_size: u16,
    size: u16,
    ready: bool,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

fn append<'m>(
    buffers: &mut Buffers<'m>,
    memory: &'m GuestMemory,
    gpa: vm_memory::GuestAddress,
    len: u32,
) -> Result<(), QueueError> {
    if len == 0 {
        return Ok(());
    }
    let outside = || QueueError::Outside { gpa: gpa.0, len };
    let len_bytes = usize::try_from(len).map_err(|_| outside())?;
    gpa.0.checked_add(u64::from(len)).ok_or_else(outside)?;
    for slice in memory
        .get_slices(gpa, len_bytes, Permissions::ReadWrite)
        .map_err(|_| outside())?
    {
        buffers.slices.push(slice.map_err(|_| outside())?);
    }
    Ok(())
}
