//! The pinned maps and how full they are.

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use aya::maps::MapData;
use serde::Serialize;

use super::{
    entries::{self, Fullest},
    is_ours, layouts, version,
};
use crate::capture::{
    CaptureError,
    maps::{PINNED, chain},
    pins::{self, Layout},
};

/// Every pinned map.
#[derive(Debug, Clone, Serialize)]
pub struct Maps {
    /// Where was looked.
    pub pin_root: String,
    /// By version, this program's own first, then by name.
    pub maps: Vec<MapRow>,
}

/// One pinned map.
#[derive(Debug, Clone, Serialize)]
pub struct MapRow {
    /// Its name.
    pub map: String,
    /// ABI hash of the version that pinned it.
    pub version: String,
    /// Whether that is this program's version, so that it can tell what is in there.
    pub own: bool,
    /// The kernel's number of it.
    pub id: Option<u32>,
    /// The kernel's name of its type.
    pub kind: Option<String>,
    /// Bytes of a key.
    pub key_size: Option<u32>,
    /// Bytes of a value.
    pub value_size: Option<u32>,
    /// Entries in it now.
    pub entries: Option<usize>,
    /// The pod with most entries, in a map that pods share.
    pub fullest: Option<Fullest>,
    /// Most entries; bytes for a ring buffer, 0 when it grows with sockets.
    pub max_entries: Option<u32>,
    /// Bytes of kernel memory, as the kernel accounts them.
    pub memory: Option<u64>,
    /// Why it is not as it should be.
    pub problem: Option<String>,
}

/// Why the entries of a map cannot be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotListed {
    /// It is stored with sockets.
    Sockets,
    /// It is a queue.
    Queue,
}

impl NotListed {
    /// Of this map, if so.
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "SOCKETS" => Some(Self::Sockets),
            "EVENTS" => Some(Self::Queue),
            _ => None,
        }
    }

    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sockets => {
                "its entries are stored with sockets and found by a socket's descriptor only; they cannot be listed"
            }
            Self::Queue => {
                "it is a queue that the agent reads; reading it here would take events from the agent, see the agent's log for them"
            }
        }
    }
}

/// What is pinned under `pin_root`. A map that cannot be opened has a problem; so has one that is missing.
pub fn maps(pin_root: &Path) -> Result<Maps, CaptureError> {
    let mut rows = Vec::new();
    for (layout, own) in layouts(pin_root)? {
        let mut names: Vec<String> = pins::list(&layout.maps())?
            .iter()
            .filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned()))
            .collect();
        if own {
            names.extend(PINNED.iter().map(|(name, ..)| (*name).to_owned()));
        }
        names.sort();
        names.dedup();
        rows.extend(names.iter().map(|name| row(&layout, name)));
    }
    Ok(Maps { pin_root: pin_root.display().to_string(), maps: rows })
}

fn row(layout: &Layout, name: &str) -> MapRow {
    let mut row = MapRow {
        map: name.to_owned(),
        version: version(layout),
        own: is_ours(layout),
        id: None,
        kind: None,
        key_size: None,
        value_size: None,
        entries: None,
        fullest: None,
        max_entries: None,
        memory: None,
        problem: None,
    };
    let opened = MapData::from_pin(layout.map(name)).and_then(|data| Ok((data.info()?, data)));
    let (info, data) = match opened {
        Ok(opened) => opened,
        Err(e) => {
            row.problem = Some(format!("cannot be opened: {}", chain(&e)));
            return row;
        }
    };
    row.id = Some(info.id());
    row.kind = info.map_type().ok().map(|kind| format!("{kind:?}"));
    row.key_size = Some(info.key_size());
    row.value_size = Some(info.value_size());
    row.max_entries = Some(info.max_entries());
    row.memory = memory(&data);
    row.entries = entries::count(layout, name);
    row.fullest = if row.own { entries::fullest(layout, name) } else { None };
    let expected = PINNED.iter().find(|(n, ..)| *n == name).filter(|_| row.own);
    row.problem = expected.and_then(|(_, key, value, entries)| {
        let found = (info.key_size() as usize, info.value_size() as usize, info.max_entries() as usize);
        (found != (*key, *value, *entries))
            .then(|| format!("sizes of key, value and map are {found:?}, not {:?}", (key, value, entries)))
    });
    row
}

/// `memlock` of the descriptor's `fdinfo` (`Documentation/bpf/`, `bpf_map_show_fdinfo`).
fn memory(data: &MapData) -> Option<u64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", data.fd().as_fd().as_raw_fd())).ok()?;
    info.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
}
