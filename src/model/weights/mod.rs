//! How do weights get from a file into memory?

pub mod gguf;
