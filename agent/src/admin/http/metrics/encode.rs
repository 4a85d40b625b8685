//! Writing metrics of one name.

use std::fmt;

use prometheus_client::{
    encoding::{
        DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, EncodeMetric as _, NoLabelSet,
    },
    metrics::{MetricType, histogram::Histogram},
};

/// No label.
pub(super) const NONE: [(&str, &str); 0] = [];

/// A counter; `_total` is appended to its name.
pub(super) fn counter<L: EncodeLabelSet, V: EncodeCounterValue>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, V)>,
) -> fmt::Result {
    let mut metric = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    samples.into_iter().try_for_each(|(labels, value)| {
        metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
    })
}

/// A gauge.
pub(super) fn gauge<L: EncodeLabelSet, V: EncodeGaugeValue>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, V)>,
) -> fmt::Result {
    let mut metric = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
    samples.into_iter().try_for_each(|(labels, value)| metric.encode_family(&labels)?.encode_gauge(&value))
}

/// Distributions of durations.
pub(super) fn histogram<'a, L: EncodeLabelSet>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, &'a Histogram)>,
) -> fmt::Result {
    let mut metric = to.encode_descriptor(name, help, None, MetricType::Histogram)?;
    samples.into_iter().try_for_each(|(labels, histogram)| histogram.encode(metric.encode_family(&labels)?))
}
