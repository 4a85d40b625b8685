//! Values in the rules of policies. What can never match is refused: in a DENY it would deny nothing, silently.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_saphyr::Spanned;

use super::{ConfigError, fields::Check, schema::Strings, yaml::quoted};
use crate::mesh::{ServiceAccount, SpiffeId, StringMatch, Values, canonical_block, check_name};

/// One value of a list, with the field it is in.
pub(super) type Text<'a> = (&'a str, &'a Spanned<String>);

/// A list and its negation. `at` is the path before the names.
pub(super) fn values<T>(
    check: Check<'_>,
    at: &str,
    [(wanted, any_of), (excluded, none_of)]: [(&str, &Option<Strings>); 2],
    convert: impl Fn(Text<'_>) -> Result<T, ConfigError>,
) -> Result<Values<T>, ConfigError> {
    Ok(Values {
        any_of: list(check, &format!("{at}.{wanted}"), any_of.as_ref(), &convert)?,
        none_of: list(check, &format!("{at}.{excluded}"), none_of.as_ref(), &convert)?,
    })
}

/// An absent list has no values. A list without values is refused: templates that come out empty would otherwise open
/// what they were meant to restrict.
pub(super) fn list<T>(
    check: Check<'_>,
    field: &str,
    list: Option<&Strings>,
    convert: impl Fn(Text<'_>) -> Result<T, ConfigError>,
) -> Result<Vec<T>, ConfigError> {
    let Some(list) = list else { return Ok(Vec::new()) };
    if list.value.is_empty() {
        return Err(check.wrong(list, field, EMPTY_LIST));
    }
    let one = |(i, text): (usize, &Spanned<String>)| {
        let field = format!("{field}[{i}]");
        if text.value.is_empty() {
            return Err(check.wrong(text, &field, "the value is empty; write one, or remove it from the list"));
        }
        convert((&field, text))
    };
    list.value.iter().enumerate().map(one).collect()
}

/// Said of every list that is there and holds nothing.
pub(super) const EMPTY_LIST: &str =
    "the list is empty, which would mean that anything matches; list at least one value, or remove the field";

/// `TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`, its beginning, its end, or `*`.
pub(super) fn principal(check: Check<'_>, (field, text): Text<'_>) -> Result<StringMatch, ConfigError> {
    let value = &text.value;
    let problem = if value.starts_with("spiffe://") {
        format!("{} has spiffe:// before it; write it without", quoted(value))
    } else {
        let pattern = pattern(check, (field, text), |b| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_' | b'/')
        })?;
        if !matches!(pattern, StringMatch::Exact(_)) || format!("spiffe://{value}").parse::<SpiffeId>().is_ok() {
            return Ok(pattern);
        }
        format!(
            "{} is no principal; write TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT, or put * at its beginning or end",
            quoted(value)
        )
    };
    Err(check.wrong(text, field, problem))
}

/// A namespace, its beginning, its end, or `*`.
pub(super) fn namespace(check: Check<'_>, (field, text): Text<'_>) -> Result<StringMatch, ConfigError> {
    let pattern =
        pattern(check, (field, text), |b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-'))?;
    if matches!(pattern, StringMatch::Exact(_)) {
        check.name("namespace", field, text)?;
    }
    Ok(pattern)
}

fn pattern(check: Check<'_>, (field, text): Text<'_>, allowed: fn(u8) -> bool) -> Result<StringMatch, ConfigError> {
    let pattern = StringMatch::parse(&text.value);
    let literal = match &pattern {
        StringMatch::Exact(s) | StringMatch::Prefix(s) | StringMatch::Suffix(s) => s.as_bytes(),
        StringMatch::Present => &[],
    };
    let value = quoted(&text.value);
    if literal.contains(&b'*') {
        let problem = format!(
            "{value} would never match: only one * is special, at the beginning or at the end; write several values instead"
        );
        return Err(check.wrong(text, field, problem));
    }
    if !literal.iter().all(|b| allowed(*b)) {
        let problem = format!("{value} would never match: it has a character that no identity has; correct it");
        return Err(check.wrong(text, field, problem));
    }
    Ok(pattern)
}

/// `NAMESPACE/ACCOUNT`, or `ACCOUNT` in the policy's namespace.
pub(super) fn service_account(
    check: Check<'_>,
    own_namespace: &str,
    (field, text): Text<'_>,
) -> Result<ServiceAccount, ConfigError> {
    let (namespace, name) = text.value.split_once('/').unwrap_or((own_namespace, &text.value));
    if check_name("namespace", namespace).is_err() || check_name("service account", name).is_err() {
        let problem = format!(
            "{} is no service account; write NAMESPACE/NAME, or NAME for one in namespace {own_namespace}, without wildcards",
            quoted(&text.value)
        );
        return Err(check.wrong(text, field, problem));
    }
    Ok(ServiceAccount { namespace: namespace.into(), name: name.into() })
}

/// An address or a network. Bits beyond its length are ignored, as in Istio.
pub(super) fn block(check: Check<'_>, (field, text): Text<'_>) -> Result<IpNet, ConfigError> {
    let value = &text.value;
    let block = value.parse::<IpNet>().ok().or_else(|| value.parse::<IpAddr>().ok().map(IpNet::from));
    block.map(canonical_block).ok_or_else(|| {
        let problem = format!(
            "{} is no address and no network; write one like 10.0.0.1, 10.0.0.0/16 or \"fd00::/64\"",
            quoted(value)
        );
        check.wrong(text, field, problem)
    })
}

/// A port. Istio writes ports as strings; numbers do as well.
pub(super) fn port(check: Check<'_>, (field, text): Text<'_>) -> Result<u16, ConfigError> {
    let digits = !text.value.is_empty() && text.value.bytes().all(|b| b.is_ascii_digit());
    match text.value.parse::<u16>() {
        Ok(port) if digits && port > 0 => Ok(port),
        _ => {
            let problem = format!("{} is no port; write a whole number from 1 to 65535", quoted(&text.value));
            Err(check.wrong(text, field, problem))
        }
    }
}
