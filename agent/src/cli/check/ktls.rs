//! Kernel TLS, and what must not be combined with it.

use crate::{
    sys::bpf_probe::{self, SockmapRule},
    tunnel::{
        Suite,
        ktls::{Availability, Support},
    },
};

use super::row::{Check, Row};

/// What is used where kernel TLS is not, or not in full.
const INSTEAD: &str = "TLS in the agent (rustls): same protection, more copies";

pub(super) fn rows() -> [Row; 4] {
    let (ktls, ciphers, rekey) = (Check("ktls", false), Check("ktls-ciphers", false), Check("ktls-rekey", false));
    let sockmap = Check("ktls-sockmap", false);
    let support = Support::probe();
    if let Availability::Missing(why) = &support.availability {
        let without = |check: Check| check.degraded("no kernel TLS to try it on", INSTEAD);
        return [ktls.degraded(why, INSTEAD), without(ciphers), without(rekey), sockmap.ok("no kernel TLS")];
    }
    [
        ktls.ok("TCP_ULP tls on a connected socket"),
        cipher_row(ciphers, &support),
        rekey_row(rekey, &support),
        sockmap_row(sockmap),
    ]
}

fn cipher_row(check: Check, support: &Support) -> Row {
    let works = support.suites.iter().map(|suite: &Suite| suite.as_str()).collect::<Vec<_>>().join(", ");
    if support.refused.is_empty() {
        return check.ok(works);
    }
    let fails: Vec<_> = support.refused.iter().map(|(suite, why)| format!("{} ({why})", suite.as_str())).collect();
    let works = if works.is_empty() { "none" } else { &works };
    let instead = format!("suites that work are preferred; for the others, {INSTEAD}");
    check.degraded(format!("works: {works}; does not: {}", fails.join(", ")), instead)
}

fn rekey_row(check: Check, support: &Support) -> Row {
    const WITHOUT: &str = "connections end before the AEAD limit (some 270 GB one way with AES-GCM)";
    if support.rekey {
        check.ok("tried: keys can be replaced")
    } else {
        check.degraded("tried: keys cannot be replaced (it came with Linux 6.14)", WITHOUT)
    }
}

/// Underpass never does it; other programs on the node might.
fn sockmap_row(check: Check) -> Row {
    match bpf_probe::ktls_in_sockmap() {
        Ok(SockmapRule::Refused) => check.ok("the kernel refuses kernel TLS sockets in sockmaps"),
        Ok(SockmapRule::Allowed) => check.degraded(
            "the kernel lets a kernel TLS socket into a sockmap, where it can send plaintext or crash (CVE-2026-93824)",
            "Underpass never does that; update to 6.1.190, 6.12.111 or 7.2 lest other programs do",
        ),
        Err(e) => check.degraded(format!("could not be tried: {e}"), "Underpass uses no sockmap"),
    }
}
