//! The disk itself: a qcow2 overlay over a raw, read-only base.
//!
//! Both come as open files; nothing is opened by a path that an image names. Metadata is cached by imago until a
//! [`Disk::flush`].

use std::fs::File;
use std::io;
use std::sync::Arc;

use imago::file::File as Storage;
use imago::format::drivers::FormatDriverInstance;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};

use crate::devices::queue::Buffers;

/// Unit of allocation in an overlay, in bytes.
pub const CLUSTER_BYTES: usize = 64 << 10;

/// Formats `overlay`, an empty file, as an overlay of `virtual_size` bytes over a base of `base_size` bytes.
///
/// # Errors
/// The disk would be smaller than its base or not whole sectors, or the file can't be written.
pub fn create_overlay(base_size: u64, overlay: File, virtual_size: u64) -> io::Result<()> {
    if virtual_size < base_size || !virtual_size.is_multiple_of(512) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a disk of {virtual_size} bytes can't lie over a base of {base_size} bytes"),
        ));
    }
    let storage = Storage::try_from(overlay)?;
    Qcow2::<Storage, Arc<FormatAccess<Storage>>>::create_builder(storage)
        .size(virtual_size)
        .cluster_size(CLUSTER_BYTES)
        .create()
}

/// An open disk.
#[derive(Debug)]
pub(crate) struct Disk {
    image: FormatAccess<Storage>,
    overlay: File,
}

impl Disk {
    /// Opens the overlay over its base.
    pub(crate) fn open(base: File, overlay: File) -> io::Result<Self> {
        let sync = overlay.try_clone()?;
        let base = Raw::builder(Storage::try_from(base)?).open(DenyImplicitOpenGate::default())?;
        let image = Qcow2::<Storage, Arc<FormatAccess<Storage>>>::builder(Storage::try_from(overlay)?)
            .write(true)
            .backing(Some(Arc::new(FormatAccess::new(base))))
            .data_file(None)
            .open(DenyImplicitOpenGate::default())?;
        if image.requires_external_data_file() || !image.size().is_multiple_of(512) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the overlay is not a plain disk",
            ));
        }
        Ok(Self {
            image: FormatAccess::new(image),
            overlay: sync,
        })
    }

    /// Size in bytes, a multiple of 512.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.image.size()
    }

    /// Reads into guest memory.
    pub(crate) fn read(&self, into: &Buffers<'_>, offset: u64) -> io::Result<()> {
        let (vector, _guard) = IoVectorMut::from_volatile_slice(into.slices());
        self.image.readv(vector, offset)
    }

    #[cfg(test)]
    pub(crate) fn read_to_slice(&self, into: &mut [u8], offset: u64) {
        self.image.read(into, offset).unwrap();
    }

    /// Writes from guest memory.
    pub(crate) fn write(&self, from: &Buffers<'_>, offset: u64) -> io::Result<()> {
        let (vector, _guard) = IoVector::from_volatile_slice(from.slices());
        self.image.writev(vector, offset)
    }

    /// Makes a range zero without giving its room back.
    pub(crate) fn write_zeroes(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.image.write_zeroes(offset, len_bytes)
    }

    /// Makes a range zero and gives its room back.
    pub(crate) fn discard_to_zero(&mut self, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.image.discard_to_zero(offset, len_bytes)
    }

    /// Makes what was written durable.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.image.flush()?;
        self.overlay.sync_data()
    }

    /// Writes cached metadata to the overlay, which the caller makes durable.
    pub(crate) fn flush_metadata(&self) -> io::Result<File> {
        self.image.flush()?;
        self.overlay.try_clone()
    }
}
