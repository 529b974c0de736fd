//! Does the real program, with a real model, keep what it promises to its clients?
//!
//! Each test starts `rekindle serve` on a free port and talks HTTP to it. Conversations and answers are short, since the
//! model runs on whatever CPU is there. `REKINDLE_SOAK=1` makes the conversations many and long, and writes the figures
//! under `load-tests/results/`.

#[cfg(test)]
mod accounts;
#[cfg(test)]
mod answers;
#[cfg(test)]
mod client;
#[cfg(test)]
mod clock;
#[cfg(test)]
mod collector;
#[cfg(test)]
mod commands;
#[cfg(test)]
mod contract;
#[cfg(test)]
mod crowd;
#[cfg(test)]
mod dashboard;
#[cfg(test)]
mod disk;
#[cfg(test)]
mod dtypes;
#[cfg(test)]
mod ends;
#[cfg(test)]
mod flight;
#[cfg(test)]
mod forecast;
#[cfg(test)]
mod habits;
#[cfg(test)]
mod kills;
#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod many;
#[cfg(test)]
mod page;
#[cfg(test)]
mod pins;
#[cfg(test)]
mod recovery;
#[cfg(test)]
mod report;
#[cfg(test)]
mod sdk;
#[cfg(test)]
mod server;
#[cfg(test)]
mod socket;
#[cfg(test)]
mod sockets;
#[cfg(test)]
mod telemetry;
#[cfg(test)]
mod tenants;
#[cfg(test)]
mod traces;
#[cfg(test)]
mod turns;
#[cfg(test)]
mod workload;
