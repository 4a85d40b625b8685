//! Istio's standard TCP metrics.

use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;

use super::encode::{NONE, counter, gauge};
use crate::telemetry::{Exposed, ResponseFlag, Series, Traffic};

pub(super) fn encode(to: &mut DescriptorEncoder<'_>, traffic: &Traffic) -> fmt::Result {
    let all = traffic.exposed();
    let usual = |value: fn(&Series) -> u64| {
        all.iter().map(move |(labels, series)| (Exposed { labels, flag: ResponseFlag::None }, value(series)))
    };
    let ended = |value: fn(&Series, ResponseFlag) -> u64, always: Option<ResponseFlag>| {
        all.iter().flat_map(move |(labels, series)| {
            ResponseFlag::ALL.into_iter().filter_map(move |flag| {
                let value = value(series, flag);
                (value > 0 || always == Some(flag)).then_some((Exposed { labels, flag }, value))
            })
        })
    };
    counter(to, "istio_tcp_connections_opened", "Connections established", usual(Series::opened))?;
    counter(
        to,
        "istio_tcp_connections_closed",
        "Established connections that ended",
        ended(Series::closed, Some(ResponseFlag::None)),
    )?;
    counter(to, "istio_tcp_connections_failed", "Connections that were not established", ended(Series::failed, None))?;
    gauge(to, "istio_tcp_sockets_open", "Established connections that have not ended", usual(Series::open))?;
    counter(to, "istio_tcp_sent_bytes", "Bytes from servers to clients", usual(Series::sent))?;
    counter(to, "istio_tcp_received_bytes", "Bytes from clients to servers", usual(Series::received))?;
    gauge(to, "underpass_traffic_series", "Samples of the istio_tcp metrics", [(NONE, traffic.samples())])?;
    gauge(to, "underpass_traffic_series_limit", "Most samples of the istio_tcp metrics", [(NONE, traffic.limit())])?;
    counter(
        to,
        "underpass_traffic_overflow",
        "Connections counted under labels with the value other, because there was no room for a series",
        [(NONE, traffic.overflow())],
    )
}
