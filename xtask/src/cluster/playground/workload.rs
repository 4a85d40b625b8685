//! The first deployment, which shows that the playground works.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use testbed::Namespace;

use super::{control::Kubectl, place::NODES, programs::Stage};

const MANIFEST: &str = include_str!("hello.yaml");
/// What the deployment's answers start with: a pod's name.
const ANSWER: &str = "hello-";
/// How long nodes may take to be ready, or pods to run, and how long kubectl waits before it is seen whether all programs run still.
const READY: Duration = Duration::from_mins(3);
const TURN: &str = "--timeout=3s";
/// How long kube-proxy may take to know of an endpoint, and each step of one try.
const REACHABLE: Duration = Duration::from_secs(30);
const TRY: Duration = Duration::from_secs(3);
/// The service's.
const PORT: u16 = 80;

/// Waits until all nodes are ready.
pub(super) fn nodes_ready(stage: &Stage<'_>, kubectl: &Kubectl) -> Result<()> {
    let mut arguments = vec!["wait", "--for=condition=Ready", TURN, "node"];
    arguments.extend(NODES);
    stage.wait("the nodes' readiness", READY, || kubectl.run(&arguments).map(|_| Some(())))
}

/// Starts the deployment and waits until it runs.
pub(super) fn deploy(stage: &Stage<'_>, kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(MANIFEST)?;
    let rollout = ["--namespace=playground", "rollout", "status", "deployment/hello", TURN];
    stage.wait("the deployment hello", READY, || kubectl.run(&rollout).map(|_| Some(())))
}

/// Asks the service at its virtual address from every node and from every pod; the address.
pub(super) fn check(stage: &Stage<'_>, kubectl: &Kubectl) -> Result<String> {
    let get = ["--namespace=playground", "get", "service", "hello", "--output=jsonpath={.spec.clusterIP}"];
    let address = kubectl.run(&get)?;
    let url = format!("http://{address}/");
    let target =
        SocketAddr::new(address.parse().with_context(|| format!("the service has no address but {address:?}"))?, PORT);
    for node in NODES {
        let namespace = Namespace::existing(&stage.place.namespace(node));
        let ask = || answer(&namespace.enter(|| get_page(target))??).map(Some);
        stage.wait(&format!("an answer of {url} on {node}"), REACHABLE, ask)?;
    }
    // A program of its own for the limit: with the option for it, this version of wget crashes.
    let wget = ["timeout", "3", "wget", "-q", "-O", "-", &url];
    let get = ["--namespace=playground", "get", "pods", "--selector=app=hello", "--output=name"];
    let pods = kubectl.run(&get)?;
    ensure!(pods.lines().count() == NODES.len(), "expected {} pods of hello, found: {pods}", NODES.len());
    for pod in pods.lines() {
        let exec: Vec<_> = ["--namespace=playground", "exec", pod, "--"].into_iter().chain(wget).collect();
        stage.wait(&format!("an answer of {url} in {pod}"), REACHABLE, || answer(&kubectl.run(&exec)?).map(Some))?;
    }
    Ok(address)
}

/// What a server's root page says.
fn get_page(server: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&server, TRY).with_context(|| format!("connecting to {server}"))?;
    stream.set_read_timeout(Some(TRY)).context("limiting a connection")?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").with_context(|| format!("asking {server}"))?;
    let mut text = String::new();
    // Pages of the deployment are a line long.
    stream.take(4096).read_to_string(&mut text).with_context(|| format!("reading what {server} says"))?;
    let (_, body) = text.split_once("\r\n\r\n").with_context(|| format!("{server} says {text:?}, which is no page"))?;
    Ok(body.to_owned())
}

fn answer(text: &str) -> Result<()> {
    ensure!(text.starts_with(ANSWER), "this is no answer of a pod of hello: {text:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{ANSWER, MANIFEST, answer};
    use crate::cluster::playground::images;

    #[test]
    fn the_deployment_uses_an_image_that_is_there() {
        assert!(MANIFEST.contains(&format!("image: {}", images::BUSYBOX)));
        assert!(MANIFEST.contains(&format!("name: {}", ANSWER.trim_end_matches('-'))));
    }

    #[test]
    fn other_answers_are_told_apart() {
        answer("hello-5d4-abc\n").unwrap();
        assert!(answer("").unwrap_err().to_string().contains("\"\""));
    }
}
