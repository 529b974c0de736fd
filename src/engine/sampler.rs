//! Which token comes next, given a row of logits?
//!
//! Order: logit bias, penalties, temperature, top-k, top-p, min-p, draw. A sampler belongs to one sequence, and its draws
//! depend on its seed and its own draws before: the same request gives the same tokens whatever else runs.

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::Logprob;
use crate::types::TokenId;

/// How to choose tokens. `temperature == 0` or `top_p == 0` is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    pub temperature: f32,
    /// Keep the likeliest `top_k`; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens whose probabilities add up to `top_p`, [0, 1].
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the likeliest, [0, 1].
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) the logits of tokens seen in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens in the answer so far (OpenAI's definition).
    pub presence_penalty: f32,
    /// Subtracted for each occurrence in the answer so far.
    pub frequency_penalty: f32,
    /// Added to logits before anything else.
    pub logit_bias: Vec<(TokenId, f32)>,
    pub seed: u64,
    /// No stop token before this many tokens of answer.
    pub min_tokens: u32,
    /// Stop tokens don't stop.
    pub ignore_eos: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            min_tokens: 0,
            ignore_eos: false,
        }
    }
}

impl Sampling {
    fn is_greedy(&self) -> bool {
        self.temperature <= 0.0 || self.top_p <= 0.0
    }

    fn changes_logits(&self) -> bool {
        !self.logit_bias.is_empty()
            || self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// What penalties know of a token: whether it was seen at all, and how often in the answer.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    in_answer: u32,
}

/// Chooses the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: StdRng,
    /// Kept only while a penalty needs it.
    seen: HashMap<TokenId, Seen>,
    scratch: Vec<f32>,
    candidates: Vec<(TokenId, f32)>,
}

impl Sampler {
    /// For a sequence with this prompt.
    pub fn new(sampling: Sampling, prompt: &[TokenId]) -> Self {
        let random = StdRng::seed_from_u64(sampling.seed);
        let remembers = sampling.repetition_penalty != 1.0;
        let seen =
            if remembers { prompt.iter().map(|token| (*token, Seen::default())).collect() } else { HashMap::new() };
        Self { sampling, random, seen, scratch: Vec::new(), candidates: Vec::new() }
    }

    /// The next token. `logits`: `[vocab]`, raw. `banned` get no chance (stop tokens before `min_tokens`).
    pub fn sample(&mut self, logits: &[f32], banned: &[TokenId]) -> TokenId {
        let token = if self.sampling.changes_logits() || !banned.is_empty() {
            let mut scratch = std::mem::take(&mut self.scratch);
            scratch.clear();
            scratch.extend_from_slice(logits);
            self.penalise(&mut scratch);
            for token in banned {
                if let Some(logit) = scratch.get_mut(token.0 as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            let token = self.choose(&scratch);
            self.scratch = scratch;
            token
        } else {
            self.choose(logits)
        };
        if self.sampling.changes_logits() {
            self.seen.entry(token).or_default().in_answer += 1;
        }
        token
    }

    fn penalise(&self, logits: &mut [f32]) {
        for (token, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit += bias;
            }
        }
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.sampling;
        for (token, seen) in &self.seen {
            let Some(logit) = logits.get_mut(token.0 as usize) else { continue };
            if *logit > 0.0 {
                *logit /= repetition_penalty;
            } else {
                *logit *= repetition_penalty;
            }
            if seen.in_answer > 0 {
                *logit -= presence_penalty + frequency_penalty * seen.in_answer as f32;
            }
        }
    }

    fn choose(&mut self, logits: &[f32]) -> TokenId {
        if self.sampling.is_greedy() {
            return likeliest(logits).0;
        }
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let (_, top) = likeliest(logits);
        let candidates = &mut self.candidates;
        candidates.clear();
        // Relative to the likeliest, so that `exp` can't overflow; what underflows to 0 has no chance anyway.
        let weigh = |(id, logit): (u32, &f32)| (TokenId(id), ((logit - top) / temperature).exp());
        candidates.extend((0u32..).zip(logits).map(weigh).filter(|(_, weight)| *weight > 0.0 && *weight >= min_p));
        if top_k > 0 && (top_k as usize) < candidates.len() {
            candidates.select_nth_unstable_by(top_k as usize - 1, likelier);
            candidates.truncate(top_k as usize);
        }
        if top_p < 1.0 {
            keep_top_p(candidates, top_p);
        }
        draw(candidates, self.random.random::<f32>())
    }
}

/// Most likely first; equal ones by id, so that the order is the same on every machine.
fn likelier(a: &(TokenId, f32), b: &(TokenId, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The token with the largest logit, the lowest id among equals. NaN never wins.
///
/// Greedy sampling's whole cost, once a sequence and step: the largest value first, in lanes that fill a vector register,
/// then the first place that has it.
fn likeliest(logits: &[f32]) -> (TokenId, f32) {
    const LANES: usize = 16;
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = if *logit > *lane { *logit } else { *lane };
        }
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, logit| if *logit > max { *logit } else { max });
    let first = (0u32..).zip(logits).find(|(_, logit)| **logit == max);
    (TokenId(first.map_or(0, |(id, _)| id)), max)
}

/// Keeps the fewest likeliest candidates whose weights reach `top_p` of the whole. Sorts only as many as it must.
fn keep_top_p(candidates: &mut Vec<(TokenId, f32)>, top_p: f32) {
    let total: f32 = candidates.iter().map(|(_, weight)| weight).sum();
    let mut sorted = 0;
    let mut look = 64;
    let mut sum = 0.0;
    while sorted < candidates.len() {
        let end = look.min(candidates.len());
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - sorted - 1, likelier);
        }
        candidates[sorted..end].sort_unstable_by(likelier);
        for index in sorted..end {
            sum += candidates[index].1;
            if sum >= top_p * total {
                candidates.truncate(index + 1);
                return;
            }
        }
        sorted = end;
        look *= 4;
    }
}

/// The candidate at `point` (0..1) of the line that their weights form.
fn draw(candidates: &[(TokenId, f32)], point: f32) -> TokenId {
    let total: f32 = candidates.iter().map(|(_, weight)| weight).sum();
    let mut left = point * total;
    for (token, weight) in candidates {
        left -= weight;
        if left < 0.0 {
            return *token;
        }
    }
    // Rounding may leave a crumb; no candidate at all means that all logits were NaN or -inf.
    candidates.last().map_or(TokenId(0), |(token, _)| *token)
}

/// The model's raw log probability of a token, and of the `top` likeliest.
pub fn logprob(logits: &[f32], token: TokenId, top: u8) -> Logprob {
    let (_, max) = likeliest(logits);
    let log_sum = max + logits.iter().map(|logit| (logit - max).exp()).sum::<f32>().ln();
    let mut likeliest: Vec<(TokenId, f32)> = Vec::new();
    if top > 0 {
        likeliest.extend((0u32..).zip(logits).map(|(id, logit)| (TokenId(id), *logit)));
        let top = usize::from(top).min(likeliest.len());
        likeliest.select_nth_unstable_by(top - 1, likelier);
        likeliest.truncate(top);
        likeliest.sort_unstable_by(likelier);
        for (_, logit) in &mut likeliest {
            *logit -= log_sum;
        }
    }
    Logprob { logprob: logits[token.0 as usize] - log_sum, top: likeliest }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(sampling: Sampling, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling, &[]);
        (0..n).map(|_| sampler.sample(logits, &[]).0).collect()
    }

    fn hot() -> Sampling {
        Sampling { temperature: 1.0, ..Sampling::default() }
    }

    const LOGITS: [f32; 5] = [0.0, 3.0, 2.0, 1.0, -4.0];

    #[test]
    fn greedy_takes_the_largest_logit_and_the_lowest_id_among_equals() {
        assert_eq!(draws(Sampling::default(), &[1.0, 5.0, 5.0], 1), [1]);
        assert_eq!(draws(Sampling { top_p: 0.0, ..hot() }, &LOGITS, 3), [1, 1, 1]);
        assert_eq!(draws(Sampling::default(), &[f32::NAN, 1.0], 1), [1]);
    }

    #[test]
    fn one_seed_gives_one_answer_and_another_seed_another() {
        let of = |seed| draws(Sampling { seed, temperature: 2.0, ..hot() }, &LOGITS, 64);
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), of(8));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let n = 20_000;
        let seen = draws(hot(), &LOGITS, n);
        let total: f32 = LOGITS.iter().map(|l| l.exp()).sum();
        for (id, logit) in (0u32..).zip(LOGITS) {
            let share = seen.iter().filter(|t| **t == id).count() as f32 / n as f32;
            assert!((share - logit.exp() / total).abs() < 0.015, "token {id}: {share}");
        }
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_unlikely() {
        let distinct = |sampling| {
            let mut seen = draws(sampling, &LOGITS, 2000);
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(distinct(Sampling { top_k: 2, ..hot() }), [1, 2]);
        assert_eq!(distinct(Sampling { top_p: 0.7, ..hot() }), [1, 2]);
        assert_eq!(distinct(Sampling { min_p: 0.3, ..hot() }), [1, 2]);
        assert_eq!(distinct(Sampling { top_p: 0.1, ..hot() }), [1]);
    }

    #[test]
    fn top_p_keeps_the_same_set_whether_it_sorts_little_or_all() {
        let mut many: Vec<_> = (0..1000u32).map(|id| (TokenId(id), 1.0 + (id % 7) as f32)).collect();
        let mut sorted = many.clone();
        sorted.sort_unstable_by(likelier);
        let total: f32 = sorted.iter().map(|(_, w)| w).sum();
        let mut sum = 0.0;
        let kept = sorted
            .iter()
            .take_while(|(_, w)| {
                let more = sum < 0.6 * total;
                sum += w;
                more
            })
            .count();
        keep_top_p(&mut many, 0.6);
        assert_eq!(many, sorted[..kept]);
    }

    #[test]
    fn penalties_and_bias_move_the_choice() {
        let greedy = Sampling::default;
        assert_eq!(draws(Sampling { logit_bias: vec![(TokenId(4), 100.0)], ..greedy() }, &LOGITS, 1), [4]);
        assert_eq!(draws(Sampling { presence_penalty: 1.5, ..greedy() }, &LOGITS, 3), [1, 2, 1]);
        assert_eq!(draws(Sampling { frequency_penalty: 0.8, ..greedy() }, &LOGITS, 4), [1, 1, 2, 1]);
        let mut sampler = Sampler::new(Sampling { repetition_penalty: 2.0, ..greedy() }, &[TokenId(1)]);
        assert_eq!(sampler.sample(&LOGITS, &[]), TokenId(2), "the prompt counts for repetition");
    }

    #[test]
    fn the_likeliest_is_the_first_of_the_largest_wherever_it_is() {
        for width in [1, 5, 16, 17, 100] {
            for place in 0..width {
                let mut logits = vec![-1.0; width];
                logits[place] = 2.0;
                logits[width - 1] = 2.0;
                assert_eq!(likeliest(&logits), (TokenId(place as u32), 2.0), "{place} of {width}");
            }
        }
        assert_eq!(likeliest(&[f32::NAN, 1.0, f32::NAN]), (TokenId(1), 1.0));
        assert_eq!(likeliest(&[f32::NAN; 20]).0, TokenId(0));
    }

    #[test]
    fn banned_tokens_are_never_chosen() {
        let mut sampler = Sampler::new(hot(), &[]);
        assert!((0..500).all(|_| sampler.sample(&LOGITS, &[TokenId(1)]) != TokenId(1)));
    }

    #[test]
    fn log_probabilities_are_of_the_raw_distribution_and_sorted() {
        let report = logprob(&LOGITS, TokenId(3), 5);
        let sum: f32 = report.top.iter().map(|(_, p)| p.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5);
        assert_eq!(report.top[2], (TokenId(3), report.logprob), "the third likeliest");
        assert!(report.top.is_sorted_by(|a, b| a.1 >= b.1));
    }
}
