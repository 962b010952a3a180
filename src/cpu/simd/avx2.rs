//! AVX2 with F16C.

use std::arch::x86_64::*;

use super::Simd;

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    pub fn new() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }
}

// SAFETY of all blocks below: a value of `Avx2` exists only where `new` found the instructions; pointers are the
// caller's promise.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type F = __m256;
    type I = __m256i;
    type H = __m128i;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m256) {
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn keep_above(self, x: __m256, bound: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(x, bound), y) }
    }
    #[inline(always)]
    fn to_float(self, x: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn bits(self, x: __m256) -> __m256i {
        unsafe { _mm256_castps_si256(x) }
    }
    #[inline(always)]
    fn from_bits(self, x: __m256i) -> __m256 {
        unsafe { _mm256_castsi256_ps(x) }
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> __m256i {
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut i32, x: __m256i) {
        unsafe { _mm256_storeu_si256(p.cast(), x) }
    }
    #[inline(always)]
    fn add_i(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    fn and(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    fn shl32<const N: i32>(self, x: __m256i) -> __m256i {
        unsafe { _mm256_slli_epi32::<N>(x) }
    }
    #[inline(always)]
    fn sar32<const N: i32>(self, x: __m256i) -> __m256i {
        unsafe { _mm256_srai_epi32::<N>(x) }
    }
    #[inline(always)]
    fn shl16<const N: i32>(self, x: __m256i) -> __m256i {
        unsafe { _mm256_slli_epi16::<N>(x) }
    }
    #[inline(always)]
    fn shr16<const N: i32>(self, x: __m256i) -> __m256i {
        unsafe { _mm256_srli_epi16::<N>(x) }
    }
    #[inline(always)]
    fn shr16_by(self, x: __m256i, n: usize) -> __m256i {
        unsafe { _mm256_srl_epi16(x, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn shr32_each(self, x: __m256i, n: __m256i) -> __m256i {
        unsafe { _mm256_srlv_epi32(x, n) }
    }
    #[inline(always)]
    fn madd(self, sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)) }
    }
    #[inline(always)]
    fn table(self, bytes: &[u8; 16]) -> __m256i {
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast())) }
    }
    #[inline(always)]
    fn lookup(self, table: __m256i, index: __m256i) -> __m256i {
        unsafe { _mm256_shuffle_epi8(table, index) }
    }
    #[inline(always)]
    fn permute32(self, x: __m256i, index: __m256i) -> __m256i {
        unsafe { _mm256_permutevar8x32_epi32(x, index) }
    }
    #[inline(always)]
    fn unpack_lo16(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_unpacklo_epi16(a, b) }
    }
    #[inline(always)]
    fn unpack_hi16(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_unpackhi_epi16(a, b) }
    }
    #[inline(always)]
    fn unpack_lo32(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_unpacklo_epi32(a, b) }
    }
    #[inline(always)]
    fn unpack_hi32(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_unpackhi_epi32(a, b) }
    }
    #[inline(always)]
    fn unpack_lo64(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_unpacklo_epi64(a, b) }
    }
    #[inline(always)]
    fn unpack_hi64(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_unpackhi_epi64(a, b) }
    }

    #[inline(always)]
    unsafe fn load_h<const BYTES: usize>(self, p: *const u8) -> __m128i {
        unsafe {
            match BYTES {
                4 => _mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()),
                8 => _mm_loadl_epi64(p.cast()),
                12 => _mm_insert_epi32::<2>(_mm_loadl_epi64(p.cast()), p.add(8).cast::<i32>().read_unaligned()),
                _ => _mm_loadu_si128(p.cast()),
            }
        }
    }
    #[inline(always)]
    fn join(self, lo: __m128i, hi: __m128i) -> __m256i {
        unsafe { _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(lo), hi) }
    }
    #[inline(always)]
    fn interleave16(self, a: __m128i, b: __m128i) -> __m256i {
        self.join(unsafe { _mm_unpacklo_epi16(a, b) }, unsafe { _mm_unpackhi_epi16(a, b) })
    }

    #[inline(always)]
    fn sum_lanes(self, x: __m256) -> f32 {
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn max_lanes(self, x: __m256) -> f32 {
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
