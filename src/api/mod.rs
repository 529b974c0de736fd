//! REST and SSE.
