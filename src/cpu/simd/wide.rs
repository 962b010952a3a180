//! The widest vectors of f32 that an instruction set has, for loops whose lanes never meet: how many of them lie side by
//! side does not change their bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512};
use super::{LANES, Simd, portable::Portable};

pub trait Wide: Copy {
    type W: Copy;
    /// Lanes, at most 16.
    const WIDTH: usize;

    fn splat_wide(self, x: f32) -> Self::W;
    /// # Safety
    /// As many f32 are readable at `p`.
    unsafe fn load_wide(self, p: *const f32) -> Self::W;
    /// # Safety
    /// As many f16 are readable at `p`.
    unsafe fn load_wide_f16(self, p: *const u16) -> Self::W;
    /// # Safety
    /// As many f32 are writable at `p`.
    unsafe fn store_wide(self, p: *mut f32, x: Self::W);
    /// The first `n` lanes, 1 to as many as there are; what the others hold is not said.
    /// # Safety
    /// `n` f32 are readable at `p`.
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::W;
    /// # Safety
    /// `n` f32 are writable at `p`.
    unsafe fn store_first(self, p: *mut f32, n: usize, x: Self::W);
    fn add_wide(self, a: Self::W, b: Self::W) -> Self::W;
    fn mul_wide(self, a: Self::W, b: Self::W) -> Self::W;
}

/// The vectors of [`Simd`].
macro_rules! as_simd {
    () => {
        type W = <Self as Simd>::F;
        const WIDTH: usize = LANES;

        #[inline(always)]
        fn splat_wide(self, x: f32) -> Self::W {
            self.splat(x)
        }
        #[inline(always)]
        unsafe fn load_wide(self, p: *const f32) -> Self::W {
            // SAFETY: the caller's promise.
            unsafe { self.load(p) }
        }
        #[inline(always)]
        unsafe fn load_wide_f16(self, p: *const u16) -> Self::W {
            // SAFETY: the caller's promise.
            unsafe { self.load_f16(p) }
        }
        #[inline(always)]
        unsafe fn store_wide(self, p: *mut f32, x: Self::W) {
            // SAFETY: the caller's promise.
            unsafe { self.store(p, x) }
        }
        #[inline(always)]
        fn add_wide(self, a: Self::W, b: Self::W) -> Self::W {
            self.add(a, b)
        }
        #[inline(always)]
        fn mul_wide(self, a: Self::W, b: Self::W) -> Self::W {
            self.mul(a, b)
        }
    };
}

impl Wide for Portable {
    as_simd!();

    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::W {
        let mut out = [0.0; LANES];
        // SAFETY: the caller's promise.
        out[..n].copy_from_slice(unsafe { std::slice::from_raw_parts(p, n) });
        out
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize, x: Self::W) {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(p, n) }.copy_from_slice(&x[..n]);
    }
}

// SAFETY of all blocks below: values of `Avx2` and `Avx512` exist only where their `new` found the instructions; pointers
// are the caller's promise.

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
impl Wide for Avx2 {
    as_simd!();

    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> __m256 {
        unsafe { _mm256_maskload_ps(p, first(n)) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize, x: __m256) {
        unsafe { _mm256_maskstore_ps(p, first(n), x) }
    }
}

/// Ones in the first `n` lanes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn first(n: usize) -> __m256i {
    unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
impl Wide for Avx512<'_> {
    type W = __m512;
    const WIDTH: usize = 16;

    #[inline(always)]
    fn splat_wide(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_wide(self, p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_wide_f16(self, p: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_wide(self, p: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps((0xffff_u32 >> (16 - n)) as __mmask16, p) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize, x: __m512) {
        unsafe { _mm512_mask_storeu_ps(p, (0xffff_u32 >> (16 - n)) as __mmask16, x) }
    }
    #[inline(always)]
    fn add_wide(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn mul_wide(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
}
