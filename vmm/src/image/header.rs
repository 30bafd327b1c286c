//! The first page of an image.

use super::{VMSTATE_CAPACITY, WORKING_SET_CAPACITY};
use crate::layout::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use torpor_api::limits::MEM_MIB;
use torpor_api::vmm::{IMAGE_FORMAT, LAYERED_IMAGE_FORMAT};

/// Bytes of the header.
pub(super) const HEADER_LEN: usize = 4096;
const MAGIC: [u8; 8] = *b"TORPORMI";
const FLAG_VALID: u32 = 1;
const SIGNATURE_OFFSET: usize = 96;
const CRC_OFFSET: usize = HEADER_LEN - 4;
const SIGNATURE_MAX: usize = CRC_OFFSET - SIGNATURE_OFFSET;
const DATA_ALIGNMENT: u64 = 2 << 20;

/// Why a page is not a header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not an image at all.
    #[error("magic is not that of a hibernation image")]
    Magic,
    /// Checksum is wrong.
    #[error("header checksum is {found:#010x}, not {wanted:#010x}")]
    Checksum {
        /// Computed.
        found: u32,
        /// In the header.
        wanted: u32,
    },
    /// Another version of the format.
    #[error("format version is {found}, this VMM reads {IMAGE_FORMAT} and {LAYERED_IMAGE_FORMAT}")]
    Version {
        /// In the header.
        found: u32,
    },
    /// A field is out of range.
    #[error("field {field} has the impossible value {value}")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The host signature is not readable.
    #[error("host signature is unreadable")]
    Signature,
}

/// What must be equal between the host that made an image and the one that resumes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSignature {
    /// Architecture.
    pub arch: String,
    /// Vendor of the processor.
    pub vendor: String,
    /// Its family.
    pub family: u32,
    /// Its model.
    pub model: u32,
    /// Its stepping.
    pub stepping: u32,
    /// CRC32C of the feature words that a guest is shown.
    pub features: u32,
    /// Major and minor version of the host's kernel.
    pub kernel: String,
}

impl HostSignature {
    /// The signature of this host, given what its processor says.
    #[must_use]
    pub fn new(arch: &str, vendor: &str, family: u32, model: u32, stepping: u32, features: &[u8]) -> Self {
        let release = nix::sys::utsname::uname();
        let release = release
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        Self {
            arch: arch.to_owned(),
            vendor: vendor.to_owned(),
            family,
            model,
            stepping,
            features: crc32c::crc32c(features),
            kernel: release.split('.').take(2).collect::<Vec<_>>().join("."),
        }
    }
}

impl std::fmt::Display for HostSignature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {} {}/{}/{} features {:08x} Linux {}",
            self.arch, self.vendor, self.family, self.model, self.stepping, self.features, self.kernel
        )
    }
}

/// Where the parts of an image are; follows from the memory size alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLayout {
    n_pages: u64,
}

impl ImageLayout {
    /// The layout for so much memory.
    #[must_use]
    pub fn new(mem_bytes: u64) -> Self {
        Self {
            n_pages: mem_bytes / PAGE_BYTES,
        }
    }
    /// Pages of guest memory.
    #[must_use]
    pub fn n_pages(&self) -> u64 {
        self.n_pages
    }
    /// The state.
    #[must_use]
    pub fn vmstate_offset(&self) -> u64 {
        HEADER_LEN as u64
    }
    /// The checksums, 4 bytes per page.
    #[must_use]
    pub fn checksums_offset(&self) -> u64 {
        self.vmstate_offset() + VMSTATE_CAPACITY
    }
    /// The working set.
    #[must_use]
    pub fn working_set_offset(&self) -> u64 {
        (self.checksums_offset() + self.n_pages * 4).next_multiple_of(PAGE_BYTES)
    }
    /// The pages.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        (self.working_set_offset() + WORKING_SET_CAPACITY).next_multiple_of(DATA_ALIGNMENT)
    }
    /// One page.
    #[must_use]
    pub fn page_offset(&self, page: u64) -> u64 {
        self.data_offset() + page * PAGE_BYTES
    }
    /// Which pages are in this file and not in its base: one bit per page, in `u64` words. Only an image with a base has it.
    #[must_use]
    pub fn own_bits_offset(&self) -> u64 {
        self.page_offset(self.n_pages)
    }
    /// Length of the file.
    #[must_use]
    pub fn file_len(&self, has_base: bool) -> u64 {
        let own_bits = if has_base {
            self.n_pages.div_ceil(64) * 8
        } else {
            0
        };
        self.own_bits_offset() + own_bits
    }
}

/// The header, decoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The persist came to its end.
    pub valid: bool,
    /// Generation of the image.
    pub generation: u64,
    /// Generation of the disk that it belongs to.
    pub disk_generation: u64,
    /// Guest memory in bytes.
    pub mem_bytes: u64,
    /// Number of vCPUs.
    pub n_vcpus: u32,
    /// Length of the state in bytes.
    pub vmstate_len: u32,
    /// CRC32C of the state.
    pub vmstate_crc: u32,
    /// Length of the working set in bytes.
    pub working_set_len: u32,
    /// [`Header::name`] of the image that has the pages that are not in this one, if there is such an image.
    pub base: Option<u32>,
    /// The host that made it.
    pub host: HostSignature,
}

impl Header {
    /// Where the parts are.
    ///
    /// # Errors
    /// The memory size is not one that a machine can have.
    pub fn layout(&self) -> Result<ImageLayout, HeaderError> {
        let mib = self.mem_bytes >> 20;
        let whole = mib << 20 == self.mem_bytes;
        if !whole || !u32::try_from(mib).is_ok_and(|mib| MEM_MIB.contains(&mib)) {
            return Err(HeaderError::Field {
                field: "memory size",
                value: self.mem_bytes,
            });
        }
        Ok(ImageLayout::new(self.mem_bytes))
    }

    /// The page as it is on disk.
    ///
    /// # Errors
    /// The signature is too long.
    pub fn encode(&self) -> Result<[u8; HEADER_LEN], HeaderError> {
        let layout = self.layout()?;
        let signature = serde_json::to_vec(&self.host).map_err(|_| HeaderError::Signature)?;
        let signature_len = u32::try_from(signature.len()).map_err(|_| HeaderError::Signature)?;
        if signature.len() > SIGNATURE_MAX {
            return Err(HeaderError::Signature);
        }
        let mut page = [0; HEADER_LEN];
        page[..8].copy_from_slice(&MAGIC);
        let mut put32 = |at: usize, value: u32| page[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put32(
            8,
            if self.base.is_some() {
                LAYERED_IMAGE_FORMAT
            } else {
                IMAGE_FORMAT
            },
        );
        put32(12, if self.valid { FLAG_VALID } else { 0 });
        put32(40, self.n_vcpus);
        put32(44, self.vmstate_len);
        put32(48, self.vmstate_crc);
        put32(52, self.working_set_len);
        put32(88, signature_len);
        put32(92, self.base.unwrap_or(0));
        let mut put64 = |at: usize, value: u64| page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        put64(16, self.generation);
        put64(24, self.disk_generation);
        put64(32, self.mem_bytes);
        put64(56, layout.vmstate_offset());
        put64(64, layout.checksums_offset());
        put64(72, layout.working_set_offset());
        put64(80, layout.data_offset());
        page[SIGNATURE_OFFSET..SIGNATURE_OFFSET + signature.len()].copy_from_slice(&signature);
        let sum = crc32c::crc32c(&page[..CRC_OFFSET]);
        page[CRC_OFFSET..].copy_from_slice(&sum.to_le_bytes());
        Ok(page)
    }

    /// What an image over this one names it by: it changes with whatever is written to this one.
    pub(super) fn name(page: &[u8; HEADER_LEN]) -> u32 {
        u32::from_le_bytes(page[CRC_OFFSET..].try_into().unwrap_or_default())
    }

    /// Decode and check a page from disk.
    ///
    /// # Errors
    /// It is not a header of this version with possible values.
    pub fn decode(page: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let get32 = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap_or_default());
        let get64 = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap_or_default());
        if page[..8] != MAGIC {
            return Err(HeaderError::Magic);
        }
        let (found, wanted) = (crc32c::crc32c(&page[..CRC_OFFSET]), get32(CRC_OFFSET));
        if found != wanted {
            return Err(HeaderError::Checksum { found, wanted });
        }
        let base = match get32(8) {
            IMAGE_FORMAT => None,
            LAYERED_IMAGE_FORMAT => Some(get32(92)),
            found => return Err(HeaderError::Version { found }),
        };
        let signature_len = get32(88) as usize;
        let signature = SIGNATURE_OFFSET
            .checked_add(signature_len)
            .filter(|end| *end <= CRC_OFFSET);
        let signature = signature
            .and_then(|end| page.get(SIGNATURE_OFFSET..end))
            .ok_or(HeaderError::Signature)?;
        let header = Self {
            valid: get32(12) & FLAG_VALID != 0,
            generation: get64(16),
            disk_generation: get64(24),
            mem_bytes: get64(32),
            n_vcpus: get32(40),
            vmstate_len: get32(44),
            vmstate_crc: get32(48),
            working_set_len: get32(52),
            base,
            host: serde_json::from_slice(signature).map_err(|_| HeaderError::Signature)?,
        };
        header.check_ranges([get64(56), get64(64), get64(72), get64(80)])?;
        Ok(header)
    }

    fn check_ranges(&self, offsets: [u64; 4]) -> Result<(), HeaderError> {
        let layout = self.layout()?;
        let expected = [
            ("state offset", layout.vmstate_offset()),
            ("checksums offset", layout.checksums_offset()),
            ("working set offset", layout.working_set_offset()),
            ("data offset", layout.data_offset()),
        ];
        for ((field, wanted), value) in expected.into_iter().zip(offsets) {
            if value != wanted {
                return Err(HeaderError::Field { field, value });
            }
        }
        let limits = [
            ("state length", self.vmstate_len, VMSTATE_CAPACITY),
            ("working set length", self.working_set_len, WORKING_SET_CAPACITY),
        ];
        for (field, value, limit) in limits {
            if u64::from(value) > limit {
                return Err(HeaderError::Field {
                    field,
                    value: value.into(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            valid: true,
            generation: 7,
            disk_generation: 3,
            mem_bytes: 512 << 20,
            n_vcpus: 2,
            vmstate_len: 10_000,
            vmstate_crc: 0xdead_beef,
            working_set_len: 88,
            base: None,
            host: HostSignature::new("x86_64", "AuthenticAMD", 23, 1, 2, b"features"),
        }
    }

    #[test]
    fn a_header_survives_the_disk() {
        for base in [None, Some(0), Some(0xfeed_f00d)] {
            let header = Header { base, ..header() };
            assert_eq!(Header::decode(&header.encode().unwrap()).unwrap(), header);
        }
    }

    #[test]
    fn parts_of_every_size_follow_each_other_without_overlap() {
        for mem_mib in [128u64, 512, 4096, 65_536] {
            let layout = ImageLayout::new(mem_mib << 20);
            assert_eq!(layout.checksums_offset(), 4096 + (2 << 20));
            assert!(layout.working_set_offset() >= layout.checksums_offset() + layout.n_pages() * 4);
            assert!(layout.data_offset() >= layout.working_set_offset() + WORKING_SET_CAPACITY);
            assert_eq!(layout.data_offset() % (2 << 20), 0);
            assert_eq!(layout.file_len(false), layout.data_offset() + (mem_mib << 20));
            assert_eq!(
                layout.file_len(true),
                layout.file_len(false) + layout.n_pages() / 8
            );
        }
    }

    proptest! {
        #[test]
        fn no_flipped_bit_goes_unnoticed(at in 0usize..HEADER_LEN, bit in 0u8..8) {
            let mut page = header().encode().unwrap();
            page[at] ^= 1 << bit;
            prop_assert!(Header::decode(&page).is_err());
        }

        #[test]
        fn hostile_fields_with_a_right_checksum_never_pass_their_bounds(
            at in 8usize..128, bytes in prop::collection::vec(any::<u8>(), 1..16)
        ) {
            let mut page = header().encode().unwrap();
            page[at..at + bytes.len()].copy_from_slice(&bytes);
            let sum = crc32c::crc32c(&page[..CRC_OFFSET]);
            page[CRC_OFFSET..].copy_from_slice(&sum.to_le_bytes());
            if let Ok(header) = Header::decode(&page) {
                prop_assert!(u64::from(header.vmstate_len) <= VMSTATE_CAPACITY);
                prop_assert!(u64::from(header.working_set_len) <= WORKING_SET_CAPACITY);
                prop_assert!(header.layout().is_ok());
            }
        }
    }
}
