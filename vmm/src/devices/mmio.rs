//! virtio-mmio version 2: one device's registers, queues and model behind one lock.
//!
//! vCPU threads come here for the registers, the device thread for the queues. The lock is held for as long as a
//! batch of requests takes; interrupt status and kicks live outside it, so a running guest never waits for it
//! except in a reset. The driver's steps are checked: features only before `FEATURES_OK`, queues only between
//! that and `DRIVER_OK`, rings only inside guest memory. A driver that breaks its queues gets `NEEDS_RESET` and
//! is not served until it resets. Not its job: threads ([`super::worker`]), what a device does ([`Model`]).

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupt::Interrupt;
use super::queue::{QueueError, SavedQueue, Virtqueue};
use super::worker;
use crate::memory::GuestMemory;

#[cfg(test)]
mod tests;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x5052_4f54;
/// Where the device's configuration begins.
const CONFIG_OFFSET: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 0x40;
const FAILED: u32 = 0x80;
const STATUS_BITS: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;

const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const COMMON_FEATURES: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;

/// What makes a device that device.
pub(crate) trait Model: Send + 'static {
    /// The virtio device ID.
    const DEVICE_ID: u32;
    /// Largest size of each queue.
    const QUEUE_SIZES: &'static [u16];
    /// Features beyond those of the transport.
    fn features(&self) -> u64;
    /// The configuration space.
    fn config(&self) -> Vec<u8>;
    /// The driver writes to it.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// The driver chose these features; also after a restore.
    fn negotiated(&mut self, _features: u64) {}
    /// The driver reset the device.
    fn reset(&mut self) {}
}

/// Why a device's saved state was refused.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No memory or backend yet.
    #[error("virtio device {device_id} is not attached")]
    NotAttached {
        /// Its device ID.
        device_id: u32,
    },
    /// State of another device, unknown status, features that are not offered.
    #[error("state of virtio device {device_id} does not fit: {what}")]
    Mismatch {
        /// Its device ID.
        device_id: u32,
        /// What does not fit.
        what: &'static str,
    },
    /// A queue's rings do not fit.
    #[error("state of queue {queue} of virtio device {device_id} does not fit")]
    Queue {
        /// Its device ID.
        device_id: u32,
        /// Index of the queue.
        queue: usize,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A device's registers and queues in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    pub(crate) device_id: u32,
    pub(crate) status: u32,
    pub(crate) driver_features: u64,
    pub(crate) device_features_select: u32,
    pub(crate) driver_features_select: u32,
    pub(crate) queue_select: u32,
    pub(crate) config_generation: u32,
    pub(crate) interrupt_status: u32,
    pub(crate) queues: Vec<SavedQueue>,
}

/// What the bus needs of a device, whichever it is.
pub(crate) trait MmioDevice: Send + Sync {
    /// A vCPU reads.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// A vCPU writes.
    fn write(&self, offset: u64, data: &[u8]);
    /// virtio device ID.
    fn id(&self) -> u32;
    /// Interrupt status and line.
    fn interrupt(&self) -> &Interrupt;
    /// One eventfd per queue.
    fn kicks(&self) -> &[EventFd];
    /// For the image.
    fn save(&self) -> TransportState;
    /// From an image.
    fn restore(&self, state: &TransportState) -> Result<(), TransportError>;
    /// The guest may miss an interrupt that was on its way when the image was made; one too many does no harm.
    fn raise_after_restore(&self);
}

/// A device.
#[derive(Debug)]
pub(crate) struct VirtioDevice<M> {
    state: Mutex<DeviceState<M>>,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
}

/// What the device's lock guards.
#[derive(Debug)]
pub(crate) struct DeviceState<M> {
    registers: Registers,
    queues: Vec<Virtqueue>,
    attached: Option<Attached<M>>,
}

#[derive(Debug)]
struct Attached<M> {
    memory: GuestMemory,
    model: M,
}

#[derive(Debug, Default)]
struct Registers {
    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    config_generation: u32,
}

impl Registers {
    fn is_running(&self) -> bool {
        self.status & DRIVER_OK != 0 && self.status & (NEEDS_RESET | FAILED) == 0
    }
}

/// The queues of a device whose driver runs.
pub(crate) struct Queues<'a> {
    /// The queues, by index.
    pub(crate) queues: &'a mut [Virtqueue],
    /// Where their rings are.
    pub(crate) memory: &'a GuestMemory,
    /// To tell the guest.
    pub(crate) interrupt: &'a Interrupt,
    /// To come back without a kick of the guest.
    pub(crate) kicks: &'a [EventFd],
}

impl Queues<'_> {
    /// Interrupts the guest if it wants to hear about queue `index`.
    pub(crate) fn notify(&mut self, index: usize) -> Result<(), QueueError> {
        if self.queues[index].wants_interrupt(self.memory)? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Comes back to queue `index` after the other devices had a turn.
    pub(crate) fn come_back(&self, index: usize) {
        worker::ring(&self.kicks[index]);
    }
}

impl<M: Model> VirtioDevice<M> {
    /// A device without memory and backend.
    pub(crate) fn new() -> io::Result<Self> {
        let queues = M::QUEUE_SIZES.iter().map(|&size| Virtqueue::new(size));
        let kicks = M::QUEUE_SIZES.iter().map(|_| EventFd::new(EFD_NONBLOCK));
        Ok(Self {
            state: Mutex::new(DeviceState {
                registers: Registers::default(),
                queues: queues.collect::<Result<_, _>>().map_err(io::Error::other)?,
                attached: None,
            }),
            interrupt: Interrupt::new()?,
            kicks: kicks.collect::<Result<_, _>>()?,
        })
    }

    /// Gives it memory and its model.
    pub(crate) fn attach(&self, memory: GuestMemory, model: M) {
        self.lock().attached = Some(Attached { memory, model });
    }

    /// Runs `f` on the model, if there is one.
    pub(crate) fn with_model<T>(&self, f: impl FnOnce(&mut M) -> T) -> Option<T> {
        self.lock()
            .attached
            .as_mut()
            .map(|attached| f(&mut attached.model))
    }

    /// Runs `f` on the model and the queues, if the driver runs.
    pub(crate) fn serve(&self, f: impl FnOnce(&mut M, &mut Queues<'_>) -> Result<(), QueueError>) {
        let mut state = self.lock();
        let DeviceState {
            registers,
            queues,
            attached,
        } = &mut *state;
        let Some(Attached { memory, model }) = attached else {
            return;
        };
        if !registers.is_running() {
            return;
        }
        let mut running = Queues {
            queues,
            memory,
            interrupt: &self.interrupt,
            kicks: &self.kicks,
        };
        if let Err(error) = f(model, &mut running) {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(device_id = M::DEVICE_ID, %error, cause, "device needs a reset");
            registers.status |= NEEDS_RESET;
            self.interrupt.config_change();
        }
    }

    /// Tells the driver that the configuration changed.
    pub(crate) fn config_changed(&self) {
        let mut state = self.lock();
        state.registers.config_generation = state.registers.config_generation.wrapping_add(1);
        if state.registers.is_running() {
            self.interrupt.config_change();
        }
    }

    /// Whether the driver said `DRIVER_OK`.
    pub(crate) fn is_running(&self) -> bool {
        self.lock().registers.is_running()
    }

    fn lock(&self) -> MutexGuard<'_, DeviceState<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> u32 {
        // Outside the lock: see the module's documentation.
        match offset {
            0x000 => return MAGIC,
            0x004 => return VERSION,
            0x008 => return M::DEVICE_ID,
            0x00c => return VENDOR,
            0x060 => return self.interrupt.status(),
            // No shared memory regions.
            0x0b0..=0x0bc => return u32::MAX,
            _ => {}
        }
        let mut state = self.lock();
        let select = state.registers.queue_select;
        match offset {
            0x010 => half(state.offered(), state.registers.device_features_select),
            0x034 => state
                .queue(select)
                .map_or(0, |queue| u32::from(queue.registers().max_size())),
            0x044 => state.queue(select).map_or(0, |queue| u32::from(queue.is_ready())),
            0x070 => state.registers.status,
            0x0fc => state.registers.config_generation,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            0x050 => {
                if let Some(kick) = usize::try_from(value)
                    .ok()
                    .and_then(|index| self.kicks.get(index))
                {
                    worker::ring(kick);
                }
                return;
            }
            0x064 => return self.interrupt.acknowledge(value),
            _ => {}
        }
        let mut state = self.lock();
        match offset {
            0x014 => state.registers.device_features_select = value,
            0x020 => state.choose_features(value),
            0x024 => state.registers.driver_features_select = value,
            0x030 => state.registers.queue_select = value,
            0x070 => {
                if state.set_status(value) {
                    self.interrupt.set_status(0);
                    self.kicks.iter().for_each(worker::silence);
                } else if state.registers.is_running() {
                    // Buffers posted before DRIVER_OK bring no kick of their own.
                    self.kicks.iter().for_each(worker::ring);
                }
            }
            _ => state.configure_queue(offset, value),
        }
    }
}

impl<M: Model> DeviceState<M> {
    fn offered(&self) -> u64 {
        self.attached
            .as_ref()
            .map_or(0, |attached| attached.model.features() | COMMON_FEATURES)
    }

    fn queue(&mut self, index: u32) -> Option<&mut Virtqueue> {
        self.queues.get_mut(usize::try_from(index).ok()?)
    }

    fn choose_features(&mut self, value: u32) {
        let registers = &mut self.registers;
        if registers.status & DRIVER == 0 || registers.status & FEATURES_OK != 0 {
            return;
        }
        let (low, high) = (
            registers.driver_features & 0xffff_ffff,
            registers.driver_features >> 32,
        );
        registers.driver_features = match registers.driver_features_select {
            0 => (high << 32) | u64::from(value),
            1 => (u64::from(value) << 32) | low,
            _ => registers.driver_features,
        };
    }

    /// True if it was a reset.
    fn set_status(&mut self, value: u32) -> bool {
        if value == 0 {
            self.registers = Registers {
                config_generation: self.registers.config_generation,
                ..Registers::default()
            };
            self.queues.iter_mut().for_each(|queue| queue.registers().reset());
            if let Some(attached) = &mut self.attached {
                attached.model.reset();
            }
            return true;
        }
        let old = self.registers.status;
        let mut new = old | (value & STATUS_BITS & !NEEDS_RESET);
        if new & FEATURES_OK != 0 && old & FEATURES_OK == 0 {
            let features = self.registers.driver_features;
            if features & !self.offered() == 0 && features & VERSION_1 != 0 {
                self.accept_features(features);
            } else {
                new &= !FEATURES_OK;
            }
        }
        if new & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        self.registers.status = new;
        false
    }

    fn accept_features(&mut self, features: u64) {
        for queue in &mut self.queues {
            queue.registers().set_event_idx(features & EVENT_IDX != 0);
        }
        if let Some(attached) = &mut self.attached {
            attached.model.negotiated(features);
        }
    }

    fn configure_queue(&mut self, offset: u64, value: u32) {
        if self.registers.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            return;
        }
        let Some(queue) = usize::try_from(self.registers.queue_select)
            .ok()
            .and_then(|index| self.queues.get_mut(index))
        else {
            return;
        };
        if offset == 0x044 {
            match &self.attached {
                Some(attached) if value == 1 => {
                    queue.enable(&attached.memory);
                }
                _ => queue.registers().set_ready(false),
            }
            return;
        }
        if queue.is_ready() {
            return;
        }
        let registers = queue.registers();
        match offset {
            // A size that is out of range can't become one that is in range by truncation.
            0x038 => registers.set_size(u16::try_from(value).unwrap_or(u16::MAX)),
            0x080 => registers.set_desc_table_address(Some(value), None),
            0x084 => registers.set_desc_table_address(None, Some(value)),
            0x090 => registers.set_avail_ring_address(Some(value), None),
            0x094 => registers.set_avail_ring_address(None, Some(value)),
            0x0a0 => registers.set_used_ring_address(Some(value), None),
            0x0a4 => registers.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}

impl<M: Model> MmioDevice for VirtioDevice<M> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG_OFFSET) {
            let state = self.lock();
            let Some(attached) = &state.attached else { return };
            let config = attached.model.config();
            let tail = usize::try_from(offset)
                .ok()
                .and_then(|offset| config.get(offset..))
                .unwrap_or(&[]);
            let n_bytes = tail.len().min(data.len());
            data[..n_bytes].copy_from_slice(&tail[..n_bytes]);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_OFFSET) {
            if let Ok(offset) = usize::try_from(offset) {
                self.with_model(|model| model.write_config(offset, data));
            }
        } else if let Ok(bytes) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }

    fn id(&self) -> u32 {
        M::DEVICE_ID
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn save(&self) -> TransportState {
        let state = self.lock();
        let registers = &state.registers;
        TransportState {
            device_id: M::DEVICE_ID,
            status: registers.status,
            driver_features: registers.driver_features,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            queue_select: registers.queue_select,
            config_generation: registers.config_generation,
            interrupt_status: self.interrupt.status(),
            queues: state.queues.iter().map(Virtqueue::save).collect(),
        }
    }

    fn restore(&self, saved: &TransportState) -> Result<(), TransportError> {
        let device_id = M::DEVICE_ID;
        let mismatch = |what| TransportError::Mismatch { device_id, what };
        let mut state = self.lock();
        let offered = state.offered();
        let Some(attached) = &mut state.attached else {
            return Err(TransportError::NotAttached { device_id });
        };
        if saved.device_id != device_id {
            return Err(mismatch("it is of another device"));
        }
        if saved.queues.len() != M::QUEUE_SIZES.len() {
            return Err(mismatch("number of queues"));
        }
        if saved.status & !STATUS_BITS != 0 {
            return Err(mismatch("status"));
        }
        if saved.status & FEATURES_OK != 0
            && (saved.driver_features & !offered != 0 || saved.driver_features & VERSION_1 == 0)
        {
            return Err(mismatch("features"));
        }
        if saved.status & DRIVER_OK != 0 && saved.status & FEATURES_OK == 0 {
            return Err(mismatch("driver runs without features"));
        }
        let queues = M::QUEUE_SIZES
            .iter()
            .zip(&saved.queues)
            .enumerate()
            .map(|(queue, (&size, saved))| {
                Virtqueue::restore(size, saved, &attached.memory).map_err(|error| TransportError::Queue {
                    device_id,
                    queue,
                    source: Box::new(error),
                })
            });
        let queues = queues.collect::<Result<_, _>>()?;
        if saved.status & FEATURES_OK != 0 {
            attached.model.negotiated(saved.driver_features);
        }
        state.queues = queues;
        state.registers = Registers {
            status: saved.status,
            driver_features: saved.driver_features,
            device_features_select: saved.device_features_select,
            driver_features_select: saved.driver_features_select,
            queue_select: saved.queue_select,
            config_generation: saved.config_generation,
        };
        self.interrupt.set_status(saved.interrupt_status);
        Ok(())
    }

    fn raise_after_restore(&self) {
        if self.is_running() {
            self.interrupt.used_buffer();
        }
        self.interrupt.raise_pending();
    }
}

fn half(features: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(shifted).unwrap_or(0)
}
