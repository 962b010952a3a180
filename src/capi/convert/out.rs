//! What `dq_dequantize` and `dq_remap_rows` take.

use super::memory::{Region, check_apart, elements};
use super::rows::{Dims, Name, Output, name, output_rows};
use super::slots::{slots, slots_in_range, store};
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::shape::LayerShape;
use crate::view::{RowsMut, Store};

/// Checked arguments of `dq_dequantize`.
pub struct Dequantize<'a> {
    pub store: Store<'a>,
    pub slots: &'a [i64],
    pub k: Option<RowsMut<'a>>,
    pub v: Option<RowsMut<'a>>,
}

/// # Safety
/// All pointers, when they are not null, are valid for what counts and strides span during `'a`.
pub unsafe fn dequantize<'a>(
    shape: &LayerShape,
    store_pointer: *const dq_store,
    slot_pointer: *const i64,
    n_slots: u32,
    k_out: *const dq_tensor,
    v_out: *const dq_tensor,
) -> Result<Dequantize<'a>> {
    let count = n_slots as usize;
    // SAFETY: the caller's word, for each of these.
    let (store, store_region) = unsafe { store_at(store_pointer, shape) }?;
    // SAFETY: as above.
    let (slots, slots_region) = unsafe { slots_in_range("slots", slot_pointer, count, store.n_slots()) }?;
    let dims = |head_dim| Dims { n_tokens: count, n_heads: shape.n_kv_heads, head_dim };
    // SAFETY: as above.
    let k = unsafe { output(name!("k_out"), k_out, dims(shape.k.head_dim)) }?;
    // SAFETY: as above.
    let v = unsafe { output(name!("v_out"), v_out, dims(shape.v.head_dim)) }?;
    for out in [&k, &v].into_iter().flatten() {
        check_apart(&[out.region], &[store_region, slots_region])?;
    }
    if let (Some(k), Some(v)) = (&k, &v) {
        k.check_apart(v)?;
    }
    Ok(Dequantize { store, slots, k: k.map(|o| o.rows), v: v.map(|o| o.rows) })
}

/// # Safety
/// `pointer`, when it is not null, is a `dq_tensor` whose data is valid for writes of what `dims` spans during `'a`.
unsafe fn output<'a>(name: Name, pointer: *const dq_tensor, dims: Dims) -> Result<Option<Output<'a>>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's word.
    let tensor = unsafe { elements(name.of, pointer, 1) }?[0];
    if tensor.data.is_null() {
        return Ok(None);
    }
    // SAFETY: as above.
    unsafe { output_rows(name, &tensor, dims) }.map(Some)
}

/// # Safety
/// `pointer`, when it is not null, is a `dq_store` whose data is valid for reads and writes during `'a`.
unsafe fn store_at<'a>(pointer: *const dq_store, shape: &LayerShape) -> Result<(Store<'a>, Region)> {
    // SAFETY: the caller's word.
    let given = unsafe { elements("store", pointer, 1) }?[0];
    // SAFETY: as above.
    unsafe { store("store", &given, shape) }
}

/// Records to rewrite: the store, slots that differ from each other, and the map that is read.
///
/// # Safety
/// All pointers, when they are not null, are valid for what their counts span during `'a`.
pub unsafe fn records<'a>(
    shape: &LayerShape,
    store_pointer: *const dq_store,
    slot_pointer: *const i64,
    n_slots: u64,
    map: &[u8],
) -> Result<(Store<'a>, &'a [i64])> {
    // SAFETY: the caller's word, for each of these.
    let (store, written) = unsafe { store_at(store_pointer, shape) }?;
    let count = usize::try_from(n_slots).unwrap_or(usize::MAX);
    if count > store.n_slots() {
        return Err(Error::invalid(format!("n_slots is {n_slots}; store->n_slots is {}", store.n_slots())));
    }
    // SAFETY: as above.
    let (slots, slots_region) = unsafe { slots("slots", slot_pointer, count, store.n_slots()) }?;
    check_apart(&[written], &[slots_region, Region::elements("map", map.as_ptr(), map.len())?])?;
    Ok((store, slots))
}
