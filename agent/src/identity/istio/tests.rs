use std::{collections::HashMap, path::PathBuf, time::Duration};

use prost::Message as _;
use tonic::{Code, Status};

use super::{
    IMPERSONATED, refusal, reply, request,
    wire::{IstioCertificateRequest, Metadata, Value},
};
use crate::{
    mesh::IstioCa,
    tunnel::testing::{TestCa, identity},
};

fn ca() -> IstioCa {
    IstioCa {
        address: "https://istiod.istio-system.svc:15012".parse().unwrap(),
        root_file: PathBuf::from("/etc/root.crt"),
        token_file: PathBuf::from("/run/token"),
        cluster_id: "Kubernetes".into(),
        lifetime: Duration::from_hours(24),
        server_name: None,
    }
}

/// The bytes that Istio's own definitions give: field 1 the request, 3 the seconds, 4 a `google.protobuf.Struct`.
#[test]
fn requests_are_what_istiod_reads() {
    let message = IstioCertificateRequest {
        csr: "CSR".into(),
        validity_duration: 86_400,
        metadata: Some(Metadata {
            fields: HashMap::from([(IMPERSONATED.to_owned(), Value { string_value: Some("spiffe://a".into()) })]),
        }),
    };
    let mut expected =
        b"\x0a\x03CSR\x18\x80\xa3\x05\x22\x26\x0a\x24\x0a\x14ImpersonatedIdentity\x12\x0c\x1a\x0aspiffe://a".to_vec();
    assert_eq!(message.encode_to_vec(), expected);
    // Other kinds of values are skipped, unknown fields too.
    expected.extend(b"\x22\x0a\x0a\x08\x0a\x01x\x12\x03\x22\x01y");
    expected.extend(b"\x2a\x01z");
    assert!(IstioCertificateRequest::decode(expected.as_slice()).is_ok());
}

#[test]
fn a_request_names_the_identity_and_holds_no_key() {
    let key = rcgen::KeyPair::generate().unwrap();
    let pem = request(&identity("web"), &key).unwrap();
    assert!(pem.starts_with("-----BEGIN CERTIFICATE REQUEST-----") && !pem.contains("PRIVATE"));
    let parsed = rcgen::CertificateSigningRequestParams::from_pem(&pem).unwrap();
    assert_eq!(parsed.params.subject_alt_names, [rcgen::SanType::URI(identity("web").to_string().try_into().unwrap())]);
}

#[test]
fn answers_are_taken_apart() {
    let (root, old) = (TestCa::new("root"), TestCa::new("old"));
    let leaf = root.sign(&TestCa::leaf(&identity("web").to_string())).0.pem();
    let (root, old) = (root.0.pem(), old.0.pem());
    let parts = |elements: &[&str]| {
        let elements: Vec<_> = elements.iter().map(|e| (*e).to_owned()).collect();
        reply::certificates(&elements).map(|(chain, roots)| (chain.len(), roots.len()))
    };
    assert_eq!(parts(&[&leaf, &root]), Ok((1, 1)));
    assert_eq!(parts(&[&leaf, &old, &root]), Ok((2, 1)), "an intermediate");
    assert_eq!(parts(&[&format!("{leaf}{old}"), &root]), Ok((2, 1)), "in one element with the leaf");
    assert_eq!(parts(&[&leaf, &format!("{old}{root}")]), Ok((1, 2)), "several roots are one element");
    assert_eq!(parts(&[&leaf, &root, &root]), Ok((1, 1)), "the root in the chain too");
    for (elements, expected) in [
        (&[][..], "empty"),
        (&[leaf.as_str()], "one element"),
        (&[leaf.as_str(), ""], "without certificate"),
        (&["", root.as_str()], "without certificate"),
        (&[leaf.as_str(), "-----BEGIN CERTIFICATE-----\n!"], "PEM"),
        (&[leaf.as_str(), &root.repeat(70)], "more than 64"),
    ] {
        let error = parts(elements).unwrap_err();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn refusals_say_what_to_do() {
    for (code, expected, transport) in [
        (Code::Unauthenticated, "issuer.istio.tokenFile (/run/token)", false),
        (Code::PermissionDenied, "pods that run on this agent's node", false),
        (Code::ResourceExhausted, "tried again", false),
        (Code::Unimplemented, "issuer.istio.address", false),
        (Code::InvalidArgument, "does not understand", false),
        (Code::Unavailable, "issuer.istio.rootFile (/etc/root.crt)", true),
        (Code::DeadlineExceeded, "no answer in time", true),
        (Code::Internal, "Internal", false),
    ] {
        let status = Status::new(code, "what it said");
        let text = refusal::explain(&status, &ca());
        assert!(text.contains(expected) && text.contains("what it said"), "{text}");
        assert_eq!(refusal::is_transport(&status), transport, "{code:?}");
    }
    let long = refusal::explain(&Status::new(Code::Internal, "x".repeat(100_000)), &ca());
    assert!(long.len() < 1000);
    assert!(refusal::explain(&Status::new(Code::Internal, ""), &ca()).contains("without a reason"));
}
