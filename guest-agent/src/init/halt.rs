//! The end of the machine: processes first, then file systems, then the power.

use crate::children::Children;
use crate::log::{self, Level};
use crate::mounts::mounts;
use crate::shutdown::Ending;
use crate::sys::process::signal_everybody;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signalfd::SignalFd;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long processes may take to end by themselves.
const TERM_GRACE: Duration = Duration::from_secs(2);
/// How long the kernel may take to end them.
const KILL_GRACE: Duration = Duration::from_secs(1);

/// End all processes, write everything to the disk, and power off or reboot. Returns only if the
/// kernel refuses that.
pub fn halt(ending: Ending, children: &Children, signals: &SignalFd) {
    log::line(Level::Info, format_args!("shutting down: {ending:?}"));
    let _ = signal_everybody(libc::SIGTERM);
    // A stopped process would not notice the SIGTERM.
    let _ = signal_everybody(libc::SIGCONT);
    if !all_gone(TERM_GRACE, children, signals) {
        let _ = signal_everybody(libc::SIGKILL);
        all_gone(KILL_GRACE, children, signals);
    }
    nix::unistd::sync();
    release_file_systems();
    let mode = match ending {
        Ending::PowerOff => RebootMode::RB_POWER_OFF,
        Ending::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let Err(errno) = reboot(mode);
    log::line(
        Level::Error,
        format_args!("cannot end the machine by {mode:?}: {errno}"),
    );
}

/// Reap until there is no child left; PID 1's children are, in the end, all processes.
fn all_gone(grace: Duration, children: &Children, signals: &SignalFd) -> bool {
    let deadline = Instant::now() + grace;
    loop {
        if !children.reap() {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let ms = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let _ = poll(
            &mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)],
            PollTimeout::from(ms),
        );
        let _ = signals.read_signal();
    }
}

/// Unmount what lies on disks, innermost first; what can't be unmounted becomes read-only.
fn release_file_systems() {
    let mut mounts = mounts().unwrap_or_default();
    mounts.retain(|mount| mount.source.starts_with("/dev/"));
    for disk in mounts.iter().rev() {
        if disk.point != Path::new("/") && umount2(&disk.point, MntFlags::empty()).is_ok() {
            continue;
        }
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        if let Err(errno) = mount(None::<&str>, &disk.point, None::<&str>, flags, None::<&str>) {
            log::line(
                Level::Warning,
                format_args!("cannot make {:?} read-only: {errno}", disk.point),
            );
        }
    }
    nix::unistd::sync();
}
