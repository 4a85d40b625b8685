//! Names of services: `NAME.NAMESPACE.svc.cluster.local`, for nodes and pods.
//!
//! It knows cluster addresses of services and nothing else: no headless services, no ports, no other domains.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::network;

/// Where it listens.
const PORT: u16 = 53;
/// The domain of services.
pub(super) const DOMAIN: &str = "cluster.local";
/// How long after a watch has ended the next one begins.
const AGAIN: Duration = Duration::from_secs(1);
/// Seconds that an answer may be kept: services come and go.
const TTL: u32 = 1;
/// Header of a message (RFC 1035, section 4.1.1), and the longest over UDP.
const HEADER: usize = 12;
const LONGEST: usize = 512;
/// Type and class of a question for an IPv4 address.
const ADDRESS: [u8; 4] = [0, 1, 0, 1];

/// Addresses by name, in lower case.
type Names = BTreeMap<String, Ipv4Addr>;

#[derive(clap::Args)]
pub(in crate::cluster) struct Dns {
    #[arg(long)]
    kubectl: PathBuf,
    #[arg(long)]
    kubeconfig: PathBuf,
}

/// A change, as `kubectl get --watch --output-watch-events` prints it.
#[derive(Deserialize)]
struct Event {
    r#type: String,
    object: Service,
}

#[derive(Deserialize)]
struct Service {
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    namespace: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
}

/// Answers until it is killed. It runs in the control plane's namespace.
pub(in crate::cluster) fn run(options: &Dns) -> Result<()> {
    let address = SocketAddr::from((network::api(), PORT));
    let socket = UdpSocket::bind(address).with_context(|| format!("listening on {address}"))?;
    let names = Arc::new(Mutex::new(Names::new()));
    let (kubectl, kubeconfig, known) = (options.kubectl.clone(), options.kubeconfig.clone(), Arc::clone(&names));
    thread::spawn(move || {
        loop {
            let mut command = Command::new(&kubectl);
            command.arg("--kubeconfig").arg(&kubeconfig);
            command.args(["get", "services", "--all-namespaces", "--watch", "--output-watch-events", "--output=json"]);
            if let Err(error) = watch(&mut command, &known) {
                eprintln!("{error:#}");
            }
            thread::sleep(AGAIN);
        }
    });
    let mut buffer = [0; LONGEST];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).context("waiting for questions")?;
        let reply = reply(&buffer[..length], &names.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(reply) = reply {
            // It may have given up.
            let _ = socket.send_to(&reply, from);
        }
    }
}

/// Follows the services until kubectl ends, which it does when the API server wants it.
fn watch(command: &mut Command, names: &Mutex<Names>) -> Result<()> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting kubectl")?;
    let output = child.stdout.take().context("its output is piped")?;
    let result = serde_json::Deserializer::from_reader(output).into_iter::<Event>().try_for_each(|event| {
        note(event.context("reading what kubectl says")?, &mut names.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    });
    // Nobody reads it any more.
    let _ = child.kill();
    child.wait().context("waiting for kubectl")?;
    result
}

fn note(Event { r#type, object }: Event, names: &mut Names) {
    let name = format!("{}.{}.svc.{DOMAIN}", object.metadata.name, object.metadata.namespace);
    let address = object.spec.cluster_ip.and_then(|address| address.parse().ok());
    match address.filter(|_| r#type != "DELETED") {
        Some(address) => names.insert(name, address),
        None => names.remove(&name),
    };
}

/// The answer to one message; none to what is no question.
fn reply(message: &[u8], names: &Names) -> Option<Vec<u8>> {
    let (header, rest) = message.split_at_checked(HEADER)?;
    let is_response = header[2] & 0x80 != 0;
    let is_one_question = header[4..6] == [0, 1];
    if is_response || !is_one_question {
        return None;
    }
    let (name, length) = name(rest)?;
    let question = rest.get(..length + ADDRESS.len())?;
    let found = names.get(&name);
    let answer = found.filter(|_| question.ends_with(&ADDRESS));
    // A name without what was asked for exists all the same: no error then.
    let code = if found.is_some() { 0 } else { 3 };
    let mut reply = header[..2].to_vec();
    // Response, authoritative, recursion desired if the question said so.
    reply.extend([0x84 | (header[2] & 1), code, 0, 1, 0, u8::from(answer.is_some()), 0, 0, 0, 0]);
    reply.extend(question);
    if let Some(address) = answer {
        // The name is the one in the question: a pointer to it.
        reply.extend([0xc0, HEADER as u8]);
        reply.extend(ADDRESS);
        reply.extend(TTL.to_be_bytes());
        reply.extend([0, 4]);
        reply.extend(address.octets());
    }
    Some(reply)
}

/// The name that a question begins with, in lower case, and its length there.
fn name(question: &[u8]) -> Option<(String, usize)> {
    let (mut labels, mut at) = (Vec::new(), 0);
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            return Some((labels.join("."), at));
        }
        // Longer ones are pointers, which a first name has no use for.
        let label = question.get(at..at + length).filter(|_| length < 64)?;
        labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        at += length;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{HEADER, Names, note, reply};

    fn question(name: &str, kind: u8) -> Vec<u8> {
        let mut message = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(u8::try_from(label.len()).unwrap());
            message.extend(label.bytes());
        }
        message.extend([0, 0, kind, 0, 1]);
        message
    }

    fn event(kind: &str, address: &str) -> super::Event {
        let service = json!({ "metadata": { "name": "web", "namespace": "shop" }, "spec": { "clusterIP": address } });
        serde_json::from_value(json!({ "type": kind, "object": service })).unwrap()
    }

    #[test]
    fn services_have_names_while_they_exist() {
        let mut names = Names::new();
        note(event("ADDED", "10.96.0.7"), &mut names);
        let answer = reply(&question("Web.shop.svc.cluster.local", 1), &names).unwrap();
        assert_eq!(answer[..HEADER], [0xab, 0xcd, 0x85, 0, 0, 1, 0, 1, 0, 0, 0, 0]);
        assert!(answer.ends_with(&[0, 4, 10, 96, 0, 7]));
        let no_address = reply(&question("web.shop.svc.cluster.local", 28), &names).unwrap();
        assert_eq!(no_address[3..8], [0, 0, 1, 0, 0], "it exists, without an IPv6 address");
        note(event("DELETED", "10.96.0.7"), &mut names);
        assert_eq!(reply(&question("web.shop.svc.cluster.local", 1), &names).unwrap()[3], 3);
        note(event("ADDED", "None"), &mut names);
        assert!(names.is_empty());
    }

    #[test]
    fn what_is_no_question_has_no_answer() {
        let whole = question("web.shop.svc.cluster.local", 1);
        for length in 0..whole.len() {
            assert_eq!(reply(&whole[..length], &Names::new()), None, "{length}");
        }
        let mut response = whole.clone();
        response[2] |= 0x80;
        assert_eq!(reply(&response, &Names::new()), None);
        let mut pointer = whole;
        pointer[HEADER] = 0xc0;
        assert_eq!(reply(&pointer, &Names::new()), None);
    }
}
