//! Several vectors of f32 as one: for sums whose order is that of sixteen lanes, written out so that no compiler has to find
//! the vectors, and for loops that look up one constant for all of them.

use super::{LANES, Simd};

/// Lanes of two.
pub const PAIR: usize = 2 * LANES;

/// `N` vectors.
type V<S, const N: usize> = [<S as Simd>::F; N];

/// Operations on `N` vectors, on each of them.
#[derive(Debug, Clone, Copy)]
pub struct Vectors<S, const N: usize>(pub S);

impl<S: Simd, const N: usize> Vectors<S, N> {
    #[inline(always)]
    pub fn splat(self, x: f32) -> V<S, N> {
        [self.0.splat(x); N]
    }

    /// The first floats of `x`.
    #[inline(always)]
    pub fn load(self, x: &[f32]) -> V<S, N> {
        assert!(x.len() >= N * LANES);
        let mut out = self.splat(0.0);
        for n in 0..N {
            // SAFETY: `n` is below `N`, and there are as many vectors.
            out[n] = unsafe { self.0.load(x.as_ptr().add(n * LANES)) };
        }
        out
    }

    /// The first floats of `out`.
    #[inline(always)]
    pub fn store(self, x: V<S, N>, out: &mut [f32]) {
        assert!(out.len() >= N * LANES);
        for n in 0..N {
            // SAFETY: `n` is below `N`, and there are as many vectors.
            unsafe { self.0.store(out.as_mut_ptr().add(n * LANES), x[n]) };
        }
    }

    #[inline(always)]
    pub fn add(self, mut a: V<S, N>, b: V<S, N>) -> V<S, N> {
        for n in 0..N {
            a[n] = self.0.add(a[n], b[n]);
        }
        a
    }

    #[inline(always)]
    pub fn sub(self, mut a: V<S, N>, b: V<S, N>) -> V<S, N> {
        for n in 0..N {
            a[n] = self.0.sub(a[n], b[n]);
        }
        a
    }

    #[inline(always)]
    pub fn mul(self, mut a: V<S, N>, b: V<S, N>) -> V<S, N> {
        for n in 0..N {
            a[n] = self.0.mul(a[n], b[n]);
        }
        a
    }

    /// The magnitude of each lane, 0 for NaN.
    #[inline(always)]
    pub fn magnitude(self, mut x: V<S, N>) -> V<S, N> {
        let s = self.0;
        let (keep, zero) = (s.splat_i(i32::MAX), s.splat(0.0));
        for n in 0..N {
            x[n] = s.max(s.from_bits(s.and(s.bits(x[n]), keep)), zero);
        }
        x
    }

    /// A magnitude with the sign of `x`.
    #[inline(always)]
    pub fn signed(self, mut magnitude: V<S, N>, x: V<S, N>) -> V<S, N> {
        let (s, sign) = (self.0, self.0.splat_i(i32::MIN));
        for n in 0..N {
            magnitude[n] = s.from_bits(s.or(s.bits(magnitude[n]), s.and(s.bits(x[n]), sign)));
        }
        magnitude
    }

    /// `sum + step` where `x` is above the edge, else `sum`.
    #[inline(always)]
    pub fn add_above(self, mut sum: V<S, N>, x: V<S, N>, edge: f32, step: f32) -> V<S, N> {
        let (s, edge, step) = (self.0, self.0.splat(edge), self.0.splat(step));
        for n in 0..N {
            sum[n] = s.add(sum[n], s.keep_above(x[n], edge, step));
        }
        sum
    }
}

impl<S: Simd> Vectors<S, 2> {
    /// Sum of all lanes: the upper half onto the lower one until one is left.
    #[inline(always)]
    pub fn sum(self, x: V<S, 2>) -> f32 {
        self.0.sum_lanes(self.0.add(x[0], x[1]))
    }
}
