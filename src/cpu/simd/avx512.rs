//! AVX-512 with VNNI and VBMI, and AMX beside it where there is some. Here are the vectors of [`super::avx2`], with twice
//! the registers. Wider ones are in [`super::wide`], `attend::vnni`, `attend::fours` and `attend::weigh`, tiles in
//! `attend::tiles`.

use std::arch::x86_64::*;

use super::Simd;
use super::amx::Tiles;
use super::avx2::Avx2;

/// Proof that the CPU has what [`Avx2`] needs and AVX-512 F, BW, VL, VNNI and VBMI; tiles for those who brought them.
#[derive(Debug, Clone, Copy)]
pub struct Avx512<'a>(Avx2, pub Option<&'a Tiles>);

impl<'a> Avx512<'a> {
    pub fn new(tiles: Option<&'a Tiles>) -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vbmi");
        Avx2::new().filter(|_| all).map(|avx2| Self(avx2, tiles))
    }
}

impl Simd for Avx512<'_> {
    type F = __m256;
    type I = __m256i;
    type H = __m128i;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        self.0.splat(x)
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { self.0.load(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m256) {
        // SAFETY: the caller's promise.
        unsafe { self.0.store(p, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { self.0.load_f16(p) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        self.0.add(a, b)
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        self.0.sub(a, b)
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        self.0.mul(a, b)
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        self.0.div(a, b)
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        self.0.max(a, b)
    }
    #[inline(always)]
    fn keep_above(self, x: __m256, bound: __m256, y: __m256) -> __m256 {
        self.0.keep_above(x, bound, y)
    }
    #[inline(always)]
    fn to_float(self, x: __m256i) -> __m256 {
        self.0.to_float(x)
    }
    #[inline(always)]
    fn bits(self, x: __m256) -> __m256i {
        self.0.bits(x)
    }
    #[inline(always)]
    fn from_bits(self, x: __m256i) -> __m256 {
        self.0.from_bits(x)
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> __m256i {
        self.0.splat_i(x)
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { self.0.load_i(p) }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut i32, x: __m256i) {
        // SAFETY: the caller's promise.
        unsafe { self.0.store_i(p, x) }
    }
    #[inline(always)]
    fn add_i(self, a: __m256i, b: __m256i) -> __m256i {
        self.0.add_i(a, b)
    }
    #[inline(always)]
    fn and(self, a: __m256i, b: __m256i) -> __m256i {
        self.0.and(a, b)
    }
    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        self.0.or(a, b)
    }
    #[inline(always)]
    fn shl32<const N: i32>(self, x: __m256i) -> __m256i {
        self.0.shl32::<N>(x)
    }
    #[inline(always)]
    fn sar32<const N: i32>(self, x: __m256i) -> __m256i {
        self.0.sar32::<N>(x)
    }
    #[inline(always)]
    fn shl16<const N: i32>(self, x: __m256i) -> __m256i {
        self.0.shl16::<N>(x)
    }
    #[inline(always)]
    fn shr16<const N: i32>(self, x: __m256i) -> __m256i {
        self.0.shr16::<N>(x)
    }
    #[inline(always)]
    fn shr16_by(self, x: __m256i, n: usize) -> __m256i {
        self.0.shr16_by(x, n)
    }
    #[inline(always)]
    fn shr32_each(self, x: __m256i, n: __m256i) -> __m256i {
        self.0.shr32_each(x, n)
    }
    #[inline(always)]
    fn madd(self, sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        self.0.madd(sum, a, b)
    }
    #[inline(always)]
    fn table(self, bytes: &[u8; 16]) -> __m256i {
        self.0.table(bytes)
    }
    #[inline(always)]
    fn lookup(self, table: __m256i, index: __m256i) -> __m256i {
        self.0.lookup(table, index)
    }
    #[inline(always)]
    fn permute32(self, x: __m256i, index: __m256i) -> __m256i {
        self.0.permute32(x, index)
    }
    #[inline(always)]
    fn unpack_lo16(self, a: __m256i, b: __m256i) -> __m256i {
        self.0.unpack_lo16(a, b)
    }
    #[inline(always)]
    fn unpack_hi16(self, a: __m256i, b: __m256i) -> __m256i {
        self.0.unpack_hi16(a, b)
    }
    #[inline(always)]
    fn unpack_lo32(self, a: __m256i, b: __m256i) -> __m256i {
        self.0.unpack_lo32(a, b)
    }
    #[inline(always)]
    fn unpack_hi32(self, a: __m256i, b: __m256i) -> __m256i {
        self.0.unpack_hi32(a, b)
    }
    #[inline(always)]
    fn unpack_lo64(self, a: __m256i, b: __m256i) -> __m256i {
        self.0.unpack_lo64(a, b)
    }
    #[inline(always)]
    fn unpack_hi64(self, a: __m256i, b: __m256i) -> __m256i {
        self.0.unpack_hi64(a, b)
    }
    #[inline(always)]
    unsafe fn load_h<const BYTES: usize>(self, p: *const u8) -> __m128i {
        // SAFETY: the caller's promise.
        unsafe { self.0.load_h::<BYTES>(p) }
    }
    #[inline(always)]
    fn join(self, lo: __m128i, hi: __m128i) -> __m256i {
        self.0.join(lo, hi)
    }
    #[inline(always)]
    fn interleave16(self, a: __m128i, b: __m128i) -> __m256i {
        self.0.interleave16(a, b)
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        self.0.prefetch(p)
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        self.0.prefetch_far(p)
    }
}
