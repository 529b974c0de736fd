//! What does the page of documentation say of the metrics?
//!
//! `docs/metrics.md` is this text, and a test fails where it is not.

use super::entry::{Description, LabelOf, Values};
use super::{TABLE, Unit};

const HEAD: &str = "# Metrics

What `/metrics` shows, in Prometheus' text format. Made by `rekindle metrics`, so that it is what this build says. A histogram
`x` has the series `x_bucket`, `x_sum` and `x_count`. Counters begin at 0 at the server's start, and are there from the first
scrape on; those of a tenant from when the tenants file names it. No label has a value that a client chose.

";

/// The whole page, in Markdown.
pub fn page() -> String {
    let mut page = HEAD.to_owned();
    page += "| name | kind | unit | labels | what it says |\n|---|---|---|---|---|\n";
    for entry in TABLE {
        let (Description { name, unit, labels, help }, kind) = (entry.description(), entry.kind());
        let labels: Vec<String> = labels.iter().map(label).collect();
        let buckets = entry.buckets().map(|bounds| {
            let bounds: Vec<String> = bounds.iter().map(f64::to_string).collect();
            format!(" Buckets up to {}.", bounds.join(", "))
        });
        let buckets = buckets.unwrap_or_default();
        let (unit, labels) = (word(*unit), labels.join("; "));
        page += &format!("| `{name}` | {kind} | {unit} | {labels} | {help}{buckets} |\n");
    }
    page
}

fn label(label: &LabelOf) -> String {
    let values = match label.values {
        Values::OneOf(values) => values.join(", "),
        Values::Tenant => "ids of the tenants file, or `default`".to_owned(),
        Values::Route => "patterns of the router, or unmatched".to_owned(),
        Values::Version => "the build's version".to_owned(),
    };
    format!("`{}`: {values}", label.name)
}

fn word(unit: Unit) -> &'static str {
    match unit {
        Unit::Count => "",
        Unit::CountPerSecond => "a second",
        other => other.as_str(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_documentation_is_what_the_table_says() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            kept == page(),
            "docs/metrics.md is of another table; write it again: rekindle metrics > docs/metrics.md"
        );
    }
}
