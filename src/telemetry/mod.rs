//! How do logs and metrics leave the process?

pub mod log;
pub mod metrics;
