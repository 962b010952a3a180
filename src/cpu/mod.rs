//! The CPU backend: `attend` and `dequantize` on coded rows, with code paths chosen at run time.

pub mod attend;
pub mod dequantize;
pub mod simd;
