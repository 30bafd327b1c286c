//! Hibernation images: one sparse file per machine, rewritten in place.
//!
//! The format is laid down in ARCHITECTURE.md ("Hibernation image"). [`Header`] can be read without decoding
//! anything else; [`ImageFile`] reads pages and checks them; [`persist`] writes. Everything in a file is
//! hostile until its checksum and its bounds were checked. No thread lives here.

mod file;
mod header;
pub mod persist;
mod working_set;

pub use file::{Base, ImageFile, ImageView, PageError, PageSource, in_one_file, is_zero};
pub use header::{Header, HeaderError, HostSignature, ImageLayout};
pub use working_set::{
    Extent, MAX_BYTES, MAX_DOUBTED_BYTES, bounded, decode_working_set, encode_working_set, with_probation,
};

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Room for the state.
pub const VMSTATE_CAPACITY: u64 = 2 << 20;
/// Room for the working set.
pub const WORKING_SET_CAPACITY: u64 = 1 << 20;

/// Why an image can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Reading failed.
    #[error("cannot read {what} of the image")]
    Read {
        /// Which part.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The header is no valid header.
    #[error("image header is unusable")]
    Header(#[from] HeaderError),
    /// A persist was cut short, or never came to its end.
    #[error("image is not marked valid: its last persist did not end")]
    Incomplete,
    /// Not the generation that was asked for.
    #[error("image has generation {found}, not {wanted}")]
    Generation {
        /// In the header.
        found: u64,
        /// Asked for.
        wanted: u64,
    },
    /// Not the disk's generation that was asked for.
    #[error("image belongs to disk generation {found}, not {wanted}")]
    DiskGeneration {
        /// In the header.
        found: u64,
        /// Asked for.
        wanted: u64,
    },
    /// Another shape.
    #[error(
        "image is of {found_vcpus} vCPUs and {found_bytes} bytes of memory, the VM was prepared otherwise"
    )]
    Shape {
        /// In the header.
        found_vcpus: u32,
        /// In the header.
        found_bytes: u64,
    },
    /// Shorter than its header says.
    #[error("image is {found} bytes long, not {wanted}")]
    Length {
        /// Length of the file.
        found: u64,
        /// What the header needs.
        wanted: u64,
    },
    /// The state's checksum is wrong.
    #[error("checksum of the machine state is {found:#010x}, not {wanted:#010x}")]
    StateChecksum {
        /// Computed.
        found: u32,
        /// In the header.
        wanted: u32,
    },
    /// The image that it lies over is missing or another one.
    #[error("image lies over another one, which is {found}")]
    Base {
        /// What is in its place.
        found: &'static str,
    },
    /// Made where this host can't go on.
    #[error("image was made on {found}, this is {here}")]
    Host {
        /// In the header.
        found: String,
        /// This host.
        here: String,
    },
}

/// What an image must be for a restore.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Generation.
    pub generation: u64,
    /// Generation of the disk.
    pub disk_generation: u64,
    /// vCPUs of the prepared VM.
    pub n_vcpus: u8,
    /// Memory of the prepared VM in bytes.
    pub mem_bytes: u64,
    /// This host.
    pub host: HostSignature,
}

/// An image that passed every check that needs no page of memory.
#[derive(Debug)]
pub struct OpenImage {
    /// The file, for its pages.
    pub file: ImageFile,
    /// The encoded state.
    pub vmstate: Vec<u8>,
    /// The working set; empty if it is damaged, because it is only a hint.
    pub working_set: Vec<Extent>,
    /// The header.
    pub header: Header,
}

/// Read an image's header, whatever else is in the file.
///
/// # Errors
/// It can't be read, or it is no header.
pub fn read_header(file: &File) -> Result<Header, OpenError> {
    Ok(Header::decode(&read_header_page(file)?)?)
}

fn read_header_page(file: &File) -> Result<[u8; header::HEADER_LEN], OpenError> {
    let mut page = [0; header::HEADER_LEN];
    let failed = |source| OpenError::Read {
        what: "header",
        source,
    };
    file.read_exact_at(&mut page, 0).map_err(failed)?;
    Ok(page)
}

/// Check an image for a restore and read all of it but the pages. `base` is the image that it lies over, if it does.
///
/// # Errors
/// Anything is not as expected; nothing was touched then.
pub fn open(file: File, base: Option<File>, expected: &Expected) -> Result<OpenImage, OpenError> {
    let header = read_header(&file)?;
    check(&header, expected)?;
    let layout = header.layout()?;
    check_length(&file, layout.file_len(header.base.is_some()))?;
    let base = header
        .base
        .map(|name| open_base(base, name, layout))
        .transpose()?;
    let vmstate = read_part(&file, "state", header.vmstate_len, layout.vmstate_offset())?;
    let sum = crc32c::crc32c(&vmstate);
    if sum != header.vmstate_crc {
        return Err(OpenError::StateChecksum {
            found: sum,
            wanted: header.vmstate_crc,
        });
    }
    let (len, offset) = (header.working_set_len, layout.working_set_offset());
    let encoded = read_part(&file, "working set", len, offset)?;
    let working_set = decode_working_set(&encoded, layout.n_pages()).unwrap_or_default();
    let file = ImageFile::open(file, layout, base).map_err(unidentified)?;
    Ok(OpenImage {
        file,
        vmstate,
        working_set,
        header,
    })
}

fn unidentified(source: io::Error) -> OpenError {
    OpenError::Read {
        what: "identity",
        source,
    }
}

fn check_length(file: &File, wanted: u64) -> Result<(), OpenError> {
    let length = file.metadata().map_err(|source| OpenError::Read {
        what: "length",
        source,
    })?;
    let found = length.len();
    if found < wanted {
        return Err(OpenError::Length { found, wanted });
    }
    Ok(())
}

/// The image that another one names by `name` as the one that it lies over.
fn open_base(file: Option<File>, name: u32, layout: ImageLayout) -> Result<Base, OpenError> {
    let wrong = |found| OpenError::Base { found };
    let file = file.ok_or_else(|| wrong("missing"))?;
    check_length(&file, layout.file_len(false))?;
    let image = ImageFile::open(file, layout, None).map_err(unidentified)?;
    let base = Base::new(Arc::new(image))?;
    base.filter(|base| base.name == name)
        .ok_or_else(|| wrong("not the one that it was written over"))
}

/// Read a part whose length the header's decoder bounded.
fn read_part(file: &File, what: &'static str, len: u32, offset: u64) -> Result<Vec<u8>, OpenError> {
    let mut bytes = vec![0; len as usize];
    let failed = |source| OpenError::Read { what, source };
    file.read_exact_at(&mut bytes, offset).map_err(failed)?;
    Ok(bytes)
}

fn check(header: &Header, expected: &Expected) -> Result<(), OpenError> {
    if !header.valid {
        return Err(OpenError::Incomplete);
    }
    if header.generation != expected.generation {
        return Err(OpenError::Generation {
            found: header.generation,
            wanted: expected.generation,
        });
    }
    if header.disk_generation != expected.disk_generation {
        return Err(OpenError::DiskGeneration {
            found: header.disk_generation,
            wanted: expected.disk_generation,
        });
    }
    if header.n_vcpus != u32::from(expected.n_vcpus) || header.mem_bytes != expected.mem_bytes {
        return Err(OpenError::Shape {
            found_vcpus: header.n_vcpus,
            found_bytes: header.mem_bytes,
        });
    }
    if header.host != expected.host {
        return Err(OpenError::Host {
            found: header.host.to_string(),
            here: expected.host.to_string(),
        });
    }
    Ok(())
}

impl OpenError {
    /// Whether the image is sound and only not for this host or VMM.
    #[must_use]
    pub fn is_incompatible(&self) -> bool {
        matches!(
            self,
            Self::Host { .. } | Self::Shape { .. } | Self::Header(HeaderError::Version { .. })
        )
    }
}
