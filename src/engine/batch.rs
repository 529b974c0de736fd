//! How does a plan become what the model reads?
//!
//! A `Batch` borrows the block tables from the manager (`kv::table::Resident`): while it lives nothing can be evicted.

use super::core::Plan;
use crate::kv::Manager;
use crate::model::{Batch, SequenceRows};

/// The rows' descriptions, borrowed from the manager.
pub struct Rows<'a> {
    plan: &'a Plan,
    sequences: Vec<SequenceRows<'a>>,
}

impl<'a> Rows<'a> {
    /// Panics if a sequence of the plan is not wholly on the device.
    pub fn new(plan: &'a Plan, manager: &'a Manager) -> Self {
        let sequences = plan.spans.iter().map(|span| {
            let resident = manager.resident(span.key);
            SequenceRows {
                first_row: span.first_row,
                rows: span.rows,
                context: resident.context().get(),
                table: resident.table(),
            }
        });
        Self { plan, sequences: sequences.collect() }
    }

    pub fn batch(&self) -> Batch<'_> {
        Batch { tokens: &self.plan.tokens, sequences: &self.sequences, sampled: &self.plan.sampled }
    }
}
