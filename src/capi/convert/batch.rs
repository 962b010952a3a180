//! `dq_sequences` and `dq_tail` of `dq_attend_args`.

use super::memory::{Region, elements};
use super::rows::{Dims, input_rows, name};
use crate::batch::{Batch, BlockTable, Sequences, Visible};
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::shape::LayerShape;
use crate::view::Tail;

fn fail<T>(message: String) -> Result<T> {
    Err(Error::invalid(message))
}

/// What `dq_attend_args` says by value about queries and keys.
pub struct Form {
    pub n_streams: usize,
    /// Tokens in q and out.
    pub n_tokens: usize,
    /// Who sees what in sequences; `None`: a mask may say.
    pub visible: Option<Visible>,
}

/// Every rule that needs no look behind a pointer, for all backends.
pub fn form(given: &dq_attend_args) -> Result<Form> {
    let (s, n_streams) = (&given.sequences, given.n_streams.max(1) as usize);
    check_forms(given)?;
    if s.block_table.is_null() {
        check_slots(given, n_streams)?;
    } else {
        if s.table_stride % 4 != 0 {
            return fail(format!("args->sequences.table_stride is {}; it must be a multiple of 4", s.table_stride));
        }
        if s.block_slots == 0 {
            return fail("args->sequences.block_slots is 0; it must be at least 1".into());
        }
    }
    let n_tokens = if s.q_starts.is_null() { n_streams * given.n_q as usize } else { s.n_tokens as usize };
    let visible = if s.kv_lengths.is_null() { None } else { Some(visible(s)?) };
    Ok(Form { n_streams, n_tokens, visible })
}

/// Fields that only one of the two ways to name keys has are zero in the other.
fn check_forms(given: &dq_attend_args) -> Result<()> {
    let (s, tail) = (&given.sequences, &given.tail);
    let must = |name: &str, fine: bool, rule: &str| match fine {
        true => Ok(()),
        false => fail(format!("args->{name} is given; {rule}")),
    };
    const ALONE: &str = "it must be 0 without sequences.kv_lengths";
    let batch = !s.kv_lengths.is_null();
    must("sequences.q_starts", batch || s.q_starts.is_null(), ALONE)?;
    must("sequences.block_table", batch || s.block_table.is_null(), ALONE)?;
    must("sequences.visible", batch || s.visible == 0, ALONE)?;
    must("sequences.window", batch || s.window == 0, ALONE)?;
    must("tail.starts", batch || tail.starts.is_null(), ALONE)?;
    must("tail.lengths", batch || tail.lengths.is_null(), ALONE)?;
    let uneven = !s.q_starts.is_null();
    must("sequences.n_tokens", uneven || s.n_tokens == 0, "it must be 0 without sequences.q_starts")?;
    const NO_TABLE: &str = "it must be 0 without sequences.block_table";
    let paged = !s.block_table.is_null();
    must("sequences.table_stride", paged || s.table_stride == 0, NO_TABLE)?;
    must("sequences.block_slots", paged || s.block_slots == 0, NO_TABLE)?;
    const TABLE: &str = "it must be 0 with sequences.block_table";
    must("first_slot", !paged || given.first_slot == 0, TABLE)?;
    must("stream_slots", !paged || given.stream_slots == 0, TABLE)?;
    must("mask", !batch || given.mask.data.is_null(), "it must be null with sequences.kv_lengths")?;
    const NO_ROWS: &str = "it must be 0 while tail.n_rows is 0";
    let rows = tail.n_rows > 0;
    must("tail.k.data", rows || tail.k.data.is_null(), NO_ROWS)?;
    must("tail.v.data", rows || tail.v.data.is_null(), NO_ROWS)?;
    must("tail.starts", rows || tail.starts.is_null(), NO_ROWS)?;
    must("tail.lengths", rows || tail.lengths.is_null(), NO_ROWS)?;
    if tail.reserved != 0 {
        return fail(format!("args->tail.reserved is {}; it must be 0", tail.reserved));
    }
    Ok(())
}

/// The last stream's last key lies in the store.
fn check_slots(given: &dq_attend_args, n_streams: usize) -> Result<()> {
    let end = (n_streams as u64 - 1)
        .checked_mul(given.stream_slots)
        .and_then(|s| s.checked_add(given.first_slot))
        .and_then(|s| s.checked_add(u64::from(given.n_kv)));
    if end.is_some_and(|end| end <= given.store.n_slots) {
        return Ok(());
    }
    fail(format!(
        "args->first_slot is {}, stream_slots {}, n_streams {n_streams} and n_kv {}: slots end at {}; args->store.n_slots is {}",
        given.first_slot,
        given.stream_slots,
        given.n_kv,
        end.map_or("more than 2^64".into(), |e| e.to_string()),
        given.store.n_slots
    ))
}

fn visible(s: &dq_sequences) -> Result<Visible> {
    let causal = match s.visible {
        0 | DQ_VISIBLE_CAUSAL => true,
        DQ_VISIBLE_ALL => false,
        other => {
            return fail(format!(
                "args->sequences.visible is {other}; it must be DQ_VISIBLE_CAUSAL ({DQ_VISIBLE_CAUSAL}) or DQ_VISIBLE_ALL ({DQ_VISIBLE_ALL})"
            ));
        }
    };
    if !causal && s.window != 0 {
        return fail(format!("args->sequences.window is {}; it must be 0 with DQ_VISIBLE_ALL", s.window));
    }
    Ok(Visible { causal, window: (s.window != 0).then_some(s.window as usize) })
}

const NONE: Region = Region { name: "", start: 0, len: 0 };

/// # Safety
/// `pointer`, when it is not null, is valid for reads of `count` numbers during `'a`.
unsafe fn numbers<'a>(name: &'static str, pointer: *const i32, count: usize) -> Result<(&'a [i32], Region)> {
    let region = Region::elements(name, pointer, count)?;
    // SAFETY: the caller's word.
    Ok((unsafe { elements(name, pointer, count) }?, region))
}

/// The batch, and where its arrays lie: starts, lengths, table.
///
/// # Safety
/// The pointers, when they are not null, are valid for reads of what counts and strides span during `'a`.
pub unsafe fn sequences<'a>(
    given: &dq_attend_args,
    form: &Form,
    n_slots: usize,
) -> Result<(Option<Sequences<'a>>, [Region; 3])> {
    let (s, n) = (&given.sequences, form.n_streams);
    let Some(visible) = form.visible else {
        return Ok((None, [NONE; 3]));
    };
    let (mut q_starts, mut starts_region) = (None, NONE);
    if !s.q_starts.is_null() {
        // SAFETY: the caller's word, for each of these.
        let (numbers, region) = unsafe { numbers("args->sequences.q_starts", s.q_starts, n + 1) }?;
        (q_starts, starts_region) = (Some(numbers), region);
    }
    // SAFETY: as above.
    let (kv_lengths, lengths_region) = unsafe { numbers("args->sequences.kv_lengths", s.kv_lengths, n) }?;
    let tail_lengths = match given.tail.lengths.is_null() {
        true => None,
        // SAFETY: as above.
        false => Some(unsafe { numbers("args->tail.lengths", given.tail.lengths, n) }?.0),
    };
    let (mut table, mut table_region) = (None, NONE);
    if !s.block_table.is_null() {
        let (stride, block_slots) = ((s.table_stride / 4) as usize, s.block_slots as usize);
        // To the end of the last block that a sequence names. Lengths and strides that make no sense are refused below.
        let row_end = |(i, &length): (usize, &i32)| {
            i.saturating_mul(stride).saturating_add((length.max(0) as usize).div_ceil(block_slots))
        };
        let count = kv_lengths.iter().enumerate().map(row_end).max().unwrap_or(0);
        // SAFETY: as above.
        let (blocks, region) = unsafe { numbers("args->sequences.block_table", s.block_table, count) }?;
        table = Some(BlockTable { blocks, stride, block_slots });
        table_region = region;
    }
    let sequences = Sequences::new(Batch {
        q_starts,
        kv_lengths,
        tail_lengths,
        tail_rows: given.tail.n_rows as usize,
        table,
        visible,
        n_tokens: s.n_tokens as usize,
        n_q: given.n_q as usize,
        n_kv: given.n_kv as usize,
        n_slots,
    })?;
    Ok((Some(sequences), [starts_region, lengths_region, table_region]))
}

/// The tail, and where its parts lie: k, v, starts, lengths.
///
/// # Safety
/// As for [`sequences`].
pub unsafe fn tail<'a>(given: &dq_attend_args, n: usize, shape: &LayerShape) -> Result<(Option<Tail<'a>>, [Region; 4])> {
    let t = &given.tail;
    let n_rows = t.n_rows as usize;
    if n_rows == 0 {
        return Ok((None, [NONE; 4]));
    }
    let (mut starts, mut starts_region, mut lengths, mut lengths_region) = (None, NONE, None, NONE);
    if !t.starts.is_null() {
        // SAFETY: the caller's word, for each of these.
        let (numbers, region) = unsafe { numbers("args->tail.starts", t.starts, n) }?;
        if let Some(i) = numbers.iter().position(|&start| start < 0) {
            return fail(format!("args->tail.starts[{i}] is {}; it must not be negative", numbers[i]));
        }
        (starts, starts_region) = (Some(numbers), region);
    }
    if !t.lengths.is_null() {
        // SAFETY: as above. `sequences` checked the numbers.
        let (numbers, region) = unsafe { numbers("args->tail.lengths", t.lengths, n) }?;
        (lengths, lengths_region) = (Some(numbers), region);
    }
    // Rows up to the end of the last tail.
    let end = |i: usize| {
        let rows = lengths.map_or(n_rows, |l| l[i].max(0) as usize);
        if rows == 0 { 0 } else { starts.map_or(i * n_rows, |s| s[i] as usize) + rows }
    };
    let n_tokens = (0..n).map(end).max().unwrap_or(0);
    if n_tokens == 0 {
        return Ok((None, [NONE, NONE, starts_region, lengths_region]));
    }
    let dims = |head_dim| Dims { n_tokens, n_heads: shape.n_kv_heads, head_dim };
    // SAFETY: as above.
    let (k, k_region) = unsafe { input_rows(name!("args->tail.k"), &t.k, dims(shape.k.head_dim)) }?;
    // SAFETY: as above.
    let (v, v_region) = unsafe { input_rows(name!("args->tail.v"), &t.v, dims(shape.v.head_dim)) }?;
    let tail = Tail { k, v, n_rows, starts, lengths };
    Ok((Some(tail), [k_region, v_region, starts_region, lengths_region]))
}
