//! Which numbers does a scraper see, and what do they mean?
//!
//! One table of all of them: name, kind, unit, help. Whoever counts uses the table's entry, so that a metric without help,
//! or a histogram without buckets, can't exist. Labels are bounded: tenants by configuration, the rest by enums;
//! conversations never.

use metrics::{Label, Unit, counter, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use parking_lot::Mutex;

/// A number that only rises.
pub struct Counter(Description);
/// A number that rises and falls.
pub struct Gauge(Description);
/// A distribution, with its buckets' upper bounds in its unit.
pub struct Histogram(Description, &'static [f64]);

struct Description {
    name: &'static str,
    unit: Unit,
    help: &'static str,
}

type Labels<'a> = &'a [(&'static str, &'a str)];

macro_rules! table {
    ($($kind:ident $constant:ident, $name:literal, $unit:ident, $help:literal $(, $buckets:expr)?;)*) => {
        $(
            #[doc = $help]
            pub static $constant: $kind =
                $kind(Description { name: $name, unit: Unit::$unit, help: $help } $(, $buckets)?);
        )*
        const TABLE: &[&(dyn Described + Sync)] = &[$(&$constant),*];
    };
}

/// Upper bounds of the buckets of times, in seconds.
pub const LATENCY_S: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
const GROUP: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

table! {
    Gauge BUILD_INFO, "rekindle_build_info", Count, "1; the version is its label.";
    Gauge PROCESS_RESIDENT, "rekindle_process_resident_bytes", Bytes, "Memory of the process that is in RAM.";

    Counter ENGINE_STEPS, "rekindle_engine_steps_total", Count, "Forward passes of the model.";
    Gauge ENGINE_RUNNING, "rekindle_engine_running_turns", Count, "Turns in the batch.";
    Gauge ENGINE_QUEUED, "rekindle_engine_queued_turns", Count, "Turns that wait for memory or their place.";
    Gauge ENGINE_RELOADING, "rekindle_engine_reloading_turns", Count, "Turns that wait for their KV to come back.";
    Counter TURNS, "rekindle_turns_total", Count, "Turns that ended, by outcome.";
    Counter PREEMPTIONS, "rekindle_preemptions_total", Count, "Running turns that were offloaded to let others go on.";
    Counter EVICTIONS, "rekindle_evictions_total", Count, "Decisions that took device KV of a conversation.";
    Counter PROMPT_TOKENS, "rekindle_prompt_tokens_total", Count,
        "Prompt tokens by where their KV came from: resident, shared, reloaded_host, reloaded_disk or encoded.";
    Counter PROMPT_RENDERED_BYTES, "rekindle_prompt_rendered_bytes_total", Bytes, "Text that chat templates wrote for prompts.";
    Counter PROMPT_TOKENIZED_TOKENS, "rekindle_prompt_tokenized_tokens_total", Count,
        "Prompt tokens that were made of text; the others were known from the turn before.";
    Counter PROMPT_HASHED_BLOCKS, "rekindle_prompt_hashed_blocks_total", Count,
        "Blocks of prompts that were hashed; the others were known from the turn before.";
    Counter REENCODED_TOKENS, "rekindle_reencoded_tokens_total", Count,
        "The part of the encoded prompt tokens whose KV their conversation had before and lost.";
    Counter GENERATED_TOKENS, "rekindle_generated_tokens_total", Count, "Tokens sampled.";
    Counter ISOLATION_FAULTS, "rekindle_isolation_faults_total", Count,
        "Evictions for another tenant that took one below its floor, or served one at its ceiling. Any value but 0 is a fault.";
    Counter VERIFICATION_FAILURES, "rekindle_verification_failures_total", Count,
        "Blocks whose bytes did not match their checksum on reload; each was re-encoded.";
    Counter OFFLOADED_BYTES, "rekindle_offloaded_bytes_total", Bytes, "KV copied from the device to the host.";
    Counter RELOADED_BYTES, "rekindle_reloaded_bytes_total", Bytes, "KV copied back from the host.";
    Counter STORED_BYTES, "rekindle_stored_bytes_total", Bytes, "KV written to disk.";
    Counter LOADED_BYTES, "rekindle_loaded_bytes_total", Bytes, "KV read back from disk.";
    Counter STALLED_LOADS, "rekindle_stalled_loads_total", Count,
        "Loads from disk that took far longer than foretold; their turns were re-encoded.";
    Gauge DISK_UP, "rekindle_disk_tier_up", Count,
        "1 if the disk tier takes KV; 0 without one, and for a while after a write that failed.";
    Gauge DISK_BAD_SLOTS, "rekindle_disk_bad_slots", Count, "Slots out of use, since what was read from them was wrong.";
    Counter DISK_WRITE_FAILURES, "rekindle_disk_write_failures_total", Count, "Writes that the disk refused.";
    Gauge RUNNING_BYTES, "rekindle_running_bytes", Bytes, "KV of running turns on the device; what several share counts for each.";
    Gauge POOL_BYTES, "rekindle_pool_bytes", Bytes, "Size of a tier's pool.";
    Gauge POOL_FREE_BYTES, "rekindle_pool_free_bytes", Bytes, "Bytes of a tier's pool that hold nothing.";
    Gauge POOL_PINNED_BYTES, "rekindle_pool_pinned_bytes", Bytes, "Bytes of a tier's pool that pins keep from the evictor.";
    Gauge POOL_WAITING_BYTES, "rekindle_pool_waiting_bytes", Bytes,
        "Bytes of a tier's pool that wait to be overwritten, or are out of use. With all tenants' they are what is not free.";
    Gauge PREFILL_RATE, "rekindle_prefill_tokens_per_second", CountPerSecond,
        "Moving average of prefill; 0 before the first.";
    Gauge RELOAD_RATE, "rekindle_reload_bytes_per_second", CountPerSecond,
        "Moving average of reloads from the host; 0 before the first.";
    Gauge LOAD_RATE, "rekindle_load_bytes_per_second", CountPerSecond,
        "Moving average of loads from disk; 0 before the first.";

    Gauge TENANT_BYTES, "rekindle_tenant_bytes", Bytes, "KV of a tenant in a tier; what its conversations share counts once.";
    Counter TENANT_BYTE_SECONDS, "rekindle_tenant_byte_seconds_total", Count,
        "Bytes of a tier that a tenant has held, times the seconds that it held them.";
    Counter DISPLACED, "rekindle_displaced_evictions_total", Count,
        "Evictions of a tenant's conversations, by the tenant whose turns they made room for.";
    Counter DISPLACED_BYTES, "rekindle_displaced_bytes_total", Bytes,
        "KV that these evictions freed in their tiers.";
    Counter LOST_BYTES, "rekindle_displaced_lost_bytes_total", Bytes, "The part of it of which no copy was left.";
    Counter TENANT_EVICTIONS, "rekindle_tenant_evictions_total", Count, "Evictions of a tenant's conversations, by rule.";
    Counter EVICTED_SILENCES, "rekindle_evicted_silences_total", Count,
        "Silences in which a conversation lost device KV, by tenant.";
    Counter EARLY_RETURNS, "rekindle_early_returns_total", Count,
        "Of these, how many ended within a minute of the loss: what the evictor was wrong about.";
    Counter PATH_TURNS, "rekindle_path_turns_total", Count,
        "Turns that came to a first token, by tenant and by how they found their history.";
    Counter SAVED_TOKENS, "rekindle_saved_prefill_tokens_total", Count, "Prompt tokens that a tenant's turns found, and did not encode.";
    Counter SAVED_MS, "rekindle_saved_prefill_milliseconds_total", Milliseconds,
        "Time that encoding them would have taken, less what reloading took.";
    Gauge FLIGHT_RECORD_BYTES, "rekindle_flight_record_bytes", Bytes, "Size of the flight record's files.";
    Counter FLIGHT_RECORD_LOST, "rekindle_flight_record_lost_steps_total", Count,
        "Steps that are missing in the flight record: a replay as recorded ends at the first.";

    Histogram TTFT_SECONDS, "rekindle_turn_first_token_seconds", Seconds,
        "From a turn's arrival at the engine to its first token, by how it found its history: fresh, hot, reloaded or reencoded.", &LATENCY_S;
    Histogram QUEUE_SECONDS, "rekindle_turn_queue_seconds", Seconds, "A turn's wait for its place.", &LATENCY_S;
    Gauge LIVE_SESSIONS, "rekindle_live_sessions", Count, "Conversations that have an actor.";
    Counter CONVERSATIONS_ENDED, "rekindle_conversations_ended_total", Count,
        "Conversations that were over, so that their KV goes first, by what said so: left (all sockets) or done (a client).";

    Gauge SOCKETS, "rekindle_websocket_connections", Count, "WebSockets that are open.";

    Counter LIMITED, "rekindle_limited_total", Count,
        "What a tenant asked for beyond a limit of its own, by tenant and limit; each was refused with 429.";
    Counter TENANTS_FILE_EDITS, "rekindle_tenants_file_edits_total", Count,
        "Edits of the tenants file that the server saw, by outcome: applied or refused.";

    Histogram STORE_COMMIT_SECONDS, "rekindle_store_commit_seconds", Seconds,
        "A group's time from its first request to its answers.", &LATENCY_S;
    Histogram STORE_GROUP_REQUESTS, "rekindle_store_group_requests", Count, "Requests that shared one commit.", GROUP;
}

impl Counter {
    /// Sets what has been counted elsewhere since the start. Totals only rise: a smaller value than the last is ignored.
    pub fn set_total(&self, total: u64, labels: Labels<'_>) {
        counter!(self.0.name, owned(labels)).absolute(total);
    }

    pub fn add(&self, n: u64, labels: Labels<'_>) {
        counter!(self.0.name, owned(labels)).increment(n);
    }
}

impl Gauge {
    pub fn set(&self, value: f64, labels: Labels<'_>) {
        gauge!(self.0.name, owned(labels)).set(value);
    }

    /// `step`: 1.0 for one more, -1.0 for one less.
    pub fn step(&self, step: f64, labels: Labels<'_>) {
        gauge!(self.0.name, owned(labels)).increment(step);
    }
}

impl Histogram {
    /// `value` is in the metric's own unit.
    pub fn record(&self, value: f64, labels: Labels<'_>) {
        histogram!(self.0.name, owned(labels)).record(value);
    }
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
            entry.describe();
        }
        BUILD_INFO.set(1.0, &[("version", env!("CARGO_PKG_VERSION"))]);
        Ok(installed.insert(metrics).clone())
    }

    /// All metrics in Prometheus' text format. The caller brings the snapshot-based ones up to date first.
    pub fn render(&self) -> String {
        if let Some(bytes) = resident_bytes() {
            PROCESS_RESIDENT.set(bytes as f64, &[]);
        }
        self.handle.render()
    }

    /// To be called every few seconds: without it, histograms keep every value until the next scrape.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

trait Described {
    fn description(&self) -> &Description;
    fn describe(&self);
    fn buckets(&self) -> Option<&'static [f64]> {
        None
    }
}

impl Described for Counter {
    fn description(&self) -> &Description {
        &self.0
    }
    fn describe(&self) {
        metrics::describe_counter!(self.0.name, self.0.unit, self.0.help);
    }
}

impl Described for Gauge {
    fn description(&self) -> &Description {
        &self.0
    }
    fn describe(&self) {
        metrics::describe_gauge!(self.0.name, self.0.unit, self.0.help);
    }
}

impl Described for Histogram {
    fn description(&self) -> &Description {
        &self.0
    }
    fn describe(&self) {
        metrics::describe_histogram!(self.0.name, self.0.unit, self.0.help);
    }
    fn buckets(&self) -> Option<&'static [f64]> {
        Some(self.1)
    }
}

fn owned(labels: Labels<'_>) -> Vec<Label> {
    labels.iter().map(|(key, value)| Label::new(*key, (*value).to_owned())).collect()
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_metric_is_named_once_in_prometheus_style_and_says_what_it_means() {
        let mut names = BTreeSet::new();
        for entry in TABLE {
            let Description { name, help, .. } = entry.description();
            assert!(names.insert(name), "{name} is there twice");
            assert!(
                name.starts_with("rekindle_") && name.chars().all(|c| c.is_ascii_lowercase() || c == '_'),
                "{name}"
            );
            assert!(help.ends_with('.'), "{name} needs a sentence");
            assert!(entry.buckets().is_none_or(|b| b.is_sorted() && !b.is_empty()), "{name}: buckets");
        }
    }

    #[test]
    fn what_was_counted_is_in_the_text_with_its_help() {
        let metrics = Metrics::install().unwrap();
        TURNS.set_total(7, &[("outcome", "test")]);
        TURNS.set_total(3, &[("outcome", "test")]);
        TURNS.add(2, &[("outcome", "a\"b")]);
        STORE_GROUP_REQUESTS.record(3.0, &[]);
        let text = metrics.render();
        assert!(text.contains("# HELP rekindle_turns_total Turns that ended, by outcome."), "{text}");
        assert!(text.contains("\nrekindle_turns_total{outcome=\"test\"} 7\n"), "a total fell: {text}");
        assert!(text.contains("rekindle_turns_total{outcome=\"a\\\"b\"} 2"), "{text}");
        assert!(text.contains("rekindle_store_group_requests_bucket{le=\"4\"}"), "no buckets: {text}");
        assert!(text.contains("rekindle_process_resident_bytes "), "{text}");
        assert!(Metrics::install().unwrap().render().contains("{outcome=\"test\"} 7"), "a second install is the first");
    }
}
