//! The CPU backend: rows to records, attention on records, records to rows, with code paths chosen at run time.

pub mod attend;
pub mod dequantize;
pub mod encode;
pub mod remap;
pub mod simd;
