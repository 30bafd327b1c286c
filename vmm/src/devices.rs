//! The guest's devices: disk, network, vsock, entropy, balloon over virtio-mmio, and the serial console.
//!
//! [`DeviceSet`] owns them and their two threads: one for the disk, whose I/O blocks, one for everything else.
//! Life of a set: [`prepare`](DeviceSet::prepare) in the blank VMM, [`attach`](DeviceSet::attach) when memory and
//! files are there, then either the guest boots or [`restore`](DeviceSet::restore) and
//! [`resume_after_restore`](DeviceSet::resume_after_restore) continue it.
//!
//! Invariants: between [`freeze`](DeviceSet::freeze) and [`thaw`](DeviceSet::thaw) no device thread touches guest
//! memory or a backend; what the guest put into a ring and no device took is in the ring still, so that
//! registers and ring positions are all there is to save. Every number from the guest or from an image is checked
//! where it is read. Not their job: vCPUs, and what becomes of memory that the balloon gives back.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use serde::{Deserialize, Serialize};

use self::balloon::Balloon;
pub use self::balloon::Discard;
use self::blk::Blk;
pub use self::error::DeviceError;
use self::mmio::{MmioDevice, VirtioDevice};
pub use self::mmio::{TransportError, TransportState};
use self::net::Net;
use self::reactors::{BlkReactor, IoReactor, LISTENER, TAP};
use self::rng::Rng;
pub use self::serial::SavedSerial;
use self::serial::{Console, ConsoleLog};
use self::vsock::Vsock;
use self::worker::Worker;
use crate::memory::GuestMemory;

mod balloon;
pub mod blk;
mod error;
mod interrupt;
mod mmio;
mod net;
mod queue;
mod reactors;
mod rng;
mod serial;
mod sys;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod vsock;
mod worker;

/// Where the first virtio device's registers are.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Length of each device's registers, and distance to the next.
pub const MMIO_STRIDE: u64 = 0x1000;
/// Interrupt of the first virtio device; the next ones follow.
pub const FIRST_GSI: u32 = 5;
/// Interrupt of the serial console.
pub const SERIAL_GSI: u32 = 4;
/// Offset of the register that a driver kicks queues with.
const QUEUE_NOTIFY: u64 = 0x50;

/// Files and sockets behind the devices.
#[derive(Debug)]
pub struct Backends {
    /// The template's raw root disk, read-only.
    pub disk_base: File,
    /// The machine's qcow2 overlay.
    pub disk_overlay: File,
    /// The disk's generation.
    pub disk_generation: File,
    /// Non-blocking tap with virtio-net headers.
    pub tap: File,
    /// Listening stream socket for connections to the guest.
    pub vsock_listener: OwnedFd,
    /// The console's log.
    pub console: File,
    /// Its largest size in bytes.
    pub console_limit: u64,
}

/// Where a device is, for the guest's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDeviceInfo {
    /// Address of its registers.
    pub gpa: u64,
    /// Length of its registers in bytes.
    pub len: u64,
    /// Its interrupt.
    pub gsi: u32,
    /// Its virtio device ID.
    pub id: u32,
}

/// Bytes moved in this execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceCounters {
    /// To the guest over the network.
    pub net_rx_bytes: u64,
    /// From the guest over the network.
    pub net_tx_bytes: u64,
    /// Read from the disk.
    pub disk_read_bytes: u64,
    /// Written to the disk.
    pub disk_written_bytes: u64,
}

/// The devices in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesState {
    /// In the order of their addresses.
    transports: Vec<TransportState>,
    balloon_target_pages: u32,
    balloon_actual_pages: u32,
    serial: SavedSerial,
    /// The guest knew of no vsock connection. Last of all state, because older images end here: it reads as false then.
    vsock_unconnected: bool,
}

/// All devices of the machine, and their threads.
#[derive(Debug)]
pub struct DeviceSet {
    // The threads first: they end before what they serve.
    disk_worker: Worker,
    io_worker: Worker,
    blk: Arc<VirtioDevice<Blk>>,
    net: Arc<VirtioDevice<Net>>,
    vsock: Arc<VirtioDevice<Vsock>>,
    rng: Arc<VirtioDevice<Rng>>,
    balloon: Arc<VirtioDevice<Balloon>>,
    console: Arc<Console>,
    io_epoll: Arc<Epoll>,
    attached: bool,
}

impl DeviceSet {
    /// Makes the devices of a VM that has no memory yet, with their interrupts and kicks.
    ///
    /// # Errors
    /// Out of descriptors or threads, or KVM refuses.
    pub fn prepare(vm: &VmFd) -> Result<Self, DeviceError> {
        let set = Self::new().map_err(DeviceError::Create)?;
        for (info, device) in set.mmio_devices().iter().zip(set.bus()) {
            vm.register_irqfd(device.interrupt().line(), info.gsi)
                .map_err(|source| DeviceError::Irqfd {
                    gsi: info.gsi,
                    source,
                })?;
            let gpa = info.gpa + QUEUE_NOTIFY;
            for (queue, kick) in (0_u32..).zip(device.kicks()) {
                vm.register_ioevent(kick, &IoEventAddress::Mmio(gpa), queue)
                    .map_err(|source| DeviceError::Ioeventfd { gpa, queue, source })?;
            }
        }
        vm.register_irqfd(set.console.line(), SERIAL_GSI)
            .map_err(|source| DeviceError::Irqfd {
                gsi: SERIAL_GSI,
                source,
            })?;
        Ok(set)
    }

    fn new() -> io::Result<Self> {
        let blk = Arc::new(VirtioDevice::new()?);
        let net = Arc::new(VirtioDevice::new()?);
        let vsock = Arc::new(VirtioDevice::new()?);
        let rng = Arc::new(VirtioDevice::new()?);
        let balloon = Arc::new(VirtioDevice::new()?);
        let disk_epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        let io_epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        let disk_reactor = BlkReactor {
            blk: Arc::clone(&blk),
        };
        let io_reactor = IoReactor {
            net: Arc::clone(&net),
            vsock: Arc::clone(&vsock),
            rng: Arc::clone(&rng),
            balloon: Arc::clone(&balloon),
        };
        for (token, kick) in disk_reactor.kicks() {
            disk_epoll.add(
                worker::doorbell_fd(kick),
                EpollEvent::new(EpollFlags::EPOLLIN, token),
            )?;
        }
        for (token, kick) in io_reactor.kicks() {
            io_epoll.add(
                worker::doorbell_fd(kick),
                EpollEvent::new(EpollFlags::EPOLLIN, token),
            )?;
        }
        Ok(Self {
            disk_worker: Worker::spawn("disk", disk_epoll, disk_reactor)?,
            io_worker: Worker::spawn("io", Arc::clone(&io_epoll), io_reactor)?,
            blk,
            net,
            vsock,
            rng,
            balloon,
            console: Arc::new(Console::new()?),
            io_epoll,
            attached: false,
        })
    }

    /// The devices in the order of their addresses.
    fn bus(&self) -> [&dyn MmioDevice; 5] {
        [&*self.blk, &*self.net, &*self.vsock, &*self.rng, &*self.balloon]
    }

    /// Where the virtio devices are.
    #[must_use]
    pub fn mmio_devices(&self) -> Vec<MmioDeviceInfo> {
        let slots = (0..).map(|i| MMIO_BASE + MMIO_STRIDE * i).zip(FIRST_GSI..);
        let info = |((gpa, gsi), device): ((u64, u32), &dyn MmioDevice)| MmioDeviceInfo {
            gpa,
            len: MMIO_STRIDE,
            gsi,
            id: device.id(),
        };
        slots.zip(self.bus()).map(info).collect()
    }

    /// Gives the devices memory and backends and lets their threads run. `discard` is called with the address and
    /// length in bytes of whole pages that the guest gave back.
    ///
    /// # Errors
    /// A backend is not what it should be; the set is of no use then.
    pub fn attach(
        &mut self,
        memory: &GuestMemory,
        backends: Backends,
        discard: Discard,
    ) -> Result<(), DeviceError> {
        self.attach_with(memory, backends, discard, Net::new)
    }

    fn attach_with(
        &mut self,
        memory: &GuestMemory,
        backends: Backends,
        discard: Discard,
        make_net: impl FnOnce(File, Arc<Epoll>, u64) -> io::Result<Net>,
    ) -> Result<(), DeviceError> {
        if self.attached {
            return Err(DeviceError::AttachedTwice);
        }
        let failed = |backend| move |source| DeviceError::Backend { backend, source };
        let blk = Blk::open(
            backends.disk_base,
            backends.disk_overlay,
            backends.disk_generation,
        )
        .map_err(failed("disk"))?;
        let net = make_net(backends.tap, Arc::clone(&self.io_epoll), TAP).map_err(failed("tap"))?;
        let listener = UnixListener::from(backends.vsock_listener);
        let vsock =
            Vsock::new(listener, Arc::clone(&self.io_epoll), LISTENER).map_err(failed("vsock listener"))?;
        let log = ConsoleLog::new(backends.console, backends.console_limit).map_err(failed("console log"))?;
        self.blk.attach(memory.clone(), blk);
        self.net.attach(memory.clone(), net);
        self.vsock.attach(memory.clone(), vsock);
        self.rng.attach(memory.clone(), Rng);
        self.balloon.attach(memory.clone(), Balloon::new(discard));
        self.console.attach(log);
        self.attached = true;
        self.thaw();
        Ok(())
    }

    /// A vCPU reads registers; outside of them it reads zeros.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        match self.find(gpa) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0),
        }
    }

    /// A vCPU writes registers.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(gpa) {
            device.write(offset, data);
        }
    }

    fn find(&self, gpa: u64) -> Option<(&dyn MmioDevice, u64)> {
        let offset = gpa.checked_sub(MMIO_BASE)?;
        let device = self
            .bus()
            .get(usize::try_from(offset / MMIO_STRIDE).ok()?)
            .copied()?;
        Some((device, offset % MMIO_STRIDE))
    }

    /// A vCPU reads a port; outside of the console it reads ones.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.console.read(port, data);
    }

    /// A vCPU writes a port.
    pub fn pio_write(&self, port: u16, data: &[u8]) {
        self.console.write(port, data);
    }

    /// Holds the devices still; waits for the request in flight, if there is one.
    pub fn freeze(&mut self) {
        self.io_worker.freeze();
        self.disk_worker.freeze();
        self.blk.with_model(Blk::new_run);
    }

    /// Lets them run on, beginning with what queued up.
    pub fn thaw(&mut self) {
        self.disk_worker.thaw();
        self.io_worker.thaw();
    }

    /// Makes the disk durable, while frozen.
    ///
    /// # Errors
    /// The overlay can't be written or synchronised.
    pub fn flush_disk(&self) -> io::Result<()> {
        self.console.flush();
        self.blk.with_model(|blk| blk.flush()).unwrap_or(Ok(()))
    }

    /// What [`Self::flush_disk`] does, for another thread and at a later time, also of a set that runs by then.
    ///
    /// It holds the disk only while metadata goes to the page cache; making the returned file durable, which may
    /// take long, is left to the caller, who holds nothing.
    pub fn disk_flush(&self) -> impl FnOnce() -> io::Result<Option<File>> + Send + use<> {
        let (console, blk) = (Arc::clone(&self.console), Arc::clone(&self.blk));
        move || {
            console.flush();
            blk.with_model(|blk| blk.flush_metadata()).transpose()
        }
    }

    /// The disk's generation; 0 before the backends are there.
    #[must_use]
    pub fn disk_generation(&self) -> u64 {
        self.blk.with_model(|blk| blk.generation()).unwrap_or(0)
    }

    /// How many 4 KiB pages the guest shall give back.
    pub fn set_balloon_target(&self, n_pages: u32) {
        self.balloon.with_model(|balloon| balloon.target_pages = n_pages);
        self.balloon.config_changed();
    }

    /// The devices' state, while frozen.
    #[must_use]
    pub fn save(&self) -> DevicesState {
        let pages = self
            .balloon
            .with_model(|balloon| (balloon.target_pages, balloon.actual_pages));
        let (balloon_target_pages, balloon_actual_pages) = pages.unwrap_or_default();
        DevicesState {
            transports: self.bus().iter().map(|device| device.save()).collect(),
            balloon_target_pages,
            balloon_actual_pages,
            serial: self.console.save(),
            vsock_unconnected: !self
                .vsock
                .with_model(|vsock| vsock.has_connections())
                .unwrap_or(true),
        }
    }

    /// Takes over the state of an image; after it the devices are still.
    ///
    /// # Errors
    /// The state can't be one of these devices over this memory; the set is of no use then.
    pub fn restore(&mut self, state: &DevicesState) -> Result<(), DeviceError> {
        if !self.attached {
            return Err(DeviceError::NotAttached);
        }
        self.freeze();
        let bus = self.bus();
        if state.transports.len() != bus.len() {
            return Err(DeviceError::DeviceCount {
                found: state.transports.len(),
                expected: bus.len(),
            });
        }
        for (device, transport) in bus.iter().zip(&state.transports) {
            device.restore(transport)?;
        }
        self.balloon.with_model(|balloon| {
            balloon.target_pages = state.balloon_target_pages;
            balloon.actual_pages = state.balloon_actual_pages;
        });
        if self.vsock.is_running() && !state.vsock_unconnected {
            self.vsock.with_model(Vsock::transport_reset);
        }
        self.console.restore(&state.serial).ok_or(DeviceError::Serial)
    }

    /// Lets restored devices run: every queue is looked at, every interrupt raised that the guest has not acknowledged. One
    /// that was on its way when the image was made is among those; what the guest has acknowledged it has seen.
    pub fn resume_after_restore(&mut self) {
        // While the threads are parked: a request that queued up may keep its device for an fdatasync.
        for device in self.bus() {
            device.interrupt().raise_pending();
        }
        self.thaw();
    }

    /// Bytes moved so far.
    #[must_use]
    pub fn counters(&self) -> DeviceCounters {
        let (net_rx_bytes, net_tx_bytes) = self
            .net
            .with_model(|net| (net.rx_bytes, net.tx_bytes))
            .unwrap_or_default();
        let (disk_read_bytes, disk_written_bytes) = self
            .blk
            .with_model(|blk| (blk.read_bytes, blk.written_bytes))
            .unwrap_or_default();
        DeviceCounters {
            net_rx_bytes,
            net_tx_bytes,
            disk_read_bytes,
            disk_written_bytes,
        }
    }
}
