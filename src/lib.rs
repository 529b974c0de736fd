//! rekindle: a multi-tenant chat session engine. The map of the house, a line a room; ARCHITECTURE.md has the rules.

pub mod api; // REST and SSE: parse, map errors; no policy
pub mod cli; // commands beside the server: pull a model, chat with one
pub mod config; // typed settings from file, environment and flags
pub mod dashboard; // what an operator sees and may do: the page at /admin and its API
pub mod engine; // handle | thread | core: scheduler, fairness, sampling
pub mod kernels; // attention, linear layers, arenas: the only unsafe
pub mod kv; // pools, tables, prefix index, evictor, journal: logic over ids
pub mod model; // weights, tokenizer, chat template, forward over a flat batch
pub mod server; // builds everything once, runs it, drains it
pub mod sessions; // one actix actor per conversation: transcript, order, durability
pub mod store; // history that survives: embedded SQLite
pub mod telemetry; // metrics, logs and traces
pub mod tenants; // who a request belongs to
pub mod types; // ids and units
