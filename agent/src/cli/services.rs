//! `underpass services`.

use std::process::ExitCode;

use clap::Args;

use super::{
    agent::AgentArgs,
    exit::EXIT_CODES_CHECK,
    output::{Columns, Style, View, list, more},
    show::{ShowArgs, show},
};
use crate::{
    admin::{
        api::{DEFAULT_LIMIT, MAX_LIMIT},
        inventory::{ServiceInfo, Services},
    },
    mesh::{Protocol, ServicePort},
};

/// Arguments of `underpass services`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_CHECK}

PORTS are those of the service and, behind a colon, those of its endpoints. ENDPOINTS
counts workloads, and in parentheses those that are reached in plaintext.

Examples:
  underpass services
  underpass services -o json | jq '.services[] | select(.endpoints_total == 0) | .hostname'"))]
pub(super) struct ServicesArgs {
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    show: ShowArgs,
    /// List at most this many.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_LIMIT as u32, value_parser = clap::value_parser!(u32).range(1..=MAX_LIMIT as i64))]
    limit: u32,
}

pub(super) fn services(args: &ServicesArgs) -> anyhow::Result<ExitCode> {
    let agent = args.agent.asker()?;
    show(&args.show, || agent.ask(async |a| a.services(args.limit as usize).await))
}

impl View for Services {
    fn table(&self, style: Style) -> String {
        if self.services.is_empty() {
            return "no services: the configuration names none".to_owned();
        }
        let headings = ["SERVICE", "HOSTNAME", "VIPS", "PORTS", "ENDPOINTS"];
        let mut columns = Columns::new(style, &headings, &["WORKLOADS"]);
        for s in &self.services {
            let plain = s.endpoints.iter().filter(|e| e.protocol == Protocol::Plain).count();
            let endpoints = if plain > 0 {
                format!("{} ({plain} plain)", s.endpoints_total)
            } else {
                s.endpoints_total.to_string()
            };
            let mut workloads = list(s.endpoints.iter().map(|e| &e.workload));
            if s.endpoints_total > s.endpoints.len() {
                workloads.push_str(", ...");
            }
            columns.row([
                &s.service,
                &s.hostname,
                &list(&s.vips),
                &list(s.ports.iter().copied().map(port)),
                &endpoints,
                &workloads,
            ]);
        }
        let mut text = columns.text();
        more(&mut text, self.services.len(), self.total, "services");
        text
    }

    fn problems(&self) -> Vec<String> {
        let problem = |s: &ServiceInfo| match &s.awaited {
            Some(endpoint) => Some(format!("{}: {endpoint} is not known; connections wait for it", s.service)),
            None if s.endpoints_total == 0 => {
                Some(format!("{} has no endpoint; connections to it are reset", s.service))
            }
            None => None,
        };
        self.services.iter().filter_map(problem).collect()
    }
}

fn port(p: ServicePort) -> String {
    if p.port == p.target_port { p.port.to_string() } else { format!("{}:{}", p.port, p.target_port) }
}
