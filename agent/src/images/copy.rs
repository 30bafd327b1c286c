//! Copies of sparse files: by sharing extents where the file system can, otherwise of the data only.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

/// Copied at a time where the kernel can't do it by itself.
const CHUNK: usize = 1 << 20;

/// Make `to`, which must not exist, a copy of `from`; not yet durable.
///
/// # Errors
/// The file system refuses.
pub(super) fn copy_sparse(from: &Path, to: &Path) -> io::Result<File> {
    let source = File::open(from)?;
    let mut options = OpenOptions::new();
    let target = options
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?;
    // Not every file system shares extents, and those that do not say so in more than one way.
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(target);
    }
    copy_data(&source, &target)?;
    Ok(target)
}

fn copy_data(source: &File, target: &File) -> io::Result<()> {
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut at = 0;
    while at < len {
        let data = match seek(source, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(source, SeekFrom::Hole(data))?.min(len);
        copy_range(source, target, data, end)?;
        at = end;
    }
    Ok(())
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let left = usize::try_from(end - from).unwrap_or(usize::MAX);
        match copy_file_range(source, Some(&mut from), target, Some(&mut to), left) {
            // The file was cut short under our hands.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                return copy_by_hand(source, target, from, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut at = start;
    while at < end {
        let n = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
        source.read_exact_at(&mut buffer[..n], at)?;
        target.write_all_at(&buffer[..n], at)?;
        at += n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    /// Data at both ends and in the middle, holes between.
    fn sparse(path: &Path) -> Vec<u8> {
        let file = File::create(path).unwrap();
        file.set_len(8 << 20).unwrap();
        for (at, byte) in [(0, 1), (3 << 20, 2), ((8 << 20) - 5, 3)] {
            file.write_all_at(&[byte; 5], at).unwrap();
        }
        std::fs::read(path).unwrap()
    }

    #[test]
    fn a_copy_is_equal_and_as_sparse_by_every_way() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        let content = sparse(&from);
        let blocks = std::fs::metadata(&from).unwrap().blocks();
        let (whole, data) = (dir.path().join("whole"), dir.path().join("data"));
        copy_sparse(&from, &whole).unwrap();
        let target = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&data)
            .unwrap();
        copy_data(&File::open(&from).unwrap(), &target).unwrap();
        for copy in [&whole, &data] {
            assert_eq!(std::fs::read(copy).unwrap(), content);
            assert!(std::fs::metadata(copy).unwrap().blocks() <= blocks * 2 + 64);
        }
        let by_hand = File::create(dir.path().join("hand")).unwrap();
        copy_by_hand(&File::open(&from).unwrap(), &by_hand, 0, content.len() as u64).unwrap();
        assert_eq!(std::fs::read(dir.path().join("hand")).unwrap(), content);
    }

    #[test]
    fn nothing_is_copied_over_a_file_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), b"a").unwrap();
        std::fs::write(dir.path().join("b"), b"b").unwrap();
        assert!(copy_sparse(&dir.path().join("a"), &dir.path().join("b")).is_err());
        assert_eq!(std::fs::read(dir.path().join("b")).unwrap(), b"b");
    }
}
