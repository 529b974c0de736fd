//! Which commands does the program have beside serving?

pub mod chat;
pub mod download;
mod given;
pub mod key;
pub mod pull;
pub mod replay;
