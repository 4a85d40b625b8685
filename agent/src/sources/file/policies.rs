//! `policies` of the document.

use serde_saphyr::Spanned;

use super::{
    ConfigError,
    fields::Check,
    labels::labels,
    policy_values::{EMPTY_LIST, block, list, namespace, port, principal, service_account, values},
    schema::{self, Strings},
    yaml::quoted,
};
use crate::mesh::{Action, Condition, Operation, Policy, PolicyKey, Rule, Scope, SnapshotBuilder, Source};

/// Conditions of Istio's API that need HTTP or are not supported, before a `[` that may follow.
const UNSUPPORTED_KEYS: [&str; 8] = [
    "connection.sni",
    "remote.ip",
    "request.auth.audiences",
    "request.auth.claims",
    "request.auth.presenter",
    "request.auth.principal",
    "request.headers",
    "source.trustDomain",
];

/// Adds policies one by one.
pub(super) struct Policies<'a> {
    check: Check<'a>,
    root_namespace: &'a str,
}

impl<'a> Policies<'a> {
    pub(super) fn new(check: Check<'a>, root_namespace: &'a str) -> Self {
        Self { check, root_namespace }
    }

    pub(super) fn add(
        &self,
        builder: &mut SnapshotBuilder,
        index: usize,
        entry: &Spanned<schema::Policy>,
    ) -> Result<(), ConfigError> {
        let p = &entry.value;
        let at = |field: &str| format!("policies[{index}].{field}");
        let policy = self.policy(&at, p)?;
        builder.policy(policy).map_err(|e| self.check.wrong(&p.name, &at("name"), e))
    }

    /// Checks a policy; `at` makes the path of one of its fields.
    pub(super) fn policy(&self, at: &impl Fn(&str) -> String, p: &schema::Policy) -> Result<Policy, ConfigError> {
        let check = self.check;
        check.name("name", &at("name"), &p.name)?;
        check.name("namespace", &at("namespace"), &p.namespace)?;
        let action = match p.action {
            schema::Action::Allow => Action::Allow,
            schema::Action::Deny => Action::Deny,
            schema::Action::Audit => Action::Audit,
            schema::Action::Custom => Action::Custom,
        };
        if let Some(provider) = &p.provider
            && action != Action::Custom
        {
            let problem = format!("a provider goes with action CUSTOM, and the action is {action}; remove it");
            return Err(check.wrong(provider, &at("provider"), problem));
        }
        let own_namespace = p.namespace.value.as_str();
        let rules = p.rules.iter().enumerate();
        Ok(Policy {
            key: PolicyKey { namespace: own_namespace.into(), name: p.name.value.as_str().into() },
            scope: if own_namespace == self.root_namespace { Scope::Mesh } else { Scope::Namespace },
            selector: labels(check, &at("selector.matchLabels"), &p.selector.match_labels)?,
            action,
            dry_run: p.dry_run,
            rules: rules
                .map(|(i, rule)| RuleReader { check, own_namespace }.rule(&at(&format!("rules[{i}]")), rule))
                .collect::<Result<_, _>>()?,
            invalid: None,
        })
    }
}

/// Reads the rules of one policy.
#[derive(Clone, Copy)]
struct RuleReader<'a> {
    check: Check<'a>,
    own_namespace: &'a str,
}

impl RuleReader<'_> {
    fn rule(self, at: &str, rule: &schema::Rule) -> Result<Rule, ConfigError> {
        let mut out = Rule::default();
        for (i, from) in self.entries(&format!("{at}.from"), rule.from.as_ref())?.iter().enumerate() {
            let source = self.source(&format!("{at}.from[{i}].source"), &from.source, &mut out)?;
            out.from.push(source);
        }
        for (i, to) in self.entries(&format!("{at}.to"), rule.to.as_ref())?.iter().enumerate() {
            let operation = self.operation(&format!("{at}.to[{i}].operation"), &to.operation, &mut out)?;
            out.to.push(operation);
        }
        for (i, condition) in self.entries(&format!("{at}.when"), rule.when.as_ref())?.iter().enumerate() {
            if let Some(condition) = self.condition(&format!("{at}.when[{i}]"), condition, &mut out)? {
                out.when.push(condition);
            }
        }
        out.unsupported.sort();
        out.unsupported.dedup();
        Ok(out)
    }

    fn entries<'b, T>(self, field: &str, list: Option<&'b Spanned<Vec<T>>>) -> Result<&'b [T], ConfigError> {
        match list {
            Some(list) if list.value.is_empty() => Err(self.check.wrong(list, field, EMPTY_LIST)),
            Some(list) => Ok(&list.value),
            None => Ok(&[]),
        }
    }

    fn source(self, at: &str, source: &Spanned<schema::Source>, rule: &mut Rule) -> Result<Source, ConfigError> {
        let (check, s) = (self.check, &source.value);
        let unsupported = self.unsupported(at, &s.unsupported(), rule)?;
        let out = Source {
            principals: values(
                check,
                at,
                [("principals", &s.principals), ("notPrincipals", &s.not_principals)],
                |text| principal(check, text),
            )?,
            namespaces: values(
                check,
                at,
                [("namespaces", &s.namespaces), ("notNamespaces", &s.not_namespaces)],
                |text| namespace(check, text),
            )?,
            service_accounts: values(
                check,
                at,
                [("serviceAccounts", &s.service_accounts), ("notServiceAccounts", &s.not_service_accounts)],
                |text| service_account(check, self.own_namespace, text),
            )?,
            ip_blocks: values(check, at, [("ipBlocks", &s.ip_blocks), ("notIpBlocks", &s.not_ip_blocks)], |text| {
                block(check, text)
            })?,
        };
        if out == Source::default() && !unsupported {
            let problem = "the source has no field; give it one, like principals or namespaces, or remove from";
            return Err(check.wrong(source, at, problem));
        }
        Ok(out)
    }

    fn operation(
        self,
        at: &str,
        operation: &Spanned<schema::Operation>,
        rule: &mut Rule,
    ) -> Result<Operation, ConfigError> {
        let (check, o) = (self.check, &operation.value);
        let unsupported = self.unsupported(at, &o.unsupported(), rule)?;
        let ports = values(check, at, [("ports", &o.ports), ("notPorts", &o.not_ports)], |text| port(check, text))?;
        if ports.is_unset() && !unsupported {
            let problem = "the operation has no field; give it ports or notPorts, or remove to";
            return Err(check.wrong(operation, at, problem));
        }
        Ok(Operation { ports })
    }

    /// Notes fields that are there but cannot be evaluated; `true` when there are any.
    fn unsupported(
        self,
        at: &str,
        fields: &[(&'static str, &Option<Strings>)],
        rule: &mut Rule,
    ) -> Result<bool, ConfigError> {
        let mut any = false;
        for (name, strings) in fields {
            let strings = list(self.check, &format!("{at}.{name}"), strings.as_ref(), |_| Ok(()))?;
            if !strings.is_empty() {
                rule.unsupported.push((*name).into());
                any = true;
            }
        }
        Ok(any)
    }

    /// `None` for a condition that cannot be evaluated; it is noted in the rule.
    fn condition(
        self,
        at: &str,
        condition: &schema::Condition,
        rule: &mut Rule,
    ) -> Result<Option<Condition>, ConfigError> {
        let (check, key) = (self.check, &condition.key);
        let lists = [("values", &condition.values), ("notValues", &condition.not_values)];
        if condition.values.is_none() && condition.not_values.is_none() {
            let problem = "the condition has neither values nor notValues; give it one of them";
            return Err(check.wrong(key, at, problem));
        }
        let of_namespace = |text: (&str, &Spanned<String>)| namespace(check, text);
        Ok(Some(match key.value.as_str() {
            "source.ip" => Condition::SourceIp(values(check, at, lists, |t| block(check, t))?),
            "source.namespace" => Condition::SourceNamespace(values(check, at, lists, of_namespace)?),
            "source.principal" => Condition::SourcePrincipal(values(check, at, lists, |t| principal(check, t))?),
            "source.serviceAccount" => {
                let account = |t: (&str, &Spanned<String>)| service_account(check, self.own_namespace, t);
                Condition::SourceServiceAccount(values(check, at, lists, account)?)
            }
            "destination.ip" => Condition::DestinationIp(values(check, at, lists, |t| block(check, t))?),
            "destination.port" => Condition::DestinationPort(values(check, at, lists, |t| port(check, t))?),
            other => {
                let name = other.split('[').next().unwrap_or(other);
                let Some(known) = UNSUPPORTED_KEYS.iter().find(|k| **k == name) else {
                    let problem = format!(
                        "{} is no condition; write one of source.ip, source.namespace, source.principal, source.serviceAccount, destination.ip, destination.port",
                        quoted(other)
                    );
                    return Err(check.wrong(key, &format!("{at}.key"), problem));
                };
                values(check, at, lists, |_| Ok(()))?;
                rule.unsupported.push((*known).into());
                return Ok(None);
            }
        }))
    }
}
