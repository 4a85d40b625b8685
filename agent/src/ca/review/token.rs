//! What a token says about itself. Believed only where that makes an answer end earlier.

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::digest::{SHA256, digest as hash};

/// SHA-256 of a token.
pub(super) type Digest = [u8; 32];

pub(super) fn digest(token: &str) -> Digest {
    let mut digest = [0; 32];
    digest.copy_from_slice(hash(&SHA256, token.as_bytes()).as_ref());
    digest
}

/// When a JSON Web Token ends: its claim `exp`.
pub(super) fn end(token: &str) -> Option<SystemTime> {
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&claims).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(claims.get("exp")?.as_u64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_token() {
        let token = |claims: &str| format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(claims));
        assert_eq!(
            end(&token(r#"{"exp":1700000000}"#)),
            Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000))
        );
        for odd in ["", "a", "a.b", "a.e30", &token("[]"), &token(r#"{"exp":-1}"#), &token(r#"{"exp":"1"}"#)] {
            assert_eq!(end(odd), None, "{odd}");
        }
        assert!(end(&token(r#"{"exp":18446744073709551615}"#)).is_none_or(|end| end > SystemTime::now()));
    }
}
