//! Addresses, routes and neighbours of network interfaces, by ioctl.

use super::checked;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

/// A socket to send interface ioctls through.
#[derive(Debug)]
pub struct Interfaces(OwnedFd);

impl Interfaces {
    /// Open the socket.
    pub fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Inet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        Ok(Self(fd))
    }

    /// Bring an interface up.
    pub fn bring_up(&self, name: &str) -> io::Result<()> {
        let mut request = named(name)?;
        // SAFETY: the socket is open, and SIOCGIFFLAGS reads the name of one ifreq and writes its flags.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })?;
        // SAFETY: SIOCGIFFLAGS filled this member of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let up = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(0);
        request.ifr_ifru.ifru_flags = flags | up;
        self.apply(libc::SIOCSIFFLAGS, &request)
    }

    /// Set an interface's address and prefix length.
    pub fn set_address(&self, name: &str, address: Ipv4Addr, prefix_len: u8) -> io::Result<()> {
        let mut request = named(name)?;
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.apply(libc::SIOCSIFADDR, &request)?;
        let shift = 32u32.saturating_sub(prefix_len.into());
        let mask = u32::MAX.checked_shl(shift).unwrap_or(0);
        request.ifr_ifru.ifru_addr = socket_address(Ipv4Addr::from_bits(mask));
        self.apply(libc::SIOCSIFNETMASK, &request)
    }

    /// Route everything that has no better route through this gateway.
    pub fn add_default_route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: rtentry is numbers, socket addresses and pointers, for all of which zero is valid.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: the socket is open, and SIOCADDRT reads one rtentry, whose device pointer is null.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SIOCADDRT, &raw const route) }).map(drop)
    }

    /// Know a neighbour's hardware address for ever, so that no ARP is ever needed.
    pub fn add_permanent_neighbour(&self, name: &str, address: Ipv4Addr, mac: [u8; 6]) -> io::Result<()> {
        const ATF_COM: libc::c_int = 0x02;
        const ATF_PERM: libc::c_int = 0x04;
        // SAFETY: arpreq is numbers and socket addresses, for all of which zero is valid.
        let mut request: libc::arpreq = unsafe { std::mem::zeroed() };
        request.arp_pa = socket_address(address);
        request.arp_ha.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in request.arp_ha.sa_data.iter_mut().zip(mac) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.arp_flags = ATF_COM | ATF_PERM;
        copy_name(&mut request.arp_dev, name)?;
        // SAFETY: the socket is open, and SIOCSARP reads one arpreq.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SIOCSARP, &raw const request) }).map(drop)
    }

    fn apply(&self, operation: libc::c_ulong, request: &libc::ifreq) -> io::Result<()> {
        // SAFETY: the socket is open, and every operation passed here reads one ifreq.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), operation, &raw const *request) }).map(drop)
    }
}

fn named(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is a name and a union of numbers, for all of which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    copy_name(&mut request.ifr_name, name)?;
    Ok(request)
}

fn copy_name(to: &mut [libc::c_char], name: &str) -> io::Result<()> {
    if name.len() >= to.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in to.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(())
}

/// An IPv4 address as the generic socket address of these ioctls: port, then address.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().skip(2).zip(address.octets()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    libc::sockaddr {
        sa_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or(0),
        sa_data: data,
    }
}
