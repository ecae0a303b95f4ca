//! What a run is boiled down to: text, JSON, CSV, and a plot.

use super::{
    scenario::Scenario,
    world::{Group, Outcome, Plan, SECOND, Sample},
};
use std::fmt::Write as _;

/// Percentiles of multiples of the ideal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

/// A run's figures.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) scenario: Scenario,
    pub(crate) seed: u64,
    pub(crate) hosts: usize,
    /// Of the first counted pull, seconds.
    pub(crate) ideal_s: f64,
    pub(crate) multiples: Option<Spread>,
    /// Of those whose times are not the scenario's figure.
    pub(crate) apart: Option<Spread>,
    /// The reader's end and first piece.
    pub(crate) reader: Option<(Spread, Spread)>,
    /// From the start of the run to the last counted end, seconds.
    pub(crate) last_s: f64,
    /// Mean over the blobs, and the blob most sent.
    pub(crate) origin_copies: f64,
    pub(crate) origin_copies_max: f64,
    /// Bytes that crossed into the zone most sent to, as copies of all blobs.
    pub(crate) zone_copies_max: f64,
    pub(crate) tracker_requests: u64,
    pub(crate) unfinished: usize,
    pub(crate) wrong_sent: u64,
    pub(crate) wrong_pieces_accepted: u64,
    pub(crate) duplicates: f64,
    pub(crate) events: u64,
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn f(n: u64) -> f64 {
    n as f64
}

fn seconds(nanos: u64) -> f64 {
    f(nanos) / f(SECOND)
}

fn spread(mut values: Vec<f64>) -> Option<Spread> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    // The smallest value that at least this share of all does not pass.
    let at = |per_mille: usize| values[((last + 1) * per_mille).div_ceil(1000).clamp(1, last + 1) - 1];
    Some(Spread { p50: at(500), p99: at(990), p999: at(999), max: values[last] })
}

fn multiples(samples: &[Sample], group: Group, time: impl Fn(&Sample) -> Option<u64>) -> Option<Spread> {
    let counted = samples.iter().filter(|sample| sample.group == group && !sample.died);
    spread(counted.filter_map(|sample| Some(f(time(sample)?) / f(sample.ideal))).collect())
}

impl Report {
    pub(crate) fn new(scenario: Scenario, plan: &Plan, outcome: &Outcome) -> Self {
        let samples = &outcome.samples;
        let copies = |bytes: u64, blob: usize| f(bytes) / f(plan.blobs[blob].max(1));
        let by_blob: Vec<f64> =
            outcome.origin_bytes.iter().enumerate().map(|(blob, bytes)| copies(*bytes, blob)).collect();
        let all: u64 = plan.blobs.iter().sum();
        let reader = multiples(samples, Group::Counted, |sample| sample.read).zip(multiples(
            samples,
            Group::Counted,
            |sample| sample.first,
        ));
        let counted = || samples.iter().filter(|sample| sample.group == Group::Counted);
        Self {
            scenario,
            seed: plan.seed,
            hosts: plan.hosts.iter().filter(|host| !host.origin).count(),
            ideal_s: counted().next().map_or(0.0, |sample| seconds(sample.ideal)),
            multiples: multiples(samples, Group::Counted, |sample| sample.done),
            apart: multiples(samples, Group::Apart, |sample| sample.done),
            reader,
            last_s: counted().filter_map(|sample| Some(seconds(sample.at + sample.done?))).fold(0.0, f64::max),
            origin_copies: by_blob.iter().sum::<f64>() / f(by_blob.len() as u64),
            origin_copies_max: by_blob.iter().copied().fold(0.0, f64::max),
            zone_copies_max: outcome.zone_bytes.iter().map(|bytes| f(*bytes) / f(all)).fold(0.0, f64::max),
            tracker_requests: outcome.tracker_requests,
            unfinished: samples.iter().filter(|sample| sample.done.is_none() && !sample.died).count(),
            wrong_sent: outcome.wrong_sent,
            wrong_pieces_accepted: outcome.wrong_accepted,
            duplicates: f(outcome.pieces_sent) / f(outcome.pieces_taken.max(1)) - 1.0,
            events: outcome.events,
        }
    }

    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(out, "{name:<18} {value}");
        };
        let row = |s: &Spread, unit: f64| {
            let part = |v: f64| format!("{v:.3} ({:.2} s)", v * unit);
            format!("p50 {}  p99 {}  p99.9 {}  max {}", part(s.p50), part(s.p99), part(s.p999), part(s.max))
        };
        line("scenario", format!("{}, {} hosts, seed {}", self.scenario.name(), self.hosts, self.seed));
        line("ideal", format!("{:.3} s", self.ideal_s));
        let spreads = [("multiples", self.multiples), ("others", self.apart)];
        let reader = self.reader.map_or([("", None), ("", None)], |(done, first)| {
            [("reader done", Some(done)), ("first piece", Some(first))]
        });
        for (name, spread) in spreads.into_iter().chain(reader) {
            spread.iter().for_each(|spread| line(name, row(spread, self.ideal_s)));
        }
        line("last end", format!("{:.2} s", self.last_s));
        line("origin copies", format!("{:.2} of each blob, most {:.2}", self.origin_copies, self.origin_copies_max));
        if self.zone_copies_max > 0.0 {
            line("into a zone", format!("at most {:.2} copies", self.zone_copies_max));
        }
        line("sent in excess", format!("{:.2} %", 100.0 * self.duplicates));
        line("tracker requests", self.tracker_requests.to_string());
        line("wrong pieces", format!("{} sent, {} accepted", self.wrong_sent, self.wrong_pieces_accepted));
        line("unfinished", self.unfinished.to_string());
        line("events", self.events.to_string());
        out
    }

    pub(crate) fn json(&self) -> String {
        let spread = |s: &Spread| {
            format!("{{\"p50\":{:.4},\"p99\":{:.4},\"p999\":{:.4},\"max\":{:.4}}}", s.p50, s.p99, s.p999, s.max)
        };
        let mut fields = vec![
            format!("\"scenario\":\"{}\"", self.scenario.name()),
            format!("\"seed\":{}", self.seed),
            format!("\"hosts\":{}", self.hosts),
            format!("\"ideal_s\":{:.6}", self.ideal_s),
        ];
        fields.extend(self.multiples.iter().map(|s| format!("\"multiples\":{}", spread(s))));
        fields.extend(self.apart.iter().map(|s| format!("\"others\":{}", spread(s))));
        if let Some((done, first)) = &self.reader {
            fields.push(format!("\"reader\":{}", spread(done)));
            fields.push(format!("\"reader_first\":{}", spread(first)));
        }
        fields.extend([
            format!("\"last_s\":{:.4}", self.last_s),
            format!("\"origin_copies\":{:.4}", self.origin_copies),
            format!("\"origin_copies_max\":{:.4}", self.origin_copies_max),
            format!("\"zone_copies_max\":{:.4}", self.zone_copies_max),
            format!("\"tracker_requests\":{}", self.tracker_requests),
            format!("\"unfinished\":{}", self.unfinished),
            format!("\"wrong_pieces_accepted\":{}", self.wrong_pieces_accepted),
        ]);
        format!("{{{}}}\n", fields.join(","))
    }
}

/// The samples, a line each.
pub(crate) fn csv(outcome: &Outcome) -> String {
    let mut out = String::from("host,group,start_s,ideal_s,done_s,first_s,read_s,died\n");
    let time = |nanos: Option<u64>| nanos.map_or_else(String::new, |nanos| format!("{:.6}", seconds(nanos)));
    for s in &outcome.samples {
        let group = if s.group == Group::Counted { "counted" } else { "apart" };
        let (start, ideal) = (seconds(s.at), seconds(s.ideal));
        let (done, first, read) = (time(s.done), time(s.first), time(s.read));
        let _ = writeln!(out, "{},{group},{start:.6},{ideal:.6},{done},{first},{read},{}", s.host, s.died);
    }
    out
}

/// The share of hosts done over time, in multiples of the ideal, beside the figures Kraken published for the same case.
pub(crate) fn svg(report: &Report, outcome: &Outcome) -> String {
    const KRAKEN: [(f64, f64, &str); 3] = [(1.0, 0.5, "p50 1.0"), (1.8, 0.99, "p99 1.8"), (2.2, 0.999, "p99.9 2.2")];
    const X_MAX: f64 = 2.4;
    let kraken = report.scenario == Scenario::KrakenPaper;
    let mut done: Vec<f64> = outcome.samples.iter().filter_map(|s| Some(f(s.done?) / f(s.ideal))).collect();
    done.sort_by(f64::total_cmp);
    let (x, y) = (|v: f64| 60.0 + v.min(X_MAX) / X_MAX * 600.0, |share: f64| 340.0 - share * 300.0);
    let mut out = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 720 400\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"720\" height=\"400\" fill=\"#ffffff\"/>\n",
    );
    for tick in 0..=12u8 {
        let v = f64::from(tick) * 0.2;
        let _ = writeln!(out, "<path d=\"M{0:.1} 40V340\" stroke=\"#e4e4e4\"/>", x(v));
        let _ = writeln!(out, "<text x=\"{:.1}\" y=\"358\" text-anchor=\"middle\" fill=\"#444\">{v:.1}</text>", x(v));
    }
    for tick in 0..=5u8 {
        let share = f64::from(tick) * 0.2;
        let _ = writeln!(out, "<path d=\"M60 {0:.1}H660\" stroke=\"#e4e4e4\"/>", y(share));
        let label = format!("{:.0} %", share * 100.0);
        let _ = writeln!(
            out,
            "<text x=\"52\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#444\">{label}</text>",
            y(share) + 4.0
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"360\" y=\"384\" text-anchor=\"middle\" fill=\"#222\">time, multiples of blob size ÷ link rate</text>\n\
         <text x=\"60\" y=\"26\" fill=\"#222\">{}: share of {} hosts that are done</text>",
        report.scenario.name(),
        report.hosts
    );
    // At most a point for each of 600 steps: the curve looks the same and the file stays small.
    let step = done.len().div_ceil(600).max(1);
    let mut path = format!("M{:.1} {:.1}", x(0.0), y(0.0));
    let last = done.len().saturating_sub(1);
    for (n, value) in done.iter().enumerate().filter(|(n, _)| n % step == 0 || *n == last) {
        let _ = write!(path, "L{:.1} {:.1}", x(*value), y(f(n as u64 + 1) / f(outcome.samples.len() as u64)));
    }
    let _ = writeln!(out, "<path d=\"{path}\" fill=\"none\" stroke=\"#0b6e99\" stroke-width=\"2\"/>");
    let _ = writeln!(out, "<text x=\"{:.1}\" y=\"60\" fill=\"#0b6e99\">Shoal</text>", x(1.06));
    if kraken {
        for (at, share, label) in KRAKEN {
            let (x, y) = (x(at), y(share));
            let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"#c4421a\"/>");
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#c4421a\">Kraken {label}</text>",
                x + 8.0,
                y + 18.0
            );
        }
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let s = spread((1..=1000).map(f64::from).collect()).unwrap();
        assert_eq!((s.p50, s.p99, s.p999, s.max), (500.0, 990.0, 999.0, 1000.0));
        let one = spread(vec![7.0]).unwrap();
        assert_eq!((one.p50, one.max), (7.0, 7.0));
        assert!(spread(vec![]).is_none());
    }
}
