//! What can go wrong with all the devices together.

use std::io;

use super::mmio::TransportError;

/// Why the devices could not be made, attached or restored.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// eventfds, epoll, threads.
    #[error("cannot make the devices")]
    Create(#[source] io::Error),
    /// KVM refused an irqfd.
    #[error("cannot register the irqfd of GSI {gsi}")]
    Irqfd {
        /// The interrupt.
        gsi: u32,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused an ioeventfd.
    #[error("cannot register the ioeventfd of queue {queue} at gpa={gpa:#x}")]
    Ioeventfd {
        /// Address of the notification register.
        gpa: u64,
        /// Index of the queue.
        queue: u32,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A file or socket is not what it should be.
    #[error("cannot use the {backend}")]
    Backend {
        /// Which.
        backend: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Attached twice.
    #[error("the devices are attached already")]
    AttachedTwice,
    /// Restored without memory and backends.
    #[error("the devices are not attached")]
    NotAttached,
    /// State that can't be.
    #[error("cannot restore a virtio device")]
    Transport(#[from] TransportError),
    /// State of other devices.
    #[error("the image has {found} virtio devices, not {expected}")]
    DeviceCount {
        /// In the image.
        found: usize,
        /// Here.
        expected: usize,
    },
    /// State that can't be.
    #[error("cannot restore the serial console")]
    Serial,
}
