//! What does the engine itself take of a step, beside the model?
//!
//! Drives the pure core as `engine::thread` does, with the fake model and every sequence decoding, and times all but the
//! model: planning, copies, the batch's description, sampling and committing, residencies, status. The model's time is
//! taken out, not estimated.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use rekindle::engine::core::{Command, Core, CoreSettings, Event, StartTurn};
use rekindle::engine::{Policy, Sampling, TurnRequest, TurnShape};
use rekindle::kernels::memory::Arena;
use rekindle::kv::KvSettings;
use rekindle::kv::block::PrefixHash;
use rekindle::kv::transfer::{self, TransferDone};
use rekindle::model::fake::FakeModel;
use rekindle::model::{Logits, Model};
use rekindle::types::{BlockCount, BlockSize, KvKey, TenantId, TenantKey, Tick, TokenCount, TokenId, TurnId};

use crate::numbers::{figure, median, quantile};
use crate::report::{Bound, Limit, Report, Table};

/// A step of 64 sequences may take this much beside the model.
const LIMIT_US: f64 = 100.0;
const BLOCK_SIZE: BlockSize = BlockSize(16);
const PROMPT_TOKENS: u32 = 256;
/// Tokens of a conversation that rests beside the running ones.
const RESTING_TOKENS: u32 = 32;
/// Small, so that what is seen is the bookkeeping; and SmolLM2's.
const SMALL_VOCAB: usize = 256;
const REAL_VOCAB: usize = 49_152;
/// Steps before timing begins.
const WARM_UP: u32 = 100;
const TENANTS: u32 = 8;

#[derive(Parser)]
pub struct Args {
    /// Timed steps
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Resting conversations of the last case
    #[arg(long, default_value_t = 10_000)]
    resting: u32,
}

/// One row of the table.
struct Case {
    sequences: u32,
    resting: u32,
    /// Words of the fake model's vocabulary: how many logits a token is chosen from.
    vocab: usize,
}

pub fn measure(args: &Args) -> anyhow::Result<Report> {
    let case = |sequences, resting, vocab| Case { sequences, resting, vocab };
    let cases = [
        case(1, 0, SMALL_VOCAB),
        case(16, 0, SMALL_VOCAB),
        case(64, 0, SMALL_VOCAB),
        case(64, args.resting, SMALL_VOCAB),
        case(64, 0, REAL_VOCAB),
    ];
    let mut rows = Vec::new();
    let mut at_64 = f64::NAN;
    for case in &cases {
        let Case { sequences, resting, vocab } = *case;
        let steps_us = steps(args, case)?;
        let (middle, slow) = (median(&steps_us), quantile(&steps_us, 0.99));
        eprintln!("[overhead] {sequences} sequences, {resting} at rest, {vocab} logits: {} µs a step", figure(middle));
        if (sequences, resting, vocab) == (64, 0, SMALL_VOCAB) {
            at_64 = middle;
        }
        rows.push(vec![
            sequences.to_string(),
            resting.to_string(),
            vocab.to_string(),
            figure(middle),
            figure(slow),
            figure(middle / f64::from(sequences)),
        ]);
    }
    Ok(Report {
        name: "overhead",
        title: "The engine's own time in a step, without the model",
        tables: Table::only(vec![
            "sequences",
            "conversations at rest",
            "logits a row",
            "median µs",
            "p99 µs",
            "median µs a sequence",
        ], rows),
        bounds: vec![Bound {
            what: "median step with 64 sequences, fake model".into(),
            measured: at_64,
            limit: Limit::AtMost(LIMIT_US),
            unit: "µs",
        }],
        notes: vec![
            format!(
                "{} steps of each, all of them decodes, greedy, after prompts of {PROMPT_TOKENS} tokens, of {TENANTS} \
                 tenants. Timed: plan, copies, the batch's description, commit with sampling, residencies, status. Not \
                 timed: the model, and sending to clients.",
                args.steps
            ),
            "The bound is about bookkeeping: its vocabulary has 256 words. The last row's has as many as SmolLM2's, and \
             searching them for the largest logit is most of its time; with a real model expect that row."
                .to_owned(),
        ],
        raw: None,
    })
}

/// The core and what it drives.
struct Engine {
    core: Core,
    model: FakeModel,
    device: Arc<Arena>,
    host: Arc<Arena>,
    logits: Logits,
    commands: Vec<Command>,
    events: Vec<Event>,
    clock: Instant,
}

/// Times a case's steps, in µs.
fn steps(args: &Args, case: &Case) -> anyhow::Result<Vec<f64>> {
    let steps = WARM_UP + args.steps;
    let mut engine = Engine::new(case, steps)?;
    for number in 0..case.resting {
        engine.start(u64::from(number), RESTING_TOKENS, 1);
        engine.run_dry()?;
    }
    // Each says one token a step, and none ends before the last.
    let said = steps + case.sequences + PROMPT_TOKENS;
    for number in 0..case.sequences {
        engine.start(u64::from(case.resting + number), PROMPT_TOKENS, said);
    }
    let sequences = usize::try_from(case.sequences)?;
    let mut prefills = 0;
    while engine.step()?.1 < sequences {
        prefills += 1;
        ensure!(prefills < said, "the sequences never all decoded");
    }
    let mut timed_us = Vec::new();
    for number in 0..steps {
        let (time, rows) = engine.step()?;
        ensure!(rows == sequences, "step {number} had {rows} rows for {sequences} sequences");
        if number >= WARM_UP {
            timed_us.push(time.as_secs_f64() * 1e6);
        }
    }
    Ok(timed_us)
}

impl Engine {
    fn new(case: &Case, steps: u32) -> anyhow::Result<Self> {
        let window = TokenCount(2 * (PROMPT_TOKENS + case.sequences + steps));
        let model = FakeModel::new(case.vocab, window);
        let block_bytes = model.spec().kv.block_bytes(BLOCK_SIZE);
        let running = case.sequences * window.blocks(BLOCK_SIZE).0;
        let resting = case.resting * TokenCount(RESTING_TOKENS + 1).blocks(BLOCK_SIZE).0;
        let blocks = BlockCount(running + resting);
        let kv = KvSettings {
            block_size: BLOCK_SIZE,
            block_bytes: block_bytes as u64,
            device_blocks: blocks,
            host_blocks: blocks,
            disk_blocks: BlockCount(0),
            window,
            background_offload: true,
            policy: Policy::ReturnRate,
            doubles_at: None,
            front_first_from: None,
            journal_entries: 10_000,
            reuse: true,
        };
        let core = Core::new(CoreSettings { max_running: 64, step_tokens: 256 }, kv);
        let arena = || Arena::new(blocks.get(), block_bytes).map(Arc::new);
        Ok(Self {
            core,
            model,
            device: arena()?,
            host: arena()?,
            logits: Logits::default(),
            commands: Vec::new(),
            events: Vec::new(),
            clock: Instant::now(),
        })
    }

    fn now(&self) -> anyhow::Result<Tick> {
        Ok(Tick(u64::try_from(self.clock.elapsed().as_micros())?))
    }

    /// Asks for a turn of a new conversation.
    fn start(&mut self, number: u64, prompt_tokens: u32, max_tokens: u32) {
        let tenant = TenantId(u32::try_from(number % u64::from(TENANTS)).expect("a remainder of a u32"));
        let tenant_key = TenantKey([u8::try_from(tenant.0).expect("few tenants"); 32]);
        // No two prompts begin alike.
        let vocab = NonZeroU64::new(self.model.spec().vocab as u64).expect("a model has words");
        let mixed = |place: u64| ((number << 20) | place).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        let token = |place: u64| TokenId(u32::try_from(mixed(place) % vocab).expect("32 bits"));
        let prompt: Arc<[TokenId]> = (0..u64::from(prompt_tokens)).map(token).collect();
        let hashes = PrefixHash::chain(&tenant_key, &prompt, BLOCK_SIZE);
        let request = TurnRequest {
            prompt,
            encoded_before: TokenCount(0),
            shape: TurnShape { number: 1, new_tokens: TokenCount(prompt_tokens) },
            sampling: Sampling { ignore_eos: true, ..Sampling::default() },
            max_tokens: TokenCount(max_tokens),
            stop_tokens: Arc::from([]),
            queue_deadline: Duration::from_secs(3600),
            logprobs: None,
        };
        let (turn, key) = (TurnId(number), KvKey(u128::from(number)));
        self.commands.push(Command::Start(Box::new(StartTurn { turn, key, tenant, tenant_key, hashes, request })));
    }

    /// Runs until no turn is left.
    fn run_dry(&mut self) -> anyhow::Result<()> {
        loop {
            self.step()?;
            if self.core.is_idle() && self.commands.is_empty() {
                return Ok(());
            }
        }
    }

    /// One step. Returns the engine's own time, and how many rows were sampled.
    fn step(&mut self) -> anyhow::Result<(Duration, usize)> {
        let now = self.now()?;
        let began = Instant::now();
        let mut plan = self.core.plan(now, &mut self.commands);
        plan.chores.execute(&self.device, &self.host);
        let rows = self.core.rows(&plan);
        let batch = rows.batch();
        let planned = began.elapsed();

        if !plan.is_empty() {
            self.model.forward(&batch, &self.device, &mut self.logits).context("the fake model failed")?;
        }
        let orders = std::mem::take(&mut plan.orders);

        let sampled = plan.sampled.len();
        let now = self.now()?;
        let began = Instant::now();
        if !plan.is_empty() {
            self.core.commit(now, &plan, Ok(&mut self.logits), &mut self.events);
        }
        drop(plan);
        std::hint::black_box((self.core.take_residencies(), self.core.status(now)));
        let committed = began.elapsed();

        self.events.clear();
        for order in orders {
            let sums = transfer::execute(&order, &self.device, &self.host);
            self.commands.push(Command::Transferred(TransferDone { ticket: order.ticket, sums, took_us: 1 }));
        }
        Ok((planned + committed, sampled))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_timed_step_has_a_row_of_each_sequence() {
        let args = Args { steps: 3, resting: 4 };
        let timed = steps(&args, &Case { sequences: 2, resting: 4, vocab: SMALL_VOCAB }).unwrap();
        assert_eq!(timed.len(), 3);
    }
}
