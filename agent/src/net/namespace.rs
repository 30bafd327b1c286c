//! Named network namespaces, and work inside them.
//!
//! A thread that leaves its namespace belongs there for good: work runs on fresh threads that end with it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// The calling thread's namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// The namespace of the calling thread.
pub(super) fn current() -> io::Result<File> {
    File::open(OWN)
}

/// Move the calling thread into a new namespace that is kept at `path`.
pub(super) fn enter_new(path: &Path) -> io::Result<File> {
    remove(path)?;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    OpenOptions::new().write(true).create_new(true).open(path)?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    mount(Some(OWN), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    current()
}

/// Move the calling thread into `namespace`.
pub(super) fn enter(namespace: &File) -> io::Result<()> {
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

/// Take away the name. The namespace itself ends with its last user. No such name is no error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    // Whatever lies at the name is taken off it; a file that is no mount point says EINVAL.
    while umount2(path, MntFlags::MNT_DETACH).is_ok() {}
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
