//! Making and removing one slot; each runs on a thread of its own.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::oneshot;
use torpor_api::vmm::{GATEWAY_IP, GATEWAY_MAC, GUEST_IP, GUEST_MAC, GUEST_PREFIX_LEN};

use super::links::Links;
use super::{
    NetConfig, NetError, SLOT_PREFIX_LEN, TAP, UPLINK, namespace, rules, sys, uplink_addresses, uplink_name,
};

/// A slot, ready to carry a machine or carrying one.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) number: u16,
    pub(super) netns: Arc<File>,
    /// Absent in an adopted slot, whose VMM has the only one.
    pub(super) tap: Option<OwnedFd>,
}

fn os(number: u16, operation: &'static str) -> impl FnOnce(std::io::Error) -> NetError {
    move |source| NetError::Os {
        number,
        operation,
        source,
    }
}

fn netlink(number: u16, operation: &'static str) -> impl FnOnce(rtnetlink::Error) -> NetError {
    move |source| NetError::Netlink {
        number,
        operation,
        source: Box::new(source),
    }
}

/// Run `work` on a thread that is free to change its namespace.
pub(super) async fn on_own_thread<T: Send + 'static>(
    number: u16,
    work: impl FnOnce() -> Result<T, NetError> + Send + 'static,
) -> Result<T, NetError> {
    let (done, result) = oneshot::channel();
    std::thread::Builder::new()
        .name(format!("slot-{number}"))
        .spawn(move || {
            let _ = done.send(work());
        })
        .map_err(os(number, "start a thread"))?;
    result.await.map_err(|_| NetError::Lost { number })?
}

/// Make slot `number`. What an earlier one left under its names is removed. On an error nothing is left.
pub(super) fn create(config: &NetConfig, number: u16) -> Result<Slot, NetError> {
    let host_netns = namespace::current().map_err(os(number, "find the host's namespace"))?;
    let made = runtime(number)?.block_on(build(config, number, &host_netns));
    made.inspect_err(|_| {
        // Removal works from the host's namespace, which `build` may have left.
        let undone = namespace::enter(&host_netns)
            .map_err(os(number, "return to the host's namespace"))
            .and_then(|()| remove(config, number));
        if let Err(error) = undone {
            tracing::warn!(error = crate::execution::chain(&error), "half a slot is left");
        }
    })
}

/// Remove slot `number`: its uplink at once, its namespace when its last user lets go. No slot is no error.
pub(super) fn remove(config: &NetConfig, number: u16) -> Result<(), NetError> {
    let uplink = uplink_name(number);
    runtime(number)?.block_on(async {
        let links = Links::open().map_err(os(number, "open rtnetlink"))?;
        let deleted = links.delete(&uplink).await;
        deleted.map_err(netlink(number, "remove its uplink"))
    })?;
    namespace::remove(&config.netns_path(number)).map_err(os(number, "remove its namespace"))
}

/// The slot of a machine that runs already.
pub(super) fn adopt(config: &NetConfig, number: u16) -> Result<Slot, NetError> {
    let netns = File::open(config.netns_path(number)).map_err(os(number, "open its namespace"))?;
    Ok(Slot {
        number,
        netns: Arc::new(netns),
        tap: None,
    })
}

pub(super) fn runtime(number: u16) -> Result<tokio::runtime::Runtime, NetError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(os(number, "start a runtime"))
}

async fn build(config: &NetConfig, number: u16, host_netns: &File) -> Result<Slot, NetError> {
    let uplink = uplink_name(number);
    let (host_ip, slot_ip) = uplink_addresses(number);
    let host = Links::open().map_err(os(number, "open rtnetlink"))?;
    let stale = host.delete(&uplink).await;
    stale.map_err(netlink(number, "remove a stale uplink"))?;

    let netns = namespace::enter_new(&config.netns_path(number)).map_err(os(number, "make a namespace"))?;
    set_sysctls(number)?;
    let links = Links::open().map_err(os(number, "open rtnetlink inside"))?;
    let added = links.add_veth(UPLINK, &uplink, host_netns).await;
    added.map_err(netlink(number, "add its uplink"))?;
    let tap = sys::open_tap(TAP).map_err(os(number, "open its tap"))?;
    rules::apply(&format!("slot {number}"), &rules::slot_rules(config.nameserver))?;
    address_inside(&links, number)
        .await
        .map_err(netlink(number, "address its inside"))?;
    namespace::enter(host_netns).map_err(os(number, "return to the host's namespace"))?;
    disable_ipv6(number, &uplink)?;

    let outside = async {
        let index = host
            .index(&uplink)
            .await?
            .ok_or(rtnetlink::Error::RequestFailed)?;
        host.add_address(index, host_ip, SLOT_PREFIX_LEN).await?;
        host.set_up(index, None).await?;
        // Last of all, since it needs a carrier.
        links.add_default_route(host_ip).await
    };
    outside.await.map_err(netlink(number, "address its outside"))?;
    tracing::debug!(slot = number, %slot_ip, "network slot made");
    Ok(Slot {
        number,
        netns: Arc::new(netns),
        tap: Some(tap),
    })
}

async fn address_inside(links: &Links, number: u16) -> Result<(), rtnetlink::Error> {
    let missing = || rtnetlink::Error::RequestFailed;
    let (_, slot_ip) = uplink_addresses(number);
    let lo = links.index("lo").await?.ok_or_else(missing)?;
    links.set_up(lo, None).await?;
    let tap = links.index(TAP).await?.ok_or_else(missing)?;
    links.set_up(tap, Some(GATEWAY_MAC)).await?;
    links.add_address(tap, GATEWAY_IP, GUEST_PREFIX_LEN).await?;
    links.add_neighbour(tap, GUEST_IP, GUEST_MAC).await?;
    let uplink = links.index(UPLINK).await?.ok_or_else(missing)?;
    links.add_address(uplink, slot_ip, SLOT_PREFIX_LEN).await?;
    links.set_up(uplink, None).await
}

/// `/proc/sys/net` shows the namespace of the thread that opens a file there.
fn set_sysctls(number: u16) -> Result<(), NetError> {
    let write = |path: &str, value: &str| fs::write(path, value).map_err(os(number, "set a sysctl"));
    write("/proc/sys/net/ipv4/ip_forward", "1")?;
    for (path, value) in [
        ("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"),
        ("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"),
    ] {
        if fs::exists(path).unwrap_or(false) {
            write(path, value)?;
        }
    }
    Ok(())
}

/// The kernel must not answer on the uplink's link-local address.
fn disable_ipv6(number: u16, uplink: &str) -> Result<(), NetError> {
    let path = format!("/proc/sys/net/ipv6/conf/{uplink}/disable_ipv6");
    match fs::write(&path, "1") {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(os(number, "turn IPv6 off on its uplink")(error))
        }
        _ => Ok(()),
    }
}
