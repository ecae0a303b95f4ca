//! The queue's figures for Prometheus.

use super::{Counts, Queue};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use std::fmt;

type Read = fn(&Counts) -> u64;

const GAUGES: [(&str, &str, Read); 3] = [
    ("retry_tasks_waiting", "Tasks of the retry queue that are not done, those running included", |counts| {
        counts.waiting
    }),
    ("retry_tasks_running", "Tasks of the retry queue being tried", |counts| counts.running),
    ("retry_tasks_given_up", "Tasks of the retry queue that can never be done", |counts| counts.given_up),
];
const COUNTERS: [(&str, &str, Read); 3] = [
    ("retry_tasks_added", "Tasks added to the retry queue", |counts| counts.added_total),
    ("retry_tasks_done", "Tasks of the retry queue done", |counts| counts.done_total),
    ("retry_tries_failed", "Tries of the retry queue's tasks that failed", |counts| counts.failed_total),
];

impl Collector for Queue {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counts = self.counts();
        for (name, help, read) in GAUGES {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (kind, counts) in &counts {
                let value = ConstGauge::new(i64::try_from(read(counts)).unwrap_or(i64::MAX));
                value.encode(metric.encode_family(&[("kind", kind.as_str())])?)?;
            }
        }
        for (name, help, read) in COUNTERS {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (kind, counts) in &counts {
                ConstCounter::new(read(counts)).encode(metric.encode_family(&[("kind", kind.as_str())])?)?;
            }
        }
        Ok(())
    }
}
