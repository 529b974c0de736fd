//! Which KV is where, whose is it, and what goes when memory runs short? Logic over ids; knows no sessions, no model.

pub mod block;
pub mod transfer;
