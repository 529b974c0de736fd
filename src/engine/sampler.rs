//! Which token comes next, given a row of logits?
//!
//! Order: logit bias, penalties, temperature, top-k, top-p, min-p, draw. A sampler belongs to one sequence, and its draws
//! depend on its seed and its own draws before: the same request gives the same tokens whatever else runs.
//! Cost: two passes over the row, and then as many tokens as are likely; nothing is copied, sorted or allocated for the rest.

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::Logprob;
use super::odds::{self, Candidate, Odds, likelier};
use crate::kernels::softmax::Curve;
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

/// What penalties know of a token: whether it was seen at all, and how often in the answer.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    in_answer: u32,
}

/// What sampling a row needs room for. One serves all samplers, a row at a time, and holds nothing between rows.
#[derive(Debug, Default)]
pub struct Scratch {
    odds: Odds,
    /// Logits that penalties changed, as they were.
    replaced: Vec<(TokenId, f32)>,
    /// The likeliest tokens, as many as were looked for, by id.
    head: Vec<Candidate>,
    /// Those of them that a search puts into order.
    ranked: Vec<Candidate>,
}

/// Chooses the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: StdRng,
    /// Kept only while a penalty needs it.
    seen: HashMap<TokenId, Seen>,
}

impl Sampler {
    /// For a sequence with this prompt.
    pub fn new(sampling: Sampling, prompt: &[TokenId]) -> Self {
        let random = StdRng::seed_from_u64(sampling.seed);
        let remembers = sampling.repetition_penalty != 1.0;
        let seen =
            if remembers { prompt.iter().map(|token| (*token, Seen::default())).collect() } else { HashMap::new() };
        Self { sampling, random, seen }
    }

    /// The next token. `logits`: `[vocab]`, raw, and raw again when it returns: penalties are written into the row while it
    /// lasts, because a row has few tokens that were seen. `banned` get no chance (stop tokens before `min_tokens`).
    pub fn sample(&mut self, logits: &mut [f32], banned: &[TokenId], scratch: &mut Scratch) -> TokenId {
        self.adjust(logits, banned, &mut scratch.replaced);
        let token = self.choose(logits, scratch);
        // The newest first, so that a token that was changed twice is what it was before both.
        for (token, logit) in scratch.replaced.drain(..).rev() {
            logits[token.0 as usize] = logit;
        }
        if self.sampling.changes_logits() {
            self.seen.entry(token).or_default().in_answer += 1;
        }
        token
    }

    /// Applies bias, penalties and bans, and notes what was there.
    fn adjust(&self, logits: &mut [f32], banned: &[TokenId], replaced: &mut Vec<(TokenId, f32)>) {
        let mut change = |token: TokenId, change: &dyn Fn(f32) -> f32| {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                replaced.push((token, *logit));
                *logit = change(*logit);
            }
        };
        for (token, bias) in &self.sampling.logit_bias {
            change(*token, &|logit| logit + bias);
        }
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.sampling;
        for (token, seen) in &self.seen {
            change(*token, &|logit| {
                let logit = if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
                match seen.in_answer {
                    0 => logit,
                    times => logit - (presence_penalty + frequency_penalty * times as f32),
                }
            });
        }
        for token in banned {
            change(*token, &|_| f32::NEG_INFINITY);
        }
    }

    fn choose(&mut self, logits: &[f32], scratch: &mut Scratch) -> TokenId {
        let top = scratch.odds.read(logits);
        if self.sampling.is_greedy() || !top.is_finite() {
            return scratch.odds.likeliest(logits);
        }
        let curve = Curve::new(top, self.sampling.temperature);
        let point = self.random.random::<f64>();
        let drawn = if self.sampling.keeps_all() {
            let total = scratch.odds.weigh(logits, curve);
            scratch.odds.token_at(logits, curve, point * total)
        } else {
            self.sampling.keep(logits, curve, scratch);
            let line = scratch.head.iter().map(|candidate| (candidate.token, candidate.weight));
            odds::at(line, point * mass(&scratch.head))
        };
        drawn.unwrap_or_else(|| scratch.odds.likeliest(logits))
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

    fn keeps_all(&self) -> bool {
        self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0
    }

    /// Leaves in `scratch.head` the tokens that may be drawn, by id.
    fn keep(&self, logits: &[f32], curve: Curve, scratch: &mut Scratch) {
        let Scratch { odds, head, ranked, .. } = scratch;
        // For the flattest row there may be, so that none that is flatter than those before has to wait for memory.
        head.clear();
        head.reserve(logits.len());
        ranked.clear();
        ranked.reserve(logits.len());
        let unlikeliest = if self.min_p > 0.0 { curve.logit_at(-self.min_p.log2()) } else { f32::NEG_INFINITY };
        let last = if self.top_k > 0 {
            let kept = self.top_k as usize;
            let floor = odds.reached_by(kept);
            odds.at_least(logits, curve, floor, head);
            if kept < head.len() {
                ranked.clone_from(head);
                let (_, last, _) = ranked.select_nth_unstable_by(kept - 1, likelier);
                let last = *last;
                head.retain(|candidate| likelier(candidate, &last).is_le());
            }
            reach(head, curve, f64::from(self.top_p) * mass(head), ranked)
        } else if self.top_p < 1.0 {
            let needed = f64::from(self.top_p) * odds.weigh(logits, curve);
            let mut depth = FIRST_DEPTH;
            loop {
                let floor = curve.logit_at(depth);
                odds.at_least(logits, curve, floor, head);
                if mass(head) >= needed || floor == f32::NEG_INFINITY {
                    break reach(head, curve, needed, ranked);
                }
                depth += DEEPER;
            }
        } else {
            odds.at_least(logits, curve, unlikeliest, head);
            return;
        };
        head.retain(|candidate| likelier(candidate, &last).is_le() && candidate.logit >= unlikeliest);
    }
}

/// Where the search for the tokens of top-p begins, in halvings of the largest weight, and how much deeper it looks when
/// that was not enough: a confident model's answer is among the first dozens, and each round finds some times more.
const FIRST_DEPTH: f32 = 11.0;
const DEEPER: f32 = 3.0;

fn mass(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| f64::from(candidate.weight)).sum()
}

/// The candidate at which the likeliest ones' weights reach `needed`; the unlikeliest if all of them don't. There is one at
/// least. `part`: room for some of them.
///
/// Sums by depth first, so that only those as deep as the wanted one need an order.
fn reach(candidates: &[Candidate], curve: Curve, needed: f64, part: &mut Vec<Candidate>) -> Candidate {
    let mut sums = [0.0; STEPS];
    let step = |candidate: &Candidate| ((curve.depth(candidate.logit) * STEPS_A_HALVING) as usize).min(STEPS - 1);
    let mut deepest = 0;
    for candidate in candidates {
        let step = step(candidate);
        sums[step] += f64::from(candidate.weight);
        deepest = deepest.max(step);
    }
    let mut needed = needed;
    let mut wanted = 0;
    while wanted < deepest && sums[wanted] < needed {
        needed -= sums[wanted];
        wanted += 1;
    }
    part.clear();
    part.extend(candidates.iter().filter(|candidate| step(candidate) == wanted));
    reach_by_halves(part, needed)
}

const STEPS_A_HALVING: f32 = 8.0;
const STEPS: usize = 1024;

/// The same without sums: halves the part in which it must be.
fn reach_by_halves(mut part: &mut [Candidate], mut needed: f64) -> Candidate {
    while part.len() > 1 {
        let middle = part.len() / 2;
        part.select_nth_unstable_by(middle, likelier);
        let (upper, lower) = part.split_at_mut(middle);
        let sum = mass(upper);
        if sum >= needed {
            part = upper;
        } else {
            needed -= sum;
            part = lower;
        }
    }
    part[0]
}

/// The model's raw log probability of a token, and of the `top` likeliest.
pub fn logprob(logits: &[f32], token: TokenId, top: u8, scratch: &mut Scratch) -> Logprob {
    let Scratch { odds, head, .. } = scratch;
    let largest = odds.read(logits);
    let curve = Curve::new(largest, 1.0);
    let log_sum = largest + odds.weigh(logits, curve).ln() as f32;
    head.clear();
    if top > 0 {
        let top = usize::from(top).min(logits.len());
        let floor = odds.reached_by(top);
        odds.at_least(logits, curve, floor, head);
        head.sort_unstable_by(likelier);
        head.truncate(top);
    }
    let top = head.iter().map(|candidate| (candidate.token, candidate.logit - log_sum)).collect();
    Logprob { logprob: logits[token.0 as usize] - log_sum, top }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn draws(sampling: Sampling, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling, &[]);
        (0..n).map(|_| draw(&mut sampler, logits, &[]).0).collect()
    }

    fn draw(sampler: &mut Sampler, logits: &[f32], banned: &[TokenId]) -> TokenId {
        sampler.sample(&mut logits.to_vec(), banned, &mut Scratch::default())
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
    fn penalties_and_bias_move_the_choice() {
        let greedy = Sampling::default;
        assert_eq!(draws(Sampling { logit_bias: vec![(TokenId(4), 100.0)], ..greedy() }, &LOGITS, 1), [4]);
        assert_eq!(draws(Sampling { presence_penalty: 1.5, ..greedy() }, &LOGITS, 3), [1, 2, 1]);
        assert_eq!(draws(Sampling { frequency_penalty: 0.8, ..greedy() }, &LOGITS, 4), [1, 1, 2, 1]);
        let mut sampler = Sampler::new(Sampling { repetition_penalty: 2.0, ..greedy() }, &[TokenId(1)]);
        assert_eq!(draw(&mut sampler, &LOGITS, &[]), TokenId(2), "the prompt counts for repetition");
    }

    #[test]
    fn banned_tokens_are_never_chosen() {
        let mut sampler = Sampler::new(hot(), &[]);
        assert!((0..500).all(|_| draw(&mut sampler, &LOGITS, &[TokenId(1)]) != TokenId(1)));
    }

    #[test]
    fn log_probabilities_are_of_the_raw_distribution_and_sorted() {
        let report = logprob(&LOGITS, TokenId(3), 5, &mut Scratch::default());
        let sum: f32 = report.top.iter().map(|(_, p)| p.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5);
        assert_eq!(report.top[2], (TokenId(3), report.logprob), "the third likeliest");
        assert!(report.top.is_sorted_by(|a, b| a.1 >= b.1));
    }

    #[test]
    fn a_row_without_any_number_gives_token_0_and_an_infinite_one_the_first_such() {
        for sampling in [hot(), Sampling { top_p: 0.5, ..hot() }, Sampling { top_k: 3, ..hot() }, Sampling::default()] {
            assert_eq!(draws(sampling.clone(), &[f32::NAN; 300], 1), [0]);
            assert_eq!(draws(sampling.clone(), &[f32::NEG_INFINITY; 3], 1), [0]);
            assert_eq!(draws(sampling, &[0.0, f32::INFINITY, f32::INFINITY], 1), [1]);
        }
    }

    /// The tokens of an answer by the definition alone: everything in f64, everything sorted. `slack` moves each border by
    /// this share, for what rounding may decide either way.
    struct Definition<'a> {
        sampling: &'a Sampling,
        prompt: &'a [TokenId],
        answer: Vec<TokenId>,
        random: StdRng,
    }

    impl Definition<'_> {
        fn adjusted(&self, logits: &[f32], banned: &[TokenId]) -> Vec<f32> {
            let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = *self.sampling;
            let adjusted = (0..).map(TokenId).zip(logits).map(|(token, logit)| {
                let bias = self.sampling.logit_bias.iter().filter(|(biased, _)| *biased == token);
                let mut logit = bias.fold(*logit, |logit, (_, bias)| logit + bias);
                let times = self.answer.iter().filter(|said| **said == token).count();
                if times > 0 || self.prompt.contains(&token) {
                    let positive = logit > 0.0;
                    logit = if positive { logit / repetition_penalty } else { logit * repetition_penalty };
                }
                if times > 0 {
                    logit -= presence_penalty + frequency_penalty * times as f32;
                }
                if banned.contains(&token) { f32::NEG_INFINITY } else { logit }
            });
            adjusted.collect()
        }

        fn choice(&self, adjusted: &[f32], point: f64, slack: [f64; 3]) -> Option<TokenId> {
            let Sampling { temperature, top_k, top_p, min_p, .. } = *self.sampling;
            let mut tokens: Vec<_> = (0..).map(TokenId).zip(adjusted.iter().copied()).collect();
            tokens.retain(|(_, logit)| *logit > f32::NEG_INFINITY);
            tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let top = f64::from(tokens.first()?.1);
            let weight = |logit: f32| ((f64::from(logit) - top) / f64::from(temperature)).exp();
            let mut line: Vec<_> = tokens.into_iter().map(|(token, logit)| (token, weight(logit))).collect();
            if top_k > 0 {
                line.truncate(top_k as usize);
            }
            if top_p < 1.0 {
                let needed = f64::from(top_p) * (1.0 + slack[0]) * line.iter().map(|(_, weight)| weight).sum::<f64>();
                let mut sum = 0.0;
                let fewest = line.iter().position(|(_, weight)| {
                    sum += weight;
                    sum >= needed
                });
                line.truncate(fewest.map_or(line.len(), |last| last + 1));
            }
            line.retain(|(_, weight)| *weight >= f64::from(min_p) * (1.0 + slack[1]));
            line.sort_by_key(|(token, _)| *token);
            let mut left = (point + slack[2]) * line.iter().map(|(_, weight)| weight).sum::<f64>();
            let drawn = line.iter().find(|(_, weight)| {
                left -= weight;
                left < 0.0
            });
            Some(drawn.or(line.last())?.0)
        }

        /// All that the next token may be: one token, but at a border.
        fn next(&mut self, logits: &[f32], banned: &[TokenId]) -> Vec<TokenId> {
            let adjusted = self.adjusted(logits, banned);
            let numbers = adjusted.iter().filter(|logit| **logit > f32::NEG_INFINITY);
            let Some(top) = numbers.copied().reduce(f32::max) else { return vec![TokenId(0)] };
            if self.sampling.temperature <= 0.0 || self.sampling.top_p <= 0.0 {
                return vec![TokenId(adjusted.iter().position(|logit| *logit == top).unwrap() as u32)];
            }
            let point = self.random.random::<f64>();
            let slacks = [-3e-5, 0.0, 3e-5];
            let each = slacks.iter().flat_map(|a| slacks.iter().flat_map(move |b| slacks.map(|c| [*a, *b, c])));
            each.filter_map(|slack| self.choice(&adjusted, point, slack)).collect()
        }
    }

    fn some_logits() -> impl Strategy<Value = Vec<f32>> {
        let even = (-40..40).prop_map(|half| half as f32 / 2.0);
        let any = -30.0..30.0_f32;
        let odd = prop_oneof![Just(f32::NAN), Just(f32::NEG_INFINITY)];
        prop_oneof![
            vec(even.clone(), 1..700),
            vec(any.clone(), 1..700),
            vec(0.0..0.5_f32, 1..700),
            vec(prop_oneof![4 => even, 4 => any, 1 => odd], 1..300),
        ]
    }

    fn some_sampling() -> impl Strategy<Value = Sampling> {
        let penalties = prop_oneof![Just((1.0, 0.0, 0.0)), (0.5..2.0_f32, -1.0..2.0_f32, -1.0..2.0_f32)];
        let bias = prop_oneof![Just(Vec::new()), vec((0..720_u32, -20.0..20.0_f32), 1..6)];
        let temperature = prop_oneof![1 => Just(0.0), 9 => 0.05..2.0_f32];
        let top_k = prop_oneof![Just(0), 1..90_u32];
        let top_p = prop_oneof![Just(1.0), 0.01..1.0_f32];
        let min_p = prop_oneof![Just(0.0), 0.001..1.0_f32];
        (temperature, top_k, top_p, min_p, penalties, bias, any::<u64>()).prop_map(
            |(
                temperature,
                top_k,
                top_p,
                min_p,
                (repetition_penalty, presence_penalty, frequency_penalty),
                bias,
                seed,
            )| {
                let logit_bias = bias.into_iter().map(|(token, bias)| (TokenId(token), bias)).collect();
                Sampling {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty,
                    presence_penalty,
                    frequency_penalty,
                    logit_bias,
                    seed,
                    ..Sampling::default()
                }
            },
        )
    }

    proptest! {
        #[test]
        fn an_answer_is_that_of_the_definition_and_leaves_the_logits_as_they_were(
            logits in some_logits(),
            sampling in some_sampling(),
            prompt in vec((0..700_u32).prop_map(TokenId), 0..20),
            banned in vec((0..700_u32).prop_map(TokenId), 0..3),
        ) {
            let random = StdRng::seed_from_u64(sampling.seed);
            let mut definition = Definition { sampling: &sampling, prompt: &prompt, answer: Vec::new(), random };
            let mut sampler = Sampler::new(sampling.clone(), &prompt);
            let mut scratch = Scratch::default();
            let mut row = logits.clone();
            for _ in 0..4 {
                let wanted = definition.next(&logits, &banned);
                let token = sampler.sample(&mut row, &banned, &mut scratch);
                prop_assert!(wanted.contains(&token), "{token:?}, not one of {wanted:?}");
                prop_assert!(row.iter().zip(&logits).all(|(row, logit)| row.to_bits() == logit.to_bits()));
                definition.answer.push(token);
            }
        }

        #[test]
        fn log_probabilities_are_those_of_f64(logits in vec(-30.0..30.0_f32, 1..700), top in 0..20_u8) {
            let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
            let report = logprob(&logits, TokenId(0), top, &mut Scratch::default());
            prop_assert!((f64::from(report.logprob) - (f64::from(logits[0]) - sum.ln())).abs() < 1e-5);
            let mut sorted = logits;
            sorted.sort_unstable_by(|a, b| b.total_cmp(a));
            prop_assert_eq!(report.top.len(), sorted.len().min(top.into()));
            for ((_, logprob), logit) in report.top.iter().zip(sorted) {
                prop_assert!((f64::from(*logprob) - (f64::from(logit) - sum.ln())).abs() < 1e-5);
            }
        }
    }
}
