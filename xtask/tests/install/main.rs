//! Installing Underpass on a real Kubernetes: `cargo xtask cluster test`.
//!
//! Scenarios share one cluster of two nodes ([`cluster`]) and happen in order, as an administrator's year would; each leaves what the next one
//! expects ([`world`]). `install FILTER` runs those that set things up, and those whose name contains the filter.
//!
//! Needs root, the programs that `cargo xtask cluster parts --all` makes, and in the environment `UNDERPASS_BIN` (with `underpass-cni` beside it)
//! and `TESTBED_APP`, or both where cargo builds them.

mod cluster;
mod harness;
mod manifests;
mod scenarios;
mod traffic;
mod wait;
mod world;

use std::process::ExitCode;

use harness::Scenario;
use scenarios as s;

/// What happens, in order.
const SCENARIOS: &[Scenario] = &[
    Scenario { name: "installed_by_helm", needed: true, run: s::install::by_helm },
    Scenario { name: "tested_by_helm", needed: false, run: s::install::helm_test },
    Scenario { name: "a_label_encrypts_running_pods", needed: true, run: s::label::encrypts },
    Scenario { name: "pods_wait_for_their_agent", needed: false, run: s::cni::pods_wait_for_their_agent },
    Scenario {
        name: "agent_killed_while_pods_come_and_go",
        needed: false,
        run: s::cni::agent_killed_while_pods_come_and_go,
    },
    Scenario { name: "put_back_when_others_write", needed: false, run: s::cni::put_back_when_others_write },
    Scenario { name: "probes_of_strict_pods", needed: false, run: s::probes::of_strict_pods },
    Scenario { name: "scaled_under_traffic", needed: false, run: s::scale::under_traffic },
    Scenario { name: "a_node_starts_anew", needed: false, run: s::reboot::a_node_starts_anew },
    Scenario { name: "upgraded", needed: false, run: s::upgrade::to_another_image },
    Scenario { name: "without_privileges", needed: false, run: s::upgrade::without_privileges },
    Scenario { name: "failed_upgrades_are_rolled_back", needed: false, run: s::upgrade::rolled_back },
    Scenario { name: "a_label_removed_and_added", needed: false, run: s::label::removed_and_added },
    Scenario { name: "uninstalled", needed: false, run: s::uninstall::leaves_nothing },
];

fn main() -> ExitCode {
    harness::main(SCENARIOS)
}
