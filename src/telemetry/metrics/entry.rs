//! What can be counted, and under which labels?
//!
//! A number is of one kind and has the labels that its entry of the table names, with values from where the entry says: a
//! build with debug assertions fails where somebody counts under others.

use metrics::{Label, Unit, counter, gauge, histogram};

/// A number that only rises.
pub struct Counter(pub(super) Description);
/// A number that rises and falls.
pub struct Gauge(pub(super) Description);
/// A distribution, with its buckets' upper bounds in its unit.
pub struct Histogram(pub(super) Description, pub(super) &'static [f64]);
/// What the system says of the process whenever somebody scrapes; `None` where it does not say.
pub struct Reading(pub(super) Description, pub(super) fn() -> Option<f64>);

/// An entry of the table.
pub struct Description {
    pub name: &'static str,
    pub unit: Unit,
    pub labels: &'static [LabelOf],
    pub help: &'static str,
}

/// A label, and which values it has.
pub struct LabelOf {
    pub name: &'static str,
    pub values: Values,
}

/// Where a label's values come from. None comes from what a client sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Values {
    /// These and no others.
    OneOf(&'static [&'static str]),
    /// The ids of the tenants file.
    Tenant,
    /// The router's patterns, and `unmatched` for all other paths.
    Route,
    /// Of the build.
    Version,
}

pub type Labels<'a> = &'a [(&'static str, &'a str)];

impl Counter {
    /// Sets what has been counted elsewhere since the start. Totals only rise: a smaller value than the last is ignored.
    pub fn set_total(&self, total: u64, labels: Labels<'_>) {
        counter!(self.0.name, self.0.owned(labels)).absolute(total);
    }

    pub fn add(&self, n: u64, labels: Labels<'_>) {
        counter!(self.0.name, self.0.owned(labels)).increment(n);
    }

    /// Shows 0 for all values of the labels that are not given, so that a rate sees the first event.
    pub fn begin(&self, given: Labels<'_>) {
        self.0.each(given, |labels| self.add(0, labels));
    }
}

impl Gauge {
    pub fn set(&self, value: f64, labels: Labels<'_>) {
        gauge!(self.0.name, self.0.owned(labels)).set(value);
    }

    /// `step`: 1.0 for one more, -1.0 for one less.
    pub fn step(&self, step: f64, labels: Labels<'_>) {
        gauge!(self.0.name, self.0.owned(labels)).increment(step);
    }
}

impl Histogram {
    /// `value` is in the metric's own unit.
    pub fn record(&self, value: f64, labels: Labels<'_>) {
        self.recorder(labels).record(value);
    }

    /// For whoever records often under the same labels: allocates here, and nothing later.
    pub fn recorder(&self, labels: Labels<'_>) -> Recorder {
        Recorder(histogram!(self.0.name, self.0.owned(labels)))
    }
}

/// Where one series of a histogram is recorded. Of use once the metrics are installed.
pub struct Recorder(metrics::Histogram);

impl Recorder {
    /// `value` is in the metric's own unit.
    pub fn record(&self, value: f64) {
        self.0.record(value);
    }
}

impl Description {
    fn owned(&self, labels: Labels<'_>) -> Vec<Label> {
        debug_assert!(self.takes(labels), "{} is counted under {labels:?}, which its entry does not name", self.name);
        labels.iter().map(|(key, value)| Label::new(*key, (*value).to_owned())).collect()
    }

    fn takes(&self, labels: Labels<'_>) -> bool {
        let allows = |known: &LabelOf, value: &str| match known.values {
            Values::OneOf(values) => values.contains(&value),
            Values::Tenant | Values::Route | Values::Version => true,
        };
        let mut pairs = self.labels.iter().zip(labels);
        self.labels.len() == labels.len()
            && pairs.all(|(known, (key, value))| known.name == *key && allows(known, value))
    }

    /// Does something for each choice of values, where those that nobody can list are `given`; for none if they are not.
    fn each(&self, given: Labels<'_>, mut work: impl FnMut(Labels<'_>)) {
        let mut choices: Vec<Vec<(&'static str, &str)>> = vec![Vec::new()];
        for label in self.labels {
            let values: Vec<&str> = match (given.iter().find(|(key, _)| *key == label.name), label.values) {
                (Some((_, value)), _) => vec![*value],
                (None, Values::OneOf(values)) => values.to_vec(),
                (None, Values::Tenant | Values::Route | Values::Version) => Vec::new(),
            };
            let mut longer = Vec::new();
            for choice in &choices {
                longer.extend(values.iter().map(|value| [choice.as_slice(), &[(label.name, *value)]].concat()));
            }
            choices = longer;
        }
        choices.iter().for_each(|labels| work(labels));
    }
}

/// What all entries of the table can do.
pub(super) trait Entry {
    fn description(&self) -> &Description;
    /// Prometheus' word for it.
    fn kind(&self) -> &'static str;
    /// Tells the recorder name, unit and help, and shows 0 where all values of the labels are known.
    fn install(&self);
    fn buckets(&self) -> Option<&'static [f64]> {
        None
    }
    fn read(&self) -> Option<f64> {
        None
    }
}

impl Entry for Counter {
    fn description(&self) -> &Description {
        &self.0
    }
    fn kind(&self) -> &'static str {
        "counter"
    }
    fn install(&self) {
        metrics::describe_counter!(self.0.name, self.0.unit, self.0.help);
        self.begin(&[]);
    }
}

impl Entry for Gauge {
    fn description(&self) -> &Description {
        &self.0
    }
    fn kind(&self) -> &'static str {
        "gauge"
    }
    fn install(&self) {
        metrics::describe_gauge!(self.0.name, self.0.unit, self.0.help);
        self.0.each(&[], |labels| self.set(0.0, labels));
    }
}

impl Entry for Histogram {
    fn description(&self) -> &Description {
        &self.0
    }
    fn kind(&self) -> &'static str {
        "histogram"
    }
    fn install(&self) {
        metrics::describe_histogram!(self.0.name, self.0.unit, self.0.help);
        self.0.each(&[], |labels| drop(self.recorder(labels)));
    }
    fn buckets(&self) -> Option<&'static [f64]> {
        Some(self.1)
    }
}

impl Entry for Reading {
    fn description(&self) -> &Description {
        &self.0
    }
    fn kind(&self) -> &'static str {
        if self.0.name.ends_with("_total") { "counter" } else { "gauge" }
    }
    /// The recorder has no counters with fractions: `Metrics::render` writes these.
    fn install(&self) {}
    fn read(&self) -> Option<f64> {
        (self.1)()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LETTERS: &[LabelOf] = &[
        LabelOf { name: "tenant", values: Values::Tenant },
        LabelOf { name: "letter", values: Values::OneOf(&["a", "b"]) },
    ];
    const OF_LETTERS: Description = Description { name: "x", unit: Unit::Count, labels: LETTERS, help: "X." };

    #[test]
    fn other_labels_than_those_of_the_table_are_not_taken() {
        assert!(OF_LETTERS.takes(&[("tenant", "anybody"), ("letter", "b")]));
        for wrong in [
            &[("tenant", "t"), ("letter", "c")][..],
            &[("letter", "a"), ("tenant", "t")],
            &[("tenant", "t")],
            &[("tenant", "t"), ("letter", "a"), ("more", "a")],
        ] {
            assert!(!OF_LETTERS.takes(wrong), "{wrong:?}");
        }
    }

    #[test]
    fn each_choice_of_values_is_made_once_and_none_where_a_value_is_unknown() {
        let choices = |given: Labels<'_>| {
            let mut made = Vec::new();
            OF_LETTERS.each(given, |labels| made.push(format!("{labels:?}")));
            made
        };
        assert_eq!(choices(&[]), Vec::<String>::new());
        assert_eq!(
            choices(&[("tenant", "t")]),
            [r#"[("tenant", "t"), ("letter", "a")]"#, r#"[("tenant", "t"), ("letter", "b")]"#]
        );
    }
}
