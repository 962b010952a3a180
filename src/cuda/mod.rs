//! The CUDA backend.
//!
//! | module | what it holds |
//! |---|---|
//! | [`driver`] | the CUDA driver: the only file that touches cudarc |
//! | [`params`] | what the kernels take, the mirror of `kernels/params.h` |
//! | [`launch`] | how work is cut: grids, shared memory, workspace |
//! | [`tables`] | a layer's factors and statistics in device memory |
//! | [`ops`] | the calls |
//! | [`view`] | checked descriptions of the caller's device memory |
//! | [`absent`] | stands in place of all of it in a build without the feature `cuda` |

use crate::error::{Error, ErrorKind};

pub mod view;

#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
mod ops;
#[cfg(feature = "cuda")]
mod params;
#[cfg(feature = "cuda")]
mod tables;
#[cfg(feature = "cuda")]
pub use driver::{COMPILED_IN, Device, open};
#[cfg(feature = "cuda")]
pub use ops::DeviceCodec;

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(not(feature = "cuda"))]
pub use absent::{COMPILED_IN, Device, DeviceCodec, open};

/// Upper limits of the calls that one workspace serves.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub streams: usize,
    pub queries: usize,
    pub kv: usize,
    /// Rows of a tail.
    pub tail: usize,
}

fn no_kernels(device: u32) -> Error {
    Error::new(
        ErrorKind::NoBackend,
        format!("backend is DQ_BACKEND_CUDA (device {device}); this library was built without CUDA kernels"),
    )
}
