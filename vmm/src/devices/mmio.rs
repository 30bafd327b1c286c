//! virtio-mmio version 2: one device's registers, queues and model behind one lock.
//!
//! vCPU threads come here for the registers, the device thread for the queues. The lock is held for as long as a
//! batch of requests takes; interrupt status and kicks live outside it, so a running guest never waits for it
//! except in a reset. The driver's steps are checked: features only before `FEATURES_OK`, queues only between
//! that and `DRIVER_OK`, rings only inside guest memory. A driver that breaks its queues gets `NEEDS_RESET` and
//! is not served until it resets. `driver` has the
//! driver's steps, `image` the state in an image. Not its job: threads ([`super::worker`]), what a device does ([`Model`]).

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupt::Interrupt;
use super::queue::{QueueError, Virtqueue};
use super::worker;
use crate::memory::GuestMemory;

use self::driver::{Attached, DeviceState, NEEDS_RESET, Registers, half};
pub use self::image::{TransportError, TransportState};

mod driver;
mod image;
#[cfg(test)]
mod tests;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x5052_4f54;
/// Where the device's configuration begins.
const CONFIG_OFFSET: u64 = 0x100;

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
}

/// A device.
#[derive(Debug)]
pub(crate) struct VirtioDevice<M> {
    state: Mutex<DeviceState<M>>,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
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
        self.lock().save(self.interrupt.status())
    }

    fn restore(&self, saved: &TransportState) -> Result<(), TransportError> {
        self.lock().restore(saved)?;
        self.interrupt.set_status(saved.interrupt_status);
        Ok(())
    }
}
