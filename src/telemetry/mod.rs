//! How do logs, metrics and traces leave the process?

pub mod log;
pub mod metrics;
pub mod process;
pub mod trace;
