//! Packet rules, as `nft` text: one table on the host, one in each slot.
//!
//! Both sides refuse on their own what a guest must not reach; neither trusts the other.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use torpor_api::vmm::{GATEWAY_IP, GUEST_IP};

use super::{NetError, TAP, UPLINK, UPLINK_BASE, UPLINK_PREFIX_LEN};

/// What the names of all uplinks on the host begin with.
pub const UPLINK_NAME_PREFIX: &str = "tpr";

/// Rules of the host: guests get out, not in, not to the host and not to each other.
#[must_use]
pub fn host_rules() -> String {
    let uplinks = format!("\"{UPLINK_NAME_PREFIX}*\"");
    let net = format!("{UPLINK_BASE}/{UPLINK_PREFIX_LEN}");
    format!(
        r"table inet torpor {{}}
delete table inet torpor
table inet torpor {{
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname {uplinks} ct state established,related accept
        iifname {uplinks} drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname {uplinks} oifname {uplinks} drop
        iifname {uplinks} ip saddr != {net} drop
        iifname {uplinks} ip daddr {{ 169.254.0.0/16, {net} }} drop
        iifname {uplinks} meta nfproto ipv6 drop
        iifname {uplinks} accept
        oifname {uplinks} ct state established,related accept
        oifname {uplinks} drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {net} oifname != {uplinks} masquerade
    }}
}}
"
    )
}

/// Rules of a slot: only the guest's own address gets out, only replies get in, DNS goes to `nameserver`.
#[must_use]
pub fn slot_rules(nameserver: Ipv4Addr) -> String {
    let net = format!("{UPLINK_BASE}/{UPLINK_PREFIX_LEN}");
    format!(
        r#"table inet torpor {{
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname "{TAP}" ip daddr {GATEWAY_IP} udp dport 53 dnat ip to {nameserver}
        iifname "{TAP}" ip daddr {GATEWAY_IP} tcp dport 53 dnat ip to {nameserver}
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        iifname "{TAP}" ip saddr {GUEST_IP} ip daddr {GATEWAY_IP} icmp type echo-request accept
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        ip daddr {{ 169.254.0.0/16, {net} }} drop
        iifname "{TAP}" oifname "{UPLINK}" ip saddr {GUEST_IP} accept
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "{UPLINK}" masquerade
    }}
}}
"#
    )
}

/// Give `rules` to the kernel, in the network namespace of the calling thread. Starts a process.
pub(super) fn apply(scope: &str, rules: &str) -> Result<(), NetError> {
    let failed = |source| NetError::Host {
        operation: "run nft",
        source,
    };
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let written = nft
        .stdin
        .take()
        .map(|mut stdin| stdin.write_all(rules.as_bytes()));
    let output = nft.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(NetError::Rules {
            scope: scope.to_owned(),
            stderr,
        });
    }
    written.unwrap_or(Ok(())).map_err(failed)
}
