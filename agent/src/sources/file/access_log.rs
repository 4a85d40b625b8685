//! `accessLog` of the document: which connections have a line in the access log.

use serde_saphyr::Spanned;

use super::{ConfigError, fields::Check, schema::AccessLog};
use crate::mesh::{AccessLogRule, AccessLogSettings};

/// Parts of a whole, in the model.
const WHOLE: f64 = 1_000_000.0;

/// Checks the section.
pub(super) fn settings(check: Check<'_>, section: &AccessLog) -> Result<AccessLogSettings, ConfigError> {
    let default = AccessLogRule {
        enabled: section.enabled,
        sample_ppm: sample(check, "accessLog.sample", section.sample.as_ref())?,
    };
    let mut settings = AccessLogSettings { default, ..AccessLogSettings::default() };
    for (i, namespace) in section.namespaces.iter().enumerate() {
        let field = format!("accessLog.namespaces[{i}]");
        let name = &namespace.name;
        check.name("namespace", &format!("{field}.name"), name)?;
        let rule = AccessLogRule {
            enabled: namespace.enabled,
            sample_ppm: sample(check, &format!("{field}.sample"), namespace.sample.as_ref())?,
        };
        if settings.namespaces.insert(name.value.as_str().into(), rule).is_some() {
            let problem = format!("namespace {} is listed twice; remove one", name.value);
            return Err(check.wrong(name, &format!("{field}.name"), problem));
        }
    }
    Ok(settings)
}

fn sample(check: Check<'_>, field: &str, value: Option<&Spanned<f64>>) -> Result<Option<u32>, ConfigError> {
    let Some(value) = value else { return Ok(None) };
    if !(0.0..=1.0).contains(&value.value) {
        let problem =
            format!("{} is no share of the connections; write a number from 0 (none) to 1 (all)", value.value);
        return Err(check.wrong(value, field, problem));
    }
    #[expect(clippy::cast_sign_loss, reason = "checked above")]
    Ok(Some((value.value * WHOLE).round() as u32))
}
