//! Slots with real packets: a private network namespace plays the host, another the world outside, and a guest
//! is a namespace whose tap is wired to the slot's. Needs root and `nft`; touches nothing of the real host.

#[path = "../../tests/shared/own_host.rs"]
mod own_host;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use torpor_api::vmm::{GATEWAY_IP, GATEWAY_MAC, GUEST_IP, GUEST_MAC, GUEST_PREFIX_LEN};

use own_host::{in_namespaces, runtime};

use super::links::Links;
use super::pool::{SlotLease, SlotPool};
use super::{NetConfig, NetError, namespace, sys, uplink_addresses};
use crate::machine::hypervisor::ConnectError;

const HOST_OUT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const WORLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// How long something must not happen.
const NEVER: Duration = Duration::from_millis(400);
const SOON: Duration = Duration::from_secs(10);

/// A network namespace that lives as long as this.
struct Netns(File);

impl Netns {
    fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            netlink(async |links| {
                up(&links, "lo", None).await;
            });
            namespace::current().unwrap()
        });
        Self(made.join().unwrap())
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            namespace::enter(&self.0).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(inside).join().unwrap())
    }

    fn listen(&self, port: u16) -> TcpListener {
        self.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap())
    }

    fn connects(&self, to: Ipv4Addr, port: u16, limit: Duration) -> bool {
        self.run(|| TcpStream::connect_timeout(&SocketAddr::from((to, port)), limit).is_ok())
    }
}

fn netlink(work: impl AsyncFnOnce(Links)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .unwrap();
    runtime.block_on(async { work(Links::open().unwrap()).await });
}

async fn up(links: &Links, name: &str, mac: Option<[u8; 6]>) -> u32 {
    let index = links.index(name).await.unwrap().unwrap();
    links.set_up(index, mac).await.unwrap();
    index
}

/// A guest's kernel: a namespace with a tap of its own, and a thread that carries frames to and from the slot's.
struct Guest {
    net: Netns,
    tap: OwnedFd,
    stop: Option<OwnedFd>,
    wire: Option<std::thread::JoinHandle<()>>,
}

impl Guest {
    fn attach(slot: &SlotLease) -> Self {
        let net = Netns::new();
        let tap = net.run(|| {
            let tap = sys::open_tap("eth0").unwrap();
            netlink(async |links| {
                let index = up(&links, "eth0", Some(GUEST_MAC)).await;
                links
                    .add_address(index, GUEST_IP, GUEST_PREFIX_LEN)
                    .await
                    .unwrap();
                links.add_neighbour(index, GATEWAY_IP, GATEWAY_MAC).await.unwrap();
                links.add_default_route(GATEWAY_IP).await.unwrap();
            });
            tap
        });
        let mut guest = Self {
            net,
            tap,
            stop: None,
            wire: None,
        };
        guest.run(slot);
        guest
    }

    /// A VMM carries its frames from now on.
    fn run(&mut self, slot: &SlotLease) {
        let tap = File::from(self.tap.try_clone().unwrap());
        let slot_tap = File::from(slot.tap_for_vmm().unwrap());
        let (stopped, stop) = nix::unistd::pipe().unwrap();
        self.stop = Some(stop);
        self.wire = Some(std::thread::spawn(move || carry(&tap, &slot_tap, &stopped)));
    }

    /// The VMM is gone; what the guest's kernel knows stays.
    fn pause(&mut self) {
        self.stop = None;
        if let Some(wire) = self.wire.take() {
            wire.join().unwrap();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.pause();
    }
}

fn carry(a: &File, b: &File, stopped: &OwnedFd) {
    let mut frame = vec![0; 65_536 + 12];
    loop {
        let mut fds = [a.as_fd(), b.as_fd(), stopped.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut fds, PollTimeout::NONE).unwrap();
        if fds[2].any().unwrap() {
            return;
        }
        for (mut from, mut to) in [(a, b), (b, a)] {
            while let Ok(n) = from.read(&mut frame) {
                // A full queue drops, as a network does.
                let _ = to.write(&frame[..n]);
            }
        }
    }
}

/// Run `test` on a host of its own that has a world outside.
fn on_a_host(test: impl AsyncFnOnce(&NetConfig, &Netns) + Send + 'static) {
    in_namespaces(move || {
        let dir = tempfile::tempdir().unwrap();
        let world = Netns::new();
        runtime().block_on(async {
            let links = Links::open().unwrap();
            up(&links, "lo", None).await;
            links.add_veth("out0", "wan0", &world.0).await.unwrap();
            let out = up(&links, "out0", None).await;
            links.add_address(out, HOST_OUT, 24).await.unwrap();
            world.run(|| {
                netlink(async |links| {
                    let wan = up(&links, "wan0", None).await;
                    links.add_address(wan, WORLD, 24).await.unwrap();
                    links.add_address(wan, METADATA, 32).await.unwrap();
                    links.add_default_route(HOST_OUT).await.unwrap();
                });
            });
            links.add_default_route(WORLD).await.unwrap();
            let config = NetConfig {
                netns_dir: dir.path().join("netns"),
                max_slots: 8,
                spares: 1,
                nameserver: WORLD,
            };
            test(&config, &world).await;
            assert_nothing_left(&config, &links).await;
        });
    });
}

async fn assert_nothing_left(config: &NetConfig, links: &Links) {
    let left: Vec<_> = std::fs::read_dir(&config.netns_dir).unwrap().collect();
    assert!(left.is_empty(), "namespaces left: {left:?}");
    let names = links.names().await.unwrap();
    assert!(
        !names.iter().any(|name| name.starts_with("tpr")),
        "links left: {names:?}"
    );
}

async fn start(config: &NetConfig) -> SlotPool {
    SlotPool::start(config.clone(), &BTreeSet::new()).await.unwrap()
}

async fn accept(listener: TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let (stream, _) = tokio::time::timeout(SOON, listener.accept())
        .await
        .unwrap()
        .unwrap();
    let stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream
}

#[test]
fn a_connect_reaches_the_guest_and_a_closed_port_is_refused() {
    on_a_host(async |config, _| {
        let pool = start(config).await;
        let slot = pool.acquire().await.unwrap();
        let guest = Guest::attach(&slot);
        let server = guest.net.listen(8080);
        let client = slot.connect(8080).await.unwrap();
        let mut served = accept(server).await;
        assert_eq!(served.peer_addr().unwrap().ip(), IpAddr::V4(GATEWAY_IP));
        served.write_all(b"hi").unwrap();
        client.readable().await.unwrap();
        let mut bytes = [0; 2];
        assert_eq!(client.try_read(&mut bytes).unwrap(), 2);
        let refused = slot.connect(8081).await;
        assert!(
            matches!(refused, Err(ConnectError::Refused { port: 8081 })),
            "{refused:?}"
        );
        drop((guest, slot));
        pool.close().await;
    });
}

#[test]
fn a_connection_through_a_parked_slot_goes_on_with_the_next_vmm() {
    on_a_host(async |config, _| {
        let pool = start(config).await;
        let slot = pool.acquire().await.unwrap();
        let mut guest = Guest::attach(&slot);
        let server = guest.net.listen(8080);
        let mut client = slot.connect(8080).await.unwrap();
        let mut served = accept(server).await;
        let mut bytes = [0; 5];
        for n in 0..2_u8 {
            guest.pause();
            // What is sent meanwhile is not lost.
            assert_eq!(client.try_write(b"ping").unwrap(), 4);
            assert!(super::unacknowledged_bytes(client.as_fd()).unwrap() >= 4);
            guest.run(&slot);
            client.writable().await.unwrap();
            assert_eq!(client.try_write(&[n]).unwrap(), 1);
            served.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, &[b'p', b'i', b'n', b'g', n]);
            served.write_all(b"pong").unwrap();
            tokio::io::AsyncReadExt::read_exact(&mut client, &mut bytes[..4])
                .await
                .unwrap();
            assert_eq!(&bytes[..4], b"pong");
        }
        drop((guest, slot));
        pool.close().await;
    });
}

#[test]
fn a_guest_reaches_the_outside_but_not_the_host_nor_metadata_nor_other_slots() {
    on_a_host(async |config, world| {
        let pool = start(config).await;
        let slot = pool.acquire().await.unwrap();
        let neighbour = pool.acquire().await.unwrap();
        let (guest, other) = (Guest::attach(&slot), Guest::attach(&neighbour));
        let _everywhere = world.listen(80);
        let _host = TcpListener::bind("0.0.0.0:81").unwrap();
        let _other = other.net.listen(82);
        let (host_ip, slot_ip) = uplink_addresses(slot.number());
        let (_, neighbour_ip) = uplink_addresses(neighbour.number());

        assert!(
            guest.net.connects(WORLD, 80, SOON),
            "the outside must be in reach"
        );
        assert!(
            world.connects(HOST_OUT, 81, SOON),
            "the host's server must be in the world's reach"
        );
        for own in [HOST_OUT, host_ip] {
            assert!(
                !guest.net.connects(own, 81, NEVER),
                "the host's {own} is in reach"
            );
        }
        assert!(world.connects(METADATA, 80, SOON), "the metadata server must run");
        assert!(!guest.net.connects(METADATA, 80, NEVER), "metadata is in reach");
        assert!(neighbour.connect(82).await.is_ok(), "the neighbour must listen");
        assert!(
            !guest.net.connects(neighbour_ip, 82, NEVER),
            "another slot is in reach"
        );
        for slot_address in [slot_ip, neighbour_ip] {
            assert!(
                !world.connects(slot_address, 82, NEVER),
                "a slot is in the world's reach"
            );
        }
        drop((guest, other, slot, neighbour));
        pool.close().await;
    });
}

#[test]
fn a_packet_with_another_source_than_the_guests_own_never_leaves() {
    on_a_host(async |config, world| {
        let pool = start(config).await;
        let slot = pool.acquire().await.unwrap();
        let guest = Guest::attach(&slot);
        let _server = world.listen(80);
        assert!(guest.net.connects(WORLD, 80, SOON));
        guest.net.run(|| {
            netlink(async |links| {
                let lo = links.index("lo").await.unwrap().unwrap();
                links
                    .add_address(lo, Ipv4Addr::new(203, 0, 113, 9), 32)
                    .await
                    .unwrap();
            });
            let socket = UdpSocket::bind("203.0.113.9:5000").unwrap();
            socket.send_to(b"spoofed", (WORLD, 5001)).unwrap();
        });
        let listener = world.run(|| UdpSocket::bind("0.0.0.0:5001").unwrap());
        guest.net.run(|| {
            UdpSocket::bind("203.0.113.9:5000")
                .unwrap()
                .send_to(b"spoofed", (WORLD, 5001))
                .unwrap()
        });
        listener.set_read_timeout(Some(NEVER)).unwrap();
        assert!(listener.recv(&mut [0; 16]).is_err(), "a spoofed packet came out");
        guest.net.run(|| {
            UdpSocket::bind("172.31.0.2:5000")
                .unwrap()
                .send_to(b"own", (WORLD, 5001))
                .unwrap()
        });
        listener.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(listener.recv(&mut [0; 16]).unwrap(), 3);
        drop((guest, slot));
        pool.close().await;
    });
}

#[test]
fn dns_queries_to_the_gateway_reach_the_hosts_resolver_and_the_answer_comes_back() {
    on_a_host(async |config, world| {
        let pool = start(config).await;
        let slot = pool.acquire().await.unwrap();
        let guest = Guest::attach(&slot);
        let resolver = world.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
        let asker = guest.net.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        for socket in [&resolver, &asker] {
            socket.set_read_timeout(Some(SOON)).unwrap();
        }
        asker.send_to(b"query", (GATEWAY_IP, 53)).unwrap();
        let mut bytes = [0; 16];
        let (n, from) = resolver.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..n], from.ip()), (&b"query"[..], IpAddr::V4(HOST_OUT)));
        resolver.send_to(b"answer", from).unwrap();
        let (n, from) = asker.recv_from(&mut bytes).unwrap();
        assert_eq!(
            (&bytes[..n], from),
            (&b"answer"[..], SocketAddr::from((GATEWAY_IP, 53)))
        );
        drop((guest, slot));
        pool.close().await;
    });
}

#[test]
fn every_slot_can_be_lent_out_and_one_that_comes_back_is_made_anew() {
    on_a_host(async |config, _| {
        let config = &NetConfig {
            max_slots: 2,
            ..config.clone()
        };
        let pool = start(config).await;
        let (first, second) = (pool.acquire().await.unwrap(), pool.acquire().await.unwrap());
        assert_ne!(first.number(), second.number());
        assert!(matches!(
            pool.acquire().await,
            Err(NetError::Exhausted { max_slots: 2 })
        ));
        let (number, netns) = (first.number(), inode(config, first.number()));
        drop(first);
        let again = pool.acquire().await.unwrap();
        assert_eq!(again.number(), number);
        assert_ne!(inode(config, number), netns, "the namespace was not made anew");
        drop((again, second));
        pool.close().await;
    });
}

#[test]
fn a_kept_slot_survives_its_pool_and_a_start_removes_all_others() {
    on_a_host(async |config, _| {
        let pool = start(config).await;
        pool.settled().await;
        assert_eq!(pool.spares(), 1);
        let kept = pool.acquire().await.unwrap();
        let guest = Guest::attach(&kept);
        let server = guest.net.listen(8080);
        pool.settled().await;
        kept.keep();
        let number = kept.number();
        let netns = inode(config, number);
        // As if torpord had died: nothing is cleaned up.
        drop((kept, pool));

        let pool = SlotPool::start(config.clone(), &BTreeSet::from([number]))
            .await
            .unwrap();
        let adopted = pool.adopt(number).unwrap();
        adopted.keep();
        assert_eq!(inode(config, number), netns);
        adopted.connect(8080).await.unwrap();
        drop(server);
        pool.settled().await;
        let names = std::fs::read_dir(&config.netns_dir).unwrap();
        assert_eq!(names.count(), 2, "the adopted slot and one new spare");
        adopted.release();
        pool.close().await;
    });
}

fn inode(config: &NetConfig, number: u16) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(config.netns_path(number)).unwrap().ino()
}

#[test]
fn slots_have_addresses_of_their_own_up_to_the_last_one() {
    let all: BTreeSet<_> = (0..super::MAX_SLOTS).map(uplink_addresses).collect();
    assert_eq!(all.len(), usize::from(super::MAX_SLOTS));
    assert_eq!(uplink_addresses(0).0, Ipv4Addr::new(10, 200, 0, 1));
    assert_eq!(uplink_addresses(4095).1, Ipv4Addr::new(10, 200, 63, 254));
}
