//! How does an operator learn what another policy, or more memory, would have been worth?
//!
//! Reads a trace, or the record that a server keeps, replays it through the engine's own decisions (`engine::replay`), and
//! prints a table or one JSON object on standard output; how far it is goes to standard error.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::given::{Asked, by_number};
use crate::engine::replay::record::{How, Record};
use crate::engine::replay::times::{Encoding, Rates, Spread};
use crate::engine::replay::trace::{Request, Trace};
use crate::engine::replay::{FLIGHT_FOLDER, Outcome, Policy, ReplaySettings, Reuse, replay};
use crate::types::{TenantId, TokenCount, counted};

/// Replays a server's flight record, or a trace of turns, through the engine's scheduler, block manager and evictor, without
/// a model.
///
/// Without sizes and policy a record is replayed as recorded: each process that wrote it, under its own settings, with its own
/// times and outcomes, so that the decisions are the same, entry for entry. With others, or where a record has lost its
/// beginning, its turns come when they came, on a memory that was empty, as if the server had never been restarted.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  rekindle replay                                          what the server in ./data decided, from its flight record
  rekindle replay --journal 20                             and the last 20 decisions, in words
  rekindle replay --policy lru --device-share 0.05         what it would have done under other settings
  rekindle replay --last 3600 --tenant 0=1GiB:4GiB         the last hour, had the first tenant had these floor and ceiling
  rekindle replay --tenants tenants.toml --tenant acme=1GiB:   all of it, had acme had this floor
  rekindle replay day.csv --device-share 0.02              what the default policy encodes again on a trace
  rekindle replay day.csv --device-share 0.02 --policy lru the same by silence alone
  rekindle replay day.csv --device-tokens 500000 --host-tokens 2000000 --json
  rekindle replay day.csv --device-share 0.02 --ends 0.5   if clients said of half of the conversations that they are over
  zcat day.csv.gz | rekindle replay - --device-share 0.02

A trace is CSV with a header: t (ms), tenant, conv, turn, in, out (tokens of prompt and answer), ref and shared (the
first `shared` tokens of the prompt are those of request number `ref`, from 0; -1: none), stop (t: a tool call).")]
pub struct ReplayArgs {
    /// A trace, - for standard input, or a folder with a flight record [default: that of --data-dir]
    trace: Option<PathBuf>,
    /// The server's folder, whose flight record is read, also while it runs
    #[arg(long, value_name = "DIR", default_value = "data", conflicts_with = "trace")]
    data_dir: PathBuf,
    /// Which conversation goes first when memory is short [default: as recorded; return_rate for a trace]
    #[arg(long, value_enum)]
    policy: Option<PolicyName>,
    #[command(flatten)]
    device: DeviceSize,
    /// Tokens that the host tier holds [default: as recorded; 0 for a trace]
    #[arg(long, value_name = "N", conflicts_with = "host_share")]
    host_tokens: Option<u64>,
    /// The same, as a share of the trace's distinct tokens
    #[arg(long, value_name = "SHARE")]
    host_share: Option<f64>,
    /// Tokens that the disk tier holds [default: as recorded; 0 for a trace]
    #[arg(long, value_name = "N", conflicts_with = "disk_share")]
    disk_tokens: Option<u64>,
    /// The same, as a share of the trace's distinct tokens
    #[arg(long, value_name = "SHARE")]
    disk_share: Option<f64>,
    /// Tokens of a block; fewer are more exact, and slower [default: as recorded; 64 for a trace]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    block_tokens: Option<u32>,
    /// Bytes of one token's KV, for the bytes moved between tiers [default: as recorded; the default model's for a trace]
    #[arg(long, value_name = "N")]
    token_bytes: Option<u64>,
    /// Part of the turns, the first ones, that is not counted, while memory fills and habits are learned
    #[arg(long, value_name = "SHARE", default_value_t = 0.25)]
    warm_up: f64,
    /// Count only the turns of this time before the last one; those before fill memory
    #[arg(long, value_name = "SECONDS", conflicts_with = "warm_up")]
    last: Option<u64>,
    /// Part of the conversations whose end the server is told, beside those that a record knows of
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    ends: f64,
    /// Take all turns for one tenant's, so that there are no floors and ceilings
    #[arg(long)]
    one_tenant: bool,
    /// Another floor and ceiling of the device for a tenant, by its name (with --tenants), or by its number in the record or
    /// trace; what is left out stays as it was
    #[arg(long = "tenant", value_name = "TENANT=FLOOR:CEILING", conflicts_with = "one_tenant")]
    given: Vec<Asked>,
    /// The tenants file with which the server started: it numbers its tenants from 0 in that order, and those of later edits
    /// after them
    #[arg(long, value_name = "FILE", requires = "given")]
    tenants: Option<PathBuf>,
    #[command(flatten)]
    speeds: Speeds,
    /// Position at which a token costs twice what the first one does, for the cost of encoding again [default: 30000]
    #[arg(long, value_name = "TOKENS")]
    doubles_at: Option<f64>,
    /// Let the policy take that cost into account, as kv.eviction_doubles_at does
    #[arg(long)]
    weigh_length: bool,
    /// Print so many of the newest decisions, in words
    #[arg(long, value_name = "N", default_value_t = 0)]
    journal: usize,
    /// One JSON object rather than a table
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
#[group(multiple = false)]
struct DeviceSize {
    /// Tokens that the device holds [default: as recorded]
    #[arg(long, value_name = "N")]
    device_tokens: Option<u64>,
    /// The same, as a share of the trace's distinct tokens
    #[arg(long, value_name = "SHARE")]
    device_share: Option<f64>,
}

/// With them, it is foretold how soon first tokens would have come.
#[derive(Args, Debug)]
struct Speeds {
    /// Tokens that the server encodes in a second at the beginning of a prompt, to foretell how soon first tokens would have
    /// come
    #[arg(long, value_name = "TOKENS")]
    prefill_per_s: Option<u64>,
    /// Position at which encoding a token takes twice as long as at the beginning [default: all take as long]
    #[arg(
        long,
        value_name = "TOKENS",
        requires = "prefill_per_s",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    prefill_doubles_at: Option<u32>,
    /// Bytes that it reloads from the host in a second
    #[arg(long, value_name = "BYTES", requires = "prefill_per_s")]
    reload_per_s: Option<u64>,
    /// Bytes that it loads from disk in a second
    #[arg(long, value_name = "BYTES", requires = "prefill_per_s")]
    load_per_s: Option<u64>,
}

impl Speeds {
    fn rates(&self) -> Rates {
        Rates {
            encoding: Encoding {
                first_per_s: self.prefill_per_s.unwrap_or(0),
                doubles_at: self.prefill_doubles_at.map(TokenCount),
            },
            reload_bytes_per_s: self.reload_per_s.unwrap_or(0),
            load_bytes_per_s: self.load_per_s.unwrap_or(0),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum PolicyName {
    /// The least likely to be continued soon, as learned on the way
    ReturnRate,
    /// The longest silent
    Lru,
}

impl PolicyName {
    fn policy(self) -> Policy {
        match self {
            Self::ReturnRate => Policy::ReturnRate,
            Self::Lru => Policy::Lru,
        }
    }
}

fn policy_name(policy: Policy) -> &'static str {
    match policy {
        Policy::ReturnRate => "return_rate",
        Policy::Lru => "lru",
    }
}

/// What is replayed.
enum Source {
    Trace(Trace),
    Record(Record),
}

impl Source {
    fn trace(&self) -> &Trace {
        match self {
            Self::Trace(trace) => trace,
            Self::Record(record) => &record.trace,
        }
    }

    /// What holds unless something else is asked for. A trace doesn't say how large a device is.
    fn settings(&self) -> ReplaySettings {
        match self {
            Self::Record(record) => record.settings(),
            Self::Trace(_) => ReplaySettings {
                policy: Policy::ReturnRate,
                device_tokens: 0,
                host_tokens: 0,
                disk_tokens: 0,
                block_tokens: 64,
                device_token_bytes: 23_040,
                token_bytes: 23_040,
                warm_up: 0.25,
                last: None,
                ends: 0.0,
                one_tenant: false,
                given: BTreeMap::new(),
                doubles_at: 30_000.0,
                weighs_length: false,
                journal_entries: 0,
            },
        }
    }
}

/// What came of it, and how.
struct Replayed {
    outcome: Outcome,
    how: How,
}

pub fn run(arguments: &ReplayArgs) -> Result<()> {
    let source = read(arguments)?;
    let settings = settings(arguments, &source)?;
    let replayed = replayed(&source, &settings)?;
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
    let text = if arguments.json {
        format!("{}\n", object(arguments, &source, &settings, &replayed))
    } else {
        table(arguments, &source, &settings, &replayed)
    };
    io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

fn replayed(source: &Source, settings: &ReplaySettings) -> Result<Replayed> {
    let (outcome, how) = match source {
        Source::Record(record) => record.replay(settings, &mut progress())?,
        Source::Trace(trace) => (replay(trace, settings, &mut progress())?, How::WhatIf),
    };
    Ok(Replayed { outcome, how })
}

fn read(arguments: &ReplayArgs) -> Result<Source> {
    let Some(path) = &arguments.trace else {
        return Ok(Source::Record(Record::read(&arguments.data_dir.join(FLIGHT_FOLDER))?));
    };
    if path.is_dir() {
        let within = path.join(FLIGHT_FOLDER);
        return Ok(Source::Record(Record::read(if within.is_dir() { &within } else { path })?));
    }
    let input: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        let file = File::open(path).with_context(|| format!("can't open the trace {}", path.display()))?;
        Box::new(BufReader::new(file))
    };
    Ok(Source::Trace(Trace::read(input).with_context(|| format!("the trace {}", path.display()))?))
}

/// Checks what was asked for, and makes tokens of shares.
fn settings(arguments: &ReplayArgs, source: &Source) -> Result<ReplaySettings> {
    for (name, share) in [("--warm-up", arguments.warm_up), ("--ends", arguments.ends)] {
        ensure!((0.0..=1.0).contains(&share), "{name} is a share, from 0 to 1");
    }
    ensure!(arguments.warm_up < 1.0, "--warm-up leaves nothing to measure");
    ensure!(arguments.doubles_at.is_none_or(|at| at > 0.0), "--doubles-at is a number of tokens, more than 0");
    let device = &arguments.device;
    let is_sized = device.device_tokens.is_some() || device.device_share.is_some();
    ensure!(
        is_sized || matches!(source, Source::Record(_)),
        "a trace does not say how large the device is; give --device-tokens N or --device-share SHARE"
    );
    let distinct = source.trace().distinct_tokens();
    let tokens = |name: &str, tokens: Option<u64>, share: Option<f64>, own: u64| -> Result<u64> {
        ensure!(share.is_none_or(|share| (0.0..=1.0).contains(&share)), "{name} is a share, from 0 to 1");
        Ok(tokens.or(share.map(|share| (distinct as f64 * share) as u64)).unwrap_or(own))
    };
    let own = source.settings();
    Ok(ReplaySettings {
        policy: arguments.policy.map_or(own.policy, PolicyName::policy),
        device_tokens: tokens("--device-share", device.device_tokens, device.device_share, own.device_tokens)?,
        host_tokens: tokens("--host-share", arguments.host_tokens, arguments.host_share, own.host_tokens)?,
        disk_tokens: tokens("--disk-share", arguments.disk_tokens, arguments.disk_share, own.disk_tokens)?,
        block_tokens: arguments.block_tokens.unwrap_or(own.block_tokens),
        device_token_bytes: arguments.token_bytes.unwrap_or(own.device_token_bytes),
        token_bytes: arguments.token_bytes.unwrap_or(own.token_bytes),
        warm_up: arguments.warm_up,
        last: arguments.last.map(Duration::from_secs),
        ends: arguments.ends,
        one_tenant: arguments.one_tenant,
        given: by_number(&arguments.given, arguments.tenants.as_deref(), source.trace())?,
        doubles_at: arguments.doubles_at.unwrap_or(own.doubles_at),
        weighs_length: own.weighs_length || arguments.weigh_length,
        journal_entries: arguments.journal,
    })
}

/// A line that says how far it is; nothing where nobody looks.
fn progress() -> impl FnMut(usize, usize) {
    let shown = io::stderr().is_terminal();
    move |done, total| {
        if shown {
            eprint!("\rreplaying {:3} %", (done * 100).checked_div(total).unwrap_or(100));
        }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// How soon first tokens would have come, of all or of one tenant's turns.
fn first_tokens(arguments: &ReplayArgs, outcome: &Outcome, of: Option<TenantId>) -> Option<Spread> {
    let works = outcome.works.iter().filter(|work| of.is_none_or(|tenant| tenant == work.tenant));
    arguments.speeds.rates().first_tokens(works)
}

fn object(arguments: &ReplayArgs, source: &Source, settings: &ReplaySettings, replayed: &Replayed) -> Value {
    let outcome = &replayed.outcome;
    let reuse = |reuse: &Reuse, of: Option<TenantId>| {
        let first = first_tokens(arguments, outcome, of);
        json!({
            "requests": reuse.requests,
            "ttft": first.map(|Spread { p50_ms, p95_ms }| json!({"p50_ms": p50_ms, "p95_ms": p95_ms})),
            "prompt_tokens": reuse.prompt_tokens,
            "reusable_tokens": reuse.reusable_tokens,
            "reencoded_tokens": reuse.reencoded_tokens,
            "reencoded_share": share(reuse.reencoded_tokens, reuse.reusable_tokens),
            "reencode_cost": reuse.reencode_cost,
            "hit_share": {
                "device": share(reuse.device_tokens, reuse.reusable_tokens),
                "host": share(reuse.host_tokens, reuse.reusable_tokens),
                "disk": share(reuse.disk_tokens, reuse.reusable_tokens),
            },
        })
    };
    let mut object = json!({
        "policy": policy_name(settings.policy),
        "distinct_tokens": source.trace().distinct_tokens(),
        "device_tokens": settings.device_tokens,
        "host_tokens": settings.host_tokens,
        "disk_tokens": settings.disk_tokens,
        "block_tokens": settings.block_tokens,
        "ends": settings.ends,
        "bytes_moved": { "down": outcome.bytes_down, "up": outcome.bytes_up },
        "evictions": outcome.evictions,
        "too_long": outcome.too_long,
        "tenants": (0..).map(TenantId).zip(&outcome.tenants).map(|(id, of)| reuse(of, Some(id))).collect::<Vec<_>>(),
    });
    if let (Value::Object(object), Value::Object(all)) = (&mut object, reuse(&outcome.all, None)) {
        object.extend(all);
    }
    if let Source::Record(record) = source {
        let (runs, with_beginning) = record.runs();
        let ms = |request: Option<&Request>| request.map(|request| (record.zero_us + request.at.0) / 1000);
        let requests = record.trace.requests.get(settings.first_counted(&record.trace)..).unwrap_or_default();
        object["record"] = json!({
            "counted": {"turns": requests.len(), "from_ms": ms(requests.first()), "to_ms": ms(requests.last())},
            "replayed": match replayed.how {
                How::AsRecorded => "as_recorded",
                How::WhatIf => "what_if",
            },
            "runs": runs,
            "runs_with_beginning": with_beginning,
            "turns": record.trace.requests.len(),
            "span_s": record.trace.span_s(),
            "faults": record.faults,
        });
    }
    if arguments.journal > 0 {
        object["journal"] = sentences(settings, outcome).collect();
    }
    object
}

fn sentences(settings: &ReplaySettings, outcome: &Outcome) -> impl Iterator<Item = String> {
    outcome.journal.iter().map(|entry| {
        let seconds = entry.at.0 / 1_000_000;
        format!("{seconds} s, conversation {}: {}", entry.victim.0, settings.sentence(entry))
    })
}

/// How a record was replayed, and what of it is missing.
fn account(record: &Record, how: How) -> String {
    let (runs, with_beginning) = record.runs();
    let (runs, turns) = (counted(runs, "run", "runs"), counted(record.trace.requests.len(), "turn", "turns"));
    let how = match how {
        How::AsRecorded => format!(
            "{with_beginning} of the record's {runs} ({turns} in all), each as recorded under its own settings: the same \
             decisions, entry for entry\n"
        ),
        How::WhatIf => format!(
            "the record's {turns}, of {runs}, as a trace: what would have happened, had memory been empty at the first \
             and the server never restarted\n"
        ),
    };
    record.faults.iter().fold(how, |text, fault| text + "  " + fault + "\n")
}

fn table(arguments: &ReplayArgs, source: &Source, settings: &ReplaySettings, replayed: &Replayed) -> String {
    let outcome = &replayed.outcome;
    let all = &outcome.all;
    let row = |what: &str, tokens: u64| {
        let percent = 100.0 * share(tokens, all.reusable_tokens);
        format!("{what:<24}{:>18}  {percent:6.2} %\n", grouped(tokens))
    };
    let sizes = format!(
        "{} on {} tokens of device, {} of host and {} of disk; distinct in the trace: {}\n",
        policy_name(settings.policy),
        grouped(settings.device_tokens),
        grouped(settings.host_tokens),
        grouped(settings.disk_tokens),
        grouped(source.trace().distinct_tokens()),
    );
    let warm_up = match (settings.last, settings.warm_up) {
        (Some(last), _) => format!("counted: what came in the {} s before the last turn\n", last.as_secs()),
        (None, 0.0) => String::new(),
        (None, share) => format!("not counted: the first {:.0} % of the turns\n", 100.0 * share),
    };
    let record = match source {
        Source::Record(record) => account(record, replayed.how),
        Source::Trace(_) => String::new(),
    };
    let mut text = record
        + &sizes
        + &warm_up
        + "\n"
        + &row("re-usable tokens", all.reusable_tokens)
        + &row("  found on the device", all.device_tokens)
        + &row("  reloaded from the host", all.host_tokens)
        + &row("  loaded from disk", all.disk_tokens)
        + &row("  encoded again", all.reencoded_tokens)
        + &format!("{:<24}{:>18}\n", "cost of encoding again", grouped(all.reencode_cost as u64))
        + &format!("{:<24}{:>18}\n", "bytes copied down", grouped(outcome.bytes_down))
        + &format!("{:<24}{:>18}\n", "bytes copied up", grouped(outcome.bytes_up))
        + &format!("{:<24}{:>18}\n", "evictions", grouped(outcome.evictions));
    if let Some(Spread { p50_ms, p95_ms }) = first_tokens(arguments, outcome, None) {
        let times = format!("{p50_ms} ms, 95 %: {p95_ms} ms");
        text += &format!("{:<24}{:>18}\n", "first token, foretold", times);
    }
    if outcome.too_long > 0 {
        text += &format!("{:<24}{:>18}\n", "longer than the device", grouped(outcome.too_long));
    }
    if arguments.journal > 0 {
        text.push('\n');
        sentences(settings, outcome).for_each(|sentence| text += &format!("{sentence}\n"));
    }
    text
}

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let (first, rest) = digits.split_at((digits.len() - 1) % 3 + 1);
    let (threes, _) = rest.as_bytes().as_chunks::<3>();
    threes.iter().fold(first.to_owned(), |text, three| text + "," + &String::from_utf8_lossy(three))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        arguments: ReplayArgs,
    }

    fn parse(arguments: &[&str]) -> Result<ReplayArgs, clap::Error> {
        Program::try_parse_from(["replay"].iter().chain(arguments)).map(|program| program.arguments)
    }

    fn source() -> Source {
        let lines = "t,tenant,conv,turn,in,out,ref,shared,stop\n0,0,1,1,640,64,-1,0,e\n9000,0,1,2,768,64,0,704,e\n";
        Source::Trace(Trace::read(lines.as_bytes()).unwrap())
    }

    #[test]
    fn the_object_has_what_was_found_where_and_the_table_says_the_same() {
        let arguments = parse(&["t.csv", "--device-tokens", "6400", "--warm-up", "0", "--json"]).unwrap();
        let source = source();
        let settings = settings(&arguments, &source).unwrap();
        let outcome = replayed(&source, &settings).unwrap();
        let object = object(&arguments, &source, &settings, &outcome);
        assert_eq!((&object["reusable_tokens"], &object["reencoded_tokens"]), (&json!(704), &json!(0)));
        assert_eq!(object["hit_share"], json!({"device": 1.0, "host": 0.0, "disk": 0.0}));
        assert_eq!(object["bytes_moved"], json!({"down": 0, "up": 0}));
        assert!(table(&arguments, &source, &settings, &outcome).contains("found on the device"));
    }

    #[test]
    fn sizes_are_asked_for_once_and_shares_are_of_distinct_tokens() {
        let of = |arguments: &[&str]| settings(&parse(arguments).unwrap(), &source());
        assert!(of(&["t.csv"]).unwrap_err().to_string().contains("--device-share"));
        assert!(parse(&["t.csv", "--device-share", "0.1", "--device-tokens", "9"]).is_err());
        assert_eq!(of(&["t.csv", "--device-share", "0.5"]).unwrap().device_tokens, 416);
        assert!(of(&["t.csv", "--device-share", "2"]).unwrap_err().to_string().contains("--device-share"));
        assert!(of(&["t.csv", "--device-share", "0.1", "--ends", "7"]).unwrap_err().to_string().contains("--ends"));
    }

    #[test]
    fn first_tokens_are_foretold_where_a_speed_is_given() {
        let of = |more: &[&str]| {
            let arguments = parse(&[&["t.csv", "--device-tokens", "6400", "--last", "1"], more].concat()).unwrap();
            let source = source();
            let settings = settings(&arguments, &source).unwrap();
            let outcome = replayed(&source, &settings).unwrap();
            (object(&arguments, &source, &settings, &outcome), table(&arguments, &source, &settings, &outcome))
        };
        let (told, table) = of(&["--prefill-per-s", "1000"]);
        // The second turn alone: 64 of its 768 tokens were new.
        assert_eq!((&told["requests"], &told["ttft"]["p95_ms"]), (&json!(1), &json!(64)), "{told}");
        assert_eq!(told["tenants"][0]["ttft"], told["ttft"]);
        assert!(table.contains("first token, foretold"));
        // They stand at 736 on the mean.
        let (slower, _) = of(&["--prefill-per-s", "1000", "--prefill-doubles-at", "736"]);
        assert_eq!(slower["ttft"]["p95_ms"], json!(128), "{slower}");
        assert!(of(&[]).0["ttft"].is_null());
    }

    #[test]
    fn numbers_are_grouped_by_threes() {
        assert_eq!([0, 12, 123, 1234, 1_234_567].map(grouped), ["0", "12", "123", "1,234", "1,234,567"]);
    }
}
