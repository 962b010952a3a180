//! Streams of work and of bytes.

use std::ffi::c_void;

use super::handle::Context;
use crate::capi::types::{dq_read_fn, dq_write_fn};
use crate::error::{Error, ErrorKind, Result};

/// The CPU has no streams: a caller that passes one believes to be on another device.
pub fn check_stream(context: &Context, stream: *mut c_void) -> Result<()> {
    match context {
        Context::Cpu if stream.is_null() => Ok(()),
        Context::Cpu => Err(Error::invalid(format!("stream is {stream:p}; it must be null on the CPU"))),
        Context::Cuda(_) => Ok(()),
    }
}

/// Phases of a call are for threads of the caller's own.
pub fn check_phase(context: &Context) -> Result<()> {
    match context {
        Context::Cpu => Ok(()),
        Context::Cuda(_) => Err(Error::unsupported("calls in shards work on the CPU only; this codec is on a CUDA device")),
    }
}

/// # Safety
/// `write` and `user` are what the declaration of `dq_write_fn` says, for as long as the result lives.
pub unsafe fn writer(write: dq_write_fn, user: *mut c_void) -> Result<impl FnMut(&[u8]) -> Result<()>> {
    let write = write.ok_or_else(|| Error::invalid("write is null"))?;
    Ok(move |bytes: &[u8]| {
        // SAFETY: the caller's word; the bytes are a slice.
        match unsafe { write(user, bytes.as_ptr().cast(), bytes.len() as u64) } {
            0 => Ok(()),
            code => Err(io("write", code, bytes.len())),
        }
    })
}

/// # Safety
/// `read` and `user` are what the declaration of `dq_read_fn` says, for as long as the result lives.
pub unsafe fn reader(read: dq_read_fn, user: *mut c_void) -> Result<impl FnMut(&mut [u8]) -> Result<()>> {
    let read = read.ok_or_else(|| Error::invalid("read is null"))?;
    Ok(move |bytes: &mut [u8]| {
        // SAFETY: the caller's word; the bytes are a slice.
        match unsafe { read(user, bytes.as_mut_ptr().cast(), bytes.len() as u64) } {
            0 => Ok(()),
            code => Err(io("read", code, bytes.len())),
        }
    })
}

fn io(callback: &str, code: i32, len: usize) -> Error {
    Error::new(ErrorKind::Io, format!("{callback} returned {code} for {len} bytes; it must return 0"))
}
