//! The network interfaces of a pod, and their coming and going.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    future::poll_fn,
    io,
    os::fd::AsRawFd as _,
    task::{Poll, ready},
};

use netlink_packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NlasIterator, parse_i32, parse_string, parse_u32,
};
use netlink_sys::{AsyncSocket, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE};
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkFlags, LinkHeader, LinkLayerType, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};
use tokio::runtime::Handle;
use tracing::{debug, warn};

use super::netns::{
    Netns,
    netlink::{self, Channel, messages},
};

/// `RTMGRP_LINK` of `linux/rtnetlink.h`: the multicast group of interface changes, as a bind mask.
const RTMGRP_LINK: u32 = 1;
/// `RTM_NEWLINK` and `RTM_DELLINK` of `linux/rtnetlink.h`.
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
/// Notifications thrown away at once, at most: a pod that makes them without end must not hold up the runtime.
const DRAIN: usize = 4096;
/// Attributes of `linux/if_link.h`. `IFLA_INFO_KIND` is nested in `IFLA_LINKINFO`.
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;

/// A network interface inside a pod, loopback excepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Do packets at tc begin with an Ethernet header? False for tun, ipip, sit, `WireGuard`, raw IP and the like: the network
    /// header comes first.
    pub link_header: bool,
    /// The kernel's word for what it is: `veth`, `netkit`, `macvlan`; absent for hardware, virtual
    /// functions included.
    pub kind: Option<String>,
    /// The interface below it, or the other end of the pair that it belongs to.
    pub other: Option<Other>,
}

/// An interface that another one belongs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Other {
    /// Its index in its own namespace.
    pub index: u32,
    /// The number under which the namespace of the interface that names it knows the other's
    /// namespace; `None` for the same namespace.
    pub namespace: Option<i32>,
}

/// Something happened to a pod's interfaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The interface is new, or has another name or header than before. After the kernel dropped notifications, every interface
    /// is reported again, because one may have been replaced by another with the same index: whatever has to be attached to
    /// it may be missing.
    New(Interface),
    /// The interface with this index is gone.
    Gone(u32),
}

/// The interfaces in the namespace now, up or down.
pub async fn list(netns: &Netns) -> io::Result<Vec<Interface>> {
    netns.try_run(list_here).await?
}

/// Reports every interface in the namespace as [`Change::New`], then what changes.
pub async fn watch(netns: &Netns) -> io::Result<Watch> {
    let runtime = Handle::current();
    let socket = netns
        .try_run(move || {
            // A netlink socket belongs to the namespace of the thread that opens it and to the runtime that polls it.
            let _context = runtime.enter();
            let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
            socket.socket_mut().bind(&SocketAddr::new(0, RTMGRP_LINK))?;
            io::Result::Ok(socket)
        })
        .await??;
    // Subscribed; listing only now means that nothing falls between the two.
    let mut watch =
        Watch { netns: netns.clone(), socket, known: BTreeMap::new(), pending: VecDeque::new(), resync: true };
    watch.resync().await?;
    Ok(watch)
}

thread_local! {
    /// For all subscriptions, of which a node may have a thousand, nearly always idle.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(netlink::BUFFER));
}

/// The next datagram, in memory of its own size.
async fn receive(socket: &mut TokioSocket) -> io::Result<Vec<u8>> {
    poll_fn(|context| {
        BUFFER.with_borrow_mut(|buffer| {
            buffer.clear();
            ready!(socket.poll_recv(context, buffer))?;
            Poll::Ready(Ok(buffer.clone()))
        })
    })
    .await
}

/// A subscription to the interfaces of a namespace.
pub struct Watch {
    netns: Netns,
    socket: TokioSocket,
    known: BTreeMap<u32, Interface>,
    /// Never more than what one datagram or one listing gave.
    pending: VecDeque<Change>,
    /// Notifications were lost and the list was not read again yet.
    resync: bool,
}

impl Watch {
    /// The next change; `None` (logged) when the subscription is lost for good. May be cancelled without losing anything.
    pub async fn next(&mut self) -> Option<Change> {
        loop {
            if let Some(change) = self.pending.pop_front() {
                return Some(change);
            }
            if let Err(error) = self.advance().await {
                warn!(netns = %self.netns.path().display(), %error, "interfaces of the pod are no longer watched");
                return None;
            }
        }
    }

    async fn advance(&mut self) -> io::Result<()> {
        if self.resync {
            return self.resync().await;
        }
        let datagram = match receive(&mut self.socket).await {
            Ok(datagram) => datagram,
            // The kernel dropped notifications because they were not read fast enough.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                debug!(netns = %self.netns.path().display(), "interface notifications lost; reading the list again");
                self.resync = true;
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error),
        };
        for message in messages::<Link>(&datagram) {
            match message.map(|message| message.payload) {
                Ok(NetlinkPayload::InnerMessage(link)) => apply(&mut self.known, &mut self.pending, link),
                Ok(_) => {}
                Err(error) => {
                    warn!(%error, "an interface notification cannot be read; reading the list again");
                    self.resync = true;
                }
            }
        }
        Ok(())
    }

    async fn resync(&mut self) -> io::Result<()> {
        // What is queued is older than the list that follows, and its sequel may be among what was lost.
        for _ in 0..DRAIN {
            let socket = self.socket.socket_ref();
            match BUFFER.with_borrow_mut(|buffer| {
                buffer.clear();
                socket.recv(buffer, libc::MSG_DONTWAIT)
            }) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                _ => {}
            }
        }
        let listed: BTreeMap<_, _> =
            list(&self.netns).await?.into_iter().map(|interface| (interface.index, interface)).collect();
        self.pending.extend(self.known.keys().filter(|index| !listed.contains_key(index)).copied().map(Change::Gone));
        self.pending.extend(listed.values().cloned().map(Change::New));
        self.known = listed;
        self.resync = false;
        Ok(())
    }
}

fn apply(known: &mut BTreeMap<u32, Interface>, pending: &mut VecDeque<Change>, link: Link) {
    match link {
        Link::Present(mut interface) => {
            // The end of a pair that goes last has no other one for a moment.
            if interface.other.is_none() {
                interface.other = known.get(&interface.index).and_then(|known| known.other);
            }
            if known.get(&interface.index) != Some(&interface) {
                known.insert(interface.index, interface.clone());
                pending.push_back(Change::New(interface));
            }
        }
        Link::Absent(index) => {
            if known.remove(&index).is_some() {
                pending.push_back(Change::Gone(index));
            }
        }
        Link::Irrelevant => {}
    }
}

/// An interface in the namespace of the calling thread; `None` when there is none with this index.
pub fn find_here(index: u32) -> io::Result<Option<Interface>> {
    let mut request = LinkMessage::default();
    request.header.index = index;
    match Channel::open(NETLINK_ROUTE)?.get(RouteNetlinkMessage::GetLink(request)) {
        Ok(Some(Link::Present(interface))) => Ok(Some(interface)),
        Ok(_) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The number under which the namespace of the calling thread knows another one, if it has one for
/// it.
pub fn namespace_number_here(netns: &Netns) -> io::Result<Option<i32>> {
    let mut request = NsidMessage::default();
    request.attributes.push(NsidAttribute::Fd(netns.descriptor().as_raw_fd().cast_unsigned()));
    let answer = Channel::open(NETLINK_ROUTE)?.get(RouteNetlinkMessage::GetNsId(request))?;
    let Some(RouteNetlinkMessage::NewNsId(answer)) = answer else { return Ok(None) };
    let number = answer.attributes.iter().find_map(|attribute| match attribute {
        NsidAttribute::Id(number) => Some(*number),
        _ => None,
    });
    // -1: none was given yet.
    Ok(number.filter(|number| *number >= 0))
}

/// Lists the interfaces in the namespace of the calling thread.
fn list_here() -> io::Result<Vec<Interface>> {
    let links = Channel::open(NETLINK_ROUTE)?.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(links
        .into_iter()
        .filter_map(|link| match link {
            Link::Present(interface) => Some(interface),
            Link::Absent(_) | Link::Irrelevant => None,
        })
        .collect())
}

/// A link message, read no further than needed: an attribute this program's libraries do not know must not hide an interface.
#[derive(Debug, PartialEq, Eq)]
enum Link {
    Present(Interface),
    Absent(u32),
    /// Loopback, or a message about something else of an interface.
    Irrelevant,
}

impl NetlinkDeserializable for Link {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        if !matches!(header.message_type, RTM_NEWLINK | RTM_DELLINK) {
            return Ok(Self::Irrelevant);
        }
        let link = LinkHeader::parse(payload)?;
        // A bridge sends RTM_DELLINK of family AF_BRIDGE for a port that only leaves the bridge.
        if link.interface_family != AddressFamily::Unspec || link.flags.contains(LinkFlags::Loopback) {
            return Ok(Self::Irrelevant);
        }
        if header.message_type == RTM_DELLINK {
            return Ok(Self::Absent(link.index));
        }
        let (mut name, mut kind, mut other, mut namespace) = (None, None, None, None);
        // The header is 16 bytes (struct ifinfomsg).
        for attribute in NlasIterator::new(&payload[16..]) {
            let attribute = attribute?;
            match attribute.kind() {
                IFLA_IFNAME => name = Some(parse_string(attribute.value())?),
                IFLA_LINK => other = Some(parse_u32(attribute.value())?),
                IFLA_LINK_NETNSID => namespace = Some(parse_i32(attribute.value())?),
                IFLA_LINKINFO => {
                    for nested in NlasIterator::new(attribute.value()) {
                        let nested = nested?;
                        if nested.kind() == IFLA_INFO_KIND {
                            kind = Some(parse_string(nested.value())?);
                        }
                    }
                }
                _ => {}
            }
        }
        let name = name.ok_or("a link message without a name")?;
        Ok(Self::Present(Interface {
            index: link.index,
            name,
            link_header: link.link_layer_type == LinkLayerType::Ether,
            kind,
            // Some drivers name themselves, or nothing.
            other: other
                .filter(|other| *other != 0 && (*other != link.index || namespace.is_some()))
                .map(|index| Other { index, namespace }),
        }))
    }
}

#[cfg(test)]
#[path = "netns_tests/interfaces.rs"]
mod tests;
