//! The first page of a hibernation image, as far as torpord needs it.
//!
//! The VMM owns the format (`vmm/src/image/header.rs`) and checks all of it before a restore. torpord reads the
//! few fields that tell whether there is something to restore, by their offsets, so that it need not be built
//! with KVM. No test compares them with the VMM's encoder; only a wake in the virtual host would show a difference.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use torpor_api::vmm::{IMAGE_FORMAT, LAYERED_IMAGE_FORMAT};

/// Name of the image in a machine's directory.
pub const IMAGE: &str = "memory.img";
/// Length of the header in bytes.
pub const HEADER_LEN: usize = 4096;
const MAGIC: &[u8; 8] = b"TORPORMI";
const FLAG_VALID: u32 = 1;
const CRC_OFFSET: usize = HEADER_LEN - 4;
const SIGNATURE_OFFSET: usize = 96;

/// Why a file is no image.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The operating system refused.
    #[error("cannot read {}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The first page is not what it should be.
    #[error("{}: {what}", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// What the first page says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The last persist came to its end.
    pub valid: bool,
    /// The image's generation.
    pub generation: u64,
    /// The disk's generation that it belongs to.
    pub disk_generation: u64,
    /// What an image over this one names it by.
    pub name: u32,
    /// That of the image that it lies over, if it does.
    pub base: Option<u32>,
    /// What the image needs of a host.
    pub host_signature: serde_json::Value,
}

/// Read and check the first page of the image at `path`.
///
/// # Errors
/// It can't be read, or is none.
pub fn read(path: &Path) -> Result<Header, HeaderError> {
    let mut page = [0; HEADER_LEN];
    File::open(path)
        .and_then(|file| file.read_exact_at(&mut page, 0))
        .map_err(|source| HeaderError::Io {
            path: path.to_owned(),
            source,
        })?;
    decode(&page).map_err(|what| HeaderError::Damaged {
        path: path.to_owned(),
        what,
    })
}

fn decode(page: &[u8; HEADER_LEN]) -> Result<Header, &'static str> {
    let get32 = |at: usize| page[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
    let get64 = |at: usize| page[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
    if page[..8] != *MAGIC {
        return Err("not a hibernation image");
    }
    let name = get32(CRC_OFFSET);
    if crc32c::crc32c(&page[..CRC_OFFSET]) != name {
        return Err("checksum of the header is wrong");
    }
    let base = match get32(8) {
        IMAGE_FORMAT => None,
        LAYERED_IMAGE_FORMAT => Some(get32(92)),
        _ => return Err("written by another version of the VMM"),
    };
    let signature = usize::try_from(get32(88))
        .ok()
        .and_then(|len| page[..CRC_OFFSET].get(SIGNATURE_OFFSET..)?.get(..len))
        .ok_or("host signature is out of bounds")?;
    Ok(Header {
        valid: get32(12) & FLAG_VALID != 0,
        generation: get64(16),
        disk_generation: get64(24),
        name,
        base,
        host_signature: serde_json::from_slice(signature).map_err(|_| "host signature is no JSON")?,
    })
}
