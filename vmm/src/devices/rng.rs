//! virtio-rng: the kernel's random bytes into guest buffers.
//!
//! Runs on the I/O thread. Keeps no state, so a fork gets other bytes than its sibling.

use std::sync::atomic::AtomicBool;

use super::mmio::{Model, VirtioDevice};
use super::queue::Drained;
use super::sys;

#[cfg(test)]
mod tests;

/// Most bytes per request; the driver asks again for more.
const MAX_REQUEST_BYTES: usize = 64 << 10;
const BUDGET: usize = 64;

/// The entropy device.
#[derive(Debug)]
pub(crate) struct Rng;

impl Model for Rng {
    const DEVICE_ID: u32 = 4;
    const QUEUE_SIZES: &'static [u16] = &[64];

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
}

/// Fills the buffers that wait.
pub(crate) fn serve(device: &VirtioDevice<Rng>, pause: &AtomicBool) {
    device.serve(|_, queues| {
        let memory = queues.memory;
        let drained = queues.queues[0].drain(memory, pause, BUDGET, |mut chain| {
            let n_bytes = chain.writable.len().min(MAX_REQUEST_BYTES);
            let wanted = chain.writable.take_front(n_bytes).unwrap_or_default();
            Ok(sys::fill_random(&wanted).unwrap_or_else(|error| {
                tracing::error!(%error, "no random bytes for the guest");
                0
            }))
        })?;
        if drained == Drained::More {
            queues.come_back(0);
        }
        queues.notify(0)
    });
}
