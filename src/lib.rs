//! libdecoquant: a key-value cache for large language models in a quarter of the bytes.
//!
//! Data flows one way: engine -> [`capi`] -> [`cpu`] | [`cuda`] -> [`code`], [`factor`], [`shape`]. Nothing below
//! `capi` sees a raw pointer from C without its length.
//!
//! | module | what it holds |
//! |---|---|
//! | [`capi`] | the C boundary: pointers and enumerations are checked here and nowhere else |
//! | [`codec`] | one model: shapes, factors and their files |
//! | [`shape`] | plans of code widths and the layout of a record |
//! | [`code`] | codebooks, row headers, bit planes |
//! | [`factor`] | running moments, the fit, factor sets, the Hadamard rotation |
//! | [`cpu`] | encode, attend and dequantize on the CPU |
//! | [`cuda`] | the same on a CUDA device |
//! | [`workspace`] | one routine that both counts and carves scratch memory |
//! | [`oracle`] | the naive f64 truth that tests compare with |
//! | [`view`] | checked windows on the caller's memory |
//! | [`batch`] | sequences of uneven length, blocks of slots, who sees what |

pub mod batch;
pub mod capi;
pub mod code;
pub mod codec;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod factor;
pub mod log;
pub mod oracle;
pub mod shape;
pub mod view;
pub mod workspace;
