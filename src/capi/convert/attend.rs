//! `dq_attend_args`.

use super::batch::{form, sequences, tail};
use super::memory::{Region, check_apart, elements};
use super::rows::{Dims, input_rows, mask, name, output_rows};
use super::slots::store;
use super::structs::read_struct;
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::shape::LayerShape;
use crate::view::AttendArgs;

/// Checked arguments, and what is read and written besides the workspace.
pub struct Attend<'a> {
    pub args: AttendArgs<'a>,
    reads: [Region; READS],
    out: Region,
}

/// Store, q, mask, sinks; starts, lengths and table of sequences; k, v, starts and lengths of the tail.
const READS: usize = 11;
const NONE: Region = Region { name: "", start: 0, len: 0 };

impl Attend<'_> {
    /// The workspace lies apart from everything else, too.
    pub fn check_apart(&self, workspace: Region) -> Result<()> {
        check_apart(&[self.out, workspace], &self.reads)
    }
}

/// `None` when there are no queries.
///
/// # Safety
/// The pointers that the struct holds, when they are not null, are valid for what counts and strides span during `'a`.
pub unsafe fn attend_args<'a>(
    pointer: *const dq_attend_args,
    shape: &LayerShape,
) -> Result<Option<Attend<'a>>> {
    // SAFETY: the caller's word.
    let given = unsafe { read_struct("args", pointer) }?;
    let (n_q, n_kv) = (given.n_q as usize, given.n_kv as usize);
    let scale = check_numbers(&given, shape)?;
    let form = form(&given)?;
    let (n_streams, n_tokens) = (form.n_streams, form.n_tokens);
    if n_q == 0 || n_tokens == 0 {
        return Ok(None);
    }
    let q_dims = Dims { n_tokens, n_heads: shape.n_q_heads, head_dim: shape.k.head_dim };
    let out_dims = Dims { n_tokens, n_heads: shape.n_q_heads, head_dim: shape.v.head_dim };
    // SAFETY: the caller's word, for each of these.
    let (store, store_region) = unsafe { store("args->store", &given.store, shape) }?;
    // SAFETY: as above.
    let (q, q_region) = unsafe { input_rows(name!("args->q"), &given.q, q_dims) }?;
    // SAFETY: as above.
    let out = unsafe { output_rows(name!("args->out"), &given.out, out_dims) }?;
    // SAFETY: as above.
    let mask = unsafe { mask(&given.mask, n_streams, n_q, n_kv + given.tail.n_rows as usize) }?;
    // SAFETY: as above.
    let sinks = unsafe { sink_logits(&given, shape) }?;
    // SAFETY: as above.
    let (sequences, [starts, lengths, table]) = unsafe { sequences(&given, &form, store.n_slots()) }?;
    // SAFETY: as above.
    let (tail, [tail_k, tail_v, tail_starts, tail_lengths]) = unsafe { tail(&given, n_streams, shape) }?;
    let (mask_region, sinks_region) = (mask.map_or(NONE, |m| m.1), sinks.map_or(NONE, |s| s.1));
    let attend = Attend {
        args: AttendArgs {
            n_streams,
            n_q,
            n_kv,
            first_slot: given.first_slot as usize,
            stream_slots: given.stream_slots as usize,
            store,
            q,
            out: out.rows,
            mask: mask.map(|m| m.0),
            sink_logits: sinks.map(|s| s.0),
            scale,
            softcap: given.softcap,
            sequences,
            tail,
        },
        reads: [
            store_region,
            q_region,
            mask_region,
            sinks_region,
            starts,
            lengths,
            table,
            tail_k,
            tail_v,
            tail_starts,
            tail_lengths,
        ],
        out: out.region,
    };
    attend.check_apart(NONE)?;
    Ok(Some(attend))
}

pub(super) fn check_numbers(given: &dq_attend_args, shape: &LayerShape) -> Result<f32> {
    if !given.scale.is_finite() {
        return Err(Error::invalid(format!("args->scale is {}; it must be finite", given.scale)));
    }
    if !(given.softcap >= 0.0 && given.softcap.is_finite()) {
        return Err(Error::invalid(format!("args->softcap is {}; it must be finite and not negative", given.softcap)));
    }
    Ok(if given.scale == 0.0 { 1.0 / (shape.k.head_dim as f32).sqrt() } else { given.scale })
}

/// # Safety
/// See [`attend_args`].
unsafe fn sink_logits<'a>(given: &dq_attend_args, shape: &LayerShape) -> Result<Option<(&'a [f32], Region)>> {
    const NAME: &str = "args->sink_logits";
    if given.sink_logits.is_null() {
        return Ok(None);
    }
    let region = Region::elements(NAME, given.sink_logits, shape.n_q_heads)?;
    // SAFETY: the caller's word.
    Ok(Some((unsafe { elements(NAME, given.sink_logits, shape.n_q_heads) }?, region)))
}
