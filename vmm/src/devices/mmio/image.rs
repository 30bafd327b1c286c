//! A device's registers and queues in an image: saved as they are, checked when they come back.

use serde::{Deserialize, Serialize};

use super::Model;
use super::driver::{DRIVER_OK, DeviceState, FEATURES_OK, Registers, STATUS_BITS, VERSION_1};
use crate::devices::queue::{SavedQueue, Virtqueue};

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

impl TransportState {
    /// What is wrong with it on its own, given the features on offer.
    fn defect(&self, offered: u64) -> Option<&'static str> {
        let negotiated = self.status & FEATURES_OK != 0;
        if self.status & !STATUS_BITS != 0 {
            Some("status")
        } else if negotiated
            && (self.driver_features & !offered != 0 || self.driver_features & VERSION_1 == 0)
        {
            Some("features")
        } else if self.status & DRIVER_OK != 0 && !negotiated {
            Some("driver runs without features")
        } else {
            None
        }
    }
}

impl<M: Model> DeviceState<M> {
    /// For the image.
    pub(super) fn save(&self, interrupt_status: u32) -> TransportState {
        let registers = &self.registers;
        TransportState {
            device_id: M::DEVICE_ID,
            status: registers.status,
            driver_features: registers.driver_features,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            queue_select: registers.queue_select,
            config_generation: registers.config_generation,
            interrupt_status,
            queues: self.queues.iter().map(Virtqueue::save).collect(),
        }
    }

    /// From an image; nothing is changed if it does not fit.
    pub(super) fn restore(&mut self, saved: &TransportState) -> Result<(), TransportError> {
        let device_id = M::DEVICE_ID;
        let mismatch = |what| TransportError::Mismatch { device_id, what };
        let offered = self.offered();
        let Some(attached) = &mut self.attached else {
            return Err(TransportError::NotAttached { device_id });
        };
        if saved.device_id != device_id {
            return Err(mismatch("it is of another device"));
        }
        if saved.queues.len() != M::QUEUE_SIZES.len() {
            return Err(mismatch("number of queues"));
        }
        if let Some(what) = saved.defect(offered) {
            return Err(mismatch(what));
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
        self.queues = queues.collect::<Result<_, _>>()?;
        if saved.status & FEATURES_OK != 0 {
            attached.model.negotiated(saved.driver_features);
        }
        self.registers = Registers {
            status: saved.status,
            driver_features: saved.driver_features,
            device_features_select: saved.device_features_select,
            driver_features_select: saved.driver_features_select,
            queue_select: saved.queue_select,
            config_generation: saved.config_generation,
        };
        Ok(())
    }
}
