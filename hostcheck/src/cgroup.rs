//! cgroup v2 with the controllers that an execution's scope needs, made by systemd or by hand.

use crate::Finding;
use std::fs;
use std::path::{Path, PathBuf};

const MOUNT: &str = "/sys/fs/cgroup";
const CHECK: &str = "cgroup v2";
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];

pub(crate) fn check() -> Finding {
    let Ok(controllers) = fs::read_to_string(Path::new(MOUNT).join("cgroup.controllers")) else {
        return Finding::no(
            CHECK,
            format!("{MOUNT} is no cgroup v2 hierarchy"),
            "Boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 there.",
        );
    };
    if let Some(missing) = missing_of(&controllers) {
        return Finding::no(
            CHECK,
            format!(
                "the controller {missing} is missing (there: {})",
                controllers.trim()
            ),
            "Enable it in the kernel and, inside a container, in the container's own cgroup.",
        );
    }
    if Path::new("/run/systemd/system").is_dir() {
        return Finding::ok(CHECK, "systemd runs and makes the scopes");
    }
    match try_child() {
        Ok(at) => Finding::ok(
            CHECK,
            format!("no systemd, but a cgroup could be made in {}", at.display()),
        ),
        Err(error) => Finding::no(
            CHECK,
            format!("no systemd, and no cgroup can be made: {error}"),
            "Run on a host with systemd, or as root with a writable /sys/fs/cgroup.",
        ),
    }
}

fn missing_of(controllers: &str) -> Option<&'static str> {
    NEEDED
        .into_iter()
        .find(|needed| !controllers.split_whitespace().any(|there| there == *needed))
}

fn try_child() -> std::io::Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap_or_default();
    let parent = Path::new(MOUNT).join(own);
    let child = parent.join(format!("torpor-check-{}", std::process::id()));
    fs::create_dir(&child)?;
    fs::remove_dir(&child)?;
    Ok(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_controller_is_needed_as_a_whole_word() {
        assert_eq!(missing_of("cpuset cpu io memory pids\n"), None);
        assert_eq!(missing_of("cpuset io memory pids"), Some("cpu"));
        assert_eq!(missing_of(""), Some("cpu"));
    }
}
