//! The driver's steps: status, features, queues, each only in its turn.

use virtio_queue::QueueT;

use super::Model;
use crate::devices::queue::Virtqueue;
use crate::memory::GuestMemory;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
pub(super) const DRIVER_OK: u32 = 4;
pub(super) const FEATURES_OK: u32 = 8;
pub(super) const NEEDS_RESET: u32 = 0x40;
const FAILED: u32 = 0x80;
pub(super) const STATUS_BITS: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;

const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
pub(super) const VERSION_1: u64 = 1 << 32;
const COMMON_FEATURES: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;

/// What the device's lock guards.
#[derive(Debug)]
pub(super) struct DeviceState<M> {
    pub(super) registers: Registers,
    pub(super) queues: Vec<Virtqueue>,
    pub(super) attached: Option<Attached<M>>,
}

/// What a device has once it is attached.
#[derive(Debug)]
pub(super) struct Attached<M> {
    pub(super) memory: GuestMemory,
    pub(super) model: M,
}

/// What the driver wrote.
#[derive(Debug, Default)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) driver_features: u64,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) queue_select: u32,
    pub(super) config_generation: u32,
}

impl Registers {
    /// Whether the driver runs and may be served.
    pub(super) fn is_running(&self) -> bool {
        self.status & DRIVER_OK != 0 && self.status & (NEEDS_RESET | FAILED) == 0
    }
}

impl<M: Model> DeviceState<M> {
    /// The features on offer.
    pub(super) fn offered(&self) -> u64 {
        self.attached
            .as_ref()
            .map_or(0, |attached| attached.model.features() | COMMON_FEATURES)
    }

    /// The queue that a register names.
    pub(super) fn queue(&mut self, index: u32) -> Option<&mut Virtqueue> {
        self.queues.get_mut(usize::try_from(index).ok()?)
    }

    /// Half of the features that the driver wants.
    pub(super) fn choose_features(&mut self, value: u32) {
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

    /// The driver's next step; true if it is a reset.
    pub(super) fn set_status(&mut self, value: u32) -> bool {
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

    /// The selected queue's registers.
    pub(super) fn configure_queue(&mut self, offset: u64, value: u32) {
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

/// The low or the high half, as the driver selected.
pub(super) fn half(features: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(shifted).unwrap_or(0)
}
