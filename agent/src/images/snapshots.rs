//! Snapshots on disk, and the files of machines that are made from them.
//!
//! ```text
//! snapshots/<snap_…>/            memory.img memory.base disk.qcow2 disk.gen manifest.json   as in the machine's directory
//! snapshots/.staging/<snap_…>/   one that is being taken; removed at start
//! ```
//! The memory image of a snapshot is the machine's own, by a second link: nothing is copied. An image with more than
//! one link is never rewritten: the next persist makes a new file ([`MachineFiles::open_image_for_persist`]) that lies over
//! it, so links are the reference counts, kept by the file system, and a crash can't get them wrong. A deleted snapshot's
//! image lives for as long as a machine still wakes from it. However long the line of snapshots and forks, a machine
//! reads its own image and the one that it lies over. The disk's overlay is copied while the machine stands still.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use torpor_api::SnapshotId;
use torpor_api::vmm::Shape;

use super::copy::copy_sparse;
use super::manifest::{self, MANIFEST, Manifest, ManifestError};
use super::{Images, ImagesError, MachineFiles, disk, failed, header, make_dir, memory, sync_dir};

/// What a snapshot's directory holds.
const FILES: [&str; 4] = [header::IMAGE, disk::OVERLAY, disk::GENERATION, MANIFEST];

/// Why a snapshot could not be taken or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file system refused.
    #[error(transparent)]
    Files(#[from] ImagesError),
    /// The manifest is no manifest.
    #[error("cannot use the manifest of {id}")]
    Manifest {
        /// Whose.
        id: String,
        /// Why not.
        #[source]
        source: ManifestError,
    },
    /// There is no image, or the parts are not of one instant.
    #[error("{id} has no usable image: {what}")]
    Unusable {
        /// Of what.
        id: String,
        /// What is wrong.
        what: String,
    },
    /// No such snapshot.
    #[error("there is no snapshot {id} on disk")]
    Missing {
        /// Which.
        id: SnapshotId,
    },
    /// The machine is of another shape or template.
    #[error("snapshot {id} is of another shape or template")]
    Incompatible {
        /// Which.
        id: SnapshotId,
    },
}

/// What a machine that is made from a snapshot must be.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Its shape.
    pub shape: Shape,
    /// Its template's digest.
    pub template_digest: &'a str,
}

impl Images {
    fn staged(&self, id: &SnapshotId) -> PathBuf {
        self.staging.join(id.as_str())
    }

    fn committed(&self, id: &SnapshotId) -> PathBuf {
        self.snapshots.join(id.as_str())
    }

    /// Put the files of a snapshot in place. The machine's files must not change meanwhile. Not yet durable.
    ///
    /// # Errors
    /// The machine has no image of this generation that fits its disk, or the file system refuses.
    pub fn stage_snapshot(
        &self,
        machine: &MachineFiles,
        generation: u64,
        id: &SnapshotId,
    ) -> Result<(), SnapshotError> {
        check_image(machine, generation)?;
        let dir = self.staged(id);
        // Of a try before.
        remove_all(&dir)?;
        make_dir(&dir)?;
        link_image(&machine.dir, &dir)?;
        for name in [disk::OVERLAY, disk::GENERATION, MANIFEST] {
            let to = dir.join(name);
            copy_sparse(&machine.path(name), &to).map_err(failed("copy to", &to))?;
        }
        Ok(())
    }

    /// Make a staged snapshot durable and put it where snapshots are; answers the room that it takes in bytes, without the
    /// image that its own lies over, which others have, too.
    ///
    /// # Errors
    /// It is not staged, or the file system refuses.
    pub fn commit_snapshot(&self, id: &SnapshotId) -> Result<u64, SnapshotError> {
        let (from, to) = (self.staged(id), self.committed(id));
        let mut n_bytes = 0;
        for name in FILES {
            let path = from.join(name);
            n_bytes += sync_file(&path).map_err(failed("make durable", &path))?;
        }
        sync_dir(&from)?;
        fs::rename(&from, &to).map_err(failed("rename to", &to))?;
        sync_dir(&self.snapshots)?;
        Ok(n_bytes)
    }

    /// Remove a snapshot, staged or committed; a crash in between leaves it whole or in the trash.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn delete_snapshot(&self, id: &SnapshotId) -> Result<(), ImagesError> {
        remove_all(&self.staged(id))?;
        let (dir, doomed) = (self.committed(id), self.trash.join(id.as_str()));
        match fs::rename(&dir, &doomed) {
            Ok(()) => sync_dir(&self.snapshots)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("move to trash", &dir)(error)),
        }
        remove_all(&doomed)
    }

    /// Every committed snapshot.
    ///
    /// # Errors
    /// The directory can't be listed.
    pub fn committed_snapshots(&self) -> Result<Vec<SnapshotId>, ImagesError> {
        let entries = fs::read_dir(&self.snapshots).map_err(failed("list", &self.snapshots))?;
        let mut ids = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed("list", &self.snapshots))?.file_name();
            // What has another name is not ours to touch.
            ids.extend(name.to_str().and_then(|name| name.parse().ok()));
        }
        Ok(ids)
    }

    /// Make the files of a machine that goes on where the snapshot was taken; answers its image's generation. The
    /// manifest comes last, when all else is durable.
    ///
    /// # Errors
    /// There is no such snapshot, the machine is of another shape, or the file system refuses.
    pub fn clone_snapshot(
        &self,
        id: &SnapshotId,
        machine: &MachineFiles,
        wanted: Wanted<'_>,
    ) -> Result<u64, SnapshotError> {
        let dir = self.committed(id);
        let manifest = manifest::read(&dir).map_err(|source| SnapshotError::Manifest {
            id: id.to_string(),
            source,
        })?;
        let manifest = manifest.ok_or_else(|| SnapshotError::Missing { id: id.clone() })?;
        if (manifest.shape, manifest.template_digest.as_str()) != (wanted.shape, wanted.template_digest) {
            return Err(SnapshotError::Incompatible { id: id.clone() });
        }
        machine.create_dir()?;
        for name in [disk::OVERLAY, disk::GENERATION] {
            let to = machine.path(name);
            copy_sparse(&dir.join(name), &to)
                .and_then(|file| file.sync_all())
                .map_err(failed("copy to", &to))?;
        }
        link_image(&dir, &machine.dir)?;
        let generation = manifest.generation;
        machine.write_manifest(&Manifest {
            machine_id: machine.id.clone(),
            fork: true,
            ..manifest
        })?;
        Ok(generation)
    }
}

/// The image must be the one that the manifest names, and the disk of the same instant.
fn check_image(machine: &MachineFiles, generation: u64) -> Result<(), SnapshotError> {
    use crate::machine::hypervisor::ImageState;
    let unusable = |what: String| SnapshotError::Unusable {
        id: machine.id.to_string(),
        what,
    };
    match machine.inspect() {
        ImageState::Valid { generation: found } if found == generation => Ok(()),
        ImageState::Valid { generation: found } | ImageState::Stale { generation: found } => Err(unusable(
            format!("it is of generation {found}, or older than the disk"),
        )),
        ImageState::None => Err(unusable("there is none".to_owned())),
        ImageState::Corrupt { message } => Err(unusable(message)),
    }
}

/// An image, and the one that it lies over, in another directory, too.
fn link_image(from: &Path, to: &Path) -> Result<(), SnapshotError> {
    let image = from.join(header::IMAGE);
    let header = header::read(&image).map_err(|error| SnapshotError::Unusable {
        id: from.display().to_string(),
        what: crate::execution::chain(&error),
    })?;
    if header.base.is_some() {
        link_or_copy(&from.join(memory::BASE), &to.join(memory::BASE))?;
    }
    Ok(link_or_copy(&image, &to.join(header::IMAGE))?)
}

/// A second link; a copy where the file system has no more links to give.
fn link_or_copy(from: &Path, to: &Path) -> Result<(), ImagesError> {
    match fs::hard_link(from, to) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EMLINK | libc::EXDEV | libc::EPERM)
            ) =>
        {
            copy_sparse(from, to)
                .and_then(|file| file.sync_all())
                .map_err(failed("copy to", to))
        }
        linked => linked.map_err(failed("link to", to)),
    }
}

fn sync_file(path: &Path) -> io::Result<u64> {
    let file = fs::File::open(path)?;
    file.sync_all()?;
    Ok(file.metadata()?.blocks().saturating_mul(512))
}

fn remove_all(dir: &Path) -> Result<(), ImagesError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", dir)(error)),
        _ => Ok(()),
    }
}
