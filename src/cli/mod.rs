//! Which commands does the program have beside serving?

pub mod download;
pub mod pull;
