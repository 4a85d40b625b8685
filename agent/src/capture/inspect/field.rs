//! Entries of maps as named fields.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Serialize, Serializer, ser::SerializeMap as _};

/// One value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(untagged)]
pub enum Field {
    /// A number.
    Number(u64),
    /// An address.
    Address(IpAddr),
    /// A network.
    Network(IpNet),
    /// A word of this program's.
    Word(&'static str),
    /// Words, such as the names of flags.
    Words(Vec<&'static str>),
    /// A name.
    Text(String),
    /// Numbers of something, such as one per processor.
    Numbers(Vec<u64>),
    /// Not known, or not there.
    Nothing,
}

impl Field {
    /// For a table.
    pub fn text(&self) -> String {
        match self {
            Self::Number(n) => n.to_string(),
            Self::Address(a) => a.to_string(),
            Self::Network(n) => n.to_string(),
            Self::Word(word) => (*word).to_owned(),
            Self::Words(words) if words.is_empty() => "-".to_owned(),
            Self::Words(words) => words.join(", "),
            Self::Text(text) => text.clone(),
            Self::Numbers(numbers) => numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(", "),
            Self::Nothing => "-".to_owned(),
        }
    }
}

impl From<Option<&str>> for Field {
    fn from(text: Option<&str>) -> Self {
        text.map_or(Self::Nothing, |t| Self::Text(t.to_owned()))
    }
}

/// Named values, in order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Fields(pub Vec<(&'static str, Field)>);

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, field) in &self.0 {
            map.serialize_entry(name, field)?;
        }
        map.end()
    }
}

/// An entry of a map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// What it is found by.
    pub key: Fields,
    /// What is found.
    pub value: Fields,
}
