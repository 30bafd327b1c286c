//! What PID 1 does beside serving: bring the machine up, and bring it down.
//!
//! Nothing here ends the agent: what fails is logged, and the machine comes up with the rest.

mod halt;
mod mount;
mod network;

pub use halt::halt;

use crate::log::{self, Level, chain};
use crate::sys::storage::{device_len, resize_ext4};
use nix::sys::statvfs::statvfs;
use std::fs::{self, File};
use std::io;

const DEFAULT_HOSTNAME: &str = "torpor";
const ROOT_DISK: &str = "/dev/vda";

/// Mounts, name, network. Takes milliseconds; what may take longer is in [`grow_root`].
pub fn bring_up() {
    mount::mount_all();
    log::use_kernel_log();
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let hostname = hostname(&cmdline);
    tolerate(
        "set the host name",
        nix::unistd::sethostname(hostname).map_err(io::Error::from),
    );
    // From now on ctrl-alt-del is a SIGINT to PID 1 and no reset.
    tolerate(
        "claim ctrl-alt-del",
        nix::sys::reboot::set_cad_enabled(false).map_err(io::Error::from),
    );
    network::bring_up();
}

fn tolerate(operation: &str, result: io::Result<()>) {
    if let Err(error) = result {
        log::line(
            Level::Error,
            format_args!("cannot {operation}: {}", chain(&error)),
        );
    }
}

/// `torpor.hostname=…` of the kernel's command line.
fn hostname(cmdline: &str) -> &str {
    let given = cmdline
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("torpor.hostname="))
        .next_back();
    given
        .filter(|name| !name.is_empty() && name.len() <= 64)
        .unwrap_or(DEFAULT_HOSTNAME)
}

/// Grow the root file system, mounted, to the size of its disk.
pub fn grow_root() {
    let (Ok(disk), Ok(root), Ok(usage)) = (File::open(ROOT_DISK), File::open("/"), statvfs("/")) else {
        return log::line(
            Level::Info,
            format_args!("no {ROOT_DISK}: the root file system stays as it is"),
        );
    };
    let Ok(disk_bytes) = device_len(&disk) else { return };
    let blocks = disk_bytes.checked_div(usage.fragment_size()).unwrap_or(0);
    // What statvfs calls blocks leaves out what ext4 keeps for itself, so "larger" needs a margin.
    let slack = usage.blocks() / 8;
    if blocks <= usage.blocks().saturating_add(slack) {
        return;
    }
    match resize_ext4(&root, blocks) {
        Ok(()) => log::line(
            Level::Info,
            format_args!("the root file system has now {disk_bytes} bytes"),
        ),
        Err(error) => log::line(
            Level::Warning,
            format_args!("cannot grow the root file system to {blocks} blocks: {error}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_valid_host_name_of_the_command_line_counts() {
        assert_eq!(hostname("quiet torpor.hostname=a torpor.hostname=b.c"), "b.c");
        assert_eq!(hostname("torpor.hostname= x"), DEFAULT_HOSTNAME);
        assert_eq!(hostname(""), DEFAULT_HOSTNAME);
        assert_eq!(
            hostname(&format!("torpor.hostname={}", "x".repeat(65))),
            DEFAULT_HOSTNAME
        );
    }
}
