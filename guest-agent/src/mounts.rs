//! The mount table, and bringing what is mounted to rest.

use crate::errors::{Failed, os};
use nix::unistd::syncfs;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use torpor_api::guest::GuestResponse;

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor`, which tells file systems apart.
    pub device: String,
    /// Where.
    pub point: PathBuf,
    /// What is mounted; a path below `/dev` if it lies on a disk.
    pub source: String,
    /// Can it be written?
    pub writable: bool,
}

/// Everything that is mounted, in the order of mounting.
pub fn mounts() -> io::Result<Vec<Mount>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|&byte| byte == b'\n').filter_map(parse).collect())
}

/// Flush every writable file system that lies on a disk.
pub fn quiesce() -> Result<GuestResponse, Failed> {
    let mut done: Vec<String> = Vec::new();
    for mount in mounts().map_err(|error| os("cannot read the mount table", &error))? {
        if !mount.writable || !mount.source.starts_with("/dev/") || done.contains(&mount.device) {
            continue;
        }
        let flushed = open(&mount).and_then(|file| syncfs(&file).map_err(io::Error::from));
        match flushed {
            Ok(()) => done.push(mount.device),
            // Hidden by another mount, or gone since; the same file system may be reachable elsewhere.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(os(&format!("cannot flush {:?}", mount.point), &error).into()),
        }
    }
    Ok(GuestResponse::Done)
}

fn open(mount: &Mount) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(&mount.point)
}

/// `id parent major:minor root point options optional… - type source super-options`
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = String::from_utf8_lossy(fields.nth(2)?).into_owned();
    let point = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    let mut options = fields.next()?.split(|&byte| byte == b',');
    let writable_here = !options.any(|option| option == b"ro");
    let mut rest = fields.skip_while(|field| *field != b"-").skip(2);
    let source = String::from_utf8_lossy(&unescape(rest.next()?)).into_owned();
    let mut options = rest.next()?.split(|&byte| byte == b',');
    let writable = writable_here && !options.any(|option| option == b"ro");
    Some(Mount {
        device,
        point,
        source,
        writable,
    })
}

/// Blanks and the like are octal escapes in the table.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let escape = (byte == b'\\').then(|| tail.first_chunk::<3>()).flatten();
        let value = escape.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(value.unwrap_or(byte));
        rest = if value.is_some() {
            tail.get(3..).unwrap_or_default()
        } else {
            tail
        };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_blanks_in_its_path_and_optional_fields_is_understood() {
        let line =
            br"36 35 98:0 /mnt1 /my\040disk rw,noatime master:1 shared:2 - ext4 /dev/vda rw,errors=continue";
        let mount = parse(line).unwrap();
        assert_eq!(mount.point, PathBuf::from("/my disk"));
        assert_eq!(
            (mount.device.as_str(), mount.source.as_str()),
            ("98:0", "/dev/vda")
        );
        assert!(mount.writable);
    }

    #[test]
    fn read_only_counts_at_the_mount_and_at_the_file_system() {
        assert!(!parse(b"1 2 3:4 / / ro - ext4 /dev/vda rw").unwrap().writable);
        assert!(!parse(b"1 2 3:4 / / rw - ext4 /dev/vda ro,x").unwrap().writable);
        assert_eq!(parse(b"1 2 3:4 / /"), None);
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn broken_escapes_stay_as_they_are() {
        assert_eq!(unescape(br"a\b\04"), br"a\b\04");
        assert_eq!(unescape(br"\134\777"), br"\\777");
    }
}
