//! New tokens: compress, append, refit, and compress in phases.

use std::ffi::c_void;

use super::convert::{self, CodecHandle, Given, Purpose};
use super::types::*;
use super::{check_shards, guard, last_error, layer, layer_shape};
use crate::codec::Layer;
use crate::cpu::encode::{EncodeReport, encode_shard};
use crate::cuda::view::Stream;
use crate::error::{Error, Result};
use crate::log;

/// Prefill: takes statistics of the tokens, refits where a fit is due, then codes every row with the sets that serve
/// it best. The same as `dq_observe_shard`, `dq_refit_shard` and `dq_encode_shard` with one shard each.
///
/// `tokens`: q may be absent (the fit then knows nothing of queries); k, v, slots and store must be there. Records are
/// written whole, padding included; slots that are not named stay untouched. `workspace`: none is needed on the CPU.
/// `stream`: null on the CPU.
///
/// Returns `DQ_ROWS_REPLACED` when a row held NaN, infinity or values beyond f16. Such rows stay out of the statistics;
/// all other rows are coded as if they were not there.
/// On CUDA the number of such rows is added to `tokens->replaced_rows` instead. Where a fit is due, the calling thread
/// waits until it is made, and the call cannot be captured; with `DQ_CODEC_DEFER_FITS` neither.
/// Errors: `DQ_ERROR_INVALID_ARGUMENT`, `DQ_ERROR_WORKSPACE`, `DQ_ERROR_OUT_OF_MEMORY`, `DQ_ERROR_CAPTURE`, `DQ_ERROR_CUDA`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_compress(
    codec: *mut dq_codec,
    layer: u32,
    tokens: *const dq_tokens,
    workspace: *mut c_void,
    workspace_bytes: u64,
    stream: *mut c_void,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        convert::check_stream(&handle.context, stream)?;
        // No backend needs a workspace here; what is passed stays untouched.
        let _ = (workspace, workspace_bytes);
        if let Some(device) = &handle.device {
            // SAFETY: as above.
            if let Some(tokens) = unsafe { convert::device_tokens(tokens, layer_shape(handle, layer)?) }? {
                device.compress(&handle.codec, layer as usize, &tokens, Stream(stream))?;
            }
            return Ok(DQ_OK);
        }
        // SAFETY: as above.
        let Some(given) = unsafe { convert::tokens(tokens, layer_shape(handle, layer)?, Purpose::Both) }? else {
            return Ok(DQ_OK);
        };
        handle.codec.observe_shard(layer as usize, &given.tokens, 0, 1);
        if !handle.codec.defers_fits {
            refit(handle, layer, 0, 1);
        }
        replaced(layer, encode(handle, layer, &given, 0, 1)?)
    })
}

/// Decode: codes the rows with the sets in force, then adds them to the statistics when q is given. Never fits (see
/// `dq_refit`). Arguments, results and errors are those of `dq_compress`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_append(
    codec: *mut dq_codec,
    layer: u32,
    tokens: *const dq_tokens,
    workspace: *mut c_void,
    workspace_bytes: u64,
    stream: *mut c_void,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        convert::check_stream(&handle.context, stream)?;
        // No backend needs a workspace here; what is passed stays untouched.
        let _ = (workspace, workspace_bytes);
        if let Some(device) = &handle.device {
            // SAFETY: as above.
            if let Some(tokens) = unsafe { convert::device_tokens(tokens, layer_shape(handle, layer)?) }? {
                device.append(&handle.codec, layer as usize, &tokens, Stream(stream))?;
            }
            return Ok(DQ_OK);
        }
        // SAFETY: as above.
        let Some(given) = unsafe { convert::tokens(tokens, layer_shape(handle, layer)?, Purpose::Both) }? else {
            return Ok(DQ_OK);
        };
        let report = encode(handle, layer, &given, 0, 1)?;
        if given.tokens.q.is_some() {
            handle.codec.observe_shard(layer as usize, &given.tokens, 0, 1);
        }
        replaced(layer, report)
    })
}

/// Between steps, or on a thread of its own: fits the layers `[first_layer, first_layer + n_layers)` where a fit is due,
/// so that a chat which only ever appends is fitted, too. Cheap when none is due. New sets serve the rows that are coded
/// from then on; records stay as they are.
///
/// `stream`: null on the CPU. On CUDA the one that the layers' other calls go to. The fit sees the rows of the work that
/// is on it, and comes into force in its order, between one call and the next: the stream copies, and does not wait for
/// the fit; the calling thread does. A fit counts as due by the rows of work that has been done.
///
/// Errors: `DQ_ERROR_CAPTURE` when a fit is due in a capture, `DQ_ERROR_CUDA`. Threads: may overlap `dq_compress`,
/// `dq_append` and the const calls on the same layers, but no other call; which rows the new sets serve first then
/// depends on who was faster. On CUDA no stream may be under capture in global mode meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_refit(
    codec: *mut dq_codec,
    first_layer: u32,
    n_layers: u32,
    stream: *mut c_void,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        convert::check_stream(&handle.context, stream)?;
        let known = handle.codec.layers.len();
        let end = u64::from(first_layer) + u64::from(n_layers);
        if end > known as u64 {
            return Err(Error::invalid(format!(
                "first_layer is {first_layer} and n_layers {n_layers}; the codec has {known} layers"
            )));
        }
        if let Some(device) = &handle.device {
            device.refit(&handle.codec, first_layer as usize..end as usize, Stream(stream))?;
            return Ok(DQ_OK);
        }
        for layer in first_layer..end as u32 {
            refit(handle, layer, 0, 1);
        }
        Ok(DQ_OK)
    })
}

/// Phase 1 of compress: adds the tokens to the statistics. For engines that run an operation on threads of their own
/// without barriers inside: each of `n_shards` calls does its share of the heads. Shards of a phase may run at the same
/// time on any threads; every shard of a phase must have returned before the next phase starts, but a shard of phase 2 may
/// follow the same shard of phase 1 at once where `n_shards` is the same in both: then they deal the heads alike. The result
/// does not depend on `n_shards`. On the CPU only.
///
/// `tokens`: slots and store are not looked at. k and v may be absent together: a layer that shares this layer's cache
/// brings only its queries. A frozen codec ignores the rows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_observe_shard(
    codec: *mut dq_codec,
    layer: u32,
    tokens: *const dq_tokens,
    shard: u32,
    n_shards: u32,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        let shape = layer_shape(handle, layer)?;
        check_shards(shard, n_shards)?;
        convert::check_phase(&handle.context)?;
        // SAFETY: as above.
        if let Some(given) = unsafe { convert::tokens(tokens, shape, Purpose::Observe) }? {
            handle.codec.observe_shard(layer as usize, &given.tokens, shard as usize, n_shards as usize);
        }
        Ok(DQ_OK)
    })
}

/// Phase 2 of compress: fits this shard's share of the heads where a fit is due.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_refit_shard(codec: *mut dq_codec, layer: u32, shard: u32, n_shards: u32) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        layer_shape(handle, layer)?;
        check_shards(shard, n_shards)?;
        convert::check_phase(&handle.context)?;
        refit(handle, layer, shard, n_shards);
        Ok(DQ_OK)
    })
}

/// Phase 3 of compress: codes this shard's share of the tokens. q is not looked at. Returns `DQ_ROWS_REPLACED` when a
/// row of this share was replaced. Allocates nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_encode_shard(
    codec: *mut dq_codec,
    layer: u32,
    tokens: *const dq_tokens,
    shard: u32,
    n_shards: u32,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        let shape = layer_shape(handle, layer)?;
        check_shards(shard, n_shards)?;
        convert::check_phase(&handle.context)?;
        // SAFETY: as above.
        match unsafe { convert::tokens(tokens, shape, Purpose::Encode) }? {
            Some(given) => replaced(layer, encode(handle, layer, &given, shard, n_shards)?),
            None => Ok(DQ_OK),
        }
    })
}

fn encode(handle: &CodecHandle, layer: u32, given: &Given, shard: u32, n_shards: u32) -> Result<EncodeReport> {
    let (slots, store) = given.target.as_ref().expect("asked for by the purpose");
    let Layer { shape, factors } = self::layer(handle, layer)?;
    encode_shard(shape, factors, &given.tokens, slots, store, shard as usize, n_shards as usize)
}

fn refit(handle: &CodecHandle, layer: u32, shard: u32, n_shards: u32) {
    let (codec, index) = (&handle.codec, layer as usize);
    // One line for a layer: its heads come due together.
    if shard == 0 && codec.is_fit_due(index) {
        log::information(|| format!("layer {layer}: a fit is due after {} rows", codec.info(index).rows_seen));
    }
    codec.refit_shard(index, shard as usize, n_shards as usize);
}

fn replaced(layer: u32, report: EncodeReport) -> Result<dq_status> {
    match report.replaced_rows {
        0 => Ok(DQ_OK),
        n => {
            last_error::set(&format!(
                "layer {layer}: {n} rows of k and v held NaN, infinity or a scale beyond f16 and were replaced"
            ));
            Ok(DQ_ROWS_REPLACED)
        }
    }
}
