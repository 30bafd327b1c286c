//! `manifest.json`: what makes a hibernation image the one to wake from.
//!
//! It is put in place by rename after the image is durable, and removed before anything makes the image
//! unusable on purpose. An image that no manifest names does not exist.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use torpor_api::MachineId;
use torpor_api::vmm::Shape;

/// Name of the file in a machine's directory.
pub const MANIFEST: &str = "manifest.json";
/// The one version of the format so far.
pub const FORMAT: u32 = 1;
/// Longest manifest that is read.
const MAX_LEN: u64 = 64 << 10;

/// What a manifest says. Fields are permanent: changes raise [`FORMAT`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format.
    pub format: u32,
    /// The machine that sleeps here.
    pub machine_id: MachineId,
    /// The image's generation; the image's own header names the same.
    pub generation: u64,
    /// The disk's generation at the freeze.
    pub disk_generation: u64,
    /// What the VM was built as.
    pub shape: Shape,
    /// Template of the machine.
    pub template: String,
    /// Digest of the template when the machine was made.
    pub template_digest: String,
    /// Wall clock of the host when the image was durable, in Unix milliseconds.
    pub written_unix_ms: u64,
    /// The image is another machine's, and a restore of it has to make a new machine of the guest. Left out where it is
    /// not so, as it was before there were forks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fork: bool,
    /// What the image needs of a host: CPU, kernel and VMM, as the VMM wrote it into the image.
    pub host_signature: serde_json::Value,
}

/// Why a manifest could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
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
    /// Not the JSON that it should be.
    #[error("{} is no manifest", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Written by another version of Torpor.
    #[error("manifest has format {found}, this version reads {FORMAT}")]
    Format {
        /// Its format.
        found: u32,
    },
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ManifestError {
    let path = path.to_owned();
    move |source| ManifestError::Io {
        operation,
        path,
        source,
    }
}

/// The manifest in `dir`, if there is one.
///
/// # Errors
/// See [`ManifestError`].
pub fn read(dir: &Path) -> Result<Option<Manifest>, ManifestError> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let path = dir.join(MANIFEST);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed("open", &path))?,
    };
    let mut json = Vec::new();
    file.take(MAX_LEN)
        .read_to_end(&mut json)
        .map_err(failed("read", &path))?;
    let malformed = |source| ManifestError::Malformed {
        path: path.clone(),
        source,
    };
    // The version first: a later format may have any fields.
    let Version { format } = serde_json::from_slice(&json).map_err(malformed)?;
    if format != FORMAT {
        return Err(ManifestError::Format { found: format });
    }
    serde_json::from_slice(&json).map(Some).map_err(malformed)
}

/// Put a manifest in place in `dir`; durable when it returns.
///
/// # Errors
/// See [`ManifestError`].
pub fn write(dir: &Path, manifest: &Manifest) -> Result<(), ManifestError> {
    let path = dir.join(MANIFEST);
    let json = serde_json::to_vec_pretty(manifest).map_err(|source| ManifestError::Malformed {
        path: path.clone(),
        source,
    })?;
    replace(&path, &json).map_err(failed("write", &path))
}

/// Replace the file at `path` so that a crash leaves the old or the new content, whole.
///
/// # Errors
/// The file system refuses; the old file is then in place.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = path
        .parent()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let temporary = path.with_extension("tmp");
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(dir)?.sync_all()
}
