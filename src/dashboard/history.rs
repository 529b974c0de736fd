//! What did the last hour look like, second by second?
//!
//! A column of numbers for each line of a chart: a sample a second for a quarter of an hour, and their means, ten seconds
//! each, for an hour.

use std::collections::VecDeque;

/// The lines, by the names under which the page knows them.
pub const LINES: [&str; 20] = [
    "hot50", "hot95", "rel50", "rel95", "enc50", "enc95", "fresh50", "fresh95", "toks", "pre", "dev", "host", "disk",
    "evm", "inb", "outb", "saved", "running", "queue", "early",
];

const FINE: usize = 900;
const COARSE: usize = 360;
/// Seconds of a coarse sample.
pub const COARSE_S: u64 = 10;

/// What was seen in one second; `None`: nothing to be seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Seconds since 1970.
    pub ts: u64,
    pub values: [Option<f64>; LINES.len()],
}

#[derive(Debug, Default)]
pub struct History {
    fine: VecDeque<Sample>,
    coarse: VecDeque<Sample>,
    /// Samples that are not in the coarse ones yet.
    gathered: Vec<Sample>,
}

impl History {
    pub fn add(&mut self, sample: Sample) {
        if self.fine.len() == FINE {
            self.fine.pop_front();
        }
        self.fine.push_back(sample);
        self.gathered.push(sample);
        if self.gathered.len() as u64 == COARSE_S {
            if self.coarse.len() == COARSE {
                self.coarse.pop_front();
            }
            self.coarse.push_back(mean(&self.gathered));
            self.gathered.clear();
        }
    }

    /// The samples of the last `range_s` seconds.
    pub fn last(&self, range_s: u64, coarse: bool) -> Vec<Sample> {
        let samples = if coarse { &self.coarse } else { &self.fine };
        let Some(newest) = samples.back() else { return Vec::new() };
        let since = newest.ts.saturating_sub(range_s);
        samples.iter().filter(|sample| sample.ts > since).copied().collect()
    }
}

fn mean(samples: &[Sample]) -> Sample {
    let ts = samples.last().map_or(0, |sample| sample.ts);
    let mut values = [None; LINES.len()];
    for (line, value) in values.iter_mut().enumerate() {
        let seen: Vec<f64> = samples.iter().filter_map(|sample| sample.values[line]).collect();
        *value = (!seen.is_empty()).then(|| seen.iter().sum::<f64>() / seen.len() as f64);
    }
    Sample { ts, values }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_seconds_are_their_mean_and_what_was_not_seen_is_nothing() {
        let mut history = History::default();
        for ts in 1..=1000u64 {
            let mut values = [None; LINES.len()];
            values[0] = (ts % 2 == 0).then_some(ts as f64);
            history.add(Sample { ts, values });
        }
        assert_eq!(
            history.last(5, false).iter().map(|sample| sample.ts).collect::<Vec<_>>(),
            [996, 997, 998, 999, 1000]
        );
        assert_eq!(history.last(10_000, false).len(), FINE);
        let coarse = history.last(10_000, true);
        assert_eq!((coarse.len(), coarse[0].ts), (100, 10));
        assert_eq!((coarse[0].values[0], coarse[0].values[1]), (Some(6.0), None));
    }
}
