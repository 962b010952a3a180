//! Factor sets that travel with records which leave the codec: state files, other contexts.

use std::ffi::c_void;

use super::convert::{self, CodecHandle};
use super::types::*;
use super::{guard, layer_shape};
use crate::cpu::remap::{map_bytes, remap_rows};
use crate::log;

/// Writes all factor sets of a layer, and what codes new rows with the newest: shapes, sets with their ids, its encode
/// matrix, checksum; little endian.
///
/// `write`: called with pieces in order. Errors: `DQ_ERROR_IO` when it returned non-zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_sets_export(
    codec: *const dq_codec,
    layer: u32,
    write: dq_write_fn,
    user: *mut c_void,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        layer_shape(handle, layer)?;
        // SAFETY: as above.
        let mut write = unsafe { convert::writer(write, user) }?;
        handle.pull(layer as usize..layer as usize + 1)?;
        handle.codec.export_sets(layer as usize, &mut write)?;
        Ok(DQ_OK)
    })
}

/// Takes up the sets of an export, so that its records can be read after `dq_remap_rows`. A set that the codec already
/// holds (same content) keeps its id; others take free ids. New rows never use them, with one exception: a head that
/// learns and has not been fitted yet codes with the newest set of the export, and its sinks, until it has seen more rows
/// than that set was made from. Frozen codecs import, too.
///
/// `read`: called for pieces in order. `map`: receives `[side][head][old id] = new id`, side 0 being the keys, or 255
/// where the export has no such set; at least `2 * n_kv_heads * DQ_MAX_SETS` bytes, untouched on failure.
///
/// Errors: `DQ_ERROR_BAD_FILE` for an export that is damaged, cut short, of another version or of another shape;
/// `DQ_ERROR_SETS_FULL` when a head has too few free ids, or on CUDA no room for so many fits (max_fits and three); `DQ_ERROR_IO`. No set was added then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_sets_import(
    codec: *mut dq_codec,
    layer: u32,
    read: dq_read_fn,
    user: *mut c_void,
    map: *mut u8,
    map_bytes: u64,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        let shape = layer_shape(handle, layer)?;
        // SAFETY: as above.
        let map = unsafe { convert::bytes_mut("map", map, map_bytes, self::map_bytes(shape)) }?;
        // SAFETY: as above.
        let mut read = unsafe { convert::reader(read, user) }?;
        // Not into the caller's map before all has gone well.
        let mut ids = vec![0; map.len()];
        handle.pull(layer as usize..layer as usize + 1)?;
        let dense_room =
            handle.device.as_ref().map_or(usize::MAX, |d| d.dense_sets_left(&handle.codec, layer as usize));
        handle.codec.import_sets(layer as usize, &mut read, &mut ids, dense_room)?;
        if let Some(device) = &handle.device {
            device.push(&handle.codec, layer as usize)?;
        }
        map.copy_from_slice(&ids);
        log::information(|| format!("layer {layer}: imported factor sets"));
        Ok(DQ_OK)
    })
}

/// Rewrites the set ids in records that came from another codec. In host memory, whatever the backend.
///
/// `store`: the records. `slots`: `[n_slots]`, -1 skips, none named twice. `map`: of `dq_sets_import`, `map_bytes` at
/// least `2 * n_kv_heads * DQ_MAX_SETS`. Codes and scales stay as they are.
///
/// Errors: `DQ_ERROR_INVALID_ARGUMENT`, also for a row that names an id which the map does not hold. All rows are
/// checked before the first is written. Threads: must not overlap a call that reads or writes these slots.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_remap_rows(
    codec: *const dq_codec,
    layer: u32,
    store: *const dq_store,
    slots: *const i64,
    n_slots: u64,
    map: *const u8,
    map_bytes: u64,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        let shape = layer_shape(handle, layer)?;
        if n_slots == 0 {
            return Ok(DQ_OK);
        }
        // SAFETY: as above.
        let map = unsafe { convert::bytes("map", map, map_bytes, self::map_bytes(shape)) }?;
        // SAFETY: as above.
        let (store, slots) = unsafe { convert::records(shape, store, slots, n_slots, map) }?;
        // SAFETY: as above; no slot is named twice.
        unsafe { remap_rows(shape, &store, slots, map) }?;
        Ok(DQ_OK)
    })
}
