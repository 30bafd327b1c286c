//! The disk's generation: which writes the memory image on disk knows of.
//!
//! Invariant: before the first change of the disk after a start, a restore or a freeze reaches the overlay, a
//! higher generation is durable in the file. So memory whose manifest names an older one is never resumed over a
//! newer disk, be it by this process or the next.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Generation, CRC32C of it, four zero bytes.
const FILE_BYTES: usize = 16;

/// The generation and its file.
#[derive(Debug)]
pub(crate) struct Generation {
    file: File,
    value: u64,
    raised: bool,
}

impl Generation {
    /// Reads it; an empty file is generation 0.
    pub(crate) fn read(file: File) -> io::Result<Self> {
        let value = if file.metadata()?.len() == 0 {
            0
        } else {
            let mut bytes = [0; FILE_BYTES];
            file.read_exact_at(&mut bytes, 0)?;
            decode(&bytes)?
        };
        Ok(Self {
            file,
            value,
            raised: false,
        })
    }

    /// The generation now.
    pub(crate) fn value(&self) -> u64 {
        self.value
    }

    /// An image may name the generation as it is now: the next change raises it again.
    pub(crate) fn new_run(&mut self) {
        self.raised = false;
    }

    /// Before a change of the disk: raises it durably, once between two freezes.
    pub(crate) fn raise(&mut self) -> io::Result<()> {
        if self.raised {
            return Ok(());
        }
        let value = self
            .value
            .checked_add(1)
            .ok_or_else(|| io::Error::other("the disk's generation is exhausted"))?;
        self.file.write_all_at(&encode(value), 0)?;
        // The file holds it now, whether or not it is durable: an image must not name the one before.
        self.value = value;
        self.file.sync_data()?;
        self.raised = true;
        Ok(())
    }
}

fn encode(value: u64) -> [u8; FILE_BYTES] {
    let mut bytes = [0; FILE_BYTES];
    let number = value.to_le_bytes();
    bytes[..8].copy_from_slice(&number);
    bytes[8..12].copy_from_slice(&crc32c::crc32c(&number).to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; FILE_BYTES]) -> io::Result<u64> {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[..8]);
    let value = u64::from_le_bytes(number);
    if encode(value) == *bytes {
        Ok(value)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the disk's generation file fails its checksum",
        ))
    }
}
