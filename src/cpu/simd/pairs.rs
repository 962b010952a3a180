//! Sixteen lanes of f32 as two vectors: for sums whose order is that of sixteen, written out so that no compiler has to
//! find the vectors.

use super::{LANES, Simd, sum_lanes};

/// Lanes of a pair.
pub const PAIR: usize = 2 * LANES;

/// Two vectors.
type V<S> = [<S as Simd>::F; 2];

/// Operations on pairs, each on both vectors.
#[derive(Debug, Clone, Copy)]
pub struct Pairs<S>(pub S);

impl<S: Simd> Pairs<S> {
    #[inline(always)]
    pub fn splat(self, x: f32) -> V<S> {
        [self.0.splat(x); 2]
    }

    #[inline(always)]
    pub fn load(self, x: &[f32; PAIR]) -> V<S> {
        // SAFETY: sixteen floats.
        unsafe { [self.0.load(x.as_ptr()), self.0.load(x.as_ptr().add(LANES))] }
    }

    #[inline(always)]
    pub fn store(self, x: V<S>, out: &mut [f32; PAIR]) {
        // SAFETY: sixteen floats.
        unsafe {
            self.0.store(out.as_mut_ptr(), x[0]);
            self.0.store(out.as_mut_ptr().add(LANES), x[1]);
        }
    }

    #[inline(always)]
    pub fn add(self, a: V<S>, b: V<S>) -> V<S> {
        [self.0.add(a[0], b[0]), self.0.add(a[1], b[1])]
    }

    #[inline(always)]
    pub fn sub(self, a: V<S>, b: V<S>) -> V<S> {
        [self.0.sub(a[0], b[0]), self.0.sub(a[1], b[1])]
    }

    #[inline(always)]
    pub fn mul(self, a: V<S>, b: V<S>) -> V<S> {
        [self.0.mul(a[0], b[0]), self.0.mul(a[1], b[1])]
    }

    /// The magnitude of each lane, 0 for NaN.
    #[inline(always)]
    pub fn magnitude(self, x: V<S>) -> V<S> {
        let s = self.0;
        let (keep, zero) = (s.splat_i(i32::MAX), s.splat(0.0));
        [s.max(s.from_bits(s.and(s.bits(x[0]), keep)), zero), s.max(s.from_bits(s.and(s.bits(x[1]), keep)), zero)]
    }

    /// A magnitude with the sign of `x`.
    #[inline(always)]
    pub fn signed(self, magnitude: V<S>, x: V<S>) -> V<S> {
        let (s, sign) = (self.0, self.0.splat_i(i32::MIN));
        [
            s.from_bits(s.or(s.bits(magnitude[0]), s.and(s.bits(x[0]), sign))),
            s.from_bits(s.or(s.bits(magnitude[1]), s.and(s.bits(x[1]), sign))),
        ]
    }

    /// `sum + step` where `x` is above the edge, else `sum`.
    #[inline(always)]
    pub fn add_above(self, sum: V<S>, x: V<S>, edge: f32, step: f32) -> V<S> {
        let (s, edge, step) = (self.0, self.0.splat(edge), self.0.splat(step));
        [s.add(sum[0], s.keep_above(x[0], edge, step)), s.add(sum[1], s.keep_above(x[1], edge, step))]
    }

    /// Sum of all lanes: the upper half onto the lower one until one is left.
    #[inline(always)]
    pub fn sum(self, x: V<S>) -> f32 {
        sum_lanes(self.0, self.0.add(x[0], x[1]))
    }
}
