//! What a build without CUDA kernels has in place of the backend.

use crate::error::{Error, ErrorKind, Result};

pub const COMPILED_IN: bool = false;

/// A device that cannot exist, so that no call after [`open`] needs to ask.
#[derive(Debug, Clone, Copy)]
pub enum Device {}

pub fn open(device: u32) -> Result<Device> {
    Err(Error::new(
        ErrorKind::NoBackend,
        format!("backend is DQ_BACKEND_CUDA (device {device}); this library was built without CUDA kernels"),
    ))
}
