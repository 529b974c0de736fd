//! What do many measurements of one thing come to?

/// The value that a share of the values do not exceed (nearest rank); `share` is in (0, 1]. Panics on no values at all.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    assert!(!values.is_empty(), "nothing was measured");
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

pub fn p95(values: &[f64]) -> f64 {
    quantile(values, 0.95)
}

/// With as many digits as a reader can use.
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_one_of_the_values_in_whatever_order_they_came() {
        let values = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!((median(&values), p95(&values), quantile(&values, 0.2)), (3.0, 5.0, 1.0));
        assert_eq!(median(&[7.0]), 7.0);
    }

    #[test]
    fn small_figures_keep_their_digits_and_large_ones_lose_them() {
        assert_eq!(["1.25", "12.5", "125"].map(str::to_owned), [1.25, 12.5, 125.0].map(figure));
    }
}
