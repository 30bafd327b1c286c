//! Room for an image, reserved before the old image is given up.
//!
//! A refused reservation leaves the file as it was: what were holes before become holes again. Otherwise a machine
//! that finds the disk full would fill it for the others, too.

use super::{PersistError, failed, fallocate_range};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::unistd::{Whence, lseek64};
use std::fs::File;
use std::io;
use std::ops::Range;

/// Room reserved so far.
#[derive(Debug)]
pub(super) struct Room<'a> {
    file: &'a File,
    /// Parts that held nothing before.
    holes: Vec<Range<u64>>,
}

impl<'a> Room<'a> {
    /// None yet.
    pub(super) fn in_file(file: &'a File) -> Self {
        Self {
            file,
            holes: Vec::new(),
        }
    }

    /// Reserve some, inside the file's length.
    pub(super) fn reserve(&mut self, bytes: Range<u64>) -> Result<(), PersistError> {
        // Before: a reservation that fails may have got a part of it.
        let held_nothing = holes(self.file, &bytes).map_err(failed("find holes of the image"))?;
        self.holes.extend(held_nothing);
        match fallocate_range(self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, &bytes) {
            // A file system without preallocation: the write will tell.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            result => result.map_err(failed("reserve room for the image")),
        }
    }

    /// Give all of it back; only while nothing was written to it.
    pub(super) fn give_back(self) {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for hole in &self.holes {
            if let Err(error) = fallocate_range(self.file, flags, hole) {
                tracing::warn!(%error, "cannot give back room that was reserved for an image");
                return;
            }
        }
    }
}

/// The parts of a range that hold nothing. Where the file system can't tell, it says that all is data.
fn holes(file: &File, bytes: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut holes = Vec::new();
    let mut from = bytes.start;
    while from < bytes.end {
        let data = seek(file, from, Whence::SeekData)?
            .unwrap_or(bytes.end)
            .min(bytes.end);
        if from < data {
            holes.push(from..data);
        }
        if data == bytes.end {
            break;
        }
        from = seek(file, data, Whence::SeekHole)?.unwrap_or(bytes.end);
    }
    Ok(holes)
}

/// Where the next data or hole begins, if there is one before the end of the file.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    match lseek64(file, from, whence) {
        Ok(at) => Ok(u64::try_from(at).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    const MIB: u64 = 1 << 20;

    #[test]
    fn room_that_is_given_back_leaves_data_and_size_as_they_were() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * MIB).unwrap();
        let contents = vec![0x5a; 65536];
        for offset in [MIB, 3 * MIB, 3 * MIB + 131_072] {
            file.write_all_at(&contents, offset).unwrap();
        }
        file.sync_all().unwrap();
        let blocks = file.metadata().unwrap().blocks();
        let mut room = Room::in_file(&file);
        room.reserve(0..2 * MIB).unwrap();
        room.reserve(3 * MIB + 4096..6 * MIB).unwrap();
        let reserved = file.metadata().unwrap().blocks();
        assert!(reserved > blocks + 8000, "{blocks} blocks became {reserved}");
        room.give_back();
        // A little may be left in the file system's own tree.
        let left = file.metadata().unwrap().blocks();
        assert!(left < blocks + 64, "{blocks} blocks became {left}");
        assert_eq!(file.metadata().unwrap().len(), 8 * MIB);
        let mut found = vec![0; 65536];
        for offset in [MIB, 3 * MIB, 3 * MIB + 131_072] {
            file.read_exact_at(&mut found, offset).unwrap();
            assert!(found == contents, "data at {offset} changed");
        }
    }

    #[test]
    fn holes_are_what_lies_between_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * MIB).unwrap();
        file.write_all_at(&[1; 4096], MIB).unwrap();
        assert_eq!(holes(&file, &(MIB..MIB + 4096)).unwrap(), []);
        assert_eq!(
            holes(&file, &(0..4 * MIB)).unwrap(),
            [0..MIB, MIB + 4096..4 * MIB]
        );
    }
}
