//! The kernel's version, and features that Torpor uses where they exist. Nothing here is needed.

use crate::{Finding, sys};
use kvm_ioctls::Kvm;

const KVM_CAP_PRE_FAULT_MEMORY: std::ffi::c_ulong = 236;

pub(crate) fn check() -> Vec<Finding> {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    let release = release.unwrap_or_else(|errno| format!("unknown: {errno}"));
    let pre_fault = Kvm::new().is_ok_and(|kvm| kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY) > 0);
    vec![
        Finding::info("kernel", format!("Linux {release}")),
        Finding::info(
            "PAGEMAP_SCAN",
            there(
                sys::has_pagemap_scan(),
                "6.7",
                "finding written pages in one call",
            ),
        ),
        Finding::info(
            "KVM_PRE_FAULT_MEMORY",
            there(pre_fault, "6.11", "mapping a working set before the guest asks"),
        ),
    ]
}

fn there(is_there: bool, since: &str, what_for: &str) -> String {
    if is_there {
        format!("there: {what_for}")
    } else {
        format!("not there (Linux {since} has it): {what_for} is done another way")
    }
}
