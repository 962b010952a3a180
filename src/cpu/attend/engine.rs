//! How levels, folded queries and weights lie, and the products over them.
//!
//! By default in pairs of 16 bits ([`expand`], [`product`]). An instruction set that multiplies bytes overrides all of it.
//! Both ways sum the same integers exactly, so that the results have the same bits.

use super::lanes::{SideLanes, TierLanes};
use super::product::{self, Finish, Left, Outputs, Right, Scores};
use super::row::{self, Softmax, Weights};
use super::{MAX_TILE, expand};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::avx2::Avx2;
use crate::cpu::simd::{Simd, portable::Portable};
use crate::shape::MAX_DIM;

/// A tile of one set of keys and one of values without soft-cap, from folded queries and levels of keys to weights.
pub struct Tile {
    pub queries: Left,
    pub keys: Right,
    /// Of the folded queries and what is added to their scores, one per row; of the keys.
    pub start: *const i32,
    pub step: *const f32,
    pub constant: *const f32,
    pub k_scale: *const f32,
    pub v_scale: *const f32,
    /// `[query][stride]`.
    pub mask: Option<*const f32>,
    pub stride: usize,
    pub first_row: usize,
    pub group: usize,
    /// One per row: largest score before, and then now; what its growth leaves of earlier sums; sum of probabilities.
    pub largest: *mut f32,
    pub keep: *mut f32,
    pub sum: *mut f32,
    /// `[row][upper or lower byte][MAX_TILE]`, zeros behind the tile's keys; their sums, and what a step is worth.
    pub weights: *mut u8,
    pub weights_sum: *mut i32,
    pub worth: *mut f32,
}

impl Tile {
    /// Query of a row, counted from that of row 0.
    #[inline(always)]
    pub fn query(&self, row: usize) -> usize {
        (self.first_row + row) / self.group - self.first_row / self.group
    }
}

/// `$call` with `$R` as a constant: as many rows as there are, four at most.
macro_rules! by_rows {
    ($rows:expr, $R:ident => $call:expr) => {
        match $rows {
            1 => {
                const $R: usize = 1;
                $call
            }
            2 => {
                const $R: usize = 2;
                $call
            }
            3 => {
                const $R: usize = 3;
                $call
            }
            _ => {
                const $R: usize = 4;
                $call
            }
        }
    };
}
pub(super) use by_rows;

pub trait Engine: Simd {
    /// Channels of keys as folded queries have them, `[head_dim]`.
    #[inline(always)]
    fn key_order(self, lanes: &SideLanes, order: &mut [u16]) {
        lanes.key_order(order);
    }

    /// Channel of each lane of a value row, or `NO_CHANNEL`.
    #[inline(always)]
    fn value_order(self, lanes: &SideLanes, order: &mut [u16]) {
        lanes.value_order(order);
    }

    /// Writes one row of folded queries, 16 bits a channel, in the order of keys.
    ///
    /// # Safety
    /// `out` has room for `order.len() / 2` words.
    #[inline(always)]
    unsafe fn put_query(self, levels: &[i32; MAX_DIM], order: &[u16], out: *mut i32) {
        for (p, pair) in order.as_chunks::<2>().0.iter().enumerate() {
            // Channels are below MAX_DIM; the mask lets the compiler see it.
            let at = |c: u16| levels[usize::from(c) % MAX_DIM];
            // SAFETY: the caller's promise.
            unsafe { out.add(p).write(at(pair[0]) & 0xffff | at(pair[1]) << 16) };
        }
    }

    /// See [`expand::keys`].
    ///
    /// # Safety
    /// As there; `n` is a multiple of 16.
    #[inline(always)]
    unsafe fn keys(
        self,
        lanes: &SideLanes,
        rows: &[*const u8; MAX_TILE],
        n: usize,
        tile: usize,
        out: *mut i32,
        _low: *mut u8,
    ) {
        // SAFETY: the caller's promise.
        unsafe { expand::keys(self, lanes, rows, n, tile, out) }
    }

    /// See [`expand::values`].
    ///
    /// # Safety
    /// As there; `n` is a multiple of 16.
    #[inline(always)]
    unsafe fn values(
        self,
        lanes: &SideLanes,
        rows: &[*const u8; MAX_TILE],
        n: usize,
        out: *mut i32,
        _low: *mut u8,
    ) {
        // SAFETY: the caller's promise.
        unsafe { expand::values(self, lanes, rows, n, out) }
    }

    /// Rows up to which products are taken straight from the codes.
    const FEW_ROWS: usize = 0;

    /// The products of a few queries with `n` keys, a multiple of 16.
    ///
    /// # Safety
    /// As for [`expand::keys`]; the pieces hold what they say.
    #[inline(always)]
    unsafe fn products_of_keys(
        self,
        _lanes: &SideLanes,
        _rows: &[*const u8; MAX_TILE],
        _n: usize,
        _queries: Left,
        _finish: Scores,
    ) {
        unreachable!("an engine with FEW_ROWS has this, too")
    }

    /// The products of a few rows of weights with the values of a tier.
    ///
    /// # Safety
    /// As for [`expand::values`]; the pieces hold what they say.
    #[inline(always)]
    unsafe fn products_of_values(
        self,
        _tier: &TierLanes,
        _rows: &[*const u8; MAX_TILE],
        _n: usize,
        _weights: Left,
        _finish: Outputs,
    ) {
        unreachable!("an engine with FEW_ROWS has this, too")
    }

    /// Online softmax of the first `rows` rows of a block.
    ///
    /// # Safety
    /// Scores and masks hold `n` floats a row, a multiple of 16.
    #[inline(always)]
    unsafe fn softmax(self, block: &mut Softmax, rows: usize) {
        // SAFETY: the caller's promise.
        by_rows!(rows, R => unsafe { row::softmax::<_, R>(self, block) })
    }

    /// Weights of all rows.
    ///
    /// # Safety
    /// The pieces hold what their fields say; `n` is a multiple of 16.
    #[inline(always)]
    unsafe fn weights(self, w: Weights) {
        let mut row = 0;
        while row < w.rows {
            // SAFETY: the caller's promise.
            row += by_rows!(w.rows - row, R => unsafe { row::weights::<_, R>(self, w, row) });
        }
    }

    /// See [`product::product`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn product(self, a: Left, b: Right, finish: impl Finish<Self>) {
        // SAFETY: the caller's promise.
        unsafe { product::product(self, a, b, finish) }
    }

    /// Whether products, softmax and weights of a tile are computed in one go.
    const WEIGHS: bool = false;

    /// Products, softmax and weights of a tile.
    ///
    /// # Safety
    /// The pieces hold what their fields say; keys are a multiple of 16.
    #[inline(always)]
    unsafe fn weigh(self, _tile: &Tile) {
        unreachable!("an engine that WEIGHS has this, too")
    }

    /// The product with values of weights that [`Engine::weigh`] wrote. Levels beyond the tile's keys may be anything.
    ///
    /// # Safety
    /// The factors and the result hold what their fields say.
    #[inline(always)]
    unsafe fn weighed_outputs(self, _weights: Left, _values: Right, _to: Outputs) {
        unreachable!("an engine that WEIGHS has this, too")
    }
}

impl Engine for Portable {}

#[cfg(target_arch = "x86_64")]
impl Engine for Avx2 {
    const FEW_ROWS: usize = expand::FEW_ROWS;

    #[inline(always)]
    unsafe fn products_of_keys(
        self,
        lanes: &SideLanes,
        rows: &[*const u8; MAX_TILE],
        n: usize,
        queries: Left,
        finish: Scores,
    ) {
        // SAFETY: the caller's promise.
        by_rows!(queries.rows, R => unsafe { few_keys::<R>(self, lanes, rows, n, queries, finish) })
    }

    #[inline(always)]
    unsafe fn products_of_values(
        self,
        tier: &TierLanes,
        rows: &[*const u8; MAX_TILE],
        n: usize,
        weights: Left,
        finish: Outputs,
    ) {
        // SAFETY: the caller's promise.
        by_rows!(weights.rows, R => unsafe { few_values::<R>(self, tier, rows, n, weights, finish) })
    }
}

/// A function for each number of rows: one for all of them would be too much for the compiler.
#[cfg(target_arch = "x86_64")]
macro_rules! few {
    ($name:ident, $products:ident, $lanes:ty, $finish:ty) => {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $name<const R: usize>(
            s: Avx2,
            lanes: &$lanes,
            rows: &[*const u8; MAX_TILE],
            n: usize,
            left: Left,
            finish: $finish,
        ) {
            // SAFETY: the caller's promise.
            unsafe { expand::$products::<_, R>(s, lanes, rows, n, left, finish) }
        }
    };
}
#[cfg(target_arch = "x86_64")]
few!(few_keys, products_of_keys, SideLanes, Scores);
#[cfg(target_arch = "x86_64")]
few!(few_values, products_of_values, TierLanes, Outputs);
