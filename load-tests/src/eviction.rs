//! What is the evictor worth on traces of real servers?
//!
//! Replays each trace through the engine's own decisions (`engine::replay`), by silence alone and by return rate, at memory
//! from 0.5 to 50 % of what all its conversations hold; then with half of the ends told, with a tenant that scans, with one
//! that hogs; and times the choice of a victim. The figures of a simulator that shares no code with the engine stand beside.

mod neighbours;
mod victim;

use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use clap::Parser;
use rekindle::engine::Policy;
use rekindle::engine::replay::trace::Trace;
use rekindle::engine::replay::{Outcome, ReplaySettings, replay};
use serde_json::{Value, json};

use crate::numbers::figure;
use crate::report::{Bound, Limit, Report, Table};

#[derive(Parser)]
pub struct Args {
    /// Folder with mooncake-conversation, agentic-coding and chat-week-fitted, as .csv or .csv.gz
    #[arg(long, value_name = "DIR")]
    traces: PathBuf,
    /// Tokens of a block in the replays of long conversations; a quarter of it where they are short
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(4..=4096))]
    block_tokens: u32,
}

/// Sizes of the device, in thousandths of a trace's distinct tokens.
const SIZES: [u32; 8] = [5, 10, 20, 30, 50, 100, 200, 500];
/// A token at this position costs twice what the first does: an 8B model's.
const DOUBLES_AT: f64 = 30_000.0;
/// Tenants of the traces; whoever was added has the number after them.
const TENANTS: usize = 32;
/// Of these, by size, the last.
const SMALLEST: usize = 20;

/// A trace, and what a simulator of its own found on it: the percentage of re-usable tokens that are encoded again, by size.
struct Case {
    name: &'static str,
    /// Whether its conversations are so long that a finer block only takes longer.
    long: bool,
    lru: [f64; 8],
    return_rate: [f64; 8],
    clairvoyant: [f64; 8],
}

const MOONCAKE: Case = Case {
    name: "mooncake-conversation",
    long: false,
    lru: [90.75, 87.64, 81.08, 69.82, 49.96, 27.73, 7.61, 1.21],
    return_rate: [80.99, 72.89, 60.07, 53.13, 41.91, 23.17, 6.67, 1.39],
    clairvoyant: [57.81, 38.85, 19.37, 8.73, 0.05, 0.05, 0.05, 0.05],
};
const AGENTIC: Case = Case {
    name: "agentic-coding",
    long: true,
    lru: [54.45, 19.58, 4.54, 1.79, 0.69, 0.12, 0.03, 0.01],
    return_rate: [49.65, 18.11, 4.26, 1.74, 0.66, 0.11, 0.03, 0.00],
    clairvoyant: [31.41, 9.70, 1.51, 0.27, 0.00, 0.00, 0.00, 0.00],
};
const WEEK: Case = Case {
    name: "chat-week-fitted",
    long: false,
    lru: [11.71, 8.19, 5.94, 4.77, 3.75, 3.57, 1.53, 0.09],
    return_rate: [10.05, 7.68, 5.69, 4.68, 3.74, 2.90, 1.49, 0.27],
    clairvoyant: [4.21, 2.66, 0.98, 0.26, 0.00, 0.00, 0.00, 0.00],
};

/// A trace with what its replays have in common.
struct Loaded<'a> {
    case: &'a Case,
    trace: Trace,
    distinct: u64,
    block_tokens: u32,
}

impl Loaded<'_> {
    fn settings(&self, permille: u32, policy: Policy) -> ReplaySettings {
        ReplaySettings {
            policy,
            device_tokens: self.distinct / 1000 * u64::from(permille),
            host_tokens: 0,
            disk_tokens: 0,
            block_tokens: self.block_tokens,
            device_token_bytes: 1,
            token_bytes: 1,
            warm_up: 0.25,
            last: None,
            given: BTreeMap::new(),
            ends: 0.0,
            one_tenant: true,
            doubles_at: DOUBLES_AT,
            weighs_length: false,
            journal_entries: 0,
        }
    }

    fn run(&self, trace: &Trace, settings: &ReplaySettings) -> anyhow::Result<Outcome> {
        let outcome = replay(trace, settings, &mut |_, _| {})?;
        let size = figure(settings.device_tokens as f64 / self.distinct as f64 * 100.0);
        let percent = figure(share(outcome.all.reencoded_tokens, outcome.all.reusable_tokens));
        eprintln!("[eviction] {} at {size} %, {:?}: {percent} % encoded again", self.case.name, settings.policy);
        Ok(outcome)
    }
}

/// What the tables and bounds are made of.
#[derive(Default)]
struct Findings {
    sizes: Vec<Vec<String>>,
    neighbours: Vec<Vec<String>>,
    costs: Vec<Vec<String>>,
    bounds: Vec<Bound>,
    raw: Vec<Value>,
}

pub fn measure(args: &Args) -> anyhow::Result<Report> {
    let mut found = Findings::default();
    let (victim_row, victim_bounds) = victim::measure();
    for case in [&MOONCAKE, &AGENTIC, &WEEK] {
        let trace = load(&args.traces, case.name)?;
        let distinct = trace.distinct_tokens();
        let block_tokens = if case.long { args.block_tokens } else { args.block_tokens / 4 };
        let loaded = Loaded { case, trace, distinct, block_tokens };
        found.sizes(&loaded)?;
        found.neighbours(&loaded)?;
        if case.long {
            found.costs(&loaded)?;
        }
    }
    found.bounds.extend(victim_bounds);
    Ok(Report {
        name: "eviction",
        title: "The evictor on traces",
        tables: vec![
            Table {
                heading: "Encoded again, % of re-usable tokens, by size of the only tier (after the first quarter)",
                columns: vec![
                    "trace",
                    "size, % of distinct tokens",
                    "LRU",
                    "return rate",
                    "with half of the ends told",
                    "% of the gap closed",
                    "with ends",
                    "simulator: LRU",
                    "return rate",
                    "clairvoyant",
                ],
                rows: found.sizes,
            },
            Table {
                heading: "Beside a tenant that scans or hogs: encoded again, %, of the 32 others / of the 20 smallest",
                columns: vec!["trace and size", "policy", "alone", "beside a scan", "beside a hog"],
                rows: found.neighbours,
            },
            Table {
                heading: "Cost of encoding again, long contexts (a token at 30,000 costs twice the first)",
                columns: vec!["size", "return rate, % of LRU's cost", "and length weighed", "tokens encoded again with it, %"],
                rows: found.costs,
            },
            Table {
                heading: "Choosing a victim",
                columns: vec!["idle conversations", "of one tenant, ns", "of 32 tenants, ns"],
                rows: victim_row,
            },
        ],
        bounds: found.bounds,
        notes: vec![
            "The traces are those of the README beside this folder: Mooncake (Apache-2.0, one hour of a real chat service), \
             agentic coding (Apache-2.0, real sessions at drawn times), and a generated week of chat."
                .into(),
            "Simulator and clairvoyance: a simulator written apart from this, in tokens rather than blocks; its figures are \
             fixed here."
                .into(),
            "The simulator's return rate has classes of two lengths, here there are four; and it knows from the start which \
             prefixes will be shared. Told only of those that were shared already, it encodes 73.9, 60.8, 55.5, 42.5, 23.1 \
             and 1.44 % again on Mooncake at 1, 2, 3, 5, 10 and 50 %."
                .into(),
            "The gap is that between LRU here and clairvoyance there. Where clairvoyance encodes nothing again, no policy \
             without signals comes near."
                .into(),
            "Mooncake at 3 %: that a long conversation loses its first tokens first takes 0.1 points there (without it, which \
             `rekindle replay --doubles-at 1000000` shows, 54.4 % are encoded again, 25.0 % of the gap; 25.2 before the \
             split plan). It is kept for what it gives where contexts are long: the cost above is 82 and 91 % of LRU's, \
             and was 94 and 98 % without it."
                .into(),
            "Agentic coding at 2 %, length not weighed: LRU encodes 4.13 % again here and 4.54 % in the simulator, so that the \
             same saving is a smaller part of it; return rate encodes less here than there (3.97 against 4.26 %)."
                .into(),
        ],
        raw: Some(Value::Array(found.raw)),
    })
}

impl Findings {
    /// One tier and one tenant, by size.
    fn sizes(&mut self, loaded: &Loaded<'_>) -> anyhow::Result<()> {
        let case = loaded.case;
        for (index, size) in SIZES.into_iter().enumerate() {
            let run = |settings: &ReplaySettings| loaded.run(&loaded.trace, settings);
            let lru = run(&loaded.settings(size, Policy::Lru))?;
            let learned = run(&loaded.settings(size, Policy::ReturnRate))?;
            let told = run(&ReplaySettings { ends: 0.5, ..loaded.settings(size, Policy::ReturnRate) })?;
            let [lru, learned, told] = [lru, learned, told].map(|outcome| percent(&outcome));
            let closed = |policy: f64| 100.0 * (lru - policy) / (lru - case.clairvoyant[index]);
            let at = format!("{} at {} %", case.name, f64::from(size) / 10.0);
            self.bounds.push(bound(&format!("{at}: worse than LRU by"), learned - lru, Limit::AtMost(0.3)));
            if case.name == MOONCAKE.name {
                let wanted = match size {
                    10..=30 => Some(25.0),
                    50 | 100 => Some(15.0),
                    _ => None,
                };
                if let Some(wanted) = wanted {
                    self.bounds.push(bound(&format!("{at}: gap closed"), closed(learned), Limit::AtLeast(wanted)));
                }
                if matches!(size, 20 | 50 | 100) {
                    let what = format!("{at}, half of the ends told: gap closed");
                    self.bounds.push(bound(&what, closed(told), Limit::AtLeast(35.0)));
                }
            }
            self.sizes.push(vec![
                case.name.into(),
                figure(f64::from(size) / 10.0),
                figure(lru),
                figure(learned),
                figure(told),
                figure(closed(learned)),
                figure(closed(told)),
                figure(case.lru[index]),
                figure(case.return_rate[index]),
                figure(case.clairvoyant[index]),
            ]);
            self.raw.push(json!({
                "trace": case.name, "size_permille": size, "lru": lru, "return_rate": learned, "ends_told": told,
            }));
        }
        Ok(())
    }

    /// 32 tenants with the usual floors and ceilings, alone and beside a bad neighbour.
    fn neighbours(&mut self, loaded: &Loaded<'_>) -> anyhow::Result<()> {
        let name = loaded.case.name;
        let (size, may_rise) = match name {
            "mooncake-conversation" => (50, 5.0),
            "agentic-coding" => (20, 1.0),
            _ => (10, 1.0),
        };
        let crowds = [loaded.trace.clone(), neighbours::with_scan(&loaded.trace), neighbours::with_hog(&loaded.trace)];
        for policy in [Policy::Lru, Policy::ReturnRate] {
            let settings = ReplaySettings { one_tenant: false, ..loaded.settings(size, policy) };
            let mut others = Vec::new();
            for crowd in &crowds {
                let outcome = loaded.run(crowd, &settings)?;
                others.push((ordinary(&outcome, 0), ordinary(&outcome, TENANTS - SMALLEST)));
            }
            let said = others.iter().map(|(all, small)| format!("{} / {}", figure(*all), figure(*small)));
            let at = format!("{name} at {} %", f64::from(size) / 10.0);
            self.neighbours.push([at.clone(), format!("{policy:?}")].into_iter().chain(said).collect());
            self.raw.push(json!({"trace": name, "size_permille": size, "policy": format!("{policy:?}"), "alone_scan_hog": others}));
            if policy == Policy::ReturnRate {
                let (rise, small) = (others[1].0 - others[0].0, others[2].1 - others[0].1);
                self.bounds.push(bound(&format!("{at}: a scan adds for others"), rise, Limit::AtMost(may_rise)));
                self.bounds.push(bound(&format!("{at}: a hog adds for the 20 smallest"), small, Limit::AtMost(3.0)));
            }
        }
        Ok(())
    }

    fn costs(&mut self, loaded: &Loaded<'_>) -> anyhow::Result<()> {
        for (size, wanted) in [(10, 85.0), (20, 90.0)] {
            let run = |settings: &ReplaySettings| loaded.run(&loaded.trace, settings);
            let lru = run(&loaded.settings(size, Policy::Lru))?.all.reencode_cost;
            let learned = run(&loaded.settings(size, Policy::ReturnRate))?.all.reencode_cost;
            let weighed = loaded.settings(size, Policy::ReturnRate);
            let weighed = run(&ReplaySettings { weighs_length: true, ..weighed })?;
            let of_lru = |cost: f64| 100.0 * cost / lru;
            let at = format!("{} at {} %", loaded.case.name, f64::from(size) / 10.0);
            let what = format!("{at}, length weighed: cost, of LRU's");
            self.bounds.push(bound(&what, of_lru(weighed.all.reencode_cost), Limit::AtMost(wanted)));
            self.costs.push(vec![
                at,
                figure(of_lru(learned)),
                figure(of_lru(weighed.all.reencode_cost)),
                figure(percent(&weighed)),
            ]);
        }
        Ok(())
    }
}

fn bound(what: &str, measured: f64, limit: Limit) -> Bound {
    Bound { what: what.to_owned(), measured, limit, unit: "%" }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

/// Of re-usable tokens, those that were encoded again.
fn percent(outcome: &Outcome) -> f64 {
    share(outcome.all.reencoded_tokens, outcome.all.reusable_tokens)
}

/// The same of the ordinary tenants, from this one on.
fn ordinary(outcome: &Outcome, from: usize) -> f64 {
    let tenants = outcome.tenants.iter().take(TENANTS).skip(from);
    let (again, all) =
        tenants.fold((0, 0), |(again, all), one| (again + one.reencoded_tokens, all + one.reusable_tokens));
    share(again, all)
}

/// A trace of the folder, unpacked if need be.
fn load(folder: &Path, name: &str) -> anyhow::Result<Trace> {
    let plain = folder.join(name).with_extension("csv");
    if plain.exists() {
        let file = std::fs::File::open(&plain).with_context(|| format!("can't open {}", plain.display()))?;
        return Trace::read(BufReader::new(file)).with_context(|| plain.display().to_string());
    }
    let packed = folder.join(name).with_extension("csv.gz");
    ensure!(packed.exists(), "there is neither {} nor {}", plain.display(), packed.display());
    let mut gzip = Command::new("gzip").arg("-dc").arg(&packed).stdout(Stdio::piped()).spawn().context("no gzip")?;
    let output = gzip.stdout.take().context("gzip has no output")?;
    let trace = Trace::read(BufReader::new(output)).with_context(|| packed.display().to_string())?;
    ensure!(gzip.wait().context("gzip is gone")?.success(), "gzip could not unpack {}", packed.display());
    Ok(trace)
}
