//! The rules and every query of the dashboard, in a Prometheus that scrapes two agents at work.
//!
//! Needs root, and `prometheus` with its `promtool`. Not a part of the end-to-end tests because it says nothing about kernels.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testbed::{Agent, AgentOptions, MeshConfig, Node, Pod, Process, Testbed, addresses::pod_v4, pace, underpass_path};

/// Where Prometheus listens, in a node's namespace.
const PROMETHEUS: &str = "127.0.0.1:9090";
/// Samples are taken every second, so this has enough of them for a rate.
const RATE_INTERVAL: &str = "10s";
/// How long Prometheus may take until everything asked for is there.
const WITHIN: Duration = Duration::from_mins(2);

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/underpass/files").join(name)
}

/// A panel's title and what it asks.
fn queries() -> Result<Vec<(String, String)>> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(file("dashboard.json"))?)?;
    let panels = dashboard["panels"].as_array().context("panels")?;
    let mut queries = Vec::new();
    for panel in panels {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().context("expr")?;
            let expression = expression.replace("$__rate_interval", RATE_INTERVAL).replace("$instance", ".*");
            ensure!(!expression.contains('$'), "a variable that nobody defines: {expression}");
            queries.push((panel["title"].as_str().context("title")?.to_owned(), expression));
        }
    }
    ensure!(queries.len() > 30, "{} queries", queries.len());
    Ok(queries)
}

/// A client that is let in, one that is not, a server, and agents of both nodes.
struct World {
    agents: [Agent; 2],
    client: Pod,
    stranger: Pod,
    server: Pod,
    _echo: Process,
    bed: Testbed,
}

impl World {
    fn new() -> Result<Self> {
        let bed = Testbed::new("dash")?;
        let (a, b) = (bed.node("a"), bed.node("b"));
        let (client, stranger, server) = (a.pod("client")?, a.pod("stranger")?, b.pod("server")?);
        let mut mesh = MeshConfig::new(bed.dir().join("ca"));
        for pod in [&client, &stranger, &server] {
            mesh.enroll(pod);
        }
        let rules = json!([{ "from": [{ "source": { "notPrincipals": ["cluster.local/ns/default/sa/stranger"] } }] }]);
        mesh.policies.push(json!({ "name": "known", "namespace": "default", "action": "ALLOW", "rules": rules }));
        let start = |node: &Node| {
            let arguments = vec!["--metrics-addr=[::]:15020".to_owned()];
            let options = AgentOptions { arguments, ..AgentOptions::default() };
            Agent::start(node, &underpass_path()?, &mesh.document(node), options)
        };
        let agents = [start(a)?, start(b)?];
        let echo = server.app(&["serve", "[::]:8080"])?;
        echo.wait_json("listening", Duration::from_secs(20))?;
        Ok(Self { agents, client, stranger, server, _echo: echo, bed })
    }

    /// One connection of each kind.
    fn traffic(&self) -> Result<()> {
        let to = format!("{}:8080", self.server.ipv4());
        let request = |pod: &Pod| pod.app(&["request", &to])?.output(Duration::from_mins(1));
        ensure!(request(&self.client)?.status.success(), "{}", self.agents[0].log());
        ensure!(!request(&self.stranger)?.status.success(), "the stranger was let in");
        Ok(())
    }
}

/// Starts Prometheus on node a: it scrapes both agents and evaluates the rules.
fn prometheus(bed: &Testbed) -> Result<Process> {
    let node = bed.node("a");
    let directory = node.dir("prometheus")?;
    let config = directory.join("prometheus.yaml");
    let targets = [1, 2].map(|index| format!("{}:15020", pod_v4(0, index)));
    let document = json!({
        "global": { "scrape_interval": "1s", "evaluation_interval": "1s" },
        "rule_files": [file("rules.yaml")],
        "scrape_configs": [{ "job_name": "underpass", "static_configs": [{ "targets": targets }] }],
    });
    fs::write(&config, document.to_string())?;
    let mut check = Command::new("promtool");
    Process::spawn(check.args(["check", "config"]).arg(&config))?.output(Duration::from_secs(30))?.success()?;
    let mut command = node.command("prometheus");
    command
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
        .arg(format!("--web.listen-address={PROMETHEUS}"));
    let process = Process::spawn(&mut command)?;
    process.wait_line("Server is ready to receive web requests", Duration::from_mins(1))?;
    Ok(process)
}

/// Asks its API.
fn ask(node: &Node, path: &str, parameters: &[(&str, &str)]) -> Result<Value> {
    let mut curl = node.command("curl");
    curl.args(["-sS", "--get", &format!("http://{PROMETHEUS}/api/v1/{path}")]);
    for (name, value) in parameters {
        curl.arg("--data-urlencode").arg(format!("{name}={value}"));
    }
    let answer = Process::spawn(&mut curl)?.output(Duration::from_secs(30))?.success()?;
    let mut answer: Value = serde_json::from_str(&answer).with_context(|| answer.clone())?;
    ensure!(answer["status"] == "success", "{path} {parameters:?}: {answer}");
    Ok(answer["data"].take())
}

/// What a query gives now, as numbers.
fn values(node: &Node, query: &str) -> Result<Vec<f64>> {
    let data = ask(node, "query", &[("query", query)])?;
    let result = data["result"].as_array().with_context(|| format!("{query}: {data}"))?;
    let value = |sample: &Value| Ok(sample["value"][1].as_str().context("a value")?.parse()?);
    result.iter().map(value).collect()
}

#[test]
fn every_query_finds_what_it_asks_for_and_every_rule_can_be_evaluated() -> Result<()> {
    let queries = queries()?;
    let world = World::new()?;
    let _prometheus = prometheus(&world.bed)?;
    let node = world.bed.node("a");
    let within = pace::patience(WITHIN);
    let deadline = Instant::now() + within;
    let mut empty;
    loop {
        world.traffic()?;
        empty = Vec::new();
        for (title, query) in &queries {
            let found = values(node, query).with_context(|| format!("panel {title:?}"))?;
            if found.is_empty() || found.iter().any(|value| value.is_nan()) {
                empty.push(format!("{title}: {query}: {found:?}"));
            }
        }
        if empty.is_empty() {
            break;
        }
        ensure!(Instant::now() < deadline, "nothing within {within:?}:\n{}", empty.join("\n"));
    }
    ensure!(values(node, "count(up == 1)")? == [2.0], "both are scraped");
    // What happened is what is shown: everything went through tunnels, and the stranger was denied.
    ensure!(values(node, &queries[0].1)? == [1.0], "mTLS coverage");
    let denied = r#"sum(istio_tcp_connections_failed_total{response_flags="DENY",source_principal=~".*/stranger"})"#;
    ensure!(values(node, denied)?.iter().sum::<f64>() >= 1.0);
    let records = r#"count({__name__=~"underpass:.*"})"#;
    ensure!(values(node, records)?.iter().sum::<f64>() >= 3.0, "recorded");

    let rules = ask(node, "rules", &[])?;
    let groups = rules["groups"].as_array().context("groups")?;
    let rules: Vec<_> = groups.iter().flat_map(|group| group["rules"].as_array().into_iter().flatten()).collect();
    ensure!(rules.len() >= 20, "{} rules", rules.len());
    for rule in rules {
        ensure!(rule["health"] == "ok", "{rule}");
        ensure!(rule["state"] != "firing", "nothing is wrong: {rule}");
    }
    Ok(())
}

#[test]
fn alerts_fire_when_they_should() -> Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dashboards");
    let mut command = Command::new("promtool");
    command.args(["test", "rules", "rules_test.yaml"]).current_dir(directory);
    let output = Process::spawn(&mut command)?.output(Duration::from_mins(1))?;
    ensure!(output.status.success(), "{}{}", output.stdout, output.stderr);
    Ok(())
}
