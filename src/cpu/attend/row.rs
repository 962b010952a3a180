//! One row of scores: mask, softmax, weights. All of it in units of log2.

use super::fold::{LARGEST, ROUND};
use crate::cpu::simd::{LANES, Simd};

/// Of the polynomial in [`exp2`], highest power first.
pub const EXP2: [f32; 5] = [0.009_666_368_5, 0.055_921_976, 0.240_223_49, 0.693_121_05, 1.0];

/// `2^x` for `x <= 0`, relative error 4e-6; 0 below -126 and for minus infinity; NaN for NaN, so that a
/// NaN in a query or its mask reaches that query's result.
///
/// A polynomial of degree 4 through the Chebyshev points of [-1/2, 1/2], then the whole part into the exponent.
#[inline(always)]
pub fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    let round = s.splat(ROUND);
    let shifted = s.add(x, round);
    let f = s.sub(x, s.sub(shifted, round));
    let mut p = s.splat(EXP2[0]);
    for c in &EXP2[1..] {
        p = s.add(s.mul(p, f), s.splat(*c));
    }
    let p = s.from_bits(s.add_i(s.bits(p), s.shl32::<23>(s.bits(shifted))));
    s.keep_above(x, s.splat(-126.0), p)
}

/// `x = softcap * tanh(x)`, back to units of log2 by `factor = softcap * log2(e)`; `x` comes divided by the cap.
///
/// # Safety
/// `x` holds `n` floats, a multiple of 8.
#[inline(always)]
pub unsafe fn soft_cap<S: Simd>(s: S, x: *mut f32, n: usize, factor: f32) {
    let (one, two) = (s.splat(1.0), s.splat(2.0));
    let sign = s.splat_i(i32::MIN);
    let to_log2 = s.splat(-2.0 * std::f32::consts::LOG2_E);
    for at in (0..n).step_by(LANES) {
        // SAFETY: within `n`.
        unsafe {
            // tanh |x| = 2 / (1 + e^(-2 |x|)) - 1, the sign put back.
            let v = s.load(x.add(at));
            let magnitude = s.from_bits(s.and(s.bits(v), s.splat_i(i32::MAX)));
            let e = exp2(s, s.mul(magnitude, to_log2));
            let t = s.sub(s.div(two, s.add(one, e)), one);
            let t = s.from_bits(s.or(s.bits(t), s.and(s.bits(v), sign)));
            s.store(x.add(at), s.mul(t, s.splat(factor)));
        }
    }
}

/// Adds the mask, if there is one, and returns the largest score, at least `floor`.
///
/// # Safety
/// `x` and `mask` hold `n` floats, a multiple of 8.
#[inline(always)]
pub unsafe fn mask_and_max<S: Simd>(s: S, x: *mut f32, mask: Option<*const f32>, n: usize, floor: f32) -> f32 {
    let mut largest = s.splat(floor);
    for at in (0..n).step_by(LANES) {
        // SAFETY: within `n`.
        unsafe {
            let mut v = s.load(x.add(at));
            if let Some(mask) = mask {
                v = s.add(v, s.load(mask.add(at)));
                s.store(x.add(at), v);
            }
            largest = s.max(v, largest);
        }
    }
    s.max_lanes(largest)
}

/// `x = 2^(x - largest)`; returns the sum, in sixteen lanes and then in eight.
///
/// # Safety
/// `x` holds `n` floats, a multiple of 8.
#[inline(always)]
pub unsafe fn exponentials<S: Simd>(s: S, x: *mut f32, n: usize, largest: f32) -> f32 {
    let (mut sums, largest) = ([s.splat(0.0); 2], s.splat(largest));
    for at in (0..n).step_by(LANES) {
        // SAFETY: within `n`.
        unsafe {
            let p = exp2(s, s.sub(s.load(x.add(at)), largest));
            s.store(x.add(at), p);
            let sum = &mut sums[at / LANES % 2];
            *sum = s.add(*sum, p);
        }
    }
    s.sum_lanes(s.add(sums[0], sums[1]))
}

/// Rows of scores that go through the softmax together: their sums depend on nothing but themselves and overlap.
pub const SOFTMAX_ROWS: usize = 4;

/// Scores of some rows and a tile of keys, in units of log2.
pub struct Softmax {
    /// `[row][stride]`, `n` of them; probabilities in their place at the end.
    pub scores: *mut f32,
    pub stride: usize,
    pub n: usize,
    /// What is added to each row.
    pub mask: [Option<*const f32>; SOFTMAX_ROWS],
    /// Largest score of the tiles before, and now.
    pub before: [f32; SOFTMAX_ROWS],
    pub largest: [f32; SOFTMAX_ROWS],
    /// What the growth leaves of earlier sums; stays where there is none.
    pub keep: [f32; SOFTMAX_ROWS],
    /// Sum of the probabilities.
    pub sum: [f32; SOFTMAX_ROWS],
}

/// Of `R` rows.
///
/// # Safety
/// As for [`super::engine::Engine::softmax`].
#[inline(always)]
pub unsafe fn softmax<S: Simd, const R: usize>(s: S, block: &mut Softmax) {
    // SAFETY: within `n` of the rows.
    unsafe {
        let (scores, stride) = (block.scores, block.stride);
        let mut most = [s.splat(0.0); R];
        for r in 0..R {
            most[r] = s.splat(block.before[r]);
        }
        for at in (0..block.n).step_by(LANES) {
            for r in 0..R {
                let mut x = s.load(scores.add(r * stride + at));
                if let Some(mask) = block.mask[r] {
                    x = s.add(x, s.load(mask.add(at)));
                    s.store(scores.add(r * stride + at), x);
                }
                most[r] = s.max(x, most[r]);
            }
        }
        for r in 0..R {
            let before = block.before[r];
            let largest = s.max_lanes(most[r]);
            block.largest[r] = largest;
            if largest > before {
                let mut keep = [0.0; LANES];
                s.store(keep.as_mut_ptr(), exp2(s, s.splat(before - largest)));
                block.keep[r] = keep[0];
            }
            most[r] = s.splat(largest);
        }
        // Sums in sixteen lanes and then in eight.
        let mut sums = [[s.splat(0.0); 2]; R];
        for at in (0..block.n).step_by(2 * LANES) {
            for r in 0..R {
                for half in 0..2 {
                    let x = scores.add(r * stride + at + half * LANES);
                    let p = exp2(s, s.sub(s.load(x), most[r]));
                    s.store(x, p);
                    sums[r][half] = s.add(sums[r][half], p);
                }
            }
        }
        for r in 0..R {
            block.sum[r] = s.sum_lanes(s.add(sums[r][0], sums[r][1]));
        }
    }
}

/// Weights `p * scale` of all rows as 16-bit integers against each row's largest.
#[derive(Clone, Copy)]
pub struct Weights {
    /// `[row][stride]`, `n` of them.
    pub p: *const f32,
    /// `[n]`.
    pub scale: *const f32,
    pub stride: usize,
    pub n: usize,
    pub rows: usize,
    /// `[row][stride]`, in pairs as [`super::expand::pair`] has them.
    pub out: *mut i16,
    /// Sum of a row's integers, and what a step is worth.
    pub sum: *mut i32,
    pub step: *mut f32,
}

/// Weights this small add nothing, and their inverse may overflow.
pub const LEAST_WEIGHT: f32 = 1e-30;

/// What a step is worth and its inverse.
#[inline(always)]
pub fn steps(largest: f32) -> (f32, f32) {
    if largest > LEAST_WEIGHT { (largest / LARGEST, LARGEST / largest) } else { (0.0, 0.0) }
}

/// Of `R` rows from row `row` on; returns how many.
///
/// # Safety
/// As for [`super::engine::Engine::weights`].
#[inline(always)]
pub unsafe fn weights<S: Simd, const R: usize>(s: S, w: Weights, row: usize) -> usize {
    // SAFETY: within `n` of the rows.
    unsafe {
        let (p, out) = (w.p.add(row * w.stride), w.out.add(row * w.stride));
        let mut most = [s.splat(0.0); R];
        for at in (0..w.n).step_by(LANES) {
            let scale = s.load(w.scale.add(at));
            for r in 0..R {
                most[r] = s.max(s.mul(s.load(p.add(r * w.stride + at)), scale), most[r]);
            }
        }
        let mut inverses = most;
        for r in 0..R {
            let (step, inverse) = steps(s.max_lanes(most[r]));
            w.step.add(row + r).write(step);
            inverses[r] = s.splat(inverse);
        }
        let (round, ones, lower) = (s.splat(ROUND), s.splat_i(0x0001_0001), s.splat_i(0xffff));
        let mut sums = [s.splat_i(0); R];
        for at in (0..w.n).step_by(2 * LANES) {
            let scale = [s.load(w.scale.add(at)), s.load(w.scale.add(at + LANES))];
            for r in 0..R {
                let mut integers = [lower; 2];
                for half in 0..2 {
                    // The integers stand in the low bits, and are not negative.
                    let x = s.mul(s.load(p.add(r * w.stride + at + half * LANES)), scale[half]);
                    integers[half] = s.bits(s.add(s.mul(x, inverses[r]), round));
                }
                let pairs = s.or(s.and(integers[0], lower), s.shl32::<16>(integers[1]));
                sums[r] = s.madd(sums[r], pairs, ones);
                s.store_i(out.add(r * w.stride + at).cast(), pairs);
            }
        }
        for r in 0..R {
            let mut l = [0; LANES];
            s.store_i(l.as_mut_ptr(), sums[r]);
            w.sum.add(row + r).write(l.iter().fold(0, |a, x| a.wrapping_add(*x)));
        }
    }
    R
}
