//! What can be set, and what is it by default?
