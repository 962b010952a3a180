//! One row of scores: mask, softmax, weights. All of it in units of log2.

use super::fold::{LARGEST, ROUND};
use crate::cpu::simd::{LANES, Simd};

/// `2^x` for `x <= 0`, relative error 4e-6; 0 below -126 and for minus infinity; NaN for NaN, so that a
/// NaN in a query or its mask reaches that query's result.
///
/// A polynomial of degree 4 through the Chebyshev points of [-1/2, 1/2], then the whole part into the exponent.
#[inline(always)]
pub fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    let round = s.splat(ROUND);
    let shifted = s.add(x, round);
    let f = s.sub(x, s.sub(shifted, round));
    let mut p = s.splat(0.009_666_368_5);
    for c in [0.055_921_976, 0.240_223_49, 0.693_121_05, 1.0] {
        p = s.add(s.mul(p, f), s.splat(c));
    }
    let p = s.from_bits(s.add_i(s.bits(p), s.shl32::<23>(s.bits(shifted))));
    s.keep_above(x, s.splat(-126.0), p)
}

#[inline(always)]
pub fn sum_lanes<S: Simd>(s: S, x: S::F) -> f32 {
    let mut l = [0.0; LANES];
    // SAFETY: eight floats.
    unsafe { s.store(l.as_mut_ptr(), x) };
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

#[inline(always)]
pub fn max_lanes<S: Simd>(s: S, x: S::F) -> f32 {
    let mut l = [0.0; LANES];
    // SAFETY: eight floats.
    unsafe { s.store(l.as_mut_ptr(), x) };
    let max = |a: f32, b: f32| if a > b { a } else { b };
    max(max(max(l[0], l[4]), max(l[2], l[6])), max(max(l[1], l[5]), max(l[3], l[7])))
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
    max_lanes(s, largest)
}

/// `x = 2^(x - largest)`; returns the sum.
///
/// # Safety
/// `x` holds `n` floats, a multiple of 8.
#[inline(always)]
pub unsafe fn exponentials<S: Simd>(s: S, x: *mut f32, n: usize, largest: f32) -> f32 {
    let (mut sum, largest) = (s.splat(0.0), s.splat(largest));
    for at in (0..n).step_by(LANES) {
        // SAFETY: within `n`.
        unsafe {
            let p = exp2(s, s.sub(s.load(x.add(at)), largest));
            s.store(x.add(at), p);
            sum = s.add(sum, p);
        }
    }
    sum_lanes(s, sum)
}

/// Weights `p * scale` as 16-bit integers against the largest. Returns the worth of a step and the sum of the integers.
///
/// # Safety
/// `p` and `scale` hold `n` floats, `out` `n` integers; `n` is a multiple of 8.
#[inline(always)]
pub unsafe fn weights<S: Simd>(s: S, p: *const f32, scale: *const f32, n: usize, out: *mut i16) -> (f32, i32) {
    let mut largest = s.splat(0.0);
    for at in (0..n).step_by(LANES) {
        // SAFETY: within `n`.
        largest = s.max(unsafe { s.mul(s.load(p.add(at)), s.load(scale.add(at))) }, largest);
    }
    let largest = max_lanes(s, largest);
    // Weights this small add nothing, and their inverse may overflow.
    let (inverse, step) = if largest > 1e-30 { (LARGEST / largest, largest / LARGEST) } else { (0.0, 0.0) };
    let (inverse, round, back) = (s.splat(inverse), s.splat(ROUND), s.splat_i(-(ROUND.to_bits() as i32)));
    let mut sum = s.splat_i(0);
    for at in (0..n).step_by(LANES) {
        // SAFETY: within `n`.
        unsafe {
            let w = s.mul(s.mul(s.load(p.add(at)), s.load(scale.add(at))), inverse);
            let w = s.add_i(s.bits(s.add(w, round)), back);
            sum = s.add_i(sum, w);
            s.store_i16(out.add(at), w);
        }
    }
    let mut l = [0; LANES];
    // SAFETY: eight integers.
    unsafe { s.store_i(l.as_mut_ptr(), sum) };
    (step, l.iter().fold(0, |a, x| a.wrapping_add(*x)))
}
