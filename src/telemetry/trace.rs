//! How does a request become a trace that a collector can show?
//!
//! The spans that the log has are those of the trace; what is here adds what only a trace has: attributes, phases that are
//! known after the fact, and the client's own trace as parent. Without a collector, or without the feature `otel`, all of it
//! does nothing.
//! Invariant: a collector that is slow or gone costs spans, and nobody's time.

use std::time::SystemTime;

#[cfg(feature = "otel")]
mod otlp;
#[cfg(feature = "otel")]
pub use otlp::{Traces, annotate, child, continue_from, fail, rename};

#[cfg(not(feature = "otel"))]
mod without;
#[cfg(not(feature = "otel"))]
pub use without::{Traces, annotate, child, continue_from, fail, rename};

/// Where traces go.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSettings {
    /// The collector's address, without `/v1/traces`.
    pub endpoint: String,
    /// The part of traces that is kept where the client's own trace does not say, 0 to 1.
    pub ratio: f64,
}

/// Why traces could not be started.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("`telemetry.otlp_endpoint` = {endpoint} can't be used: {reason}")]
    Endpoint { endpoint: String, reason: String },
    #[error("`telemetry.otlp_endpoint` is set, and this program was built without the feature `otel`")]
    NotBuilt,
}

/// What a span says of something: names as in OpenTelemetry's conventions, where those have one.
pub type Attribute = (&'static str, Value);

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Text(String),
    /// A list of one.
    Only(&'static str),
    Count(u64),
}

/// From when to when.
pub type Times = (SystemTime, SystemTime);
