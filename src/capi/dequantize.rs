//! Coded rows back to floats.

use std::ffi::c_void;

use super::convert::{self, CodecHandle};
use super::types::*;
use super::{guard, layer};
use crate::codec::Layer;
use crate::cpu::dequantize::dequantize;
use crate::cuda::view::Stream;

/// Decodes records into rows.
///
/// `slots`: `[n_slots]` slot numbers; -1 gives zero rows; repeats are fine. `k_out`: `[n_slots][n_kv_heads][head_dim_k]`
/// and `v_out`: `[n_slots][n_kv_heads][head_dim_v]`, f32, f16 or bf16; either may be null, or have null data, and is
/// then left out. The two may be woven into one buffer. A row that names a set which the codec does not hold is
/// decoded as zeros.
///
/// Formula: `x = mean + T_S y`, `y[j] = scale * level(code[j])`. Allocates nothing on the CPU.
/// Errors: `DQ_ERROR_INVALID_ARGUMENT`; nothing is written then. Threads: may overlap everything but a call that
/// writes these slots.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_dequantize(
    codec: *const dq_codec,
    layer: u32,
    store: *const dq_store,
    slots: *const i64,
    n_slots: u32,
    k_out: *const dq_tensor,
    v_out: *const dq_tensor,
    stream: *mut c_void,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        let Layer { shape, factors } = self::layer(handle, layer)?;
        convert::check_stream(&handle.context, stream)?;
        if n_slots == 0 {
            return Ok(DQ_OK);
        }
        if let Some(device) = &handle.device {
            // SAFETY: as above.
            let given = unsafe { convert::device_dequantize(shape, store, slots, n_slots, k_out, v_out) }?;
            device.dequantize(&handle.codec, layer as usize, &given, Stream(stream))?;
            return Ok(DQ_OK);
        }
        // SAFETY: as above.
        let given = unsafe { convert::dequantize(shape, store, slots, n_slots, k_out, v_out) }?;
        dequantize(shape, factors, &given.store, given.slots, given.k, given.v)?;
        Ok(DQ_OK)
    })
}
