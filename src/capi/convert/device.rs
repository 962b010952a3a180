//! Arguments whose memory is on a device: the same checks, and no look behind a pointer.

use std::ffi::c_void;

use super::attend::check_numbers;
use super::batch::{Form, form};
use super::memory::{Region, check_apart};
use super::rows::{Dims, Name, check, check_mask, check_rows_apart, name};
use super::slots::check_store;
use super::structs::read_struct;
use crate::capi::types::*;
use crate::cuda::view::{Address, Attend, Dequantize, Mask, Rows, Store, Tail, Tokens, Workspace};
use crate::error::{Error, Result};
use crate::shape::LayerShape;

const NONE: Region = Region { name: "", start: 0, len: 0 };

fn address<T>(pointer: *const T) -> Address {
    pointer.addr() as Address
}

/// `count` elements that may be absent.
fn optional<T>(name: &'static str, pointer: *const T, count: usize) -> Result<Region> {
    if pointer.is_null() { Ok(NONE) } else { Region::elements(name, pointer, count) }
}

fn rows(name: Name, tensor: &dq_tensor, dims: Dims) -> Result<(Rows, Region)> {
    let (shape, region) = check(name, tensor, dims)?;
    Ok((Rows { data: address(tensor.data), shape }, region))
}

fn store(name: &'static str, given: &dq_store, shape: &LayerShape) -> Result<(Store, Region)> {
    let (stride, region) = check_store(name, given, shape)?;
    Ok((Store { data: address(given.data), stride, n_slots: given.n_slots }, region))
}

/// `dq_tokens` of compress and append; `None` when there are no tokens.
///
/// # Safety
/// `pointer`, when it is not null, is a `dq_tokens`.
pub unsafe fn device_tokens(pointer: *const dq_tokens, shape: &LayerShape) -> Result<Option<Tokens>> {
    // SAFETY: the caller's word.
    let given = unsafe { read_struct("tokens", pointer) }?;
    if given.n_tokens == 0 {
        return Ok(None);
    }
    let n = given.n_tokens as usize;
    let dims = |n_heads, head_dim| Dims { n_tokens: n, n_heads, head_dim };
    let (k, k_region) = rows(name!("tokens->k"), &given.k, dims(shape.n_kv_heads, shape.k.head_dim))?;
    let (v, v_region) = rows(name!("tokens->v"), &given.v, dims(shape.n_kv_heads, shape.v.head_dim))?;
    let q = match given.q.data.is_null() {
        true => None,
        false => Some(rows(name!("tokens->q"), &given.q, dims(shape.n_q_heads, shape.k.head_dim))?),
    };
    let (store, written) = store("tokens->store", &given.store, shape)?;
    let reads = [
        k_region,
        v_region,
        q.map_or(NONE, |q| q.1),
        optional("tokens->positions", given.positions, n)?,
        Region::elements("tokens->slots", given.slots, n)?,
    ];
    check_apart(&[written, optional("tokens->replaced_rows", given.replaced_rows, 1)?], &reads)?;
    Ok(Some(Tokens {
        n_tokens: given.n_tokens,
        q: q.map(|q| q.0),
        k,
        v,
        positions: address(given.positions),
        slots: address(given.slots),
        store,
        replaced_rows: address(given.replaced_rows),
    }))
}

/// `dq_attend_args` and the workspace; `None` when there are no queries.
///
/// # Safety
/// `pointer`, when it is not null, is a `dq_attend_args`.
pub unsafe fn device_attend(
    pointer: *const dq_attend_args,
    shape: &LayerShape,
    workspace: *mut c_void,
    workspace_bytes: u64,
) -> Result<Option<(Attend, Workspace)>> {
    // SAFETY: the caller's word.
    let given = unsafe { read_struct("args", pointer) }?;
    let scale = check_numbers(&given, shape)?;
    let form = form(&given)?;
    let block_shift = check_served(&given, &form)?;
    let Form { n_streams, n_tokens, visible } = form;
    let (n_q, n_kv) = (given.n_q as usize, given.n_kv as usize);
    if n_q == 0 || n_tokens == 0 {
        return Ok(None);
    }
    let (store, store_region) = store("args->store", &given.store, shape)?;
    let dims = |head_dim| Dims { n_tokens, n_heads: shape.n_q_heads, head_dim };
    let (q, q_region) = rows(name!("args->q"), &given.q, dims(shape.k.head_dim))?;
    let (out, out_region) = rows(name!("args->out"), &given.out, dims(shape.v.head_dim))?;
    check_rows_apart(name!("args->out"), &out.shape)?;
    let mask = check_mask(&given.mask, n_streams, n_q, n_kv + given.tail.n_rows as usize)?;
    let (tail, [tail_k, tail_v]) = tail(&given.tail, n_streams, shape)?;
    let (s, table_stride) = (&given.sequences, given.sequences.table_stride / 4);
    let table = (table_stride as usize).saturating_mul(n_streams - 1).saturating_add(n_kv.div_ceil(1 << block_shift));
    let reads = [
        store_region,
        q_region,
        mask.as_ref().map_or(NONE, |m| m.region),
        optional("args->sink_logits", given.sink_logits, shape.n_q_heads)?,
        optional("args->sequences.q_starts", s.q_starts, n_streams + 1)?,
        optional("args->sequences.kv_lengths", s.kv_lengths, n_streams)?,
        optional("args->sequences.block_table", s.block_table, table)?,
        tail_k,
        tail_v,
        optional("args->tail.starts", given.tail.starts, n_streams)?,
        optional("args->tail.lengths", given.tail.lengths, n_streams)?,
    ];
    let scratch = Region { name: "workspace", start: workspace.addr(), len: workspace_bytes as usize };
    check_apart(&[out_region, scratch], &reads)?;
    let attend = Attend {
        n_streams: n_streams as u32,
        n_q: given.n_q,
        n_kv: given.n_kv,
        first_slot: given.first_slot,
        stream_slots: given.stream_slots,
        store,
        q,
        out,
        mask: mask.map(|m| Mask {
            data: address(given.mask.data),
            dtype: m.dtype,
            query_stride: m.query_stride as u64,
            stream_stride: m.stream_stride as u64,
        }),
        sink_logits: address(given.sink_logits),
        q_starts: address(s.q_starts),
        kv_lengths: address(s.kv_lengths),
        block_table: address(s.block_table),
        table_stride,
        block_shift,
        // No sequence is longer than the largest window.
        window: visible.and_then(|v| v.window).map_or(0, |w| w.min(i32::MAX as usize) as i32),
        causal: visible.is_some_and(|v| v.causal),
        scale,
        softcap: given.softcap,
        tail,
    };
    Ok(Some((attend, Workspace { data: address(workspace), bytes: workspace_bytes })))
}

/// The tail, and where k and v lie as far as the host can know.
fn tail(t: &dq_tail, n_streams: usize, shape: &LayerShape) -> Result<(Option<Tail>, [Region; 2])> {
    if t.n_rows == 0 {
        return Ok((None, [NONE; 2]));
    }
    let known = t.starts.is_null() && t.lengths.is_null();
    let side = |name: Name, tensor: &dq_tensor, head_dim| {
        let dims = |n_tokens| Dims { n_tokens, n_heads: shape.n_kv_heads, head_dim };
        if known {
            return rows(name, tensor, dims(n_streams.saturating_mul(t.n_rows as usize)));
        }
        // Only the device knows where tails lie: strides are those of several rows, the memory is that of the first.
        let (several, _) = rows(name, tensor, dims(2))?;
        Ok((several, rows(name, tensor, dims(1))?.1))
    };
    let (k, k_region) = side(name!("args->tail.k"), &t.k, shape.k.head_dim)?;
    let (v, v_region) = side(name!("args->tail.v"), &t.v, shape.v.head_dim)?;
    let tail = Tail { k, v, starts: address(t.starts), lengths: address(t.lengths), n_rows: t.n_rows };
    Ok((Some(tail), [k_region, v_region]))
}

/// What the kernels have no code for; the power of two that a block's slots are.
fn check_served(given: &dq_attend_args, form: &Form) -> Result<u32> {
    let s = &given.sequences;
    if s.block_table.is_null() {
        return Ok(0);
    }
    if !s.block_slots.is_power_of_two() {
        return Err(Error::unsupported(format!(
            "args->sequences.block_slots is {}; on CUDA it must be a power of two",
            s.block_slots
        )));
    }
    let blocks = u64::from(given.n_kv.div_ceil(s.block_slots));
    if s.table_stride / 4 < blocks && s.table_stride != 0 && form.n_streams > 1 {
        return Err(Error::invalid(format!(
            "args->sequences.table_stride is {} entries; on CUDA it must be 0 or hold the {blocks} blocks of n_kv keys",
            s.table_stride / 4
        )));
    }
    Ok(s.block_slots.trailing_zeros())
}

/// Arguments of `dq_dequantize`, of which there is at least one slot.
///
/// # Safety
/// The structs, when the pointers are not null, are what their types say.
pub unsafe fn device_dequantize(
    shape: &LayerShape,
    store_pointer: *const dq_store,
    slots: *const i64,
    n_slots: u32,
    k_out: *const dq_tensor,
    v_out: *const dq_tensor,
) -> Result<Dequantize> {
    Region::elements("store", store_pointer, 1)?;
    // SAFETY: not null; the caller's word.
    let (store, store_region) = store("store", unsafe { &*store_pointer }, shape)?;
    let slots_region = Region::elements("slots", slots, n_slots as usize)?;
    let output = |name: Name, tensor: *const dq_tensor, head_dim| -> Result<Option<(Rows, Region)>> {
        if tensor.is_null() {
            return Ok(None);
        }
        Region::elements(name.of, tensor, 1)?;
        // SAFETY: as above.
        let tensor = unsafe { &*tensor };
        if tensor.data.is_null() {
            return Ok(None);
        }
        let (rows, region) = rows(name, tensor, Dims { n_tokens: n_slots as usize, n_heads: shape.n_kv_heads, head_dim })?;
        check_rows_apart(name, &rows.shape)?;
        check_apart(&[region], &[store_region, slots_region])?;
        Ok(Some((rows, region)))
    };
    let k = output(name!("k_out"), k_out, shape.k.head_dim)?.map(|o| o.0);
    let v = output(name!("v_out"), v_out, shape.v.head_dim)?.map(|o| o.0);
    Ok(Dequantize { store, slots: address(slots), n_slots, k, v })
}
