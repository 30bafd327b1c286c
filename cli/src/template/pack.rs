//! From a source to a template in place.

use super::image::{self, Config, Image, check, hex};
use super::layer::{Room, Whiteouts, apply};
use super::tree::Tree;
use super::{ImportError, bad, failed};
use crate::output;
use indicatif::ProgressBar;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use torpor_api::MachineName;

/// Where the agent is in every guest.
const AGENT: &str = "/usr/local/bin/torpor-guest";

/// What is asked for.
#[derive(Debug)]
pub(crate) struct Import {
    /// Tarball, directory or image.
    pub(crate) source: PathBuf,
    /// Name of the template.
    pub(crate) name: MachineName,
    /// Size of its disk in MiB.
    pub(crate) size_mib: u32,
    /// Environment of its commands, over what an image says.
    pub(crate) env: BTreeMap<String, String>,
    /// Their working directory, instead of what an image says.
    pub(crate) workdir: Option<String>,
    /// What runs from the start, instead of what an image says.
    pub(crate) entrypoint: Option<Vec<String>>,
    /// What it holds, for people.
    pub(crate) description: String,
    /// Where it goes.
    pub(crate) templates_dir: PathBuf,
    /// The template that kernel and agent are taken from.
    pub(crate) base_dir: PathBuf,
}

/// Removed when it is dropped, unless it was renamed.
struct Workshop(PathBuf);

impl Drop for Workshop {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            output::warn(&format!("cannot remove {}: {error}", self.0.display()));
        }
    }
}

/// Make the template; answers its directory.
pub(crate) fn import(import: &Import) -> Result<PathBuf, ImportError> {
    let place = import.templates_dir.join(import.name.as_str());
    if place.exists() {
        return Err(ImportError::Exists {
            name: import.name.to_string(),
        });
    }
    let work = import.templates_dir.join(format!(".import-{}", import.name));
    Tree::clear(&work)?;
    fs::create_dir_all(&work).map_err(failed("make directory", &work))?;
    let workshop = Workshop(work.clone());
    let (out, root) = (work.join("template"), work.join("root"));
    fs::create_dir(&out).map_err(failed("make directory", &out))?;
    let tree = Tree::make(&root)?;
    let (config, id) = unpack(import, &tree, &work)?;
    inject(import, &tree, &work)?;
    let rootfs = out.join("rootfs.ext4");
    let spinner = output::spinner("laying out the disk");
    lay_out(&tree, &rootfs, import.size_mib)?;
    spinner.finish_and_clear();
    let kernel = out.join("vmlinux");
    fs::copy(import.base_dir.join("vmlinux"), &kernel).map_err(failed("copy the kernel to", &kernel))?;
    describe(import, config, &id, &out)?;
    for name in ["rootfs.ext4", "vmlinux", "template.json"] {
        let path = out.join(name);
        let synced = File::open(&path).and_then(|file| file.sync_all());
        synced.map_err(failed("make durable", &path))?;
    }
    fs::rename(&out, &place).map_err(failed("rename to", &place))?;
    let dir = &import.templates_dir;
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(failed("make durable", dir))?;
    drop(workshop);
    Ok(place)
}

/// Fill the tree; what an image says of its processes, and what the source is in a few characters.
fn unpack(import: &Import, tree: &Tree, work: &Path) -> Result<(Config, String), ImportError> {
    let source = &import.source;
    let mut room = Room::new(import.size_mib);
    if source.is_dir() {
        if image::is_image(source) {
            return unpack_image(&image::open(source)?, tree, &mut room);
        }
        copy_directory(source, tree)?;
        return Ok((Config::default(), unique(source)));
    }
    if holds_image(source)? {
        // The archive's files are plain; whose they are does not matter.
        let unpacked = Tree::make(&work.join("image"))?;
        let bar = output::bar("reading the image", source_len(source)?);
        let mut archive_room = Room::new(u32::MAX);
        apply(&unpacked, source, Whiteouts::Unknown, &mut archive_room, |n| {
            bar.inc(n)
        })?;
        bar.finish_and_clear();
        return unpack_image(&image::open(unpacked.root())?, tree, &mut room);
    }
    let bar = output::bar("unpacking", source_len(source)?);
    apply(tree, source, Whiteouts::Unknown, &mut room, |n| bar.inc(n))?;
    bar.finish_and_clear();
    Ok((Config::default(), unique(source)))
}

fn unpack_image(image: &Image, tree: &Tree, room: &mut Room) -> Result<(Config, String), ImportError> {
    let mut total = 0;
    for (path, digest) in &image.layers {
        total += source_len(path)?;
        if let Some(digest) = digest {
            check(path, digest)?;
        }
    }
    let bar: ProgressBar = output::bar("unpacking layers", total);
    for (path, _) in &image.layers {
        apply(tree, path, Whiteouts::Obeyed, room, |n| bar.inc(n))?;
    }
    bar.finish_and_clear();
    let config = Config {
        env: image.config.env.clone(),
        workdir: image.config.workdir.clone(),
        entrypoint: image.config.entrypoint.clone(),
    };
    Ok((config, image.id.clone()))
}

fn source_len(path: &Path) -> Result<u64, ImportError> {
    Ok(fs::metadata(path).map_err(failed("look at", path))?.len())
}

/// Whether an uncompressed tarball is an image; what is compressed is a root file system.
fn holds_image(path: &Path) -> Result<bool, ImportError> {
    let file = File::open(path).map_err(failed("open", path))?;
    let mut archive = tar::Archive::new(file);
    let Ok(entries) = archive.entries_with_seek() else {
        return Ok(false);
    };
    for entry in entries {
        let Ok(entry) = entry else { return Ok(false) };
        let Ok(name) = entry.path() else {
            return Ok(false);
        };
        let name = name.strip_prefix("./").unwrap_or(&name);
        if name == Path::new("oci-layout") || name == Path::new("manifest.json") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Owners, links, times and attributes as they are.
fn copy_directory(source: &Path, tree: &Tree) -> Result<(), ImportError> {
    let spinner = output::spinner("copying");
    let mut command = Command::new("cp");
    command
        .args(["-a", "--one-file-system", "--"])
        .arg(source.join("."));
    run("cp", command.arg(tree.root()))?;
    spinner.finish_and_clear();
    Ok(())
}

/// A source without a digest is told apart from others by where and when it was taken.
fn unique(source: &Path) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let text = format!(
        "{} {} {}",
        source.display(),
        now.unwrap_or_default().as_nanos(),
        std::process::id()
    );
    hex(&Sha256::digest(text))
}

/// What every guest needs and no image has: the agent as PID 1, its mount points, and the one network there is.
fn inject(import: &Import, tree: &Tree, work: &Path) -> Result<(), ImportError> {
    let agent = work.join("torpor-guest");
    let rootfs = import.base_dir.join("rootfs.ext4");
    let mut debugfs = Command::new("debugfs");
    debugfs
        .arg("-R")
        .arg(format!("dump {AGENT} torpor-guest"))
        .arg(fs::canonicalize(&rootfs).map_err(failed("resolve", &rootfs))?)
        .current_dir(work);
    run("debugfs", &mut debugfs)?;
    let content = fs::read(&agent).map_err(failed("read", &agent))?;
    if !content.starts_with(b"\x7fELF") {
        return Err(bad(&rootfs, format!("has no {AGENT}")));
    }
    for name in ["proc", "sys", "dev", "run", "etc", "usr/local/bin"] {
        tree.directory(name, 0o755)?;
    }
    tree.directory("tmp", 0o1777)?;
    if !tree.has("workspace")? {
        tree.directory("workspace", 0o755)?;
    }
    tree.write(AGENT, 0o755, &content)?;
    tree.write("etc/resolv.conf", 0o644, b"nameserver 172.31.0.1\n")?;
    tree.write("etc/hostname", 0o644, b"torpor\n")?;
    tree.write("etc/hosts", 0o644, b"127.0.0.1 localhost torpor\n::1 localhost\n")
}

fn lay_out(tree: &Tree, rootfs: &Path, size_mib: u32) -> Result<(), ImportError> {
    let mut command = Command::new("mke2fs");
    command
        .args([
            "-q", "-F", "-t", "ext4", "-L", "torpor", "-m", "0", "-J", "size=16", "-E",
        ])
        .arg("lazy_itable_init=0,lazy_journal_init=0,nodiscard")
        .arg("-d")
        .arg(tree.root())
        .arg(rootfs)
        .arg(format!("{size_mib}M"));
    run("mke2fs", &mut command)
}

fn run(program: &'static str, command: &mut Command) -> Result<(), ImportError> {
    let done = command.output().map_err(failed("run", Path::new(program)))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    Err(ImportError::Program {
        program,
        output: said.trim().chars().take(400).collect(),
    })
}

fn describe(import: &Import, config: Config, id: &str, out: &Path) -> Result<(), ImportError> {
    let mut env: BTreeMap<String, String> = config
        .env
        .iter()
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    env.extend(import.env.clone());
    let description = serde_json::json!({
        "name": import.name,
        "kernel": "vmlinux",
        "rootfs": "rootfs.ext4",
        "description": import.description,
        "id": format!("{id}-{}", unique(&import.source)),
        "env": env,
        "workdir": import.workdir.clone().or(config.workdir),
        "entrypoint": import.entrypoint.clone().unwrap_or(config.entrypoint),
    });
    let path = out.join("template.json");
    let json = serde_json::to_vec_pretty(&description)
        .map_err(|error| bad(&path, format!("cannot be written: {error}")))?;
    fs::write(&path, json).map_err(failed("write", &path))
}
