//! Templates: a kernel, a read-only root disk and `template.json`, in a directory of the template's name.
//!
//! A template's digest binds machines to it: their overlay holds only what differs from exactly this root disk.
//! It is the SHA-256 of `template.json` and the root disk's length. The JSON names its parts by digest or build
//! `id`, so nobody has to read gigabytes; a file swapped under an unchanged JSON at equal length goes unnoticed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use torpor_api::MachineName;
use torpor_api::limits::MAX_EXEC_BYTES;

use crate::machine::hypervisor::TemplateInfo;

/// Longest `template.json` that is read.
const MAX_LEN: u64 = 64 << 10;
/// Longest addition to the kernel command line, in bytes.
const MAX_CMDLINE: usize = 1024;

/// Why a directory is no usable template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
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
    #[error("{} is no template description", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The description says what can't be.
    #[error("{}: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::Io {
        operation,
        path,
        source,
    }
}

/// `template.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    name: String,
    kernel: String,
    rootfs: String,
    #[serde(default)]
    cmdline_extra: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    description: String,
    #[serde(default)]
    id: String,
    #[serde(default)]
    sha256: BTreeMap<String, String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    workdir: Option<String>,
    #[serde(default)]
    entrypoint: Vec<String>,
}

/// A template that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// What others get to see.
    pub info: TemplateInfo,
    /// Path of the raw root disk.
    pub rootfs: PathBuf,
    /// Path of the kernel.
    pub kernel: PathBuf,
    /// Added to the kernel command line.
    pub cmdline_extra: String,
}

impl Template {
    /// The kernel, read-only.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn open_kernel(&self) -> Result<OwnedFd, TemplateError> {
        Ok(File::open(&self.kernel)
            .map_err(failed("open", &self.kernel))?
            .into())
    }

    /// The raw root disk, read-only.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn open_rootfs(&self) -> Result<OwnedFd, TemplateError> {
        Ok(File::open(&self.rootfs)
            .map_err(failed("open", &self.rootfs))?
            .into())
    }
}

/// The templates of this host.
#[derive(Debug, Clone)]
pub struct Templates {
    dirs: Vec<PathBuf>,
}

impl Templates {
    /// Templates in subdirectories of `dirs`; the first that has a name wins.
    #[must_use]
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self { dirs }
    }

    /// The template of this name, which is hostile input.
    ///
    /// # Errors
    /// It is there and can't be used.
    pub fn find(&self, name: &str) -> Result<Option<Template>, TemplateError> {
        let Ok(name) = name.parse::<MachineName>() else {
            return Ok(None);
        };
        for dir in &self.dirs {
            let dir = dir.join(name.as_str());
            if dir.join("template.json").exists() {
                return load(&dir, &name).map(Some);
            }
        }
        Ok(None)
    }

    /// All usable templates, by name. What can't be used is logged and left out.
    #[must_use]
    pub fn all(&self) -> Vec<TemplateInfo> {
        let mut found = BTreeMap::new();
        for entry in self
            .dirs
            .iter()
            .filter_map(|dir| fs::read_dir(dir).ok())
            .flatten()
        {
            let name = entry.ok().and_then(|entry| entry.file_name().into_string().ok());
            let Some(name) = name.filter(|name| !found.contains_key(name)) else {
                continue;
            };
            match self.find(&name) {
                Ok(Some(template)) => {
                    found.insert(name, template.info);
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(error = crate::execution::chain(&error), "template left out"),
            }
        }
        found.into_values().collect()
    }
}

fn load(dir: &Path, name: &MachineName) -> Result<Template, TemplateError> {
    let path = dir.join("template.json");
    let mut json = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_LEN).read_to_end(&mut json))
        .map_err(failed("read", &path))?;
    let description: Description =
        serde_json::from_slice(&json).map_err(|source| TemplateError::Malformed {
            path: path.clone(),
            source,
        })?;
    check(&description, name).map_err(|what| TemplateError::Invalid {
        path: path.clone(),
        what,
    })?;
    let rootfs = dir.join(&description.rootfs);
    let rootfs_len = fs::metadata(&rootfs).map_err(failed("stat", &rootfs))?.len();
    let disk_mib = match u32::try_from(rootfs_len >> 20) {
        Ok(mib) if mib > 0 && rootfs_len % (1 << 20) == 0 => mib,
        _ => {
            let what = format!("root disk of {rootfs_len} bytes is no whole number of MiB");
            return Err(TemplateError::Invalid { path, what });
        }
    };
    let digest = Sha256::new()
        .chain_update(&json)
        .chain_update(rootfs_len.to_le_bytes())
        .finalize();
    let summary = [&description.description, &description.os, &description.name];
    Ok(Template {
        info: TemplateInfo {
            name: description.name.clone(),
            digest: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            disk_mib,
            env: description.env,
            cwd: description.workdir,
            entrypoint: description.entrypoint,
            description: summary
                .into_iter()
                .find(|s| !s.is_empty())
                .cloned()
                .unwrap_or_default(),
        },
        kernel: dir.join(&description.kernel),
        rootfs,
        cmdline_extra: description.cmdline_extra,
    })
}

/// What machines begin their commands with has the bounds of an exec.
fn check_commands(description: &Description) -> Result<(), String> {
    let env = description.env.iter().flat_map(|(key, value)| [key, value]);
    let texts = env.chain(&description.entrypoint).chain(&description.workdir);
    let mut len_bytes = 0;
    for text in texts {
        if text.contains('\0') {
            return Err("a NUL character is in its environment, directory or entrypoint".to_owned());
        }
        len_bytes += text.len() + 1;
    }
    if len_bytes > MAX_EXEC_BYTES {
        return Err(format!("environment and entrypoint are {len_bytes} bytes long"));
    }
    if description
        .workdir
        .as_ref()
        .is_some_and(|dir| !dir.starts_with('/'))
    {
        return Err("workdir is no absolute path".to_owned());
    }
    if description
        .env
        .keys()
        .any(|key| key.is_empty() || key.contains('='))
    {
        return Err("a key of its environment is empty or has a '='".to_owned());
    }
    Ok(())
}

fn check(description: &Description, name: &MachineName) -> Result<(), String> {
    if description.name != name.as_str() {
        return Err(format!("names itself {:?}", description.name));
    }
    for part in [&description.kernel, &description.rootfs] {
        // A part is a file beside the description, nothing else.
        if part.is_empty() || part.contains('/') || part.starts_with('.') || part.contains('\0') {
            return Err(format!("{part:?} is no file name"));
        }
    }
    if description.id.is_empty() && !description.sha256.contains_key(&description.rootfs) {
        return Err("has neither an id nor the digest of its root disk".to_owned());
    }
    check_commands(description)?;
    let extra = &description.cmdline_extra;
    if extra.len() > MAX_CMDLINE || !extra.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        return Err("cmdline_extra is too long or not printable".to_owned());
    }
    Ok(())
}
