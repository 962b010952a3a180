//! Codes of a tile to 16-bit levels, laid out for the integer products of [`super::product`]: into memory, where many rows
//! pass over them, or straight into the sums of a few ([`products_of_keys`], [`products_of_values`]).
//!
//! Levels are looked up in bytes, two codes at once, and then parted into words.

use super::MAX_TILE;
use super::lanes::{SideLanes, TierLanes};
use super::product::{Finish, Left};
use crate::cpu::simd::{LANES, Simd};

type Rows = [*const u8; MAX_TILE];

/// Most rows whose sums are taken straight from the codes.
pub const FEW_ROWS: usize = 4;

/// Levels of keys as `[pair of channels][tile]`, both channels of a pair in one 32-bit lane.
///
/// `rows[..n]` point at records; `n` is a multiple of 8, at most `tile`.
///
/// # Safety
/// Every row is readable over its record. `out` has room for `head_dim / 2 * tile` lanes.
#[inline(always)]
pub unsafe fn keys<S: Simd>(
    s: S,
    lanes: &SideLanes,
    rows: &Rows,
    n: usize,
    tile: usize,
    out: *mut i32,
) {
    for tier in lanes.tiers() {
        // SAFETY: `out` has room for every tier's pairs; the rest is the caller's promise.
        unsafe { all_keys(s, tier, rows, n, Stored { out: out.add(tier.first_pair * tile), tile }) }
    }
}

/// The products of `R` queries with `n` keys.
///
/// # Safety
/// As for [`keys`]; `queries` and `finish` hold what they say.
#[inline(always)]
pub unsafe fn products_of_keys<S: Simd, const R: usize>(
    s: S,
    lanes: &SideLanes,
    rows: &Rows,
    n: usize,
    queries: Left,
    finish: impl Finish<S>,
) {
    let mut sums = [[s.splat_i(0); MAX_TILE / LANES]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        *sums = [s.splat_i(finish.start(r)); MAX_TILE / LANES];
    }
    // SAFETY: a tier's pairs are among those of the queries; the rest is the caller's promise.
    unsafe {
        for tier in lanes.tiers() {
            let queries = queries.data.add(tier.first_pair);
            all_keys(s, tier, rows, n, Summed { queries, stride: lanes.head_dim / 2, sums: &raw mut sums });
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (i, sums) in sums.into_iter().enumerate().take(n / LANES) {
                finish.put(s, r, i * LANES, sums);
            }
        }
    }
}

/// What becomes of the levels of eight keys.
trait ToKeys<S: Simd>: Copy {
    type Sums;
    unsafe fn begin(self, s: S, first: usize) -> Self::Sums;
    /// Takes pair `pair` of the tier.
    unsafe fn put(self, s: S, sums: &mut Self::Sums, first: usize, pair: usize, levels: S::I);
    unsafe fn end(self, s: S, first: usize, sums: Self::Sums);
}

#[derive(Clone, Copy)]
struct Stored {
    out: *mut i32,
    tile: usize,
}

impl<S: Simd> ToKeys<S> for Stored {
    type Sums = ();
    #[inline(always)]
    unsafe fn begin(self, _s: S, _first: usize) {}
    #[inline(always)]
    unsafe fn put(self, s: S, _sums: &mut (), first: usize, pair: usize, levels: S::I) {
        // SAFETY: the tier's pairs have room for a tile of keys each.
        unsafe { s.store_i(self.out.add(pair * self.tile + first), levels) }
    }
    #[inline(always)]
    unsafe fn end(self, _s: S, _first: usize, _sums: ()) {}
}

#[derive(Clone, Copy)]
struct Summed<S: Simd, const R: usize> {
    queries: *const i32,
    stride: usize,
    sums: *mut [[S::I; MAX_TILE / LANES]; R],
}

impl<S: Simd, const R: usize> ToKeys<S> for Summed<S, R> {
    type Sums = [S::I; R];
    #[inline(always)]
    unsafe fn begin(self, s: S, first: usize) -> [S::I; R] {
        let mut out = [s.splat_i(0); R];
        for (r, out) in out.iter_mut().enumerate() {
            // SAFETY: a tile has MAX_TILE keys at most.
            *out = unsafe { (*self.sums)[r][first / LANES % (MAX_TILE / LANES)] };
        }
        out
    }
    #[inline(always)]
    unsafe fn put(self, s: S, sums: &mut [S::I; R], _first: usize, pair: usize, levels: S::I) {
        for (r, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `R` rows of queries.
            let q = unsafe { self.queries.add(r * self.stride + pair).read() };
            *sum = s.madd(*sum, s.splat_i(q), levels);
        }
    }
    #[inline(always)]
    unsafe fn end(self, _s: S, first: usize, sums: [S::I; R]) {
        for (r, sum) in sums.into_iter().enumerate() {
            // SAFETY: as in `begin`.
            unsafe { (*self.sums)[r][first / LANES % (MAX_TILE / LANES)] = sum };
        }
    }
}

#[inline(always)]
unsafe fn all_keys<S: Simd>(s: S, tier: &TierLanes, rows: &Rows, n: usize, to: impl ToKeys<S>) {
    // SAFETY: the caller's promise.
    unsafe {
        match tier.bits {
            8 => tier_of_keys::<S, 8, _>(s, tier, rows, n, to),
            6 => tier_of_keys::<S, 6, _>(s, tier, rows, n, to),
            5 => tier_of_keys::<S, 5, _>(s, tier, rows, n, to),
            4 => tier_of_keys::<S, 4, _>(s, tier, rows, n, to),
            3 => tier_of_keys::<S, 3, _>(s, tier, rows, n, to),
            _ => tier_of_keys::<S, 2, _>(s, tier, rows, n, to),
        }
    }
}

#[inline(always)]
unsafe fn tier_of_keys<S: Simd, const BITS: u8, T: ToKeys<S>>(
    s: S,
    tier: &TierLanes,
    rows: &Rows,
    n: usize,
    to: T,
) {
    let fields = Fields::<S, BITS>::new(s, tier);
    for first in (0..n).step_by(LANES) {
        let planes: [*const u8; LANES] = std::array::from_fn(|k| rows[first + k].wrapping_add(tier.main));
        let lows: [*const u8; LANES] = std::array::from_fn(|k| rows[first + k].wrapping_add(tier.low));
        let mut at = 0;
        // SAFETY: a plane of keys may be read beyond its end: those of values follow, 16 bytes at least.
        unsafe {
            let mut sums = to.begin(s, first);
            while at + 16 <= tier.bytes {
                groups::<S, BITS, 4, T>(s, &fields, tier, &planes, &lows, at, to, &mut sums, first);
                at += 16;
            }
            if at + 8 <= tier.bytes {
                groups::<S, BITS, 2, T>(s, &fields, tier, &planes, &lows, at, to, &mut sums, first);
                at += 8;
            }
            if at < tier.bytes {
                groups::<S, BITS, 1, T>(s, &fields, tier, &planes, &lows, at, to, &mut sums, first);
            }
            to.end(s, first, sums);
        }
    }
}

/// `GROUPS` groups of four bytes of eight rows, from byte `at` of their planes on.
#[inline(always)]
unsafe fn groups<S: Simd, const BITS: u8, const GROUPS: usize, T: ToKeys<S>>(
    s: S,
    fields: &Fields<S, BITS>,
    tier: &TierLanes,
    planes: &[*const u8; LANES],
    lows: &[*const u8; LANES],
    at: usize,
    to: T,
    sums: &mut T::Sums,
    first: usize,
) {
    // SAFETY: as in `tier_of_keys`. Group g of the planes starts pair `g * COUNT`.
    unsafe {
        let codes = transpose::<S, GROUPS>(s, planes, at);
        let low = if Fields::<S, BITS>::HAS_LOW { low_of_keys::<S, BITS, GROUPS>(s, tier, lows, at) } else { codes };
        for g in 0..GROUPS {
            let pair = (at / 4 + g) * Fields::<S, BITS>::COUNT;
            for part in 0..Fields::<S, BITS>::PARTS {
                let (f, next) = Fields::<S, BITS>::places(part);
                let [x, y] = fields.part(s, codes[g], low[g], part);
                to.put(s, sums, first, pair + f, x);
                to.put(s, sums, first, pair + next, y);
            }
        }
    }
}

/// 32-bit groups `at / 4 ..` of eight rows: one vector per group, one lane per row.
#[inline(always)]
unsafe fn transpose<S: Simd, const GROUPS: usize>(s: S, rows: &[*const u8; LANES], at: usize) -> [S::I; 4] {
    let mut x = [s.splat_i(0); 4];
    for (k, x) in x.iter_mut().enumerate() {
        // SAFETY: the caller has 16 bytes at `at` in every row.
        *x = unsafe { s.join(s.load_h::<16>(rows[k].add(at)), s.load_h::<16>(rows[k + 4].add(at))) };
    }
    let (a, b) = (s.unpack_lo32(x[0], x[1]), s.unpack_lo32(x[2], x[3]));
    let (c, d) = if GROUPS > 2 { (s.unpack_hi32(x[0], x[1]), s.unpack_hi32(x[2], x[3])) } else { (a, b) };
    [s.unpack_lo64(a, b), s.unpack_hi64(a, b), s.unpack_lo64(c, d), s.unpack_hi64(c, d)]
}

/// Low bits of the codes of groups `at / 4 ..` of the main plane, at the places of their upper bits (3 bits: at bit 0 of
/// each two; 5 and 6 bits: at bit 0 of each nibble): the low plane repeats, each copy shifted down by one code more. Other
/// bits are anything.
#[inline(always)]
unsafe fn low_of_keys<S: Simd, const BITS: u8, const GROUPS: usize>(
    s: S,
    tier: &TierLanes,
    rows: &[*const u8; LANES],
    at: usize,
) -> [S::I; 4] {
    let (bits, bytes) = (Fields::<S, BITS>::LOW_BITS, tier.low_bytes);
    let mut out = [s.splat_i(0); 4];
    // SAFETY: as in `tier_of_keys`; each load begins within the plane.
    unsafe {
        if bytes % 16 == 0 {
            let low = transpose::<S, 4>(s, rows, at % bytes);
            for (out, low) in out.iter_mut().zip(low) {
                *out = s.shr16_by(low, at / bytes * bits);
            }
        } else if bytes == 4 || bytes == 8 {
            let low = transpose::<S, 2>(s, rows, 0);
            for (g, out) in out.iter_mut().enumerate().take(GROUPS) {
                let copy = (at + 4 * g) / bytes;
                *out = s.shr16_by(if bytes == 8 { low[g % 2] } else { low[0] }, copy * bits);
            }
        } else if bytes == 2 {
            // Lower words, and upper ones a copy further.
            let low = transpose::<S, 1>(s, rows, 0)[0];
            let upper = s.shr16_by(s.shl32::<16>(low), bits);
            let low = s.or(s.and(low, s.splat_i(0xffff)), upper);
            for (g, out) in out.iter_mut().enumerate().take(GROUPS) {
                *out = s.shr16_by(low, (at / 2 + 2 * g) * bits);
            }
        } else {
            // Words that lie apart, or belong to different copies.
            for (g, out) in out.iter_mut().enumerate().take(GROUPS) {
                let (a, b) = (at + 4 * g, at + 4 * g + 2);
                let lower = s.shr16_by(transpose::<S, 1>(s, rows, a % bytes)[0], a / bytes * bits);
                let upper = s.shr16_by(transpose::<S, 1>(s, rows, b % bytes)[0], b / bytes * bits);
                *out = s.or(s.and(lower, s.splat_i(0xffff)), s.shl32::<16>(upper));
            }
        }
    }
    out
}

/// Levels of values as `[pair of rows][lane]`, both rows' levels in one 32-bit lane; [`pair`] says which rows. `n` is a
/// multiple of 16.
///
/// # Safety
/// As for [`keys`], with room for `n / 2 * lanes.lanes` lanes in `out`.
#[inline(always)]
pub unsafe fn values<S: Simd>(s: S, lanes: &SideLanes, rows: &Rows, n: usize, out: *mut i32) {
    for tier in lanes.tiers() {
        // SAFETY: a tier's lanes lie within those of the side; the rest is the caller's promise.
        unsafe { all_values(s, tier, rows, n, Unfolded { out: out.add(tier.first_lane), lanes: lanes.lanes }) }
    }
}

/// The rows of pair `p` of a tile.
#[inline(always)]
pub fn pair(p: usize) -> (usize, usize) {
    let first = p / LANES * 2 * LANES + p % LANES;
    (first, first + LANES)
}

/// The products of weights of `R` rows with the values of one tier.
///
/// # Safety
/// As for [`values`]; `weights` and `finish` hold what they say.
#[inline(always)]
pub unsafe fn products_of_values<S: Simd, const R: usize>(
    s: S,
    tier: &TierLanes,
    rows: &Rows,
    n: usize,
    weights: Left,
    finish: impl Finish<S>,
) {
    let to = Weighed::<_, R> { data: weights.data, stride: weights.stride, finish };
    // SAFETY: the caller's promise.
    unsafe { all_values(s, tier, rows, n, to) }
}

/// What becomes of the levels of values.
trait ToValues<S: Simd>: Copy {
    /// Takes the levels of some words of all pairs; field 0 is lanes `lane..` of the tier.
    unsafe fn take<const BITS: u8>(self, s: S, fields: &Fields<S, BITS>, words: Words<'_, S, BITS, impl Place<S>>, pairs: usize, lane: usize);
}

#[derive(Clone, Copy)]
struct Unfolded {
    out: *mut i32,
    lanes: usize,
}

impl<S: Simd> ToValues<S> for Unfolded {
    #[inline(always)]
    unsafe fn take<const BITS: u8>(self, s: S, fields: &Fields<S, BITS>, words: Words<'_, S, BITS, impl Place<S>>, pairs: usize, lane: usize) {
        for pair in 0..pairs {
            // SAFETY: the tier's lanes have room.
            unsafe {
                let (codes, low) = words.of(s, pair);
                let out = self.out.add(pair * self.lanes + lane);
                for part in 0..Fields::<S, BITS>::PARTS {
                    let (f, next) = Fields::<S, BITS>::places(part);
                    let [x, y] = fields.part(s, codes, low, part);
                    s.store_i(out.add(f * LANES), x);
                    s.store_i(out.add(next * LANES), y);
                }
            }
        }
    }
}

/// Sums of `R` rows, of as many parts of the fields at a time as registers hold.
#[derive(Clone, Copy)]
struct Weighed<F, const R: usize> {
    data: *const i32,
    stride: usize,
    finish: F,
}

impl<S: Simd, F: Finish<S>, const R: usize> ToValues<S> for Weighed<F, R> {
    #[inline(always)]
    unsafe fn take<const BITS: u8>(self, s: S, fields: &Fields<S, BITS>, words: Words<'_, S, BITS, impl Place<S>>, pairs: usize, lane: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match (Fields::<S, BITS>::PARTS, R) {
                (1, _) => self.parts::<S, BITS, 1>(s, fields, words, pairs, lane, 0),
                (2, ..4) => self.parts::<S, BITS, 2>(s, fields, words, pairs, lane, 0),
                (2, _) => {
                    self.parts::<S, BITS, 1>(s, fields, words, pairs, lane, 0);
                    self.parts::<S, BITS, 1>(s, fields, words, pairs, lane, 1);
                }
                (_, ..4) => {
                    self.parts::<S, BITS, 2>(s, fields, words, pairs, lane, 0);
                    self.parts::<S, BITS, 2>(s, fields, words, pairs, lane, 2);
                }
                _ => {
                    self.parts::<S, BITS, 1>(s, fields, words, pairs, lane, 0);
                    self.parts::<S, BITS, 1>(s, fields, words, pairs, lane, 1);
                    self.parts::<S, BITS, 1>(s, fields, words, pairs, lane, 2);
                    self.parts::<S, BITS, 1>(s, fields, words, pairs, lane, 3);
                }
            }
        }
    }
}

impl<F, const R: usize> Weighed<F, R> {
    /// Parts `first..first + M`.
    #[inline(always)]
    unsafe fn parts<S: Simd, const BITS: u8, const M: usize>(
        self,
        s: S,
        fields: &Fields<S, BITS>,
        words: Words<'_, S, BITS, impl Place<S>>,
        pairs: usize,
        lane: usize,
        first: usize,
    ) where
        F: Finish<S>,
    {
        let mut sums = [[[s.splat_i(0); 2]; M]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            *sums = [[s.splat_i(self.finish.start(r)); 2]; M];
        }
        // SAFETY: `R` rows of weights and of the result; the tier has these lanes.
        unsafe {
            for pair in 0..pairs {
                let (codes, low) = words.of(s, pair);
                let mut levels = [[codes; 2]; M];
                for (part, levels) in levels.iter_mut().enumerate() {
                    *levels = fields.part(s, codes, low, first + part);
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let w = s.splat_i(self.data.add(r * self.stride + pair).read());
                    for (sums, levels) in sums.iter_mut().zip(levels) {
                        sums[0] = s.madd(sums[0], w, levels[0]);
                        sums[1] = s.madd(sums[1], w, levels[1]);
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (part, [x, y]) in sums.into_iter().enumerate() {
                    let (f, next) = Fields::<S, BITS>::places(first + part);
                    self.finish.put(s, r, lane + f * LANES, x);
                    self.finish.put(s, r, lane + next * LANES, y);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn all_values<S: Simd>(s: S, tier: &TierLanes, rows: &Rows, n: usize, to: impl ToValues<S>) {
    // SAFETY: the caller's promise.
    unsafe {
        match tier.bits {
            8 => tier_of_values::<S, 8>(s, tier, rows, n, to),
            6 => tier_of_values::<S, 6>(s, tier, rows, n, to),
            5 => tier_of_values::<S, 5>(s, tier, rows, n, to),
            4 => tier_of_values::<S, 4>(s, tier, rows, n, to),
            3 => tier_of_values::<S, 3>(s, tier, rows, n, to),
            _ => tier_of_values::<S, 2>(s, tier, rows, n, to),
        }
    }
}

/// Where eight words of a plane stand.
trait Place<S: Simd>: Copy {
    /// First byte of word `w`.
    fn byte(self, w: usize) -> usize;
    /// The words of two rows, side by side.
    unsafe fn words(self, s: S, a: *const u8, b: *const u8) -> S::I;
}

/// The lower, or upper, half of each half of 32 bytes: shuffles stay within half vectors.
#[derive(Clone, Copy)]
struct Half<const UPPER: bool>;

impl<S: Simd, const UPPER: bool> Place<S> for Half<UPPER> {
    #[inline(always)]
    fn byte(self, w: usize) -> usize {
        w / 4 * 16 + w % 4 * 2 + if UPPER { 8 } else { 0 }
    }
    #[inline(always)]
    unsafe fn words(self, s: S, a: *const u8, b: *const u8) -> S::I {
        // SAFETY: the caller has 32 bytes at both.
        let (a, b) = unsafe { (s.load_i(a.cast()), s.load_i(b.cast())) };
        if UPPER { s.unpack_hi16(a, b) } else { s.unpack_lo16(a, b) }
    }
}

/// So many bytes in a row, 16 at most.
#[derive(Clone, Copy)]
struct Run(usize);

impl<S: Simd> Place<S> for Run {
    #[inline(always)]
    fn byte(self, w: usize) -> usize {
        2 * w
    }
    #[inline(always)]
    unsafe fn words(self, s: S, a: *const u8, b: *const u8) -> S::I {
        // SAFETY: the caller has that many bytes, rounded up to fours, at both.
        unsafe {
            let (a, b) = match self.0 {
                13.. => (s.load_h::<16>(a), s.load_h::<16>(b)),
                9.. => (s.load_h::<12>(a), s.load_h::<12>(b)),
                5.. => (s.load_h::<8>(a), s.load_h::<8>(b)),
                _ => (s.load_h::<4>(a), s.load_h::<4>(b)),
            };
            s.interleave16(a, b)
        }
    }
}

#[inline(always)]
unsafe fn tier_of_values<S: Simd, const BITS: u8>(
    s: S,
    tier: &TierLanes,
    rows: &Rows,
    n: usize,
    to: impl ToValues<S>,
) {
    let fields = Fields::<S, BITS>::new(s, tier);
    let lanes = Fields::<S, BITS>::COUNT * LANES;
    let (mut at, mut lane) = (0, 0);
    // SAFETY: bytes `at ..` of the planes remain in each step. Chunk c (16 bytes) of the planes starts lane
    // `c * COUNT * 8` of the tier.
    unsafe {
        while at + 32 <= tier.bytes {
            to.take(s, &fields, Words::new(s, tier, rows, at, Half::<false>), n / 2, lane);
            to.take(s, &fields, Words::new(s, tier, rows, at, Half::<true>), n / 2, lane + lanes);
            at += 32;
            lane += 2 * lanes;
        }
        while at < tier.bytes {
            to.take(s, &fields, Words::new(s, tier, rows, at, Run((tier.bytes - at).min(16))), n / 2, lane);
            at += 16;
            lane += lanes;
        }
    }
}

/// Eight words of the codes of the rows of a pair.
#[derive(Clone, Copy)]
struct Words<'a, S: Simd, const BITS: u8, P> {
    rows: &'a Rows,
    main: usize,
    place: P,
    /// Bytes of the plane of low bits that hold those of the words: a run of the whole plane, or eight bytes for each half of
    /// the words; which of their words belong to each word, and how far up.
    low: [usize; 2],
    run: Option<Run>,
    words: S::I,
    shifts: S::I,
}

impl<'a, S: Simd, const BITS: u8, P: Place<S>> Words<'a, S, BITS, P> {
    /// From byte `at` of the planes on.
    #[inline(always)]
    fn new(s: S, tier: &TierLanes, rows: &'a Rows, at: usize, place: P) -> Self {
        let zero = s.splat_i(0);
        let mut out = Self { rows, main: tier.main + at, place, low: [tier.low; 2], run: None, words: zero, shifts: zero };
        if Fields::<S, BITS>::HAS_LOW {
            let bytes = tier.low_bytes;
            let (mut words, mut shifts) = ([0i32; LANES], [0i32; LANES]);
            for w in 0..LANES {
                let byte = at + place.byte(w);
                words[w] = if bytes % 8 == 0 { w } else { byte % bytes / 2 } as i32;
                shifts[w] = (byte / bytes * Fields::<S, BITS>::LOW_BITS) as i32;
            }
            if bytes % 8 == 0 {
                out.low = [0, LANES / 2].map(|w| tier.low + (at + place.byte(w)) % bytes);
            } else {
                out.run = Some(Run(bytes));
            }
            // SAFETY: eight lanes each.
            (out.words, out.shifts) = unsafe { (s.load_i(words.as_ptr()), s.load_i(shifts.as_ptr())) };
        }
        out
    }

    /// The words of pair `p`, and their low bits.
    #[inline(always)]
    unsafe fn of(&self, s: S, p: usize) -> (S::I, S::I) {
        let (a, b) = pair(p);
        let (a, b) = (self.rows[a % MAX_TILE], self.rows[b % MAX_TILE]);
        // SAFETY: the caller has the words at `main` in every row. Low bits lie within their plane; the headers behind it have
        // four bytes at least, which a run may reach into.
        unsafe {
            let codes = self.place.words(s, a.add(self.main), b.add(self.main));
            if !Fields::<S, BITS>::HAS_LOW {
                return (codes, codes);
            }
            let low = match self.run {
                Some(run) => s.permute32(run.words(s, a.add(self.low[0]), b.add(self.low[0])), self.words),
                None => {
                    let a = s.join(s.load_h::<8>(a.add(self.low[0])), s.load_h::<8>(a.add(self.low[1])));
                    let b = s.join(s.load_h::<8>(b.add(self.low[0])), s.load_h::<8>(b.add(self.low[1])));
                    s.unpack_lo16(a, b)
                }
            };
            (codes, s.shr32_each(low, self.shifts))
        }
    }
}

/// The unfolding proper: one vector of code words to `COUNT` vectors of levels, two at a time.
#[derive(Clone, Copy)]
struct Fields<S: Simd, const BITS: u8> {
    tables: [S::I; 2],
    nibble: S::I,
    m66: S::I,
    m11: S::I,
    /// Of a nibble, the low bits of a code, and the upper ones that choose among `fine` with them.
    below: S::I,
    above: S::I,
    byte: S::I,
}

impl<S: Simd, const BITS: u8> Fields<S, BITS> {
    /// Words of levels that one word of codes gives.
    const COUNT: usize = match BITS {
        8 => 2,
        2 | 3 => 8,
        _ => 4,
    };
    const PARTS: usize = Self::COUNT / 2;
    const HAS_LOW: bool = matches!(BITS, 3 | 5 | 6);
    /// Low bits of a code.
    const LOW_BITS: usize = if BITS == 6 { 2 } else { 1 };

    #[inline(always)]
    fn new(s: S, tier: &TierLanes) -> Self {
        let below = if BITS == 6 { 0x3333_3333 } else { 0x1111_1111 };
        Self {
            tables: tier.tables.each_ref().map(|table| s.table(table)),
            nibble: s.splat_i(0x0f0f_0f0f),
            m66: s.splat_i(0x6666_6666),
            m11: s.splat_i(0x1111_1111),
            below: s.splat_i(below),
            above: s.splat_i(!below),
            byte: s.splat_i(0x00ff_00ff),
        }
    }

    /// The fields of a part: codes of the lower byte of each word and of the upper one.
    #[inline(always)]
    fn places(part: usize) -> (usize, usize) {
        if BITS == 8 { (0, 1) } else { (part / 2 * 4 + part % 2, part / 2 * 4 + part % 2 + 2) }
    }

    #[inline(always)]
    fn nibbles(&self, s: S, x: S::I, upper: bool) -> S::I {
        s.and(if upper { s.shr16::<4>(x) } else { x }, self.nibble)
    }

    /// Levels of part `part`, a word each.
    #[inline(always)]
    fn part(&self, s: S, codes: S::I, low: S::I, part: usize) -> [S::I; 2] {
        let upper = part % 2 == 1;
        let levels = match BITS {
            8 => codes,
            4 => s.lookup(self.tables[0], self.nibbles(s, codes, upper)),
            3 => {
                // Codes of three bits in nibbles: even ones, then odd ones.
                let both = if part < 2 {
                    s.or(s.and(s.shl16::<1>(codes), self.m66), s.and(low, self.m11))
                } else {
                    s.or(s.and(s.shr16::<1>(codes), self.m66), s.and(s.shr16::<2>(low), self.m11))
                };
                s.lookup(self.tables[0], self.nibbles(s, both, upper))
            }
            2 => s.lookup(self.tables[part / 2], self.nibbles(s, codes, upper)),
            _ => {
                // A level is a sum, and no sum carries.
                let fine = s.or(s.and(codes, self.above), s.and(low, self.below));
                s.add_i(s.lookup(self.tables[0], self.nibbles(s, codes, upper)), s.lookup(self.tables[1], self.nibbles(s, fine, upper)))
            }
        };
        [s.and(levels, self.byte), s.shr16::<8>(levels)]
    }
}
