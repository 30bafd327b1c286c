//! Templates made from what others ship: a root-file-system tarball, a directory, or an image as `skopeo copy` and
//! `docker save` write it.
//!
//! ```text
//!  source --unpack--> tree --inject agent, network files--> mke2fs -d --> rootfs.ext4 --> template.json --rename--> in place
//! ```
//! Everything in a source is hostile: names are resolved below the tree and nowhere else ([`tree`]), sizes are bounded
//! by the disk's, blobs are checked against their digests ([`image`]). It runs as root, so that owners are kept. A
//! crash leaves a directory that begins with a dot, which torpord does not look at and the next import removes.
//!
//! Not its job: machines. torpord finds a template as soon as its directory has its name.

mod image;
mod layer;
mod pack;
mod tree;

pub(crate) use pack::{Import, import};

use std::path::{Path, PathBuf};

/// Why no template was made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    /// The operating system refused.
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The source is not what it should be.
    #[error("{}: {what}", path.display())]
    Source { path: PathBuf, what: String },
    /// A description in an image is not what it should be.
    #[error("cannot understand {}", path.display())]
    Image {
        path: PathBuf,
        #[source]
        source: Box<oci_spec::OciSpecError>,
    },
    /// Unpacked it is larger than the disk.
    #[error("the source is larger than the disk of {size_mib} MiB")]
    TooLarge { size_mib: u32 },
    /// There is a template of this name.
    #[error("there is a template {name} already")]
    Exists { name: String },
    /// A program that does a part of it failed.
    #[error("{program} failed: {output}")]
    Program { program: &'static str, output: String },
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ImportError {
    let path = path.to_owned();
    move |source| ImportError::Io {
        operation,
        path,
        source,
    }
}

fn bad(path: &Path, what: impl Into<String>) -> ImportError {
    ImportError::Source {
        path: path.to_owned(),
        what: what.into(),
    }
}
