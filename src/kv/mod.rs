//! Which KV is where, whose is it, and what goes when memory runs short? Logic over ids; knows no sessions, no model.

pub mod accounts;
pub mod block;
pub mod budget;
pub mod chores;
pub mod cost;
pub mod disk;
pub mod displacement;
pub mod early_return;
pub mod evictor;
pub mod forget;
pub mod held;
pub mod holdings;
pub mod invariants;
pub mod journal;
pub mod lookup;
pub mod manager;
pub mod next;
pub mod pins;
pub mod prefix;
pub mod rate;
pub mod reclaim;
pub mod residency;
pub mod return_rate;
pub mod runs;
pub mod silence;
pub mod table;
pub mod tiers;
pub mod transfer;

pub use manager::{Admission, KvSettings, Manager};
