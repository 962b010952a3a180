//! Row codes: codebooks, the u16 row header, and bit planes. All of it is format: golden files guard it.

pub mod codebook;
pub mod header;
pub mod planes;

pub use codebook::{Codebook, codebook};
