//! Which commands does the program have beside serving?

pub mod chat;
pub mod download;
pub mod key;
pub mod pull;
pub mod replay;
