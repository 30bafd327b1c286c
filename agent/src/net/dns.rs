//! Which resolver guests use.
//!
//! A guest asks 172.31.0.1, and its slot sends the query on to the first IPv4 nameserver of the host's
//! `/etc/resolv.conf`. One on the host itself (systemd-resolved, dnsmasq) is out of a guest's reach by design, so
//! then systemd-resolved's own upstreams are looked up, and if there are none, [`FALLBACK`] it is. A slot keeps
//! the resolver that it was made with.

use std::net::Ipv4Addr;
use std::path::Path;

/// The resolver of hosts whose own is nowhere to be found.
pub const FALLBACK: Ipv4Addr = Ipv4Addr::new(1, 1, 1, 1);
/// Where to look, in this order.
const SOURCES: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// The resolver for this host's guests.
#[must_use]
pub fn host_nameserver() -> Ipv4Addr {
    let texts = SOURCES
        .iter()
        .filter_map(|path| std::fs::read_to_string(Path::new(path)).ok());
    texts
        .filter_map(|text| first_nameserver(&text))
        .next()
        .unwrap_or_else(|| {
            tracing::warn!(%FALLBACK, "no resolver that guests can reach in /etc/resolv.conf");
            FALLBACK
        })
}

/// The first IPv4 nameserver of a `resolv.conf` that is not the host itself.
fn first_nameserver(resolv_conf: &str) -> Option<Ipv4Addr> {
    let mut words = resolv_conf.lines().map(str::split_whitespace);
    words.find_map(|mut line| {
        if line.next() != Some("nameserver") {
            return None;
        }
        let address: Ipv4Addr = line.next()?.parse().ok()?;
        (!address.is_loopback() && !address.is_unspecified()).then_some(address)
    })
}

#[cfg(test)]
mod tests {
    use super::first_nameserver;

    #[test]
    fn resolvers_on_the_host_itself_and_ipv6_ones_are_passed_over() {
        let text = "# comment\nsearch x\nnameserver 127.0.0.53\nnameserver fd00::1\n nameserver 10.1.2.3 \n";
        assert_eq!(first_nameserver(text), Some("10.1.2.3".parse().unwrap()));
        assert_eq!(
            first_nameserver("nameserver 127.0.0.1\nnameserver\nnameserver x"),
            None
        );
        assert_eq!(first_nameserver(""), None);
    }
}
