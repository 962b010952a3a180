//! `dq_context`.

use std::sync::Arc;

use super::convert::{self, Context};
use super::guard;
use super::types::*;
use crate::cpu::simd::Isa;
use crate::cuda;
use crate::error::{Error, Result};

/// Opens a backend. On the CPU nothing but the handle is allocated. On Linux, where the CPU has AMX, the first one asks the
/// kernel to let this process use it (`arch_prctl(ARCH_REQ_XCOMP_PERM)`): for good, for all its threads. Signal frames of
/// threads that are inside `dq_attend` may then be 8 KiB larger, and `sigaltstack` refuses stacks below
/// `getauxval(AT_MINSIGSTKSZ)`. If the kernel says no, as it does where a thread has a smaller one already, AVX-512 is used.
/// `DECOQUANT_SIMD=avx512` in the environment never asks.
///
/// `desc`: what to open; null: the CPU. `out`: receives the handle; untouched on failure. Destroy it with
/// `dq_context_destroy`.
///
/// Errors: `DQ_ERROR_INVALID_ARGUMENT` for a number that is no backend or a device other than 0 on the CPU;
/// `DQ_ERROR_NO_BACKEND` for a backend that is not in this build (`dq_backends`), or whose driver is missing or too old, or
/// whose device is not there; `DQ_ERROR_UNSUPPORTED` for a device of an architecture without kernels;
/// `DQ_ERROR_OUT_OF_MEMORY`, `DQ_ERROR_CUDA`. On CUDA the device's primary context is retained and all kernels are loaded.
/// Threads: may be called from several at once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_context_create(desc: *const dq_context_desc, out: *mut *mut dq_context) -> dq_status {
    guard::status(|| {
        convert::check_out("out", out)?;
        // SAFETY: the header's contract.
        let context = unsafe { open(desc) }?;
        // SAFETY: checked above.
        unsafe { out.write(convert::give(Arc::new(context))) };
        Ok(DQ_OK)
    })
}

/// Ends a context. Null is fine. Codecs that were made with it keep what they need.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_context_destroy(context: *mut dq_context) {
    guard::value((), || {
        // SAFETY: the header's contract.
        unsafe { convert::destroy::<Arc<Context>>(context) }
    });
}

/// # Safety
/// `desc` is null or a `dq_context_desc`.
unsafe fn open(desc: *const dq_context_desc) -> Result<Context> {
    if desc.is_null() {
        return Ok(open_cpu());
    }
    // SAFETY: the caller's word.
    let desc = unsafe { convert::read_struct("desc", desc) }?;
    if desc.reserved != 0 {
        return Err(Error::invalid(format!("desc->reserved is {}; it must be 0", desc.reserved)));
    }
    match desc.backend {
        0 | DQ_BACKEND_CPU if desc.device == 0 => Ok(open_cpu()),
        0 | DQ_BACKEND_CPU => Err(Error::invalid(format!("desc->device is {}; it must be 0 on the CPU", desc.device))),
        DQ_BACKEND_CUDA => cuda::open(desc.device).map(Context::Cuda),
        other => Err(Error::invalid(format!(
            "desc->backend is {other}; it must be DQ_BACKEND_CPU ({DQ_BACKEND_CPU}) or DQ_BACKEND_CUDA ({DQ_BACKEND_CUDA})"
        ))),
    }
}

/// Chooses the instructions here, not in some thread's first call: the choice may change the process.
fn open_cpu() -> Context {
    Isa::detect();
    Context::Cpu
}
