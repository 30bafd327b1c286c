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
pub mod memory;
pub mod snapshots;
pub mod template;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use torpor_api::MachineId;

use manifest::{Manifest, ManifestError};

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
