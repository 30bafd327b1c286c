//! Links, addresses, routes and neighbours of one network namespace, over one rtnetlink socket.
//!
//! The socket belongs to the namespace in which the thread was when it was made.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::{Error, Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// One rtnetlink socket.
pub(super) struct Links(Handle);

impl Links {
    /// A socket in the calling thread's namespace, driven by the current runtime.
    pub(super) fn open() -> std::io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// A veth pair: `name` here, `peer` in another namespace.
    pub(super) async fn add_veth(&self, name: &str, peer: &str, peer_netns: &File) -> Result<(), Error> {
        let peer_link = LinkMessageBuilder::<LinkUnspec>::new()
            .name(peer.to_owned())
            .setns_by_fd(peer_netns.as_raw_fd())
            .build();
        let pair = LinkVeth::new(name, peer).set_info_data(InfoData::Veth(InfoVeth::Peer(peer_link)));
        self.0.link().add(pair.build()).execute().await
    }

    /// Remove a link; no such link is no error.
    pub(super) async fn delete(&self, name: &str) -> Result<(), Error> {
        match self.index(name).await? {
            Some(index) => self.0.link().del(index).execute().await,
            None => Ok(()),
        }
    }

    /// Index of the link of this name.
    pub(super) async fn index(&self, name: &str) -> Result<Option<u32>, Error> {
        let mut links = self.0.link().get().match_name(name.to_owned()).execute();
        match links.try_next().await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(Error::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Names of all links.
    pub(super) async fn names(&self) -> Result<Vec<String>, Error> {
        let links: Vec<_> = self.0.link().get().execute().try_collect().await?;
        let names = links.into_iter().flat_map(|link| link.attributes);
        Ok(names
            .filter_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            })
            .collect())
    }

    /// Set a link up, with a MAC if given.
    pub(super) async fn set_up(&self, index: u32, mac: Option<[u8; 6]>) -> Result<(), Error> {
        let mut link = LinkUnspec::new_with_index(index);
        if let Some(mac) = mac {
            link = link.address(mac.to_vec());
        }
        self.0.link().set(link.up().build()).execute().await
    }

    /// Give a link an address.
    pub(super) async fn add_address(
        &self,
        index: u32,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> Result<(), Error> {
        self.0
            .address()
            .add(index, address.into(), prefix_len)
            .execute()
            .await
    }

    /// A neighbour whose MAC is known for good.
    pub(super) async fn add_neighbour(
        &self,
        index: u32,
        address: Ipv4Addr,
        mac: [u8; 6],
    ) -> Result<(), Error> {
        self.0
            .neighbours()
            .add(index, address.into())
            .link_layer_address(&mac)
            .execute()
            .await
    }

    /// Everything that has no better route goes to `gateway`.
    pub(super) async fn add_default_route(&self, gateway: Ipv4Addr) -> Result<(), Error> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
        self.0.route().add(route).execute().await
    }
}
