//! virtio-blk: the machine's disk.
//!
//! Runs on a thread of its own, one request after the other, so that a pause waits for one request at most.
//! Data goes between guest memory and the files without a copy. A request that the disk refuses ends with an
//! error status and the next one is served; a chain that is no request needs a reset of the device.

use std::io;
use std::sync::atomic::AtomicBool;

use self::disk::Disk;
use self::generation::Generation;
use super::mmio::{Model, VirtioDevice};
use super::queue::{Buffers, Chain, Drained, QueueError};

mod disk;
mod generation;
#[cfg(test)]
mod tests;

pub use self::disk::{CLUSTER_BYTES, create_overlay};

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const SECTOR_BYTES: u64 = 512;
const SIZE_MAX: u32 = 64 << 10;
const SEG_MAX: u32 = 64;
/// What the two above amount to, which is how long a pause may have to wait.
const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Largest range of one discard or write-zeroes, in sectors: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
const UNMAP: u32 = 1;
const ID: &[u8; 20] = b"torpor-disk\0\0\0\0\0\0\0\0\0";
const BUDGET: usize = 64;

/// The disk device.
#[derive(Debug)]
pub(crate) struct Blk {
    disk: Disk,
    generation: Generation,
    /// Bytes the guest read.
    pub(crate) read_bytes: u64,
    /// Bytes the guest wrote.
    pub(crate) written_bytes: u64,
}

impl Blk {
    /// Opens the disk and reads its generation.
    pub(crate) fn open(
        base: std::fs::File,
        overlay: std::fs::File,
        generation: std::fs::File,
    ) -> io::Result<Self> {
        Ok(Self {
            disk: Disk::open(base, overlay)?,
            generation: Generation::read(generation)?,
            read_bytes: 0,
            written_bytes: 0,
        })
    }

    /// Makes everything written durable, metadata too.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }

    /// Writes cached metadata to the overlay; returns the overlay, for the caller to make it durable.
    pub(crate) fn flush_metadata(&self) -> io::Result<std::fs::File> {
        self.disk.flush_metadata()
    }

    /// The disk's generation now.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.value()
    }

    /// An image may be made of what the guest has now.
    pub(crate) fn new_run(&mut self) {
        self.generation.new_run();
    }

    /// Does one request; returns the bytes written to guest memory.
    fn request(&mut self, mut chain: Chain<'_>) -> Result<usize, QueueError> {
        let short = QueueError::Short { head: chain.head };
        let Some(status) = chain.writable.take_back(1) else {
            return Err(short);
        };
        let (Some(kind), Some(_reserved), Some(sector)) = (
            chain.readable.read_array().map(u32::from_le_bytes),
            chain.readable.read_array::<4>(),
            chain.readable.read_array().map(u64::from_le_bytes),
        ) else {
            return Err(short);
        };
        let outcome = self.execute(kind, sector, chain.readable, &chain.writable);
        let (code, n_bytes) = match outcome {
            Ok(n_bytes) => (S_OK, n_bytes),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => (S_UNSUPP, 0),
            Err(error) => {
                tracing::warn!(kind, sector, %error, "disk request failed");
                (S_IOERR, 0)
            }
        };
        status.copy_from(&[code]);
        Ok(n_bytes + 1)
    }

    fn execute(
        &mut self,
        kind: u32,
        sector: u64,
        readable: Buffers<'_>,
        writable: &Buffers<'_>,
    ) -> io::Result<usize> {
        match kind {
            T_IN => {
                let offset = self.offset(sector, writable.len())?;
                self.disk.read(writable, offset)?;
                self.read_bytes += bytes_u64(writable.len());
                Ok(writable.len())
            }
            T_OUT => {
                let offset = self.offset(sector, readable.len())?;
                self.generation.raise()?;
                self.disk.write(&readable, offset)?;
                self.written_bytes += bytes_u64(readable.len());
                Ok(0)
            }
            T_FLUSH => self.disk.flush().map(|()| 0),
            T_GET_ID => Ok(writable.copy_from(ID)),
            T_DISCARD | T_WRITE_ZEROES => self.zero(kind, readable).map(|()| 0),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Discard or write-zeroes of one range.
    fn zero(&mut self, kind: u32, mut ranges: Buffers<'_>) -> io::Result<()> {
        let malformed = || invalid("not one range");
        let sector = u64::from_le_bytes(ranges.read_array().ok_or_else(malformed)?);
        let n_sectors = u32::from_le_bytes(ranges.read_array().ok_or_else(malformed)?);
        let flags = u32::from_le_bytes(ranges.read_array().ok_or_else(malformed)?);
        if ranges.len() != 0 {
            return Err(malformed());
        }
        if flags & !UNMAP != 0 || (kind == T_DISCARD && flags != 0) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if n_sectors > MAX_RANGE_SECTORS {
            return Err(invalid("range is too long"));
        }
        let len_bytes = u64::from(n_sectors) * SECTOR_BYTES;
        let offset = self.range(sector, len_bytes)?;
        self.generation.raise()?;
        if kind == T_DISCARD || flags & UNMAP != 0 {
            self.disk.discard_to_zero(offset, len_bytes)
        } else {
            self.disk.write_zeroes(offset, len_bytes)
        }
    }

    /// Where a transfer begins, if it is whole sectors inside the disk.
    fn offset(&self, sector: u64, len_bytes: usize) -> io::Result<u64> {
        if len_bytes > MAX_REQUEST_BYTES {
            return Err(invalid("request is too long"));
        }
        let len_bytes = bytes_u64(len_bytes);
        if !len_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(invalid("not whole sectors"));
        }
        self.range(sector, len_bytes)
    }

    fn range(&self, sector: u64, len_bytes: u64) -> io::Result<u64> {
        let offset = sector
            .checked_mul(SECTOR_BYTES)
            .ok_or_else(|| invalid("past the end of the disk"))?;
        let end = offset
            .checked_add(len_bytes)
            .filter(|&end| end <= self.disk.len_bytes());
        end.map(|_| offset)
            .ok_or_else(|| invalid("past the end of the disk"))
    }
}

impl Model for Blk {
    const DEVICE_ID: u32 = 2;
    const QUEUE_SIZES: &'static [u16] = &[256];

    fn features(&self) -> u64 {
        F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_DISCARD | F_WRITE_ZEROES
    }

    /// `struct virtio_blk_config`.
    fn config(&self) -> Vec<u8> {
        let mut config = (self.disk.len_bytes() / SECTOR_BYTES).to_le_bytes().to_vec();
        config.extend(SIZE_MAX.to_le_bytes());
        config.extend(SEG_MAX.to_le_bytes());
        config.extend([0; 4]);
        config.extend(512_u32.to_le_bytes());
        // Topology, write-back, queues: not offered.
        config.extend([0; 12]);
        let alignment = u32::try_from(CLUSTER_BYTES / 512).unwrap_or(1);
        config.extend(MAX_RANGE_SECTORS.to_le_bytes());
        config.extend(1_u32.to_le_bytes());
        config.extend(alignment.to_le_bytes());
        config.extend(MAX_RANGE_SECTORS.to_le_bytes());
        config.extend(1_u32.to_le_bytes());
        // Write-zeroes may unmap.
        config.extend([1, 0, 0, 0]);
        config
    }
}

/// Does the requests that wait.
pub(crate) fn serve(device: &VirtioDevice<Blk>, pause: &AtomicBool) {
    device.serve(|blk, queues| {
        let memory = queues.memory;
        let mut drained = Drained::More;
        for _ in 0..BUDGET {
            // One at a time, and the guest hears of each: it may be waiting for just that one.
            drained = queues.queues[0].drain(memory, pause, 1, |chain| blk.request(chain))?;
            queues.notify(0)?;
            if drained == Drained::Empty {
                break;
            }
        }
        if drained == Drained::More {
            queues.come_back(0);
        }
        Ok(())
    });
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

fn bytes_u64(len_bytes: usize) -> u64 {
    u64::try_from(len_bytes).unwrap_or(u64::MAX)
}
