//! What a hibernation image asks of the disk: room, reserving, punching holes, durability.

use crate::Finding;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, statfs,
};
use nix::sys::statvfs::statvfs;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const CHECK: &str = "disk";
const FILE_BYTES: i64 = 4 << 20;
const HOLE_BYTES: i64 = 2 << 20;
const LEAST_FREE_MIB: u64 = 2048;

pub(crate) fn check(state_dir: &Path) -> Vec<Finding> {
    // Before the installation only a parent is there; it is the same disk unless one is mounted later.
    let there = state_dir
        .ancestors()
        .find(|path| path.is_dir())
        .unwrap_or(Path::new("/"));
    vec![operations(there), room(there)]
}

fn operations(directory: &Path) -> Finding {
    let at = directory.display();
    match try_operations(directory) {
        Ok(()) => Finding::ok(
            CHECK,
            format!(
                "{at} reserves space, punches holes and syncs ({})",
                kind(directory)
            ),
        ),
        Err((operation, error)) => Finding::no(
            CHECK,
            format!("{operation} failed in {at} ({}): {error}", kind(directory)),
            "Put the state directory on ext4 or XFS, and let root write to it.",
        ),
    }
}

fn try_operations(directory: &Path) -> Result<(), (&'static str, io::Error)> {
    let mut file = tempfile::tempfile_in(directory).map_err(|error| ("creating a file", error))?;
    fallocate(&file, FallocateFlags::empty(), 0, FILE_BYTES).map_err(|errno| ("fallocate", errno.into()))?;
    let bytes = usize::try_from(FILE_BYTES).unwrap_or(0);
    file.write_all(&vec![0xA5; bytes])
        .map_err(|error| ("writing", error))?;
    file.sync_data().map_err(|error| ("fdatasync", error))?;
    let before = blocks(&file)?;
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 0, HOLE_BYTES).map_err(|errno| ("punching a hole", errno.into()))?;
    file.sync_data().map_err(|error| ("fdatasync", error))?;
    if blocks(&file)? < before {
        return Ok(());
    }
    Err((
        "punching a hole",
        io::Error::other("the file is as large as before"),
    ))
}

fn blocks(file: &File) -> Result<u64, (&'static str, io::Error)> {
    file.metadata()
        .map(|metadata| metadata.blocks())
        .map_err(|error| ("looking at a file", error))
}

fn kind(directory: &Path) -> String {
    match statfs(directory).map(|found| found.filesystem_type()) {
        Ok(EXT4_SUPER_MAGIC) => "ext4".to_owned(),
        Ok(XFS_SUPER_MAGIC) => "XFS".to_owned(),
        Ok(BTRFS_SUPER_MAGIC) => "Btrfs".to_owned(),
        Ok(TMPFS_MAGIC) => "tmpfs: gone after a reboot".to_owned(),
        Ok(OVERLAYFS_SUPER_MAGIC) => "overlayfs".to_owned(),
        Ok(other) => format!("file system {:#x}", other.0),
        Err(errno) => format!("unknown file system: {errno}"),
    }
}

fn room(directory: &Path) -> Finding {
    let at = directory.display();
    let free_mib = match statvfs(directory) {
        Ok(found) => found.blocks_available().saturating_mul(found.fragment_size()) >> 20,
        Err(errno) => {
            return Finding::no(
                CHECK,
                format!("cannot see the free space of {at}: {errno}"),
                "Check the disk.",
            );
        }
    };
    if free_mib >= LEAST_FREE_MIB {
        return Finding::ok(CHECK, format!("{free_mib} MiB free in {at}"));
    }
    Finding::no(
        CHECK,
        format!("only {free_mib} MiB free in {at}; a pause would find no room"),
        format!("Free at least {LEAST_FREE_MIB} MiB, or move the state directory."),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_directory_passes_and_a_missing_one_is_tried_in_its_parent() {
        let directory = tempfile::tempdir().unwrap();
        assert!(try_operations(directory.path()).is_ok());
        let findings = check(&directory.path().join("not/yet"));
        let shown = directory.path().display().to_string();
        assert!(
            findings.iter().all(|finding| finding.meaning.contains(&shown)),
            "{findings:?}"
        );
    }

    #[test]
    fn a_directory_that_takes_no_files_is_a_no_with_advice() {
        let finding = operations(Path::new("/proc"));
        assert_eq!(finding.verdict, crate::Verdict::No);
        assert!(finding.what_to_do.is_some());
    }
}
