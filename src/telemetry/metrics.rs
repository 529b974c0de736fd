//! Which numbers does a scraper see, and what do they mean?
//!
//! One table of all of them: name, kind, unit, labels, help, buckets. Whoever counts uses the table's entry, so that a metric
//! without help, or a histogram without buckets, can't exist; docs/metrics.md is made from it. Labels are bounded: tenants by
//! configuration, routes by the router, the rest by enums; conversations and pairs of tenants never.

mod entry;
mod page;

use metrics::Unit;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use parking_lot::Mutex;

use super::process;
pub use entry::{Counter, Gauge, Histogram, Reading, Recorder, Values};
use entry::{Description, Entry, LabelOf};
pub use page::page;

macro_rules! table {
    ($(
        $kind:ident $constant:ident, $name:literal, $unit:ident, [$($label:ident: $values:expr),*], $help:literal $(, $more:expr)?;
    )*) => {
        $(
            #[doc = $help]
            pub static $constant: $kind = $kind(
                Description {
                    name: $name,
                    unit: Unit::$unit,
                    labels: &[$(LabelOf { name: stringify!($label), values: $values }),*],
                    help: $help,
                }
                $(, $more)?
            );
        )*
        const TABLE: &[&(dyn Entry + Sync)] = &[$(&$constant),*];
    };
}

/// Upper bounds of the buckets of times, in seconds.
pub const LATENCY_S: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
/// A step, and so the time between two tokens: single milliseconds for a small model, tenths of seconds for a full batch.
const STEP_S: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0];
const ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0];
/// From one block between memories to a long conversation from a slow disk.
const TRANSFER_S: &[f64] =
    &[0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// Fewer, as there is a series of them for each route.
const HTTP_S: &[f64] = &[0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
const GROUP: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

const OUTCOMES: &[&str] = &["finished", "cancelled", "failed"];
const SOURCES: &[&str] = &["resident", "shared", "reloaded_host", "reloaded_disk", "encoded"];
const PATHS: &[&str] = &["fresh", "hot", "reloaded", "reencoded"];
const TIERS: &[&str] = &["device", "host", "disk"];
const RULES: &[&str] = &["ended", "lru", "return_rate", "over_ceiling"];
const WHOSE: &[&str] = &["own", "other"];
const STEPS: &[&str] = &["prefill", "decode"];
const DIRECTIONS: &[&str] = &["offload", "reload", "store", "load", "erase"];
const ENDS: &[&str] = &["left", "done"];
const LIMITS: &[&str] = &["requests_per_minute", "concurrent_turns", "sockets"];
const EDITS: &[&str] = &["applied", "refused"];
const EXPORTS: &[&str] = &["exported", "failed"];
const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"];
/// What the paths of requests begin with.
pub const RESOURCES: &[&str] =
    &["/v1/chat/completions", "/v1/responses", "/v1/conversations", "/v1/models", "/admin", "/metrics", "other"];
const STATUSES: &[&str] = &["1xx", "2xx", "3xx", "4xx", "5xx"];

table! {
    Gauge BUILD_INFO, "rekindle_build_info", Count, [version: Values::Version], "1; the version is its label.";

    Counter ENGINE_STEPS, "rekindle_engine_steps_total", Count, [], "Forward passes of the model.";
    Histogram STEP_SECONDS, "rekindle_engine_step_seconds", Seconds, [kind: Values::OneOf(STEPS)],
        "A step's time, from its plan to its tokens: one that encodes part of a prompt is prefill, any other decode.", STEP_S;
    Histogram STEP_ROWS, "rekindle_engine_step_rows", Count, [], "Tokens that went through the model in one step.", ROWS;
    Gauge ENGINE_RUNNING, "rekindle_engine_running_turns", Count, [], "Turns in the batch.";
    Gauge ENGINE_QUEUED, "rekindle_engine_queued_turns", Count, [], "Turns that wait for memory or their place.";
    Gauge ENGINE_RELOADING, "rekindle_engine_reloading_turns", Count, [], "Turns that wait for their KV to come back.";
    Counter TURNS, "rekindle_turns_total", Count, [outcome: Values::OneOf(OUTCOMES)], "Turns that ended, by outcome.";
    Counter PREEMPTIONS, "rekindle_preemptions_total", Count, [], "Running turns that were offloaded to let others go on.";
    Counter EVICTIONS, "rekindle_evictions_total", Count, [], "Decisions that took device KV of a conversation.";
    Counter PROMPT_TOKENS, "rekindle_prompt_tokens_total", Count, [source: Values::OneOf(SOURCES)],
        "Prompt tokens by where their KV came from: resident, shared, reloaded_host, reloaded_disk or encoded.";
    Counter PROMPT_RENDERED_BYTES, "rekindle_prompt_rendered_bytes_total", Bytes, [], "Text that chat templates wrote for prompts.";
    Counter PROMPT_TOKENIZED_TOKENS, "rekindle_prompt_tokenized_tokens_total", Count, [],
        "Prompt tokens that were made of text; the others were known from the turn before.";
    Counter PROMPT_HASHED_BLOCKS, "rekindle_prompt_hashed_blocks_total", Count, [],
        "Blocks of prompts that were hashed; the others were known from the turn before.";
    Counter REENCODED_TOKENS, "rekindle_reencoded_tokens_total", Count, [],
        "The part of the encoded prompt tokens whose KV their conversation had before and lost.";
    Counter GENERATED_TOKENS, "rekindle_generated_tokens_total", Count, [], "Tokens sampled.";
    Counter ISOLATION_FAULTS, "rekindle_isolation_faults_total", Count, [],
        "Evictions for another tenant that took one below its floor, or served one at its ceiling. Any value but 0 is a fault.";
    Counter VERIFICATION_FAILURES, "rekindle_verification_failures_total", Count, [],
        "Blocks whose bytes did not match their checksum on reload; each was re-encoded.";
    Counter OFFLOADED_BYTES, "rekindle_offloaded_bytes_total", Bytes, [], "KV copied from the device to the host.";
    Counter RELOADED_BYTES, "rekindle_reloaded_bytes_total", Bytes, [], "KV copied back from the host.";
    Counter STORED_BYTES, "rekindle_stored_bytes_total", Bytes, [], "KV written to disk.";
    Counter LOADED_BYTES, "rekindle_loaded_bytes_total", Bytes, [], "KV read back from disk.";
    Histogram TRANSFER_SECONDS, "rekindle_transfer_seconds", Seconds, [direction: Values::OneOf(DIRECTIONS)],
        "A transfer of blocks: offload to the host, reload from it, store on disk, load from there, erase there.", TRANSFER_S;
    Counter STALLED_LOADS, "rekindle_stalled_loads_total", Count, [],
        "Loads from disk that took far longer than foretold; their turns were re-encoded.";
    Gauge DISK_CONFIGURED, "rekindle_disk_tier_configured", Count, [], "1 if the configuration asks for a disk tier.";
    Gauge DISK_UP, "rekindle_disk_tier_up", Count, [],
        "1 if the disk tier takes KV; 0 without one, and for a while after a write that failed.";
    Gauge DISK_BAD_SLOTS, "rekindle_disk_bad_slots", Count, [], "Slots out of use, since what was read from them was wrong.";
    Counter DISK_WRITE_FAILURES, "rekindle_disk_write_failures_total", Count, [], "Writes that the disk refused.";
    Gauge RUNNING_BYTES, "rekindle_running_bytes", Bytes, [], "KV of running turns on the device; what several share counts for each.";
    Gauge POOL_BYTES, "rekindle_pool_bytes", Bytes, [tier: Values::OneOf(TIERS)], "Size of a tier's pool.";
    Gauge POOL_FREE_BYTES, "rekindle_pool_free_bytes", Bytes, [tier: Values::OneOf(TIERS)], "Bytes of a tier's pool that hold nothing.";
    Gauge POOL_PINNED_BYTES, "rekindle_pool_pinned_bytes", Bytes, [tier: Values::OneOf(TIERS)], "Bytes of a tier's pool that pins keep from the evictor.";
    Gauge POOL_WAITING_BYTES, "rekindle_pool_waiting_bytes", Bytes, [tier: Values::OneOf(TIERS)],
        "Bytes of a tier's pool that wait to be overwritten, or are out of use. With all tenants' they are what is not free.";
    Gauge PREFILL_RATE, "rekindle_prefill_tokens_per_second", CountPerSecond, [],
        "Moving average of prefill; 0 before the first.";
    Gauge RELOAD_RATE, "rekindle_reload_bytes_per_second", CountPerSecond, [],
        "Moving average of reloads from the host; 0 before the first.";
    Gauge LOAD_RATE, "rekindle_load_bytes_per_second", CountPerSecond, [],
        "Moving average of loads from disk; 0 before the first.";

    Gauge TENANT_BYTES, "rekindle_tenant_bytes", Bytes, [tenant: Values::Tenant, tier: Values::OneOf(TIERS)], "KV of a tenant in a tier; what its conversations share counts once.";
    Counter TENANT_BYTE_SECONDS, "rekindle_tenant_byte_seconds_total", Count, [tenant: Values::Tenant, tier: Values::OneOf(TIERS)],
        "Bytes of a tier that a tenant has held, times the seconds that it held them.";
    Counter DISPLACED, "rekindle_displaced_evictions_total", Count,
        [tenant: Values::Tenant, for_tenant: Values::OneOf(WHOSE)],
        "Evictions of a tenant's conversations, by whether they made room for a turn of its own or of another tenant.";
    Counter DISPLACED_BYTES, "rekindle_displaced_bytes_total", Bytes,
        [tenant: Values::Tenant, for_tenant: Values::OneOf(WHOSE)],
        "KV that these evictions freed in their tiers.";
    Counter LOST_BYTES, "rekindle_displaced_lost_bytes_total", Bytes,
        [tenant: Values::Tenant, for_tenant: Values::OneOf(WHOSE)],
        "The part of it of which no copy was left.";
    Counter CAUSED_EVICTIONS, "rekindle_caused_evictions_total", Count, [tenant: Values::Tenant],
        "Evictions that made room for a tenant's turns, of its own conversations and of others'.";
    Counter TENANT_EVICTIONS, "rekindle_tenant_evictions_total", Count, [tenant: Values::Tenant, rule: Values::OneOf(RULES)], "Evictions of a tenant's conversations, by rule.";
    Counter EVICTED_SILENCES, "rekindle_evicted_silences_total", Count, [tenant: Values::Tenant],
        "Silences in which a conversation lost device KV, by tenant.";
    Counter EARLY_RETURNS, "rekindle_early_returns_total", Count, [tenant: Values::Tenant],
        "Of these, how many ended within a minute of the loss: what the evictor was wrong about.";
    Counter PATH_TURNS, "rekindle_path_turns_total", Count, [tenant: Values::Tenant, path: Values::OneOf(PATHS)],
        "Turns that came to a first token, by tenant and by how they found their history.";
    Counter SAVED_TOKENS, "rekindle_saved_prefill_tokens_total", Count, [tenant: Values::Tenant], "Prompt tokens that a tenant's turns found, and did not encode.";
    Counter SAVED_MS, "rekindle_saved_prefill_milliseconds_total", Milliseconds, [tenant: Values::Tenant],
        "Time that encoding them would have taken, less what reloading took.";
    Gauge FLIGHT_RECORD_BYTES, "rekindle_flight_record_bytes", Bytes, [], "Size of the flight record's files.";
    Counter FLIGHT_RECORD_LOST, "rekindle_flight_record_lost_steps_total", Count, [],
        "Steps that are missing in the flight record: a replay as recorded ends at the first.";

    Histogram TTFT_SECONDS, "rekindle_turn_first_token_seconds", Seconds, [path: Values::OneOf(PATHS)],
        "From a turn's arrival at the engine to its first token, by how it found its history: fresh, hot, reloaded or reencoded.", &LATENCY_S;
    Histogram TOKEN_GAP_SECONDS, "rekindle_turn_inter_token_seconds", Seconds, [],
        "From one token of a turn to its next, where it is handed on to the client.", STEP_S;
    Histogram QUEUE_SECONDS, "rekindle_turn_queue_seconds", Seconds, [], "A turn's wait for its place.", &LATENCY_S;
    Gauge LIVE_SESSIONS, "rekindle_live_sessions", Count, [], "Conversations that have an actor.";
    Counter CONVERSATIONS_ENDED, "rekindle_conversations_ended_total", Count, [by: Values::OneOf(ENDS)],
        "Conversations that were over, so that their KV goes first, by what said so: left (all sockets) or done (a client).";

    Counter HTTP_REQUESTS, "rekindle_http_requests_total", Count,
        [route: Values::Route, method: Values::OneOf(METHODS), status: Values::OneOf(STATUSES)],
        "Requests, counted at the last byte of their answers; a WebSocket at its upgrade.";
    Histogram HTTP_SECONDS, "rekindle_http_request_seconds", Seconds, [resource: Values::OneOf(RESOURCES)],
        "A request's time, from its head to the last byte of its answer, by what its path begins with; of a WebSocket, that of its upgrade.",
        HTTP_S;
    Gauge SOCKETS, "rekindle_websocket_connections", Count, [], "WebSockets that are open.";

    Counter LIMITED, "rekindle_limited_total", Count, [tenant: Values::Tenant, limit: Values::OneOf(LIMITS)],
        "What a tenant asked for beyond a limit of its own, by tenant and limit; each was refused with 429.";
    Counter TENANTS_FILE_EDITS, "rekindle_tenants_file_edits_total", Count, [outcome: Values::OneOf(EDITS)],
        "Edits of the tenants file that the server saw, by outcome: applied or refused.";

    Histogram STORE_COMMIT_SECONDS, "rekindle_store_commit_seconds", Seconds, [],
        "A group's time from its first request to its answers.", &LATENCY_S;
    Counter STORE_FAILED_COMMITS, "rekindle_store_failed_commits_total", Count, [],
        "Groups that the store did not commit; their requests were refused.";
    Histogram STORE_GROUP_REQUESTS, "rekindle_store_group_requests", Count, [], "Requests that shared one commit.", GROUP;

    Counter TRACE_SPANS, "rekindle_trace_spans_total", Count, [outcome: Values::OneOf(EXPORTS)],
        "Spans for the collector of traces, by what became of them; a full queue drops more, uncounted.";

    Reading PROCESS_CPU, "process_cpu_seconds_total", Seconds, [], "Processor time of the process.", process::cpu_seconds;
    Reading PROCESS_RESIDENT, "process_resident_memory_bytes", Bytes, [],
        "Memory of the process that is in RAM.", process::resident_bytes;
    Reading PROCESS_OPEN_FDS, "process_open_fds", Count, [],
        "Files and sockets that the process has open.", process::open_fds;
    Reading PROCESS_MAX_FDS, "process_max_fds", Count, [], "How many it may have open.", process::max_fds;
    Reading PROCESS_START, "process_start_time_seconds", Seconds, [],
        "When the process began, in seconds since 1970.", process::start_time_s;
    Reading PROCESS_THREADS, "process_threads", Count, [], "Threads of the process.", process::threads;
}

/// The process's recorder. Before `install` all counting goes nowhere, and costs next to nothing.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
}

impl Metrics {
    /// Installs the recorder once a process; later calls give the same one.
    pub fn install() -> Result<Self, BuildError> {
        static INSTALLED: Mutex<Option<Metrics>> = Mutex::new(None);
        let mut installed = INSTALLED.lock();
        if let Some(metrics) = &*installed {
            return Ok(metrics.clone());
        }
        let mut builder = PrometheusBuilder::new();
        for entry in TABLE {
            if let Some(buckets) = entry.buckets() {
                builder =
                    builder.set_buckets_for_metric(Matcher::Full(entry.description().name.to_owned()), buckets)?;
            }
        }
        let metrics = Self { handle: builder.install_recorder()? };
        for entry in TABLE {
            entry.install();
        }
        BUILD_INFO.set(1.0, &[("version", env!("CARGO_PKG_VERSION"))]);
        Ok(installed.insert(metrics).clone())
    }

    /// All metrics in Prometheus' text format. The caller brings the snapshot-based ones up to date first.
    pub fn render(&self) -> String {
        let mut page = self.handle.render();
        for entry in TABLE {
            if let Some(value) = entry.read() {
                let (Description { name, help, .. }, kind) = (entry.description(), entry.kind());
                page += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n\n");
            }
        }
        page
    }

    /// To be called every few seconds: without it, histograms keep every value until the next scrape.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

/// A tenant's numbers that are counted as things happen begin at 0.
pub fn begin_tenant(name: &str) {
    LIMITED.begin(&[("tenant", name)]);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_metric_is_named_once_in_prometheus_style_and_says_what_it_means() {
        let mut names = BTreeSet::new();
        for entry in TABLE {
            let Description { name, help, labels, .. } = entry.description();
            assert!(names.insert(name), "{name} is there twice");
            assert!(
                (name.starts_with("rekindle_") || name.starts_with("process_"))
                    && name.chars().all(|c| c.is_ascii_lowercase() || c == '_'),
                "{name}"
            );
            assert_eq!(name.ends_with("_total"), entry.kind() == "counter", "{name}");
            assert!(help.ends_with('.'), "{name} needs a sentence");
            assert!(entry.buckets().is_none_or(|b| b.is_sorted() && !b.is_empty()), "{name}: buckets");
            assert!(!labels.iter().any(|label| label.name == "le"), "{name}");
        }
    }

    #[test]
    fn what_was_counted_is_in_the_text_with_its_help() {
        let metrics = Metrics::install().unwrap();
        TENANTS_FILE_EDITS.set_total(7, &[("outcome", "refused")]);
        TENANTS_FILE_EDITS.set_total(3, &[("outcome", "refused")]);
        EVICTED_SILENCES.add(2, &[("tenant", "a\"b")]);
        STORE_GROUP_REQUESTS.record(3.0, &[]);
        let text = metrics.render();
        assert!(text.contains("# HELP rekindle_turns_total Turns that ended, by outcome."), "{text}");
        assert!(text.contains("\nrekindle_tenants_file_edits_total{outcome=\"refused\"} 7\n"), "a total fell: {text}");
        assert!(text.contains("rekindle_evicted_silences_total{tenant=\"a\\\"b\"} 2"), "{text}");
        assert!(text.contains("rekindle_store_group_requests_bucket{le=\"4\"}"), "no buckets: {text}");
        let again = Metrics::install().unwrap().render();
        assert!(again.contains("{outcome=\"refused\"} 7"), "a second install is the first");
    }

    #[test]
    fn what_can_be_zero_is_there_from_the_first_scrape_on() {
        let metrics = Metrics::install().unwrap();
        begin_tenant("newcomer");
        let text = metrics.render();
        for line in [
            "rekindle_preemptions_total 0",
            "rekindle_trace_spans_total{outcome=\"failed\"} 0",
            "rekindle_transfer_seconds_count{direction=\"erase\"} 0",
            "rekindle_limited_total{tenant=\"newcomer\",limit=\"sockets\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
        }
    }

    #[test]
    fn the_process_is_told_of_under_the_names_that_everybody_uses() {
        let text = Metrics::install().unwrap().render();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name} is not in {text}")).parse().unwrap()
        };
        assert!(value("process_cpu_seconds_total") > 0.0);
        assert!(value("process_resident_memory_bytes") > 1e6);
        assert!((1.0..=value("process_max_fds")).contains(&value("process_open_fds")));
        assert!(value("process_threads") >= 1.0);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((0.0..86_400.0).contains(&(now - value("process_start_time_seconds") + 1.0)));
        assert!(text.contains("\n# TYPE process_cpu_seconds_total counter\n"), "{text}");
    }
}
