//! Queries into the coded space, outputs out of it: the only places where the small factor is touched.

use half::f16;

use super::engine::Engine;
use super::lanes::{NO_CHANNEL, SideLanes};
use crate::cpu::simd::{LANES, Simd};
use crate::factor::{FactorSet, HeadSets, Transform, hadamard};
use crate::shape::MAX_DIM;

/// The linear part of a set, `None` for the rotation; also of a set that does not exist, which only a record that was
/// never written can name.
pub fn matrix(set: Option<&FactorSet>) -> Option<&[f16]> {
    match set.map(|set| &*set.transform) {
        Some(Transform::Dense { decode }) => Some(decode),
        _ => None,
    }
}

/// Tells transforms apart: sets that share one have equal keys.
pub fn key(sets: &HeadSets, id: u8) -> usize {
    matrix(sets.get(id)).map_or(0, |m| m.as_ptr().addr())
}

/// Adding and subtracting it rounds to an integer, which then stands in the low bits.
pub const ROUND: f32 = 12_582_912.0;

/// Largest magnitude of folded queries and of weights: its upper byte, the lower one being signed, fits a signed byte.
pub const LARGEST: f32 = 32639.0;

/// Rows that pass over the matrix together.
pub const BLOCK: usize = 4;
/// Channels of the matrix that are taken at a time, and f16 in a cache line.
const CHANNELS: usize = 8;
const LINE_HALVES: usize = 32;

/// Where folded queries go: 16 bits a channel, `[row][head_dim / 2]`, and per row the start of its sums and the worth of a step.
#[derive(Clone, Copy)]
pub struct Folded {
    pub words: *mut i32,
    pub start: *mut i32,
    pub step: *mut f32,
}

/// `q' = decode^T q`, rounded to 16 bits against each row's largest. Steps carry `scale`.
///
/// # Safety
/// `q` holds `rows * head_dim` floats, `out` what it says; `order` is the side's key order.
#[inline(always)]
pub unsafe fn fold<S: Engine>(
    s: S,
    lanes: &SideLanes,
    matrix: Option<&[f16]>,
    q: *const f32,
    rows: usize,
    order: &[u16],
    scale: f32,
    out: Folded,
) {
    let d = lanes.head_dim;
    let mut folded = [[0.0f32; MAX_DIM]; BLOCK];
    for first in (0..rows).step_by(BLOCK) {
        let block = BLOCK.min(rows - first);
        // SAFETY: rows below `rows`; pointers are the caller's promise.
        unsafe {
            match matrix {
                None => {
                    for (r, y) in folded[..block].iter_mut().enumerate() {
                        std::ptr::copy_nonoverlapping(q.add((first + r) * d), y.as_mut_ptr(), d);
                        hadamard::rotate(&mut y[..d]);
                    }
                }
                Some(decode) => {
                    // Rows beyond the last repeat it.
                    let q: [*const f32; BLOCK] = std::array::from_fn(|r| q.add((first + r.min(block - 1)) * d));
                    fold_dense(s, decode, d, q, &mut folded);
                }
            }
            for (r, y) in folded[..block].iter_mut().enumerate() {
                quantise(s, lanes, y, order, scale, first + r, out);
            }
        }
    }
}

/// `y[r][j] = sum over i of q[r][i] * decode[i][j]`. In generation the matrix does not come out of a near cache: it is read
/// once, front to back, and the next channels are asked for early.
///
/// # Safety
/// Every row of `q` holds `d` floats, a multiple of 16.
#[inline(always)]
pub unsafe fn fold_dense<S: Simd>(s: S, decode: &[f16], d: usize, q: [*const f32; BLOCK], y: &mut [[f32; MAX_DIM]; BLOCK]) {
    assert!(decode.len() == d * d && d <= MAX_DIM && d.is_multiple_of(16));
    y.iter_mut().for_each(|y| y[..d].fill(0.0));
    for (block, matrix) in decode.chunks_exact(CHANNELS * d).enumerate() {
        let mut next = matrix.as_ptr_range().end;
        for j in (0..d).step_by(S::WIDTH) {
            // In all as many lines as these channels have.
            for line in 0..CHANNELS * S::WIDTH / LINE_HALVES {
                s.prefetch(next.wrapping_add(line * LINE_HALVES).cast());
            }
            next = next.wrapping_add(CHANNELS * S::WIDTH);
            // SAFETY: `j + WIDTH <= d <= MAX_DIM`, and there are `CHANNELS` rows of `d`; rows of `q` hold `d`.
            unsafe {
                let mut sums = [s.splat_wide(0.0); BLOCK];
                for r in 0..BLOCK {
                    sums[r] = s.load_wide(y[r].as_ptr().add(j));
                }
                for i in 0..CHANNELS {
                    let m = s.load_wide_f16(matrix.as_ptr().add(i * d + j).cast());
                    for r in 0..BLOCK {
                        let x = s.splat_wide(q[r].add(block * CHANNELS + i).read());
                        sums[r] = s.add_wide(sums[r], s.mul_wide(x, m));
                    }
                }
                for r in 0..BLOCK {
                    s.store_wide(y[r].as_mut_ptr().add(j), sums[r]);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn quantise<S: Engine>(
    s: S,
    lanes: &SideLanes,
    y: &mut [f32; MAX_DIM],
    order: &[u16],
    scale: f32,
    row: usize,
    out: Folded,
) {
    let d = lanes.head_dim;
    for tier in lanes.tiers() {
        for y in &mut y[tier.first..tier.first + tier.channels] {
            *y *= tier.unit;
        }
    }
    let mut largest = s.splat(0.0);
    let sign = s.splat_i(i32::MAX);
    for j in (0..d).step_by(LANES) {
        // SAFETY: `d` is a multiple of 8, at most MAX_DIM.
        let x = unsafe { s.load(y.as_ptr().add(j)) };
        largest = s.max(s.from_bits(s.and(s.bits(x), sign)), largest);
    }
    let largest = s.max_lanes(largest);
    let inverse = if largest > 1e-30 { LARGEST / largest } else { 0.0 };
    let mut levels = [0i32; MAX_DIM];
    for j in (0..d).step_by(LANES) {
        // SAFETY: as above.
        unsafe {
            let x = s.add(s.mul(s.load(y.as_ptr().add(j)), s.splat(inverse)), s.splat(ROUND));
            s.store_i(levels.as_mut_ptr().add(j), s.add_i(s.bits(x), s.splat_i(-(ROUND.to_bits() as i32))));
        }
    }
    let mut start = 0i32;
    for tier in lanes.tiers() {
        let sum: i32 = levels[tier.first..tier.first + tier.channels].iter().fold(0, |a, x| a.wrapping_add(*x));
        start = start.wrapping_sub(sum.wrapping_mul(tier.offset));
    }
    // SAFETY: one row of each.
    unsafe {
        s.put_query(&levels, &order[..d], out.words.add(row * (d / 2)));
        out.start.add(row).write(start);
        out.step.add(row).write(largest / LARGEST * scale);
    }
}

/// Adds `decode y` to the rows of `out`, `[row][out_stride]`; `y` are the lanes of `acc`, `[row][lanes]`, in the side's
/// value order.
///
/// # Safety
/// `acc` and `out` hold `rows` rows.
#[inline(always)]
pub unsafe fn unfold<S: Simd>(
    s: S,
    lanes: &SideLanes,
    matrix: Option<&[f16]>,
    acc: *const f32,
    rows: usize,
    order: &[u16],
    out: *mut f32,
    out_stride: usize,
) {
    let d = lanes.head_dim;
    let mut coded = [[0.0f32; MAX_DIM]; BLOCK];
    for first in (0..rows).step_by(BLOCK) {
        let block = BLOCK.min(rows - first);
        for (r, y) in coded[..block].iter_mut().enumerate() {
            for tier in lanes.tiers() {
                for lane in (tier.first_lane..tier.first_lane + tier.lanes).step_by(LANES) {
                    // SAFETY: eight lanes of a row below `rows`; tiers have whole vectors.
                    let x = unsafe { s.mul(s.load(acc.add((first + r) * lanes.lanes + lane)), s.splat(tier.unit)) };
                    put_channels(s, x, &order[lane..lane + LANES], y);
                }
            }
        }
        // SAFETY: rows below `rows`; `d` is a multiple of 8.
        unsafe {
            let out = out.add(first * out_stride);
            match matrix {
                None => {
                    for (r, y) in coded[..block].iter_mut().enumerate() {
                        hadamard::unrotate(&mut y[..d]);
                        for i in (0..d).step_by(LANES) {
                            let at = out.add(r * out_stride + i);
                            s.store(at, s.add(s.load(at), s.load(y.as_ptr().add(i))));
                        }
                    }
                }
                Some(decode) => unfold_dense(s, decode, d, &coded, block, out, out_stride),
            }
        }
    }
}

/// Puts lanes at their channels, those of [`NO_CHANNEL`] nowhere.
#[inline(always)]
fn put_channels<S: Simd>(s: S, x: S::F, order: &[u16], y: &mut [f32; MAX_DIM]) {
    let first = order[0];
    // Those that are unfolded by bytes lie as their channels do.
    let in_order = (0..LANES as u16).zip(order).fold(true, |all, (i, &c)| all & (c == first.wrapping_add(i)));
    if in_order && usize::from(first) + LANES <= MAX_DIM {
        // SAFETY: eight floats from `first` on.
        return unsafe { s.store(y.as_mut_ptr().add(usize::from(first)), x) };
    }
    let mut each = [0.0; LANES];
    // SAFETY: eight floats.
    unsafe { s.store(each.as_mut_ptr(), x) };
    for (x, &channel) in each.into_iter().zip(order) {
        if channel != NO_CHANNEL {
            y[usize::from(channel) % MAX_DIM] = x;
        }
    }
}

#[inline(always)]
unsafe fn unfold_dense<S: Simd>(
    s: S,
    decode: &[f16],
    d: usize,
    y: &[[f32; MAX_DIM]; BLOCK],
    block: usize,
    out: *mut f32,
    out_stride: usize,
) {
    assert!(decode.len() == d * d && d <= MAX_DIM);
    for i in 0..d {
        let mut sums = [s.splat(0.0); BLOCK];
        for j in (0..d).step_by(LANES) {
            // SAFETY: `i < d`, `j + 8 <= d`, the matrix is d * d by the assertion.
            unsafe {
                let m = s.load_f16(decode.as_ptr().add(i * d + j).cast());
                for (sum, y) in sums.iter_mut().zip(y) {
                    *sum = s.add(*sum, s.mul(m, s.load(y.as_ptr().add(j))));
                }
            }
        }
        for (r, sum) in sums.into_iter().enumerate().take(block) {
            // SAFETY: a row below `block`.
            unsafe { *out.add(r * out_stride + i) += s.sum_lanes(sum) };
        }
    }
}
