//! What machines are made of on disk: templates, overlays, hibernation images and their manifests.
//!
//! Owns every path under `state_dir/machines` and `state_dir/snapshots` and the order of writes that makes a crash harmless: content,
//! `fsync`, rename, `fsync` of the directory. Everything here blocks; callers run it on a blocking thread. Names
//! reach the file system only as [`MachineId`] or [`torpor_api::MachineName`], which can't leave their directory.
//! What is read back is not trusted: lengths are bounded, unknown fields refused, checksums checked.
//!
//! Not its job: the content of overlay and memory image, which belongs to the VMM ([`header`] reads the image's
//! first page), and rows in the store.

mod copy;
pub mod disk;
pub mod header;
pub mod manifest;
pub mod snapshots;
pub mod template;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use torpor_api::MachineId;

use crate::machine::hypervisor::ImageState;
use manifest::{Manifest, ManifestError};

/// A second name of the image that the live VMM was restored from, once another one took its place: the VMM still
/// reads untouched pages from it, so nobody who shares it may become its only owner and rewrite it.
const BASE_IMAGE: &str = "memory.base";
/// A new image, until it takes the place of one that is not the machine's alone.
const NEXT_IMAGE: &str = "memory.next";

/// Why files of a machine could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// The operating system refused.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The overlay would be smaller than what it lies over.
    #[error("a disk of {disk_mib} MiB is smaller than the template's {template_mib} MiB")]
    DiskTooSmall {
        /// Asked for.
        disk_mib: u64,
        /// Needed.
        template_mib: u64,
    },
    /// The manifest is no manifest.
    #[error("cannot use the manifest of {machine}")]
    Manifest {
        /// Whose.
        machine: MachineId,
        /// Why not.
        #[source]
        source: ManifestError,
    },
}

impl ImagesError {
    /// Whether room on the disk is what was missing.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImagesError {
    let path = path.to_owned();
    move |source| ImagesError::Io {
        operation,
        path,
        source,
    }
}

/// All machines' files.
#[derive(Debug, Clone)]
pub struct Images {
    machines: PathBuf,
    snapshots: PathBuf,
    staging: PathBuf,
    trash: PathBuf,
}

impl Images {
    /// Files under `state_dir`; directories are made, and what an interrupted delete or snapshot left is removed.
    ///
    /// # Errors
    /// The directories can't be made.
    pub fn open(state_dir: &Path) -> Result<Self, ImagesError> {
        let images = Self {
            machines: state_dir.join("machines"),
            snapshots: state_dir.join("snapshots"),
            staging: state_dir.join("snapshots/.staging"),
            trash: state_dir.join("machines/.trash"),
        };
        for rest in [&images.trash, &images.staging] {
            make_dir(rest)?;
            for entry in fs::read_dir(rest).map_err(failed("list", rest))? {
                let path = entry.map_err(failed("list", rest))?.path();
                fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
            }
        }
        Ok(images)
    }

    /// The files of one machine, whether they exist or not.
    #[must_use]
    pub fn machine(&self, id: &MachineId) -> MachineFiles {
        MachineFiles {
            id: id.clone(),
            dir: self.machines.join(id.as_str()),
        }
    }

    /// Remove everything of a machine. A crash in between leaves either the whole machine or a remainder in the
    /// trash that the next start removes, never half a machine under its own name.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn delete(&self, id: &MachineId) -> Result<(), ImagesError> {
        let dir = self.machines.join(id.as_str());
        let doomed = self.trash.join(id.as_str());
        match fs::rename(&dir, &doomed) {
            Ok(()) => sync_dir(&self.machines)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("move to trash", &dir)(error)),
        }
        match fs::remove_dir_all(&doomed) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &doomed)(error)),
            _ => Ok(()),
        }
    }

    /// Bytes that can still be written to the state directory.
    ///
    /// # Errors
    /// The file system does not tell.
    pub fn free_bytes(&self) -> Result<u64, ImagesError> {
        let stat = nix::sys::statvfs::statvfs(&self.machines)
            .map_err(|errno| failed("stat the file system of", &self.machines)(errno.into()))?;
        Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
    }
}

/// The directory of one machine.
#[derive(Debug, Clone)]
pub struct MachineFiles {
    id: MachineId,
    dir: PathBuf,
}

impl MachineFiles {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Make the directory.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn create_dir(&self) -> Result<(), ImagesError> {
        make_dir(&self.dir)?;
        self.dir.parent().map_or(Ok(()), sync_dir)
    }

    /// The overlay, to be read and written.
    ///
    /// # Errors
    /// It is not there, or can't be opened.
    pub fn open_overlay(&self) -> Result<OwnedFd, ImagesError> {
        open_read_write(&self.path(disk::OVERLAY), false)
    }

    /// The disk's generation, to be read and raised.
    ///
    /// # Errors
    /// It is not there, or can't be opened.
    pub fn open_disk_generation(&self) -> Result<OwnedFd, ImagesError> {
        open_read_write(&self.path(disk::GENERATION), false)
    }

    /// The console log, made if missing.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn open_console(&self) -> Result<OwnedFd, ImagesError> {
        let path = self.path("console.log");
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(0o600).open(&path);
        Ok(file.map_err(failed("open", &path))?.into())
    }

    /// Path of the memory image.
    #[must_use]
    pub fn image_path(&self) -> PathBuf {
        self.path(header::IMAGE)
    }

    /// The memory image, to be read in a restore.
    ///
    /// # Errors
    /// It is not there, or can't be opened.
    pub fn open_image(&self) -> Result<OwnedFd, ImagesError> {
        let path = self.image_path();
        Ok(File::open(&path).map_err(failed("open", &path))?.into())
    }

    /// The file for a persist: the memory image, made if missing; a new file if the image is a snapshot's or another
    /// machine's, too. [`MachineFiles::promote_image`] follows the persist.
    ///
    /// # Errors
    /// It can't be opened or made.
    pub fn open_image_for_persist(&self) -> Result<OwnedFd, ImagesError> {
        let path = self.image_path();
        let n_links = fs::metadata(&path).map_or(0, |metadata| metadata.nlink());
        let next = self.path(NEXT_IMAGE);
        if n_links > 1 {
            return open_read_write(&next, true);
        }
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &next)(error));
            }
            _ => {}
        }
        let fd = open_read_write(&path, true)?;
        if n_links == 0 {
            sync_dir(&self.dir)?;
        }
        Ok(fd)
    }

    /// Put the new image of this generation in place, if it was written to a file of its own.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn promote_image(&self, generation: u64) -> Result<(), ImagesError> {
        let (next, path) = (self.path(NEXT_IMAGE), self.image_path());
        match header::read(&next) {
            Ok(header) if header.valid && header.generation == generation => {}
            // There is none, or it is the remainder of a persist that was cut short.
            Ok(_) | Err(_) => return Ok(()),
        }
        let base = self.path(BASE_IMAGE);
        match fs::hard_link(&path, &base) {
            // The first one is what the VMM was restored from; later ones it has no use for.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            linked => linked.map_err(failed("link to", &base))?,
        }
        fs::rename(&next, &path).map_err(failed("rename to", &path))?;
        sync_dir(&self.dir)
    }

    /// The VMM that read from the image before is gone. Called while nobody else has the machine's files.
    pub fn drop_base_image(&self) {
        let base = self.path(BASE_IMAGE);
        if let Err(error) = fs::remove_file(&base)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %base.display(), %error, "image that nobody reads any more not removed");
        }
    }

    /// The last `max_bytes` of the console log; empty if there is none.
    ///
    /// # Errors
    /// It can't be read.
    pub fn console_tail(&self, max_bytes: u64) -> Result<Vec<u8>, ImagesError> {
        let path = self.path("console.log");
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed("open", &path))?,
        };
        let read = || -> io::Result<Vec<u8>> {
            let len = file.metadata()?.len();
            file.seek(SeekFrom::Start(len.saturating_sub(max_bytes)))?;
            let mut tail = Vec::new();
            file.take(max_bytes).read_to_end(&mut tail)?;
            Ok(tail)
        };
        read().map_err(failed("read", &path))
    }

    /// What the manifest says, if there is one.
    ///
    /// # Errors
    /// It can't be read, or is none.
    pub fn manifest(&self) -> Result<Option<Manifest>, ImagesError> {
        manifest::read(&self.dir).map_err(|source| ImagesError::Manifest {
            machine: self.id.clone(),
            source,
        })
    }

    /// Put a manifest in place, durably.
    ///
    /// # Errors
    /// The file system refuses; the old manifest is then in place, if there was one.
    pub fn write_manifest(&self, manifest: &Manifest) -> Result<(), ImagesError> {
        manifest::write(&self.dir, manifest).map_err(|source| ImagesError::Manifest {
            machine: self.id.clone(),
            source,
        })
    }

    /// Give up the hibernation image: once this returns, no crash brings it back.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn discard_image(&self) -> Result<(), ImagesError> {
        let path = self.path(manifest::MANIFEST);
        match fs::remove_file(&path) {
            Ok(()) => sync_dir(&self.dir),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("remove", &path)(error)),
        }
    }

    /// Judge the image by manifest, header and disk generation.
    #[must_use]
    pub fn inspect(&self) -> ImageState {
        match self.manifest() {
            Ok(None) => ImageState::None,
            Ok(Some(manifest)) => self.inspect_against(&manifest),
            Err(error) => corrupt(crate::execution::chain(&error)),
        }
    }

    fn inspect_against(&self, manifest: &Manifest) -> ImageState {
        let generation = manifest.generation;
        if manifest.machine_id != self.id {
            return corrupt(format!("manifest names machine {}", manifest.machine_id));
        }
        let header = match header::read(&self.image_path()) {
            Ok(header) => header,
            Err(error) => return corrupt(crate::execution::chain(&error)),
        };
        if !header.valid {
            return corrupt("memory image was cut short while it was rewritten");
        }
        if (header.generation, header.disk_generation) != (generation, manifest.disk_generation) {
            return corrupt(format!(
                "memory image is of generation {} and disk generation {}, manifest names {generation} and {}",
                header.generation, header.disk_generation, manifest.disk_generation
            ));
        }
        match disk::read_generation(&self.path(disk::GENERATION)) {
            Err(error) => corrupt(crate::execution::chain(&error)),
            Ok(on_disk) if on_disk == manifest.disk_generation => ImageState::Valid { generation },
            Ok(_) => ImageState::Stale { generation },
        }
    }
}

fn corrupt(message: impl Into<String>) -> ImageState {
    ImageState::Corrupt {
        message: message.into(),
    }
}

fn open_read_write(path: &Path, create: bool) -> Result<OwnedFd, ImagesError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(create).mode(0o600);
    Ok(options.open(path).map_err(failed("open", path))?.into())
}

fn make_dir(path: &Path) -> Result<(), ImagesError> {
    let mut builder = DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed("make directory", path))
}

/// Make renames and removals in `dir` durable.
fn sync_dir(dir: &Path) -> Result<(), ImagesError> {
    File::open(dir)
        .and_then(|file| file.sync_all())
        .map_err(failed("sync directory", dir))
}

#[cfg(test)]
mod tests;
