//! A machine's overlay and the generation of its disk.
//!
//! `disk.gen` holds the generation as a little-endian `u64`, its CRC32C and four zero bytes. The VMM raises it,
//! durably, before the guest's first write of a run; torpord makes it with the disk and only reads it after.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use imago::format::PreallocateMode;
use imago::format::drivers::FormatDriverInstance as _;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder as _, FormatDriverBuilder as _};

use super::template::Template;
use super::{ImagesError, MachineFiles, failed, manifest, sync_dir};

/// Name of the overlay in a machine's directory.
pub const OVERLAY: &str = "disk.qcow2";
/// Name of the file with the disk's generation.
pub const GENERATION: &str = "disk.gen";
/// Length of that file in bytes.
const GENERATION_LEN: usize = 16;
/// Generation of a disk that nobody has written to.
const FIRST_GENERATION: u64 = 1;
/// Size of a qcow2 cluster in bytes.
const CLUSTER_SIZE: usize = 64 << 10;

/// Why a disk's generation is not known.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The operating system refused.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Checksum or length is wrong.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

impl MachineFiles {
    /// Make overlay and generation unless they are there. A crash in between leaves no overlay, or all of it. An
    /// overlay that is smaller than it has to be grows, so only a boot may call this: no memory knows its old size.
    ///
    /// # Errors
    /// The file system refuses, or the disk is smaller than the template's.
    pub fn ensure_disk(&self, template: &Template, disk_mib: u32) -> Result<(), ImagesError> {
        let overlay = self.path(OVERLAY);
        if overlay.exists() {
            return grow_overlay(&overlay, u64::from(disk_mib) << 20).map_err(failed("grow", &overlay));
        }
        if disk_mib < template.info.disk_mib {
            return Err(ImagesError::DiskTooSmall {
                disk_mib: disk_mib.into(),
                template_mib: template.info.disk_mib.into(),
            });
        }
        self.create_dir()?;
        // The generation goes first: an overlay that is in place always has one.
        let generation = self.path(GENERATION);
        manifest::replace(&generation, &encode_generation(FIRST_GENERATION))
            .map_err(failed("write", &generation))?;
        let temporary = self.path("disk.tmp");
        create_overlay(&temporary, &template.rootfs, u64::from(disk_mib) << 20)
            .map_err(failed("make overlay", &temporary))?;
        fs::rename(&temporary, &overlay).map_err(failed("rename to", &overlay))?;
        sync_dir(&self.dir)
    }
}

fn create_overlay(path: &Path, rootfs: &Path, size: u64) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600);
    let file = options.open(path)?;
    let storage = imago::file::File::try_from(file.try_clone()?)?;
    // The VMM gets the root disk as a descriptor; the name in the header is for people with qemu-img.
    let backing = rootfs.to_str().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    Qcow2::<imago::file::File>::create_builder(storage)
        .size(size)
        .cluster_size(CLUSTER_SIZE)
        .backing(backing, "raw".to_owned())
        .create()?;
    (&file).flush()?;
    file.sync_all()
}

/// The size is the header's last change, so a crash leaves the old disk or the new one. Disks never shrink.
fn grow_overlay(path: &Path, size: u64) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let image = Qcow2::<imago::file::File>::builder(imago::file::File::try_from(file.try_clone()?)?)
        .write(true)
        .backing(None)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())?;
    if image.size() >= size {
        return Ok(());
    }
    let image = FormatAccess::new(image);
    image.resize_grow(size, PreallocateMode::None)?;
    image.flush()?;
    file.sync_all()
}

/// The disk's generation.
///
/// # Errors
/// See [`GenerationError`].
pub fn read_generation(path: &Path) -> Result<u64, GenerationError> {
    let mut content = Vec::new();
    File::open(path)
        .and_then(|file| file.take(GENERATION_LEN as u64 + 1).read_to_end(&mut content))
        .map_err(|source| GenerationError::Io {
            path: path.to_owned(),
            source,
        })?;
    let damaged = || GenerationError::Damaged {
        path: path.to_owned(),
    };
    let bytes: [u8; 8] = content
        .get(..8)
        .and_then(|b| b.try_into().ok())
        .ok_or_else(damaged)?;
    let generation = u64::from_le_bytes(bytes);
    if content == encode_generation(generation) {
        Ok(generation)
    } else {
        Err(damaged())
    }
}

fn encode_generation(generation: u64) -> [u8; GENERATION_LEN] {
    let mut content = [0; GENERATION_LEN];
    content[..8].copy_from_slice(&generation.to_le_bytes());
    let checksum = crc32c::crc32c(&content[..8]);
    content[8..12].copy_from_slice(&checksum.to_le_bytes());
    content
}
