//! What runs close to the machine: arenas, attention, linear layers. The only room with unsafe code.
#![expect(unsafe_code, reason = "arenas and SIMD; each use says why it is sound")]

pub mod memory;
