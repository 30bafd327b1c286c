//! A tap device and nftables rules, in a scratch network namespace that ends with the child.

use crate::supervise::{self, Outcome, step};
use crate::{Finding, sys};
use nix::sched::{CloneFlags, unshare};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

pub(crate) const TAP_CHILD: &str = "tap";
pub(crate) const NFT_CHILD: &str = "nft";
const LIMIT: Duration = Duration::from_secs(20);
const RULES: &str = "\
table ip torpor_check {
  chain forward { type filter hook forward priority 0; policy accept; ip daddr 169.254.0.0/16 reject; }
  chain postrouting { type nat hook postrouting priority 100; ip saddr 172.31.0.0/30 masquerade; }
}
";

pub(crate) fn check_tap() -> Finding {
    let todo = "Run as root with CAP_NET_ADMIN and CAP_SYS_ADMIN, and load the module: modprobe tun.";
    finding(
        "tap",
        TAP_CHILD,
        "a network namespace with a tap device was made and removed",
        todo,
    )
}

pub(crate) fn check_nft() -> Finding {
    let todo = "Install nftables, run as root, and load the modules nf_tables, nft_chain_nat and nft_masq.";
    finding(
        "nftables",
        NFT_CHILD,
        "NAT and reject rules were made in a scratch network namespace",
        todo,
    )
}

fn finding(check: &'static str, child: &str, works: &str, what_to_do: &str) -> Finding {
    let report = supervise::run(child, LIMIT);
    let at = report
        .last_step
        .map(|step| format!(" at '{step}'"))
        .unwrap_or_default();
    match report.outcome {
        Outcome::Passed => Finding::ok(check, works),
        Outcome::Failed(why) | Outcome::Died(why) => {
            Finding::no(check, format!("failed{at}: {why}"), what_to_do)
        }
        Outcome::Hung => Finding::no(check, format!("hung{at}"), what_to_do),
    }
}

fn own_namespace() -> Result<(), String> {
    step("new network namespace");
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| format!("unshare: {errno}"))
}

pub(crate) fn run_tap() -> Result<(), String> {
    own_namespace()?;
    step("open /dev/net/tun");
    let tun = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|error| error.to_string())?;
    step("create a tap device");
    let name = sys::make_tap(&tun).map_err(|error| error.to_string())?;
    step("look for it");
    let seen = std::fs::read_to_string("/proc/thread-self/net/dev").map_err(|error| error.to_string())?;
    if seen.contains(&format!("{name}:")) {
        Ok(())
    } else {
        Err(format!("{name} does not show up"))
    }
}

pub(crate) fn run_nft() -> Result<(), String> {
    own_namespace()?;
    step("nft -f");
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot run nft: {error}"))?;
    if let Some(mut stdin) = nft.stdin.take() {
        stdin
            .write_all(RULES.as_bytes())
            .map_err(|error| format!("nft does not read: {error}"))?;
    }
    let output = nft.wait_with_output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}
