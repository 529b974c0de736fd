//! Sessions.
pub mod messages;
