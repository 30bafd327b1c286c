//! A machine without a processor: guest memory, devices with stand-ins behind them, and a driver.
//!
//! The driver keeps to the letter of the rings: it kicks only when the device asked for it and waits for interrupts
//! only, so a kick or an interrupt that is missing is a test that times out.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::net::Net;
use super::*;

pub(crate) const BLK: u64 = 0;
pub(crate) const NET: u64 = 1;
pub(crate) const VSOCK: u64 = 2;
pub(crate) const RNG: u64 = 3;
pub(crate) const BALLOON: u64 = 4;

pub(crate) const MEMORY_BYTES: usize = 32 << 20;
/// Where tests may put buffers.
pub(crate) const BUFFERS: u64 = 16 << 20;
pub(crate) const BASE_BYTES: u64 = 1 << 20;
pub(crate) const DISK_BYTES: u64 = 4 << 20;

const TIMEOUT_MS: u16 = 20_000;

/// Devices over stand-ins.
pub(crate) struct Machine {
    pub(crate) set: DeviceSet,
    pub(crate) memory: GuestMemory,
    pub(crate) dir: Arc<TempDir>,
    /// The other end of the "tap".
    pub(crate) wire: UnixDatagram,
    pub(crate) discarded: Arc<Mutex<Vec<(u64, u64)>>>,
    vsock_path: PathBuf,
}

/// The byte that the base disk has at `offset`.
pub(crate) fn base_byte(offset: u64) -> u8 {
    (offset / 512).to_le_bytes()[0]
        .wrapping_mul(31)
        .wrapping_add(offset.to_le_bytes()[0])
}

impl Machine {
    /// A new machine with empty memory and a fresh overlay.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base: Vec<u8> = (0..BASE_BYTES).map(base_byte).collect();
        std::fs::write(dir.path().join("base"), base).unwrap();
        let overlay = open(&dir.path().join("overlay"));
        blk::create_overlay(BASE_BYTES, overlay, DISK_BYTES).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        Self::over(memory, Arc::new(dir))
    }

    /// Devices over existing memory and files.
    pub(crate) fn over(memory: GuestMemory, dir: Arc<TempDir>) -> Self {
        let mut set = DeviceSet::new().unwrap();
        let (wire, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let vsock_path = dir.path().join("vsock.sock");
        let _absent = std::fs::remove_file(&vsock_path);
        let listener = UnixListener::bind(&vsock_path).unwrap();
        let backends = Backends {
            disk_base: File::open(dir.path().join("base")).unwrap(),
            disk_overlay: open(&dir.path().join("overlay")),
            disk_generation: open(&dir.path().join("disk.gen")),
            tap: File::from(OwnedFd::from(tap)),
            vsock_listener: OwnedFd::from(listener),
            console: open(&dir.path().join("console.log")),
            console_limit: 1 << 16,
        };
        let discarded = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&discarded);
        let discard: Discard =
            Arc::new(move |gpa: GuestAddress, len| sink.lock().unwrap().push((gpa.0, len)));
        let stand_in = |tap, epoll, token| Ok(Net::over_stand_in(tap, epoll, token));
        set.attach_with(&memory, backends, discard, stand_in).unwrap();
        Self {
            set,
            memory,
            dir,
            wire,
            discarded,
            vsock_path,
        }
    }

    /// Freezes, saves, and goes on in a new set of devices, as a restored VMM does.
    pub(crate) fn into_restored(mut self) -> Self {
        self.set.freeze();
        self.set.flush_disk().unwrap();
        let bytes = postcard::to_stdvec(&self.set.save()).unwrap();
        let (memory, dir) = (self.memory.clone(), Arc::clone(&self.dir));
        drop(self);
        let mut machine = Self::over(memory, dir);
        machine
            .set
            .restore(&postcard::from_bytes(&bytes).unwrap())
            .unwrap();
        machine.set.resume_after_restore();
        machine
    }

    pub(crate) fn read32(&self, device: u64, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.set
            .mmio_read(MMIO_BASE + device * MMIO_STRIDE + offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write32(&self, device: u64, offset: u64, value: u32) {
        self.set
            .mmio_write(MMIO_BASE + device * MMIO_STRIDE + offset, &value.to_le_bytes());
    }

    pub(crate) fn status(&self, device: u64) -> u32 {
        self.read32(device, 0x70)
    }

    pub(crate) fn needs_reset(&self, device: u64) -> bool {
        self.status(device) & 0x40 != 0
    }

    /// Waits for the device's interrupt and acknowledges it.
    pub(crate) fn wait_interrupt(&self, device: u64) {
        let line = self.set.bus()[usize::try_from(device).unwrap()]
            .interrupt()
            .line();
        let mut fds = [PollFd::new(sys::borrow(line), PollFlags::POLLIN)];
        let n_ready = poll(&mut fds, PollTimeout::from(TIMEOUT_MS)).unwrap();
        assert_eq!(
            n_ready, 1,
            "no interrupt of device {device} within {TIMEOUT_MS} ms"
        );
        line.read().unwrap();
        let status = self.read32(device, 0x60);
        self.write32(device, 0x64, status);
    }

    /// Returns when the devices have nothing to do but wait for the guest and the host.
    pub(crate) fn settle(&mut self) {
        self.set.freeze();
        self.set.thaw();
        self.set.freeze();
        self.set.thaw();
    }

    pub(crate) fn connect_vsock(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.vsock_path).unwrap();
        stream
            .set_read_timeout(Some(std::time::Duration::from_millis(u64::from(TIMEOUT_MS))))
            .unwrap();
        stream
    }

    pub(crate) fn fill(&self, gpa: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(gpa)).unwrap();
    }

    pub(crate) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(gpa)).unwrap();
        data
    }
}

/// Opens a file for reading and writing, made if it is not there.
pub(crate) fn open(path: &std::path::Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) gpa: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

pub(crate) fn readable(gpa: u64, len: u32) -> Buffer {
    Buffer {
        gpa,
        len,
        writable: false,
    }
}

pub(crate) fn writable(gpa: u64, len: u32) -> Buffer {
    Buffer {
        gpa,
        len,
        writable: true,
    }
}

/// The driver's end of a virtqueue.
#[derive(Debug, Clone)]
pub(crate) struct Ring {
    pub(crate) device: u64,
    pub(crate) index: u32,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    next_desc: u16,
    pub(crate) avail_idx: u16,
    kicked_idx: u16,
    used_seen: u16,
}

pub(crate) const F_NEXT: u16 = 1;
pub(crate) const F_WRITE: u16 = 2;
pub(crate) const F_INDIRECT: u16 = 4;

impl Ring {
    /// Where the rings of a queue are.
    pub(crate) fn place(device: u64, index: u32, size: u16) -> Self {
        let base = 0x10_0000 * (device + 1) + 0x1_0000 * u64::from(index);
        Self {
            device,
            index,
            size,
            desc: base,
            avail: base + 0x4000,
            used: base + 0x8000,
            next_desc: 0,
            avail_idx: 0,
            kicked_idx: 0,
            used_seen: 0,
        }
    }

    pub(crate) fn write_desc(
        &self,
        machine: &Machine,
        index: u16,
        gpa: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = gpa.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        machine.fill(self.desc + 16 * u64::from(index), &bytes);
    }

    /// Makes a chain available, without a kick.
    pub(crate) fn push(&mut self, machine: &Machine, buffers: &[Buffer]) -> u16 {
        let head = self.next_desc;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = self.next_desc;
            self.next_desc = (self.next_desc + 1) % self.size;
            let next = if i + 1 < buffers.len() { F_NEXT } else { 0 };
            let write = if buffer.writable { F_WRITE } else { 0 };
            self.write_desc(
                machine,
                index,
                buffer.gpa,
                buffer.len,
                next | write,
                self.next_desc,
            );
        }
        self.push_head(machine, head);
        head
    }

    /// Makes a descriptor's chain available, whatever it is.
    pub(crate) fn push_head(&mut self, machine: &Machine, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.avail_idx % self.size);
        machine.fill(slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        let index = machine
            .memory
            .store(self.avail_idx, GuestAddress(self.avail + 2), Release);
        index.unwrap();
    }

    /// Kicks if the device asked for it.
    pub(crate) fn kick(&mut self, machine: &Machine) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let event = self.used + 4 + 8 * u64::from(self.size);
        let avail_event: u16 = machine.memory.load(GuestAddress(event), Acquire).unwrap();
        let (old, new) = (self.kicked_idx, self.avail_idx);
        self.kicked_idx = new;
        if new.wrapping_sub(avail_event).wrapping_sub(1) < new.wrapping_sub(old) {
            machine.write32(self.device, 0x50, self.index);
        }
    }

    /// A completion, if there is one: head and length.
    pub(crate) fn poll_used(&mut self, machine: &Machine) -> Option<(u16, u32)> {
        let index: u16 = machine.memory.load(GuestAddress(self.used + 2), Acquire).unwrap();
        if index == self.used_seen {
            return None;
        }
        let element = machine.bytes(self.used + 4 + 8 * u64::from(self.used_seen % self.size), 8);
        self.used_seen = self.used_seen.wrapping_add(1);
        self.ask_interrupt(machine);
        let head = u16::from_le_bytes(element[..2].try_into().unwrap());
        Some((head, u32::from_le_bytes(element[4..].try_into().unwrap())))
    }

    fn ask_interrupt(&self, machine: &Machine) {
        let event = GuestAddress(self.avail + 4 + 2 * u64::from(self.size));
        machine.memory.store(self.used_seen, event, Release).unwrap();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    /// Waits for a completion.
    pub(crate) fn wait_used(&mut self, machine: &Machine) -> (u16, u32) {
        loop {
            if let Some(used) = self.poll_used(machine) {
                return used;
            }
            machine.wait_interrupt(self.device);
        }
    }
}

use std::sync::atomic::Ordering::{Acquire, Release};

/// Resets a device and brings it up as a driver does, with every feature it offers.
pub(crate) fn start(machine: &Machine, device: u64) -> Vec<Ring> {
    let write = |offset, value| machine.write32(device, offset, value);
    write(0x70, 0);
    write(0x70, 1);
    write(0x70, 3);
    for half in 0..2 {
        write(0x14, half);
        let features = machine.read32(device, 0x10);
        write(0x24, half);
        write(0x20, features);
    }
    write(0x70, 11);
    assert_eq!(machine.status(device), 11, "features were refused");
    let mut rings = Vec::new();
    for index in 0.. {
        write(0x30, index);
        let size = machine.read32(device, 0x34);
        if size == 0 {
            break;
        }
        let ring = Ring::place(device, index, u16::try_from(size).unwrap());
        machine.fill(ring.desc, &[0; 0xc000]);
        write(0x38, size);
        for (offset, gpa) in [(0x80, ring.desc), (0x90, ring.avail), (0xa0, ring.used)] {
            write(offset, u32::try_from(gpa).unwrap());
            write(offset + 4, 0);
        }
        write(0x44, 1);
        assert_eq!(machine.read32(device, 0x44), 1, "queue was refused");
        rings.push(ring);
    }
    write(0x70, 15);
    rings
}
