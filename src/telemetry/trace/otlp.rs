//! How do spans get to the collector?
//!
//! As OTLP over HTTP, in protobuf, from a thread of their own behind a bounded queue. What does not fit is dropped, as is what
//! the collector does not take; that is said once until it takes some again.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span as _, SpanId, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Array, Context, KeyValue, StringValue};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{self as sdk, BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SpanData};
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::registry::LookupSpan;

use super::{Attribute, Times, TraceError, TraceSettings, Value};
use crate::telemetry::metrics::TRACE_SPANS;

/// Spans that wait for the collector: some hundred turns.
const QUEUE: usize = 4096;
/// Longest time that a span waits for others to go with.
const EVERY: Duration = Duration::from_secs(2);
/// Longest time that the collector may take for what it is sent.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest time for the last spans at the end.
const GOODBYE: Duration = Duration::from_millis(1500);
/// What watches the server, as routes begin: a trace of each look says nothing.
const PROBES: [&str; 4] = ["/healthz", "/readyz", "/metrics", "/admin"];

/// Makes the spans that are known after the fact. There is one subscriber a process, and one of these.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// The way to the collector.
pub struct Traces {
    provider: sdk::SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// Headers for the collector, such as a key, come from `OTEL_EXPORTER_OTLP_HEADERS`, and what else is to be said of this
    /// server from `OTEL_RESOURCE_ATTRIBUTES`.
    pub fn start(settings: &TraceSettings) -> Result<Self, TraceError> {
        let TraceSettings { endpoint, ratio } = settings;
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
            .with_timeout(PATIENCE)
            .build()
            .map_err(|error| TraceError::Endpoint { endpoint: endpoint.clone(), reason: error.to_string() })?;
        let exporter = Exporter { inner: exporter, failing: AtomicBool::new(false) };
        let queue = BatchConfigBuilder::default().with_max_queue_size(QUEUE).with_scheduled_delay(EVERY).build();
        let instance = format!("{:032x}", rand::random::<u128>());
        let about = [
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", instance),
        ];
        let provider = sdk::SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(queue).build())
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(*ratio))))
            .with_resource(Resource::builder().with_service_name("rekindle").with_attributes(about).build())
            .build();
        let tracer = provider.tracer("rekindle");
        Ok(Self { tracer: TRACER.get_or_init(|| tracer).clone(), provider })
    }

    /// Takes our own spans, whatever the log's level is, and no events: those are the log's.
    pub(in crate::telemetry) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let ours = filter_fn(|about| about.is_span() && about.target().starts_with("rekindle"));
        tracing_opentelemetry::layer()
            .with_tracer(self.tracer.clone())
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            .with_context_activation(false)
            .with_filter(ours.with_max_level_hint(LevelFilter::INFO))
    }

    /// Sends what waits, for as long as is left to a process that ends.
    pub fn end(self) {
        if let Err(error) = self.provider.shutdown_with_timeout(GOODBYE) {
            tracing::debug!(%error, "the last spans were not exported");
        }
    }
}

/// Makes a span part of the client's trace, if the client said which.
pub fn continue_from(span: &Span, traceparent: Option<&str>, tracestate: Option<&str>) {
    let (Some(traceparent), Some(_)) = (traceparent, TRACER.get()) else { return };
    let headers = [("traceparent", Some(traceparent)), ("tracestate", tracestate)];
    let headers = headers.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())));
    let headers: HashMap<String, String> = headers.collect();
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
    if context.span().span_context().is_valid()
        && let Err(error) = span.set_parent(context)
    {
        tracing::debug!(%error, "a request does not continue its client's trace");
    }
}

/// Gives a span the name that is known by now.
pub fn rename(span: &Span, name: String) {
    if TRACER.get().is_some() {
        span.context().span().update_name(name);
    }
}

/// Says more of a span than the log does.
pub fn annotate(span: &Span, attributes: Vec<Attribute>) {
    if TRACER.get().is_some() {
        span.context().span().set_attributes(attributes.into_iter().map(key_value));
    }
}

/// Says that what a span stands for failed, and of which kind the failure is.
pub fn fail(span: &Span, kind: &'static str) {
    if TRACER.get().is_some() {
        span.set_attribute("error.type", kind);
        span.set_status(Status::error(kind));
    }
}

/// Adds a phase of a span, which is over already.
pub fn child(span: &Span, name: &'static str, (from, to): Times, attributes: Vec<Attribute>) {
    let Some(tracer) = TRACER.get() else { return };
    let context = span.context();
    if context.span().span_context().is_sampled() {
        let attributes = attributes.into_iter().map(key_value);
        let builder = tracer.span_builder(name).with_start_time(from).with_attributes(attributes);
        builder.start_with_context(tracer, &context).end_with_timestamp(to);
    }
}

fn key_value((key, value): Attribute) -> KeyValue {
    match value {
        Value::Text(text) => KeyValue::new(key, text),
        Value::Only(text) => {
            KeyValue::new(key, opentelemetry::Value::Array(Array::String(vec![StringValue::from(text)])))
        }
        Value::Count(count) => KeyValue::new(key, i64::try_from(count).unwrap_or(i64::MAX)),
    }
}

/// An exporter whose failures are told: the first of a row to the log, each to the metrics.
#[derive(Debug)]
struct Exporter {
    inner: SpanExporter,
    failing: AtomicBool,
}

impl sdk::SpanExporter for Exporter {
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        batch.retain(|span| !is_of_a_probe(span));
        if batch.is_empty() {
            return Ok(());
        }
        for span in &mut batch {
            // What begins here was asked for from outside.
            if span.parent_span_id == SpanId::INVALID || span.parent_span_is_remote {
                span.span_kind = SpanKind::Server;
            }
        }
        let spans = batch.len() as u64;
        let exported = self.inner.export(batch).await;
        match &exported {
            Ok(()) => {
                TRACE_SPANS.add(spans, &[("outcome", "exported")]);
                if self.failing.swap(false, Ordering::Relaxed) {
                    tracing::info!("the collector takes traces again");
                }
            }
            Err(error) => {
                TRACE_SPANS.add(spans, &[("outcome", "failed")]);
                if !self.failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "the collector takes no traces; they are dropped until it does");
                }
            }
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

fn is_of_a_probe(span: &SpanData) -> bool {
    let is_probe = |route: &str| PROBES.iter().any(|probe| route.starts_with(probe));
    span.attributes.iter().any(|about| about.key.as_str() == "http.route" && is_probe(&about.value.as_str()))
}
