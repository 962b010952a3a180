//! Attention over coded slots.

use std::ffi::c_void;

use super::convert::{self, CodecHandle};
use super::types::*;
use super::{check_shards, guard, layer, layer_shape};
use crate::codec::Layer;
use crate::cpu::attend::{self, Limits};
use crate::cuda;
use crate::cuda::view::Stream;
use crate::error::Result;

/// Bytes of workspace that any call on this layer within `limits` needs. Depends on shapes only, never on the number of
/// shards; grows with every limit. 0 is possible: the workspace may then be null.
///
/// `bytes`: receives the size; untouched on failure. A workspace is aligned to 64 bytes, belongs to one call (or one
/// set of shards) at a time, and holds nothing between calls.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_workspace_size(
    codec: *const dq_codec,
    layer: u32,
    limits: *const dq_limits,
    bytes: *mut u64,
) -> dq_status {
    guard::status(|| {
        convert::check_out("bytes", bytes)?;
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        let shape = layer_shape(handle, layer)?;
        // SAFETY: as above.
        let limits = unsafe { convert::read_struct("limits", limits) }?;
        let (streams, queries) = (limits.max_streams.max(1) as usize, limits.max_queries as usize);
        let kv = limits.max_kv as usize;
        let size = match &handle.device {
            Some(device) => {
                let limits = cuda::Limits { streams, queries, kv, tail: limits.max_tail as usize };
                device.workspace_size(&handle.codec, layer as usize, limits)?
            }
            None => {
                let all = streams.saturating_mul(queries);
                let total = limits.max_total_queries as usize;
                attend::workspace_size(
                    shape,
                    &Limits {
                        streams,
                        queries,
                        total_queries: if total == 0 { all } else { all.min(total) },
                        kv,
                        tail: limits.max_tail as usize,
                    },
                )?
            }
        };
        // SAFETY: checked above.
        unsafe { bytes.write(size as u64) };
        Ok(DQ_OK)
    })
}

/// Attention of every query head over coded slots, in the calling thread.
///
/// `args`: see `dq_attend_args`. Queries are folded into the coded space once per factor set and rows are never
/// decoded: with `x = mean + T_S y`, the score is `(T_S^T q) . y + q . mean`, and the values' sum is unfolded once at
/// the end. Against exact arithmetic on the decoded rows the error of a channel is at most 1e-2 of its sum of `p |v|`,
/// or, where that is small beside the row's other channels (a query that sees few keys), 1e-3 of the row's mean of these
/// sums.
/// `workspace`: at least what `dq_workspace_size` says for these counts, aligned to 64 bytes. `stream`: null on the CPU.
///
/// All of `out` is written. A slot that is hidden from every query is not looked at; a visible slot must hold a record
/// of this codec. A query that sees no key yields zeros. NaN in q or in the mask reaches that query's output and no
/// other; NaN in a row of the tail reaches the queries that see it.
/// Errors: `DQ_ERROR_INVALID_ARGUMENT`, `DQ_ERROR_WORKSPACE`, and on CUDA `DQ_ERROR_UNSUPPORTED` for blocks of slots that
/// are no power of two; out and workspace are untouched then. Threads: may overlap everything but a call that writes these
/// slots.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_attend(
    codec: *const dq_codec,
    layer: u32,
    args: *const dq_attend_args,
    workspace: *mut c_void,
    workspace_bytes: u64,
    stream: *mut c_void,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        convert::check_stream(&handle.context, stream)?;
        if let Some(device) = &handle.device {
            let shape = layer_shape(handle, layer)?;
            // SAFETY: as above.
            if let Some((args, scratch)) = unsafe { convert::device_attend(args, shape, workspace, workspace_bytes) }? {
                device.attend(&handle.codec, layer as usize, &args, scratch, Stream(stream))?;
            }
            return Ok(DQ_OK);
        }
        // SAFETY: as above.
        unsafe { run(handle, layer, args, workspace, workspace_bytes, Part::Whole) }
    })
}

/// Phase 1 of attend on the caller's own threads: each of `n_shards` calls does its share of the work into the
/// workspace that they have in common. Shards may run at the same time on any threads; all must have returned before
/// `dq_attend_merge_shard` starts; the result does not depend on `n_shards`. Every shard of both phases gets the same
/// `args` and workspace. `out` may or may not be written in this phase. Arguments and errors are those of `dq_attend`.
/// On the CPU only.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_attend_shard(
    codec: *const dq_codec,
    layer: u32,
    args: *const dq_attend_args,
    workspace: *mut c_void,
    workspace_bytes: u64,
    shard: u32,
    n_shards: u32,
) -> dq_status {
    guard::status(|| {
        check_shards(shard, n_shards)?;
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        convert::check_phase(&handle.context)?;
        // SAFETY: as above.
        unsafe { run(handle, layer, args, workspace, workspace_bytes, Part::Shard(shard as usize, n_shards as usize)) }
    })
}

/// Phase 2 of attend: joins the parts of phase 1 into this shard's share of `out`. The number of shards may differ from
/// phase 1's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_attend_merge_shard(
    codec: *const dq_codec,
    layer: u32,
    args: *const dq_attend_args,
    workspace: *mut c_void,
    workspace_bytes: u64,
    shard: u32,
    n_shards: u32,
) -> dq_status {
    guard::status(|| {
        check_shards(shard, n_shards)?;
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        convert::check_phase(&handle.context)?;
        // SAFETY: as above.
        unsafe { run(handle, layer, args, workspace, workspace_bytes, Part::Merge(shard as usize, n_shards as usize)) }
    })
}

enum Part {
    Whole,
    Shard(usize, usize),
    Merge(usize, usize),
}

/// # Safety
/// The pointers are what the header says of them.
unsafe fn run(
    handle: &CodecHandle,
    layer: u32,
    args: *const dq_attend_args,
    workspace: *mut c_void,
    workspace_bytes: u64,
    part: Part,
) -> Result<dq_status> {
    let Layer { shape, factors } = self::layer(handle, layer)?;
    // SAFETY: the caller's word, here and below.
    let Some(given) = unsafe { convert::attend_args(args, shape) }? else {
        return Ok(DQ_OK);
    };
    let a = &given.args;
    let required = attend::workspace_size(shape, &Limits::of(a))?;
    // SAFETY: as above.
    let (scratch, region) = unsafe { convert::workspace(workspace.cast(), workspace_bytes, required) }?;
    given.check_apart(region)?;
    match part {
        Part::Whole => attend::attend(shape, factors, a, &scratch)?,
        Part::Shard(i, n) => attend::attend_shard(shape, factors, a, &scratch, i, n)?,
        Part::Merge(i, n) => attend::attend_merge_shard(shape, factors, a, &scratch, i, n)?,
    }
    Ok(DQ_OK)
}
