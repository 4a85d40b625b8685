//! `underpass certificates`.

use std::{
    fmt::Write as _,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::Args;
use serde::Serialize;

use super::{
    agent::AgentArgs,
    exit::EXIT_CODES_CHECK,
    output::{Columns, NONE, Style, View, age, list, shown},
    show::{ShowArgs, show},
};
use crate::admin::inventory::{CertificateDetails, CertificateInfo, Certificates};

/// Arguments of `underpass certificates`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_CHECK}

Keys are never shown: the agent does not give them away. A certificate is renewed when
half of its life is over.

Examples:
  underpass certificates
  underpass certificates --check --expires-within 30m
  underpass certificates -o json | jq '.certificates[] | select(.certificate == null) | .identity'"))]
pub(super) struct CertificatesArgs {
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    show: ShowArgs,
    /// For --check, a certificate that ends within this time is a problem [default: 5m].
    #[arg(long, value_name = "DURATION", requires = "check", value_parser = humantime::parse_duration)]
    expires_within: Option<Duration>,
}

/// The answer, and when it is looked at.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    pub(super) certificates: Certificates,
    #[serde(skip)]
    pub(super) now: SystemTime,
    #[serde(skip)]
    pub(super) expires_within: Duration,
}

pub(super) fn certificates(args: &CertificatesArgs) -> anyhow::Result<ExitCode> {
    let agent = args.agent.asker()?;
    show(&args.show, || {
        Ok(Report {
            certificates: agent.ask(async |a| a.certificates().await)?,
            now: SystemTime::now(),
            expires_within: args.expires_within.unwrap_or(Duration::from_mins(5)),
        })
    })
}

impl Report {
    /// How long the certificate is still valid; nothing when it is not, or when its end cannot be read.
    fn left(&self, details: &CertificateDetails) -> Option<Duration> {
        humantime::parse_rfc3339(&details.status.not_after).ok()?.duration_since(self.now).ok()
    }

    fn row(&self, columns: &mut Columns, c: &CertificateInfo) {
        let workloads = list(&c.workloads);
        let Some(details) = &c.certificate else {
            let mut cells = vec![c.identity.as_str(), "missing"];
            cells.extend([NONE; 4]);
            cells.push(&workloads);
            cells.extend([NONE; 4]);
            columns.row(cells);
            return;
        };
        let (left, chain) = (self.left(details), details.chain.to_string());
        columns.row([
            c.identity.as_str(),
            if left.is_some() { "valid" } else { "expired" },
            &details.status.not_after,
            &left.map_or_else(|| NONE.to_owned(), |left| age(left.as_secs_f64())),
            &details.issuer,
            &details.status.serial,
            &workloads,
            &details.status.not_before,
            &details.key,
            &chain,
            &list(&details.roots),
        ]);
    }
}

impl View for Report {
    fn table(&self, style: Style) -> String {
        let all = &self.certificates;
        let mut text = format!("trust domain {}, certificates from {}\n", shown(&all.trust_domain), shown(&all.source));
        if all.certificates.is_empty() {
            text.push_str("no certificates: no workload of this node is in the mesh\n");
            return text;
        }
        let headings = ["IDENTITY", "STATE", "VALID UNTIL", "LEFT", "ISSUER", "SERIAL"];
        let mut columns = Columns::new(style, &headings, &["WORKLOADS", "VALID FROM", "KEY", "CHAIN", "ROOTS"]);
        for c in &all.certificates {
            self.row(&mut columns, c);
        }
        let _ = write!(text, "\n{}", columns.text());
        text
    }

    fn problems(&self) -> Vec<String> {
        let problem = |c: &CertificateInfo| match &c.certificate {
            None => Some(format!(
                "{} has no valid certificate, so connections of {} are refused; the agent's log says why none was issued",
                c.identity,
                list(&c.workloads)
            )),
            Some(d) if self.left(d).is_none_or(|left| left < self.expires_within) => Some(format!(
                "the certificate of {} ends at {}; the agent's log says why it was not renewed",
                c.identity, d.status.not_after
            )),
            Some(_) => None,
        };
        self.certificates.certificates.iter().filter_map(problem).collect()
    }
}
