//! How are log events written?
//!
//! To stderr, so that stdout stays the program's own. As text for people, or one JSON object a line for machines.

use std::io::IsTerminal;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt};

use super::trace::Traces;

/// The HTTP library reports what clients send wrong as errors of ours. Clients hear of it; whoever names it here hears too.
const QUIET: &str = "actix_http::h1::dispatcher=off";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    Text,
    Json,
}

/// Why logging could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("`{filter}` is no log filter ({reason}); write a level such as `info`, or `warn,rekindle=debug`")]
    Filter { filter: String, reason: String },
    #[error("logging has been started already")]
    Started,
}

/// Starts logging for the whole process. `filter`: a level, or `target=level` pairs, comma separated. `traces`: where the
/// spans go besides. A line of JSON has the fields of all the spans that it is in.
pub fn init(format: Format, filter: &str, traces: Option<&Traces>) -> Result<(), LogError> {
    let filter = parse_filter(filter)?;
    let registry = tracing_subscriber::registry().with(traces.map(Traces::layer));
    let log = fmt::layer().with_writer(std::io::stderr);
    let started = match format {
        Format::Text => {
            let log = log.with_ansi(std::io::stderr().is_terminal()).with_target(false);
            registry.with(log.with_filter(filter)).try_init()
        }
        Format::Json => {
            let log = log.json().flatten_event(true).with_current_span(false).with_span_list(true);
            registry.with(log.with_filter(filter)).try_init()
        }
    };
    started.map_err(|_| LogError::Started)
}

/// Says whether a filter can be read, before anything is started.
pub fn parse_filter(filter: &str) -> Result<EnvFilter, LogError> {
    let refused = |reason: String| LogError::Filter { filter: filter.to_owned(), reason };
    // A word alone would be taken for the name of a target, so that a mistyped level silences everything.
    for word in filter.split(',').map(str::trim).filter(|part| !part.contains('=')) {
        if word.is_empty() || word.parse::<LevelFilter>().is_err() {
            return Err(refused(format!("`{word}` is no level")));
        }
    }
    EnvFilter::builder().parse(format!("{QUIET},{filter}")).map_err(|error| refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_a_level_or_pairs_and_anything_else_is_refused_with_an_example() {
        assert!(parse_filter("info").is_ok());
        assert!(parse_filter("warn,rekindle::engine=trace").is_ok());
        // What is said last of a target counts.
        let named = parse_filter("warn,actix_http::h1::dispatcher=info").unwrap().to_string();
        assert!(named.contains("dispatcher=info") && !named.contains("dispatcher=off"), "{named}");
        for refused in ["rekindle=loud", "inof", "info,rekindle", ""] {
            let sentence = parse_filter(refused).unwrap_err().to_string();
            assert!(sentence.contains(&format!("`{refused}`")) && sentence.contains("`info`"), "{sentence}");
        }
    }
}
