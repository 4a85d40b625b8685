//! The result of the plugins before, which is ours as well.

use std::{fmt, net::IpAddr};

use serde::{
    Deserialize, Serialize, Serializer,
    de::{Deserializer, MapAccess, Visitor},
    ser::SerializeMap as _,
};
use serde_json::value::RawValue;

/// A result, to be handed on as it was written.
#[derive(Debug)]
pub struct Previous<'a> {
    fields: Vec<(String, &'a RawValue)>,
    version: &'a str,
    /// The pod's.
    pub addresses: Vec<IpAddr>,
}

impl<'a> Previous<'a> {
    /// Reads a result; handed on, it is of this version.
    pub(super) fn parse(text: &'a str, version: &'a str) -> Result<Self, String> {
        let Ordered(fields) = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let Addresses { ips, interfaces } = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let mut addresses = Vec::new();
        for (index, ip) in ips.unwrap_or_default().iter().enumerate() {
            let interface = ip.interface.and_then(|index| interfaces.as_ref()?.get(index));
            // Plugins list interfaces of the host, too, and those may have addresses.
            if interface.is_some_and(|interface| interface.sandbox.as_deref().unwrap_or_default().is_empty()) {
                continue;
            }
            let address = ip.address.split('/').next().unwrap_or_default();
            let reason = |_| format!("ips[{index}].address: {:?} is no address such as 10.1.2.3/24", ip.address);
            addresses.push(address.parse().map_err(reason)?);
        }
        Ok(Self { fields, version, addresses })
    }
}

impl Serialize for Previous<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const VERSION: &str = "cniVersion";
        let mut map = serializer.serialize_map(None)?;
        if self.fields.iter().all(|(name, _)| name != VERSION) {
            map.serialize_entry(VERSION, self.version)?;
        }
        for (name, value) in &self.fields {
            match &**name {
                VERSION => map.serialize_entry(VERSION, self.version)?,
                name => map.serialize_entry(name, value)?,
            }
        }
        map.end()
    }
}

#[derive(Deserialize)]
struct Addresses {
    ips: Option<Vec<Ip>>,
    interfaces: Option<Vec<Interface>>,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    interface: Option<usize>,
}

#[derive(Deserialize)]
struct Interface {
    sandbox: Option<String>,
}

/// An object's fields in their order.
struct Ordered<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Ordered<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Fields).map(Ordered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed_on(text: &str, version: &str) -> String {
        serde_json::to_string(&Previous::parse(text, version).unwrap()).unwrap()
    }

    #[test]
    fn a_result_is_handed_on_as_it_was_written() {
        let text = r#"{"zebra":1.50,"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/run/netns/a"}],"ips":[{"address":"10.1.2.3/24","interface":0,"gateway":"10.1.2.1"}],"big":123456789012345678901234567890,"dns":{}}"#;
        assert_eq!(handed_on(text, "1.0.0"), text);
        assert_eq!(handed_on(text, "1.1.0"), text.replace("1.0.0", "1.1.0"));
        assert_eq!(handed_on(r#"{"dns":{}}"#, "0.4.0"), r#"{"cniVersion":"0.4.0","dns":{}}"#);
    }

    #[test]
    fn the_pods_addresses_are_found() {
        let of = |text| Previous::parse(text, "1.0.0").map(|previous| previous.addresses);
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let bridge = r#"{"interfaces":[{"name":"cni0"},{"name":"veth1","sandbox":""},{"name":"eth0","sandbox":"/n"}],
            "ips":[{"interface":2,"address":"10.1.2.3/24"},{"interface":0,"address":"10.1.2.1/24"},{"interface":1,"address":"10.1.2.9/24"},
                   {"interface":2,"address":"fd00::3/64"},{"version":"4","address":"10.1.2.4/32"},{"interface":7,"address":"10.1.2.5/32"}]}"#;
        let expected = ["10.1.2.3", "fd00::3", "10.1.2.4", "10.1.2.5"].map(address);
        assert_eq!(of(bridge).unwrap(), expected);
        for none in [r#"{"ips":[]}"#, r#"{"ips":null}"#, "{}"] {
            assert_eq!(of(none).unwrap(), [] as [IpAddr; 0], "{none}");
        }
        let error = of(r#"{"ips":[{"address":"10.1.2.3/24"},{"address":"10.1.2/24"}]}"#).unwrap_err();
        assert_eq!(error, "ips[1].address: \"10.1.2/24\" is no address such as 10.1.2.3/24");
        for text in ["[]", "1", "\"a\"", r#"{"ips":{}}"#, r#"{"ips":[{}]}"#] {
            assert!(of(text).is_err(), "{text}");
        }
    }
}
