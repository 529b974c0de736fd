//! Which commands run beside the server?

pub mod chat;
