use super::{
    report::Report,
    scenario::{Scenario, Sizes},
    world::{Network, Outcome, Plan, Tuning, World},
};
use clap::ValueEnum as _;

const NETWORK: Network = Network { latency: 500_000, proof: 500_000, queue: None };

fn run_plan(scenario: Scenario, hosts: u32, blob_mb: u64, seed: u64) -> (Plan, Outcome, Report) {
    run_over(NETWORK, scenario, hosts, blob_mb, seed)
}

fn run_over(network: Network, scenario: Scenario, hosts: u32, blob_mb: u64, seed: u64) -> (Plan, Outcome, Report) {
    let blobs = (scenario == Scenario::PeakHour).then_some(6);
    let sizes = Sizes { hosts: Some(hosts), blob: Some(blob_mb * 1_000_000), blobs, ..Sizes::default() };
    let plan = scenario.plan(sizes, seed, network, Tuning::default());
    let outcome = World::new(plan.clone()).unwrap().run();
    let report = Report::new(scenario, &plan, &outcome);
    (plan, outcome, report)
}

#[test]
fn every_scenario_ends_without_a_wrong_piece() {
    for scenario in Scenario::value_variants() {
        let (_, outcome, report) = run_plan(*scenario, 30, 60, 1);
        let replay = format!("sim {} --hosts 30 --blob 60MB --seed 1", scenario.name());
        assert_eq!((report.unfinished, report.wrong_pieces_accepted), (0, 0), "{replay}");
        assert!(outcome.origin_bytes.iter().all(|bytes| *bytes > 0), "{replay}");
    }
}

#[test]
fn shared_links_carry_the_same_swarms_a_little_slower() {
    let shared = Network { queue: Some(256 << 10), ..NETWORK };
    for scenario in Scenario::value_variants().iter().filter(|scenario| **scenario != Scenario::Zones) {
        let (_, outcome, report) = run_over(shared, *scenario, 30, 60, 1);
        let replay = format!("sim {} --hosts 30 --blob 60MB --queue 256KiB --seed 1", scenario.name());
        assert_eq!((report.unfinished, report.wrong_pieces_accepted), (0, 0), "{replay}");
        assert!(outcome.origin_bytes.iter().all(|bytes| *bytes > 0), "{replay}");
    }
    let (.., report) = run_over(shared, Scenario::KrakenPaper, 60, 300, 1);
    let (.., again) = run_over(shared, Scenario::KrakenPaper, 60, 300, 1);
    let spread = report.multiples.unwrap();
    assert!(spread.p50 > 1.0 && spread.p50 < 1.10 && spread.max < 1.30, "seed 1: {spread:?}");
    assert_eq!((report.json(), report.events), (again.json(), again.events));
}

#[test]
fn one_seed_one_result() {
    for scenario in [Scenario::Churn, Scenario::Zones, Scenario::PeakHour] {
        let (.., first) = run_plan(scenario, 30, 60, 7);
        let (.., again) = run_plan(scenario, 30, 60, 7);
        let (.., other) = run_plan(scenario, 30, 60, 8);
        assert_eq!((first.json(), first.events), (again.json(), again.events));
        assert_ne!(first.events, other.events);
    }
}

#[test]
fn a_swarm_comes_close_to_the_link_rate() {
    let (.., report) = run_plan(Scenario::KrakenPaper, 60, 300, 1);
    let spread = report.multiples.unwrap();
    assert!(spread.p50 < 1.06 && spread.max < 1.25, "seed 1: {spread:?}");
}

#[test]
fn readers_are_served_in_order_at_little_cost() {
    let (.., report) = run_plan(Scenario::Streaming, 60, 300, 1);
    let (whole, (reader, first)) = (report.multiples.unwrap(), report.reader.unwrap());
    assert!(whole.p50 < 1.10 && reader.p99 < 1.45 && first.p50 < 0.06, "seed 1: {whole:?}, {reader:?}, {first:?}");
}

#[test]
fn a_blob_crosses_into_a_zone_about_once() {
    let (.., report) = run_plan(Scenario::Zones, 60, 300, 1);
    let whole = report.multiples.unwrap();
    assert!(report.zone_copies_max < 1.2 && whole.p99 < 1.35, "seed 1: {} copies, {whole:?}", report.zone_copies_max);
}

#[test]
fn what_is_whole_elsewhere_is_not_fetched_from_origins() {
    for (scenario, blob_mb) in [(Scenario::PeakHour, 150), (Scenario::RollingUpdate, 150)] {
        let (.., report) = run_plan(scenario, 80, blob_mb, 1);
        let (name, copies) = (scenario.name(), report.origin_copies_max);
        assert!(copies < 3.0 && report.last_s < 45.0, "{name}, seed 1: {copies} copies, {} s", report.last_s);
    }
}

#[test]
fn outputs_hold_every_sample() {
    let (plan, outcome, report) = run_plan(Scenario::Streaming, 20, 60, 3);
    assert_eq!(super::report::csv(&outcome).lines().count(), 1 + plan.pulls.len());
    let json = report.json();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["scenario"], &json["seed"], &json["hosts"]), (&"streaming".into(), &3.into(), &20.into()));
    for spread in ["multiples", "reader"] {
        for figure in ["p50", "p99", "p999", "max"] {
            assert!(json[spread][figure].as_f64().is_some_and(|value| value >= 1.0), "{spread}.{figure} in {json}");
        }
    }
    for figure in ["ideal_s", "origin_copies", "tracker_requests"] {
        assert!(json[figure].as_f64().is_some_and(|value| value > 0.0), "{figure} in {json}");
    }
    assert_eq!((&json["unfinished"], &json["wrong_pieces_accepted"]), (&0.into(), &0.into()));
    assert!(super::report::svg(&report, &outcome).ends_with("</svg>\n"));
}

#[test]
fn sizes_and_rates_have_units() {
    assert_eq!(super::size("1500MB"), Ok(1_500_000_000));
    assert_eq!(super::size("4MiB"), Ok(4 << 20));
    assert_eq!(super::rate("300MB/s"), Ok(300_000_000));
    assert_eq!(super::rate("1Gbit"), Ok(125_000_000));
    for bad in ["", "MB", "5 parsecs", "-1MB"] {
        assert!(super::size(bad).is_err(), "{bad}");
    }
    assert!(super::rate("5MB").is_err());
}

#[test]
fn scenarios_have_the_same_name_everywhere() {
    for scenario in Scenario::value_variants() {
        let on_the_command_line = scenario.to_possible_value().unwrap();
        assert_eq!(on_the_command_line.get_name(), scenario.name());
    }
}
