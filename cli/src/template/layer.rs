//! One tarball applied to a tree: its entries, and, in an image's layer, what it takes away.
//!
//! A whiteout `.wh.NAME` removes NAME of the layers below, `.wh..wh..opq` all that they have in its directory. Device
//! nodes are left out: a guest's /dev is the kernel's.

use super::tree::Tree;
use super::{ImportError, bad, failed};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use tar::{Archive, Entry, EntryType};

/// Whether names that begin with `.wh.` take something away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whiteouts {
    Obeyed,
    /// It is not a layer, and they are names like others.
    Unknown,
}

/// Bytes of content that the disk has room for.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) size_mib: u32,
    pub(super) left_bytes: u64,
}

impl Room {
    pub(super) fn new(size_mib: u32) -> Self {
        Self {
            size_mib,
            left_bytes: u64::from(size_mib) << 20,
        }
    }

    fn take(&mut self, n_bytes: u64) -> Result<(), ImportError> {
        let left = self.left_bytes.checked_sub(n_bytes);
        self.left_bytes = left.ok_or(ImportError::TooLarge {
            size_mib: self.size_mib,
        })?;
        Ok(())
    }
}

/// Apply the tarball at `path`, compressed or not.
pub(super) fn apply(
    tree: &Tree,
    path: &Path,
    whiteouts: Whiteouts,
    room: &mut Room,
    read: impl Fn(u64),
) -> Result<(), ImportError> {
    let content = Counted(open(path)?, read);
    let mut archive = Archive::new(decompress(content, path)?);
    archive.set_preserve_ownerships(true);
    archive.set_preserve_permissions(true);
    archive.set_unpack_xattrs(true);
    let mut layer = Layer {
        tree,
        whiteouts,
        own: BTreeSet::new(),
        directories: Vec::new(),
    };
    for entry in archive.entries().map_err(failed("read", path))? {
        let mut entry = entry.map_err(failed("read", path))?;
        room.take(entry.size())?;
        layer.entry(&mut entry, path)?;
    }
    layer.finish()
}

struct Layer<'a> {
    tree: &'a Tree,
    whiteouts: Whiteouts,
    /// What this layer brought, which its own whiteouts leave alone.
    own: BTreeSet<PathBuf>,
    /// Times of directories, which are set when nothing more is put into them.
    directories: Vec<(PathBuf, u64)>,
}

impl Layer<'_> {
    fn entry<R: Read>(&mut self, entry: &mut Entry<'_, R>, archive: &Path) -> Result<(), ImportError> {
        let name = entry.path().map_err(failed("read", archive))?.into_owned();
        let Some(place) = self.tree.place(&name)? else {
            return Ok(());
        };
        if self.whiteouts == Whiteouts::Obeyed && self.take_away(&place)? {
            return Ok(());
        }
        match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse | EntryType::Symlink => {
                Tree::clear(&place)?;
                entry.unpack(&place).map_err(failed("unpack", &place))?;
            }
            EntryType::Directory => self.directory(entry, &place)?,
            EntryType::Link => {
                let target = entry.link_name().map_err(failed("read", archive))?;
                let target = target.ok_or_else(|| bad(&name, "is a link to nothing"))?;
                let target = self
                    .tree
                    .place(&target)?
                    .ok_or_else(|| bad(&name, "is a link to /"))?;
                Tree::clear(&place)?;
                // Not followed: a link to a symbolic link is one, too.
                fs::hard_link(&target, &place).map_err(failed("link", &place))?;
            }
            // Devices, pipes and headers that hold no file.
            _ => return Ok(()),
        }
        self.own.insert(place);
        Ok(())
    }

    fn directory<R: Read>(&mut self, entry: &mut Entry<'_, R>, place: &Path) -> Result<(), ImportError> {
        let is_directory = fs::symlink_metadata(place).is_ok_and(|found| found.is_dir());
        if !is_directory {
            Tree::clear(place)?;
        }
        entry.unpack(place).map_err(failed("unpack", place))?;
        let mtime = entry.header().mtime().unwrap_or(0);
        self.directories.push((place.to_owned(), mtime));
        Ok(())
    }

    /// `true` if this was a whiteout.
    fn take_away(&self, place: &Path) -> Result<bool, ImportError> {
        let name = place.file_name().and_then(|name| name.to_str());
        let (Some(hidden), Some(directory)) =
            (name.and_then(|name| name.strip_prefix(".wh.")), place.parent())
        else {
            return Ok(false);
        };
        match hidden {
            ".wh..opq" => self.empty(directory)?,
            "" | "." | ".." => return Err(bad(place, "is no whiteout")),
            hidden => {
                let hidden = directory.join(hidden);
                if !self.own.contains(&hidden) {
                    Tree::clear(&hidden)?;
                }
            }
        }
        Ok(true)
    }

    fn empty(&self, directory: &Path) -> Result<(), ImportError> {
        for entry in fs::read_dir(directory).map_err(failed("list", directory))? {
            let path = entry.map_err(failed("list", directory))?.path();
            let is_own = self.own.range(path.clone()..).next();
            if !is_own.is_some_and(|own| own.starts_with(&path)) {
                Tree::clear(&path)?;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<(), ImportError> {
        for (path, mtime) in self.directories.into_iter().rev() {
            let time = std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(mtime));
            // A later entry may have taken its place.
            if let (Ok(directory), Some(time)) = (File::open(&path), time) {
                directory
                    .set_modified(time)
                    .map_err(failed("set the time of", &path))?;
            }
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<File, ImportError> {
    File::open(path).map_err(failed("open", path))
}

/// Tells how far the reading is.
struct Counted<F: Fn(u64)>(File, F);

impl<F: Fn(u64)> Read for Counted<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read(buffer)?;
        (self.1)(n as u64);
        Ok(n)
    }
}

/// By what it begins with: media types of images are not always right.
fn decompress<'a, F: Fn(u64) + 'a>(
    mut content: Counted<F>,
    path: &Path,
) -> Result<Box<dyn Read + 'a>, ImportError> {
    let mut magic = [0; 6];
    let n = read_up_to(&mut content.0, &mut magic).map_err(failed("read", path))?;
    content.0.seek(SeekFrom::Start(0)).map_err(failed("read", path))?;
    let content = BufReader::with_capacity(1 << 20, content);
    match &magic[..n] {
        [0x1f, 0x8b, ..] => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(content))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(content);
            let decoder = decoder.map_err(|error| bad(path, format!("is no zstd file: {error}")))?;
            Ok(Box::new(decoder))
        }
        [b'B', b'Z', b'h', ..] | [0xfd, b'7', b'z', b'X', b'Z', 0] => Err(bad(
            path,
            "is compressed with bzip2 or xz; use gzip, zstd or nothing",
        )),
        _ => Ok(Box::new(content)),
    }
}

fn read_up_to(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match file.read(&mut buffer[n..])? {
            0 => break,
            more => n += more,
        }
    }
    Ok(n)
}

#[cfg(test)]
mod tests;
