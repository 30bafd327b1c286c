//! What a host can do, by trying it.
//!
//! `/dev/kvm` may exist and stop at the instructions that a kernel runs; userfaultfd may exist and refuse faults of
//! the kernel. So every probe does the thing itself and undoes it. Probes that could hang or be killed run in a
//! child process: the caller starts itself again and calls [`child`] there, see [`supervise`].
//!
//! | module | tries |
//! |---|---|
//! | `kvm` | a small guest that runs what an unmodified kernel runs, step by step |
//! | `uffd` | a missing page, met in kernel mode, filled from user space |
//! | `net` | a tap device and nftables rules in a scratch network namespace |
//! | `cgroup` | cgroup v2 with the controllers that scopes need |
//! | `disk` | fallocate, hole punching and fdatasync where machines are kept |
//! | `kernel` | features that are used where they exist |
//! | `supervise` | children: time limit, last step, verdict |
//! | `sys` | all FFI |
//!
//! Printing is the caller's job.

mod cgroup;
mod disk;
mod kernel;
mod kvm;
mod net;
pub mod supervise;
mod sys;
mod uffd;

use serde::Serialize;
use std::path::Path;

/// The answer of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It works.
    Ok,
    /// It does not, and Torpor needs it.
    No,
    /// Good to know.
    Info,
}

/// One line of a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was tried.
    pub check: &'static str,
    /// Whether it works.
    pub verdict: Verdict,
    /// What came out, and what that means.
    pub meaning: String,
    /// What to do about a "no".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub what_to_do: Option<String>,
}

impl Finding {
    /// It works.
    #[must_use]
    pub fn ok(check: &'static str, meaning: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Ok,
            meaning: meaning.into(),
            what_to_do: None,
        }
    }

    /// It does not work; `what_to_do` about it.
    #[must_use]
    pub fn no(check: &'static str, meaning: impl Into<String>, what_to_do: impl Into<String>) -> Self {
        let what_to_do = Some(what_to_do.into());
        Self {
            check,
            verdict: Verdict::No,
            meaning: meaning.into(),
            what_to_do,
        }
    }

    /// Good to know.
    #[must_use]
    pub fn info(check: &'static str, meaning: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Info,
            meaning: meaning.into(),
            what_to_do: None,
        }
    }
}

/// Whether an unmodified kernel will run under this KVM.
#[must_use]
pub fn kvm() -> Vec<Finding> {
    vec![kvm::check()]
}

/// Whether missing guest pages can be filled from user space.
#[must_use]
pub fn userfaultfd() -> Vec<Finding> {
    vec![uffd::check()]
}

/// Whether a network namespace with a tap device can be made.
#[must_use]
pub fn tap() -> Vec<Finding> {
    vec![net::check_tap()]
}

/// Whether NAT rules can be made in a network namespace.
#[must_use]
pub fn nftables() -> Vec<Finding> {
    vec![net::check_nft()]
}

/// Whether executions can have cgroups of their own.
#[must_use]
pub fn cgroup() -> Vec<Finding> {
    vec![cgroup::check()]
}

/// Whether the disk under `state_dir` can hold images.
#[must_use]
pub fn disk(state_dir: &Path) -> Vec<Finding> {
    disk::check(state_dir)
}

/// Which kernel runs, and which features that are used where they exist.
#[must_use]
pub fn kernel() -> Vec<Finding> {
    kernel::check()
}

/// Runs one supervised probe in this process; answers with its exit code. See [`supervise`].
#[must_use]
pub fn child(probe: &str) -> u8 {
    match probe {
        kvm::CHILD => supervise::report(kvm::run()),
        uffd::CHILD => supervise::report(uffd::run()),
        net::TAP_CHILD => supervise::report(net::run_tap()),
        net::NFT_CHILD => supervise::report(net::run_nft()),
        _ => 2,
    }
}
