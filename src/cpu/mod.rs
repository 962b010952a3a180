//! The CPU backend: coding, attention and decoding of rows, with code paths chosen at run time.

pub mod attend;
pub mod dequantize;
pub mod encode;
pub mod remap;
pub mod simd;
