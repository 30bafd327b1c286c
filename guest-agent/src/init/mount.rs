//! The file systems of a running system, and what belongs into them from the start.

use super::tolerate;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

struct FileSystem {
    kind: &'static str,
    point: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const NO_SUID_EXEC: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NOEXEC)
    .union(MsFlags::MS_NODEV);
const NO_SUID_DEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// In order: later ones lie inside earlier ones.
const FILE_SYSTEMS: [FileSystem; 8] = [
    FileSystem {
        kind: "proc",
        point: "/proc",
        flags: NO_SUID_EXEC,
        options: "",
    },
    FileSystem {
        kind: "sysfs",
        point: "/sys",
        flags: NO_SUID_EXEC,
        options: "",
    },
    FileSystem {
        kind: "devtmpfs",
        point: "/dev",
        flags: MsFlags::MS_NOSUID,
        options: "mode=755",
    },
    FileSystem {
        kind: "devpts",
        point: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "gid=5,mode=620,ptmxmode=666",
    },
    FileSystem {
        kind: "tmpfs",
        point: "/dev/shm",
        flags: NO_SUID_DEV,
        options: "mode=1777",
    },
    FileSystem {
        kind: "mqueue",
        point: "/dev/mqueue",
        flags: NO_SUID_EXEC,
        options: "",
    },
    FileSystem {
        kind: "tmpfs",
        point: "/run",
        flags: NO_SUID_DEV,
        options: "mode=755,size=25%",
    },
    FileSystem {
        kind: "cgroup2",
        point: "/sys/fs/cgroup",
        flags: NO_SUID_EXEC,
        options: "",
    },
];

/// What devtmpfs leaves to user space.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mount everything that is not mounted yet.
pub fn mount_all() {
    for system in &FILE_SYSTEMS {
        tolerate(
            &format!("mount {} on {}", system.kind, system.point),
            mount_one(system),
        );
    }
    for (target, link) in LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                tolerate(&format!("make {link}"), Err(error));
            }
            _ => {}
        }
    }
    for directory in ["/run/lock", "/run/torpor"] {
        tolerate(&format!("make {directory}"), fs::create_dir_all(directory));
    }
}

fn mount_one(system: &FileSystem) -> io::Result<()> {
    if !Path::new(system.point).is_dir() {
        fs::create_dir_all(system.point)?;
    }
    let options = (!system.options.is_empty()).then_some(system.options);
    match mount(
        Some(system.kind),
        system.point,
        Some(system.kind),
        system.flags,
        options,
    ) {
        // The kernel mounts devtmpfs by itself, an initramfs perhaps more.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
