//! Thin primitives of each instruction set. Algorithms are written once, over [`Simd`]; a value of an implementing type
//! is the proof that the CPU has the instructions, so that only loads and stores are unsafe.
//!
//! [`Simd`] works on eight lanes of 32 bits; [`wide`] on as many as there are, where lanes never meet. All paths work in
//! the same order and without fused multiply-adds, and so give the same bits.

#[cfg(target_arch = "x86_64")]
pub mod amx;
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
pub mod portable;
pub mod vectors;
pub mod wide;

/// Lanes of a vector.
pub const LANES: usize = 8;

/// Instruction sets with code paths of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// The same with AVX-512 BW, VL, VNNI and VBMI.
    Avx512,
    /// The same with AMX-INT8, where the system lets this process use it.
    Amx,
}

impl Isa {
    /// Whether this CPU can run it.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Avx2::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Avx512::new(None).is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512.available() && amx::Amx::new().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// All that this CPU can run.
    pub fn all() -> impl Iterator<Item = Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx].into_iter().filter(|isa| isa.available())
    }

    /// The best one, or the one that `DECOQUANT_SIMD` (portable, avx2, avx512, amx) names if the CPU has it. Looked up once.
    /// AMX has to be asked for, so that the others are not looked at where one of them is named.
    pub fn detect() -> Isa {
        static CHOICE: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        *CHOICE.get_or_init(|| {
            let named = match std::env::var("DECOQUANT_SIMD").as_deref() {
                Ok("portable") => Some(Isa::Portable),
                Ok("avx2") => Some(Isa::Avx2),
                Ok("avx512") => Some(Isa::Avx512),
                Ok("amx") => Some(Isa::Amx),
                _ => None,
            };
            named.filter(|isa| isa.available()).or_else(|| Isa::all().last()).unwrap_or(Isa::Portable)
        })
    }
}

/// Eight lanes of f32 ([`Simd::F`]), eight of i32 that also serve as sixteen i16 or 32 bytes ([`Simd::I`]), and half of
/// one ([`Simd::H`]).
///
/// Shuffles work within each half of a vector, as on x86.
pub trait Simd: wide::Wide {
    type F: Copy;
    type I: Copy;
    type H: Copy;

    fn splat(self, x: f32) -> Self::F;
    /// # Safety
    /// Eight f32 are readable at `p`.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// # Safety
    /// Eight f32 are writable at `p`.
    unsafe fn store(self, p: *mut f32, x: Self::F);
    /// Eight f16.
    /// # Safety
    /// Eight u16 are readable at `p`.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// 0 where `x <= bound`, else `y`: NaN in `x` keeps `y`.
    fn keep_above(self, x: Self::F, bound: Self::F, y: Self::F) -> Self::F;
    fn to_float(self, x: Self::I) -> Self::F;
    /// The bits of each lane.
    fn bits(self, x: Self::F) -> Self::I;
    fn from_bits(self, x: Self::I) -> Self::F;

    fn splat_i(self, x: i32) -> Self::I;
    /// # Safety
    /// 32 bytes are readable at `p`.
    unsafe fn load_i(self, p: *const i32) -> Self::I;
    /// # Safety
    /// 32 bytes are writable at `p`.
    unsafe fn store_i(self, p: *mut i32, x: Self::I);
    /// Wraps.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// Each 32-bit lane.
    fn shl32<const N: i32>(self, x: Self::I) -> Self::I;
    /// Each 32-bit lane, the sign kept.
    fn sar32<const N: i32>(self, x: Self::I) -> Self::I;
    /// Each 16-bit half lane, zeros coming in.
    fn shl16<const N: i32>(self, x: Self::I) -> Self::I;
    fn shr16<const N: i32>(self, x: Self::I) -> Self::I;
    /// `n` is below 16.
    fn shr16_by(self, x: Self::I, n: usize) -> Self::I;
    /// Each 32-bit lane by its own number, zeros coming in.
    fn shr32_each(self, x: Self::I, n: Self::I) -> Self::I;
    /// `sum + a.lo * b.lo + a.hi * b.hi` over the i16 halves of each lane; wraps.
    fn madd(self, sum: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// A table of 16 bytes for [`Simd::lookup`].
    fn table(self, bytes: &[u8; 16]) -> Self::I;
    /// Each byte, at most 15, replaced by the table's.
    fn lookup(self, table: Self::I, index: Self::I) -> Self::I;
    /// Lanes `index`, each below 8, of the whole vector.
    fn permute32(self, x: Self::I, index: Self::I) -> Self::I;
    fn unpack_lo16(self, a: Self::I, b: Self::I) -> Self::I;
    fn unpack_hi16(self, a: Self::I, b: Self::I) -> Self::I;
    fn unpack_lo32(self, a: Self::I, b: Self::I) -> Self::I;
    fn unpack_hi32(self, a: Self::I, b: Self::I) -> Self::I;
    fn unpack_lo64(self, a: Self::I, b: Self::I) -> Self::I;
    fn unpack_hi64(self, a: Self::I, b: Self::I) -> Self::I;

    /// `BYTES` (4, 8, 12 or 16) bytes, zeros behind them.
    /// # Safety
    /// `BYTES` bytes are readable at `p`.
    unsafe fn load_h<const BYTES: usize>(self, p: *const u8) -> Self::H;
    fn join(self, lo: Self::H, hi: Self::H) -> Self::I;
    /// Lane `i` holds the 16-bit word `i` of `a` below that of `b`.
    fn interleave16(self, a: Self::H, b: Self::H) -> Self::I;

    /// Sum of all lanes: the upper half onto the lower one until one is left.
    #[inline(always)]
    fn sum_lanes(self, x: Self::F) -> f32 {
        let mut l = [0.0; LANES];
        // SAFETY: eight floats.
        unsafe { self.store(l.as_mut_ptr(), x) };
        ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
    }
    /// The largest lane of a vector without NaN.
    #[inline(always)]
    fn max_lanes(self, x: Self::F) -> f32 {
        let mut l = [0.0; LANES];
        // SAFETY: eight floats.
        unsafe { self.store(l.as_mut_ptr(), x) };
        l.into_iter().fold(l[0], |a, b| if a > b { a } else { b })
    }

    /// Asks for a cache line; any address will do.
    fn prefetch(self, p: *const u8);
    /// Asks for a cache line that is needed later: into a cache behind the nearest; any address will do.
    fn prefetch_far(self, p: *const u8);
}
