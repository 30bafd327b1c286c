//! virtio-net over a tap.
//!
//! Runs on the I/O thread. Guest to host goes from guest memory into the tap by one `writev`. Host to guest is
//! read into one buffer and copied out, because only after the read it is known how many of the guest's
//! mergeable buffers the packet takes; the offer of large receive buffers instead would cost the guest 17 pages
//! each. When the guest has no buffers the packet waits and the tap is out of the epoll set until the guest kicks.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use torpor_api::vmm::GUEST_MAC;

use super::mmio::{Model, Queues, VirtioDevice};
use super::queue::{Drained, QueueError};
use super::sys;

#[cfg(test)]
mod tests;

const RX: usize = 0;
const TX: usize = 1;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;

const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

const MTU: u16 = 1500;
/// `struct virtio_net_hdr_v1`.
const HEADER_BYTES: usize = 12;
/// Where the header says over how many buffers a packet goes.
const NUM_BUFFERS_OFFSET: usize = 10;
/// Largest packet: header, Ethernet header, 64 KiB of segmentation offload.
const MAX_PACKET_BYTES: usize = HEADER_BYTES + 14 + 65536;
const BUDGET: usize = 256;

/// The network card.
#[derive(Debug)]
pub(crate) struct Net {
    tap: File,
    epoll: Arc<Epoll>,
    token: u64,
    listening: bool,
    features: u64,
    packet: Box<[u8]>,
    /// Length of the packet that waits for buffers.
    waiting: Option<usize>,
    /// Bytes to the guest.
    pub(crate) rx_bytes: u64,
    /// Bytes from the guest.
    pub(crate) tx_bytes: u64,
}

impl Net {
    /// Over a tap, registered as `token`.
    pub(crate) fn new(tap: File, epoll: Arc<Epoll>, token: u64) -> io::Result<Self> {
        sys::set_vnet_header_len(tap.as_fd(), 12)?;
        Ok(Self::over(tap, epoll, token))
    }

    /// Over a datagram socket, which has no tap's ioctls.
    #[cfg(test)]
    pub(crate) fn over_stand_in(tap: File, epoll: Arc<Epoll>, token: u64) -> Self {
        Self::over(tap, epoll, token)
    }

    fn over(tap: File, epoll: Arc<Epoll>, token: u64) -> Self {
        Self {
            tap,
            epoll,
            token,
            listening: false,
            features: 0,
            packet: vec![0; MAX_PACKET_BYTES].into_boxed_slice(),
            waiting: None,
            rx_bytes: 0,
            tx_bytes: 0,
        }
    }

    fn set_listening(&mut self, listening: bool) {
        if self.listening == listening {
            return;
        }
        let changed = if listening {
            self.epoll
                .add(&self.tap, EpollEvent::new(EpollFlags::EPOLLIN, self.token))
        } else {
            self.epoll.delete(&self.tap)
        };
        match changed {
            Ok(()) => self.listening = listening,
            Err(error) => tracing::error!(%error, "cannot watch the tap"),
        }
    }

    /// Reads the next packet; `None` if there is none.
    fn next_packet(&mut self) -> Option<usize> {
        if let Some(len_bytes) = self.waiting.take() {
            return Some(len_bytes);
        }
        loop {
            match io::Read::read(&mut self.tap, &mut self.packet) {
                Ok(len_bytes) if len_bytes > HEADER_BYTES => return Some(len_bytes),
                // Not a packet; a stand-in's end of file looks so too.
                Ok(_) => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) => {
                    tracing::warn!(%error, "cannot read from the tap");
                    // Watched again at the guest's next kick; until then a broken tap would spin.
                    self.set_listening(false);
                    return None;
                }
            }
        }
    }

    fn receive(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        self.set_listening(true);
        for _ in 0..BUDGET {
            let Some(len_bytes) = self.next_packet() else {
                break;
            };
            loop {
                // Buffers too few for this packet stay in the ring, so "not empty" is no reason to try again.
                let seen = queues.queues[RX].driver_index(queues.memory)?;
                if self.deliver(queues, len_bytes)? {
                    break;
                }
                if !queues.queues[RX].listen_past(queues.memory, seen)? {
                    self.waiting = Some(len_bytes);
                    self.set_listening(false);
                    return queues.notify(RX);
                }
            }
        }
        queues.notify(RX)
    }

    /// Copies the packet into as many buffers as it takes; false, and no buffer taken, if there are too few.
    fn deliver(&mut self, queues: &mut Queues<'_>, len_bytes: usize) -> Result<bool, QueueError> {
        let queue = &mut queues.queues[RX];
        let start = queue.position();
        let mergeable = self.features & F_MRG_RXBUF != 0;
        let mut chains = Vec::new();
        let mut room_bytes = 0;
        while room_bytes < len_bytes {
            let Some(chain) = queue.next(queues.memory)? else {
                queue.rewind(start);
                return Ok(false);
            };
            let (head, chain_bytes) = (chain.head, chain.writable.len());
            if chain_bytes < HEADER_BYTES || (!mergeable && chain_bytes < len_bytes) {
                return Err(QueueError::Short { head });
            }
            room_bytes += chain_bytes;
            chains.push(chain);
        }
        let n_buffers = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        self.packet[NUM_BUFFERS_OFFSET..HEADER_BYTES].copy_from_slice(&n_buffers.to_le_bytes());
        let mut done = 0;
        for chain in chains {
            let n_bytes = chain.writable.copy_from(&self.packet[done..len_bytes]);
            queue.complete(queues.memory, chain.head, n_bytes)?;
            done += n_bytes;
        }
        self.rx_bytes += bytes_u64(len_bytes - HEADER_BYTES);
        Ok(true)
    }

    fn transmit(&mut self, queues: &mut Queues<'_>, pause: &AtomicBool) -> Result<(), QueueError> {
        let memory = queues.memory;
        let drained = queues.queues[TX].drain(memory, pause, BUDGET, |chain| {
            let len_bytes = chain.readable.len();
            if !(HEADER_BYTES + 1..=MAX_PACKET_BYTES).contains(&len_bytes) {
                return Ok(0);
            }
            match sys::writev(self.tap.as_fd(), &chain.readable) {
                Ok(_) => self.tx_bytes += bytes_u64(len_bytes - HEADER_BYTES),
                // A packet that the kernel won't have is lost, as on a wire.
                Err(error) => tracing::debug!(%error, len_bytes, "packet dropped"),
            }
            Ok(0)
        })?;
        if drained == Drained::More {
            queues.come_back(TX);
        }
        queues.notify(TX)
    }
}

impl Model for Net {
    const DEVICE_ID: u32 = 1;
    const QUEUE_SIZES: &'static [u16] = &[256, 256];

    fn features(&self) -> u64 {
        F_CSUM
            | F_GUEST_CSUM
            | F_MTU
            | F_MAC
            | F_GUEST_TSO4
            | F_GUEST_TSO6
            | F_HOST_TSO4
            | F_HOST_TSO6
            | F_MRG_RXBUF
    }

    /// MAC, status, number of queue pairs, MTU.
    fn config(&self) -> Vec<u8> {
        let mut config = GUEST_MAC.to_vec();
        config.extend(1_u16.to_le_bytes());
        config.extend(1_u16.to_le_bytes());
        config.extend(MTU.to_le_bytes());
        config
    }

    fn negotiated(&mut self, features: u64) {
        self.features = features;
        let offload = |feature, bit| if features & feature != 0 { bit } else { 0 };
        let mut offloads = offload(F_GUEST_CSUM, TUN_F_CSUM);
        if offloads != 0 {
            offloads |= offload(F_GUEST_TSO4, TUN_F_TSO4) | offload(F_GUEST_TSO6, TUN_F_TSO6);
        }
        if let Err(error) = sys::set_offload(self.tap.as_fd(), offloads) {
            // Without it the tap does the work itself.
            tracing::warn!(%error, "cannot set the tap's offloads");
        }
    }

    fn reset(&mut self) {
        self.features = 0;
        self.waiting = None;
        self.set_listening(false);
    }
}

/// The tap or either queue has something.
pub(crate) fn serve(device: &VirtioDevice<Net>, pause: &AtomicBool) {
    device.serve(|net, queues| {
        net.transmit(queues, pause)?;
        net.receive(queues)
    });
}

fn bytes_u64(len_bytes: usize) -> u64 {
    u64::try_from(len_bytes).unwrap_or(u64::MAX)
}
