//! Plain Rust, for every CPU; also what the other paths are compared with.

use half::f16;
use std::array::from_fn;

use super::Simd;

#[derive(Debug, Clone, Copy)]
pub struct Portable;

fn halves(x: i32) -> (i32, i32) {
    (x as i16 as i32, x >> 16)
}

/// `f` on each of the 16-bit halves.
#[inline(always)]
fn each16(x: [i32; 8], f: impl Fn(u16) -> u16) -> [i32; 8] {
    x.map(|x| (u32::from(f(x as u16)) | u32::from(f((x >> 16) as u16)) << 16) as i32)
}

impl Simd for Portable {
    type F = [f32; 8];
    type I = [i32; 8];
    type H = [u8; 16];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Self::F) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|h| f16::from_bits(h).to_f32_const())
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn keep_above(self, x: Self::F, bound: Self::F, y: Self::F) -> Self::F {
        from_fn(|i| if x[i] <= bound[i] { 0.0 } else { y[i] })
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::F {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    fn bits(self, x: Self::F) -> Self::I {
        x.map(|x| x.to_bits() as i32)
    }
    #[inline(always)]
    fn from_bits(self, x: Self::I) -> Self::F {
        x.map(|x| f32::from_bits(x as u32))
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> Self::I {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[i32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut i32, x: Self::I) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[i32; 8]>().write_unaligned(x) }
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn shl32<const N: i32>(self, x: Self::I) -> Self::I {
        x.map(|x| x << N)
    }
    #[inline(always)]
    fn sar32<const N: i32>(self, x: Self::I) -> Self::I {
        x.map(|x| x >> N)
    }
    #[inline(always)]
    fn shl16<const N: i32>(self, x: Self::I) -> Self::I {
        each16(x, |x| x << N)
    }
    #[inline(always)]
    fn shr16<const N: i32>(self, x: Self::I) -> Self::I {
        each16(x, |x| x >> N)
    }
    #[inline(always)]
    fn shr16_by(self, x: Self::I, n: usize) -> Self::I {
        each16(x, |x| x >> n)
    }
    #[inline(always)]
    fn shr32_each(self, x: Self::I, n: Self::I) -> Self::I {
        from_fn(|i| (x[i] as u32).checked_shr(n[i] as u32).unwrap_or(0) as i32)
    }
    #[inline(always)]
    fn madd(self, sum: Self::I, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| {
            let ((a0, a1), (b0, b1)) = (halves(a[i]), halves(b[i]));
            sum[i].wrapping_add((a0 * b0).wrapping_add(a1 * b1))
        })
    }
    #[inline(always)]
    fn table(self, bytes: &[u8; 16]) -> Self::I {
        self.join(*bytes, *bytes)
    }
    #[inline(always)]
    fn lookup(self, table: Self::I, index: Self::I) -> Self::I {
        index.map(|x| {
            let byte = |b: u8| table[usize::from(b & 15) / 4].to_le_bytes()[usize::from(b) % 4];
            i32::from_le_bytes(x.to_le_bytes().map(byte))
        })
    }
    #[inline(always)]
    fn permute32(self, x: Self::I, index: Self::I) -> Self::I {
        index.map(|i| x[i as usize % 8])
    }
    #[inline(always)]
    fn unpack_lo16(self, a: Self::I, b: Self::I) -> Self::I {
        let low = |i: usize| from_fn::<_, 4, _>(|w| {
            let shift = 16 * (w % 2);
            (a[i + w / 2] >> shift & 0xffff) | (b[i + w / 2] >> shift) << 16
        });
        let (x, y) = (low(0), low(4));
        from_fn(|i| if i < 4 { x[i] } else { y[i - 4] })
    }
    #[inline(always)]
    fn unpack_hi16(self, a: Self::I, b: Self::I) -> Self::I {
        let up = |x: [i32; 8]| [x[2], x[3], x[0], x[1], x[6], x[7], x[4], x[5]];
        self.unpack_lo16(up(a), up(b))
    }
    #[inline(always)]
    fn unpack_lo32(self, a: Self::I, b: Self::I) -> Self::I {
        [a[0], b[0], a[1], b[1], a[4], b[4], a[5], b[5]]
    }
    #[inline(always)]
    fn unpack_hi32(self, a: Self::I, b: Self::I) -> Self::I {
        [a[2], b[2], a[3], b[3], a[6], b[6], a[7], b[7]]
    }
    #[inline(always)]
    fn unpack_lo64(self, a: Self::I, b: Self::I) -> Self::I {
        [a[0], a[1], b[0], b[1], a[4], a[5], b[4], b[5]]
    }
    #[inline(always)]
    fn unpack_hi64(self, a: Self::I, b: Self::I) -> Self::I {
        [a[2], a[3], b[2], b[3], a[6], a[7], b[6], b[7]]
    }

    #[inline(always)]
    unsafe fn load_h<const BYTES: usize>(self, p: *const u8) -> Self::H {
        let mut out = [0; 16];
        // SAFETY: the caller's promise; BYTES is at most 16.
        out[..BYTES].copy_from_slice(unsafe { std::slice::from_raw_parts(p, BYTES) });
        out
    }
    #[inline(always)]
    fn join(self, lo: Self::H, hi: Self::H) -> Self::I {
        let word = |h: &[u8; 16], i: usize| i32::from_le_bytes([h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3]]);
        from_fn(|i| if i < 4 { word(&lo, i) } else { word(&hi, i - 4) })
    }
    #[inline(always)]
    fn interleave16(self, a: Self::H, b: Self::H) -> Self::I {
        from_fn(|i| i32::from_le_bytes([a[2 * i], a[2 * i + 1], b[2 * i], b[2 * i + 1]]))
    }

    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
    #[inline(always)]
    fn prefetch_far(self, _p: *const u8) {}
}
