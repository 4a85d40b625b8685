//! What an authority's refusal means for whoever runs the node.

use std::error::Error;

use tonic::{Code, Status};

use crate::mesh::IstioCa;

/// Longest part of a foreign message that is repeated, characters.
const MAX_MESSAGE: usize = 300;

/// Is the connection, rather than the request, what failed?
pub(super) fn is_transport(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown)
}

/// What was said, and what to do.
pub(super) fn explain(status: &Status, ca: &IstioCa) -> String {
    let said = said(status);
    match status.code() {
        Code::Unauthenticated => format!(
            "the token is not accepted: {said}; the audience of issuer.istio.tokenFile ({}) must be the authority's \
             (underpass-ca, or istio-ca for istiod), and the agent's ServiceAccount the one it expects",
            ca.token_file.display()
        ),
        Code::PermissionDenied => {
            format!(
                "it refuses: {said}; it signs for pods that run on this agent's node only, and only for its trust domain"
            )
        }
        Code::ResourceExhausted => format!("it is busy: {said}; this is tried again"),
        Code::InvalidArgument => format!("it does not understand the request: {said}; is it a newer or older version?"),
        Code::Unimplemented => {
            format!("it has no certificate service: {said}; correct issuer.istio.address")
        }
        Code::DeadlineExceeded | Code::Cancelled => format!("no answer in time: {said}; this is tried again"),
        Code::Unavailable | Code::Unknown => format!(
            "no connection: {said}; issuer.istio.address must be reachable, its certificate be issued for the address' \
             host (or issuer.istio.serverName) and lead to a root in issuer.istio.rootFile ({})",
            ca.root_file.display()
        ),
        code => format!("{code:?}: {said}"),
    }
}

/// The message with its causes; a failed connection has nothing but those.
fn said(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = status.source();
    while let Some(error) = cause {
        let error_text = error.to_string();
        if !text.contains(&error_text) {
            text = if text.is_empty() { error_text } else { format!("{text}: {error_text}") };
        }
        cause = error.source();
    }
    if text.is_empty() {
        text = "without a reason".into();
    }
    text.chars().take(MAX_MESSAGE).collect()
}
