//! The guest's network: the same addresses in every machine, told to the kernel without any protocol.

use super::tolerate;
use crate::sys::route::Interfaces;
use std::fs;
use torpor_api::vmm::{GATEWAY_IP, GATEWAY_MAC, GUEST_IP, GUEST_PREFIX_LEN};

const LOOPBACK: &str = "lo";
const INTERFACE: &str = "eth0";

/// Loopback up; the interface up with its address, route and permanent neighbour.
pub fn bring_up() {
    let interfaces = match Interfaces::open() {
        Ok(interfaces) => interfaces,
        Err(error) => return tolerate("open a socket for interfaces", Err(error)),
    };
    tolerate("bring lo up", interfaces.bring_up(LOOPBACK));
    // Before it is up: router solicitations would keep an idle machine sending, and the slot has no IPv6.
    let ipv6 = format!("/proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6");
    if fs::exists(&ipv6).unwrap_or(false) {
        tolerate("turn IPv6 off on eth0", fs::write(&ipv6, "1"));
    }
    tolerate(
        "set the address of eth0",
        interfaces.set_address(INTERFACE, GUEST_IP, GUEST_PREFIX_LEN),
    );
    tolerate("bring eth0 up", interfaces.bring_up(INTERFACE));
    tolerate("add the default route", interfaces.add_default_route(GATEWAY_IP));
    tolerate(
        "add the gateway as a permanent neighbour",
        interfaces.add_permanent_neighbour(INTERFACE, GATEWAY_IP, GATEWAY_MAC),
    );
}
