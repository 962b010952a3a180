//! The CUDA backend. This build has none: [`absent`] stands in its place, with the same types.

mod absent;

pub use absent::{COMPILED_IN, Device, open};
