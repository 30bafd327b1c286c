//! The hibernation image of a machine, and the images that it or its VMM needs beside it.
//!
//! ```text
//! memory.img      the image; in place of one that somebody else has, too, a new file is put by rename
//! memory.next     that new file, while it is written
//! memory.base     the image that memory.img lies over, if it does: a template's, a snapshot's
//! memory.source   the image that the live VMM was restored from, once memory.img is another one
//! ```
//! An image with more than one link is never rewritten, and a base or source that somebody rewrites would be another one. So
//! these names are also what keeps anybody else from becoming the only owner of it.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use torpor_api::vmm::FdRole;

use super::header;
use super::manifest::{self, Manifest};
use super::{ImagesError, MachineFiles, disk, failed, open_read_write, sync_dir};
use crate::machine::hypervisor::ImageState;

/// The image that a machine's or a snapshot's image lies over.
pub(super) const BASE: &str = "memory.base";
const NEXT: &str = "memory.next";
const SOURCE: &str = "memory.source";

/// An image, open, with the one that it lies over or is to lie over.
#[derive(Debug)]
pub struct OpenImage {
    image: OwnedFd,
    base: Option<OwnedFd>,
}

impl OpenImage {
    /// As they travel to the VMM.
    pub fn fds(&self) -> impl Iterator<Item = (FdRole, &OwnedFd)> {
        let base = self.base.iter().map(|base| (FdRole::ImageBase, base));
        std::iter::once((FdRole::Image, &self.image)).chain(base)
    }
}

impl MachineFiles {
    /// Path of the memory image.
    #[must_use]
    pub fn image_path(&self) -> PathBuf {
        self.path(header::IMAGE)
    }

    /// The memory image, to be read in a restore.
    ///
    /// # Errors
    /// It is not there, or can't be opened.
    pub fn open_image(&self) -> Result<OpenImage, ImagesError> {
        let base = self.lies_over().then(|| open(&self.path(BASE))).transpose()?;
        let image = open(&self.image_path())?;
        Ok(OpenImage { image, base })
    }

    /// The file for a persist: the memory image, made if missing; a new file if the image is a snapshot's or another
    /// machine's, too, over that image or over what that lies over. A new file without a base replaces an image whose base
    /// nobody else has any more: two files would only take more room. [`MachineFiles::promote_image`] follows the persist.
    ///
    /// # Errors
    /// It can't be opened or made.
    pub fn open_image_for_persist(&self) -> Result<OpenImage, ImagesError> {
        let (path, next) = (self.image_path(), self.path(NEXT));
        let n_owners = n_links(&path);
        let lies_over = self.lies_over();
        let is_base_shared = !lies_over || n_links(&self.path(BASE)) > 1;
        if n_owners > 1 || (n_owners == 1 && !is_base_shared) {
            let base = if lies_over { self.path(BASE) } else { path };
            return Ok(OpenImage {
                image: open_read_write(&next, true)?,
                base: is_base_shared.then(|| open(&base)).transpose()?,
            });
        }
        remove_if_any(&next)?;
        let image = open_read_write(&path, true)?;
        if n_owners == 0 {
            sync_dir(&self.dir)?;
        }
        Ok(OpenImage { image, base: None })
    }

    /// Put the new image of this generation in place, if it was written to a file of its own.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn promote_image(&self, generation: u64) -> Result<(), ImagesError> {
        let (next, path) = (self.path(NEXT), self.image_path());
        let new = match header::read(&next) {
            Ok(header) if header.valid && header.generation == generation => header,
            // There is none, or it is the remainder of a persist that was cut short.
            Ok(_) | Err(_) => return Ok(()),
        };
        let source = self.path(SOURCE);
        match fs::hard_link(&path, &source) {
            // The first one is what the VMM was restored from; later ones it has no use for.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            linked => linked.map_err(failed("link to", &source))?,
        }
        if new.base.is_some() && !self.lies_over() {
            let base = self.path(BASE);
            // Of an image that lay over another one and was given up since.
            remove_if_any(&base)?;
            fs::hard_link(&path, &base).map_err(failed("link to", &base))?;
        }
        fs::rename(&next, &path).map_err(failed("rename to", &path))?;
        sync_dir(&self.dir)
    }

    /// The VMM that read from the images before is gone. Called while nobody else has the machine's files.
    pub fn drop_spent_images(&self) {
        let spent_base = match header::read(&self.image_path()) {
            Ok(header) => header.base.is_none(),
            // What can't be read may still be what lies over it.
            Err(_) => false,
        };
        for name in [SOURCE].into_iter().chain(spent_base.then_some(BASE)) {
            if let Err(error) = remove_if_any(&self.path(name)) {
                tracing::warn!(
                    error = crate::execution::chain(&error),
                    "image that nobody reads any more not removed"
                );
            }
        }
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

    /// Judge the image by manifest, headers and disk generation.
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
        if let Some(name) = header.base {
            match header::read(&self.path(BASE)) {
                Ok(base) if base.name == name => {}
                Ok(_) => return corrupt("memory image lies over another one, which was replaced"),
                Err(error) => return corrupt(crate::execution::chain(&error)),
            }
        }
        match disk::read_generation(&self.path(disk::GENERATION)) {
            Err(error) => corrupt(crate::execution::chain(&error)),
            Ok(on_disk) if on_disk == manifest.disk_generation => ImageState::Valid { generation },
            Ok(_) => ImageState::Stale { generation },
        }
    }

    /// Whether the image lies over another one, by its header; what is wrong with that is the VMM's to say.
    fn lies_over(&self) -> bool {
        header::read(&self.image_path()).is_ok_and(|header| header.base.is_some())
    }
}

fn open(path: &Path) -> Result<OwnedFd, ImagesError> {
    Ok(File::open(path).map_err(failed("open", path))?.into())
}

fn n_links(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.nlink())
}

fn remove_if_any(path: &Path) -> Result<(), ImagesError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn corrupt(message: impl Into<String>) -> ImageState {
    ImageState::Corrupt {
        message: message.into(),
    }
}
