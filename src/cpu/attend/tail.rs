//! One work item on a sequence's tail: rows in f32, f16 or bf16 that are not coded (yet). In f32 throughout; the result
//! is a partial like that of a chunk of coded keys.
//!
//! Tails are short: a chunk of a prompt at most. A row is widened once for all rows of the block.

use std::mem::MaybeUninit;

use super::item::Item;
use super::row;
use super::{MAX_ROWS, MAX_TILE};
use crate::batch::Sequence;
use crate::cpu::simd::{LANES, Simd};
use crate::view::Tail;

/// What an item works on. Of `item`, queries, result and what says who sees what; not its keys.
pub struct TailItem<'a> {
    pub tail: &'a Tail<'a>,
    pub sequence: &'a Sequence,
    pub head: usize,
    pub item: &'a Item<'a>,
}

const WIDEST: usize = 256;

/// Everything that lives on the stack.
#[repr(C, align(64))]
pub struct TailScratch {
    row: [f32; WIDEST],
    /// `[row][MAX_TILE]`: scores, then probabilities.
    scores: [f32; MAX_ROWS * MAX_TILE],
    /// `[query][MAX_TILE]`, in units of log2.
    mask: [f32; MAX_ROWS * MAX_TILE],
    largest: [f32; MAX_ROWS],
    sums: [f32; MAX_ROWS],
}

/// # Safety
/// `item.item` describes a mask that covers the sequence's keys and tail, and room for the result; the tail's tensors
/// hold the sequence's rows; `q` holds the queries of its rows.
#[inline(always)]
pub unsafe fn run<S: Simd>(s: S, work: &TailItem<'_>, q: *const f32, scratch: &mut MaybeUninit<TailScratch>) {
    let item = work.item;
    // SAFETY: floats of any bits are written before they are read, but Rust wants a value: 50 KB of zeros are nothing
    // beside a tile.
    let x = unsafe {
        scratch.as_mut_ptr().write_bytes(0, 1);
        scratch.assume_init_mut()
    };
    x.largest.fill(f32::MIN);
    for r in 0..item.rows {
        // SAFETY: the result has room for the item's rows.
        unsafe { std::slice::from_raw_parts_mut(item.out.add(r * item.out_stride), item.v.head_dim).fill(0.0) };
    }
    let n_tail = work.sequence.n_tail;
    for first in (0..n_tail).step_by(MAX_TILE) {
        // SAFETY: the caller's promise.
        unsafe { tile(s, work, q, x, first, MAX_TILE.min(n_tail - first)) };
    }
    for r in 0..item.rows {
        // SAFETY: as above.
        unsafe {
            item.stats.add(2 * r * item.stats_stride).write(x.largest[r]);
            item.stats.add(2 * r * item.stats_stride + 1).write(x.sums[r]);
        }
    }
}

/// Rows `first..first + n` of the tail.
#[inline(always)]
unsafe fn tile<S: Simd>(s: S, work: &TailItem<'_>, q: *const f32, x: &mut TailScratch, first: usize, n: usize) {
    let (item, sequence) = (work.item, work.sequence);
    let log2 = std::f32::consts::LOG2_E;
    let (d_k, d_v) = (item.k.head_dim, item.v.head_dim);
    let first_query = item.first_row / item.group;
    let queries = (item.first_row + item.rows).div_ceil(item.group) - first_query;
    mask(item, first_query, queries, sequence.n_kv + first, n, &mut x.mask);
    let query_of = |r: usize| (item.first_row + r) / item.group - first_query;

    // Scores. A row that a query does not see is not looked at for it: it may hold anything, NaN included.
    let factor = if item.softcap > 0.0 { item.scale / item.softcap } else { item.scale * log2 };
    for key in 0..n {
        if (0..queries).all(|query| x.mask[query * MAX_TILE + key] == f32::NEG_INFINITY) {
            continue;
        }
        let k = &mut x.row[..d_k];
        work.tail.k.load(sequence.first_tail + first + key, work.head, k);
        for r in 0..item.rows {
            if x.mask[query_of(r) * MAX_TILE + key] == f32::NEG_INFINITY {
                continue;
            }
            // SAFETY: the queries hold the item's rows; head_dim is a multiple of 16.
            x.scores[r * MAX_TILE + key] = factor * unsafe { dot(s, q.add(r * d_k), k.as_ptr(), d_k) };
        }
    }

    // Online softmax.
    let padded = n.next_multiple_of(LANES);
    for r in 0..item.rows {
        let scores = &mut x.scores[r * MAX_TILE..][..MAX_TILE];
        let mask = &x.mask[query_of(r) * MAX_TILE..][..MAX_TILE];
        // SAFETY: both hold MAX_TILE floats.
        let (largest, sum) = unsafe {
            if item.softcap > 0.0 {
                row::soft_cap(s, scores.as_mut_ptr(), padded, item.softcap * log2);
            }
            for (score, &mask) in scores[..padded].iter_mut().zip(mask) {
                *score = if mask == f32::NEG_INFINITY { mask } else { *score + mask };
            }
            let largest = row::mask_and_max(s, scores.as_mut_ptr(), None, padded, x.largest[r]);
            (largest, row::exponentials(s, scores.as_mut_ptr(), padded, largest))
        };
        let mut keep = [0.0; LANES];
        // SAFETY: eight lanes; the result has room for the item's rows.
        unsafe {
            s.store(keep.as_mut_ptr(), row::exp2(s, s.splat(x.largest[r] - largest)));
            if largest > x.largest[r] {
                let out = std::slice::from_raw_parts_mut(item.out.add(r * item.out_stride), d_v);
                out.iter_mut().for_each(|o| *o *= keep[0]);
                x.sums[r] *= keep[0];
            }
        }
        x.largest[r] = largest;
        x.sums[r] += sum;
    }

    // Outputs.
    for key in 0..n {
        // NaN is not zero: it came from a query, its mask or a row that it sees.
        if (0..item.rows).all(|r| x.scores[r * MAX_TILE + key] == 0.0) {
            continue;
        }
        let v = &mut x.row[..d_v];
        work.tail.v.load(sequence.first_tail + first + key, work.head, v);
        for r in 0..item.rows {
            let p = x.scores[r * MAX_TILE + key];
            if p != 0.0 {
                // SAFETY: the result has room for the item's rows; head_dim is a multiple of 16.
                unsafe { add_scaled(s, p, v.as_ptr(), item.out.add(r * item.out_stride), d_v) };
            }
        }
    }
}

/// Mask values `[query][MAX_TILE]` in units of log2, hidden beyond `n`; `first` counts coded keys, too.
#[inline(always)]
fn mask(item: &Item<'_>, first_query: usize, queries: usize, first: usize, n: usize, out: &mut [f32]) {
    for query in 0..queries {
        let row = &mut out[query * MAX_TILE..][..MAX_TILE];
        row.fill(f32::NEG_INFINITY);
        match &item.mask {
            Some(mask) => {
                mask.load(item.stream, first_query + query, first, &mut row[..n]);
                row[..n].iter_mut().for_each(|m| *m *= std::f32::consts::LOG2_E);
            }
            None => {
                let keys = item.sight.keys(first_query + query);
                let at = |key: usize| key.clamp(first, first + n) - first;
                row[at(keys.start)..at(keys.end)].fill(0.0);
            }
        }
    }
}

/// # Safety
/// `n` floats, a multiple of 16, are readable at both.
#[inline(always)]
unsafe fn dot<S: Simd>(s: S, a: *const f32, b: *const f32, n: usize) -> f32 {
    let mut sums = [s.splat(0.0); 2];
    for at in (0..n).step_by(2 * LANES) {
        for (half, sum) in sums.iter_mut().enumerate() {
            // SAFETY: within `n`.
            *sum = unsafe { s.add(*sum, s.mul(s.load(a.add(at + half * LANES)), s.load(b.add(at + half * LANES)))) };
        }
    }
    s.sum_lanes(s.add(sums[0], sums[1]))
}

/// # Safety
/// `n` floats, a multiple of 8, are readable at `v` and writable at `out`.
#[inline(always)]
unsafe fn add_scaled<S: Simd>(s: S, p: f32, v: *const f32, out: *mut f32, n: usize) {
    let p = s.splat(p);
    for at in (0..n).step_by(LANES) {
        // SAFETY: within `n`.
        unsafe { s.store(out.add(at), s.add(s.load(out.add(at)), s.mul(p, s.load(v.add(at))))) };
    }
}
