//! Pages of an image, each checked against the [`table`].

mod table;

use self::table::Block;
use super::{Extent, Header, ImageLayout, OpenError, read_header_page};
use crate::layout::{PAGE_BYTES, PAGE_SIZE};
use crate::sys::file_view::FileView;
use crate::sys::page_cache::cached_pages;
use rapidhash::v3::rapidhash_v3;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// Why a page can't be had.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// Reading failed.
    #[error("cannot read pages {first}..{end} of the image")]
    Read {
        /// First page.
        first: u64,
        /// End.
        end: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The checksum is wrong.
    #[error("page {page} of the image has checksum {found:#010x}, not {wanted:#010x}")]
    Checksum {
        /// Which page.
        page: u64,
        /// Computed.
        found: u32,
        /// In the table.
        wanted: u32,
    },
}

/// Where missing pages come from.
pub trait PageSource: Send + Sync + std::fmt::Debug {
    /// Read whole pages, each checked.
    ///
    /// # Errors
    /// A page can't be read, or is not what was written.
    fn read(&self, first: u64, buffer: &mut [u8]) -> Result<(), PageError>;
    /// Whether a page is zero by its checksum alone: if not, it is not zero.
    ///
    /// # Errors
    /// The checksum can't be read.
    fn may_be_zero(&self, page: u64) -> Result<bool, PageError>;
    /// End of the pages from the first one on that are in the same file as that.
    fn same_file_end(&self, pages: &Range<u64>) -> u64;
    /// What [`Self::check`] looks at pages by without copying them, if there is such a thing: for pages that are in memory.
    fn view(&self) -> Option<ImageView>;
    /// The bytes of whole pages, all in one file, where the view has them, each checked.
    ///
    /// # Errors
    /// A page is not there, or is not what was written.
    fn check<'a>(&self, pages: Range<u64>, view: &'a ImageView) -> Result<&'a [u8], PageError>;
    /// Check the bytes of whole pages that somebody else brought.
    ///
    /// # Errors
    /// A page is not what was written.
    fn verify(&self, first: u64, content: &[u8]) -> Result<(), PageError>;
    /// These pages will be read soon.
    fn will_need(&self, pages: Range<u64>);
    /// About how many of these pages would have to come from a disk; none if that can't be known.
    fn n_on_disk(&self, pages: Range<u64>) -> u64;
    /// The file that has page `first`, and its offset there, if it may be mapped. Pages after it follow, as far as they are in the
    /// same file.
    fn file(&self, first: u64) -> Option<(BorrowedFd<'_>, u64)>;
}

/// The pages in parts that are in one file each.
pub fn in_one_file<S: PageSource + ?Sized>(
    source: &S,
    pages: Range<u64>,
) -> impl Iterator<Item = Range<u64>> {
    let mut rest = pages;
    std::iter::from_fn(move || {
        let part = (!rest.is_empty()).then(|| rest.start..source.same_file_end(&rest))?;
        rest.start = part.end;
        Some(part)
    })
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    // By memcmp, which ends at the first difference and has vector code whatever we are compiled with.
    bytes
        .chunks(PAGE_SIZE)
        .all(|chunk| *chunk == ZEROS[..chunk.len()])
}

/// Checksum of a page: rapidhash V3 with its default seed, its halves folded. Being plain arithmetic with half the
/// multiplications of XXH64, it takes half of that one's time, and a thirtieth of CRC32C's, where a processor is emulated; on metal all
/// three are as fast as memory.
pub(super) fn page_checksum(page: &[u8]) -> u32 {
    let hash = rapidhash_v3(page);
    #[expect(clippy::cast_possible_truncation, reason = "the halves were folded")]
    let folded = (hash ^ (hash >> 32)) as u32;
    folded
}

/// Checksum of a page of zeros.
pub(super) fn zero_checksum() -> u32 {
    static SUM: OnceLock<u32> = OnceLock::new();
    *SUM.get_or_init(|| page_checksum(&[0; PAGE_SIZE]))
}

/// An image file and the table of its pages, over another one that has those that are not in this one.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    layout: ImageLayout,
    base: Option<Base>,
    identity: (u64, u64),
    blocks: Vec<OnceLock<Block>>,
    /// The file held no page when this value was made.
    empty: bool,
    suspect: AtomicBool,
    /// Pages of the base that were taken over since the file was last known to be durable.
    unsettled: Mutex<Vec<Range<u64>>>,
}

/// An image that others may lie over. It has no base itself: a page is never further away.
#[derive(Debug)]
pub struct Base {
    image: Arc<ImageFile>,
    /// What they name it by.
    pub(super) name: u32,
}

impl Base {
    /// This image, if others may lie over it as it is now.
    ///
    /// # Errors
    /// Its header can't be read, or is none.
    pub fn new(image: Arc<ImageFile>) -> Result<Option<Self>, OpenError> {
        let page = read_header_page(&image.file)?;
        let header = Header::decode(&page)?;
        let is_usable = header.valid && header.base.is_none();
        let name = Header::name(&page);
        Ok(is_usable.then_some(Self { image, name }))
    }
}

/// The bytes of an image's pages where the page cache has them.
#[derive(Debug)]
pub struct ImageView {
    own: FileView,
    base: Option<FileView>,
}

impl ImageFile {
    /// A file that holds an image.
    ///
    /// # Errors
    /// It can't be examined.
    pub fn open(file: File, layout: ImageLayout, base: Option<Base>) -> io::Result<Self> {
        Self::new(file, layout, base, false)
    }

    /// A file that holds no page yet: all are those of the base, or zero.
    ///
    /// # Errors
    /// It can't be examined.
    pub fn empty(file: File, layout: ImageLayout, base: Option<Base>) -> io::Result<Self> {
        Self::new(file, layout, base, true)
    }

    fn new(file: File, layout: ImageLayout, base: Option<Base>, empty: bool) -> io::Result<Self> {
        if base.as_ref().is_some_and(|base| base.image.layout != layout) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self {
            identity: identity(&file)?,
            file,
            layout,
            base,
            blocks: table::unread_blocks(layout),
            empty,
            suspect: AtomicBool::new(false),
            unsettled: Mutex::default(),
        })
    }

    /// Where the parts are.
    #[must_use]
    pub fn layout(&self) -> ImageLayout {
        self.layout
    }

    /// Extents of all pages that are not zero, if they are no more than `limit`. By the table alone, which may take a
    /// page for zero that is not: for whoever only wants to be early with most of them.
    ///
    /// # Errors
    /// The table can't be read.
    pub fn data_extents(&self, limit: u64) -> io::Result<Option<Vec<Extent>>> {
        let zero = zero_checksum();
        let (mut extents, mut n_found, mut page) = (Vec::new(), 0, 0);
        let mut first = 0;
        while page < self.layout.n_pages() {
            // By blocks: a look-up for each page would cost more than what it saves.
            let (block, _) = self.block(page)?;
            for sum in &block.sums {
                if sum.load(Ordering::Relaxed) == zero {
                    extents.extend(Extent::new(first..page));
                    first = page + 1;
                } else {
                    n_found += 1;
                }
                page += 1;
            }
            if n_found > limit {
                return Ok(None);
            }
        }
        extents.extend(Extent::new(first..page));
        Ok(Some(extents))
    }

    /// Read pages as they are, unchecked.
    pub(super) fn read_raw(&self, first: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = first + (buffer.len() / PAGE_SIZE) as u64;
        let mut rest = buffer;
        for run in in_one_file(self, first..end) {
            let len = PAGE_SIZE * usize::try_from(run.end - run.start).unwrap_or(0);
            let (bytes, after) = rest.split_at_mut(len);
            self.layer(run.start)
                .file
                .read_exact_at(bytes, self.layout.page_offset(run.start))?;
            rest = after;
        }
        Ok(())
    }

    /// The image whose file has the page.
    fn layer(&self, page: u64) -> &ImageFile {
        self.base()
            .filter(|_| !self.holds(page))
            .map_or(self, Arc::as_ref)
    }

    fn data_view(&self) -> io::Result<FileView> {
        let len_bytes = self.layout.n_pages() * PAGE_BYTES;
        FileView::new(self.file.as_fd(), self.layout.data_offset(), len_bytes)
    }

    fn n_cached(&self, pages: &Range<u64>) -> io::Result<u64> {
        let bytes = self.layout.page_offset(pages.start)..self.layout.page_offset(pages.end);
        cached_pages(self.file.as_fd(), bytes)
    }
}

impl PageSource for ImageFile {
    fn read(&self, first: u64, buffer: &mut [u8]) -> Result<(), PageError> {
        let end = first + (buffer.len() / PAGE_SIZE) as u64;
        let failed = |source| PageError::Read { first, end, source };
        self.read_raw(first, buffer).map_err(failed)?;
        self.verify(first, buffer)
    }

    fn may_be_zero(&self, page: u64) -> Result<bool, PageError> {
        let sum = self.checksum(page);
        let sum = sum.map_err(|source| PageError::Read {
            first: page,
            end: page + 1,
            source,
        })?;
        Ok(sum == zero_checksum())
    }

    fn same_file_end(&self, pages: &Range<u64>) -> u64 {
        self.layer_end(pages)
    }

    fn view(&self) -> Option<ImageView> {
        Some(ImageView {
            own: self.data_view().ok()?,
            base: self.base().map(|base| base.data_view()).transpose().ok()?,
        })
    }

    fn check<'a>(&self, pages: Range<u64>, view: &'a ImageView) -> Result<&'a [u8], PageError> {
        let layer = view.base.as_ref().filter(|_| !self.holds(pages.start));
        let bytes = layer
            .unwrap_or(&view.own)
            .bytes(pages.start * PAGE_BYTES..pages.end * PAGE_BYTES);
        let bytes = bytes.ok_or_else(|| PageError::Read {
            first: pages.start,
            end: pages.end,
            source: io::ErrorKind::UnexpectedEof.into(),
        })?;
        self.verify(pages.start, bytes)?;
        Ok(bytes)
    }

    fn verify(&self, first: u64, content: &[u8]) -> Result<(), PageError> {
        let end = first + (content.len() / PAGE_SIZE) as u64;
        for (content, page) in content.chunks_exact(PAGE_SIZE).zip(first..) {
            let wanted = self.checksum(page);
            let wanted = wanted.map_err(|source| PageError::Read { first, end, source })?;
            let found = page_checksum(content);
            if found != wanted {
                return Err(PageError::Checksum { page, found, wanted });
            }
        }
        Ok(())
    }

    fn will_need(&self, pages: Range<u64>) {
        for run in in_one_file(self, pages) {
            let offset = i64::try_from(self.layout.page_offset(run.start));
            let len = i64::try_from((run.end - run.start) * PAGE_BYTES);
            if let (Ok(offset), Ok(len)) = (offset, len) {
                let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_WILLNEED;
                // A hint: without it the reads are only slower.
                let _ = nix::fcntl::posix_fadvise(&self.layer(run.start).file, offset, len, advice);
            }
        }
    }

    fn n_on_disk(&self, pages: Range<u64>) -> u64 {
        let missing = |run: Range<u64>| match self.layer(run.start).n_cached(&run) {
            Ok(n_cached) if n_cached < run.end - run.start => {
                // Zero pages are holes, which no disk has.
                let zero = zero_checksum();
                let is_data = |page: &u64| self.checksum(*page).is_ok_and(|sum| sum != zero);
                (run.filter(is_data).count() as u64).saturating_sub(n_cached)
            }
            Ok(_) | Err(_) => 0,
        };
        in_one_file(self, pages).map(missing).sum()
    }

    fn file(&self, first: u64) -> Option<(BorrowedFd<'_>, u64)> {
        Some((self.layer(first).file.as_fd(), self.layout.page_offset(first)))
    }
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}
