//! Istio's certificate service, generated from `proto/istio_ca.proto`.
#![allow(
    missing_docs,
    clippy::pedantic,
    clippy::all,
    rust_2018_idioms,
    reason = "generated; the messages are documented in the .proto"
)]

tonic::include_proto!("istio.v1.auth");
