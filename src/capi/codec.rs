//! `dq_codec`: life, files, and what it says of its layers.

use std::ffi::c_void;
use std::sync::Arc;

use super::convert::{self, CodecHandle, Context};
use super::types::*;
use super::{guard, layer_shape};
use crate::codec::{Codec, CodecDesc, MAX_LAYERS};
use crate::error::{Error, Result};
use crate::log;
use crate::shape::{Gauge, LayerShape, SideDesc};

/// Makes a codec with set 0 (the plain rotation) in every head. All memory that it will ever hold for statistics is
/// allocated here; `max_factor_bytes` of `dq_codec_layout` bounds what fits add.
///
/// `context`: its backend and device. `desc`: read during the call only. `out`: receives the handle; untouched on
/// failure. Destroy it with `dq_codec_destroy`.
///
/// Errors: `DQ_ERROR_INVALID_ARGUMENT`; `DQ_ERROR_UNSUPPORTED` for a head_dim or plan without code, on CUDA also for a
/// combination without kernels; `DQ_ERROR_OUT_OF_MEMORY`, `DQ_ERROR_CUDA`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_codec_create(
    context: *const dq_context,
    desc: *const dq_codec_desc,
    out: *mut *mut dq_codec,
) -> dq_status {
    guard::status(|| {
        convert::check_out("out", out)?;
        // SAFETY: the header's contract, here and below.
        let context: &Arc<Context> = unsafe { convert::handle(context) }?;
        // SAFETY: as above.
        let model = unsafe { model(desc) }?;
        let handle = CodecHandle::new(Codec::new(model)?, context)?;
        // SAFETY: checked above.
        unsafe { out.write(convert::give(handle)) };
        Ok(DQ_OK)
    })
}

/// Ends a codec. Null is fine. Records stay readable by another codec only with their sets: see `dq_sets_export`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_codec_destroy(codec: *mut dq_codec) {
    guard::value((), || {
        // SAFETY: the header's contract.
        unsafe { convert::destroy::<CodecHandle>(codec) }
    });
}

/// Writes a factor file: little endian, with magic, version, shapes, fingerprint, all sets, and a checksum. The same
/// factors give the same bytes on every machine.
///
/// `write`: called with pieces in order. Errors: `DQ_ERROR_IO` when it returned non-zero; the codec is unchanged, what
/// was written is no factor file. Threads: as for a const handle; not while a layer is observed or refitted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_codec_save(codec: *const dq_codec, write: dq_write_fn, user: *mut c_void) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        // SAFETY: as above.
        let mut write = unsafe { convert::writer(write, user) }?;
        handle.pull(0..handle.codec.layers.len())?;
        handle.codec.save(&mut write)?;
        Ok(DQ_OK)
    })
}

/// Makes a codec from a factor file. It is frozen: it has fitted factors from the first token, takes no statistics and
/// never refits, so that the same rows always give the same records.
///
/// `desc` must describe the layers and the fingerprint that the file was saved with. `read`: called for pieces in
/// order, never for more bytes than the file has. `out`: receives the handle; untouched on failure.
///
/// Errors: `DQ_ERROR_BAD_FILE` for a file that is damaged, cut short, of another version or of another model;
/// `DQ_ERROR_IO` when `read` returned non-zero, which is also how a file ends too early; and those of
/// `dq_codec_create`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_codec_load(
    context: *const dq_context,
    desc: *const dq_codec_desc,
    read: dq_read_fn,
    user: *mut c_void,
    out: *mut *mut dq_codec,
) -> dq_status {
    guard::status(|| {
        convert::check_out("out", out)?;
        // SAFETY: the header's contract, here and below.
        let context: &Arc<Context> = unsafe { convert::handle(context) }?;
        // SAFETY: as above.
        let model = unsafe { model(desc) }?;
        // SAFETY: as above.
        let mut read = unsafe { convert::reader(read, user) }?;
        let handle = CodecHandle::new(Codec::load(model, &mut read)?, context)?;
        log::information(|| format!("loaded factors of {} layers; they are frozen", handle.codec.layers.len()));
        // SAFETY: checked above.
        unsafe { out.write(convert::give(handle)) };
        Ok(DQ_OK)
    })
}

/// Where a layer's records lie and what they cost.
///
/// `n_slots`: slots that the engine will hold, over which `bits_per_value_with_factors` spreads the factors; 0 leaves
/// that field 0. `out`: its `struct_size` is set by the caller.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_codec_layout(
    codec: *const dq_codec,
    layer: u32,
    n_slots: u64,
    out: *mut dq_layout,
) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        let shape = layer_shape(handle, layer)?;
        let factors = handle.codec.max_factor_bytes(layer as usize) as u64;
        // SAFETY: as above.
        unsafe { convert::fill_struct("out", out, &layout(shape, n_slots, factors)) }?;
        Ok(DQ_OK)
    })
}

/// What a layer has learned so far. May be called at any time, also while the layer is fitted. `out`: its `struct_size`
/// is set by the caller.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dq_codec_info(codec: *const dq_codec, layer: u32, out: *mut dq_layer_info) -> dq_status {
    guard::status(|| {
        // SAFETY: the header's contract, here and below.
        let handle: &CodecHandle = unsafe { convert::handle(codec) }?;
        layer_shape(handle, layer)?;
        let mut info = handle.codec.info(layer as usize);
        if let Some(device) = &handle.device {
            info.rows_seen = info.rows_seen.max(device.rows_seen(layer as usize));
            info.rows_to_fit = device.rows_to_fit(layer as usize);
        }
        let info = dq_layer_info {
            struct_size: 0,
            k_sets: info.k_sets as u32,
            v_sets: info.v_sets as u32,
            frozen: u32::from(info.frozen),
            rows_seen: info.rows_seen,
            factor_bytes: info.factor_bytes as u64,
            moment_bytes: info.moment_bytes as u64,
            rows_to_fit: info.rows_to_fit.unwrap_or(u64::MAX),
        };
        // SAFETY: as above.
        unsafe { convert::fill_struct("out", out, &info) }?;
        Ok(DQ_OK)
    })
}

/// # Safety
/// `desc`, when it is not null, is a `dq_codec_desc` with its layers.
unsafe fn model(desc: *const dq_codec_desc) -> Result<CodecDesc> {
    // SAFETY: the caller's word.
    let desc = unsafe { convert::read_struct("desc", desc) }?;
    if desc.flags & !DQ_CODEC_DEFER_FITS != 0 {
        return Err(Error::invalid(format!(
            "desc->flags is {:#x}; it must be 0 or DQ_CODEC_DEFER_FITS ({DQ_CODEC_DEFER_FITS})",
            desc.flags
        )));
    }
    // SAFETY: the caller's word.
    let given = unsafe { convert::layers(&desc, MAX_LAYERS as u32) }?;
    let shape = |(i, layer)| shape(layer).map_err(|e| Error::new(e.kind, format!("desc->layers[{i}].{e}")));
    let layers = given.iter().enumerate().map(shape).collect::<Result<_>>()?;
    Ok(CodecDesc {
        layers,
        max_fits: desc.max_fits as usize,
        fingerprint: desc.fingerprint,
        defers_fits: desc.flags & DQ_CODEC_DEFER_FITS != 0,
    })
}

fn shape(layer: &dq_layer_desc) -> Result<LayerShape> {
    let k = side(layer.head_dim_k, layer.k_plan, gauge("k_gauge", layer.k_gauge, Gauge::Attention)?);
    let v = side(layer.head_dim_v, layer.v_plan, gauge("v_gauge", layer.v_gauge, Gauge::Centred)?);
    LayerShape::new(layer.n_q_heads as usize, layer.n_kv_heads as usize, k, v)
}

fn side(head_dim: u32, plan: u32, gauge: Gauge) -> SideDesc {
    SideDesc { head_dim: head_dim as usize, plan, gauge }
}

fn gauge(field: &str, value: u32, default: Gauge) -> Result<Gauge> {
    match value {
        0 => Ok(default),
        DQ_GAUGE_ROTATION => Ok(Gauge::Rotation),
        DQ_GAUGE_CENTRED => Ok(Gauge::Centred),
        DQ_GAUGE_ATTENTION => Ok(Gauge::Attention),
        _ => Err(Error::invalid(format!(
            "{field} is {value}; it must be DQ_GAUGE_ROTATION ({DQ_GAUGE_ROTATION}), DQ_GAUGE_CENTRED ({DQ_GAUGE_CENTRED}), DQ_GAUGE_ATTENTION ({DQ_GAUGE_ATTENTION}), or 0"
        ))),
    }
}

fn layout(shape: &LayerShape, n_slots: u64, max_factor_bytes: u64) -> dq_layout {
    let bits = |bytes: f64| 8.0 * bytes / shape.values_per_slot() as f64;
    let slot_bytes = shape.slot_bytes as u64;
    let share = max_factor_bytes as f64 / n_slots as f64;
    dq_layout {
        struct_size: 0,
        alignment: crate::shape::SLOT_ALIGN as u32,
        slot_bytes,
        k_codes_offset: shape.k_codes_offset as u64,
        v_codes_offset: shape.v_codes_offset as u64,
        k_headers_offset: shape.k.headers_offset as u64,
        v_headers_offset: shape.v.headers_offset as u64,
        max_factor_bytes,
        bits_per_value: bits(slot_bytes as f64),
        bits_per_value_with_factors: if n_slots == 0 { 0.0 } else { bits(slot_bytes as f64 + share) },
    }
}
