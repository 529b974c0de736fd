//! How long does it take to choose who loses blocks?

use std::hint::black_box;
use std::time::{Duration, Instant};

use rekindle::kv::evictor::{Evictor, Judge, Policy, Standing};
use rekindle::kv::return_rate::{Class, ReturnRates, TurnShape};
use rekindle::types::{KvKey, TenantId, Tick, TokenCount};

use crate::numbers::{figure, median};
use crate::report::{Bound, Limit};

const CHOICES: u32 = 20_000;
const LIMIT_NS: f64 = 1000.0;

/// Rows of the table, and the bounds at 100,000.
pub fn measure() -> (Vec<Vec<String>>, Vec<Bound>) {
    let mut rows = Vec::new();
    let mut bounds = Vec::new();
    for idle in [1_000, 10_000, 100_000] {
        let [one, many] =
            [1, 32].map(|tenants| median(&(0..5).map(|_| choice_ns(idle, tenants)).collect::<Vec<f64>>()));
        eprintln!("[eviction] {idle} idle: {one:.0} ns a choice, {many:.0} ns of 32 tenants");
        rows.push(vec![idle.to_string(), figure(one), figure(many)]);
        if idle == 100_000 {
            let bound = |who: &str, measured| Bound {
                what: format!("choosing a victim of {idle} idle conversations of {who}"),
                measured,
                limit: Limit::AtMost(LIMIT_NS),
                unit: "ns",
            };
            bounds = vec![bound("one tenant", one), bound("32 tenants", many)];
        }
    }
    (rows, bounds)
}

/// Of a choice after a change: the victim before has left, and another conversation has fallen silent.
fn choice_ns(idle: u64, tenants: u32) -> f64 {
    let mut rates = ReturnRates::default();
    let mut evictor = Evictor::default();
    let standing = |key: u64| {
        let shape = TurnShape { number: (key % 12) as u32, new_tokens: TokenCount((key % 1000) as u32) };
        let class = Class::after(shape);
        if key.is_multiple_of(3) { class.awaiting_tool() } else { class }
    };
    let add = |evictor: &mut Evictor, key: u64| {
        let tenant = TenantId((key % u64::from(tenants)) as u32);
        evictor.add(tenant, KvKey(key.into()), Tick(key * 10_000), Standing::Idle(standing(key)), TokenCount(500));
    };
    for key in 0..idle {
        rates.begin(Tick(key * 10_000), KvKey(key.into()), standing(key));
        if key.is_multiple_of(5) {
            rates.end(Tick(key * 10_000 + 100), KvKey(key.into()));
        }
        add(&mut evictor, key);
    }
    let mut chosen = Duration::ZERO;
    for key in idle..idle + u64::from(CHOICES) {
        let judge = Judge::new(Policy::ReturnRate, None, &rates, Tick(key * 10_000));
        let started = Instant::now();
        let victim = black_box(evictor.victim(&judge, |_| true));
        chosen += started.elapsed();
        if let Some(victim) = victim {
            evictor.remove(victim.key);
        }
        add(&mut evictor, key);
    }
    chosen.as_nanos() as f64 / f64::from(CHOICES)
}
