//! How do block bytes move between tiers, and how is it known that they arrived whole?

/// The outcome of a transfer.
#[derive(Debug)]
pub struct TransferDone {}
