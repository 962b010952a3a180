//! Integer products of 16-bit pairs, blocked for registers.
//!
//! Both products of attention have one form, `c[row][lane] = sum over depth of a[row][depth] . b[depth][lane]`, every
//! element a pair of i16 in 32 bits: scores from folded queries and levels of keys (depth: pairs of channels, lanes:
//! keys), outputs from weights and levels of values (depth: pairs of keys, lanes: channels). Sums are exact in i32, so
//! their order does not matter; what follows is f32.
//!
//! Two vectors of lanes by up to six rows keep twelve sums in registers, with two loads and six broadcasts for twelve
//! products: the multipliers are the limit. One or two rows take four vectors, so that loads do not become it.

use crate::cpu::simd::Simd;

/// The left factor: rows of pairs.
#[derive(Clone, Copy)]
pub struct Left {
    pub data: *const i32,
    pub stride: usize,
    pub rows: usize,
    pub depth: usize,
}

/// The right factor: `lanes` (a multiple of 16) of every depth.
#[derive(Clone, Copy)]
pub struct Right {
    pub data: *const i32,
    pub stride: usize,
    pub lanes: usize,
}

/// What becomes of the sums.
pub trait Finish<S: Simd>: Copy {
    /// Start of a row's sums.
    fn start(self, row: usize) -> i32;
    /// Takes eight sums of a row.
    /// # Safety
    /// `row` and `lane` lie within the factors.
    unsafe fn put(self, s: S, row: usize, lane: usize, sums: S::I);
}

/// # Safety
/// The factors hold what their fields say.
#[inline(always)]
pub unsafe fn product<S: Simd>(s: S, a: Left, b: Right, finish: impl Finish<S>) {
    let mut row = 0;
    while row < a.rows {
        let left = a.rows - row;
        // SAFETY: `row + MR <= rows` in each arm.
        unsafe {
            row += match left {
                1 => panel::<S, 1, 4>(s, a, b, row, finish),
                2 => panel::<S, 2, 4>(s, a, b, row, finish),
                3 => panel::<S, 3, 2>(s, a, b, row, finish),
                4 | 7 | 8 => panel::<S, 4, 2>(s, a, b, row, finish),
                5 => panel::<S, 5, 2>(s, a, b, row, finish),
                _ => panel::<S, 6, 2>(s, a, b, row, finish),
            };
        }
    }
}

/// `MR` rows by all lanes.
#[inline(always)]
unsafe fn panel<S: Simd, const MR: usize, const NR: usize>(
    s: S,
    a: Left,
    b: Right,
    row: usize,
    finish: impl Finish<S>,
) -> usize {
    let mut lane = 0;
    // SAFETY: blocks stay below `lanes`, a multiple of 16.
    unsafe {
        while lane + 8 * NR <= b.lanes {
            block::<S, MR, NR>(s, a, b, row, lane, finish);
            lane += 8 * NR;
        }
        while lane < b.lanes {
            block::<S, MR, 2>(s, a, b, row, lane, finish);
            lane += 16;
        }
    }
    MR
}

#[inline(always)]
unsafe fn block<S: Simd, const MR: usize, const NR: usize>(
    s: S,
    a: Left,
    b: Right,
    row: usize,
    lane: usize,
    finish: impl Finish<S>,
) {
    let mut sums = [[s.splat_i(0); NR]; MR];
    for (r, sums) in sums.iter_mut().enumerate() {
        *sums = [s.splat_i(finish.start(row + r)); NR];
    }
    // SAFETY: rows and lanes are within the factors, by the caller; depth is theirs.
    unsafe {
        let left = a.data.add(row * a.stride);
        let mut right = b.data.add(lane);
        for depth in 0..a.depth {
            let mut b_lanes = [s.splat_i(0); NR];
            for (n, x) in b_lanes.iter_mut().enumerate() {
                *x = s.load_i(right.add(8 * n));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = s.splat_i(left.add(r * a.stride + depth).read());
                for (sum, y) in sums.iter_mut().zip(b_lanes) {
                    *sum = s.madd(*sum, x, y);
                }
            }
            right = right.add(b.stride);
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (n, sums) in sums.into_iter().enumerate() {
                finish.put(s, row + r, lane + 8 * n, sums);
            }
        }
    }
}

/// Scores: `s[row][key] = sum * step[row] * scale[key] + constant[row]`.
#[derive(Clone, Copy)]
pub struct Scores {
    pub out: *mut f32,
    pub stride: usize,
    pub scale: *const f32,
    pub start: *const i32,
    pub step: *const f32,
    pub constant: *const f32,
}

impl<S: Simd> Finish<S> for Scores {
    #[inline(always)]
    fn start(self, row: usize) -> i32 {
        // SAFETY: one entry per row.
        unsafe { self.start.add(row).read() }
    }
    #[inline(always)]
    unsafe fn put(self, s: S, row: usize, lane: usize, sums: S::I) {
        // SAFETY: one entry per row, per key, and per both.
        unsafe {
            let (step, constant) = (s.splat(self.step.add(row).read()), s.splat(self.constant.add(row).read()));
            let x = s.mul(s.mul(s.to_float(sums), step), s.load(self.scale.add(lane)));
            s.store(self.out.add(row * self.stride + lane), s.add(x, constant));
        }
    }
}

/// Outputs: `o[row][lane] = o[row][lane] * keep[row] + sum * step[row]`.
#[derive(Clone, Copy)]
pub struct Outputs {
    pub out: *mut f32,
    pub stride: usize,
    /// Sum of the weights; `-offset` times it starts the sums.
    pub weights: *const i32,
    pub offset: i32,
    pub step: *const f32,
    pub keep: *const f32,
}

impl<S: Simd> Finish<S> for Outputs {
    #[inline(always)]
    fn start(self, row: usize) -> i32 {
        // SAFETY: one entry per row.
        unsafe { self.weights.add(row).read() }.wrapping_mul(-self.offset)
    }
    #[inline(always)]
    unsafe fn put(self, s: S, row: usize, lane: usize, sums: S::I) {
        // SAFETY: one entry per row, and per row and lane.
        unsafe {
            let (step, keep) = (s.splat(self.step.add(row).read()), s.splat(self.keep.add(row).read()));
            let at = self.out.add(row * self.stride + lane);
            s.store(at, s.add(s.mul(s.load(at), keep), s.mul(s.to_float(sums), step)));
        }
    }
}
